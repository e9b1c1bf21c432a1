//! What one subject - a Service, or the node itself - adds to the ruleset.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::affinity::Remember;
use super::balancer::{Balancer, LOCAL_SLOTS, Route};
use super::element::{ChainName, Element, ElementKey, KeyBytes, SharedChain, Value};
use super::firewall::FirewallChain;
use super::networks::{self, FromNetworks};
use super::sets::SetName;
use super::slots::assign_slots;
use crate::model::{
    Backend, Family, LocalTraffic, NodeContext, Protocol, ServiceName, TrafficPolicy,
};
use crate::plan::{Frontend, Pool, ServicePlan, Sources};

/// Whose contribution something is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// The node: its addresses.
    Node,
    /// A Service.
    Service(ServiceName),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Subject::Node => f.write_str("the node"),
            Subject::Service(service) => write!(f, "Service {service}"),
        }
    }
}

/// Everything that one subject adds to the ruleset.
///
/// Equal plans may have different contributions: which slot an endpoint has depends on when it
/// came, because moving the others would cost an operation for each of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contribution {
    /// What the node is known by.
    Node(Arc<NodeElements>),
    /// A Service's plan, and for each of its pools the backends in slot order.
    Service {
        /// The plan.
        plan: Arc<ServicePlan>,
        /// For each pool, its backends in the order of their slots.
        slots: Vec<PoolSlots>,
    },
}

/// CIDRs and interfaces of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeElements {
    /// CIDRs at whose local addresses node ports are served.
    pub nodeport_cidrs: Vec<IpNet>,
    /// Loopback CIDRs at which they are served to the node itself.
    pub localhost_cidrs: Vec<IpNet>,
    /// The Service network.
    pub service_cidrs: Vec<IpNet>,
    /// The addresses of pods of this node.
    pub pod_cidrs: Vec<IpNet>,
    /// Sources that keep their address when they connect to a ClusterIP.
    pub unmasqueraded: Vec<IpNet>,
    /// The interfaces of pods of this node, as names or beginnings of names.
    pub pod_interfaces: Vec<InterfaceName>,
    /// Interfaces from which sources keep their address when they connect to a ClusterIP.
    pub unmasqueraded_interfaces: Vec<InterfaceName>,
}

/// One interface, or all whose names begin alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceName {
    /// The one with this name.
    Exact(Arc<str>),
    /// Those whose names begin so.
    Prefix(Arc<str>),
}

/// The backends of a pool in the order of their slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolSlots {
    /// [`Pool::backends`].
    pub cluster: Vec<Backend>,
    /// [`Pool::local_backends`].
    pub local: Vec<Backend>,
}

impl Contribution {
    /// The node's contribution.
    pub fn node(node: &NodeContext) -> Contribution {
        let both = |of: &dyn Fn(Family) -> Vec<IpNet>| {
            Family::ALL.iter().flat_map(|family| of(*family)).collect()
        };
        let service_cidrs = crate::model::CidrSet::new(node.service_cidrs.iter().copied());
        let pod_interfaces: Vec<InterfaceName> = match &node.local_traffic {
            LocalTraffic::Unknown | LocalTraffic::NodeCidrs | LocalTraffic::Cidrs(_) => Vec::new(),
            LocalTraffic::Bridge(name) => vec![InterfaceName::Exact(name.clone())],
            LocalTraffic::InterfacePrefix(prefix) => vec![InterfaceName::Prefix(prefix.clone())],
        };
        let unmasqueraded_interfaces =
            if node.masquerade_all { Vec::new() } else { pod_interfaces.clone() };
        Contribution::Node(Arc::new(NodeElements {
            nodeport_cidrs: both(&|family| node.nodeport_cidrs(family)),
            localhost_cidrs: both(&|family| node.localhost_cidrs(family)),
            service_cidrs: both(&|family| service_cidrs.of_family(family)),
            pod_cidrs: both(&|family| node.pod_cidrs(family)),
            unmasqueraded: both(&|family| node.unmasqueraded(family)),
            pod_interfaces,
            unmasqueraded_interfaces,
        }))
    }

    /// A Service's contribution. `previous` says in which slots the backends of a pool are now.
    pub fn service(
        plan: Arc<ServicePlan>,
        mut previous: impl FnMut(&Pool) -> Option<PoolSlots>,
    ) -> Contribution {
        let slots = plan
            .pools
            .iter()
            .map(|pool| {
                let previous = previous(pool).unwrap_or_default();
                PoolSlots {
                    cluster: assign_slots(&previous.cluster, &pool.backends),
                    local: assign_slots(&previous.local, &pool.local_backends),
                }
            })
            .collect();
        Contribution::Service { plan, slots }
    }

    /// The slots of the pool with this port, protocol and family, if there is one.
    pub fn slots_of(&self, wanted: &Pool) -> Option<&PoolSlots> {
        let Contribution::Service { plan, slots } = self else { return None };
        let same = |pool: &Pool| {
            (&pool.port_name, pool.protocol, pool.family)
                == (&wanted.port_name, wanted.protocol, wanted.family)
        };
        let index = plan.pools.iter().position(same)?;
        Some(&slots[index])
    }

    /// The plan, if this is a Service's contribution.
    pub fn plan(&self) -> Option<&Arc<ServicePlan>> {
        match self {
            Contribution::Node(_) => None,
            Contribution::Service { plan, .. } => Some(plan),
        }
    }

    /// The elements that are this subject's alone.
    pub fn elements(&self, mut each: impl FnMut(Element)) {
        match self {
            Contribution::Node(node) => node.elements(&mut each),
            Contribution::Service { plan, slots } => {
                let owner: Arc<str> = plan.service().to_string().into();
                for address in &plan.cluster_ips {
                    let set = SetName::ClusterIps(Family::of(*address));
                    let key = ElementKey::single(set, KeyBytes::empty().address(*address));
                    each(set_element(key, Some(&owner)));
                }
                for (pool, slots) in plan.pools.iter().zip(slots) {
                    let owner = owned_port(&owner, &pool.port_name);
                    for frontend in &pool.frontends {
                        Entry::new(pool, frontend, slots).elements(&owner, &mut each);
                    }
                }
                firewall_elements(plan, &owner, &mut each);
                load_balancer_elements(plan, &owner, &mut each);
            }
        }
    }

    /// Addresses whose hairpin element this subject needs; others may need the same.
    pub fn hairpins(&self) -> BTreeSet<IpAddr> {
        let Contribution::Service { plan, .. } = self else { return BTreeSet::new() };
        plan.pools.iter().flat_map(|pool| pool.hairpins.iter().copied()).collect()
    }

    /// Chains that this subject needs; others may need the same.
    pub fn shared_chains(&self) -> BTreeSet<SharedChain> {
        let Contribution::Service { plan, slots } = self else { return BTreeSet::new() };
        let pools = plan.pools.iter().zip(slots);
        let entries = pools.flat_map(|(pool, slots)| {
            pool.frontends
                .iter()
                .flat_map(move |frontend| Entry::new(pool, frontend, slots).chains())
        });
        let networks = plan.load_balancer_firewall.iter().flat_map(|firewall| {
            let addresses = firewall.addresses.iter();
            let families: BTreeSet<Family> = addresses.map(|at| Family::of(at.address)).collect();
            families.into_iter().filter_map(|family| {
                FromNetworks::new(family, of_family(&firewall.sources, family))
            })
        });
        entries.chain(networks.map(SharedChain::FromNetworks)).collect()
    }

    /// The firewall of this subject's node ports, which has sets of its own.
    pub fn firewall(&self) -> Option<FirewallChain> {
        let plan = self.plan()?;
        plan.firewall.as_ref().map(|_| FirewallChain::of(plan.service().clone()))
    }
}

impl NodeElements {
    fn elements(&self, each: &mut impl FnMut(Element)) {
        type OfFamily = fn(Family) -> SetName;
        let sets: [(OfFamily, &[IpNet]); 5] = [
            (SetName::NodePortIps, &self.nodeport_cidrs),
            (|_| SetName::LocalhostIps, &self.localhost_cidrs),
            (SetName::ServiceCidrs, &self.service_cidrs),
            (SetName::PodCidrs, &self.pod_cidrs),
            (SetName::Unmasqueraded, &self.unmasqueraded),
        ];
        for (set, cidrs) in sets {
            for cidr in cidrs {
                let set = set(Family::of(cidr.network()));
                each(set_element(ElementKey::cidr(set, *cidr), None));
            }
        }
        for (set, interfaces) in [
            (SetName::PodInterfaces, &self.pod_interfaces),
            (SetName::UnmasqueradedInterfaces, &self.unmasqueraded_interfaces),
        ] {
            for interface in interfaces {
                each(set_element(ElementKey::interface(set.clone(), interface), None));
            }
        }
    }
}

/// The element that a hairpin address stands for.
pub(crate) fn hairpin_element(address: IpAddr) -> Element {
    let set = SetName::Hairpin(Family::of(address));
    let key = KeyBytes::empty().address(address).address(address);
    set_element(ElementKey::single(set, key), None)
}

/// One frontend, and the lists of backends that serve it.
pub(crate) struct Entry<'a> {
    pool: &'a Pool,
    frontend: &'a Frontend,
    slots: &'a PoolSlots,
}

/// What an entry becomes.
enum Path {
    /// Connections find nobody.
    Nobody(Value),
    /// One list serves everybody.
    Direct(Balancer),
    /// Connections from elsewhere are served by one list, those from here by the other.
    Local { from_elsewhere: Balancer, from_here: Balancer },
}

impl<'a> Entry<'a> {
    pub(crate) fn new(pool: &'a Pool, frontend: &'a Frontend, slots: &'a PoolSlots) -> Entry<'a> {
        Entry { pool, frontend, slots }
    }

    fn path(&self) -> Path {
        let Pool { internal_traffic, external_traffic, .. } = self.pool;
        let PoolSlots { cluster, local } = self.slots;
        let reject = Value::Goto(ChainName::Reject);
        let (list, route, route_local, route_here) = match self.frontend {
            Frontend::ClusterIp { .. } => {
                let list = match internal_traffic {
                    TrafficPolicy::Cluster => cluster,
                    TrafficPolicy::Local => local,
                };
                return match (list.is_empty(), self.pool.any) {
                    (false, _) => Path::Direct(self.balancer(Route::Service, list)),
                    // On another node there would be one.
                    (true, true) => Path::Nobody(Value::Drop),
                    (true, false) => Path::Nobody(reject),
                };
            }
            Frontend::External { .. } => {
                (cluster, Route::External, Route::ExternalLocal, Route::Service)
            }
            Frontend::NodePort { .. } => {
                (cluster, Route::NodePort, Route::NodePortLocal, Route::NodePortFromHere)
            }
        };
        match (list.is_empty(), external_traffic) {
            (true, _) => Path::Nobody(reject),
            (false, TrafficPolicy::Cluster) => Path::Direct(self.balancer(route, list)),
            (false, TrafficPolicy::Local) => Path::Local {
                from_elsewhere: self.balancer(route_local, local),
                from_here: self.balancer(route_here, cluster),
            },
        }
    }

    fn balancer(&self, route: Route, list: &[Backend]) -> Balancer {
        Balancer {
            route,
            family: self.pool.family,
            endpoints: u32::try_from(list.len()).expect("a Service has fewer than 2^31 endpoints"),
            sticky: self.pool.affinity.is_some(),
            choice: self.pool.choice,
        }
    }

    /// The chains that it leads to.
    fn chains(&self) -> Vec<SharedChain> {
        let mut chains = match self.path() {
            Path::Nobody(_) => return Vec::new(),
            Path::Direct(balancer) => vec![SharedChain::Balancer(balancer)],
            Path::Local { from_elsewhere, from_here } => {
                vec![SharedChain::Balancer(from_elsewhere), SharedChain::Balancer(from_here)]
            }
        };
        chains.extend(self.remember().map(SharedChain::Remember));
        chains.retain(|chain| !chain.is_always_there());
        chains
    }

    fn remember(&self) -> Option<Remember> {
        let seconds = self.pool.affinity?.get();
        Some(Remember { family: self.pool.family, seconds })
    }

    fn elements(&self, owner: &Arc<str>, each: &mut impl FnMut(Element)) {
        let sets = self.sets();
        let element = |set: &SetName, value| Element {
            key: ElementKey::single(set.clone(), self.key()),
            value,
            comment: Some(Arc::clone(owner)),
        };
        let leads_to = |balancer| Value::Goto(ChainName::Shared(SharedChain::Balancer(balancer)));
        match self.path() {
            Path::Nobody(fate) => return each(element(&sets.nobody, fate)),
            Path::Direct(balancer) => each(match balancer.set() {
                Some(common) => element(&common, Value::None),
                None => element(&sets.index, leads_to(balancer)),
            }),
            Path::Local { from_elsewhere, from_here } => {
                each(element(&sets.index, leads_to(from_elsewhere)));
                each(element(&sets.from_here, leads_to(from_here)));
                if from_elsewhere.endpoints == 0 {
                    each(element(&sets.nobody, Value::Drop));
                }
            }
        }
        for (first, list) in self.lists() {
            for (slot, backend) in (first..).zip(list) {
                each(Element {
                    key: ElementKey::single(sets.endpoints.clone(), self.key().slot(slot)),
                    value: Value::Endpoint(KeyBytes::empty().backend(backend)),
                    comment: None,
                });
            }
        }
        if let Some(remember) = self.remember() {
            let chain = ChainName::Shared(SharedChain::Remember(remember));
            each(element(&sets.sticky, Value::Goto(chain)));
            // Whoever has several slots, or is on both lists, is here once.
            let serving: BTreeSet<&Backend> =
                self.lists().into_iter().flat_map(|(_, list)| list).collect();
            for backend in serving {
                let key = self.key().backend(backend);
                each(set_element(ElementKey::single(sets.sticky_endpoints.clone(), key), None));
            }
        }
    }

    /// The lists of backends with their first slots.
    fn lists(&self) -> Vec<(u32, &'a [Backend])> {
        let PoolSlots { cluster, local } = self.slots;
        match self.path() {
            Path::Nobody(_) => Vec::new(),
            Path::Direct(_) => match self.pool.policy(self.frontend) {
                TrafficPolicy::Cluster => vec![(0, cluster)],
                TrafficPolicy::Local => vec![(0, local)],
            },
            Path::Local { .. } => vec![(0, cluster), (LOCAL_SLOTS, local)],
        }
    }

    fn key(&self) -> KeyBytes {
        frontend_key(self.frontend, self.pool.protocol)
    }

    fn sets(&self) -> EntrySets {
        let family = self.pool.family;
        match self.frontend {
            Frontend::ClusterIp { .. } | Frontend::External { .. } => EntrySets {
                index: SetName::ServiceIps(family),
                from_here: SetName::ClusterPolicy(family),
                endpoints: SetName::Endpoints(family),
                nobody: SetName::NoEndpoints(family),
                sticky: SetName::Sticky(family),
                sticky_endpoints: SetName::StickyEndpoints(family),
            },
            Frontend::NodePort { .. } => EntrySets {
                index: SetName::NodePorts(family),
                from_here: SetName::NodePortClusterPolicy(family),
                endpoints: SetName::NodePortEndpoints(family),
                nobody: SetName::NoEndpointNodePorts(family),
                sticky: SetName::StickyNodePorts(family),
                sticky_endpoints: SetName::StickyNodePortEndpoints(family),
            },
        }
    }
}

/// The sets that a frontend stands in.
struct EntrySets {
    index: SetName,
    from_here: SetName,
    endpoints: SetName,
    nobody: SetName,
    sticky: SetName,
    sticky_endpoints: SetName,
}

/// How a client that is remembered is found, behind the client's own address: by the address,
/// protocol and port that it used; of a node port without the address.
pub(crate) fn affinity_key(frontend: &Frontend, protocol: Protocol) -> Vec<u8> {
    frontend_key(frontend, protocol).as_slice().to_vec()
}

/// What a client that is remembered is found with.
pub(crate) fn affinity_value(backend: &Backend) -> Vec<u8> {
    KeyBytes::empty().backend(backend).as_slice().to_vec()
}

fn frontend_key(frontend: &Frontend, protocol: Protocol) -> KeyBytes {
    match *frontend {
        Frontend::ClusterIp { address, port } | Frontend::External { address, port } => {
            KeyBytes::empty().address(address).protocol(protocol).port(port)
        }
        Frontend::NodePort { port } => KeyBytes::empty().protocol(protocol).port(port),
    }
}

/// The map of endpoints that a frontend of this pool stands in, its key there without the slot, and
/// the first slot of each list.
pub(crate) fn endpoint_lists(pool: &Pool, frontend: &Frontend) -> EndpointLists {
    let slots = PoolSlots::default();
    let entry = Entry::new(pool, frontend, &slots);
    let cluster_only = matches!(frontend, Frontend::ClusterIp { .. });
    let (cluster, local) = match (pool.policy(frontend), cluster_only) {
        (TrafficPolicy::Cluster, _) => (Some(0), None),
        (TrafficPolicy::Local, true) => (None, Some(0)),
        (TrafficPolicy::Local, false) => (Some(0), Some(LOCAL_SLOTS)),
    };
    EndpointLists { map: entry.sets().endpoints, key: entry.key(), cluster, local }
}

/// See [`endpoint_lists`].
#[derive(Debug)]
pub(crate) struct EndpointLists {
    pub map: SetName,
    pub key: KeyBytes,
    pub cluster: Option<u32>,
    pub local: Option<u32>,
}

fn firewall_elements(plan: &ServicePlan, owner: &Arc<str>, each: &mut impl FnMut(Element)) {
    let Some(firewall) = &plan.firewall else { return };
    let chain = FirewallChain::of(plan.service().clone());
    for port in &firewall.node_ports {
        let key = frontend_key(&Frontend::NodePort { port: port.port }, port.protocol);
        each(Element {
            key: ElementKey::single(SetName::NodePortFirewall, key),
            value: Value::Goto(ChainName::Firewall(chain.clone())),
            comment: Some(owned_port(owner, &port.port_name)),
        });
    }
    for family in Family::ALL {
        for cidr in of_family(&firewall.sources, family) {
            each(set_element(ElementKey::cidr(chain.set(family), cidr), None));
        }
    }
}

fn load_balancer_elements(plan: &ServicePlan, owner: &Arc<str>, each: &mut impl FnMut(Element)) {
    let Some(firewall) = &plan.load_balancer_firewall else { return };
    for family in Family::ALL {
        let sources = of_family(&firewall.sources, family);
        // Otherwise everybody may reach them.
        let Some(chain) = FromNetworks::new(family, sources.iter().copied()) else { continue };
        let networks: Vec<IpNet> = sources.into_iter().flat_map(networks::parts).collect();
        let addresses = firewall.addresses.iter();
        for at in addresses.filter(|at| Family::of(at.address) == family) {
            let frontend = Frontend::External { address: at.address, port: at.port };
            let key = frontend_key(&frontend, at.protocol);
            each(Element {
                key: ElementKey::single(SetName::LoadBalancerFirewall(family), key),
                value: Value::Goto(ChainName::Shared(SharedChain::FromNetworks(chain))),
                comment: Some(owned_port(owner, &at.port_name)),
            });
            for network in &networks {
                let set = SetName::LoadBalancerSources(family);
                each(set_element(ElementKey::single(set, key.network(*network)), None));
            }
        }
    }
}

/// The CIDRs of one family that may connect, disjoint and sorted.
fn of_family(sources: &Sources, family: Family) -> Vec<IpNet> {
    match sources {
        Sources::Allow(cidrs) => cidrs.of_family(family),
        Sources::Closed => Vec::new(),
    }
}

/// `shop/web:http`, or `shop/web` for a port without a name.
fn owned_port(owner: &Arc<str>, port: &str) -> Arc<str> {
    if port.is_empty() { Arc::clone(owner) } else { format!("{owner}:{port}").into() }
}

fn set_element(key: ElementKey, comment: Option<&Arc<str>>) -> Element {
    Element { key, value: Value::None, comment: comment.map(Arc::clone) }
}
