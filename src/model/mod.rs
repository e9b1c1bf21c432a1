//! The proxy's own view of the cluster: plain values without any Kubernetes type.
//!
//! Objects are parsed into this model once, at the boundary ([`crate::watch::lower`]), and
//! everything behind it works on values that are known to be valid: ports are not zero, addresses
//! are addresses, a choice is an enum.

mod cidr;
mod diagnostic;
mod endpoint;
mod net;
mod node;
mod service;

pub use cidr::{CidrSet, CidrSetError};
pub use diagnostic::{Diagnostic, ObjectKind, ObjectRef, Severity};
pub use endpoint::{Backend, Endpoint, EndpointSlice, Hints, Readiness, SliceName, SlicePort};
pub use net::{Family, Protocol};
pub use node::{LocalTraffic, Node, NodeContext, NodePortAddresses, ServiceCidr};
pub use service::{
    Balancing, Seniority, Service, ServiceName, ServicePort, SourceRestriction, TrafficPolicy,
};
