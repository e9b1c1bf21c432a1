//! The node that this proxy runs on.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use super::{Diagnostic, Family};

/// `127.0.0.0/8`
const LOOPBACK4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);

/// What the proxy knows of its node from the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// The first address of each family by which the node is known: `InternalIP` before
    /// `ExternalIP`, in the object's order.
    pub primary_addresses: Vec<IpAddr>,
    /// The label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// Whether it is going: it is being deleted, or the cluster autoscaler is about to remove it.
    /// Load balancers should send nothing new here.
    pub leaving: bool,
    /// `spec.podCIDRs`: the addresses of the pods here.
    pub pod_cidrs: Vec<IpNet>,
    /// What was wrong with the object.
    pub diagnostics: Vec<Diagnostic>,
}

/// A `ServiceCIDR`: a network that cluster IPs are taken from (KEP-1880).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceCidr {
    /// `spec.cidrs`.
    pub cidrs: Vec<IpNet>,
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

/// How connections of pods on this node are told from others (`detectLocalMode`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LocalTraffic {
    /// Nobody said. The node's own pod CIDRs ([`Node::pod_cidrs`]) tell whom the policy `Local` must
    /// not leave without endpoints; but as not every network plugin keeps to them, nobody loses its
    /// address for them.
    #[default]
    Unknown,
    /// By their source, the node's own pod CIDRs.
    NodeCidrs,
    /// By their source, in one of these CIDRs.
    Cidrs(Vec<IpNet>),
    /// By the bridge that they come from.
    Bridge(Arc<str>),
    /// By how the name of the interface begins that they come from.
    InterfacePrefix(Arc<str>),
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
    /// How connections of pods here are known.
    pub local_traffic: LocalTraffic,
    /// Whether every connection to a cluster IP is masqueraded.
    pub masquerade_all: bool,
    /// Whether node ports are served to the node itself at its IPv4 loopback addresses.
    pub localhost_nodeports: bool,
    /// The networks of all cluster IPs (`ServiceCIDR` objects): sorted by the objects' names. Where
    /// none is known, addresses that no Service has are left alone.
    pub service_cidrs: Vec<IpNet>,
    /// What was wrong with the `ServiceCIDR` objects.
    pub service_cidr_diagnostics: Vec<Diagnostic>,
}

impl NodeContext {
    /// A node of this name of which nothing else is known, with the default settings.
    pub fn new(name: Arc<str>) -> NodeContext {
        NodeContext {
            name,
            node: Node::default(),
            nodeport_addresses: NodePortAddresses::Primary,
            local_traffic: LocalTraffic::default(),
            masquerade_all: false,
            localhost_nodeports: false,
            service_cidrs: Vec::new(),
            service_cidr_diagnostics: Vec::new(),
        }
    }

    /// What was wrong with the objects that this was taken from.
    pub fn diagnostics(&self) -> impl Iterator<Item = &Diagnostic> {
        self.node.diagnostics.iter().chain(&self.service_cidr_diagnostics)
    }

    /// The addresses of `family` that pods of this node have, as far as that is how they are known;
    /// disjoint, sorted.
    pub fn pod_cidrs(&self, family: Family) -> Vec<IpNet> {
        let cidrs: &[IpNet] = match &self.local_traffic {
            LocalTraffic::Unknown | LocalTraffic::NodeCidrs => &self.node.pod_cidrs,
            LocalTraffic::Cidrs(cidrs) => cidrs,
            LocalTraffic::Bridge(_) | LocalTraffic::InterfacePrefix(_) => &[],
        };
        super::CidrSet::new(cidrs.iter().copied()).of_family(family)
    }

    /// The sources of `family` that keep their address when they connect to a cluster IP; disjoint,
    /// sorted. Where nobody knows which addresses pods have, that is everyone.
    pub fn unmasqueraded(&self, family: Family) -> Vec<IpNet> {
        if self.masquerade_all {
            return Vec::new();
        }
        match &self.local_traffic {
            LocalTraffic::Unknown => vec![family.everything()],
            LocalTraffic::Bridge(_) | LocalTraffic::InterfacePrefix(_) => Vec::new(),
            LocalTraffic::NodeCidrs | LocalTraffic::Cidrs(_) => {
                let cidrs = self.pod_cidrs(family);
                if cidrs.is_empty() { vec![family.everything()] } else { cidrs }
            }
        }
    }

    /// The loopback addresses of `family` at which node ports are served. IPv6 has no such: the
    /// kernel lets nothing with the source `::1` leave (there is no `route_localnet`).
    pub fn localhost_cidrs(&self, family: Family) -> Vec<IpNet> {
        match family {
            Family::V4 if self.localhost_nodeports => vec![IpNet::from(LOOPBACK4)],
            Family::V4 | Family::V6 => Vec::new(),
        }
    }

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
