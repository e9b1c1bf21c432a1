//! Laws of planning and committing, on random worlds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use proptest::prelude::*;

use super::adopt::lay_out;
use super::applied::Applied;
use super::listing::backend;
use super::stale::Left;
use crate::model::{
    Backend, Balancing, CidrSet, Endpoint, EndpointSlice, Family, Hints, Node, NodeContext,
    Protocol, Readiness, Service, ServiceName, ServicePort, SliceName, SlicePort,
    SourceRestriction, TrafficPolicy,
};
use crate::netlink::replay::Table;
use crate::netlink::{Batch, TableFlags};
use crate::plan::{Desired, Frontend, ServicePlan, plan_service};
use crate::ruleset::{Contribution, Element, ElementKey, SetName, Subject, TABLE, Value};

/// A Service in few enough variants that random ones collide.
#[derive(Clone, Debug)]
struct Variant {
    created: i64,
    cluster_ip: u8,
    dual: bool,
    health_check: Option<u8>,
    ports: Vec<(Protocol, u8, Option<u8>)>,
    endpoints: BTreeSet<u8>,
    sources: u8,
    traffic: Traffic,
}

/// What is asked of the ways to the endpoints.
#[derive(Clone, Debug, Default)]
struct Traffic {
    internal_local: bool,
    external_local: bool,
    sticky: bool,
    by_source: bool,
    hints: bool,
    external_ips: BTreeSet<u8>,
    load_balancer_ips: BTreeSet<u8>,
    /// Which list of source ranges, of those below.
    ranges: u8,
}

fn traffic() -> impl Strategy<Value = Traffic> {
    let addresses = || proptest::collection::btree_set(0..3_u8, 0..2);
    (any::<[bool; 5]>(), 0..6_u8, addresses(), addresses()).prop_map(
        |(
            [internal_local, external_local, sticky, by_source, hints],
            ranges,
            external_ips,
            load_balancer_ips,
        )| Traffic {
            internal_local,
            external_local,
            sticky,
            by_source,
            hints,
            external_ips,
            load_balancer_ips,
            ranges,
        },
    )
}

fn variant() -> impl Strategy<Value = Variant> {
    let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)];
    let port = (protocol, 0..3_u8, proptest::option::of(0..4_u8));
    (
        0..3_i64,
        0..4_u8,
        any::<bool>(),
        proptest::option::of(0..4_u8),
        proptest::collection::vec(port, 1..3),
        proptest::collection::btree_set(0..6_u8, 0..6),
        0..4_u8,
        traffic(),
    )
        .prop_map(
            |(created, cluster_ip, dual, health_check, ports, endpoints, sources, traffic)| {
                Variant {
                    created,
                    cluster_ip,
                    dual,
                    health_check,
                    ports,
                    endpoints,
                    sources,
                    traffic,
                }
            },
        )
}

fn name(number: u8) -> ServiceName {
    ServiceName::new("shop", format!("web{number}"))
}

fn node() -> NodeContext {
    NodeContext {
        node: Node {
            primary_addresses: vec![IpAddr::from([192, 168, 0, 1])],
            zone: Some("a".into()),
            ..Node::default()
        },
        ..NodeContext::new("here".into())
    }
}

fn plan(number: u8, variant: &Variant) -> ServicePlan {
    let mut seen = BTreeSet::new();
    let mut node_ports = BTreeSet::new();
    let ports: Vec<ServicePort> = variant
        .ports
        .iter()
        .enumerate()
        .filter(|(_, (protocol, port, node_port))| {
            seen.insert((*protocol, *port))
                && node_port.is_none_or(|node_port| node_ports.insert((*protocol, node_port)))
        })
        .map(|(index, (protocol, port, node_port))| ServicePort {
            name: format!("p{index}").into(),
            protocol: *protocol,
            port: NonZeroU16::new(80 + u16::from(*port)).unwrap(),
            node_port: node_port.map(|p| NonZeroU16::new(30000 + u16::from(p)).unwrap()),
        })
        .collect();
    let mut cluster_ips = vec![IpAddr::from([10, 96, 0, variant.cluster_ip])];
    if variant.dual {
        cluster_ips.push(IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, variant.cluster_ip.into()]));
    }
    let Traffic { internal_local, external_local, sticky, by_source, hints, ranges, .. } =
        variant.traffic;
    let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    let allow = |list| SourceRestriction::Allow(CidrSet::parse(list).unwrap());
    // Some of these are other Services' cluster IPs.
    let addresses = |numbers: &BTreeSet<u8>, net: u8| -> Vec<IpAddr> {
        numbers.iter().map(|n| IpAddr::from([10, net, 0, *n])).collect()
    };
    let service = Service {
        created: variant.created,
        cluster_ips,
        external_ips: addresses(&variant.traffic.external_ips, 96),
        load_balancer_ips: { variant.traffic.load_balancer_ips.iter() }
            .flat_map(|n| {
                [[10, 97, 0, *n].into(), [0xfd00, 97, 0, 0, 0, 0, 0, u16::from(*n)].into()]
            })
            .filter(|address| variant.dual || Family::of(*address) == Family::V4)
            .collect(),
        internal_traffic: policy(internal_local),
        external_traffic: policy(external_local),
        // Some of these are other Services' node ports; what is read has none that is one of its own.
        health_check_port: variant
            .health_check
            .filter(|port| !node_ports.contains(&(Protocol::Tcp, *port)))
            .map(|port| NonZeroU16::new(30000 + u16::from(port)).unwrap()),
        session_affinity: sticky.then(|| NonZeroU32::new(10 + u32::from(number % 2)).unwrap()),
        balancing: match (by_source, number % 2) {
            (false, _) => Balancing::Random,
            (true, 0) => Balancing::SourceHash,
            (true, _) => Balancing::Weighted,
        },
        load_balancer_sources: match ranges {
            0 => SourceRestriction::Unrestricted,
            1 => SourceRestriction::Closed,
            2 => allow("192.168.0.0/16"),
            3 => allow("192.168.0.0/16, 192.0.2.0/24, 2001:db8::/32"),
            4 => allow("192.168.0.0/24, 2001:db8::/29"),
            _ => allow("0.0.0.0/0, ::/0"),
        },
        ports: ports.clone(),
        node_port_sources: match variant.sources {
            0 => SourceRestriction::Unrestricted,
            1 => SourceRestriction::Closed,
            2 => allow("10.0.0.0/8, 2001:db8::/32"),
            _ => allow("10.0.0.0/9, 0.0.0.0/32"),
        },
        ..Service::new(name(number))
    };
    let slice = |family: Family| EndpointSlice {
        name: SliceName { namespace: "shop".into(), name: format!("{family:?}").into() },
        service: name(number),
        family,
        ports: ports
            .iter()
            .map(|port| SlicePort {
                name: port.name.clone(),
                protocol: port.protocol,
                port: NonZeroU16::new(8080).unwrap(),
            })
            .collect(),
        endpoints: variant
            .endpoints
            .iter()
            .map(|endpoint| Endpoint {
                address: match family {
                    Family::V4 => IpAddr::from([10, 244, 0, *endpoint]),
                    Family::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, (*endpoint).into()]),
                },
                readiness: match endpoint {
                    5 => Readiness::ServingTerminating,
                    _ => Readiness::Ready,
                },
                node: (endpoint % 2 == 0).then(|| "here".into()),
                weight: endpoint % 4,
                hints: hints.then(|| {
                    let zone = if endpoint % 3 == 0 { "a" } else { "b" };
                    Arc::new(Hints { zones: vec![zone.into()], nodes: Vec::new() })
                }),
            })
            .collect(),
        diagnostics: Vec::new(),
    };
    plan_service(&service, &Family::ALL.map(slice), &node())
}

/// A table that was laid out without any Service.
fn empty_table() -> Table {
    let mut batch = Batch::new(TABLE);
    lay_out(false, TableFlags::NONE, &[], &mut batch);
    let mut table = Table::default();
    table.apply(&batch.finish());
    table
}

fn targets(
    desired: &Desired,
    applied: &Applied,
    services: impl IntoIterator<Item = ServiceName>,
) -> Vec<(Subject, Option<Contribution>)> {
    let target = |service: ServiceName| {
        let subject = Subject::Service(service.clone());
        let contribution = desired.effective(&service).map(|plan| {
            Contribution::service(plan, |pool| {
                Some(applied.contribution(&subject)?.slots_of(pool)?.clone())
            })
        });
        (subject, contribution)
    };
    services.into_iter().map(target).collect()
}

/// The table with the slots of each frontend's endpoints forgotten: which endpoint is in which
/// slot depends on history, and nothing else may.
fn without_slots(table: &Table) -> (Table, BTreeMap<String, BTreeSet<Vec<u8>>>) {
    let mut table = table.clone();
    let mut endpoints = BTreeMap::new();
    for name in ["endpoints4", "endpoints6", "nodeport-endpoints4", "nodeport-endpoints6"] {
        let elements = table.sets.remove(name).unwrap();
        let forget = |((key, _), value): ((Vec<u8>, bool), Vec<u8>)| {
            [&key[..key.len() - 4], &value].concat()
        };
        endpoints.insert(name.to_owned(), elements.into_iter().map(forget).collect());
    }
    (table, endpoints)
}

type History = Vec<(u8, Option<Variant>)>;

fn history() -> impl Strategy<Value = History> {
    proptest::collection::vec((0..5_u8, proptest::option::weighted(0.8, variant())), 1..24)
}

/// Commits a history change by change; gives the table, the plans and the applied state.
fn live_through(history: &History) -> (Table, Desired, Applied) {
    let (mut table, mut desired, mut applied) =
        (empty_table(), Desired::default(), Applied::default());
    for (number, variant) in history {
        let change = variant.as_ref().map(|variant| plan(*number, variant));
        let touched = desired.set(&name(*number), change);
        let mut batch = Batch::new(TABLE);
        let step = applied.stage(targets(&desired, &applied, touched), &mut batch);
        table.apply(&batch.finish());
        applied.install(step);
    }
    (table, desired, applied)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Committing change by change ends where planning everything at once does, whatever came
    /// between and in whatever order Services with the same claims came.
    #[test]
    fn the_way_does_not_matter(history in history()) {
        let (table, desired, _) = live_through(&history);

        let last: BTreeMap<u8, &Option<Variant>> =
            history.iter().map(|(number, variant)| (*number, variant)).collect();
        let mut at_once = Desired::default();
        for (number, variant) in last.iter().rev() {
            at_once.set(&name(*number), variant.as_ref().map(|v| plan(*number, v)));
        }
        for number in last.keys() {
            prop_assert_eq!(desired.effective(&name(*number)), at_once.effective(&name(*number)));
        }
        let mut fresh = empty_table();
        let nothing = Applied::default();
        let mut batch = Batch::new(TABLE);
        nothing.stage(targets(&at_once, &nothing, last.keys().map(|n| name(*n))), &mut batch);
        fresh.apply(&batch.finish());
        prop_assert_eq!(without_slots(&table), without_slots(&fresh));
    }

    /// What is in force already costs nothing.
    #[test]
    fn nothing_new_is_no_operation(history in history()) {
        let (_, desired, applied) = live_through(&history);
        let mut batch = Batch::new(TABLE);
        let services: Vec<ServiceName> = desired.services().cloned().collect();
        applied.stage(targets(&desired, &applied, services), &mut batch);
        prop_assert_eq!(batch.operations(), 0);
    }

    /// Removing everything leaves the table as it was laid out.
    #[test]
    fn nothing_stays_behind(history in history()) {
        let (mut table, mut desired, applied) = live_through(&history);
        let services: Vec<ServiceName> = desired.services().cloned().collect();
        for service in &services {
            desired.set(service, None);
        }
        let mut batch = Batch::new(TABLE);
        applied.stage(targets(&desired, &applied, services), &mut batch);
        table.apply(&batch.finish());
        prop_assert_eq!(table, empty_table());
    }

    /// Whom flows were led to is read from a table as it was planned.
    #[test]
    fn what_was_left_is_known(history in history()) {
        let (_, _, applied) = live_through(&history);
        let mut left = Left::default();
        for contribution in applied.contributions() {
            contribution.elements(|Element { key: ElementKey { set, bytes, .. }, value, .. }| {
                let (SetName::Endpoints(family) | SetName::NodePortEndpoints(family)) = set else {
                    return;
                };
                let Value::Endpoint(value) = value else { panic!("{value:?} in {set}") };
                let key = bytes.as_slice().split_last_chunk::<4>().unwrap().0;
                left.add(&set, key, backend(family, value.as_slice()).unwrap());
            });
        }
        let plans = applied.contributions().filter_map(Contribution::plan);
        let mut pools = plans.flat_map(|plan| &plan.pools).filter(|p| p.protocol == Protocol::Udp);
        let led = pools.any(|pool| {
            let serves = |frontend: &Frontend| match frontend {
                Frontend::ClusterIp { .. } => !pool.serving(frontend).is_empty(),
                // Pods of the node and the node itself are led to all.
                Frontend::External { .. } | Frontend::NodePort { .. } => !pool.backends.is_empty(),
            };
            pool.frontends.iter().any(serves)
        });
        prop_assert_eq!(left.is_empty(), !led);
        for contribution in applied.contributions() {
            left.spare(contribution);
        }
        prop_assert!(left.is_empty(), "{:?}", left);
    }

    /// A change names everybody for whom something else is in force or to be said after it.
    #[test]
    fn who_is_concerned_is_touched(history in history()) {
        let mut desired = Desired::default();
        for (number, variant) in &history {
            let all: Vec<ServiceName> = (0..5).map(name).collect();
            let before: Vec<_> = all.iter().map(|service| desired.effective(service)).collect();
            let change = variant.as_ref().map(|variant| plan(*number, variant));
            let touched = desired.set(&name(*number), change);
            for (service, before) in all.iter().zip(before) {
                if desired.effective(service) != before {
                    prop_assert!(touched.contains(service), "{} of {:?}", service, touched);
                }
            }
        }
    }

    /// Conflicts have one winner, the same for all who look.
    #[test]
    fn a_claim_has_one_holder(history in history()) {
        let (_, desired, _) = live_through(&history);
        let mut holders = BTreeMap::new();
        for service in desired.services() {
            for claim in desired.effective(service).unwrap().claims().collect::<BTreeSet<_>>() {
                let other = holders.insert(claim, service.clone());
                prop_assert!(other.is_none(), "{:?} is held by {:?} and {}", claim, other, service);
            }
        }
    }
}

/// The operations of one change among `services` Services of `endpoints` endpoints each.
fn operations(services: u8, endpoints: u8, change: impl Fn(&mut Variant)) -> usize {
    let variant = |number: u8| Variant {
        created: 0,
        cluster_ip: number,
        dual: false,
        health_check: None,
        ports: vec![(Protocol::Tcp, 0, None)],
        endpoints: (0..endpoints).collect(),
        sources: 0,
        traffic: Traffic::default(),
    };
    let history: History = (0..services).map(|number| (number, Some(variant(number)))).collect();
    let (_, mut desired, applied) = live_through(&history);
    let mut changed = variant(0);
    change(&mut changed);
    let touched = desired.set(&name(0), Some(plan(0, &changed)));
    let mut batch = Batch::new(TABLE);
    applied.stage(targets(&desired, &applied, touched), &mut batch);
    batch.operations()
}

#[test]
fn a_change_costs_what_it_changes() {
    for (services, endpoints) in [(1, 5), (20, 5), (1, 12), (20, 12), (20, 100)] {
        let cost = |change: fn(&mut Variant)| operations(services, endpoints, change);
        // Another backend in the same slot: its element goes and comes. The hairpin elements of
        // the two addresses are the node's own only for even numbers.
        let replaced = cost(|v| {
            v.endpoints.remove(&1);
            v.endpoints.insert(201);
        });
        assert_eq!(replaced, 2, "{services} x {endpoints}");
        // One slot less: the last one goes, its backend moves into the gap, and the address is led
        // to another balancing chain, or stands in another set. A chain that is not always there comes
        // with its rule; alone, the old one goes.
        let removed = cost(|v| {
            v.endpoints.remove(&1);
        });
        let chains = if endpoints <= 8 { 0 } else { 2 + usize::from(services == 1) };
        assert_eq!(removed, 1 + 2 + 2 + chains, "{services} x {endpoints}");
        assert_eq!(cost(|_| {}), 0);
    }
}

#[test]
fn the_older_service_wins_and_the_loser_is_told() {
    let variant = |created| Variant {
        created,
        cluster_ip: u8::try_from(created).unwrap(),
        dual: false,
        health_check: None,
        ports: vec![(Protocol::Tcp, 0, Some(1))],
        endpoints: BTreeSet::from([1]),
        sources: 1,
        traffic: Traffic::default(),
    };
    let mut desired = Desired::default();
    desired.set(&name(1), Some(plan(1, &variant(2))));
    let touched = desired.set(&name(2), Some(plan(2, &variant(1))));
    assert_eq!(touched, BTreeSet::from([name(1), name(2)]));

    let loser = desired.effective(&name(1)).unwrap();
    assert_eq!(loser.firewall, None);
    assert_eq!(loser.pools[0].frontends.len(), 1);
    let [diagnostic] = loser.diagnostics.as_slice() else { panic!("{:?}", loser.diagnostics) };
    assert!(diagnostic.to_string().contains("Service shop/web1"), "{diagnostic}");
    assert!(diagnostic.to_string().contains("30001"), "{diagnostic}");
    assert!(diagnostic.to_string().contains("shop/web2"), "{diagnostic}");

    // The winner leaves, and the other has what it asked for.
    assert!(desired.set(&name(2), None).contains(&name(1)));
    let winner = desired.effective(&name(1)).unwrap();
    assert_eq!(winner.pools[0].frontends.len(), 2);
    assert!(winner.firewall.is_some() && winner.diagnostics.is_empty());
}

#[test]
fn pools_are_the_same_whatever_the_order_of_slices() {
    let backend = |address: [u8; 4]| Backend { address: address.into(), port: 8080 };
    let planned = plan(
        1,
        &Variant {
            created: 0,
            cluster_ip: 1,
            dual: false,
            health_check: None,
            ports: vec![(Protocol::Tcp, 0, None)],
            endpoints: BTreeSet::from([2, 1]),
            sources: 0,
            traffic: Traffic::default(),
        },
    );
    let expected = vec![backend([10, 244, 0, 1]), backend([10, 244, 0, 2])];
    assert_eq!(planned.pools[0].backends, expected);
    assert_eq!(planned.pools[0].hairpins, [IpAddr::from([10, 244, 0, 2])]);
    let shared = Arc::new(planned);
    assert_eq!(shared.cluster_ips, [IpAddr::from([10, 96, 0, 1])]);
}
