//! The plans of all Services, and who gets what several of them claim.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::{Claim, Frontend, ServicePlan};
use crate::model::{Diagnostic, ObjectKind, ObjectRef, Seniority, ServiceName, Severity};

/// The plans of all Services.
///
/// When Services claim one address or port, the senior one ([`Seniority`]) has it and the others
/// go without until it lets go. The outcome depends on the set of plans alone, never on the order
/// in which they came.
#[derive(Debug, Default)]
pub struct Desired {
    plans: HashMap<ServiceName, Arc<ServicePlan>>,
    /// Everyone who claims something, the senior first. Never an empty list.
    claims: HashMap<Claim, Vec<Seniority>>,
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
        let mut touched = BTreeSet::from([service.clone()]);
        if let Some(old) = self.plans.remove(service) {
            for claim in old.claims().collect::<BTreeSet<_>>() {
                self.release(claim, service, &mut touched);
            }
        }
        if let Some(plan) = plan {
            debug_assert_eq!(plan.service(), service);
            for claim in plan.claims().collect::<BTreeSet<_>>() {
                self.acquire(claim, &plan.seniority, &mut touched);
            }
            self.plans.insert(service.clone(), Arc::new(plan));
        }
        touched
    }

    /// What is to be in force for `service`: its plan without what a senior Service has, each
    /// loss named in the diagnostics. `None` where there is no such Service.
    pub fn effective(&self, service: &ServiceName) -> Option<Arc<ServicePlan>> {
        let plan = self.plans.get(service)?;
        let lost: BTreeSet<Claim> =
            plan.claims().filter(|claim| &self.claims[claim][0].service != service).collect();
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
        self.claims.get(claim)?.first().map(|seniority| &seniority.service)
    }

    /// The names of all planned Services, in no particular order.
    pub fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.plans.keys()
    }

    fn acquire(&mut self, claim: Claim, who: &Seniority, touched: &mut BTreeSet<ServiceName>) {
        let claimants = self.claims.entry(claim).or_default();
        let place = claimants.partition_point(|other| other < who);
        if place == 0 {
            // The one who had it, and all who are told that somebody has it.
            touched.extend(claimants.iter().map(|loser| loser.service.clone()));
        }
        claimants.insert(place, who.clone());
    }

    fn release(&mut self, claim: Claim, who: &ServiceName, touched: &mut BTreeSet<ServiceName>) {
        let Some(claimants) = self.claims.get_mut(&claim) else { return };
        let Some(place) = claimants.iter().position(|other| &other.service == who) else { return };
        claimants.remove(place);
        if claimants.is_empty() {
            self.claims.remove(&claim);
        } else if place == 0 {
            touched.extend(claimants.iter().map(|other| other.service.clone()));
        }
    }

    /// Takes out of `plan` what `claim` stands for, and says who has it.
    fn take_from(&self, plan: &mut ServicePlan, claim: Claim) {
        let winner = &self.claims[&claim][0].service;
        match claim {
            Claim::ClusterIp(lost) => {
                plan.cluster_ips.retain(|address| *address != lost);
                for pool in &mut plan.pools {
                    pool.frontends.retain(
                        |f| !matches!(f, Frontend::ClusterIp { address, .. } if *address == lost),
                    );
                }
                let field = "spec.clusterIPs".to_owned();
                plan.diagnostics.push(conflict(plan, field, &lost.to_string(), winner));
            }
            Claim::NodePort(protocol, lost) => {
                for pool in plan.pools.iter_mut().filter(|pool| pool.protocol == protocol) {
                    pool.frontends
                        .retain(|f| !matches!(f, Frontend::NodePort { port } if *port == lost));
                }
                if let Some(firewall) = &mut plan.firewall {
                    firewall.node_ports.retain(|p| (p.protocol, p.port) != (protocol, lost));
                    if firewall.node_ports.is_empty() {
                        plan.firewall = None;
                    }
                }
                let field = "spec.ports[].nodePort".to_owned();
                let what = format!("{protocol} node port {lost}");
                plan.diagnostics.push(conflict(plan, field, &what, winner));
            }
        }
        plan.pools.retain(|pool| !pool.frontends.is_empty());
        plan.diagnostics.sort();
    }
}

fn conflict(plan: &ServicePlan, field: String, what: &str, winner: &ServiceName) -> Diagnostic {
    let service = plan.service();
    Diagnostic {
        object: ObjectRef {
            kind: ObjectKind::Service,
            namespace: service.namespace.clone(),
            name: service.name.clone(),
        },
        field,
        severity: Severity::Error,
        message: format!("{what} belongs to the older Service {winner}; not served for this one"),
    }
}
