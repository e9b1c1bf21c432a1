//! Group commit: plans in, one kernel transaction out for all that are waiting.
//!
//! A [`Committer`] is a thread of its own that owns the netlink socket, the plans of all Services
//! and the state last applied. It takes everything that is queued, commits the difference as one
//! transaction and tells every waiter its result; no clock decides what belongs together. When the
//! kernel refuses a transaction, the subject at fault is left out - its waiter gets the error, and
//! what the kernel holds of it stays - and the others go on.

mod adopt;
mod affinity;
mod applied;
mod blame;
mod flows;
#[cfg(test)]
mod laws;
mod listing;
mod pulse;
mod revoke;
mod stale;
mod worker;

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::oneshot;

use crate::model::{NodeContext, ServiceName};
use crate::netlink;
use crate::plan::ServicePlan;
use crate::ruleset::Subject;

pub use applied::Applied;
pub use pulse::Pulse;
pub use worker::Worker;

/// A change that waits to be committed.
#[derive(Debug)]
pub enum Change {
    /// A Service's new plan, or `None` when the Service is gone.
    Service(ServiceName, Option<ServicePlan>),
    /// The node's new addresses.
    Node(NodeContext),
}

impl Change {
    /// What changes.
    pub fn subject(&self) -> Subject {
        match self {
            Change::Service(service, _) => Subject::Service(service.clone()),
            Change::Node(_) => Subject::Node,
        }
    }
}

/// What became of one subject.
#[derive(Clone, Debug)]
pub struct Report {
    /// The subject.
    pub subject: Subject,
    /// Why the kernel refused it; `None` if it is in force.
    pub refused: Option<CommitError>,
    /// What is to be in force for it, if it is a Service: without what another one has.
    pub plan: Option<Arc<ServicePlan>>,
}

/// What the first commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Whether a table of ours was there before.
    pub found: bool,
    /// Whether the table was laid out anew, because there was none or another version's.
    pub replaced: bool,
    /// Elements, chains, rules and sets written or deleted.
    pub operations: usize,
}

/// What the transactions of a worker that succeeded have cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Their number.
    pub transactions: usize,
    /// The number of those that did not succeed, and cost nothing of the rest.
    pub refused: usize,
    /// Elements, chains, rules and sets written or deleted.
    pub operations: usize,
    /// Bytes handed to the kernel.
    pub bytes: usize,
    /// Time from handing over a transaction to the kernel's answer.
    pub kernel_time: Duration,
}

/// Why a change is not in force.
#[derive(Clone, Debug, Error)]
pub enum CommitError {
    /// The kernel refused it; trying again later may help.
    #[error("{0}")]
    Kernel(#[source] Arc<netlink::Error>),
    /// The committer has ended.
    #[error("the committer has ended")]
    Ended,
}

/// A handle on the committing thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Committer {
    requests: Arc<mpsc::Sender<Request>>,
    pulse: Pulse,
}

/// What the thread is asked to do.
#[derive(Debug)]
enum Request {
    Adopt(NodeContext, Vec<ServicePlan>, oneshot::Sender<Result<Adoption, CommitError>>),
    Change(Change, oneshot::Sender<Result<(), CommitError>>),
    RetryRefused,
    LookAfter,
    /// There are clients to be forgotten.
    ForgetClients,
}

impl Committer {
    /// Starts the thread on `worker`. It ends when the last handle is dropped.
    pub fn start(worker: Worker) -> (Committer, JoinHandle<()>) {
        let (requests, queue) = mpsc::channel();
        let requests = Arc::new(requests);
        let pulse = Pulse::default();
        // The thread ends with the last handle, so what wakes it must not be one.
        let (weak, asks) = (Arc::downgrade(&requests), pulse.clone());
        worker.wake_by(move || {
            if let Some(requests) = weak.upgrade() {
                asks.asked();
                let _ = requests.send(Request::ForgetClients);
            }
        });
        let beats = pulse.clone();
        let thread = std::thread::Builder::new().name("committer".to_owned());
        let thread = thread.spawn(move || run(worker, &queue, &beats));
        let thread = thread.expect("a thread can be started");
        (Committer { requests, pulse }, thread)
    }

    /// Tells whether the thread keeps up.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// The first commit: makes the kernel hold exactly what these plans ask for, whatever it holds
    /// now. Nothing is written that is there already.
    ///
    /// # Errors
    /// When the table cannot be read or laid out. A single Service that is refused is reported and
    /// left out.
    pub async fn adopt(
        &self,
        node: NodeContext,
        plans: Vec<ServicePlan>,
    ) -> Result<Adoption, CommitError> {
        answered(self.ask(|reply| Request::Adopt(node, plans, reply))).await?
    }

    /// Hands over a change, and gives a future that waits until it is committed, together with all
    /// others that wait. The change is in the queue when this returns, so who calls under a lock
    /// knows the order in which changes are made.
    ///
    /// # Errors
    /// When the kernel refuses this subject, and what it holds of it is still the old state.
    pub fn commit(
        &self,
        change: Change,
    ) -> impl Future<Output = Result<(), CommitError>> + Send + use<> {
        let asked = self.ask(|reply| Request::Change(change, reply));
        async { answered(asked).await? }
    }

    /// Tries once more what the kernel refused before.
    pub fn retry_refused(&self) {
        // A thread that has ended has nothing to retry.
        let _ = self.send(Request::RetryRefused);
    }

    /// Takes the table over anew if somebody else has changed it; see [`Worker::look_after`].
    pub fn look_after(&self) {
        let _ = self.send(Request::LookAfter);
    }

    fn send(&self, request: Request) -> Result<(), CommitError> {
        self.pulse.asked();
        self.requests.send(request).map_err(|_| CommitError::Ended)
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<oneshot::Receiver<T>, CommitError> {
        let (reply, answer) = oneshot::channel();
        self.send(request(reply))?;
        Ok(answer)
    }
}

async fn answered<T>(asked: Result<oneshot::Receiver<T>, CommitError>) -> Result<T, CommitError> {
    asked?.await.map_err(|_| CommitError::Ended)
}

fn run(mut worker: Worker, queue: &mpsc::Receiver<Request>, pulse: &Pulse) {
    // Whether something is to be done without being asked.
    let mut more = false;
    loop {
        let first = match if more { queue.try_recv() } else { queue.recv().map_err(Into::into) } {
            Ok(first) => Some(first),
            Err(mpsc::TryRecvError::Empty) => None,
            Err(mpsc::TryRecvError::Disconnected) => break,
        };
        let mut waiting = Vec::new();
        let mut changes = Vec::new();
        let mut requests = 0;
        for request in first.into_iter().chain(queue.try_iter()) {
            requests += 1;
            match request {
                Request::Change(change, reply) => {
                    waiting.push((change.subject(), reply));
                    changes.push(change);
                }
                other => {
                    commit(&mut worker, &mut changes, &mut waiting);
                    serve(&mut worker, other);
                }
            }
        }
        commit(&mut worker, &mut changes, &mut waiting);
        more = worker.forget_clients();
        pulse.done(requests, worker.is_stale(), worker.totals());
    }
    // A daemon that ends owes what it began: the next one finds nothing to write.
    worker.finish_sweeps();
}

type Waiting = Vec<(Subject, oneshot::Sender<Result<(), CommitError>>)>;

fn commit(worker: &mut Worker, changes: &mut Vec<Change>, waiting: &mut Waiting) {
    if changes.is_empty() {
        return;
    }
    let refused = worker.commit(std::mem::take(changes));
    for (subject, reply) in waiting.drain(..) {
        let result = refused.get(&subject).map_or(Ok(()), |error| Err(error.clone()));
        // Nobody needs to wait for the answer.
        let _ = reply.send(result);
    }
}

fn serve(worker: &mut Worker, request: Request) {
    match request {
        Request::Adopt(node, plans, reply) => {
            let _ = reply.send(worker.adopt(&node, plans));
        }
        Request::RetryRefused => worker.retry_refused(),
        Request::LookAfter => worker.look_after(),
        // That is done in every turn.
        Request::ForgetClients => {}
        Request::Change(..) => unreachable!("changes are collected"),
    }
}
