//! The plans of all Services, and who gets what several of them claim.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{Claim, Frontend, HealthCheck, Pool, ServicePlan};
use crate::model::{Diagnostic, ObjectRef, Protocol, Seniority, ServiceName, Severity};

/// The plans of all Services.
///
/// When Services claim one address or port, the senior one ([`Seniority`]) has it and the others
/// go without until it lets go. Whose cluster IP an address is comes before all who only name it as
/// external: those may write what they like (CVE-2020-8554). The outcome depends on the set of plans alone, never on the order
/// in which they came.
#[derive(Debug, Default)]
pub struct Desired {
    plans: HashMap<ServiceName, Arc<ServicePlan>>,
    /// Everyone who claims something, the senior first. Never an empty list.
    claims: HashMap<Claim, Vec<Claimant>>,
}

/// Somebody who claims something. Smaller is senior.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claimant {
    /// Whether the claim is an address that the Service only names as its external one.
    external: bool,
    seniority: Seniority,
}

impl Claimant {
    fn of(plan: &ServicePlan, claim: Claim) -> Claimant {
        let external = match claim {
            Claim::Address(address, ..) => !plan.cluster_ips.contains(&address),
            Claim::ClusterIp(_) | Claim::NodePort(..) => false,
        };
        Claimant { external, seniority: plan.seniority.clone() }
    }

    fn service(&self) -> &ServiceName {
        &self.seniority.service
    }
}

impl Desired {
    /// Replaces the plan of `service`, or removes it. Returns the Services whose
    /// [`effective`](Desired::effective) plan may have changed by that: `service` itself and those
    /// that win or lose a claim, or lose it to somebody else. Costs what the old and the new plan
    /// claim, and who else claims that.
    pub fn set(
        &mut self,
        service: &ServiceName,
        plan: Option<ServicePlan>,
    ) -> BTreeSet<ServiceName> {
        self.set_shared(service, plan.map(Arc::new))
    }

    /// [`Desired::set`] for a plan that is shared already.
    pub(crate) fn set_shared(
        &mut self,
        service: &ServiceName,
        plan: Option<Arc<ServicePlan>>,
    ) -> BTreeSet<ServiceName> {
        let mut touched = BTreeSet::from([service.clone()]);
        if let Some(old) = self.plans.remove(service) {
            for claim in old.claims().collect::<BTreeSet<_>>() {
                self.release(claim, service, &mut touched);
            }
        }
        if let Some(plan) = plan {
            debug_assert_eq!(plan.service(), service);
            for claim in plan.claims().collect::<BTreeSet<_>>() {
                self.acquire(claim, Claimant::of(&plan, claim), &mut touched);
            }
            self.plans.insert(service.clone(), plan);
        }
        touched
    }

    /// What is to be in force for `service`: its plan without what a senior Service has, each
    /// loss named in the diagnostics. `None` where there is no such Service.
    pub fn effective(&self, service: &ServiceName) -> Option<Arc<ServicePlan>> {
        let plan = self.plans.get(service)?;
        let lost: BTreeSet<Claim> =
            plan.claims().filter(|claim| self.claims[claim][0].service() != service).collect();
        if lost.is_empty() {
            return Some(Arc::clone(plan));
        }
        let mut plan = ServicePlan::clone(plan);
        for claim in lost {
            self.take_from(&mut plan, claim);
        }
        Some(Arc::new(plan))
    }

    /// The plan of `service` as it was handed over, with what a senior Service has; `None` where
    /// there is no such Service.
    pub fn planned(&self, service: &ServiceName) -> Option<&Arc<ServicePlan>> {
        self.plans.get(service)
    }

    /// The Service that has what several may claim; `None` where nobody claims it.
    pub fn holder(&self, claim: &Claim) -> Option<&ServiceName> {
        self.claims.get(claim)?.first().map(Claimant::service)
    }

    /// The names of all planned Services, in no particular order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.plans.keys()
    }

    fn acquire(&mut self, claim: Claim, who: Claimant, touched: &mut BTreeSet<ServiceName>) {
        // Hardly ever is there more than one.
        let claimants = self.claims.entry(claim).or_insert_with(|| Vec::with_capacity(1));
        let place = claimants.partition_point(|other| *other < who);
        if place == 0 {
            // The one who had it, and all who are told that somebody has it.
            touched.extend(claimants.iter().map(|loser| loser.service().clone()));
        }
        claimants.insert(place, who);
    }

    fn release(&mut self, claim: Claim, who: &ServiceName, touched: &mut BTreeSet<ServiceName>) {
        let Some(claimants) = self.claims.get_mut(&claim) else { return };
        let Some(place) = claimants.iter().position(|other| other.service() == who) else { return };
        claimants.remove(place);
        if claimants.is_empty() {
            self.claims.remove(&claim);
        } else if place == 0 {
            touched.extend(claimants.iter().map(|other| other.service().clone()));
        }
    }

    /// Takes out of `plan` what `claim` stands for, and says who has it.
    fn take_from(&self, plan: &mut ServicePlan, claim: Claim) {
        let winner = &self.claims[&claim][0];
        let over_external = Claimant::of(plan, claim).external && !winner.external;
        let (field, what) = match claim {
            Claim::ClusterIp(lost) => {
                plan.cluster_ips.retain(|address| *address != lost);
                retain_frontends(
                    plan,
                    |_, f| !matches!(f, Frontend::ClusterIp { address, .. } if *address == lost),
                );
                ("spec.clusterIPs".to_owned(), lost.to_string())
            }
            Claim::Address(lost, protocol, port) => {
                let mut field = None;
                retain_frontends(plan, |pool, f| {
                    let (own, which) = match *f {
                        Frontend::ClusterIp { address, port } => {
                            ((address, port), "spec.clusterIPs")
                        }
                        Frontend::External { address, port } => {
                            ((address, port), "spec.externalIPs or status.loadBalancer.ingress")
                        }
                        Frontend::NodePort { .. } => return true,
                    };
                    let is_lost = pool.protocol == protocol && own == (lost, port);
                    field = field.or(is_lost.then_some(which));
                    !is_lost
                });
                if let Some(firewall) = &mut plan.load_balancer_firewall {
                    firewall
                        .addresses
                        .retain(|at| (at.protocol, at.address, at.port) != (protocol, lost, port));
                    if firewall.addresses.is_empty() {
                        plan.load_balancer_firewall = None;
                    }
                }
                // It went with the whole address.
                let Some(field) = field else { return };
                (field.to_owned(), format!("{protocol} port {port} of {lost}"))
            }
            Claim::NodePort(protocol, lost) => {
                let mut field = "spec.healthCheckNodePort".to_owned();
                retain_frontends(plan, |pool, f| {
                    let is_lost = pool.protocol == protocol
                        && matches!(f, Frontend::NodePort { port } if *port == lost);
                    if is_lost {
                        field = format!("spec.ports[{:?}].nodePort", pool.port_name);
                    }
                    !is_lost
                });
                if let Some(firewall) = &mut plan.firewall {
                    firewall.node_ports.retain(|p| (p.protocol, p.port) != (protocol, lost));
                    if firewall.node_ports.is_empty() {
                        plan.firewall = None;
                    }
                }
                let is_check =
                    |check: &HealthCheck| (Protocol::Tcp, check.port) == (protocol, lost);
                plan.health_check.take_if(|check| is_check(check));
                (field, format!("{protocol} node port {lost}"))
            }
        };
        let older = if over_external { "" } else { "older " };
        let winner = winner.service();
        let message =
            format!("{what} belongs to the {older}Service {winner}; not served for this one");
        plan.diagnostics.push(conflict(plan, field, message));
        plan.diagnostics.sort();
    }
}

/// Keeps the frontends that `keep` wants, and the pools that have any.
fn retain_frontends(plan: &mut ServicePlan, mut keep: impl FnMut(&Pool, &Frontend) -> bool) {
    for pool in &mut plan.pools {
        let mut frontends = std::mem::take(&mut pool.frontends);
        frontends.retain(|frontend| keep(pool, frontend));
        pool.frontends = frontends;
    }
    plan.pools.retain(|pool| !pool.frontends.is_empty());
}

fn conflict(plan: &ServicePlan, field: String, message: String) -> Diagnostic {
    let service = plan.service();
    Diagnostic { object: ObjectRef::service(service), field, severity: Severity::Error, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeContext, Service, ServicePort};
    use crate::plan::plan_service;

    /// A Service of one port, 80.
    fn service(name: &str, created: i64, cluster_ip: &str, external_ip: Option<&str>) -> Service {
        Service {
            created,
            cluster_ips: vec![cluster_ip.parse().unwrap()],
            external_ips: external_ip.into_iter().map(|ip| ip.parse().unwrap()).collect(),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 80.try_into().unwrap(),
                node_port: None,
            }],
            ..Service::new(ServiceName::new("shop", name))
        }
    }

    #[test]
    fn nobody_takes_the_cluster_ip_of_another_by_naming_it() {
        let node = NodeContext::new("node-1".into());
        let thief = service("thief", 1, "10.96.0.66", Some("10.96.0.10"));
        let owner = service("owner", 2, "10.96.0.10", None);
        let claim = Claim::Address("10.96.0.10".parse().unwrap(), Protocol::Tcp, 80);
        for services in [[&thief, &owner], [&owner, &thief]] {
            let mut desired = Desired::default();
            for service in services {
                desired.set(&service.name, Some(plan_service(service, [], &node)));
            }
            assert_eq!(desired.holder(&claim), Some(&owner.name));
            let plan = desired.effective(&thief.name).unwrap();
            let frontends: Vec<_> = plan.pools.iter().flat_map(|pool| &pool.frontends).collect();
            let own = Frontend::ClusterIp { address: "10.96.0.66".parse().unwrap(), port: 80 };
            assert_eq!(frontends, [&own]);
            let messages: Vec<_> = plan.diagnostics.iter().map(|d| &*d.message).collect();
            assert_eq!(
                messages,
                [
                    "tcp port 80 of 10.96.0.10 belongs to the Service shop/owner; not served for this one"
                ]
            );
            assert_eq!(desired.effective(&owner.name).unwrap().diagnostics, []);
            // When the owner goes, the other has it.
            let touched = desired.set(&owner.name, None);
            assert!(touched.contains(&thief.name));
            assert_eq!(desired.holder(&claim), Some(&thief.name));
        }
    }
}
