//! The cluster: Services, `EndpointSlice`s, the own Node and `ServiceCIDR`s from the API server.
//!
//! [`run`] watches them all. Nothing is committed before each first list is complete; then one
//! adoption brings the kernel to what they say, and from there on a `kube_runtime` [`Controller`]
//! reconciles the Services that events touch. No finalizer is set and nothing is written: every
//! node has such a watcher.
//!
//! What `kube_runtime` 5.0 does, and what is made of it:
//! - An object that is gone reaches the Controller's results as `ObjectNotFound`, never the
//!   reconciler. Both do the same here: they bring the kernel to what the index holds *now*, so
//!   it does not matter in which order a deletion and a new object of that name are seen.
//! - An object that vanishes while its watch is disconnected is missing in the next list, without
//!   a word. `Relist` finds it, from the watchers' raw events.
//! - An object that gets a label which a selector excludes appears as deleted, as it should.
//! - An object that cannot be read ends its list, and its events in a watch are lost. So reading a
//!   `Wire` never fails.
//! - The Controller reconciles what a store holds. This one holds names; all else is lowered as it
//!   is read.
//! - A watcher does nothing unless it is polled: it asks for the next page of a list when somebody
//!   waits for it, and not while others are read. Here each has a task of its own.
//! - It asks for streamed lists (`sendInitialEvents`) with `resourceVersion=0`, which lets the API
//!   server answer with what was true some time ago. Paged lists ask for what is true now.

mod events;
mod feed;
mod form;
mod known;
mod list;
mod outage;
mod reconcile;
mod relist;
mod wire;

use std::sync::Arc;

use futures::stream::{self, BoxStream, Stream, StreamExt};
use k8s_openapi::api::core::v1 as core;
use kube::api::ListParams;
use kube::runtime::controller::{Controller, Error as ControllerError};
use kube::runtime::{reflector, watcher};
use kube::{Api, Client};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinError;
use tokio_util::sync::CancellationToken;

use super::{Options, lower};
use crate::commit::{CommitError, Committer};
use crate::report::Reporter;
use feed::{Event, Feed, Told};
use known::{named, reference};
use outage::Outages;
use reconcile::{Context, error_policy, reconcile};
use wire::{Kind, Wire};

pub use events::publish;
pub use list::load;

/// Why the cluster is not served.
#[derive(Debug, Error)]
pub enum Error {
    /// A list was refused, or the API server does not answer.
    #[error("cannot list {what}")]
    List {
        /// What was listed.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
    /// The kernel cannot be brought to hold anything at all.
    #[error("what the cluster asks for cannot be brought into the kernel")]
    Commit(#[source] CommitError),
}

/// Serves the cluster until `shutdown`.
///
/// While the API server does not answer, what is known stays in force; the log says once that it
/// does not, and once that it does again. What the kernel refuses is tried again with growing
/// pauses from 1 second to 5 minutes for its own sake, and every 30 seconds for all.
///
/// # Errors
/// When nothing at all can be committed. An API server that does not answer, or that refuses a
/// list, is waited for.
pub async fn run(
    client: Client,
    options: &Options,
    committer: Committer,
    reporter: Reporter,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let outages = Arc::new(Outages::default());
    let probe = {
        let services: Api<Wire<core::Service>> = Api::all(client.clone());
        let (outages, one) = (Arc::clone(&outages), ListParams::default().limit(1));
        async move { outages.probe(async || services.list(&one).await.is_ok()).await }
    };
    let events = watch(&client, options, &outages);
    let served = serve(events, options, committer, reporter, shutdown);
    tokio::select! {
        served = served => served,
        never = probe => match never {},
    }
}

/// Everything that the API server tells.
fn watch(client: &Client, options: &Options, outages: &Arc<Outages>) -> BoxStream<'static, Event> {
    let selected = watcher::Config::default;
    let own = format!("metadata.name={}", options.node_name);
    let events = [
        told(client, "Services", selected().labels(&services()), outages, Event::Service),
        told(client, "EndpointSlices", selected().labels(&slices()), outages, Event::Slice),
        told(client, "the Node", selected().fields(&own), outages, Event::Node),
        told(client, "ServiceCIDRs", selected(), outages, Event::ServiceCidr),
    ];
    stream::select_all(events).boxed()
}

/// What the API server tells of the objects of a kind.
fn told<K>(
    client: &Client,
    resource: outage::Resource,
    selected: watcher::Config,
    outages: &Arc<Outages>,
    event: fn(Told<K>) -> Event,
) -> BoxStream<'static, Event>
where
    K: Kind + Clone + std::fmt::Debug + Send + Sync + 'static,
{
    let objects: Api<Wire<K>> = Api::all(client.clone());
    let told = outages.pausing(watcher(objects, selected));
    // Before events wait: what one says of the API server is true now.
    let outages = Arc::clone(outages);
    let told = told.inspect(move |told| outages.take(resource, told));
    ahead(told.map(event)).boxed()
}

/// How many events of a watcher may wait to be taken: a page of its list.
const AHEAD: usize = 500;

/// The same, polled by a task of its own until nobody listens any more.
fn ahead<T: Send + 'static>(
    mut events: impl Stream<Item = T> + Send + Unpin + 'static,
) -> impl Stream<Item = T> + Send {
    let (sender, receiver) = mpsc::channel(AHEAD);
    let task = tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = sender.closed() => return,
                event = events.next() => event,
            };
            let Some(event) = event else { return };
            if sender.send(event).await.is_err() {
                return;
            }
        }
    });
    stream::unfold((receiver, task), async |(mut receiver, task)| {
        let Some(event) = receiver.recv().await else {
            // A watcher that panicked must not look like one that has nothing to tell.
            let panic = task.await.err().filter(JoinError::is_panic);
            return panic.map(|panic| std::panic::resume_unwind(panic.into_panic()));
        };
        Some((event, (receiver, task)))
    })
}

/// The label selector of Services: those of another proxy are not ours.
fn services() -> String {
    format!("!{}", lower::OTHER_PROXY_LABEL)
}

/// The label selector of slices: those of headless Services are nobody's.
fn slices() -> String {
    format!("!{}", lower::HEADLESS_LABEL)
}

/// Serves what `events` tell.
async fn serve(
    mut events: BoxStream<'static, Event>,
    options: &Options,
    committer: Committer,
    reporter: Reporter,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let context = Arc::new(Context::new(options, committer.clone()));
    let (store, writer) = reflector::store();
    let mut feed = Feed::new(writer, Arc::clone(&context), reporter.clone());
    while !feed.is_complete() {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            event = events.next() => match event {
                Some(event) => drop(feed.take(event)),
                None => return Ok(()),
            }
        }
    }
    let (node, plans) = context.everything();
    super::adopt(node, plans, &committer, &reporter).await.map_err(Error::Commit)?;
    feed.serve_node();

    let touched = events.flat_map(move |event| stream::iter(feed.take(event)));
    let ended = shutdown.child_token();
    // The watcher of Services is in `events`: what it tells comes with the other triggers.
    let controller = Controller::for_stream(stream::pending(), store)
        .reconcile_on(touched.map(|service| reference(&service)))
        .graceful_shutdown_on(ended.clone().cancelled_owned())
        .run(reconcile, error_policy, Arc::clone(&context))
        .for_each_concurrent(None, |result| settle(result, &context, &ended));
    tokio::select! {
        () = controller => {}
        never = super::tend(&committer) => match never {},
    }
    // It ends for one of two reasons.
    if shutdown.is_cancelled() { Ok(()) } else { Err(Error::Commit(CommitError::Ended)) }
}

/// Takes the result of one reconcile: a Service that is gone, or a failure.
async fn settle<T>(
    result: Result<T, ControllerError<CommitError, watcher::Error>>,
    context: &Context,
    ended: &CancellationToken,
) {
    let settled = match result {
        Ok(_) => Ok(()),
        Err(ControllerError::ObjectNotFound(gone)) => context.sync(&named(&gone)).await,
        Err(ControllerError::ReconcilerFailed(error, _)) => Err(error),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            return tracing::error!(error, "a Service could not be reconciled");
        }
    };
    // What the kernel refuses has been reported, and is tried again.
    if let Err(CommitError::Ended) = settled {
        ended.cancel();
    }
}

#[cfg(test)]
mod tests;
