//! The chains that are always there, and their rules.

use super::balancer::Balancer;
use super::rule::Selector::{
    self, DestinationAddress, DestinationPort, InputInterface, L4Proto, OriginalDestination,
    OriginalDestinationPort, SourceAddress,
};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;
use crate::netlink::{ChainKind, Hook, Hooked, Verdict};

/// `NF_IP_PRI_NAT_DST`; nft calls it `dstnat`.
const DSTNAT: i32 = -100;
/// `NF_IP_PRI_FILTER`; nft calls it `filter`.
const FILTER: i32 = 0;
/// `NF_IP_PRI_NAT_SRC`; nft calls it `srcnat`.
const SRCNAT: i32 = 100;

/// The bit of the packet mark that asks for masquerading, the one that kube-proxy uses: set on the
/// first packet of a connection in the nat hooks, cleared when it is masqueraded.
pub(super) const MASQUERADE_BIT: u32 = 0x4000;

/// A chain that is always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// Its name.
    pub name: &'static str,
    /// Where it is attached; `None` for a chain that others jump to.
    pub hooked: Option<Hooked>,
    /// The priority as nft prints it.
    pub priority: &'static str,
    /// What it is for.
    pub comment: &'static str,
}

const fn base(
    name: &'static str,
    kind: ChainKind,
    hook: Hook,
    (priority, priority_name): (i32, &'static str),
    comment: &'static str,
) -> BaseChain {
    let hooked = Some(Hooked { kind, hook, priority });
    BaseChain { name, hooked, priority: priority_name, comment }
}

const fn shared(name: &'static str, comment: &'static str) -> BaseChain {
    BaseChain { name, hooked: None, priority: "", comment }
}

/// The chain that answers as a port without a listener does.
pub(super) const REJECT_CHAIN: &str = "reject-connection";

/// The chains that are always there. Those that are jumped to come first, as the kernel wants it.
#[rustfmt::skip]
pub const BASE_CHAINS: &[BaseChain] = &[
    shared("source-firewall", "node ports: who may connect"),
    shared("load-balancer-firewall", "load-balancer addresses: who may connect"),
    shared("services", "Service addresses and node ports to endpoints"),
    shared("cluster-policy4", "policy Local: where pods of this node and the node itself go"),
    shared("cluster-policy6", "policy Local: where pods of this node and the node itself go"),
    shared("nodeport-cluster-policy4", "the same for node ports"),
    shared("nodeport-cluster-policy6", "the same for node ports"),
    shared("short-circuit4", "policy Local: finds pods of this node and the node itself"),
    shared("short-circuit6", "policy Local: finds pods of this node and the node itself"),
    shared("nodeport-short-circuit4", "the same for node ports"),
    shared("nodeport-short-circuit6", "the same for node ports"),
    shared("service4-over-1", "ClusterIPs over 1 endpoint"),
    shared("service4-over-2", "ClusterIPs over 2 endpoints"),
    shared("service4-over-3", "ClusterIPs over 3 endpoints"),
    shared("service4-over-4", "ClusterIPs over 4 endpoints"),
    shared("service4-over-5", "ClusterIPs over 5 endpoints"),
    shared("service4-over-6", "ClusterIPs over 6 endpoints"),
    shared("service4-over-7", "ClusterIPs over 7 endpoints"),
    shared("service4-over-8", "ClusterIPs over 8 endpoints"),
    shared("service6-over-1", "ClusterIPs over 1 endpoint"),
    shared("service6-over-2", "ClusterIPs over 2 endpoints"),
    shared("service6-over-3", "ClusterIPs over 3 endpoints"),
    shared("service6-over-4", "ClusterIPs over 4 endpoints"),
    shared("service6-over-5", "ClusterIPs over 5 endpoints"),
    shared("service6-over-6", "ClusterIPs over 6 endpoints"),
    shared("service6-over-7", "ClusterIPs over 7 endpoints"),
    shared("service6-over-8", "ClusterIPs over 8 endpoints"),
    shared("remember-endpoints", "session affinity: who got which endpoint"),
    shared(REJECT_CHAIN, "answers as a port without a listener does"),
    shared("without-endpoints", "finds what no endpoint serves"),
    shared("unknown-addresses", "finds what is sent to the Service network and to no Service"),
    // Before any DNAT, of ours or others, while the packet still carries the node port.
    base("firewall-prerouting", ChainKind::Filter, Hook::Prerouting,
        (DSTNAT - 10, "dstnat - 10"), "source firewalls, before DNAT"),
    // nft 1.0.6 knows dstnat in prerouting only and prints the number here.
    base("firewall-output", ChainKind::Filter, Hook::Output,
        (DSTNAT - 10, "-110"), "source firewalls, before DNAT, for the node itself"),
    base("nat-prerouting", ChainKind::Nat, Hook::Prerouting,
        (DSTNAT, "dstnat"), "connections from elsewhere"),
    base("nat-output", ChainKind::Nat, Hook::Output,
        (DSTNAT, "-100"), "connections of the node itself"),
    // Behind DNAT, when the endpoint is known.
    base("affinity-prerouting", ChainKind::Filter, Hook::Prerouting,
        (DSTNAT + 5, "dstnat + 5"), "session affinity: connections from elsewhere"),
    base("affinity-output", ChainKind::Filter, Hook::Output,
        (DSTNAT + 5, "-95"), "session affinity: connections of the node itself"),
    base("filter-input", ChainKind::Filter, Hook::Input,
        (FILTER, "filter"), "node ports without endpoints"),
    base("filter-forward", ChainKind::Filter, Hook::Forward,
        (FILTER, "filter"), "Service addresses without endpoints"),
    base("filter-output", ChainKind::Filter, Hook::Output,
        (FILTER, "filter"), "the node's own connections without endpoints"),
    base("nat-postrouting", ChainKind::Nat, Hook::Postrouting,
        (SRCNAT, "srcnat"), "masquerade: as marked, and hairpin"),
];

/// The rules of [`BASE_CHAINS`], by chain, in their order.
pub fn base_rules() -> Vec<(&'static str, RuleSpec)> {
    let mut rules = Vec::new();
    rules.extend(source_firewall().map(|rule| ("source-firewall", rule)));
    rules.extend(load_balancer_firewall().map(|rule| ("load-balancer-firewall", rule)));
    rules.extend(services().into_iter().map(|rule| ("services", rule)));
    for balancer in Family::ALL.into_iter().flat_map(Balancer::common) {
        let name = balancer.name();
        let chain =
            BASE_CHAINS.iter().find(|chain| chain.name == name).expect("it is always there");
        rules.extend(balancer.rules().into_iter().map(|rule| (chain.name, rule)));
    }
    for family in Family::ALL {
        for node_port in [false, true] {
            rules
                .push((cluster_policy_chain(family, node_port), cluster_policy(family, node_port)));
            let short_circuit = short_circuit(family, node_port);
            rules.extend(short_circuit.map(|rule| (short_circuit_chain(family, node_port), rule)));
        }
    }
    rules.extend(remember_endpoints().map(|rule| ("remember-endpoints", rule)));
    rules.extend(reject_connection().map(|rule| (REJECT_CHAIN, rule)));
    rules.extend(without_endpoints().map(|rule| ("without-endpoints", rule)));
    rules.extend(unknown_addresses().map(|rule| ("unknown-addresses", rule)));
    rules.extend(loopback().map(|rule| ("firewall-prerouting", rule)));
    rules.push((
        "firewall-prerouting",
        // The node's own connections come through the loopback device and are exempt.
        RuleBuilder::new()
            .ct_state_related_or_new()
            .not_from_loopback()
            .verdict(jump("source-firewall"))
            .build(None),
    ));
    for chain in ["firewall-prerouting", "firewall-output"] {
        let rule = RuleBuilder::new().ct_state_related_or_new();
        rules.push((chain, rule.verdict(jump("load-balancer-firewall")).build(None)));
    }
    for chain in ["nat-prerouting", "nat-output"] {
        rules.push((chain, RuleBuilder::new().verdict(jump("services")).build(None)));
    }
    for chain in ["affinity-prerouting", "affinity-output"] {
        let rule = RuleBuilder::new().ct_state_new().ct_status_dnat();
        rules.push((chain, rule.verdict(jump("remember-endpoints")).build(None)));
    }
    for chain in ["filter-input", "filter-forward", "filter-output"] {
        let new = || RuleBuilder::new().ct_state_new();
        rules.push((chain, new().verdict(jump("without-endpoints")).build(None)));
        // What is for the node itself is for somebody who has the address.
        if chain != "filter-input" {
            rules.push((chain, new().verdict(jump("unknown-addresses")).build(None)));
        }
    }
    rules.extend(postrouting().into_iter().map(|rule| ("nat-postrouting", rule)));
    rules
}

pub(super) fn jump(chain: &str) -> Verdict {
    Verdict::Jump(chain.to_owned())
}

/// The chain that serves who is here by all endpoints, whatever the policy.
fn cluster_policy_chain(family: Family, node_port: bool) -> &'static str {
    match (family, node_port) {
        (Family::V4, false) => "cluster-policy4",
        (Family::V6, false) => "cluster-policy6",
        (Family::V4, true) => "nodeport-cluster-policy4",
        (Family::V6, true) => "nodeport-cluster-policy6",
    }
}

/// The chain that finds who is here.
pub(super) fn short_circuit_chain(family: Family, node_port: bool) -> &'static str {
    match (family, node_port) {
        (Family::V4, false) => "short-circuit4",
        (Family::V6, false) => "short-circuit6",
        (Family::V4, true) => "nodeport-short-circuit4",
        (Family::V6, true) => "nodeport-short-circuit6",
    }
}

/// Packets to a node port: a local address in the configured CIDRs, whatever the port.
fn to_node_port_address(family: Family) -> RuleBuilder {
    RuleBuilder::new()
        .in_set(&[DestinationAddress(family)], &SetName::NodePortIps(family))
        .not_to_loopback(family)
        .at_local_address()
}

fn service_key(family: Family) -> [Selector; 3] {
    [DestinationAddress(family), L4Proto, DestinationPort]
}

/// Where packets with loopback addresses may leave, they may come, too (CVE-2020-8558). Whether they
/// may is a setting of the kernel, which others make, too, and which outlives us: so the rules are
/// always there.
fn loopback() -> [RuleSpec; 2] {
    let from_elsewhere = || RuleBuilder::new().ct_state_new().not_from_loopback();
    [from_elsewhere().with_loopback_destination(), from_elsewhere().with_loopback_source()]
        .map(|rule| rule.verdict(Verdict::Drop).build(Some("loopback addresses from elsewhere")))
}

/// What has been translated is on its way to an endpoint, whatever Service has the endpoint's address
/// for its own.
fn pass_translated() -> RuleSpec {
    RuleBuilder::new().ct_status_dnat().verdict(Verdict::Return).build(Some("found its endpoint"))
}

fn source_firewall() -> [RuleSpec; 2] {
    Family::ALL.map(|family| {
        to_node_port_address(family)
            .vmap(&[L4Proto, DestinationPort], &SetName::NodePortFirewall)
            .build(None)
    })
}

fn load_balancer_firewall() -> [RuleSpec; 2] {
    Family::ALL.map(|family| {
        let map = SetName::LoadBalancerFirewall(family);
        RuleBuilder::new().vmap(&service_key(family), &map).build(None)
    })
}

fn services() -> Vec<RuleSpec> {
    // Who is not a pod might get an answer that does not come back through this node.
    let masquerade = Family::ALL.map(|family| {
        RuleBuilder::new()
            .in_set(&[DestinationAddress(family)], &SetName::ClusterIps(family))
            .not_in_set(&[SourceAddress(family)], &SetName::Unmasqueraded(family))
            .not_in_set(&[InputInterface], &SetName::UnmasqueradedInterfaces)
            .mark(MASQUERADE_BIT)
            .build(None)
    });
    let common = Family::ALL.into_iter().flat_map(Balancer::common).filter_map(|balancer| {
        let rule = RuleBuilder::new().in_set(&service_key(balancer.family), &balancer.set()?);
        Some(rule.verdict(Verdict::Goto(balancer.name())).build(None))
    });
    let by_address = Family::ALL.map(|family| {
        RuleBuilder::new().vmap(&service_key(family), &SetName::ServiceIps(family)).build(None)
    });
    let by_node_port = Family::ALL.map(|family| {
        to_node_port_address(family)
            .vmap(&[L4Proto, DestinationPort], &SetName::NodePorts(family))
            .build(None)
    });
    let at_localhost = RuleBuilder::new()
        .in_set(&[DestinationAddress(Family::V4)], &SetName::LocalhostIps)
        .vmap(&[L4Proto, DestinationPort], &SetName::NodePorts(Family::V4))
        .build(None);
    let rules = masquerade.into_iter().chain(common).chain(by_address).chain(by_node_port);
    rules.chain([at_localhost]).collect()
}

/// A chain of one rule: the kernel validates a map of verdicts as often as rules ask it.
fn cluster_policy(family: Family, node_port: bool) -> RuleSpec {
    let rule = RuleBuilder::new();
    let rule = if node_port {
        let map = SetName::NodePortClusterPolicy(family);
        rule.vmap(&[L4Proto, DestinationPort], &map)
    } else {
        rule.vmap(&service_key(family), &SetName::ClusterPolicy(family))
    };
    rule.build(None)
}

/// Who is here did not come through a load balancer, which would have chosen a node with endpoints.
/// The node may have used an address that others cannot answer to.
fn short_circuit(family: Family, node_port: bool) -> [RuleSpec; 3] {
    let lead_on = |rule: RuleBuilder| {
        let chain = cluster_policy_chain(family, node_port).to_owned();
        rule.verdict(Verdict::Goto(chain)).build(None)
    };
    [
        lead_on(RuleBuilder::new().in_set(&[SourceAddress(family)], &SetName::PodCidrs(family))),
        lead_on(RuleBuilder::new().in_set(&[InputInterface], &SetName::PodInterfaces)),
        lead_on(RuleBuilder::new().by_local_address().mark(MASQUERADE_BIT)),
    ]
}

/// By what the first packet carried when it came; now it carries the endpoint.
fn remember_endpoints() -> [RuleSpec; 5] {
    let [address4, address6] = Family::ALL.map(|family| {
        let key = [OriginalDestination(family), L4Proto, OriginalDestinationPort];
        RuleBuilder::new().vmap(&key, &SetName::Sticky(family)).build(None)
    });
    let [node_port4, node_port6] = Family::ALL.map(|family| {
        RuleBuilder::new()
            .in_set(&[OriginalDestination(family)], &SetName::NodePortIps(family))
            .vmap(&[L4Proto, OriginalDestinationPort], &SetName::StickyNodePorts(family))
            .build(None)
    });
    let at_localhost = RuleBuilder::new()
        .in_set(&[OriginalDestination(Family::V4)], &SetName::LocalhostIps)
        .vmap(&[L4Proto, OriginalDestinationPort], &SetName::StickyNodePorts(Family::V4))
        .build(None);
    [address4, address6, node_port4, node_port6, at_localhost]
}

/// TCP is answered with a reset rather than with ICMP: the ICMP error for a SYN of the node itself
/// arrives while `connect` holds the socket and is lost (`LockDroppedIcmps`), so that the process
/// would wait for the next SYN, a second.
fn reject_connection() -> [RuleSpec; 2] {
    let tcp = RuleBuilder::new().tcp().reject_with_reset().build(None);
    [tcp, RuleBuilder::new().reject().build(None)]
}

fn without_endpoints() -> [RuleSpec; 6] {
    let [address4, address6] = Family::ALL.map(|family| {
        RuleBuilder::new().vmap(&service_key(family), &SetName::NoEndpoints(family)).build(None)
    });
    let [node_port4, node_port6] = Family::ALL.map(|family| {
        to_node_port_address(family)
            .vmap(&[L4Proto, DestinationPort], &SetName::NoEndpointNodePorts(family))
            .build(None)
    });
    let at_localhost = RuleBuilder::new()
        .in_set(&[DestinationAddress(Family::V4)], &SetName::LocalhostIps)
        .vmap(&[L4Proto, DestinationPort], &SetName::NoEndpointNodePorts(Family::V4))
        .build(None);
    [pass_translated(), address4, address6, node_port4, node_port6, at_localhost]
}

/// What goes on here was not translated, so no Service has its address, or none its port.
fn unknown_addresses() -> [RuleSpec; 5] {
    let [port4, port6] = Family::ALL.map(|family| {
        RuleBuilder::new()
            .in_set(&[DestinationAddress(family)], &SetName::ClusterIps(family))
            .verdict(Verdict::Goto(REJECT_CHAIN.to_owned()))
            .build(Some("no such port"))
    });
    let [address4, address6] = Family::ALL.map(|family| {
        RuleBuilder::new()
            .in_set(&[DestinationAddress(family)], &SetName::ServiceCidrs(family))
            .verdict(Verdict::Drop)
            .build(Some("no such Service"))
    });
    [pass_translated(), port4, port6, address4, address6]
}

fn postrouting() -> [RuleSpec; 3] {
    let marked = RuleBuilder::new()
        .marked(MASQUERADE_BIT)
        .flip_mark(MASQUERADE_BIT)
        .masquerade()
        .build(Some("asked for by mark"));
    let [hairpin4, hairpin6] = Family::ALL.map(|family| {
        RuleBuilder::new()
            .ct_status_dnat()
            .in_set(&[SourceAddress(family), DestinationAddress(family)], &SetName::Hairpin(family))
            .masquerade()
            .build(Some("hairpin"))
    });
    [marked, hairpin4, hairpin6]
}
