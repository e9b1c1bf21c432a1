//! The node that this proxy runs on.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Diagnostic, Family};

/// What the proxy knows of its node from the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The first address of each family by which the node is known: `InternalIP` before
    /// `ExternalIP`, in the object's order.
    pub primary_addresses: Vec<IpAddr>,
    /// What was wrong with the object.
    pub diagnostics: Vec<Diagnostic>,
}

/// `--nodeport-addresses`: at which of the node's addresses node ports are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// At the node's first address of each family.
    Primary,
    /// At every address of the node in one of these CIDRs, whenever it comes or goes. A family of
    /// which no CIDR is listed is not served.
    Cidrs(Vec<IpNet>),
}

/// All that planning needs to know of the node and the proxy's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeContext {
    /// The node's name, to tell local endpoints from others.
    pub name: Arc<str>,
    /// The node as the cluster knows it; [`Node::default`] while there is none.
    pub node: Node,
    /// At which addresses node ports are served.
    pub nodeport_addresses: NodePortAddresses,
}

impl NodeContext {
    /// The CIDRs of `family` at whose local addresses node ports are served; disjoint, sorted.
    pub fn nodeport_cidrs(&self, family: Family) -> Vec<IpNet> {
        let cidrs = match &self.nodeport_addresses {
            NodePortAddresses::Primary => {
                self.node.primary_addresses.iter().copied().map(IpNet::from).collect()
            }
            NodePortAddresses::Cidrs(cidrs) => cidrs.clone(),
        };
        super::CidrSet::new(cidrs).of_family(family)
    }
}
