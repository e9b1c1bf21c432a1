//! Connections in connection tracking that must not go on, and who is to be forgotten.
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
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use ipnet::IpNet;

use super::affinity::{self, Forgotten, Lapsed, Remembered};
use super::revoke::{Guarded, Revocation};
use super::stale::{Destination, Left, Served};
use crate::host::OwnAddresses;
use crate::model::Family;
use crate::netlink::{ElementDump, Error, Socket};
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
    /// CIDRs at whose local addresses node ports are served, but for loopback addresses.
    node_addresses: Vec<IpNet>,
    /// Loopback CIDRs at which they are served.
    localhost: Vec<IpNet>,
}

impl InForce {
    /// Whether node ports are served at this address, if it is the node's own.
    fn has_node_ports_at(&self, address: IpAddr) -> bool {
        let cidrs = if address.is_loopback() { &self.localhost } else { &self.node_addresses };
        cidrs.iter().any(|cidr| cidr.contains(&address))
    }
}

/// What connections are to be looked at after a transaction.
#[derive(Debug, Default)]
pub struct Suspects {
    /// Those to node ports whose firewall lets in less than before.
    pub revoked: HashSet<Revocation>,
    /// Those to where somebody served who may not serve any more.
    pub unserved: HashSet<Destination>,
    /// Those that a table led to which was found.
    pub left: Left,
    /// Clients that are remembered for somebody who does not serve them any more.
    pub lapsed: Lapsed,
}

impl Suspects {
    fn is_empty(&self) -> bool {
        self.revoked.is_empty() && !self.has_unserved() && self.lapsed.is_empty()
    }

    fn has_unserved(&self) -> bool {
        !self.unserved.is_empty() || !self.left.is_empty()
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
        self.left.extend(other.left);
        self.lapsed.extend(other.lapsed);
    }
}

#[derive(Debug)]
enum Work {
    Sweep(Box<Suspects>),
    WakeBy(Wake),
    /// Says when everything before is done; of clients that are to be forgotten, if they count.
    Barrier {
        done: mpsc::Sender<()>,
        with_clients: bool,
    },
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
        let forgetter = Forgetter::start(Arc::clone(&in_force), forget);
        let own = OwnAddresses::default();
        let socket = LastingSocket::default();
        let thread = Thread { in_force: Arc::clone(&in_force), forgetter, own, socket };
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
        let InForce { guarded, served, remembered, node_addresses, localhost } = &mut *in_force;
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
                node_addresses.clone_from(&node.nodeport_cidrs);
                localhost.clone_from(&node.localhost_cidrs);
            }
        }
    }

    /// Deletes those of the suspects that may not go on by what is in force, soon.
    pub fn sweep(&self, suspects: Suspects) {
        if !suspects.is_empty() {
            // The thread ends only after this end of the channel.
            let _ = self.work.send(Work::Sweep(Box::new(suspects)));
        }
    }

    /// Waits until connections that may not go on are deleted. Clients that are to be forgotten are
    /// not waited for: that may take half a minute, and the rules send them nowhere.
    pub fn finish(&self) {
        self.wait(false);
    }

    /// Waits until all who are to be forgotten have been found, too.
    pub fn finish_with_clients(&self) {
        self.wait(true);
    }

    fn wait(&self, with_clients: bool) {
        let (done, wait) = mpsc::channel();
        if self.work.send(Work::Barrier { done, with_clients }).is_ok() {
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
    forgetter: Forgetter,
    own: OwnAddresses,
    socket: LastingSocket,
}

impl Thread {
    fn run(mut self, queue: &mpsc::Receiver<Work>) {
        while let Ok(first) = queue.recv() {
            let mut barriers = Vec::new();
            let mut suspects = Suspects::default();
            for work in std::iter::once(first).chain(queue.try_iter()) {
                match work {
                    Work::Sweep(more) => suspects.extend(*more),
                    Work::WakeBy(wake) => self.forgetter.tell(Forget::WakeBy(wake)),
                    Work::Barrier { done, with_clients } => barriers.push((done, with_clients)),
                }
            }
            let lapsed = std::mem::take(&mut suspects.lapsed);
            if !lapsed.is_empty() {
                self.forgetter.tell(Forget::Lapsed(lapsed));
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
            for (done, with_clients) in barriers {
                if with_clients {
                    self.forgetter.tell(Forget::Barrier(done));
                } else {
                    // Who waited may be gone.
                    let _ = done.send(());
                }
            }
        }
    }

    /// Looks once. All is tried, whatever becomes of the first.
    fn sweep(&mut self, suspects: &Suspects) -> Result<Deleted, Error> {
        let Thread { in_force, own, socket, .. } = self;
        socket.with(|socket| delete_flows(socket, suspects, in_force, own))
    }
}

/// A socket that stays open. When one is closed, the kernel waits for everything that earlier
/// transactions left to be freed, tens of milliseconds, and transactions wait for that
/// (`nft_rcv_nl_event` of `nf_tables_api.c`).
#[derive(Debug, Default)]
struct LastingSocket(Option<Socket>);

impl LastingSocket {
    /// Has `work` done with the socket, which is opened where there is none. After a failure the next
    /// one is another.
    fn with<T>(&mut self, work: impl FnOnce(&mut Socket) -> Result<T, Error>) -> Result<T, Error> {
        let mut socket = match self.0.take() {
            Some(socket) => socket,
            None => Socket::open()?,
        };
        let done = work(&mut socket)?;
        self.0 = Some(socket);
        Ok(done)
    }
}

/// What the thread that finds clients does.
#[derive(Debug)]
enum Forget {
    Lapsed(Lapsed),
    WakeBy(Wake),
    Barrier(mpsc::Sender<()>),
}

/// A thread of its own that finds who is to be forgotten, because listing all who are remembered may
/// take the kernel half a minute, and connections that may not go on must not wait for that.
struct Forgetter(mpsc::Sender<Forget>);

impl Forgetter {
    /// Starts the thread; it ends when the `Forgetter` is dropped.
    fn start(in_force: Arc<Mutex<InForce>>, found: mpsc::Sender<Vec<Forgotten>>) -> Forgetter {
        let (tell, queue) = mpsc::channel();
        let named = std::thread::Builder::new().name("forgetter".to_owned());
        let run = move || find_clients(&queue, &in_force, &found);
        named.spawn(run).expect("a thread can be started");
        Forgetter(tell)
    }

    fn tell(&self, what: Forget) {
        // The thread ends only after this end of the channel.
        let _ = self.0.send(what);
    }
}

fn find_clients(
    queue: &mpsc::Receiver<Forget>,
    in_force: &Mutex<InForce>,
    found: &mpsc::Sender<Vec<Forgotten>>,
) {
    let mut wake = None;
    let mut socket = LastingSocket::default();
    while let Ok(first) = queue.recv() {
        // A packet that passed the old ruleset may still be remembered.
        std::thread::sleep(STRAGGLERS);
        let (mut lapsed, mut barriers) = (Lapsed::default(), Vec::new());
        for what in std::iter::once(first).chain(queue.try_iter()) {
            match what {
                Forget::Lapsed(more) => lapsed.extend(more),
                Forget::WakeBy(by) => wake = Some(by),
                Forget::Barrier(done) => barriers.push(done),
            }
        }
        if !lapsed.is_empty() {
            match socket.with(affinity::list) {
                Ok(listed) => {
                    // There may be a million, and transactions need what is in force, too.
                    let is_stale = |family, element: &ElementDump| {
                        lock(in_force).remembered.is_stale(&lapsed, family, element)
                    };
                    let clients = affinity::select(listed, is_stale);
                    if !clients.is_empty()
                        && found.send(clients).is_ok()
                        && let Some(Wake(wake)) = &wake
                    {
                        wake();
                    }
                }
                // Each of them loses an attempt to connect.
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot list the clients of endpoints that left",
                ),
            }
        }
        for done in barriers {
            // Who waited may be gone.
            let _ = done.send(());
        }
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
            "connections of revoked sources, and flows to endpoints that left, may stay: \
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
    let addresses =
        listed.map_err(|source| Error::List { what: "the node's addresses", source })?;
    // A loopback interface answers for its whole network, though it has one address of it.
    let own = |address: IpAddr| address.is_loopback() || addresses.contains(&address);
    let mut deleted = Deleted::default();
    let mut failed = None;
    for family in Family::ALL {
        if !suspects.revoked.is_empty() {
            // The node's own connections are exempt from the firewall.
            let result = socket.delete_flows(family, |flow| {
                let in_force = lock(in_force);
                let at_node_port = own(flow.destination)
                    && in_force.has_node_ports_at(flow.destination)
                    && !own(flow.source)
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
        if suspects.has_unserved() {
            let result = socket.delete_flows(family, |flow| {
                let in_force = lock(in_force);
                let at_node_port =
                    own(flow.destination) && in_force.has_node_ports_at(flow.destination);
                let Suspects { unserved, left, .. } = suspects;
                in_force.served.forbids(unserved, left, flow, family, at_node_port)
            });
            deleted.unserved += result.unwrap_or_else(|error| {
                failed.get_or_insert(error);
                0
            });
        }
    }
    failed.map_or(Ok(deleted), Err)
}
