//! Open connections through a node port whose firewall changes: those of sources that may no longer
//! connect end, all others live on.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::commit::{Change, Worker};
use portcullis::model::Protocol::{Tcp, Udp};
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab, eventually};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::services::{ENDPOINT_PORT, Sketch, node, service};
use portcullis_integration::traffic::{Flow, Outcome, Probe, Protocol, Server};

const NODE_PORT: u16 = 30080;
const OTHER_NODE_PORT: u16 = 30081;
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
const LIMIT: Duration = Duration::from_secs(10);

/// What a client's flows are called.
const NODE: &str = "node";
const POD: &str = "pod-1";
const FIRST: &str = "allowed";
const SECOND: &str = "refused";

/// The laboratory with a daemon on the node and servers in two pods.
struct World {
    lab: Lab,
    worker: Option<Worker>,
    _servers: Vec<Server>,
}

/// Whom the Service's firewall lets in.
#[derive(Clone, Copy, Debug)]
enum Sources {
    /// There is no such Service.
    Absent,
    Everybody,
    Listed(&'static str),
    /// Nobody: the list was not understood.
    Closed,
}

/// A flow and what tells it from the others.
struct Labelled {
    from: &'static str,
    family: Family,
    protocol: Protocol,
    port: u16,
    flow: Flow,
}

impl World {
    fn new() -> Result<Option<World>> {
        if !available(&[Requirement::Root, Requirement::Nft]) {
            return Ok(None);
        }
        let lab = Lab::new(2)?;
        let mut servers = Vec::new();
        for pod in &lab.pods {
            for protocol in PROTOCOLS {
                servers.push(Server::start(pod, pod.name(), protocol, ENDPOINT_PORT)?);
            }
        }
        let mut world = World { lab, worker: None, _servers: servers };
        world.restart(Sources::Absent)?;
        Ok(Some(world))
    }

    /// Gives the Service this firewall, and waits for what follows.
    fn commit(&mut self, sources: Sources) -> Result<()> {
        self.commit_only(sources)?;
        self.worker().finish_sweeps();
        Ok(())
    }

    fn commit_only(&mut self, sources: Sources) -> Result<()> {
        let plan = self.web(sources).map(|sketch| sketch.plan());
        let change = Change::Service(service("shop/web").name(), plan);
        let refused = self.worker().commit(vec![change]);
        ensure!(refused.is_empty(), "{refused:?}");
        Ok(())
    }

    /// Replaces the daemon by one that finds the Service with this firewall.
    fn restart(&mut self, sources: Sources) -> Result<()> {
        self.worker = None;
        let services = self.web(sources).into_iter().chain([self.other()]);
        let plans: Vec<_> = services.map(|sketch| sketch.plan()).collect();
        let node = node(&["192.168.77.1/32", "fd00:77::1/128"])?;
        // A process that another test is about to start may hold the old socket for a moment.
        let start = || -> Result<Worker> {
            let mut worker = self.lab.node.enter(|| Worker::open(|_| {}))?;
            worker.adopt(&node, plans.clone())?;
            Ok(worker)
        };
        let mut worker = Err(anyhow::anyhow!("not tried"));
        eventually(LIMIT, || {
            worker = start();
            worker.is_ok()
        });
        self.worker = Some(worker?);
        self.worker().finish_sweeps();
        Ok(())
    }

    fn worker(&mut self) -> &mut Worker {
        self.worker.as_mut().expect("a daemon was started")
    }

    /// The Service with both protocols at one node port, in both families.
    fn web(&self, sources: Sources) -> Option<Sketch> {
        let web = self.on_both_pods(service("shop/web").at("10.96.0.1").at("fd00:10:96::1"));
        let web = web.port("tcp", Tcp, 80, NODE_PORT).port("udp", Udp, 80, NODE_PORT);
        match sources {
            Sources::Absent => None,
            Sources::Everybody => Some(web.open()),
            Sources::Listed(list) => Some(web.allow(list)),
            Sources::Closed => Some(web.closed()),
        }
    }

    /// Another Service, whose firewall never changes.
    fn other(&self) -> Sketch {
        let other = self.on_both_pods(service("shop/other").at("10.96.0.2").at("fd00:10:96::2"));
        let other = other.port("tcp", Tcp, 80, OTHER_NODE_PORT);
        other.port("udp", Udp, 80, OTHER_NODE_PORT).allow("0.0.0.0/0, ::/0")
    }

    fn on_both_pods(&self, sketch: Sketch) -> Sketch {
        self.lab
            .pods
            .iter()
            .fold(sketch, |sketch, pod| sketch.local(&[&pod.v4.to_string(), &pod.v6.to_string()]))
    }

    fn host(&self, name: &str) -> &Host {
        match name {
            NODE => &self.lab.node,
            POD => &self.lab.pods[1],
            FIRST => &self.lab.allowed,
            _ => &self.lab.refused,
        }
    }

    /// Flows of everybody to the Service, and of one client to the other Service.
    fn flows(&self) -> Result<Vec<Labelled>> {
        let mut flows = Vec::new();
        let everybody = [NODE, POD, FIRST, SECOND].map(|from| (from, NODE_PORT));
        for (from, port) in everybody.into_iter().chain([(SECOND, OTHER_NODE_PORT)]) {
            for family in FAMILIES {
                for protocol in PROTOCOLS {
                    let to = (self.lab.node.address(family), port);
                    let flow = Flow::open(self.host(from), to, protocol)?;
                    flows.push(Labelled { from, family, protocol, port, flow });
                }
            }
        }
        Ok(flows)
    }
}

/// Checks that exactly the flows of `dead` sources to the Service are dead.
fn check(flows: &mut [Labelled], dead: impl Fn(&Labelled) -> bool) -> Result<()> {
    // All at once: what is dead is known after a second only.
    let outcomes: Vec<Result<Outcome>> = thread::scope(|scope| {
        let asked: Vec<_> =
            flows.iter_mut().map(|labelled| scope.spawn(|| labelled.flow.exchange())).collect();
        asked.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let mut wrong = Vec::new();
    for (labelled, outcome) in flows.iter().zip(outcomes) {
        let (outcome, first) = (outcome?, labelled.flow.first());
        let as_expected = if labelled.port == NODE_PORT && dead(labelled) {
            outcome.by().is_none()
        } else {
            // The same server, and it sees the same client.
            outcome == *first
        };
        if !as_expected {
            let Labelled { from, family, protocol, port, .. } = labelled;
            wrong
                .push(format!("{from} {protocol:?} {family:?} {port}: {outcome:?}, was {first:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// A change of the firewall, and whose flows it ends.
struct Case {
    name: &'static str,
    before: Sources,
    after: Sources,
    dead: fn(&Labelled) -> bool,
}

const BOTH: &str = "192.0.2.0/24, 198.51.100.0/24, 10.244.0.0/16, \
    2001:db8:1::/64, 2001:db8:2::/64, fd00:10:244::/56";
const WITHOUT_SECOND: &str = "192.0.2.0/24, 10.244.0.0/16, 2001:db8:1::/64, fd00:10:244::/56";

fn nobody(_: &Labelled) -> bool {
    false
}

/// Flows that nobody closes end with the Service, connections when their two ends want.
fn nobody_closes(flow: &Labelled) -> bool {
    flow.protocol == Protocol::Udp
}

fn second(flow: &Labelled) -> bool {
    flow.from == SECOND
}

/// The node's own connections are exempt from the firewall.
fn all_others(flow: &Labelled) -> bool {
    flow.from != NODE
}

const CASES: &[Case] = &[
    Case {
        name: "a source is taken from the list",
        before: Sources::Listed(BOTH),
        after: Sources::Listed(WITHOUT_SECOND),
        dead: second,
    },
    Case {
        name: "a source is taken from the list in one family",
        before: Sources::Listed(BOTH),
        after: Sources::Listed(
            "192.0.2.0/24, 198.51.100.0/24, 10.244.0.0/16, 2001:db8:1::/64, fd00:10:244::/56",
        ),
        dead: |flow| flow.from == SECOND && flow.family == Family::V6,
    },
    Case {
        name: "a prefix becomes longer",
        before: Sources::Listed("0.0.0.0/0, ::/0"),
        after: Sources::Listed("198.51.100.0/28, 10.244.0.11, 2001:db8:2::10, fd00:10:244::b"),
        dead: |flow| flow.from == FIRST,
    },
    Case {
        name: "a list becomes longer",
        before: Sources::Listed(BOTH),
        after: Sources::Listed("0.0.0.0/0, ::/0"),
        dead: nobody,
    },
    Case {
        name: "a list is written in another way",
        before: Sources::Listed("0.0.0.0/0, ::/0"),
        after: Sources::Listed("0.0.0.0/1, 128.0.0.0/1, ::/1, 8000::/1"),
        dead: nobody,
    },
    Case {
        name: "a source comes and another goes",
        before: Sources::Listed(BOTH),
        after: Sources::Listed(
            "203.0.113.0/24, 192.0.2.0/24, 10.244.0.0/16, 2001:db8:1::/64, fd00:10:244::/56",
        ),
        dead: second,
    },
    Case {
        name: "an open node port gets a list",
        before: Sources::Everybody,
        after: Sources::Listed(WITHOUT_SECOND),
        dead: second,
    },
    Case {
        name: "an open node port gets an empty list",
        before: Sources::Everybody,
        after: Sources::Listed(""),
        dead: all_others,
    },
    Case {
        name: "a list is not understood any more",
        before: Sources::Listed(BOTH),
        after: Sources::Closed,
        dead: all_others,
    },
    Case {
        name: "a list is removed",
        before: Sources::Listed(BOTH),
        after: Sources::Everybody,
        dead: nobody,
    },
    Case {
        name: "the Service is removed",
        before: Sources::Listed(BOTH),
        after: Sources::Absent,
        dead: nobody_closes,
    },
];

#[test]
fn who_may_no_longer_connect_is_disconnected() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    let mut failed = Vec::new();
    for case in CASES {
        let mut run = || -> Result<()> {
            world.commit(case.before)?;
            let mut flows = world.flows()?;
            check(&mut flows, nobody).context("before")?;
            world.commit(case.after)?;
            check(&mut flows, case.dead)
        };
        if let Err(error) = run() {
            failed.push(format!("{}: {error:#}", case.name));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

#[test]
fn a_daemon_that_starts_disconnects_whom_the_last_let_in() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    let open = |world: &mut World, before| -> Result<Vec<Labelled>> {
        world.commit(before)?;
        world.flows()
    };
    // Nothing changed, and counters go on.
    let mut flows = open(&mut world, Sources::Listed(BOTH))?;
    let counters = firewall(&world)?;
    world.restart(Sources::Listed(BOTH))?;
    check(&mut flows, nobody).context("the same list")?;
    ensure!(counters.contains("packets 6 "), "not counted: {counters}");
    ensure!(firewall(&world)? == counters, "the firewall was written anew");

    world.restart(Sources::Listed(WITHOUT_SECOND))?;
    check(&mut flows, second).context("a shorter list")?;

    let mut flows = open(&mut world, Sources::Everybody)?;
    world.restart(Sources::Listed(WITHOUT_SECOND))?;
    check(&mut flows, second).context("a first list")
}

/// A daemon may end when it has written a list and not yet looked for connections.
#[test]
fn what_the_last_daemon_left_undone_is_done() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(Sources::Listed(BOTH))?;
    let mut flows = world.flows()?;
    // By nft, nobody looks for connections. The table must be nobody's for that.
    world.worker = None;
    let delete = "delete element inet portcullis allow4-shop/web { 198.51.100.0/24 }
        delete element inet portcullis allow6-shop/web { 2001:db8:2::/64 }";
    ensure!(eventually(LIMIT, || world.lab.node.nft(delete).is_ok()), "still owned");
    check(&mut flows, nobody).context("without a daemon")?;
    world.restart(Sources::Listed(WITHOUT_SECOND))?;
    check(&mut flows, second)
}

/// The same node port again, after a time in which nobody had it: what was opened before is as
/// forbidden as what would be opened now.
#[test]
fn a_node_port_that_comes_again_is_nobodys_inheritance() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(Sources::Everybody)?;
    let mut flows = world.flows()?;
    world.commit(Sources::Absent)?;
    check(&mut flows, nobody_closes).context("while nobody has the port")?;
    flows.retain(|flow| !nobody_closes(flow));
    world.commit(Sources::Listed(WITHOUT_SECOND))?;
    check(&mut flows, second)
}

/// Looking for connections takes time, and the firewall may have changed again by then.
#[test]
fn who_is_let_in_again_is_not_disconnected() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    for again in [Sources::Listed(BOTH), Sources::Everybody] {
        for round in 0..15 {
            world.commit_only(Sources::Listed(WITHOUT_SECOND))?;
            world.commit_only(again)?;
            let mut flows = world.flows()?;
            world.worker().finish_sweeps();
            check(&mut flows, nobody).with_context(|| format!("{again:?}, round {round}"))?;
        }
    }
    Ok(())
}

/// New connections of revoked sources are refused, too, and those of others are not.
#[test]
fn new_connections_meet_the_same_firewall() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(Sources::Listed(WITHOUT_SECOND))?;
    for family in FAMILIES {
        for protocol in PROTOCOLS {
            let probe = Probe::new((world.lab.node.address(family), NODE_PORT), protocol);
            for from in [NODE, POD, FIRST] {
                let outcome = probe.run(world.host(from))?;
                ensure!(outcome.by().is_some(), "{from} {protocol:?} {family:?}: {outcome:?}");
            }
            let outcome = probe.timeout(Duration::from_millis(300)).run(world.host(SECOND))?;
            ensure!(outcome == Outcome::TimedOut, "{protocol:?} {family:?}: {outcome:?}");
        }
    }
    Ok(())
}

/// The Service's firewall as nft lists it, with its counters.
fn firewall(world: &World) -> Result<String> {
    world.lab.node.run(&["nft", "list", "chain", "inet", "portcullis", "fw-shop/web"])
}
