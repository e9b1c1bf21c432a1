//! Flows that nobody closes: they follow the endpoints, and go on where they can.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use portcullis_integration::lab::{Lab, eventually};
use portcullis_integration::manifest::{Endpoint, Manifest};
use portcullis_integration::traffic::{Flow, Outcome, Probe, Protocol, Server};
use serde_json::{Value, json};

use super::{HERE, NOTICE, World, exposed, servers, targets};

/// How many flows there are to each address.
const FLOWS: usize = 4;

struct Flows(Vec<(SocketAddr, Flow)>);

impl Flows {
    fn open(lab: &Lab, to: &[SocketAddr], protocol: Protocol) -> Result<Flows> {
        let flow = |to: &SocketAddr| Ok((*to, Flow::open(&lab.allowed, *to, protocol)?));
        let flows = to.iter().flat_map(|to| [to; FLOWS]).map(flow);
        flows.collect::<Result<_>>().map(Flows)
    }

    /// Who answers each flow now. All are asked at once: that nobody answers is known after a second
    /// only.
    fn answers(&mut self) -> Result<Vec<Outcome>> {
        std::thread::scope(|scope| {
            let flows = self.0.iter_mut();
            let asked: Vec<_> = flows.map(|(_, flow)| scope.spawn(|| flow.exchange())).collect();
            asked.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    /// Waits until all flows are answered so.
    fn become_so(&mut self, what: &str, expected: impl Fn(&Outcome) -> bool) -> Result<()> {
        let mut last = Vec::new();
        let settled = eventually(NOTICE, || {
            last = self.answers().unwrap_or_default();
            !last.is_empty() && last.iter().all(&expected)
        });
        let addresses = self.0.iter().map(|(to, _)| to);
        let last: Vec<_> = addresses.zip(last).filter(|(_, one)| !expected(one)).collect();
        ensure!(settled, "{what}: {last:?}");
        Ok(())
    }

    /// Checks that all are answered as they were.
    fn stay(&mut self, what: &str, before: &[Outcome]) -> Result<()> {
        let now = self.answers()?;
        let changed: Vec<_> = before.iter().zip(&now).filter(|(old, new)| old != new).collect();
        ensure!(changed.is_empty(), "{what}: {changed:?}");
        Ok(())
    }
}

fn by(name: &'static str) -> impl Fn(&Outcome) -> bool {
    move |outcome| outcome.by() == Some(name)
}

/// Writes the Service with these endpoints: pods and what is said of each.
fn give(world: &World, manifest: &Manifest, pods: &[(usize, Value)]) -> Result<()> {
    let endpoints = pods.iter().flat_map(|(number, extra)| {
        Endpoint::of(&world.lab.pods[*number])
            .map(|endpoint| Endpoint { extra: extra.clone(), ..endpoint })
    });
    Manifest { endpoints: endpoints.collect(), ..manifest.clone() }.write(&world.manifests)
}

#[test]
fn flows_follow_the_endpoints() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let [first, second] = HERE;
    let ready = Value::Null;
    let leaving = |serving| json!({ "conditions": { "ready": false, "serving": serving, "terminating": true } });
    let manifest = exposed(20, lab, &json!({}));
    let to = targets(lab, &manifest, 20);
    give(&world, &manifest, &[(0, ready.clone()), (1, ready.clone())])?;
    let daemon = world.daemon(&["--node-cidr"])?;
    let mut udp = Flows::open(lab, &to, Protocol::Udp)?;
    let mut tcp = Flows::open(lab, &to, Protocol::Tcp)?;
    let (before, connections) = (udp.answers()?, tcp.answers()?);
    let serving: BTreeSet<_> = before.iter().filter_map(Outcome::by).collect();
    ensure!(serving == BTreeSet::from(HERE), "only {serving:?}");

    // Those of the endpoint that leaves go to the other; nothing happens to the others.
    give(&world, &manifest, &[(1, ready.clone())])?;
    udp.become_so("the first leaves", by(second))?;
    for (old, new) in before.iter().zip(udp.answers()?) {
        ensure!(old.by() != Some(second) || *old == new, "{old:?} became {new:?}");
    }
    // A connection goes on for as long as its two ends want.
    tcp.stay("connections", &connections)?;

    // Whatever becomes of the daemon, and whoever comes, flows of healthy endpoints stay.
    let before = udp.answers()?;
    daemon.kill()?;
    udp.stay("the daemon is gone", &before)?;
    let daemon = world.daemon(&["--node-cidr"])?;
    udp.stay("the daemon is back", &before)?;
    give(&world, &manifest, &[(0, ready.clone()), (1, ready.clone())])?;
    let new = || Flow::open(&lab.allowed, to[0], Protocol::Udp).is_ok_and(|f| f.by() == first);
    ensure!(eventually(NOTICE, new), "the first does not come back");
    udp.stay("the first is back", &before)?;
    // So do those of an endpoint that terminates and still serves, though nobody else gets it.
    give(&world, &manifest, &[(0, ready.clone()), (1, leaving(true))])?;
    let only_first = || {
        let flows = Flows::open(lab, &to[..1], Protocol::Udp);
        flows.is_ok_and(|flows| flows.0.iter().all(|(_, flow)| flow.by() == first))
    };
    ensure!(eventually(NOTICE, || (0..3).all(|_| only_first())), "the second still gets some");
    udp.stay("the second terminates", &before)?;
    give(&world, &manifest, &[(0, ready.clone()), (1, leaving(false))])?;
    udp.become_so("the second serves no more", by(first))?;

    // What happens while nobody looks is made good.
    daemon.kill()?;
    give(&world, &manifest, &[(1, ready.clone())])?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    udp.become_so("the first left while the daemon was gone", by(second))?;

    give(&world, &manifest, &[])?;
    udp.become_so("nobody serves", |outcome| *outcome == Outcome::Refused)?;
    give(&world, &manifest, &[(0, ready)])?;
    udp.become_so("somebody serves again", by(first))?;
    fs::remove_file(world.manifests.join("web-20.json"))?;
    udp.become_so("the Service is gone", |outcome| outcome.by().is_none())?;
    tcp.stay("connections at the end", &connections)
}

/// A client begins before there is such a Service: a router takes its datagrams elsewhere.
#[test]
fn what_went_elsewhere_comes_to_the_service() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let manifest = exposed(20, lab, &json!({}));
    for address in &manifest.cluster_ips {
        let (host, via) = match address {
            IpAddr::V4(_) => (format!("{address}/32"), lab.peer.v4.to_string()),
            IpAddr::V6(_) => (format!("{address}/128"), lab.peer.v6.to_string()),
        };
        lab.peer.run(&["ip", "addr", "add", &host, "dev", "lo"])?;
        lab.node.run(&["ip", "route", "add", &host, "via", &via])?;
    }
    let _stray = Server::start(&lab.peer, "stray", Protocol::Udp, 80)?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    let to: Vec<SocketAddr> =
        manifest.cluster_ips.iter().map(|address| SocketAddr::new(*address, 80)).collect();
    let mut flows = Flows::open(lab, &to, Protocol::Udp)?;
    flows.become_so("there is no Service", by("stray"))?;
    manifest.write(&world.manifests)?;
    flows.become_so("there is a Service", |outcome| {
        outcome.by().is_some_and(|name| HERE.contains(&name))
    })
}

#[test]
fn sctp_associations_begin_anew() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers: Vec<Server> = { lab.pods.iter().zip(HERE) }
        .map(|(pod, name)| Server::start(pod, name, Protocol::Sctp, 8080))
        .collect::<Result<_>>()?;
    let mut manifest = exposed(20, lab, &json!({}));
    for port in &mut manifest.ports {
        port.protocol = Protocol::Sctp;
    }
    manifest.ports.truncate(1);
    let [first, second] = HERE;
    give(&world, &manifest, &[(0, Value::Null)])?;
    let _daemon = world.daemon(&["--node-cidr"])?;
    let to = targets(lab, &manifest, 20);
    let ask = |to: &SocketAddr| -> Result<Outcome> {
        Probe::new(*to, Protocol::Sctp).source_port(40_000).run(&lab.allowed)
    };
    for to in &to {
        let outcome = ask(to)?;
        ensure!(outcome.by() == Some(first), "{to}: {outcome:?}");
    }
    give(&world, &manifest, &[(1, Value::Null)])?;
    for to in &to {
        let mut last = None;
        let moved = eventually(NOTICE, || {
            last = ask(to).ok();
            last.as_ref().and_then(Outcome::by) == Some(second)
        });
        ensure!(moved, "{to}: {last:?}");
    }
    Ok(())
}
