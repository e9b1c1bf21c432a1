//! Services in a few words, for tests that drive the library without Kubernetes objects.

use std::net::IpAddr;
use std::num::NonZeroU16;

use anyhow::{Context, Result};
use portcullis::model::{
    CidrSet, Endpoint, EndpointSlice, Family, NodeContext, NodePortAddresses, Protocol, Service,
    ServiceName, ServicePort, SliceName, SlicePort, SourceRestriction,
};
use portcullis::plan::{ServicePlan, plan_service};

/// The node that [`Sketch::local`] endpoints are on.
pub const NODE: &str = "node";
/// The port of every endpoint.
pub const ENDPOINT_PORT: u16 = 8080;

/// The node, whose node ports are served at local addresses in `cidrs`.
pub fn node(cidrs: &[&str]) -> Result<NodeContext> {
    let cidrs = cidrs.iter().map(|cidr| cidr.parse()).collect::<Result<_, _>>();
    Ok(NodeContext {
        nodeport_addresses: NodePortAddresses::Cidrs(cidrs.context("a CIDR of the node")?),
        ..NodeContext::new(NODE.into())
    })
}

/// A Service with its endpoints.
#[derive(Clone, Debug)]
pub struct Sketch {
    service: Service,
    endpoints: Vec<Endpoint>,
}

/// A Service `NAMESPACE/NAME` without address, port or endpoint; everybody may reach its node
/// ports.
pub fn service(name: &str) -> Sketch {
    let (namespace, name) = name.split_once('/').expect("NAMESPACE/NAME");
    let service = Service::new(ServiceName::new(namespace, name));
    Sketch { service, endpoints: Vec::new() }
}

impl Sketch {
    /// The Service's name.
    pub fn name(&self) -> ServiceName {
        self.service.name.clone()
    }

    /// When it was made, which decides conflicts.
    #[must_use]
    pub fn created(mut self, created: i64) -> Self {
        self.service.created = created;
        self
    }

    /// Another ClusterIP.
    #[must_use]
    pub fn at(mut self, address: &str) -> Self {
        self.service.cluster_ips.push(parse(address));
        self
    }

    /// Another port.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: Protocol, port: u16, node_port: u16) -> Self {
        self.service.ports.push(ServicePort {
            name: name.into(),
            protocol,
            port: NonZeroU16::new(port).expect("a port"),
            node_port: NonZeroU16::new(node_port),
        });
        self
    }

    /// Other endpoints, elsewhere.
    #[must_use]
    pub fn to(self, addresses: &[&str]) -> Self {
        self.with_endpoints(addresses, None)
    }

    /// Other endpoints, on this node.
    #[must_use]
    pub fn local(self, addresses: &[&str]) -> Self {
        self.with_endpoints(addresses, Some(NODE))
    }

    /// Without endpoints again.
    #[must_use]
    pub fn nowhere(mut self) -> Self {
        self.endpoints.clear();
        self
    }

    /// Who alone may reach the node ports: a list of CIDRs, which may be empty.
    #[must_use]
    pub fn allow(mut self, cidrs: &str) -> Self {
        let cidrs = CidrSet::parse(cidrs).expect("a list of CIDRs");
        self.service.node_port_sources = SourceRestriction::Allow(cidrs);
        self
    }

    /// Everybody may reach the node ports.
    #[must_use]
    pub fn open(mut self) -> Self {
        self.service.node_port_sources = SourceRestriction::Unrestricted;
        self
    }

    /// Nobody may reach the node ports, because the list of sources was not understood.
    #[must_use]
    pub fn closed(mut self) -> Self {
        self.service.node_port_sources = SourceRestriction::Closed;
        self
    }

    /// With other fields of the Service.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Service)) -> Self {
        change(&mut self.service);
        self
    }

    /// The plan of a node called [`NODE`].
    pub fn plan(&self) -> ServicePlan {
        let node = node(&[]).expect("a node without addresses");
        plan_service(&self.service, &Family::ALL.map(|family| self.slice(family)), &node)
    }

    fn with_endpoints(mut self, addresses: &[&str], node: Option<&str>) -> Self {
        self.endpoints.extend(addresses.iter().map(|address| Endpoint {
            node: node.map(Into::into),
            ..Endpoint::new(parse(address))
        }));
        self
    }

    fn slice(&self, family: Family) -> EndpointSlice {
        let ports = self.service.ports.iter().map(|port| SlicePort {
            name: port.name.clone(),
            protocol: port.protocol,
            port: NonZeroU16::new(ENDPOINT_PORT).expect("a port"),
        });
        let of_family = |endpoint: &&Endpoint| Family::of(endpoint.address) == family;
        let name = format!("{}-{}", self.service.name.name, family.digit());
        EndpointSlice {
            name: SliceName { namespace: self.service.name.namespace.clone(), name: name.into() },
            service: self.service.name.clone(),
            family,
            ports: ports.collect(),
            endpoints: self.endpoints.iter().filter(of_family).cloned().collect(),
            diagnostics: Vec::new(),
        }
    }
}

fn parse(address: &str) -> IpAddr {
    address.parse().unwrap_or_else(|error| panic!("{address}: {error}"))
}
