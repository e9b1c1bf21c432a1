//! Where the objects come from: Services, `EndpointSlice`s and the node, watched and turned into
//! the model.
//!
//! Two sources fill the same [`Index`]: the API server ([`cluster`]) and a directory of manifests
//! ([`manifests`]). Kubernetes types stop at [`lower`].

pub mod cluster;
mod index;
pub mod lower;
pub mod manifests;
#[cfg(test)]
mod testing;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::commit::{CommitError, Committer};
use crate::model::{LocalTraffic, NodeContext, NodePortAddresses};
use crate::plan::ServicePlan;
use crate::report::Reporter;

pub use index::Index;

/// What a source needs to know besides the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The name of this node: which Node is ours and which endpoints are local.
    pub node_name: Arc<str>,
    /// At which of the node's addresses node ports are served.
    pub nodeport_addresses: NodePortAddresses,
    /// How connections of pods on this node are known.
    pub local_traffic: LocalTraffic,
    /// Whether every connection to a cluster IP is masqueraded.
    pub masquerade_all: bool,
    /// Whether node ports are served to the node itself at its IPv4 loopback addresses.
    pub localhost_nodeports: bool,
    /// Whether Services are served at their `externalIPs`. Who may write a Service may claim any
    /// address there (CVE-2020-8554).
    pub external_ips: bool,
}

impl Options {
    /// The defaults for a node of this name.
    pub fn new(node_name: Arc<str>) -> Options {
        Options {
            node_name,
            nodeport_addresses: NodePortAddresses::Primary,
            local_traffic: LocalTraffic::default(),
            masquerade_all: false,
            localhost_nodeports: false,
            external_ips: true,
        }
    }
}

/// How often a source asks for what the kernel has refused to be tried again.
const RETRY: Duration = Duration::from_secs(30);
/// How often a source asks whether the table is still as it was left. It costs one question to the
/// kernel, and a listing only after somebody else has changed the ruleset.
const LOOK_AFTER: Duration = Duration::from_secs(5);

/// Has the committer do, from time to time, what no object asks for.
async fn tend(committer: &Committer) -> Infallible {
    let [mut retry, mut look] = [RETRY, LOOK_AFTER].map(|period| {
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        interval
    });
    loop {
        tokio::select! {
            _ = retry.tick() => committer.retry_refused(),
            _ = look.tick() => committer.look_after(),
        }
    }
}

/// The first commit, of everything that a source has found.
async fn adopt(
    node: NodeContext,
    plans: Vec<ServicePlan>,
    committer: &Committer,
    reporter: &Reporter,
) -> Result<(), CommitError> {
    let services = plans.len();
    reporter.node(&node);
    let adoption = committer.adopt(node, plans).await?;
    reporter.adopted(adoption, services);
    Ok(())
}
