//! Who may reach which Service through the node's ports.

use std::collections::{BTreeMap, HashSet};

use ipnet::IpNet;
use serde::Serialize;

use super::compare::{Difference, Object};
use super::table::{Count, Rule, Table};
use crate::model::{Family, Protocol, ServiceName};
use crate::plan::{Claim, Desired, Frontend, ServicePlan, Sources};
use crate::ruleset::{FirewallChain, SetName, TABLE};

/// How far one Service is open at the node's ports. Services without node ports have none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exposure {
    /// The Service's namespace.
    pub namespace: String,
    /// The Service's name.
    pub service: String,
    /// Who may reach its node ports, as declared.
    pub access: Access,
    /// The CIDRs that may, sorted; empty unless `access` is `sources`.
    pub sources: Vec<IpNet>,
    /// Whether the kernel holds to `access`: nothing that decides on it differs.
    pub in_force: bool,
    /// What the Service's firewall let through since it was made, for all its node ports together:
    /// the first packet of each connection. `null` where it has no firewall.
    pub accepted: Option<Count>,
    /// What the Service's firewall dropped since it was made, likewise.
    pub refused: Option<Count>,
    /// Its node ports, sorted by protocol and number.
    pub node_ports: Vec<ExposedPort>,
}

/// A node port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExposedPort {
    /// The protocol.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
    /// The name of the Service's port; may be empty.
    pub name: String,
    /// How many endpoints there are in each family that is served; connections are rejected where
    /// there is none.
    pub endpoints: BTreeMap<Family, usize>,
    /// The older Service `NAMESPACE/NAME` that has this port number, and whose rules hold for it;
    /// `null` if the port is this Service's own.
    pub lost_to: Option<String>,
}

/// Who may reach node ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Everyone: nobody said otherwise.
    Everyone,
    /// The listed CIDRs.
    Sources,
    /// Nobody: the list is empty.
    Nobody,
    /// Nobody, because the declaration was not understood.
    Closed,
}

/// The exposures of all Services with node ports, sorted by name.
pub(super) fn exposures(
    desired: &Desired,
    found: Option<&Table>,
    differences: &[Difference],
) -> Vec<Exposure> {
    let mut services: Vec<&ServiceName> = desired.services().collect();
    services.sort();
    let doubts = Doubts::new(differences);
    let plans = services.into_iter().filter_map(|service| desired.planned(service));
    plans.filter_map(|plan| exposure(plan, desired, found, &doubts)).collect()
}

fn exposure(
    plan: &ServicePlan,
    desired: &Desired,
    found: Option<&Table>,
    doubts: &Doubts,
) -> Option<Exposure> {
    let node_ports = node_ports(plan, desired);
    if node_ports.is_empty() {
        return None;
    }
    let (access, sources) = match plan.firewall.as_ref().map(|firewall| &firewall.sources) {
        None => (Access::Everyone, Vec::new()),
        Some(Sources::Closed) => (Access::Closed, Vec::new()),
        Some(Sources::Allow(cidrs)) if cidrs.is_empty() => (Access::Nobody, Vec::new()),
        Some(Sources::Allow(cidrs)) => {
            (Access::Sources, Family::ALL.iter().flat_map(|f| cidrs.of_family(*f)).collect())
        }
    };
    let service = plan.service();
    let (accepted, refused) = match plan.firewall.as_ref().and(found) {
        Some(table) => counts(service, table),
        None => (None, None),
    };
    Some(Exposure {
        namespace: service.namespace.to_string(),
        service: service.name.to_string(),
        access,
        sources,
        in_force: !doubts.about(service, &node_ports),
        accepted,
        refused,
        node_ports,
    })
}

fn node_ports(plan: &ServicePlan, desired: &Desired) -> Vec<ExposedPort> {
    let mut ports: BTreeMap<(Protocol, u16), ExposedPort> = BTreeMap::new();
    for pool in &plan.pools {
        for frontend in &pool.frontends {
            let Frontend::NodePort { port } = *frontend else { continue };
            let exposed = ports.entry((pool.protocol, port)).or_insert_with(|| {
                let holder = desired.holder(&Claim::NodePort(pool.protocol, port));
                let lost_to = holder.filter(|holder| *holder != plan.service());
                ExposedPort {
                    protocol: pool.protocol,
                    port,
                    name: pool.port_name.to_string(),
                    endpoints: BTreeMap::new(),
                    lost_to: lost_to.map(ToString::to_string),
                }
            });
            exposed.endpoints.insert(pool.family, pool.serving(frontend).len());
        }
    }
    ports.into_values().collect()
}

/// What the rules of a Service's firewall counted that are as we wrote them.
fn counts(service: &ServiceName, table: &Table) -> (Option<Count>, Option<Count>) {
    let firewall = FirewallChain::of(service.clone());
    let Some(chain) = table.chains.get(&firewall.name()) else { return (None, None) };
    let (mut accepted, mut refused) = (None, None);
    for spec in firewall.rules() {
        let sum: &mut Option<Count> = match spec.text.rsplit(' ').next() {
            Some("accept") => &mut accepted,
            Some("drop") => &mut refused,
            _ => continue,
        };
        let text = Rule::desired(&spec).text;
        for rule in chain.rules.iter().filter(|rule| rule.text == text) {
            rule.counts.iter().for_each(|count| *sum.get_or_insert_default() += *count);
        }
    }
    (accepted, refused)
}

/// What differs of all that decides who may reach a node port.
struct Doubts<'a> {
    /// Something that decides for all Services.
    general: bool,
    /// Chains and sets.
    names: HashSet<&'a str>,
    /// Keys of the map from node ports to firewalls.
    ports: HashSet<&'a str>,
}

impl<'a> Doubts<'a> {
    fn new(differences: &'a [Difference]) -> Doubts<'a> {
        const CHAINS: [&str; 2] = ["firewall-prerouting", "source-firewall"];
        let map = SetName::NodePortFirewall.name();
        let mut doubts = Doubts { general: false, names: HashSet::new(), ports: HashSet::new() };
        for difference in differences {
            match (difference.object, &*difference.name) {
                (Object::Table, _) => doubts.general = true,
                (Object::Chain | Object::Rule, name) if CHAINS.contains(&name) => {
                    doubts.general = true;
                }
                (Object::Set, name) if name == map => doubts.general = true,
                (Object::Element, name) if name == map => {
                    doubts.ports.extend(difference.key.as_deref());
                }
                (_, name) => drop(doubts.names.insert(name)),
            }
        }
        doubts.names.remove(TABLE);
        doubts
    }

    fn about(&self, service: &ServiceName, ports: &[ExposedPort]) -> bool {
        let firewall = FirewallChain::of(service.clone());
        self.general
            || self.names.contains(&*firewall.name())
            || firewall.sets().iter().any(|set| self.names.contains(&*set.name()))
            || ports
                .iter()
                .filter(|port| port.lost_to.is_none())
                .any(|port| self.ports.contains(&*format!("{} . {}", port.protocol, port.port)))
    }
}
