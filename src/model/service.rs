//! Services.

use std::fmt;
use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use super::{CidrSet, Diagnostic, Protocol};

/// Namespace and name of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name within the namespace.
    pub name: Arc<str>,
}

impl ServiceName {
    /// A name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> ServiceName {
        ServiceName { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Who wins when two Services claim one address or port: the older, and between Services of one
/// age the one whose name sorts first. Smaller is senior.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seniority {
    /// `metadata.creationTimestamp` in seconds since the epoch; 0 where a manifest has none.
    pub created: i64,
    /// The Service.
    pub service: ServiceName,
}

/// A Service that this proxy serves. Headless Services, `ExternalName` and Services of another
/// proxy never become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ServiceName,
    /// `metadata.creationTimestamp` in seconds since the epoch; 0 where a manifest has none.
    pub created: i64,
    /// `spec.clusterIPs`: at most one address of each family. At least one in all, unless none of
    /// the object's can be used; then there are no ports either.
    pub cluster_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`: the addresses of which traffic comes to the nodes with the
    /// address still in it (`ipMode: VIP`). Each is of a family of the cluster IPs.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.externalIPs`. Each is of a family of the cluster IPs.
    pub external_ips: Vec<IpAddr>,
    /// `spec.ports`, in their order.
    pub ports: Vec<ServicePort>,
    /// `spec.internalTrafficPolicy`: which endpoints serve connections to the cluster IPs.
    pub internal_traffic: TrafficPolicy,
    /// `spec.externalTrafficPolicy`: which endpoints serve connections to the other addresses and
    /// to node ports.
    pub external_traffic: TrafficPolicy,
    /// `spec.sessionAffinity: ClientIP`: for how many seconds without a new connection a client
    /// keeps its endpoint.
    pub session_affinity: Option<NonZeroU32>,
    /// How an endpoint is chosen.
    pub balancing: Balancing,
    /// Who may reach the node ports.
    pub node_port_sources: SourceRestriction,
    /// `spec.loadBalancerSourceRanges`: who may reach the load-balancer addresses.
    pub load_balancer_sources: SourceRestriction,
    /// `spec.healthCheckNodePort`: where load balancers ask whether this node has endpoints.
    pub health_check_port: Option<NonZeroU16>,
    /// What was wrong with the object; never empty where something of it was left out.
    pub diagnostics: Vec<Diagnostic>,
}

impl Service {
    /// A Service of this name without addresses and ports.
    pub fn new(name: ServiceName) -> Service {
        Service {
            name,
            created: 0,
            cluster_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            external_ips: Vec::new(),
            ports: Vec::new(),
            internal_traffic: TrafficPolicy::Cluster,
            external_traffic: TrafficPolicy::Cluster,
            session_affinity: None,
            balancing: Balancing::Random,
            node_port_sources: SourceRestriction::Unrestricted,
            load_balancer_sources: SourceRestriction::Unrestricted,
            health_check_port: None,
            diagnostics: Vec::new(),
        }
    }

    /// Where this Service stands when another one claims the same address or port.
    pub fn seniority(&self) -> Seniority {
        Seniority { created: self.created, service: self.name.clone() }
    }
}

/// One of `spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The port's name; empty for the only port of a Service.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The port at the Service's addresses.
    pub port: NonZeroU16,
    /// The port at the node's addresses, where the Service has one.
    pub node_port: Option<NonZeroU16>,
}

/// Which endpoints of a Service serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrafficPolicy {
    /// Those of all nodes, as far as topology hints allow.
    Cluster,
    /// Those of this node.
    Local,
}

/// How one of several endpoints is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Balancing {
    /// At random, anew for each connection.
    Random,
    /// The same, by the endpoints' weights ([`super::Endpoint::weight`]).
    Weighted,
    /// By a hash of the client's address: the same one as long as their number stays the same.
    SourceHash,
}

/// Who may reach some ports of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceRestriction {
    /// Nobody said anything: everyone may, as Kubernetes has it.
    Unrestricted,
    /// Only these sources, which may be none at all.
    Allow(CidrSet),
    /// The declaration could not be understood, so nobody may until it can be.
    Closed,
}
