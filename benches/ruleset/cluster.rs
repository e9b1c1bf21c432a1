//! Synthetic clusters of any size, the same every time.

use std::net::Ipv4Addr;
use std::num::{NonZeroU16, NonZeroU32};

use ipnet::{IpNet, Ipv4Net};
use portcullis::model::{
    CidrSet, Endpoint, EndpointSlice, Family, Node, NodeContext, Protocol, Service, ServiceName,
    ServicePort, SliceName, SlicePort, SourceRestriction, TrafficPolicy,
};
use portcullis::plan::{ServicePlan, plan_service};
use serde::{Deserialize, Serialize};

/// How many Services may have a node port: the default range of the API server holds 2,768.
pub const NODE_PORTS: usize = 2_000;
/// The name of the Services' port.
pub const PORT_NAME: &str = "http";
/// The Services' port.
pub const PORT: u16 = 80;
/// The endpoints' port.
pub const TARGET_PORT: u16 = 8080;
/// The address at which node ports are served.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);

/// How many networks each list of `loadBalancerSourceRanges` has.
pub const RANGES: usize = 4;

/// What the Services of a mixed cluster ask for, over and over.
const MIXED: [Kind; 10] = [
    Kind::NodePort,
    Kind::Sticky,
    Kind::NodePort,
    Kind::LoadBalancerHere,
    Kind::NodePort,
    Kind::ExternalIp,
    Kind::NodePort,
    Kind::LoadBalancerElsewhere,
    Kind::NodePort,
    Kind::ClusterIp,
];

const NODE_NAME: &str = "node-1";
const OTHER_NODE_NAME: &str = "node-2";
/// How many endpoints run on this node: the kubelet's default limit of pods.
const LOCAL_ENDPOINTS: usize = 110;
/// The default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_SECONDS: NonZeroU32 = NonZeroU32::new(10_800).expect("it is not zero");
const FIRST_NODE_PORT: usize = 30_000;
const CLUSTER_IPS: u32 = Ipv4Addr::new(10, 96, 0, 0).to_bits();
const PODS: u32 = Ipv4Addr::new(10, 128, 0, 0).to_bits();
const OTHER_PODS: u32 = Ipv4Addr::new(10, 192, 0, 0).to_bits();
const CLIENTS: u32 = Ipv4Addr::new(11, 0, 0, 0).to_bits();
const EXTERNAL_IPS: u32 = Ipv4Addr::new(172, 16, 0, 0).to_bits();
const LOAD_BALANCER_IPS: u32 = Ipv4Addr::new(198, 18, 0, 0).to_bits();

/// How large a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Size {
    /// Services, of one port each.
    pub services: usize,
    /// Ready endpoints of each Service.
    pub endpoints: usize,
    /// Source CIDRs of each Service with a node port; 0 for no firewall.
    pub cidrs: usize,
    /// Whether a part of the Services has session affinity, load-balancer addresses with the policy
    /// `Local`, or external IPs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mixed: bool,
}

impl Size {
    /// How many Services there are before all that there is has been seen once. These are never
    /// changed.
    pub fn unchanged(self) -> usize {
        if self.mixed { MIXED.len() } else { 1 }
    }

    fn kind(self, index: usize) -> Kind {
        if self.mixed { MIXED[index % MIXED.len()] } else { Kind::NodePort }
    }
}

/// What a Service has besides its ClusterIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nothing.
    ClusterIp,
    /// A node port, as long as there are any.
    NodePort,
    /// The same, and session affinity.
    Sticky,
    /// A load-balancer address that everyone may reach, and a node port as long as there are any.
    /// Both with the policy `Local`, and one of the endpoints runs on this node.
    LoadBalancerHere,
    /// The same, but none of the endpoints runs on this node, and only some networks may reach the
    /// load-balancer address.
    LoadBalancerElsewhere,
    /// An external IP.
    ExternalIp,
}

impl Kind {
    fn has_node_port(self) -> bool {
        !matches!(self, Kind::ClusterIp | Kind::ExternalIp)
    }

    fn has_load_balancer(self) -> bool {
        matches!(self, Kind::LoadBalancerHere | Kind::LoadBalancerElsewhere)
    }

    fn is_restricted(self) -> bool {
        self == Kind::LoadBalancerElsewhere
    }
}

/// Services and their slices, index by index.
pub struct Cluster {
    /// The Services; none behind the first [`NODE_PORTS`] has a node port.
    pub services: Vec<Service>,
    /// One slice for each Service.
    pub slices: Vec<EndpointSlice>,
    /// The node.
    pub node: NodeContext,
    size: Size,
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
            size,
            replaced: 0,
        };
        for index in 0..size.services {
            cluster.push(index);
            if size.cidrs > 0 && index < NODE_PORTS {
                let cidrs = (0..size.cidrs).map(|nth| client(index, nth));
                cluster.services[index].node_port_sources =
                    SourceRestriction::Allow(CidrSet::new(cidrs));
            }
        }
        cluster
    }

    /// Adds one more Service, of the kind that the Service `like` is of; returns its index.
    pub fn push(&mut self, like: usize) -> usize {
        let index = self.services.len();
        let kind = self.size.kind(like);
        let service = service(index, kind);
        let slice = self.slice(index, kind, service.name.clone());
        self.services.push(service);
        self.slices.push(slice);
        index
    }

    fn slice(&self, index: usize, kind: Kind, service: ServiceName) -> EndpointSlice {
        let Size { endpoints, mixed, .. } = self.size;
        let has_one_here =
            if mixed { kind == Kind::LoadBalancerHere } else { index < LOCAL_ENDPOINTS };
        let endpoints = (0..endpoints).map(|nth| Endpoint {
            node: Some(if nth == 0 && has_one_here { NODE_NAME } else { OTHER_NODE_NAME }.into()),
            ..Endpoint::new(address(PODS, index * endpoints + nth).into())
        });
        EndpointSlice {
            name: SliceName {
                namespace: service.namespace.clone(),
                name: format!("{}-x7k2p", service.name).into(),
            },
            service,
            family: Family::V4,
            ports: vec![SlicePort {
                name: PORT_NAME.into(),
                protocol: Protocol::Tcp,
                port: port(usize::from(TARGET_PORT)),
            }],
            endpoints: endpoints.collect(),
            diagnostics: Vec::new(),
        }
    }

    /// Takes away the Service that was added last.
    pub fn pop(&mut self) -> ServiceName {
        self.slices.pop();
        self.services.pop().expect("a Service was added").name
    }

    /// Which Service the change of this number is about: they are all over the cluster, each has its
    /// turn, and in a mixed cluster each kind.
    pub fn chosen(&self, turn: usize, among: usize) -> usize {
        let first = self.size.unchanged();
        // A prime that divides no number of choices.
        first + turn * 7_919 % (self.size.services.min(among) - first)
    }

    /// Replaces the first endpoint of a Service by one that was never there. In a mixed cluster it
    /// is on the same node, otherwise on another.
    pub fn replace_endpoint(&mut self, index: usize) {
        self.replaced += 1;
        let endpoint = &mut self.slices[index].endpoints[0];
        endpoint.address = Ipv4Addr::from(OTHER_PODS + self.replaced).into();
        if !self.size.mixed {
            endpoint.node = Some(OTHER_NODE_NAME.into());
        }
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

    /// Whether the first endpoint of a Service runs on this node; no other does at first.
    pub fn is_local(&self, index: usize) -> bool {
        self.slices[index].endpoints[0].node.as_ref() == Some(&self.node.name)
    }

    /// At how many addresses and ports clients reach a Service.
    pub fn frontends(&self, index: usize) -> usize {
        self.services[index].cluster_ips.len() + self.external_frontends(index)
    }

    /// At how many of them only endpoints of this node serve clients from elsewhere.
    pub fn local_frontends(&self, index: usize) -> usize {
        match self.services[index].external_traffic {
            TrafficPolicy::Cluster => 0,
            TrafficPolicy::Local => self.external_frontends(index),
        }
    }

    fn external_frontends(&self, index: usize) -> usize {
        let service = &self.services[index];
        let node_ports = service.ports.iter().filter(|port| port.node_port.is_some()).count();
        service.load_balancer_ips.len() + service.external_ips.len() + node_ports
    }
}

fn service(index: usize, kind: Kind) -> Service {
    let name = ServiceName::new(format!("team-{:02}", index % 100), format!("service-{index:06}"));
    let has_node_port = kind.has_node_port() && index < NODE_PORTS;
    let mut service = Service {
        created: 1_700_000_000,
        cluster_ips: vec![address(CLUSTER_IPS, index + 10).into()],
        ports: vec![ServicePort {
            name: PORT_NAME.into(),
            protocol: Protocol::Tcp,
            port: port(usize::from(PORT)),
            node_port: has_node_port.then(|| port(FIRST_NODE_PORT + index)),
        }],
        ..Service::new(name)
    };
    if kind == Kind::Sticky {
        service.session_affinity = Some(AFFINITY_SECONDS);
    }
    if kind == Kind::ExternalIp {
        service.external_ips = vec![address(EXTERNAL_IPS, index).into()];
    }
    if kind.has_load_balancer() {
        service.load_balancer_ips = vec![address(LOAD_BALANCER_IPS, index).into()];
        service.external_traffic = TrafficPolicy::Local;
    }
    if kind.is_restricted() {
        let ranges = (0..RANGES).map(|nth| client(index, nth));
        service.load_balancer_sources = SourceRestriction::Allow(CidrSet::new(ranges));
    }
    service
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
