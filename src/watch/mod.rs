//! Where the objects come from: Services, `EndpointSlice`s and the node, watched and turned into
//! the model.
//!
//! Two sources fill the same [`Index`]: the API server (`cluster`) and a directory of manifests
//! (`manifests`). Kubernetes types stop at [`lower`].

mod index;
pub mod lower;
pub mod manifests;

use std::sync::Arc;

use crate::model::NodePortAddresses;

pub use index::Index;

/// What a source needs to know besides the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The name of this node: which Node is ours and which endpoints are local.
    pub node_name: Arc<str>,
    /// At which of the node's addresses node ports are served.
    pub nodeport_addresses: NodePortAddresses,
}
