//! What one subject - a Service, or the node itself - adds to the ruleset.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::balancer::{Balancer, FrontendKind};
use super::element::{ChainName, Element, ElementKey, KeyBytes, Value};
use super::firewall::FirewallChain;
use super::sets::SetName;
use crate::model::{Backend, Family, NodeContext, Protocol, ServiceName};
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
    /// CIDRs at whose local addresses node ports are served.
    Node(Vec<IpNet>),
    /// A Service's plan, and for each of its pools the backends in slot order.
    Service {
        /// The plan.
        plan: Arc<ServicePlan>,
        /// For each pool, its backends in the order of their slots.
        slots: Vec<Vec<Backend>>,
    },
}

impl Contribution {
    /// The node's contribution.
    pub fn node(node: &NodeContext) -> Contribution {
        Contribution::Node(Family::ALL.iter().flat_map(|f| node.nodeport_cidrs(*f)).collect())
    }

    /// A Service's contribution. `previous` says in which slots the backends of a pool are now.
    pub fn service(
        plan: Arc<ServicePlan>,
        mut previous: impl FnMut(&Pool) -> Option<Vec<Backend>>,
    ) -> Contribution {
        let slots = plan
            .pools
            .iter()
            .map(|pool| assign_slots(previous(pool).as_deref().unwrap_or_default(), &pool.backends))
            .collect();
        Contribution::Service { plan, slots }
    }

    /// The slots of the pool with this port, protocol and family, if there is one.
    pub fn slots_of(&self, wanted: &Pool) -> Option<&[Backend]> {
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
            Contribution::Node(cidrs) => {
                for cidr in cidrs {
                    let set = SetName::NodePortIps(Family::of(cidr.network()));
                    each(set_element(ElementKey::cidr(set, *cidr), None));
                }
            }
            Contribution::Service { plan, slots } => {
                let owner: Arc<str> = plan.service().to_string().into();
                for address in &plan.cluster_ips {
                    let set = SetName::ClusterIps(Family::of(*address));
                    let key = ElementKey::single(set, KeyBytes::empty().address(*address));
                    each(set_element(key, Some(&owner)));
                }
                for (pool, slots) in plan.pools.iter().zip(slots) {
                    pool_elements(pool, slots, &owned_port(&owner, &pool.port_name), &mut each);
                }
                firewall_elements(plan, &owner, &mut each);
            }
        }
    }

    /// Addresses whose hairpin element this subject needs; others may need the same.
    pub fn hairpins(&self) -> BTreeSet<IpAddr> {
        let Contribution::Service { plan, .. } = self else { return BTreeSet::new() };
        plan.pools.iter().flat_map(|pool| pool.local.iter().copied()).collect()
    }

    /// Balancing chains that this subject needs; others may need the same.
    pub fn balancers(&self) -> BTreeSet<Balancer> {
        let Contribution::Service { plan, slots } = self else { return BTreeSet::new() };
        let pools = plan.pools.iter().zip(slots);
        pools
            .flat_map(|(pool, slots)| {
                pool.frontends.iter().filter_map(|frontend| balancer(pool, frontend, slots))
            })
            .collect()
    }

    /// The firewall chain of this subject, with its sets.
    pub fn firewall(&self) -> Option<FirewallChain> {
        let plan = self.plan()?;
        plan.firewall.as_ref()?;
        Some(FirewallChain { service: plan.service().clone() })
    }
}

/// The element that a hairpin address stands for.
pub(crate) fn hairpin_element(address: IpAddr) -> Element {
    let set = SetName::Hairpin(Family::of(address));
    let key = KeyBytes::empty().address(address).address(address);
    set_element(ElementKey::single(set, key), None)
}

/// The key under which a frontend's endpoint stands at `slot`.
pub(crate) fn endpoint_key(pool: &Pool, frontend: &Frontend, slot: usize) -> ElementKey {
    let slot = u32::try_from(slot).expect("a Service has fewer than 2^32 endpoints");
    let (family, protocol) = (pool.family, pool.protocol);
    let key = frontend_key(frontend, protocol).slot(slot);
    let set = match frontend {
        Frontend::ClusterIp { .. } => SetName::Endpoints(family),
        Frontend::NodePort { .. } => SetName::NodePortEndpoints(family),
    };
    ElementKey::single(set, key)
}

fn frontend_key(frontend: &Frontend, protocol: Protocol) -> KeyBytes {
    match *frontend {
        Frontend::ClusterIp { address, port } => {
            KeyBytes::empty().address(address).protocol(protocol).port(port)
        }
        Frontend::NodePort { port } => KeyBytes::empty().protocol(protocol).port(port),
    }
}

fn balancer(pool: &Pool, frontend: &Frontend, slots: &[Backend]) -> Option<Balancer> {
    let endpoints = u32::try_from(slots.len()).expect("a Service has fewer than 2^32 endpoints");
    let kind = FrontendKind::from(frontend);
    (endpoints > 0).then_some(Balancer { kind, family: pool.family, endpoints })
}

fn pool_elements(pool: &Pool, slots: &[Backend], owner: &Arc<str>, each: &mut impl FnMut(Element)) {
    let family = pool.family;
    for frontend in &pool.frontends {
        let key = frontend_key(frontend, pool.protocol);
        let Some(balancer) = balancer(pool, frontend, slots) else {
            let set = match frontend {
                Frontend::ClusterIp { .. } => SetName::NoEndpoints(family),
                Frontend::NodePort { .. } => SetName::NoEndpointNodePorts(family),
            };
            each(set_element(ElementKey::single(set, key), Some(owner)));
            continue;
        };
        let set = match frontend {
            Frontend::ClusterIp { .. } => SetName::ServiceIps(family),
            Frontend::NodePort { .. } => SetName::NodePorts(family),
        };
        each(Element {
            key: ElementKey::single(set, key),
            value: Value::Goto(ChainName::Balancer(balancer)),
            comment: Some(Arc::clone(owner)),
        });
        for (slot, backend) in slots.iter().enumerate() {
            each(Element {
                key: endpoint_key(pool, frontend, slot),
                value: Value::Endpoint(KeyBytes::backend(backend)),
                comment: None,
            });
        }
    }
}

fn firewall_elements(plan: &ServicePlan, owner: &Arc<str>, each: &mut impl FnMut(Element)) {
    let Some(firewall) = &plan.firewall else { return };
    let chain = FirewallChain { service: plan.service().clone() };
    for port in &firewall.node_ports {
        let key = KeyBytes::empty().protocol(port.protocol).port(port.port);
        each(Element {
            key: ElementKey::single(SetName::NodePortFirewall, key),
            value: Value::Goto(ChainName::Firewall(chain.clone())),
            comment: Some(owned_port(owner, &port.port_name)),
        });
    }
    if let Sources::Allow(cidrs) = &firewall.sources {
        for family in Family::ALL {
            for cidr in cidrs.of_family(family) {
                let set = SetName::Allow(family, plan.service().clone());
                each(set_element(ElementKey::cidr(set, cidr), None));
            }
        }
    }
}

/// `shop/web:http`, or `shop/web` for a port without a name.
fn owned_port(owner: &Arc<str>, port: &str) -> Arc<str> {
    if port.is_empty() { Arc::clone(owner) } else { format!("{owner}:{port}").into() }
}

fn set_element(key: ElementKey, comment: Option<&Arc<str>>) -> Element {
    Element { key, value: Value::None, comment: comment.map(Arc::clone) }
}

/// Gives each backend a slot, so that as few as possible change theirs: who stays keeps its slot
/// if that is still below the number of backends; who must move or comes fills the gaps.
fn assign_slots(previous: &[Backend], backends: &[Backend]) -> Vec<Backend> {
    let count = backends.len();
    let wanted: HashSet<&Backend> = backends.iter().collect();
    let mut slots: Vec<Option<Backend>> = vec![None; count];
    let mut placed: HashSet<&Backend> = HashSet::with_capacity(previous.len());
    for (slot, backend) in slots.iter_mut().zip(previous) {
        if wanted.contains(backend) && placed.insert(backend) {
            *slot = Some(*backend);
        }
    }
    let mut homeless = backends.iter().filter(|backend| !placed.contains(backend));
    slots
        .into_iter()
        .map(|slot| slot.or_else(|| homeless.next().copied()).expect("as many backends as slots"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(numbers: &[u16]) -> Vec<Backend> {
        let address = "10.0.0.1".parse().unwrap();
        numbers.iter().map(|port| Backend { address, port: *port }).collect()
    }

    #[test]
    fn slots_stay_where_they_can() {
        let table: &[(&[u16], &[u16], &[u16])] = &[
            (&[], &[1, 2, 3], &[1, 2, 3]),
            (&[1, 2, 3], &[1, 2, 3], &[1, 2, 3]),
            (&[3, 1, 2], &[1, 2, 3], &[3, 1, 2]),
            // The last moves into the gap.
            (&[1, 2, 3], &[2, 3], &[3, 2]),
            (&[1, 2, 3], &[1, 2], &[1, 2]),
            // Who comes goes to the end, or into a gap.
            (&[2, 3], &[1, 2, 3], &[2, 3, 1]),
            (&[1, 2, 3], &[2, 3, 4], &[4, 2, 3]),
            (&[1, 2, 3], &[], &[]),
            // A listing that says nonsense cannot make a backend appear twice.
            (&[1, 1, 1], &[1, 2, 3], &[1, 2, 3]),
        ];
        for (previous, wanted, expected) in table {
            let got = assign_slots(&backends(previous), &backends(wanted));
            assert_eq!(got, backends(expected), "{previous:?} -> {wanted:?}");
        }
    }
}
