//! Services.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;
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
///
/// What is not here yet, and will be: load-balancer and external addresses, traffic policies,
/// session affinity, health-check ports. [`crate::watch::lower`] reports each of them as not
/// supported when an object asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ServiceName,
    /// `metadata.creationTimestamp` in seconds since the epoch; 0 where a manifest has none.
    pub created: i64,
    /// `spec.clusterIPs`: at most one address of each family. At least one in all, unless none of
    /// the object's can be used; then there are no ports either.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.ports`, in their order.
    pub ports: Vec<ServicePort>,
    /// Who may reach the node ports.
    pub node_port_sources: SourceRestriction,
    /// What was wrong with the object; never empty where something of it was left out.
    pub diagnostics: Vec<Diagnostic>,
}

impl Service {
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

/// Who may reach a Service's node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceRestriction {
    /// Nobody said anything: everyone may, as Kubernetes has it.
    Unrestricted,
    /// Only these sources, which may be none at all.
    Allow(CidrSet),
    /// The declaration could not be understood, so nobody may until it can be.
    Closed,
}
