//! `portcullis::audit` on a real kernel: what was programmed is in sync, and what somebody changes
//! behind our back is found, no more and no less.
//!
//! `NFT` names another `nft` to test with; the one that is installed is the default.

mod kernel;
mod world;

use std::fmt::Write as _;

use portcullis::audit::{
    Access, Audit, Change, Count, Difference, Exposure, Nft, Object, Observed, Position,
};
use portcullis::model::{Family, Protocol, ServiceName, SourceRestriction};

use kernel::{handle, namespace, nft, nft_program};
use world::{Exposed, World};

#[test]
fn what_was_programmed_is_in_sync() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    namespace.enter(|| {
        let worker = world.program();
        // Owned by the worker, and by nobody: some versions of nft need to be asked differently.
        let owned = world.audit();
        assert_eq!(owned.differences, [], "{owned}");
        drop(worker);
        let orphaned = world.audit();
        assert_eq!(orphaned.differences, [], "{orphaned}");
        assert_eq!(owned, orphaned);
        assert!(owned.in_sync);
        assert_eq!(owned.foreign, []);
    });
}

/// What should be there is known to an audit from the same bytes that were written. Here it is
/// written out.
#[test]
fn nft_reads_what_was_meant() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    let table: &[(&str, &str)] = &[
        ("cluster-ips4", "10.96.0.7 comment \"shop/inside\""),
        ("cluster-ips6", "fd00:96::10 comment \"shop/unnamed\""),
        ("nodeport-ips4", "192.168.77.1"),
        ("nodeport-ips6", "fd00:77::1"),
        ("service-ips4-over-7", "10.96.0.7 . tcp . 80 comment \"shop/inside:http\""),
        ("service-ips6-over-2", "fd00:96::8 . sctp . 53 comment \"shop/dns:dns-sctp\""),
        ("nodeports4", "tcp . 30086 comment \"shop/unnamed\" : goto nodeport4-over-1"),
        ("nodeports6", "udp . 30053 comment \"shop/dns:dns\" : goto nodeport6-over-2"),
        ("endpoints4", "10.96.0.7 . tcp . 80 . 0x00000006 : 10.244.7.7 . 8080"),
        ("endpoints6", "fd00:96::8 . udp . 53 . 0x00000001 : fd00:244:8::2 . 8053"),
        ("nodeport-endpoints4", "tcp . 30080 . 0x00000002 : 10.244.1.3 . 8080"),
        ("nodeport-endpoints6", "udp . 30053 . 0x00000000 : fd00:244:8::1 . 8053"),
        (
            "no-endpoints4",
            "10.96.0.6 . tcp . 80 comment \"shop/empty:http\" : goto reject-connection",
        ),
        (
            "no-endpoints6",
            "fd00:96::6 . tcp . 80 comment \"shop/empty:http\" : goto reject-connection",
        ),
        (
            "no-endpoint-nodeports4",
            "tcp . 30085 comment \"shop/empty:http\" : goto reject-connection",
        ),
        (
            "no-endpoint-nodeports6",
            "tcp . 30085 comment \"shop/empty:http\" : goto reject-connection",
        ),
        ("hairpin4", "10.244.7.1 . 10.244.7.1"),
        ("hairpin6", "fd00:244:7::1 . fd00:244:7::1"),
        ("nodeport-firewall", "udp . 30053 comment \"shop/dns:dns\" : goto fw-shop/dns"),
        ("no-endpoints4", "203.0.113.12 . tcp . 80 comment \"shop/elsewhere:http\" : drop"),
        ("service-cidrs4", "10.96.0.0/16"),
        ("service-cidrs6", "fd00:96::/112"),
        ("pod-cidrs4", "10.244.0.0/24"),
        ("pod-cidrs6", "fd00:244::/64"),
        ("unmasqueraded4", "10.244.0.0/24"),
        ("unmasqueraded6", "fd00:244::/64"),
        (
            "service-ips4",
            "198.51.100.11 . tcp . 80 comment \"shop/outside:http\" : goto \
             external-local4-over-1-sticky-by-source",
        ),
        (
            "service-ips6",
            "2001:db8:1::11 . tcp . 80 comment \"shop/outside:http\" : goto \
             external-local6-over-1-sticky-by-source",
        ),
        (
            "cluster-policy4",
            "198.51.100.11 . tcp . 80 comment \"shop/outside:http\" : goto \
             service4-over-3-sticky-by-source",
        ),
        (
            "cluster-policy6",
            "2001:db8:1::11 . tcp . 80 comment \"shop/outside:http\" : goto \
             service6-over-3-sticky-by-source",
        ),
        (
            "nodeport-cluster-policy4",
            "tcp . 30090 comment \"shop/outside:http\" : goto \
             nodeport-from-here4-over-3-sticky-by-source",
        ),
        (
            "nodeport-cluster-policy6",
            "tcp . 30090 comment \"shop/outside:http\" : goto \
             nodeport-from-here6-over-3-sticky-by-source",
        ),
        ("endpoints4", "198.51.100.11 . tcp . 80 . 0x80000000 : 10.244.11.1 . 8080"),
        ("sticky4", "10.96.0.11 . tcp . 80 comment \"shop/outside:http\" : goto remember4-10800s"),
        ("sticky6", "fd00:96::11 . tcp . 80 comment \"shop/outside:http\" : goto remember6-10800s"),
        ("sticky-nodeports4", "tcp . 30090 comment \"shop/outside:http\" : goto remember4-10800s"),
        ("sticky-nodeports6", "tcp . 30090 comment \"shop/outside:http\" : goto remember6-10800s"),
        ("sticky-endpoints4", "10.96.0.11 . tcp . 80 . 10.244.11.1 . 8080"),
        ("sticky-endpoints6", "fd00:96::11 . tcp . 80 . fd00:244:11::1 . 8080"),
        ("sticky-nodeport-endpoints4", "tcp . 30090 . 10.244.11.1 . 8080"),
        ("sticky-nodeport-endpoints6", "tcp . 30090 . fd00:244:11::1 . 8080"),
        (
            "load-balancer-firewall4",
            "203.0.113.11 . tcp . 80 comment \"shop/outside:http\" : goto from-networks4-8",
        ),
        (
            "load-balancer-firewall6",
            "2001:db8:2::11 . tcp . 80 comment \"shop/outside:http\" : goto from-networks6-32",
        ),
        ("load-balancer-sources4", "203.0.113.11 . tcp . 80 . 10.0.0.0 . 0x00000008"),
        ("load-balancer-sources6", "2001:db8:2::11 . tcp . 80 . 2001:db8:: . 0x00000020"),
        ("allow4-shop/web", "10.128.0.0/10"),
        ("allow6-shop/web", "ffff::/16"),
        ("allow6-shop/world", "::/0"),
        ("localhost-ips4", "127.0.0.0/8"),
    ];
    namespace.enter(|| {
        let _worker = world.program();
        let nft = Nft { program: nft_program(), ..Nft::default() };
        let observed = Observed::read(&nft.list().unwrap()).unwrap();
        let sets = observed.table.unwrap().sets;
        for (set, expected) in table {
            let elements = sets[*set].elements.iter();
            let elements: Vec<String> = elements.map(|(key, e)| e.text(key)).collect();
            assert!(elements.iter().any(|e| e == expected), "{expected} in {set}: {elements:#?}");
        }
        let all: Vec<&str> = sets.keys().map(String::as_str).collect();
        let known = |set: &&str| {
            // Clients fill the one, and pods have either addresses or interfaces. Those for numbers of
            // endpoints are all alike.
            let other = ["allow", "affinity"].iter().any(|name| set.starts_with(name));
            other
                || set.contains("-over-")
                || set.ends_with("interfaces")
                || table.iter().any(|(s, _)| s == set)
        };
        assert!(all.iter().all(known), "add a line for each new set: {all:?}");
    });
}

#[test]
fn slots_may_be_any() {
    let Some(namespace) = namespace() else { return };
    let mut world = World::new();
    let http = [Exposed { node_port: Some(30080), ..Exposed::HTTP }];
    world.add("web", 1, &http, 5, SourceRestriction::Unrestricted);
    namespace.enter(|| {
        let mut worker = world.program();
        // The first endpoints go: the last ones move into their slots.
        let mut plan = world.plans[0].clone();
        for pool in &mut plan.pools {
            let gone: Vec<_> = pool.backends.drain(0..2).map(|backend| backend.address).collect();
            pool.hairpins.retain(|address| !gone.contains(address));
        }
        let name = ServiceName::new("shop", "web");
        let change = portcullis::commit::Change::Service(name.clone(), Some(plan.clone()));
        assert!(worker.commit(vec![change]).is_empty());
        assert!(!world.audit().in_sync, "the old plan is in force no more");
        world.desired.set(&name, Some(plan));
        let audit = world.audit();
        assert_eq!(audit.differences, [], "{audit}");
    });
}

#[test]
fn every_change_by_others_is_found() {
    let world = World::varied();
    let table: &[(&str, &str, &str)] = &[
        (
            "an endpoint is gone",
            "delete element inet portcullis endpoints4 { 10.96.0.7 . tcp . 80 . 0x2 }",
            "Missing Element endpoints4 10.96.0.7 . tcp . 80 . 0x00000002\n",
        ),
        (
            "an endpoint is another",
            "delete element inet portcullis endpoints4 { 10.96.0.7 . tcp . 80 . 0x2 }
             add element inet portcullis endpoints4 { 10.96.0.7 . tcp . 80 . 0x2 : 192.0.2.1 . 80 }",
            "Changed Element endpoints4 10.96.0.7 . tcp . 80 . 0x00000002\n",
        ),
        (
            "an endpoint too many",
            "add element inet portcullis endpoints4 { 10.96.0.7 . tcp . 80 . 0x7 : 192.0.2.1 . 80 }",
            "Unexpected Element endpoints4 10.96.0.7 . tcp . 80 . 0x00000007\n",
        ),
        (
            "a Service that nobody knows",
            "add element inet portcullis cluster-ips6 { fd00:96::99 comment \"shop/ghost\" }",
            "Unexpected Element cluster-ips6 fd00:96::99\n",
        ),
        (
            "a source too many",
            "add element inet portcullis allow4-shop/web { 203.0.113.0/24 }",
            "Unexpected Element allow4-shop/web 203.0.113.0/24\n",
        ),
        (
            "a port without its firewall",
            "delete element inet portcullis nodeport-firewall { tcp . 30082 }",
            "Missing Element nodeport-firewall tcp . 30082\n",
        ),
        (
            "a Service is led to another number of endpoints",
            "delete element inet portcullis service-ips4-over-7 { 10.96.0.7 . tcp . 80 }
             add element inet portcullis service-ips4-over-3 { 10.96.0.7 . tcp . 80 comment \"shop/inside:http\" }",
            "Unexpected Element service-ips4-over-3 10.96.0.7 . tcp . 80\n\
             Missing Element service-ips4-over-7 10.96.0.7 . tcp . 80\n",
        ),
        (
            "a node port is led to another number of endpoints",
            "delete element inet portcullis nodeports4 { tcp . 30086 }
             add element inet portcullis nodeports4 { tcp . 30086 comment \"shop/unnamed\" : goto nodeport4-over-2 }",
            "Changed Element nodeports4 tcp . 30086\n",
        ),
        (
            "an element belongs to somebody else, so it says",
            "delete element inet portcullis cluster-ips4 { 10.96.0.7 }
             add element inet portcullis cluster-ips4 { 10.96.0.7 comment \"shop/outside\" }",
            "Changed Element cluster-ips4 10.96.0.7\n",
        ),
        (
            "a rule before ours",
            "insert rule inet portcullis source-firewall ip saddr 203.0.113.9 tcp dport 30082 accept",
            "Unexpected Rule source-firewall\n",
        ),
        (
            "a rule of a kind that we never write",
            "add rule inet portcullis filter-input meta skuid 0 tcp flags syn limit rate over 10 mbytes/second drop",
            "Unexpected Rule filter-input\n",
        ),
        (
            "a firewall is flushed",
            "flush chain inet portcullis fw-shop/nobody",
            "Missing Rule fw-shop/nobody\nMissing Rule fw-shop/nobody\n\
             Missing Rule fw-shop/nobody\nMissing Rule fw-shop/nobody\n",
        ),
        (
            "a chain that no Service needs",
            "add chain inet portcullis service4-over-99
             add rule inet portcullis service4-over-99 accept",
            "Unexpected Chain service4-over-99\n",
        ),
        (
            "a base chain more",
            "add chain inet portcullis sniff { type filter hook input priority -7; policy drop; }",
            "Unexpected Chain sniff\n",
        ),
        (
            "another policy",
            "add chain inet portcullis filter-forward { policy drop; }",
            "Changed Chain filter-forward\n",
        ),
        (
            "a set more",
            "add set inet portcullis mine { type ipv4_addr; flags timeout; }",
            "Unexpected Set mine\n",
        ),
        (
            "the node's addresses",
            "flush set inet portcullis nodeport-ips4
             add element inet portcullis nodeport-ips4 { 192.168.77.0/24 }",
            "Unexpected Element nodeport-ips4 192.168.77.0/24\n\
             Missing Element nodeport-ips4 192.168.77.1\n",
        ),
        ("the table is gone", "delete table inet portcullis", "Missing Table portcullis\n"),
    ];
    for (name, script, expected) in table {
        let Some(namespace) = namespace() else { return };
        namespace.enter(|| {
            drop(world.program());
            nft(script);
            let audit = world.audit();
            assert_eq!(short(&audit.differences), *expected, "{name}:\n{audit}");
            assert!(!audit.in_sync, "{name}");
        });
    }
}

#[test]
fn a_firewall_that_was_tampered_with_is_not_in_force() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    let table: &[(&str, &[&str])] = &[
        ("add element inet portcullis allow4-shop/web { 203.0.113.0/24 }", &["web"]),
        ("delete element inet portcullis nodeport-firewall { tcp . 30053 }", &["dns"]),
        ("flush chain inet portcullis fw-shop/closed", &["closed"]),
        ("delete element inet portcullis endpoints4 { 10.96.0.7 . tcp . 80 . 0x2 }", &[]),
        (
            "flush chain inet portcullis firewall-prerouting",
            &[
                "closed",
                "dns",
                "elsewhere",
                "empty",
                "late",
                "nobody",
                "open",
                "outside",
                "unnamed",
                "web",
                "world",
            ],
        ),
    ];
    namespace.enter(|| {
        for (script, expected) in table {
            drop(world.program());
            nft(script);
            let audit = world.audit();
            let broken = audit.exposures.iter().filter(|exposure| !exposure.in_force);
            let broken: Vec<&str> = broken.map(|exposure| &*exposure.service).collect();
            assert_eq!(&broken, expected, "{script}:\n{audit}");
        }
    });
}

#[test]
fn counters_are_reported_and_make_no_difference() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    namespace.enter(|| {
        drop(world.program());
        for (set, family, packets) in [("@allow4", "ip", 7), ("@allow6", "ip6", 5)] {
            let (handle, bytes) = (handle("fw-shop/web", set), 60 * packets);
            nft(&format!(
                "replace rule inet portcullis fw-shop/web handle {handle} \
                 {family} saddr {set}-shop/web counter packets {packets} bytes {bytes} accept \
                 comment \"allowed\"",
            ));
        }
        let handle = handle("fw-shop/web", "drop");
        nft(&format!(
            "replace rule inet portcullis fw-shop/web handle {handle} \
             counter packets 4294967296 bytes 9999999999 drop comment \"refused\"",
        ));
        let orphaned = world.audit();
        // The rules keep their counters when the table gets an owner.
        let _worker = world.program();
        for audit in [orphaned, world.audit()] {
            assert_eq!(audit.differences, [], "{audit}");
            let web = exposure(&audit, "web");
            assert_eq!(web.accepted, Some(Count { packets: 12, bytes: 720 }));
            assert_eq!(web.refused, Some(Count { packets: 1 << 32, bytes: 9_999_999_999 }));
            assert_eq!(exposure(&audit, "dns").refused, Some(Count::default()));
        }
    });
}

#[test]
fn exposures_say_who_may_reach_what() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    namespace.enter(|| {
        let _worker = world.program();
        let audit = world.audit();
        let access: Vec<(&str, Access, bool)> =
            audit.exposures.iter().map(|e| (&*e.service, e.access, e.refused.is_some())).collect();
        let expected = [
            ("closed", Access::Closed, true),
            ("dns", Access::Sources, true),
            ("elsewhere", Access::Everyone, false),
            ("empty", Access::Everyone, false),
            ("late", Access::Everyone, false),
            ("nobody", Access::Nobody, true),
            ("open", Access::Everyone, false),
            ("outside", Access::Everyone, false),
            ("unnamed", Access::Everyone, false),
            ("web", Access::Sources, true),
            ("world", Access::Sources, true),
        ];
        assert_eq!(access, expected);
        let late = exposure(&audit, "late");
        assert_eq!(late.node_ports[0].lost_to.as_deref(), Some("shop/web"));
        let ports: Vec<(Protocol, u16)> =
            exposure(&audit, "dns").node_ports.iter().map(|p| (p.protocol, p.port)).collect();
        assert_eq!(ports, [(Protocol::Tcp, 30053), (Protocol::Udp, 30053)]);
        let none = [(Family::V4, 0), (Family::V6, 0)].into_iter().collect();
        assert_eq!(exposure(&audit, "empty").node_ports[0].endpoints, none);
        assert_eq!(audit.diagnostics.len(), 1, "{audit}");
    });
}

#[test]
fn other_tables_are_seen() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    namespace.enter(|| {
        let worker = world.program();
        nft("table inet strict {
               chain early {
                 type filter hook prerouting priority -300; policy drop;
                 ct state new accept
                 counter
               }
               chain among { type nat hook prerouting priority -105; }
               chain late { type filter hook forward priority 10; }
               chain same { type filter hook input priority 0; policy drop; }
               chain helper {
                 tcp dport { 22, 80 } accept
               }
             }
             table netdev edge {
               chain in { type filter hook ingress device lo priority 0; policy drop; }
             }
             table bridge br {
               chain f { type filter hook forward priority 0; policy drop; }
             }
             table arp a {
               chain in { type filter hook input priority 0; policy drop; }
             }
             table ip kube-proxy {
               chain services {
               }
             }
             table ip6 nat {
               chain KUBE-SERVICES {
               }
             }
             table ip filter {
               chain KUBE-FIREWALL {
               }
             }");
        let owned = world.audit();
        drop(worker);
        for audit in [owned, world.audit()] {
            assert!(audit.in_sync, "{audit}");
            let chains: Vec<(&str, &str, Position, bool, u64)> = audit
                .foreign
                .iter()
                .map(|c| (&*c.table, &*c.chain, c.position, c.drops, c.rules))
                .collect();
            let expected = [
                ("br", "f", Position::Before, true, 0),
                ("strict", "late", Position::After, false, 0),
                ("edge", "in", Position::Before, true, 0),
                ("strict", "same", Position::Beside, true, 0),
                ("strict", "early", Position::Before, true, 2),
                ("strict", "among", Position::Between, false, 0),
            ];
            assert_eq!(chains, expected, "{audit}");
            assert_eq!(audit.kube_proxy, ["ip kube-proxy", "ip6 nat"]);
        }
    });
}

#[test]
fn a_namespace_without_our_table_lacks_it() {
    let Some(namespace) = namespace() else { return };
    let world = World::varied();
    namespace.enter(|| {
        let audit = world.audit();
        assert_eq!(audit.differences.len(), 1, "{audit}");
        let Difference { object, change, .. } = &audit.differences[0];
        assert_eq!((*object, *change), (Object::Table, Change::Missing));
        assert!(audit.exposures.iter().all(|exposure| !exposure.in_force));
    });
}

fn exposure<'a>(audit: &'a Audit, service: &str) -> &'a Exposure {
    audit.exposures.iter().find(|exposure| exposure.service == service).expect(service)
}

/// Differences, one a line, as `CHANGE OBJECT NAME KEY`.
fn short(differences: &[Difference]) -> String {
    let mut out = String::new();
    for Difference { object, name, key, change, .. } in differences {
        let key = key.as_deref().map(|key| format!(" {key}")).unwrap_or_default();
        let _ = writeln!(out, "{change:?} {object:?} {name}{key}");
    }
    out
}
