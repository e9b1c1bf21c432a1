//! Connections in connection tracking that must not go on.
//!
//! A ruleset decides about the first packet of a connection only. So some connections must be
//! deleted after a transaction; their next packet is a first packet again. [`super::revoke`] says
//! which ones the firewall forbids by now, [`super::stale`] which ones lead to endpoints that left,
//! and [`super::affinity`] which clients would be led there again.
//!
//! Listing the connections takes time, in which the ruleset may change again. So what is looked for
//! is a list of places that connections are made to, and what decides about each connection is what
//! is in force at that moment.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use ipnet::IpNet;

use super::affinity::{self, Forgotten, Lapsed, Remembered};
use super::revoke::{Guarded, Revocation};
use super::stale::{Destination, Served};
use crate::host::OwnAddresses;
use crate::model::Family;
use crate::netlink::{Error, Flow, Socket};
use crate::ruleset::Contribution;

/// Looks for connections on a thread of its own, so that a long connection table holds up no commit.
#[derive(Debug)]
pub struct Sweeper {
    work: mpsc::Sender<Work>,
    in_force: Arc<Mutex<InForce>>,
    /// Clients that are to be forgotten: only the owner of the table can do that.
    forgotten: mpsc::Receiver<Vec<Forgotten>>,
}

/// What decides about connections, as of the last transaction.
#[derive(Debug, Default)]
struct InForce {
    guarded: Guarded,
    served: Served,
    remembered: Remembered,
    /// CIDRs at whose local addresses node ports are served.
    node_addresses: Vec<IpNet>,
}

/// What connections are to be looked at after a transaction.
#[derive(Debug, Default)]
pub struct Suspects {
    /// Those to node ports whose firewall lets in less than before.
    pub revoked: HashSet<Revocation>,
    /// Those to where somebody served who may not serve any more.
    pub unserved: HashSet<Destination>,
    /// Clients that are remembered for somebody who does not serve them any more.
    pub lapsed: Lapsed,
}

impl Suspects {
    fn is_empty(&self) -> bool {
        self.revoked.is_empty() && self.unserved.is_empty() && self.lapsed.is_empty()
    }

    /// Adds what a change means; where it is not known what was before, everything.
    pub fn note(&mut self, old: Option<&Contribution>, next: Option<&Contribution>) {
        self.revoked.extend(super::revoke::revocations(old, next));
        self.unserved.extend(super::stale::unserved(old, next));
        self.lapsed.note(old, next);
    }

    fn extend(&mut self, other: Suspects) {
        self.revoked.extend(other.revoked);
        self.unserved.extend(other.unserved);
        self.lapsed.extend(other.lapsed);
    }
}

#[derive(Debug)]
enum Work {
    Sweep(Suspects),
    WakeBy(Wake),
    /// Says when everything before is done.
    Barrier(mpsc::Sender<()>),
}

/// Tells somebody that there is something new.
struct Wake(Box<dyn Fn() + Send>);

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

/// A packet that passed the old ruleset may still be on its way when the new one is in force, and
/// its connection not yet in the table: it is looked for once more after this time. What passes
/// between two hooks takes microseconds.
const STRAGGLERS: Duration = Duration::from_millis(50);
/// How often connections are looked for again at most, when the kernel did not list or delete them.
const AGAIN: usize = 5;

impl Sweeper {
    /// Starts the thread; it ends when the `Sweeper` is dropped.
    pub fn start() -> Sweeper {
        let (work, queue) = mpsc::channel();
        let (forget, forgotten) = mpsc::channel();
        let in_force = Arc::<Mutex<InForce>>::default();
        let thread = Thread {
            in_force: Arc::clone(&in_force),
            forget,
            wake: None,
            own: OwnAddresses::default(),
        };
        let named = std::thread::Builder::new().name("sweeper".to_owned());
        named.spawn(move || thread.run(&queue)).expect("a thread can be started");
        Sweeper { work, in_force, forgotten }
    }

    /// Has `wake` called whenever there is something new for [`Sweeper::forgotten`].
    pub fn wake_by(&self, wake: impl Fn() + Send + 'static) {
        let _ = self.work.send(Work::WakeBy(Wake(Box::new(wake))));
    }

    /// Clients that are to be forgotten, found since the last time.
    pub fn forgotten(&self) -> Vec<Forgotten> {
        self.forgotten.try_iter().flatten().collect()
    }

    /// Takes what a transaction put in force: contributions that went, and those that came.
    pub fn settle<'a>(
        &self,
        gone: impl IntoIterator<Item = &'a Contribution>,
        come: impl IntoIterator<Item = &'a Contribution>,
    ) {
        let mut in_force = lock(&self.in_force);
        let InForce { guarded, served, remembered, node_addresses } = &mut *in_force;
        // A port may go from one to another.
        for contribution in gone {
            guarded.release(contribution);
            served.release(contribution);
            remembered.release(contribution);
        }
        for contribution in come {
            guarded.acquire(contribution);
            served.acquire(contribution);
            remembered.acquire(contribution);
            if let Contribution::Node(node) = contribution {
                *node_addresses = [&node.nodeport_cidrs[..], &node.localhost_cidrs].concat();
            }
        }
    }

    /// Deletes those of the suspects that may not go on by what is in force, soon.
    pub fn sweep(&self, suspects: Suspects) {
        if !suspects.is_empty() {
            // The thread ends only after this end of the channel.
            let _ = self.work.send(Work::Sweep(suspects));
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

fn lock(in_force: &Mutex<InForce>) -> MutexGuard<'_, InForce> {
    // Whoever panicked, the maps are whole: they are changed by single operations.
    in_force.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the thread works with.
struct Thread {
    in_force: Arc<Mutex<InForce>>,
    forget: mpsc::Sender<Vec<Forgotten>>,
    wake: Option<Wake>,
    own: OwnAddresses,
}

impl Thread {
    fn run(mut self, queue: &mpsc::Receiver<Work>) {
        while let Ok(first) = queue.recv() {
            let mut barriers = Vec::new();
            let mut suspects = Suspects::default();
            for work in std::iter::once(first).chain(queue.try_iter()) {
                match work {
                    Work::Sweep(more) => suspects.extend(more),
                    Work::WakeBy(wake) => self.wake = Some(wake),
                    Work::Barrier(done) => barriers.push(done),
                }
            }
            if !suspects.is_empty() {
                let mut last = self.sweep(&suspects);
                for _ in 0..AGAIN {
                    let failed = last.is_err();
                    log_result(last);
                    std::thread::sleep(STRAGGLERS);
                    last = self.sweep(&suspects);
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

    /// Looks once. All is tried, whatever becomes of the first.
    fn sweep(&mut self, suspects: &Suspects) -> Result<Deleted, Error> {
        let mut socket = Socket::open()?;
        let forgotten = self.forget(&mut socket, &suspects.lapsed);
        let deleted = delete_flows(&mut socket, suspects, &self.in_force, &mut self.own);
        forgotten.and(deleted)
    }

    fn forget(&self, socket: &mut Socket, lapsed: &Lapsed) -> Result<(), Error> {
        if lapsed.is_empty() {
            return Ok(());
        }
        let listed = affinity::list(socket)?;
        let found = lock(&self.in_force).remembered.lapsed(lapsed, &listed);
        if !found.is_empty() && self.forget.send(found).is_ok() {
            self.wake.iter().for_each(|Wake(wake)| wake());
        }
        Ok(())
    }
}

/// How many connections were deleted, and why.
#[derive(Clone, Copy, Debug, Default)]
struct Deleted {
    revoked: usize,
    unserved: usize,
}

fn log_result(result: Result<Deleted, Error>) {
    match result {
        Ok(Deleted { revoked, unserved }) => {
            if revoked > 0 {
                tracing::info!(count = revoked, "deleted connections of revoked sources");
            }
            if unserved > 0 {
                tracing::info!(count = unserved, "deleted flows to endpoints that serve no more");
            }
        }
        Err(error) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "connections of revoked sources, and flows and clients of endpoints that left, may stay: \
             the kernel does not list or delete them",
        ),
    }
}

fn delete_flows(
    socket: &mut Socket,
    suspects: &Suspects,
    in_force: &Mutex<InForce>,
    own: &mut OwnAddresses,
) -> Result<Deleted, Error> {
    // Without them nobody could tell the node's own connections from others.
    let listed = own.look();
    let own = listed.map_err(|source| Error::List { what: "the node's addresses", source })?;
    let node_port = |flow: &Flow, in_force: &InForce| {
        in_force.node_addresses.iter().any(|cidr| cidr.contains(&flow.destination))
    };
    let mut deleted = Deleted::default();
    let mut failed = None;
    for family in Family::ALL {
        if !suspects.revoked.is_empty() {
            // The node's own connections are exempt from the firewall.
            let result = socket.delete_flows(family, |flow| {
                let in_force = lock(in_force);
                let at_node_port = node_port(flow, &in_force)
                    // Health checks are answered by a process of the node.
                    && (flow.translated || own.contains(&flow.destination))
                    && !own.contains(&flow.source)
                    && in_force.guarded.forbids_at_node_port(&suspects.revoked, flow);
                at_node_port
                    || flow.translated
                        && in_force.guarded.forbids_at_address(&suspects.revoked, flow)
            });
            deleted.revoked += result.unwrap_or_else(|error| {
                failed.get_or_insert(error);
                0
            });
        }
        if !suspects.unserved.is_empty() {
            let result = socket.delete_flows(family, |flow| {
                let in_force = lock(in_force);
                let at_node_port = own.contains(&flow.destination) && node_port(flow, &in_force);
                in_force.served.forbids(&suspects.unserved, flow, family, at_node_port)
            });
            deleted.unserved += result.unwrap_or_else(|error| {
                failed.get_or_insert(error);
                0
            });
        }
    }
    failed.map_or(Ok(deleted), Err)
}
