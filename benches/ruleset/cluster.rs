//! Synthetic clusters of any size, the same every time.

use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use portcullis::model::{
    CidrSet, Endpoint, EndpointSlice, Family, Node, NodeContext, Protocol, Service, ServiceName,
    ServicePort, SliceName, SlicePort, SourceRestriction,
};
use portcullis::plan::{ServicePlan, plan_service};
use serde::{Deserialize, Serialize};

/// How many Services have a node port: the default range of the API server holds 2,768.
pub const NODE_PORTS: usize = 2_000;
/// The name of the Services' port.
pub const PORT_NAME: &str = "http";
/// The Services' port.
pub const PORT: u16 = 80;
/// The endpoints' port.
pub const TARGET_PORT: u16 = 8080;
/// The address at which node ports are served.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

const NODE_NAME: &str = "node-1";
/// How many endpoints run on this node: the kubelet's default limit of pods.
const LOCAL_ENDPOINTS: usize = 110;
const FIRST_NODE_PORT: usize = 30_000;
const CLUSTER_IPS: u32 = Ipv4Addr::new(10, 96, 0, 0).to_bits();
const PODS: u32 = Ipv4Addr::new(10, 128, 0, 0).to_bits();
const OTHER_PODS: u32 = Ipv4Addr::new(10, 192, 0, 0).to_bits();
const CLIENTS: u32 = Ipv4Addr::new(11, 0, 0, 0).to_bits();

/// How large a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Size {
    /// Services, of one port each.
    pub services: usize,
    /// Ready endpoints of each Service.
    pub endpoints: usize,
    /// Source CIDRs of each Service with a node port; 0 for no firewall.
    pub cidrs: usize,
}

/// Services and their slices, index by index.
pub struct Cluster {
    /// The Services; the first [`NODE_PORTS`] of them have a node port.
    pub services: Vec<Service>,
    /// One slice for each Service.
    pub slices: Vec<EndpointSlice>,
    /// The node.
    pub node: NodeContext,
    endpoints: usize,
    replaced: u32,
}

impl Cluster {
    /// A cluster of this size.
    pub fn new(size: Size) -> Cluster {
        let node = NodeContext {
            node: Node { primary_addresses: vec![NODE_ADDRESS.into()], ..Node::default() },
            ..NodeContext::new(NODE_NAME.into())
        };
        let mut cluster = Cluster {
            services: Vec::with_capacity(size.services),
            slices: Vec::with_capacity(size.services),
            node,
            endpoints: size.endpoints,
            replaced: 0,
        };
        for index in 0..size.services {
            cluster.push();
            if size.cidrs > 0 && index < NODE_PORTS {
                let cidrs = (0..size.cidrs).map(|nth| client(index, nth));
                cluster.services[index].node_port_sources =
                    SourceRestriction::Allow(CidrSet::new(cidrs));
            }
        }
        cluster
    }

    /// Adds one more Service; returns its index.
    pub fn push(&mut self) -> usize {
        let index = self.services.len();
        let name =
            ServiceName::new(format!("team-{:02}", index % 100), format!("service-{index:06}"));
        let node_port = (index < NODE_PORTS).then(|| port(FIRST_NODE_PORT + index));
        self.services.push(Service {
            created: 1_700_000_000,
            cluster_ips: vec![address(CLUSTER_IPS, index + 10).into()],
            ports: vec![ServicePort {
                name: PORT_NAME.into(),
                protocol: Protocol::Tcp,
                port: port(usize::from(PORT)),
                node_port,
            }],
            ..Service::new(name.clone())
        });
        let endpoints = (0..self.endpoints).map(|nth| Endpoint {
            node: Some(node_of(index, nth)),
            ..Endpoint::new(address(PODS, index * self.endpoints + nth).into())
        });
        self.slices.push(EndpointSlice {
            name: SliceName {
                namespace: name.namespace.clone(),
                name: format!("{}-x7k2p", name.name).into(),
            },
            service: name,
            family: Family::V4,
            ports: vec![SlicePort {
                name: PORT_NAME.into(),
                protocol: Protocol::Tcp,
                port: port(usize::from(TARGET_PORT)),
            }],
            endpoints: endpoints.collect(),
            diagnostics: Vec::new(),
        });
        index
    }

    /// Takes away the Service that was added last.
    pub fn pop(&mut self) -> ServiceName {
        self.slices.pop();
        self.services.pop().expect("a Service was added").name
    }

    /// Replaces the first endpoint of a Service by one that was never there.
    pub fn replace_endpoint(&mut self, index: usize) {
        self.replaced += 1;
        let endpoint = &mut self.slices[index].endpoints[0];
        endpoint.address = Ipv4Addr::from(OTHER_PODS + self.replaced).into();
        endpoint.node = Some("node-2".into());
    }

    /// Lets one more client network through the firewall of a Service.
    pub fn add_cidr(&mut self, index: usize) {
        let SourceRestriction::Allow(cidrs) = &self.services[index].node_port_sources else {
            panic!("the Service has a firewall")
        };
        let more = client(index, cidrs.v4().len());
        let cidrs = cidrs.of_family(Family::V4).into_iter().chain([more]);
        self.services[index].node_port_sources = SourceRestriction::Allow(CidrSet::new(cidrs));
    }

    /// The plan of one Service.
    pub fn plan(&self, index: usize) -> ServicePlan {
        plan_service(&self.services[index], [&self.slices[index]], &self.node)
    }

    /// The plans of all Services.
    pub fn plans(&self) -> Vec<ServicePlan> {
        (0..self.services.len()).map(|index| self.plan(index)).collect()
    }

    /// Whether the first endpoint of a Service runs on this node.
    pub fn is_local(&self, index: usize) -> bool {
        self.slices[index].endpoints[0].node.as_ref() == Some(&self.node.name)
    }

    /// At how many addresses and ports clients reach a Service.
    pub fn frontends(&self, index: usize) -> usize {
        let node_ports = self.services[index].ports.iter().filter(|p| p.node_port.is_some());
        self.services[index].cluster_ips.len() + node_ports.count()
    }
}

fn node_of(index: usize, nth: usize) -> Arc<str> {
    if nth == 0 && index < LOCAL_ENDPOINTS { NODE_NAME } else { "node-2" }.into()
}

/// Networks of clients: every other /24, so that none can be merged with its neighbour.
fn client(index: usize, nth: usize) -> IpNet {
    Ipv4Net::new(address(CLIENTS, (index * 64 + nth) * 512), 24).expect("24 bits").into()
}

fn address(base: u32, offset: usize) -> Ipv4Addr {
    Ipv4Addr::from(base + u32::try_from(offset).expect("fewer than 2^32 addresses"))
}

fn port(number: usize) -> NonZeroU16 {
    u16::try_from(number).ok().and_then(NonZeroU16::new).expect("a port")
}
