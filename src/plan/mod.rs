//! What the node should do for each Service: a pure function of the model.
//!
//! [`plan_service`] looks at one Service and knows no other. [`Desired`] holds the plans of all
//! Services and settles who gets an address or a port that several of them claim. Neither knows
//! nftables: how a plan becomes chains, maps and elements is [`crate::ruleset`]'s business.

mod desired;
mod endpoints;
mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::model::{
    Backend, CidrSet, Diagnostic, Family, Protocol, Seniority, ServiceName, TrafficPolicy,
};

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
    /// The firewall of the Service's load-balancer addresses; `None` where everyone may reach them.
    pub load_balancer_firewall: Option<LoadBalancerFirewall>,
    /// What load balancers are told of the Service's endpoints here; `None` where they do not ask.
    pub health_check: Option<HealthCheck>,
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
        let frontends = self.pools.iter().flat_map(|pool| {
            pool.frontends.iter().map(|frontend| Claim::of(frontend, pool.protocol))
        });
        // A port of the node as any other.
        let health_check =
            self.health_check.iter().map(|check| Claim::NodePort(Protocol::Tcp, check.port));
        addresses.chain(frontends).chain(health_check)
    }
}

/// What load balancers are told when they ask whether a node has endpoints of a Service
/// (`healthCheckNodePort`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The port at the node's addresses.
    pub port: u16,
    /// How many endpoints on this node are ready, in each family of the Service.
    pub local_endpoints: BTreeMap<Family, usize>,
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
    /// Who serves where the policy is `Cluster`; sorted. Nobody is listed twice, but where weights
    /// say so.
    pub backends: Vec<Backend>,
    /// Who serves where the policy is `Local`; likewise. Empty if no frontend has
    /// that policy.
    pub local_backends: Vec<Backend>,
    /// Who may keep the flows that it has, though new ones may go to others: everyone who is ready,
    /// or terminates and still serves. Sorted; empty for TCP, where nobody asks.
    pub lasting: Vec<Backend>,
    /// Whether any endpoint, here or elsewhere, could serve; then connections that find none are
    /// dropped rather than rejected, because they may find one on another node.
    pub any: bool,
    /// Which of the two lists serves connections to the cluster IP.
    pub internal_traffic: TrafficPolicy,
    /// Which of the two lists serves connections to other frontends. If it is the local one,
    /// connections of pods here and of the node itself are served by the other nevertheless: they
    /// did not come through a load balancer that could know better.
    pub external_traffic: TrafficPolicy,
    /// For how many seconds a client keeps its backend.
    pub affinity: Option<NonZeroU32>,
    /// How a backend is chosen.
    pub choice: Choice,
    /// Addresses of backends on this node, sorted: a connection of theirs that is balanced back to
    /// themselves must be masqueraded, or the answer would not pass through the node.
    pub hairpins: Vec<IpAddr>,
}

impl Pool {
    /// Whose endpoints serve this frontend.
    pub fn policy(&self, frontend: &Frontend) -> TrafficPolicy {
        match frontend {
            Frontend::ClusterIp { .. } => self.internal_traffic,
            Frontend::External { .. } | Frontend::NodePort { .. } => self.external_traffic,
        }
    }

    /// The backends that serve this frontend.
    pub fn serving(&self, frontend: &Frontend) -> &[Backend] {
        match self.policy(frontend) {
            TrafficPolicy::Cluster => &self.backends,
            TrafficPolicy::Local => &self.local_backends,
        }
    }
}

/// How a backend is chosen from a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Choice {
    /// At random, each with the same chance.
    Random,
    /// By a hash of the client's address.
    SourceHash,
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
    /// At an address that clients outside the cluster use: a load balancer's, or an external one.
    External {
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

/// Who may reach a Service's load-balancer addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancerFirewall {
    /// The addresses, sorted.
    pub addresses: Vec<LoadBalancerAddress>,
    /// Who may connect.
    pub sources: Sources,
}

/// A load-balancer address of one port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoadBalancerAddress {
    /// The protocol.
    pub protocol: Protocol,
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The name of the Service's port; may be empty.
    pub port_name: Arc<str>,
}

/// Something that only one Service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A cluster IP, with all its ports.
    ClusterIp(IpAddr),
    /// A port of an address.
    Address(IpAddr, Protocol, u16),
    /// A port at the node's addresses, in both families.
    NodePort(Protocol, u16),
}

impl Claim {
    /// What a frontend claims.
    fn of(frontend: &Frontend, protocol: Protocol) -> Claim {
        match *frontend {
            Frontend::ClusterIp { address, port } | Frontend::External { address, port } => {
                Claim::Address(address, protocol, port)
            }
            Frontend::NodePort { port } => Claim::NodePort(protocol, port),
        }
    }
}
