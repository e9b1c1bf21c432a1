//! Audits as a whole, and listings that were taken from a kernel: `samples/` has one small world as
//! several versions of nft list it, with counters set by hand and tables of others beside ours.
//! The ruleset may have changed since; what matters is that all versions read alike.

use super::*;
use crate::model::{
    Backend, CidrSet, Family, Node, Protocol, Seniority, ServiceName, TrafficPolicy,
};
use crate::plan::{Choice, Firewall, Frontend, NodePort, Pool, Sources};

const NFT_1_0_6: &str = include_str!("samples/nft-1.0.6.json");
const NFT_1_0_6_PARTS: &str = include_str!("samples/nft-1.0.6-parts.json");
const NFT_1_0_6_PLAIN: &str = include_str!("samples/nft-1.0.6-plain.txt");
const NFT_1_1_7: &str = include_str!("samples/nft-1.1.7.json");

fn read(json: &str) -> Observed {
    Observed::read(&Listing { json: json.to_owned(), plain: None }).unwrap()
}

#[test]
fn all_versions_of_nft_read_alike() {
    let expected = read(NFT_1_1_7);
    let table = expected.table.as_ref().unwrap();
    assert_eq!((table.sets.len(), table.chains.len()), (21, 15));
    assert_eq!(table.others, Vec::<String>::new());
    assert!(table.chains.values().any(|chain| !chain.rules.is_empty()));

    let plain = Some(NFT_1_0_6_PLAIN.to_owned());
    let parts = Listing { json: NFT_1_0_6_PARTS.to_owned(), plain };
    // A single flag is a string in nft 1.1.3, and numbers have names without `-n`.
    let one_flag = NFT_1_1_7
        .replace(r#"["fully-random"]"#, r#""fully-random""#)
        .replace(r#"["interval"]"#, r#""interval""#)
        .replace(r#"["persist"]"#, r#""persist""#)
        .replace(r#"["daddr"]"#, r#""daddr""#);
    let names = NFT_1_1_7
        .replace(r#""concat": [6, "#, r#""concat": ["tcp", "#)
        .replace(r#"", 6, 8"#, r#"", "tcp", 8"#)
        .replace(r#""right": 8"#, r#""right": "new""#)
        .replace(r#""right": 32"#, r#""right": "dnat""#)
        .replace(r#""right": 2}"#, r#""right": "local"}"#)
        .replace(r#""expr": 1}"#, r#""expr": "port-unreachable"}"#);
    assert_ne!(one_flag, NFT_1_1_7);
    assert!(names.contains(r#"["10.96.0.1", "tcp", 80, 0]"#));
    let others = [
        ("1.0.6", read(NFT_1_0_6)),
        ("1.0.6 in parts", Observed::read(&parts).unwrap()),
        ("1.1.3", read(&one_flag)),
        ("names", read(&names)),
    ];
    for (version, observed) in others {
        assert_eq!(observed.table, expected.table, "{version}");
        assert_eq!(observed.foreign, expected.foreign, "{version}");
        assert_eq!(observed.kube_proxy, expected.kube_proxy, "{version}");
    }
}

#[test]
fn a_listing_says_what_the_kernel_holds() {
    let observed = read(NFT_1_0_6);
    let table = observed.table.unwrap();
    let elements = |set: &str| -> Vec<String> {
        table.sets[set].elements.iter().map(|(key, element)| element.text(key)).collect()
    };
    assert_eq!(
        elements("endpoints6"),
        [
            "fd00:96::1 . tcp . 80 . 0x00000000 : fd00:244:1::1 . 8080",
            "fd00:96::1 . tcp . 80 . 0x00000001 : fd00:244:1::2 . 8080",
        ]
    );
    assert_eq!(
        elements("nodeport-firewall"),
        ["tcp . 30080 comment \"shop/web:http\" : goto fw-shop/web",]
    );
    assert_eq!(elements("allow4-shop/web"), ["192.0.2.0/24", "198.51.100.7"]);
    let definition = |set: &str| table.sets[set].definition.clone();
    assert_eq!(definition("allow4-shop/web"), "type ipv4_addr flags interval");
    assert_eq!(
        definition("endpoints4"),
        "type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service"
    );
    let hook = |chain: &str| table.chains[chain].hook.clone();
    assert_eq!(
        hook("nat-output").as_deref(),
        Some("type nat hook output priority -100 policy accept")
    );
    assert_eq!(hook("fw-shop/web"), None);
    let firewall = &table.chains["fw-shop/web"].rules;
    assert_eq!(
        firewall[1].text,
        "ip6 saddr @allow6-shop/web counter packets 0 bytes 0 accept comment \"allowed\""
    );
    assert_eq!(firewall[1].counts, [Count { packets: 5, bytes: 400 }]);
    let chains: Vec<(&str, &str, bool, u64)> =
        observed.foreign.iter().map(|c| (&*c.table, &*c.chain, c.drops, c.rules)).collect();
    assert_eq!(chains, [("host", "input", true, 2)]);
    assert_eq!(observed.kube_proxy, ["ip nat"]);
}

#[test]
fn what_is_not_understood_matters_in_our_table_only() {
    let objects = r#"{"nftables": [
        {"table": {"family": "inet", "name": "portcullis", "flags": ["dormant", "persist"]}},
        {"chain": {"family": "inet", "table": "portcullis", "name": "odd", "hook": "teleport"}},
        {"set": {"family": "inet", "table": "portcullis", "name": "odd", "type": 7}},
        {"flowtable": {"family": "inet", "table": "portcullis", "name": "fast"}},
        {"rule": {"family": "inet", "table": "portcullis", "chain": "odd", "expr": "?"}},
        {"chain": {"family": "inet", "table": "other", "name": "odd", "hook": "teleport"}},
        {"set": {"family": "inet", "table": "other", "name": "odd", "type": 7}},
        {"flowtable": {"family": "inet", "table": "other", "name": "fast"}},
        {"rule": {"family": "inet", "table": "other", "chain": "odd", "expr": "?"}},
        {"chain": {"family": "ip", "table": "portcullis", "name": "a", "type": "filter",
                   "hook": "input", "prio": 0, "policy": "accept"}}
    ]}"#;
    let observed = read(objects);
    let table = observed.table.unwrap();
    assert!(table.dormant);
    let kinds: Vec<&str> = table.others.iter().filter_map(|o| o.split(' ').next()).collect();
    assert_eq!(kinds, ["chain", "flowtable", "rule", "set"]);
    assert_eq!(observed.foreign.len(), 1, "a table of our name in another family is not ours");
}

#[test]
fn broken_listings_are_errors() {
    for json in ["{", "[]", r#"{"nftables": [7]}"#, r#"{"nftables": [{}]}"#, "null"] {
        let listing = Listing { json: json.to_owned(), plain: None };
        let error = Observed::read(&listing).expect_err(json);
        assert!(matches!(error, Error::NotUnderstood { .. }), "{json}: {error}");
    }
}

/// The world as it is when everything is in force.
fn in_force() -> (Desired, NodeContext, Observed) {
    let (desired, node) = world();
    let plans = desired.services().filter_map(|service| desired.effective(service));
    let contributions: Vec<Contribution> = plans
        .map(|plan| Contribution::service(plan, |_| None))
        .chain([Contribution::node(&node)])
        .collect();
    let observed = Observed { table: Some(Table::desired(&contributions)), ..Observed::default() };
    (desired, node, observed)
}

#[test]
fn every_change_is_one_difference() {
    type Tamper = fn(&mut Table);
    let table: &[(&str, Tamper, &[&str])] = &[
        ("nothing", |_| {}, &[]),
        (
            "only a counter",
            |t| {
                t.chains.get_mut("fw-shop/web").unwrap().rules[0].counts[..].fill(Count::default());
            },
            &[],
        ),
        ("dormant", |t| t.dormant = true, &["changed table portcullis"]),
        (
            "a chain of another's",
            |t| drop(t.chains.insert("x".into(), Chain::default())),
            &["unexpected chain x"],
        ),
        (
            "a balancing chain without need",
            |t| {
                let chain = t.chains["service4-over-2"].clone();
                t.chains.insert("service4-over-9".into(), chain);
            },
            &["unexpected chain service4-over-9"],
        ),
        (
            "a chain gone, with its rules",
            |t| drop(t.chains.remove("services")),
            &["missing chain services"],
        ),
        (
            "another priority",
            |t| {
                let hook = "type nat hook output priority -90 policy accept";
                t.chains.get_mut("nat-output").unwrap().hook = Some(hook.into());
            },
            &["changed chain nat-output"],
        ),
        (
            "rules in another order",
            |t| {
                t.chains.get_mut("nat-postrouting").unwrap().rules.swap(0, 1);
            },
            &["missing rule in chain nat-postrouting", "unexpected rule in chain nat-postrouting"],
        ),
        (
            "a rule's comment",
            |t| {
                t.chains.get_mut("nat-output").unwrap().rules[0].text.push_str(" comment \"x\"");
            },
            &["missing rule in chain nat-output", "unexpected rule in chain nat-output"],
        ),
        (
            "a set gone, with its elements",
            |t| drop(t.sets.remove("endpoints4")),
            &["missing set endpoints4"],
        ),
        (
            "a set of another type",
            |t| {
                t.sets.get_mut("cluster-ips4").unwrap().definition.push_str(" timeout 5");
            },
            &["changed set cluster-ips4"],
        ),
        ("a set more", |t| drop(t.sets.insert("y".into(), Set::default())), &["unexpected set y"]),
        (
            "a kind of object that we never make",
            |t| t.others.push("counter {}".into()),
            &["unexpected object in table portcullis"],
        ),
        (
            "a comment",
            |t| {
                let elements = &mut t.sets.get_mut("cluster-ips4").unwrap().elements;
                elements.values_mut().next().unwrap().comment = None;
            },
            &["changed element in cluster-ips4"],
        ),
        (
            "endpoints in each other's slots, of one frontend",
            |t| {
                let elements = &mut t.sets.get_mut("endpoints4").unwrap().elements;
                let mut values = elements.values_mut();
                let (first, second) = (values.next().unwrap(), values.next().unwrap());
                std::mem::swap(first, second);
            },
            &[],
        ),
        (
            "an endpoint twice",
            |t| {
                let elements = &mut t.sets.get_mut("endpoints4").unwrap().elements;
                let mut values = elements.values_mut();
                let first = values.next().unwrap().clone();
                *values.next().unwrap() = first;
            },
            &["changed element in endpoints4"],
        ),
        (
            "a slot without a number",
            |t| {
                let elements = &mut t.sets.get_mut("endpoints4").unwrap().elements;
                elements.insert("10.96.0.1 . tcp . 80 . foo".into(), Element::default());
            },
            &["unexpected element in endpoints4"],
        ),
    ];
    for (name, tamper, expected) in table {
        let (desired, node, mut observed) = in_force();
        tamper(observed.table.as_mut().unwrap());
        let audit = examine(&desired, &node, &observed);
        let text = audit.text(usize::MAX);
        let found: Vec<String> = audit.differences.iter().map(report::line).collect();
        assert_eq!(found.len(), expected.len(), "{name}: {text}");
        for (found, expected) in found.iter().zip(*expected) {
            assert!(found.starts_with(expected), "{name}: {text}");
        }
        assert_eq!(audit.in_sync, expected.is_empty(), "{name}");
    }
}

#[test]
fn an_audit_as_text() {
    let (desired, node, mut observed) = in_force();
    let quiet = "\
in sync; 1 node port open to everyone, 1 restricted

node ports (3)
  SERVICE         PORT       WHO                                           ENDPOINTS       ACCEPTED  REFUSED
  shop/late:http  tcp 30080  not served: belongs to shop/web               0 IPv4          -         -
  shop/late:more  tcp 30081  everyone                                      0 IPv4          -         -
  shop/web:http   tcp 30080  192.0.2.0/24, 198.51.100.7/32, 2001:db8::/32  2 IPv4, 2 IPv6  -         -

diagnostics (1)
  error: Service shop/late: spec.ports[\"http\"].nodePort: tcp node port 30080 belongs to the older Service shop/web; not served for this one
";
    assert_eq!(examine(&desired, &node, &observed).to_string(), quiet);

    observed.foreign = read(NFT_1_0_6).foreign;
    observed.kube_proxy = vec!["ip nat".into()];
    let table = observed.table.as_mut().unwrap();
    for rule in &mut table.chains.get_mut("fw-shop/web").unwrap().rules {
        if rule.text.contains(" accept") {
            rule.counts = vec![Count { packets: 7, bytes: 420 }];
        }
    }
    table.sets.get_mut("allow4-shop/web").unwrap().elements.clear();
    table.chains.get_mut("nat-output").unwrap().hook = Some("hook \u{1b}[2J".into());
    let loud = "\
NOT IN SYNC, 3 differences; 1 node port open to everyone, 1 restricted; 1 firewall NOT IN FORCE; 1 base chain of another table drops by policy
warning: table ip nat looks like kube-proxy's; two proxies on one node undo each other's work

differences (3)
  changed  chain nat-output            hook [2J, should be type nat hook output priority -100 policy accept
  missing  element in allow4-shop/web  192.0.2.0/24
  ... and 1 more

node ports (3)
  SERVICE         PORT       WHO                                                          ENDPOINTS       ACCEPTED    REFUSED
  shop/late:http  tcp 30080  not served: belongs to shop/web                              0 IPv4          -           -
  shop/late:more  tcp 30081  everyone                                                     0 IPv4          -           -
  shop/web:http   tcp 30080  192.0.2.0/24, 198.51.100.7/32, 2001:db8::/32 (NOT IN FORCE)  2 IPv4, 2 IPv6  14 (840 B)  -

base chains of other tables (1)
  HOOK   PRIORITY  TABLE      CHAIN  TYPE    POLICY  RULES  ORDER
  input  -5        inet host  input  filter  DROP    2      before ours

diagnostics (1)
  error: Service shop/late: spec.ports[\"http\"].nodePort: tcp node port 30080 belongs to the older Service shop/web; not served for this one
";
    assert_eq!(examine(&desired, &node, &observed).text(2), loud);
}

#[test]
fn an_audit_as_json() {
    let (desired, node, mut observed) = in_force();
    observed.foreign = read(NFT_1_0_6).foreign;
    observed.kube_proxy = vec!["ip nat".into()];
    let table = observed.table.as_mut().unwrap();
    table.sets.get_mut("hairpin4").unwrap().elements.clear();
    table.chains.get_mut("fw-shop/web").unwrap().rules.last_mut().unwrap().counts =
        vec![Count { packets: 3, bytes: 180 }];
    let json = serde_json::to_value(examine(&desired, &node, &observed)).unwrap();
    let expected = serde_json::json!({
        "in_sync": false,
        "differences": [{
            "object": "element",
            "name": "hairpin4",
            "key": "10.244.1.1 . 10.244.1.1",
            "change": "missing",
            "expected": "10.244.1.1 . 10.244.1.1",
            "found": null,
        }],
        "exposures": [
            {
                "namespace": "shop",
                "service": "late",
                "access": "everyone",
                "sources": [],
                "in_force": true,
                "accepted": null,
                "refused": null,
                "node_ports": [
                    {
                        "protocol": "TCP",
                        "port": 30080,
                        "name": "http",
                        "endpoints": { "IPv4": 0 },
                        "lost_to": "shop/web",
                    },
                    {
                        "protocol": "TCP",
                        "port": 30081,
                        "name": "more",
                        "endpoints": { "IPv4": 0 },
                        "lost_to": null,
                    },
                ],
            },
            {
                "namespace": "shop",
                "service": "web",
                "access": "sources",
                "sources": ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"],
                "in_force": true,
                "accepted": null,
                "refused": { "packets": 3, "bytes": 180 },
                "node_ports": [{
                    "protocol": "TCP",
                    "port": 30080,
                    "name": "http",
                    "endpoints": { "IPv4": 2, "IPv6": 2 },
                    "lost_to": null,
                }],
            },
        ],
        "foreign": [{
            "hook": "input",
            "priority": -5,
            "family": "inet",
            "table": "host",
            "chain": "input",
            "type": "filter",
            "device": null,
            "policy": "drop",
            "drops": true,
            "rules": 2,
            "position": "before",
        }],
        "kube_proxy": ["ip nat"],
        "diagnostics": [{
            "object": { "kind": "Service", "namespace": "shop", "name": "late" },
            "field": "spec.ports[\"http\"].nodePort",
            "severity": "error",
            "message": "tcp node port 30080 belongs to the older Service shop/web; \
                        not served for this one",
        }],
    });
    assert_eq!(json, expected);
}

/// `shop/web` with a firewall and two endpoints, one of them here; `shop/late`, which is open,
/// without endpoints, and asks for a node port that is taken.
fn world() -> (Desired, NodeContext) {
    let node = NodeContext {
        node: Node {
            primary_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
            ..Node::default()
        },
        ..NodeContext::new("here".into())
    };
    let sources = CidrSet::parse("192.0.2.0/24, 198.51.100.7, 2001:db8::/32").unwrap();
    let mut web = plan("web", 1, &Family::ALL, &[30080], 2);
    web.firewall = Some(Firewall {
        node_ports: vec![NodePort {
            protocol: Protocol::Tcp,
            port: 30080,
            port_name: "http".into(),
        }],
        sources: Sources::Allow(sources),
    });
    let late = plan("late", 2, &[Family::V4], &[30080, 30081], 0);
    let mut desired = Desired::default();
    for plan in [web, late] {
        desired.set(&plan.service().clone(), Some(plan));
    }
    (desired, node)
}

fn plan(
    name: &str,
    number: u8,
    families: &[Family],
    node_ports: &[u16],
    endpoints: u8,
) -> ServicePlan {
    let service_ip = |family| match family {
        Family::V4 => format!("10.96.0.{number}").parse().unwrap(),
        Family::V6 => format!("fd00:96::{number}").parse().unwrap(),
    };
    let endpoint = |family, endpoint| match family {
        Family::V4 => format!("10.244.{number}.{endpoint}").parse().unwrap(),
        Family::V6 => format!("fd00:244:{number}::{endpoint}").parse().unwrap(),
    };
    let mut pools = Vec::new();
    for (index, node_port) in node_ports.iter().enumerate() {
        for &family in families {
            let port = 80 + u16::try_from(index).unwrap();
            let service_ip = Frontend::ClusterIp { address: service_ip(family), port };
            let backend = |e| Backend { address: endpoint(family, e), port: 8080 };
            pools.push(Pool {
                port_name: if index == 0 { "http".into() } else { "more".into() },
                family,
                protocol: Protocol::Tcp,
                frontends: vec![service_ip, Frontend::NodePort { port: *node_port }],
                backends: (1..=endpoints).map(backend).collect(),
                local_backends: Vec::new(),
                lasting: Vec::new(),
                any: endpoints > 0,
                internal_traffic: TrafficPolicy::Cluster,
                external_traffic: TrafficPolicy::Cluster,
                affinity: None,
                choice: Choice::Random,
                hairpins: (1..=endpoints).take(1).map(|e| endpoint(family, e)).collect(),
            });
        }
    }
    ServicePlan {
        health_check: None,
        seniority: Seniority { created: number.into(), service: ServiceName::new("shop", name) },
        cluster_ips: families.iter().map(|family| service_ip(*family)).collect(),
        pools,
        firewall: None,
        load_balancer_firewall: None,
        diagnostics: vec![],
    }
}
