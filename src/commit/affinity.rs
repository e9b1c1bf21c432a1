//! Clients that are remembered for an endpoint that serves them no more.
//!
//! Rules remember which endpoint a client got ([`crate::ruleset::Remember`]). When an endpoint
//! leaves, the clients that got it are forgotten, or they would be sent there until their time is
//! up.

use std::collections::{HashMap, HashSet};

use crate::model::Family;
use crate::netlink::{Batch, Data, Element, ElementDump, Error, SetDump, Socket};
use crate::plan::{Frontend, Pool, ServicePlan};
use crate::ruleset::{Contribution, SetName, TABLE, affinity_key, affinity_value};

/// How many clients are forgotten in one transaction.
const AT_ONCE: usize = 1000;

/// Whom clients of some frontends may be remembered for.
#[derive(Debug, Default)]
pub(super) struct Review {
    /// Of address, protocol and port, the keys of the maps.
    by_address: HashMap<(Family, Vec<u8>), HashSet<Vec<u8>>>,
    /// Of protocol and port, at any address that is in none of the above.
    by_node_port: HashMap<(Family, Vec<u8>), HashSet<Vec<u8>>>,
}

impl Review {
    /// Notes what a change means for those who are remembered: of the frontends that had them, and
    /// of those that will. Nothing, where nobody who serves goes.
    pub fn note(&mut self, old: Option<&Contribution>, next: Option<&Contribution>) {
        let plan = |contribution: Option<&Contribution>| {
            contribution.and_then(Contribution::plan).cloned()
        };
        let (old, next) = (plan(old), plan(next));
        if old.as_deref().is_some_and(|old| !loses(old, next.as_deref())) {
            return;
        }
        for (pool, frontend) in sticky(old.as_deref()) {
            self.allowed(pool, frontend);
        }
        for (pool, frontend) in sticky(next.as_deref()) {
            let backends = pool.backends.iter().chain(&pool.local_backends);
            let values: Vec<Vec<u8>> = backends.map(affinity_value).collect();
            self.allowed(pool, frontend).extend(values);
        }
    }

    fn allowed(&mut self, pool: &Pool, frontend: &Frontend) -> &mut HashSet<Vec<u8>> {
        let key = (pool.family, affinity_key(frontend, pool.protocol));
        match frontend {
            Frontend::NodePort { .. } => self.by_node_port.entry(key).or_default(),
            _ => self.by_address.entry(key).or_default(),
        }
    }

    fn is_empty(&self) -> bool {
        self.by_address.is_empty() && self.by_node_port.is_empty()
    }

    /// Forgets who is remembered for somebody else. Gives how many that were.
    ///
    /// # Errors
    /// When the kernel does not list them, or does not delete them.
    pub fn carry_out(&self, socket: &mut Socket) -> Result<usize, Error> {
        if self.is_empty() {
            return Ok(0);
        }
        let mut forgotten = 0;
        for family in Family::ALL {
            let map = SetName::Affinity(family).name();
            let mut listed = SetDump::default();
            socket.list_elements(TABLE, &map, &mut listed)?;
            let stale: Vec<Vec<u8>> = listed
                .elements
                .into_iter()
                .filter(|element| self.is_stale(family, element))
                .map(|element| element.key)
                .collect();
            for chunk in stale.chunks(AT_ONCE) {
                forgotten += delete(socket, &map, chunk)?;
            }
        }
        Ok(forgotten)
    }

    fn is_stale(&self, family: Family, element: &ElementDump) -> bool {
        let width = match family {
            Family::V4 => 4,
            Family::V6 => 16,
        };
        // The client comes first.
        let Some(address) = element.key.get(width..) else { return false };
        let Some(node_port) = address.get(width..) else { return false };
        let of = |map: &HashMap<_, HashSet<Vec<u8>>>, key: &[u8]| -> Option<bool> {
            let allowed = map.get(&(family, key.to_vec()))?;
            let Some(Data::Value(value)) = &element.data else { return Some(true) };
            Some(!allowed.contains(value))
        };
        of(&self.by_address, address).or_else(|| of(&self.by_node_port, node_port)).unwrap_or(false)
    }
}

/// Whether somebody who may be remembered serves no more, or is not to be remembered any more.
fn loses(old: &ServicePlan, next: Option<&ServicePlan>) -> bool {
    let serving = |plan| -> HashSet<(Family, Vec<u8>, Vec<u8>)> {
        sticky(Some(plan))
            .flat_map(|(pool, frontend)| {
                let key = affinity_key(frontend, pool.protocol);
                let backends = pool.backends.iter().chain(&pool.local_backends);
                backends.map(move |backend| (pool.family, key.clone(), affinity_value(backend)))
            })
            .collect()
    };
    let old = serving(old);
    !old.is_empty() && !next.is_some_and(|next| serving(next).is_superset(&old))
}

/// The frontends of a plan that remember their clients.
fn sticky(plan: Option<&ServicePlan>) -> impl Iterator<Item = (&Pool, &Frontend)> {
    let pools = plan.into_iter().flat_map(|plan| &plan.pools);
    let sticky = pools.filter(|pool| pool.affinity.is_some());
    sticky.flat_map(|pool| pool.frontends.iter().map(move |frontend| (pool, frontend)))
}

/// Deletes elements of which some may be gone when the kernel gets to it, because their time is up.
fn delete(socket: &mut Socket, map: &str, keys: &[Vec<u8>]) -> Result<usize, Error> {
    let mut batch = Batch::new(TABLE);
    for key in keys {
        batch.delete_element(map, &Element::key(key));
    }
    match socket.commit(batch) {
        Ok(()) => Ok(keys.len()),
        Err(Error::Refused(refusals))
            if refusals.iter().all(|r| r.error.kind() == std::io::ErrorKind::NotFound) =>
        {
            let (first, second) = keys.split_at(keys.len() / 2);
            if first.is_empty() {
                return Ok(0);
            }
            Ok(delete(socket, map, first)? + delete(socket, map, second)?)
        }
        Err(error) => Err(error),
    }
}
