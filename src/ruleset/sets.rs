//! The sets and maps: their names, types and meaning.

use std::borrow::Cow;
use std::fmt;

use super::balancer::COMMON;
use crate::model::{Family, ServiceName};
use crate::netlink;

/// The type of a part of a key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// An address of the set's family.
    Address(Family),
    /// A transport protocol.
    Protocol,
    /// A port.
    Port,
    /// The number of an endpoint among those of its Service port. nft has no listing for plain
    /// integers in a concatenation (1.0.6 dies of it) but prints marks well, and to the kernel both
    /// are four bytes.
    Slot,
    /// The length of a network's prefix: four bytes, as of a slot.
    PrefixLength,
    /// The name of an interface.
    Interface,
}

impl Field {
    /// nft's name of the type.
    pub fn type_name(self) -> &'static str {
        match self {
            Field::Address(Family::V4) => "ipv4_addr",
            Field::Address(Family::V6) => "ipv6_addr",
            Field::Protocol => "inet_proto",
            Field::Port => "inet_service",
            Field::Slot | Field::PrefixLength => "mark",
            Field::Interface => "ifname",
        }
    }

    /// nft's number of the type (`enum datatypes` in nftables' include/datatype.h).
    fn type_id(self) -> u32 {
        match self {
            Field::Address(Family::V4) => 7,
            Field::Address(Family::V6) => 8,
            Field::Protocol => 12,
            Field::Port => 13,
            Field::Slot | Field::PrefixLength => 19,
            Field::Interface => 41,
        }
    }

    /// Bytes in a key; every field is padded to four.
    pub fn width(self) -> usize {
        match self {
            Field::Address(Family::V6) | Field::Interface => 16,
            _ => 4,
        }
    }
}

/// A set or map of the table.
///
/// The order is the one in which a listing shows them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SetName {
    /// Every ClusterIP in use: what is sent to one and served by no port of it is rejected.
    ClusterIps(Family),
    /// CIDRs at whose local addresses node ports are served.
    NodePortIps(Family),
    /// The Service network: what is sent to an address of it that no Service has is dropped.
    ServiceCidrs(Family),
    /// Sources that keep their address when they connect to a ClusterIP.
    Unmasqueraded(Family),
    /// The pods of this node, by address.
    PodCidrs(Family),
    /// Service address and port to the chain for its number of endpoints.
    ServiceIps(Family),
    /// Addresses and ports of Services of the common kind with so many endpoints; see [`COMMON`].
    ServiceIpsOver(Family, u32),
    /// Node port to the chain for its number of endpoints.
    NodePorts(Family),
    /// External address and port of Services whose external traffic stays on the node, to the
    /// chain that serves pods and the node itself.
    ClusterPolicy(Family),
    /// The same for node ports.
    NodePortClusterPolicy(Family),
    /// Service address, port and slot to an endpoint.
    Endpoints(Family),
    /// Node port and slot to an endpoint.
    NodePortEndpoints(Family),
    /// Service addresses and ports without an endpoint, to what becomes of connections.
    NoEndpoints(Family),
    /// Node ports without an endpoint, to what becomes of connections.
    NoEndpointNodePorts(Family),
    /// Service addresses and ports with session affinity, to the chain for their timeout.
    Sticky(Family),
    /// Node ports with session affinity, to the chain for their timeout.
    StickyNodePorts(Family),
    /// Service address and port with session affinity, and an endpoint that serves there.
    StickyEndpoints(Family),
    /// The same for node ports.
    StickyNodePortEndpoints(Family),
    /// Client, address and port to the endpoint that the client got last.
    Affinity(Family),
    /// Endpoints on this node, as source and destination: connections that come back to where
    /// they began.
    Hairpin(Family),
    /// Load-balancer address and port that only some may reach, to the chain for the lengths of their
    /// networks.
    LoadBalancerFirewall(Family),
    /// Load-balancer address and port, and a network that may reach it.
    LoadBalancerSources(Family),
    /// IPv4 loopback addresses at which node ports are served to the node itself.
    LocalhostIps,
    /// Interfaces from which sources keep their address when they connect to a ClusterIP.
    UnmasqueradedInterfaces,
    /// The pods of this node, by interface.
    PodInterfaces,
    /// Node port to the firewall of its Service.
    NodePortFirewall,
    /// Sources that may reach a Service's node ports.
    Allow(Family, ServiceName),
}

/// What a map leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetData {
    /// Nothing: this is a set.
    None,
    /// An endpoint: address and port.
    Endpoint(Family),
    /// A chain, or what becomes of the packet.
    Verdict,
}

/// How many clients are remembered at most, for all Services together: about 200 MB of the kernel's
/// memory. Who comes then is served, but not remembered.
const MOST_CLIENTS: u32 = 1 << 20;

/// The definition of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetSpec {
    /// The parts of a key.
    pub key: Vec<Field>,
    /// What a key leads to.
    pub data: SetData,
    /// Whether elements are intervals.
    pub interval: bool,
    /// Whether rules add the elements, which go after a time.
    pub dynamic: bool,
    /// A comment for readers.
    pub comment: &'static str,
}

impl SetName {
    /// The sets that are always there, in listing order.
    pub fn fixed() -> Vec<SetName> {
        type OfFamily = fn(Family) -> SetName;
        const OF_FAMILY: [OfFamily; 21] = [
            SetName::ClusterIps,
            SetName::NodePortIps,
            SetName::ServiceCidrs,
            SetName::Unmasqueraded,
            SetName::PodCidrs,
            SetName::ServiceIps,
            SetName::NodePorts,
            SetName::ClusterPolicy,
            SetName::NodePortClusterPolicy,
            SetName::Endpoints,
            SetName::NodePortEndpoints,
            SetName::NoEndpoints,
            SetName::NoEndpointNodePorts,
            SetName::Sticky,
            SetName::StickyNodePorts,
            SetName::StickyEndpoints,
            SetName::StickyNodePortEndpoints,
            SetName::Affinity,
            SetName::Hairpin,
            SetName::LoadBalancerFirewall,
            SetName::LoadBalancerSources,
        ];
        let of_family = OF_FAMILY.iter().flat_map(|set| Family::ALL.map(set));
        let others = [
            SetName::LocalhostIps,
            SetName::UnmasqueradedInterfaces,
            SetName::PodInterfaces,
            SetName::NodePortFirewall,
        ];
        let over = Family::ALL.into_iter().flat_map(|family| {
            (1..=COMMON).map(move |endpoints| SetName::ServiceIpsOver(family, endpoints))
        });
        of_family.chain(over).chain(others).collect()
    }

    /// The name in the table.
    pub fn name(&self) -> Cow<'static, str> {
        let by_family = |family: &Family, v4: &'static str, v6: &'static str| match family {
            Family::V4 => Cow::Borrowed(v4),
            Family::V6 => Cow::Borrowed(v6),
        };
        match self {
            SetName::ClusterIps(f) => by_family(f, "cluster-ips4", "cluster-ips6"),
            SetName::NodePortIps(f) => by_family(f, "nodeport-ips4", "nodeport-ips6"),
            SetName::ServiceCidrs(f) => by_family(f, "service-cidrs4", "service-cidrs6"),
            SetName::Unmasqueraded(f) => by_family(f, "unmasqueraded4", "unmasqueraded6"),
            SetName::PodCidrs(f) => by_family(f, "pod-cidrs4", "pod-cidrs6"),
            SetName::ServiceIps(f) => by_family(f, "service-ips4", "service-ips6"),
            SetName::ServiceIpsOver(f, endpoints) => {
                Cow::Owned(format!("service-ips{}-over-{endpoints}", f.digit()))
            }
            SetName::NodePorts(f) => by_family(f, "nodeports4", "nodeports6"),
            SetName::ClusterPolicy(f) => by_family(f, "cluster-policy4", "cluster-policy6"),
            SetName::NodePortClusterPolicy(f) => {
                by_family(f, "nodeport-cluster-policy4", "nodeport-cluster-policy6")
            }
            SetName::Endpoints(f) => by_family(f, "endpoints4", "endpoints6"),
            SetName::NodePortEndpoints(f) => {
                by_family(f, "nodeport-endpoints4", "nodeport-endpoints6")
            }
            SetName::NoEndpoints(f) => by_family(f, "no-endpoints4", "no-endpoints6"),
            SetName::NoEndpointNodePorts(f) => {
                by_family(f, "no-endpoint-nodeports4", "no-endpoint-nodeports6")
            }
            SetName::Sticky(f) => by_family(f, "sticky4", "sticky6"),
            SetName::StickyNodePorts(f) => by_family(f, "sticky-nodeports4", "sticky-nodeports6"),
            SetName::StickyEndpoints(f) => by_family(f, "sticky-endpoints4", "sticky-endpoints6"),
            SetName::StickyNodePortEndpoints(f) => {
                by_family(f, "sticky-nodeport-endpoints4", "sticky-nodeport-endpoints6")
            }
            SetName::Affinity(f) => by_family(f, "affinity4", "affinity6"),
            SetName::Hairpin(f) => by_family(f, "hairpin4", "hairpin6"),
            SetName::LoadBalancerFirewall(f) => {
                by_family(f, "load-balancer-firewall4", "load-balancer-firewall6")
            }
            SetName::LoadBalancerSources(f) => {
                by_family(f, "load-balancer-sources4", "load-balancer-sources6")
            }
            SetName::LocalhostIps => Cow::Borrowed("localhost-ips4"),
            SetName::UnmasqueradedInterfaces => Cow::Borrowed("unmasqueraded-interfaces"),
            SetName::PodInterfaces => Cow::Borrowed("pod-interfaces"),
            SetName::NodePortFirewall => Cow::Borrowed("nodeport-firewall"),
            SetName::Allow(f, service) => Cow::Owned(format!("allow{}-{service}", f.digit())),
        }
    }

    /// The definition.
    pub fn spec(&self) -> SetSpec {
        use Field::{Address, Interface, Port, PrefixLength, Protocol, Slot};
        use SetData::{Endpoint, None, Verdict};
        let service = |f| vec![Address(f), Protocol, Port];
        let node_port = || vec![Protocol, Port];
        let (key, data, comment) = match *self {
            SetName::ClusterIps(f) => {
                (vec![Address(f)], None, "ClusterIPs: other ports are rejected")
            }
            SetName::NodePortIps(f) => (vec![Address(f)], None, "where node ports are served"),
            SetName::ServiceCidrs(f) => {
                (vec![Address(f)], None, "Service network: addresses of no Service are dropped")
            }
            SetName::Unmasqueraded(f) => {
                (vec![Address(f)], None, "who keeps its address when it connects to a ClusterIP")
            }
            SetName::PodCidrs(f) => (vec![Address(f)], None, "pods of this node"),
            SetName::ServiceIps(f) => {
                (service(f), Verdict, "Service address to the chain for its number of endpoints")
            }
            SetName::ServiceIpsOver(f, _) => {
                (service(f), None, "Service addresses with so many endpoints")
            }
            SetName::NodePorts(_) => {
                (node_port(), Verdict, "node port to the chain for its number of endpoints")
            }
            SetName::ClusterPolicy(f) => {
                (service(f), Verdict, "policy Local: where pods of this node and the node go")
            }
            SetName::NodePortClusterPolicy(_) => {
                (node_port(), Verdict, "policy Local: where pods of this node and the node go")
            }
            SetName::Endpoints(f) => (
                vec![Address(f), Protocol, Port, Slot],
                Endpoint(f),
                "Service address and slot to an endpoint",
            ),
            SetName::NodePortEndpoints(f) => {
                (vec![Protocol, Port, Slot], Endpoint(f), "node port and slot to an endpoint")
            }
            SetName::NoEndpoints(f) => (service(f), Verdict, "Service addresses without endpoints"),
            SetName::NoEndpointNodePorts(_) => {
                (node_port(), Verdict, "node ports without endpoints")
            }
            SetName::Sticky(f) => (service(f), Verdict, "session affinity: for how long"),
            SetName::StickyNodePorts(_) => (node_port(), Verdict, "session affinity: for how long"),
            SetName::StickyEndpoints(f) => (
                vec![Address(f), Protocol, Port, Address(f), Port],
                None,
                "session affinity: Service address and who serves there",
            ),
            SetName::StickyNodePortEndpoints(f) => (
                vec![Protocol, Port, Address(f), Port],
                None,
                "session affinity: node port and who serves there",
            ),
            SetName::Affinity(f) => (
                vec![Address(f), Address(f), Protocol, Port],
                Endpoint(f),
                "session affinity: client and Service address to the client's endpoint",
            ),
            SetName::Hairpin(f) => (
                vec![Address(f), Address(f)],
                None,
                "endpoints here that may be balanced to themselves",
            ),
            SetName::LoadBalancerFirewall(f) => {
                (service(f), Verdict, "load-balancer addresses that only some may reach")
            }
            SetName::LoadBalancerSources(f) => (
                vec![Address(f), Protocol, Port, Address(f), PrefixLength],
                None,
                "load-balancer address and a network that may reach it, with its length",
            ),
            SetName::LocalhostIps => {
                (vec![Address(Family::V4)], None, "where node ports are served to the node itself")
            }
            SetName::UnmasqueradedInterfaces => {
                (vec![Interface], None, "from where who connects to a ClusterIP keeps its address")
            }
            SetName::PodInterfaces => (vec![Interface], None, "pods of this node"),
            SetName::NodePortFirewall => {
                (node_port(), Verdict, "node port to the firewall of its Service")
            }
            SetName::Allow(f, _) => {
                (vec![Address(f)], None, "who may reach the Service's node ports")
            }
        };
        SetSpec { key, data, interval: self.has_intervals(), dynamic: self.is_dynamic(), comment }
    }

    /// Whether elements are intervals.
    fn has_intervals(&self) -> bool {
        matches!(
            self,
            SetName::NodePortIps(_)
                | SetName::ServiceCidrs(_)
                | SetName::Unmasqueraded(_)
                | SetName::PodCidrs(_)
                | SetName::LocalhostIps
                | SetName::UnmasqueradedInterfaces
                | SetName::PodInterfaces
                | SetName::Allow(..)
        )
    }

    /// Whether rules add the elements: then they are the clients' doing, and nobody compares them.
    pub fn is_dynamic(&self) -> bool {
        matches!(self, SetName::Affinity(_))
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl SetSpec {
    /// The netlink description of a set of this definition.
    pub fn netlink<'a>(&self, name: &'a str) -> netlink::Set<'a> {
        netlink::Set {
            name,
            key_type: concatenation(&self.key),
            key_length: length(&self.key),
            data: match self.data {
                SetData::None => None,
                SetData::Verdict => Some(netlink::SetData::Verdict),
                SetData::Endpoint(family) => {
                    let fields = [Field::Address(family), Field::Port];
                    Some(netlink::SetData::Value {
                        kind: concatenation(&fields),
                        length: length(&fields),
                    })
                }
            },
            interval: self.interval,
            timeout: self.dynamic,
            dynamic: self.dynamic,
            size: self.size(),
            comment: Some(self.comment),
        }
    }

    /// How many elements there may be; `None` for any number.
    pub fn size(&self) -> Option<u32> {
        self.dynamic.then_some(MOST_CLIENTS)
    }

    /// The flags as nft prints them behind `flags`; `None` for a set without.
    pub fn flags_text(&self) -> Option<&'static str> {
        match (self.interval, self.dynamic) {
            (false, false) => None,
            (true, _) => Some("interval"),
            (false, true) => Some("dynamic,timeout"),
        }
    }

    /// The definition as nft prints it behind `type`.
    pub fn type_text(&self) -> String {
        let key: Vec<&str> = self.key.iter().map(|field| field.type_name()).collect();
        let key = key.join(" . ");
        match self.data {
            SetData::None => key,
            SetData::Verdict => format!("{key} : verdict"),
            SetData::Endpoint(family) => {
                format!("{key} : {} . inet_service", Field::Address(family).type_name())
            }
        }
    }
}

/// nft's type of a concatenation: six bits for each field (`TYPE_BITS`).
fn concatenation(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |kind, field| kind << 6 | field.type_id())
}

fn length(fields: &[Field]) -> u32 {
    u32::try_from(fields.iter().map(|field| field.width()).sum::<usize>()).expect("keys are short")
}
