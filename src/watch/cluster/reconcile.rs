//! From what the index holds to the kernel, one Service at a time.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use kube::runtime::controller::Action;

use super::known::Known;
use crate::commit::{Change, CommitError, Committer};
use crate::model::{
    EndpointSlice, Node, NodeContext, Service, ServiceCidr, ServiceName, SliceName,
};
use crate::plan::ServicePlan;
use crate::watch::{Index, Options};

/// The pause before a Service that the kernel refused is tried for the first time again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause before a Service that the kernel refused is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(5 * 60);

/// What all reconciles share.
pub(super) struct Context {
    committer: Committer,
    state: Mutex<State>,
}

struct State {
    index: Index,
    /// Services whose plan has changed and that were not handed to the committer since, or that
    /// the kernel refused.
    unsettled: HashSet<ServiceName>,
    /// The pauses to come of Services that the kernel refused.
    pauses: HashMap<ServiceName, ExponentialBackoff>,
}

impl Context {
    /// Nothing is known yet.
    pub(super) fn new(options: &Options, committer: Committer) -> Context {
        let index = Index::new(options);
        let state = State { index, unsettled: HashSet::new(), pauses: HashMap::new() };
        Context { committer, state: Mutex::new(state) }
    }

    /// Takes a Service, or that it is gone or none of this proxy's business.
    pub(super) fn set_service(&self, name: &ServiceName, service: Option<Service>) {
        let mut state = self.state();
        if state.index.set_service(name, service) {
            state.unsettled.insert(name.clone());
        }
    }

    /// Takes a slice, or that it is gone. Gives the Services that are to be reconciled.
    pub(super) fn set_slice(
        &self,
        name: &SliceName,
        slice: Option<EndpointSlice>,
    ) -> Vec<ServiceName> {
        let mut state = self.state();
        let touched = state.index.set_slice(name, slice);
        state.unsettled.extend(touched.iter().cloned());
        touched.into_iter().collect()
    }

    /// Takes the node, or that it is gone ([`Node::default`]). Gives what is known of it now, if
    /// that is something else, and the Services that are to be reconciled.
    pub(super) fn set_node(&self, node: Node) -> Option<(NodeContext, Vec<ServiceName>)> {
        let mut state = self.state();
        let touched = state.index.set_node(node)?;
        state.unsettled.extend(touched.iter().cloned());
        Some((state.index.context().clone(), touched.into_iter().collect()))
    }

    /// Takes a `ServiceCIDR`, or that it is gone. Gives what is known of the node now, if that is
    /// something else.
    pub(super) fn set_service_cidr(
        &self,
        name: &Arc<str>,
        cidr: Option<ServiceCidr>,
    ) -> Option<NodeContext> {
        let mut state = self.state();
        let changed = state.index.set_service_cidr(name, cidr);
        changed.then(|| state.index.context().clone())
    }

    /// Hands the node to the committer, which reports and tries again what the kernel refuses.
    pub(super) fn commit_node(&self, node: NodeContext) {
        drop(self.committer.commit(Change::Node(node)));
    }

    /// What is to be adopted: everything in the index.
    pub(super) fn everything(&self) -> (NodeContext, Vec<Arc<ServicePlan>>) {
        let mut state = self.state();
        state.unsettled.clear();
        (state.index.context().clone(), state.index.plans().map(Arc::new).collect())
    }

    /// Brings the kernel to what the index holds of a Service, be that nothing.
    ///
    /// Reading the index and handing over the change is one step under the lock, so whoever comes
    /// last hands over what is newest, in whatever order events are handled.
    pub(super) async fn sync(&self, service: &ServiceName) -> Result<(), CommitError> {
        let Some(committed) = self.hand_over(service) else { return Ok(()) };
        let committed = committed.await;
        let mut state = self.state();
        if committed.is_err() && state.index.contains(service) {
            state.unsettled.insert(service.clone());
        } else {
            // What nobody asks for any more, the committer tries again by itself.
            state.pauses.remove(service);
        }
        drop(state);
        committed
    }

    fn hand_over(
        &self,
        service: &ServiceName,
    ) -> Option<impl Future<Output = Result<(), CommitError>> + Send + use<>> {
        let mut state = self.state();
        if !state.unsettled.remove(service) {
            return None;
        }
        let plan = state.index.plan(service);
        Some(self.committer.commit(Change::Service(service.clone(), plan)))
    }

    fn pause(&self, service: ServiceName) -> Duration {
        let mut state = self.state();
        let pauses = state.pauses.entry(service).or_insert_with(|| {
            let pauses = ExponentialBuilder::default()
                .with_min_delay(FIRST_PAUSE)
                .with_max_delay(LONGEST_PAUSE)
                .with_jitter()
                .without_max_times();
            pauses.build()
        });
        // Jitter comes on top.
        pauses.next().unwrap_or(LONGEST_PAUSE).min(LONGEST_PAUSE)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock leaves at worst a Service unsettled that is not.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings the kernel to what is known of a Service. What the Controller hands over is not looked
/// at: the index may hold something newer.
pub(super) async fn reconcile(
    object: Arc<Known>,
    context: Arc<Context>,
) -> Result<Action, CommitError> {
    context.sync(object.name()).await?;
    Ok(Action::await_change())
}

/// When to try again what the kernel refused.
#[allow(clippy::needless_pass_by_value)] // as `Controller::run` asks for it
pub(super) fn error_policy(object: Arc<Known>, _: &CommitError, context: Arc<Context>) -> Action {
    Action::requeue(context.pause(object.name().clone()))
}
