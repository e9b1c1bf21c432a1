//! What the node should do for each Service: a pure function of the model.
//!
//! [`plan_service`] looks at one Service and knows no other. [`Desired`] holds the plans of all
//! Services and settles who gets an address or a port that several of them claim. Neither knows
//! nftables: how a plan becomes chains, maps and elements is [`crate::ruleset`]'s business.

mod desired;
mod service;

use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{Backend, CidrSet, Diagnostic, Family, Protocol, Seniority, ServiceName};

pub use desired::Desired;
pub use service::plan_service;

/// All that one Service asks of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The Service and its rank against others that claim the same.
    pub seniority: Seniority,
    /// The Service's ClusterIPs: ports of them that no pool serves are rejected.
    pub cluster_ips: Vec<IpAddr>,
    /// One pool for each port and family.
    pub pools: Vec<Pool>,
    /// The firewall of the Service's node ports; `None` where everyone may reach them.
    pub firewall: Option<Firewall>,
    /// What is wrong with the Service or its slices.
    pub diagnostics: Vec<Diagnostic>,
}

impl ServicePlan {
    /// The Service.
    pub fn service(&self) -> &ServiceName {
        &self.seniority.service
    }

    /// Everything that only one Service can have and this one asks for.
    pub fn claims(&self) -> impl Iterator<Item = Claim> + '_ {
        let addresses = self.cluster_ips.iter().map(|address| Claim::ClusterIp(*address));
        let ports = self.pools.iter().flat_map(|pool| {
            pool.frontends.iter().filter_map(|frontend| match frontend {
                Frontend::NodePort { port } => Some(Claim::NodePort(pool.protocol, *port)),
                Frontend::ClusterIp { .. } => None,
            })
        });
        addresses.chain(ports)
    }
}

/// The endpoints of one port of a Service in one family, and where clients reach them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The port's name; may be empty.
    pub port_name: Arc<str>,
    /// The family of every address in the pool.
    pub family: Family,
    /// The protocol.
    pub protocol: Protocol,
    /// Where clients reach the pool.
    pub frontends: Vec<Frontend>,
    /// Who serves; sorted, without duplicates. Empty means that connections are rejected.
    pub backends: Vec<Backend>,
    /// Addresses of backends on this node, sorted: a connection of theirs that is balanced back to
    /// themselves must be masqueraded, or the answer would not pass through the node.
    pub local: Vec<IpAddr>,
}

/// Where clients reach a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Frontend {
    /// At a virtual address of the Service.
    ClusterIp {
        /// The address.
        address: IpAddr,
        /// The port.
        port: u16,
    },
    /// At the node's addresses.
    NodePort {
        /// The port.
        port: u16,
    },
}

/// Who may reach a Service's node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firewall {
    /// The ports, sorted by protocol and number.
    pub node_ports: Vec<NodePort>,
    /// Who may connect.
    pub sources: Sources,
}

/// A node port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodePort {
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// The name of the Service's port; may be empty.
    pub port_name: Arc<str>,
}

/// The sources that a firewall lets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sources {
    /// These.
    Allow(CidrSet),
    /// None, because the declaration was not understood.
    Closed,
}

impl Sources {
    /// Whether `address` may connect.
    pub fn contains(&self, address: IpAddr) -> bool {
        match self {
            Sources::Allow(cidrs) => cidrs.contains(address),
            Sources::Closed => false,
        }
    }
}

/// Something that only one Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A virtual address, with all its ports.
    ClusterIp(IpAddr),
    /// A port at the node's addresses, in both families.
    NodePort(Protocol, u16),
}
