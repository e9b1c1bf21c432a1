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

use std::sync::Arc;
use std::time::Duration;

use crate::commit::{CommitError, Committer};
use crate::model::{NodeContext, NodePortAddresses};
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
}

/// How often a source asks for what the kernel has refused to be tried again.
const RETRY: Duration = Duration::from_secs(30);

/// The first commit, of everything that a source has found.
async fn adopt(
    node: NodeContext,
    plans: Vec<ServicePlan>,
    committer: &Committer,
    reporter: &Reporter,
) -> Result<(), CommitError> {
    let services = plans.len();
    reporter.node(&node.node);
    let adoption = committer.adopt(node, plans).await?;
    reporter.adopted(adoption, services);
    Ok(())
}
