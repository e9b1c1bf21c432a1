//! Open connections of sources that may no longer connect.
//!
//! The firewall only sees the first packet of a connection, so a source that loses its permission
//! would keep what it has open. After the transaction that takes the permission away, the
//! connections that would not be let in any more are deleted from connection tracking; their next
//! packet is a first packet again and is refused.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::Protocol;
use crate::netlink::Flow;
use crate::plan::{ServicePlan, Sources};
use crate::ruleset::Contribution;

/// Where connections are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Revocation {
    /// `IPPROTO_*`.
    protocol: u8,
    /// A load-balancer address; `None` for a node port.
    address: Option<IpAddr>,
    port: u16,
}

/// Whose firewall each place has, as of the last transaction. Places that everybody may reach are
/// not in it.
#[derive(Debug, Default)]
pub struct Guarded(HashMap<Revocation, Arc<ServicePlan>>);

impl Guarded {
    /// Takes that this is in force no more.
    pub fn release(&mut self, contribution: &Contribution) {
        for (place, _) in guards(contribution) {
            self.0.remove(&place);
        }
    }

    /// Takes that this is in force now.
    pub fn acquire(&mut self, contribution: &Contribution) {
        let Some(plan) = contribution.plan() else { return };
        self.0.extend(guards(contribution).map(|(place, _)| (place, Arc::clone(plan))));
    }

    /// Whether a connection is to one of `suspects`, a load-balancer address, and would not be let
    /// in.
    pub fn forbids_at_address(&self, suspects: &HashSet<Revocation>, flow: &Flow) -> bool {
        self.forbids(suspects, flow, Some(flow.destination))
    }

    /// The same for a node port.
    pub fn forbids_at_node_port(&self, suspects: &HashSet<Revocation>, flow: &Flow) -> bool {
        self.forbids(suspects, flow, None)
    }

    fn forbids(
        &self,
        suspects: &HashSet<Revocation>,
        flow: &Flow,
        address: Option<IpAddr>,
    ) -> bool {
        let Flow { protocol, destination_port: port, .. } = *flow;
        let place = Revocation { protocol, address, port };
        let plan = suspects.contains(&place).then(|| self.0.get(&place)).flatten();
        let sources = plan.and_then(|plan| match address {
            None => plan.firewall.as_ref().map(|firewall| &firewall.sources),
            Some(_) => plan.load_balancer_firewall.as_ref().map(|firewall| &firewall.sources),
        });
        sources.is_some_and(|sources| !sources.contains(flow.source))
    }
}

/// The places of a Service whose firewall lets in less after a change than before, and those that had
/// none of this Service: who may have connected to them is not known.
pub fn revocations(old: Option<&Contribution>, new: Option<&Contribution>) -> Vec<Revocation> {
    let before: HashMap<Revocation, &Sources> = old.into_iter().flat_map(guards).collect();
    let narrowed = |place: &Revocation, now: &Sources| {
        before.get(place).is_none_or(|before| lets_in_less(now, before))
    };
    let now = new.into_iter().flat_map(guards);
    now.filter(|(place, now)| narrowed(place, now)).map(|(place, _)| place).collect()
}

/// Every place that a firewall is at, with who may reach it.
fn guards(contribution: &Contribution) -> impl Iterator<Item = (Revocation, &Sources)> {
    let plan = contribution.plan().into_iter();
    let at = |protocol: Protocol, address, port| {
        let protocol = protocol.number();
        Revocation { protocol, address, port }
    };
    let node_ports = plan.clone().flat_map(|plan| &plan.firewall).flat_map(move |firewall| {
        let ports = firewall.node_ports.iter();
        ports.map(move |port| (at(port.protocol, None, port.port), &firewall.sources))
    });
    let addresses = plan.flat_map(|plan| &plan.load_balancer_firewall).flat_map(move |firewall| {
        let addresses = firewall.addresses.iter();
        addresses.map(move |to| (at(to.protocol, Some(to.address), to.port), &firewall.sources))
    });
    node_ports.chain(addresses)
}

/// Whether somebody may connect by `before` who may not by `now`.
fn lets_in_less(now: &Sources, before: &Sources) -> bool {
    match (now, before) {
        (_, Sources::Closed) => false,
        (Sources::Closed, Sources::Allow(before)) => !before.is_empty(),
        (Sources::Allow(now), Sources::Allow(before)) => !now.covers(before),
    }
}
