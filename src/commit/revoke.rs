//! Open connections of sources that may no longer connect.
//!
//! The firewall only sees the first packet of a connection, so a source that loses its permission
//! would keep what it has open. After the transaction that takes the permission away, the
//! connections that would not be let in any more are deleted from connection tracking; their next
//! packet is a first packet again and is refused.
//!
//! Listing the connections takes time, in which the firewall may change again. So what is looked
//! for is a list of ports, and what decides about each connection is the firewall that is in force
//! at that moment.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use ipnet::IpNet;

use crate::model::Family;
use crate::netlink::{Error, Flow, Socket};
use crate::plan::{Firewall, ServicePlan, Sources};
use crate::ruleset::Contribution;

/// A node port whose open connections are to be looked at: protocol number and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Revocation(u8, u16);

/// What a thread of its own does, so that a long connection table holds up no commit.
#[derive(Debug)]
pub struct Revoker {
    work: mpsc::Sender<Work>,
    in_force: Arc<Mutex<InForce>>,
}

/// Whose firewall each node port has, as of the last transaction. Node ports that everybody may
/// reach are not in it.
type InForce = HashMap<Revocation, Arc<ServicePlan>>;

#[derive(Debug)]
enum Work {
    /// Connections to these ports at these addresses.
    Sweep(Vec<Revocation>, Vec<IpNet>),
    /// Says when everything before is done.
    Barrier(mpsc::Sender<()>),
}

/// A packet that passed the old firewall may still be on its way when the new one is in force, and
/// its connection not yet in the table: it is looked for once more after this time. What passes
/// between two hooks takes microseconds.
const STRAGGLERS: Duration = Duration::from_millis(50);
/// How often connections are looked for again at most, when the kernel did not list or delete them.
const AGAIN: usize = 5;

impl Revoker {
    /// Starts the thread; it ends when the `Revoker` is dropped.
    pub fn start() -> Revoker {
        let (work, queue) = mpsc::channel();
        let in_force = Arc::<Mutex<InForce>>::default();
        let seen = Arc::clone(&in_force);
        let thread = std::thread::Builder::new().name("revoker".to_owned());
        thread.spawn(move || run(&queue, &seen)).expect("a thread can be started");
        Revoker { work, in_force }
    }

    /// Takes what a transaction put in force: contributions that went, and those that came.
    pub fn settle<'a>(
        &self,
        gone: impl IntoIterator<Item = &'a Contribution>,
        come: impl IntoIterator<Item = &'a Contribution>,
    ) {
        let mut in_force = lock(&self.in_force);
        // A port may go from one to another.
        for contribution in gone {
            for port in firewall(contribution).into_iter().flat_map(all) {
                in_force.remove(&port);
            }
        }
        for plan in come.into_iter().filter_map(Contribution::plan) {
            let ports = plan.firewall.iter().flat_map(all);
            in_force.extend(ports.map(|port| (port, Arc::clone(plan))));
        }
    }

    /// Deletes the connections to these ports that the firewall in force forbids, soon.
    pub fn sweep(&self, revocations: Vec<Revocation>, node_addresses: Vec<IpNet>) {
        if !revocations.is_empty() {
            // The thread ends only after this end of the channel.
            let _ = self.work.send(Work::Sweep(revocations, node_addresses));
        }
    }

    /// Waits until everything asked for is done.
    pub fn finish(&self) {
        let (done, wait) = mpsc::channel();
        if self.work.send(Work::Barrier(done)).is_ok() {
            let _ = wait.recv();
        }
    }
}

/// The node ports of a Service whose firewall lets in less after a change than before, and those
/// that had none of this Service: who may have connected to them is not known.
pub fn revocations(old: Option<&Contribution>, new: Option<&Contribution>) -> Vec<Revocation> {
    let old = old.and_then(firewall);
    let Some(new) = new.and_then(firewall) else { return Vec::new() };
    if old == Some(new) {
        return Vec::new();
    }
    let narrowed = |port: &Revocation| {
        let before = old.filter(|old| all(old).any(|own| own == *port));
        before.is_none_or(|before| lets_in_less(&new.sources, &before.sources))
    };
    all(new).filter(narrowed).collect()
}

/// All ports of a firewall whose past is not known.
pub fn all(firewall: &Firewall) -> impl Iterator<Item = Revocation> + '_ {
    firewall.node_ports.iter().map(|port| Revocation(port.protocol.number(), port.port))
}

/// Whether somebody may connect by `before` who may not by `now`.
fn lets_in_less(now: &Sources, before: &Sources) -> bool {
    match (now, before) {
        (_, Sources::Closed) => false,
        (Sources::Closed, Sources::Allow(before)) => !before.is_empty(),
        (Sources::Allow(now), Sources::Allow(before)) => !now.covers(before),
    }
}

fn firewall(contribution: &Contribution) -> Option<&Firewall> {
    contribution.plan()?.firewall.as_ref()
}

fn lock(in_force: &Mutex<InForce>) -> MutexGuard<'_, InForce> {
    // Whoever panicked, the map is whole: it is changed by single operations.
    in_force.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(queue: &mpsc::Receiver<Work>, in_force: &Mutex<InForce>) {
    while let Ok(first) = queue.recv() {
        let mut barriers = Vec::new();
        let mut ports = HashSet::new();
        let mut addresses = Vec::new();
        for work in std::iter::once(first).chain(queue.try_iter()) {
            match work {
                Work::Sweep(revocations, node_addresses) => {
                    ports.extend(revocations);
                    addresses = node_addresses;
                }
                Work::Barrier(done) => barriers.push(done),
            }
        }
        if !ports.is_empty() {
            let mut last = sweep(&ports, &addresses, in_force);
            for _ in 0..AGAIN {
                let failed = last.is_err();
                log_result(last);
                std::thread::sleep(STRAGGLERS);
                last = sweep(&ports, &addresses, in_force);
                if !failed {
                    break;
                }
            }
            log_result(last);
        }
        for done in barriers {
            // Who waited may be gone.
            let _ = done.send(());
        }
    }
}

fn log_result(result: Result<usize, Error>) {
    match result {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "deleted connections of revoked sources"),
        Err(error) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "connections of revoked sources may live on: connection tracking failed",
        ),
    }
}

fn sweep(
    ports: &HashSet<Revocation>,
    node_addresses: &[IpNet],
    in_force: &Mutex<InForce>,
) -> Result<usize, Error> {
    // The node's own connections are exempt from the firewall.
    let own = own_addresses();
    let doomed = |flow: &Flow| {
        let port = Revocation(flow.protocol, flow.destination_port);
        flow.translated
            && ports.contains(&port)
            && node_addresses.iter().any(|cidr| cidr.contains(&flow.destination))
            && !own.contains(&flow.source)
            && lock(in_force)
                .get(&port)
                .and_then(|plan| plan.firewall.as_ref())
                .is_some_and(|firewall| !firewall.sources.contains(flow.source))
    };
    let mut socket = Socket::open()?;
    // Both families are tried, whatever becomes of the first.
    let [v4, v6] = Family::ALL.map(|family| socket.delete_flows(family, doomed));
    Ok(v4? + v6?)
}

fn own_addresses() -> HashSet<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}
