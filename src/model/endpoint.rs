//! EndpointSlices and the endpoints in them.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Diagnostic, Family, Protocol, ServiceName};

/// Namespace and name of an `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SliceName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name within the namespace.
    pub name: Arc<str>,
}

/// A part of a Service's endpoints. A Service may have many slices; together they are its
/// endpoints, and one endpoint may stand in more than one of them while a controller moves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: SliceName,
    /// The Service that the label `kubernetes.io/service-name` names.
    pub service: ServiceName,
    /// `addressType`.
    pub family: Family,
    /// The ports that every endpoint of this slice has.
    pub ports: Vec<SlicePort>,
    /// The endpoints, in the object's order.
    pub endpoints: Vec<Endpoint>,
    /// What was wrong with the object.
    pub diagnostics: Vec<Diagnostic>,
}

/// A port of a slice, found by name: it is the pods' side of the Service port of the same name,
/// whose target port may be a name that differs from pod to pod and so from slice to slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service port; empty for the only port of a Service.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The port at the endpoints' addresses.
    pub port: std::num::NonZeroU16,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The first of `addresses`; the API server defines the others as unused.
    pub address: IpAddr,
    /// Whether it takes new connections.
    pub readiness: Readiness,
    /// `nodeName`: where it runs, if that is known.
    pub node: Option<Arc<str>>,
    /// How many connections it gets in proportion to others, where the Service asks for that.
    pub weight: u8,
    /// `hints`: where clients are that should use it; `None` for none, or empty ones.
    pub hints: Option<Arc<Hints>>,
}

impl Endpoint {
    /// A ready endpoint of which nothing else is known.
    pub fn new(address: IpAddr) -> Endpoint {
        Endpoint { address, readiness: Readiness::Ready, node: None, weight: 1, hints: None }
    }
}

/// Where clients are that should use an endpoint (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hints {
    /// `forZones`: in these zones.
    pub zones: Vec<Arc<str>>,
    /// `forNodes`: on these nodes.
    pub nodes: Vec<Arc<str>>,
}

/// `conditions` of an endpoint, as the API server defines their defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Takes new connections.
    Ready,
    /// On its way out, but still able to serve when no ready endpoint is left.
    ServingTerminating,
    /// Neither.
    NotReady,
}

/// Where a connection ends up: address and port of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// The endpoint's address.
    pub address: IpAddr,
    /// The endpoint's port.
    pub port: u16,
}
