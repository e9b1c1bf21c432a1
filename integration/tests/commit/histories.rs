//! Random histories: whatever came before, the kernel holds what a fresh start would write.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU32;

use anyhow::{Result, ensure};
use portcullis::model::Protocol::{Sctp, Tcp, Udp};
use portcullis::model::{Balancing, CidrSet, Service, SourceRestriction, TrafficPolicy};
use portcullis_integration::services::{Sketch, service};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{Daemon, Machine, fresh};

/// A Service in few enough variants that random ones collide.
#[derive(Clone, Debug)]
struct Variant {
    created: i64,
    address: u8,
    dual: bool,
    ports: Vec<(u8, u8)>,
    endpoints: Vec<u8>,
    sources: usize,
    traffic: Traffic,
}

/// How the Service is reached and balanced.
#[derive(Clone, Debug)]
struct Traffic {
    internal_local: bool,
    external_local: bool,
    affinity: Option<u32>,
    balancing: Balancing,
    external: Option<u8>,
    balanced: Option<u8>,
    ranges: bool,
}

fn traffic() -> impl Strategy<Value = Traffic> {
    let balancing = prop_oneof![
        Just(Balancing::Random),
        Just(Balancing::SourceHash),
        Just(Balancing::Weighted)
    ];
    let address = || proptest::option::weighted(0.3, 1..4_u8);
    (any::<[bool; 3]>(), proptest::option::of(1..3_u32), balancing, address(), address()).prop_map(
        |([internal_local, external_local, ranges], affinity, balancing, external, balanced)| {
            Traffic {
                internal_local,
                external_local,
                affinity,
                balancing,
                external,
                balanced,
                ranges,
            }
        },
    )
}

const SOURCES: [&str; 7] = [
    "",
    "10.0.0.0/8",
    "10.0.0.0/9, 192.0.2.0/24",
    "0.0.0.0/0, ::/0",
    "255.0.0.0/8, 10.0.1.0/24, 10.0.2.0/24",
    "128.0.0.0/1, ff00::/8, 8000::/2",
    "10.128.0.0/9, 2001:db8::/32",
];

fn variant() -> impl Strategy<Value = Variant> {
    let endpoints = proptest::collection::vec(1..8_u8, 0..6);
    let ports = proptest::collection::vec((0..3_u8, 0..4_u8), 1..4);
    let sources = 0..SOURCES.len() + 2;
    (0..3_i64, 1..5_u8, any::<bool>(), ports, endpoints, sources, traffic()).prop_map(
        |(created, address, dual, ports, endpoints, sources, traffic)| Variant {
            created,
            address,
            dual,
            ports,
            endpoints,
            sources,
            traffic,
        },
    )
}

impl Variant {
    fn sketch(&self, number: u8) -> Sketch {
        let mut sketch = service(&format!("shop/web-{number}"))
            .created(self.created)
            .at(&format!("10.96.0.{}", self.address));
        if self.dual {
            sketch = sketch.at(&format!("fd00:10:96::{}", self.address));
        }
        let mut seen = Vec::new();
        for (index, (protocol, port)) in self.ports.iter().enumerate() {
            if seen.contains(&(protocol, port)) {
                continue;
            }
            seen.push((protocol, port));
            let node_port = if *port == 0 { 0 } else { 30000 + u16::from(*port) };
            let protocol = [Tcp, Udp, Sctp][usize::from(*protocol)];
            sketch = sketch.port(&format!("p{index}"), protocol, 80 + u16::from(*port), node_port);
        }
        for endpoint in &self.endpoints {
            let addresses = [format!("10.244.0.{endpoint}"), format!("fd00:10:244::{endpoint}")];
            let addresses = [&*addresses[0], &*addresses[1]];
            sketch =
                if endpoint % 2 == 0 { sketch.local(&addresses) } else { sketch.to(&addresses) };
        }
        sketch = sketch.with(|service| self.traffic.apply(service));
        match self.sources.checked_sub(2) {
            None if self.sources == 0 => sketch.open(),
            None => sketch.closed(),
            Some(index) => sketch.allow(SOURCES[index]),
        }
    }
}

impl Traffic {
    fn apply(&self, service: &mut Service) {
        let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        service.internal_traffic = policy(self.internal_local);
        service.external_traffic = policy(self.external_local);
        service.session_affinity = self.affinity.and_then(NonZeroU32::new);
        service.balancing = self.balancing;
        // Some of the external addresses are ClusterIPs of others.
        let address = |net, last| IpAddr::from([10, net, 0, last]);
        service.external_ips = self.external.map(|last| address(96, last)).into_iter().collect();
        service.load_balancer_ips =
            self.balanced.map(|last| address(97, last)).into_iter().collect();
        if self.ranges {
            let ranges = CidrSet::parse("10.0.0.0/8").expect("a CIDR");
            service.load_balancer_sources = SourceRestriction::Allow(ranges);
        }
    }
}

/// What happens at once: Services that come, change or go; and whether the daemon is restarted.
type Step = (Vec<(u8, Option<Variant>)>, bool);

fn history() -> impl Strategy<Value = Vec<Step>> {
    let change = (0..5_u8, proptest::option::weighted(0.8, variant()));
    let changes = proptest::collection::vec(change, 1..4);
    proptest::collection::vec((changes, proptest::bool::weighted(0.2)), 1..9)
}

#[test]
fn the_kernel_holds_what_a_fresh_start_would_write() -> Result<()> {
    if Machine::new()?.is_none() {
        return Ok(());
    }
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 25,
        max_shrink_iters: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&history(), |history| {
        live_through(&history).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    Ok(())
}

fn live_through(history: &[Step]) -> Result<()> {
    let machine = Machine::new()?.expect("asked before");
    let mut world: BTreeMap<u8, Sketch> = BTreeMap::new();
    let (mut daemon, _) = machine.adopted(&[])?;
    for (changes, restart) in history {
        let mut refused = BTreeMap::new();
        let mut batch = Vec::new();
        for (number, variant) in changes {
            let sketch = variant.as_ref().map(|variant| variant.sketch(*number));
            let name = service(&format!("shop/web-{number}")).name();
            batch.push(super::Change::Service(name, sketch.as_ref().map(Sketch::plan)));
            match sketch {
                Some(sketch) => world.insert(*number, sketch),
                None => world.remove(number),
            };
        }
        refused.extend(daemon.change(batch));
        ensure!(refused.is_empty(), "refused: {refused:?}");
        let now: Vec<Sketch> = world.values().cloned().collect();
        machine.state()?.expect(&fresh(&now)?)?;
        machine.namespace.run(&["nft", "list", "ruleset"])?;
        if *restart {
            daemon = restarted(&machine, daemon, &now)?;
        }
    }
    let now: Vec<Sketch> = world.values().cloned().collect();
    restarted(&machine, daemon, &now)?;
    Ok(())
}

/// Another daemon, which finds everything as it should be.
fn restarted(machine: &Machine, daemon: Daemon, services: &[Sketch]) -> Result<Daemon> {
    let before = machine.dump()?;
    machine.end(daemon)?;
    let (daemon, adoption) = machine.adopted(services)?;
    let silent = adoption.found && !adoption.replaced && adoption.operations == 0;
    ensure!(silent, "a restart: {adoption:?}");
    ensure!(machine.dump()? == before, "a restart changed something");
    Ok(daemon)
}
