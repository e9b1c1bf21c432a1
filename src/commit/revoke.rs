//! Open connections of sources that may no longer connect.
//!
//! The firewall only sees the first packet of a connection, so a source that loses its permission
//! would keep what it has open. After the transaction that takes the permission away, the
//! connections that would not be let in any more are deleted from connection tracking; their next
//! packet is a first packet again and is refused.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::netlink::Flow;
use crate::plan::{Firewall, ServicePlan, Sources};
use crate::ruleset::Contribution;

/// A node port whose open connections are to be looked at: protocol number and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Revocation(pub(super) u8, pub(super) u16);

/// Whose firewall each node port has, as of the last transaction. Node ports that everybody may
/// reach are not in it.
#[derive(Debug, Default)]
pub struct Guarded(HashMap<Revocation, Arc<ServicePlan>>);

impl Guarded {
    /// Takes that this is in force no more.
    pub fn release(&mut self, contribution: &Contribution) {
        for port in firewall(contribution).into_iter().flat_map(all) {
            self.0.remove(&port);
        }
    }

    /// Takes that this is in force now.
    pub fn acquire(&mut self, contribution: &Contribution) {
        let Some(plan) = contribution.plan() else { return };
        let ports = plan.firewall.iter().flat_map(all);
        self.0.extend(ports.map(|port| (port, Arc::clone(plan))));
    }

    /// Whether a connection is to one of `suspects`, a node port, and would not be let in.
    pub fn forbids(&self, suspects: &HashSet<Revocation>, flow: &Flow) -> bool {
        let port = Revocation(flow.protocol, flow.destination_port);
        suspects.contains(&port)
            && self
                .0
                .get(&port)
                .and_then(|plan| plan.firewall.as_ref())
                .is_some_and(|firewall| !firewall.sources.contains(flow.source))
    }
}

/// The node ports of a Service whose firewall lets in less after a change than before, and those
/// that had none of this Service: who may have connected to them is not known.
pub fn revocations(old: Option<&Contribution>, new: Option<&Contribution>) -> Vec<Revocation> {
    let old = old.and_then(firewall);
    let Some(new) = new.and_then(firewall) else { return Vec::new() };
    if old == Some(new) {
        return Vec::new();
    }
    let narrowed = |port: &Revocation| {
        let before = old.filter(|old| all(old).any(|own| own == *port));
        before.is_none_or(|before| lets_in_less(&new.sources, &before.sources))
    };
    all(new).filter(narrowed).collect()
}

/// All ports of a firewall.
fn all(firewall: &Firewall) -> impl Iterator<Item = Revocation> + '_ {
    firewall.node_ports.iter().map(|port| Revocation(port.protocol.number(), port.port))
}

/// Whether somebody may connect by `before` who may not by `now`.
fn lets_in_less(now: &Sources, before: &Sources) -> bool {
    match (now, before) {
        (_, Sources::Closed) => false,
        (Sources::Closed, Sources::Allow(before)) => !before.is_empty(),
        (Sources::Allow(now), Sources::Allow(before)) => !now.covers(before),
    }
}

fn firewall(contribution: &Contribution) -> Option<&Firewall> {
    contribution.plan()?.firewall.as_ref()
}
