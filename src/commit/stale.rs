//! Flows of protocols that nobody closes, to endpoints that serve no more.
//!
//! A TCP connection to an endpoint that left ends, one way or another. A UDP client that goes on
//! sending from its port keeps its entry in connection tracking alive, and with it the translation
//! to an address where nobody is; an SCTP client that starts anew does the same. So such flows are
//! deleted. Those of endpoints that terminate and still serve go on.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::{Backend, Family, Protocol};
use crate::netlink::Flow;
use crate::plan::{Frontend, Pool};
use crate::ruleset::{Contribution, SetName};

/// What such a flow is made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    family: Family,
    protocol: u8,
    /// `None` for a node port.
    address: Option<IpAddr>,
    port: u16,
}

/// Who serves each destination, as of the last transaction.
#[derive(Debug, Default)]
pub struct Served(HashMap<Destination, Arc<HashSet<Backend>>>);

impl Served {
    /// Takes that this is in force no more.
    pub fn release(&mut self, contribution: &Contribution) {
        for (destination, _) in destinations(contribution) {
            self.0.remove(&destination);
        }
    }

    /// Takes that this is in force now.
    pub fn acquire(&mut self, contribution: &Contribution) {
        for pool in pools(contribution) {
            let serving: Arc<HashSet<Backend>> = Arc::new(pool.lasting.iter().copied().collect());
            let destinations = destinations_of(pool);
            self.0.extend(destinations.map(|destination| (destination, Arc::clone(&serving))));
        }
    }

    /// Whether a flow is to one of `suspects` and led to somebody who does not serve it, or was
    /// `left` by somebody who is not there any more.
    pub fn forbids(
        &self,
        suspects: &HashSet<Destination>,
        left: &Left,
        flow: &Flow,
        family: Family,
        at_node_port: bool,
    ) -> bool {
        let (protocol, port) = (flow.protocol, flow.destination_port);
        let at = |address| Destination { family, protocol, address, port };
        let by_address = at(Some(flow.destination));
        let by_node_port = at_node_port.then_some(at(None));
        let all = [Some(by_address), by_node_port].into_iter().flatten();
        // Whoever has the address comes before who has the node port.
        let answering = Backend { address: flow.answering.0, port: flow.answering.1 };
        let Some(serving) = all.clone().find_map(|destination| self.0.get(&destination)) else {
            // Nobody has it any more. What was never translated is none of ours.
            let was_ours = |at: Destination| suspects.contains(&at) || left.led(&at, &answering);
            return flow.translated && { all }.any(was_ours);
        };
        { all }.any(|destination| suspects.contains(&destination)) && !serving.contains(&answering)
    }
}

/// Whom each destination led to in a table that was found: of a Service that went while nobody
/// looked, nothing else tells. Whoever else translates connections to such a destination by now
/// leads them elsewhere.
#[derive(Debug, Default)]
pub struct Left(HashMap<Destination, HashSet<Backend>>);

impl Left {
    /// Takes an endpoint that was in `map`; `key` is its key there without the slot.
    pub fn add(&mut self, map: &SetName, key: &[u8], backend: Backend) {
        let destination = Destination::parse(map, key);
        let lasts = |destination: &Destination| destination.protocol != Protocol::Tcp.number();
        if let Some(destination) = destination.filter(lasts) {
            self.0.entry(destination).or_default().insert(backend);
        }
    }

    /// Takes that this is wanted, though it is not in force.
    pub fn spare(&mut self, contribution: &Contribution) {
        for (destination, _) in destinations(contribution) {
            self.0.remove(&destination);
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds those of another table.
    pub fn extend(&mut self, other: Left) {
        for (destination, backends) in other.0 {
            self.0.entry(destination).or_default().extend(backends);
        }
    }

    fn led(&self, destination: &Destination, to: &Backend) -> bool {
        self.0.get(destination).is_some_and(|backends| backends.contains(to))
    }
}

impl Destination {
    /// What leads to an endpoint in `map`, by its key there; `None` for other maps.
    fn parse(map: &SetName, key: &[u8]) -> Option<Destination> {
        let (family, address, rest): (Family, Option<IpAddr>, &[u8]) = match *map {
            SetName::Endpoints(Family::V4) => {
                let (address, rest) = key.split_first_chunk::<4>()?;
                (Family::V4, Some((*address).into()), rest)
            }
            SetName::Endpoints(Family::V6) => {
                let (address, rest) = key.split_first_chunk::<16>()?;
                (Family::V6, Some((*address).into()), rest)
            }
            SetName::NodePortEndpoints(family) => (family, None, key),
            _ => return None,
        };
        // Fields are padded to four bytes.
        let [protocol, _, _, _, high, low, ..] = *rest else { return None };
        Some(Destination { family, protocol, address, port: u16::from_be_bytes([high, low]) })
    }
}

/// Where somebody served before a change who does not serve after it, and what was served by nobody
/// before: a flow to there may have been led elsewhere.
pub fn unserved(old: Option<&Contribution>, new: Option<&Contribution>) -> Vec<Destination> {
    if pools_of(old).next().is_none() && pools_of(new).next().is_none() {
        return Vec::new();
    }
    let of = |contribution: Option<&Contribution>| -> HashMap<Destination, HashSet<Backend>> {
        let all = contribution.into_iter().flat_map(destinations);
        all.map(|(destination, pool)| (destination, pool.lasting.iter().copied().collect()))
            .collect()
    };
    let (old, new) = (of(old), of(new));
    let lost = old.iter().filter(|(destination, before)| {
        !new.get(destination).is_some_and(|now| now.is_superset(before))
    });
    let come = new.keys().filter(|destination| !old.contains_key(destination));
    lost.map(|(destination, _)| *destination).chain(come.copied()).collect()
}

fn pools_of(contribution: Option<&Contribution>) -> impl Iterator<Item = &Pool> {
    contribution.into_iter().flat_map(pools)
}

/// The pools whose flows nobody closes.
fn pools(contribution: &Contribution) -> impl Iterator<Item = &Pool> {
    let pools = contribution.plan().into_iter().flat_map(|plan| &plan.pools);
    pools.filter(|pool| pool.protocol != Protocol::Tcp)
}

fn destinations(contribution: &Contribution) -> impl Iterator<Item = (Destination, &Pool)> {
    pools(contribution).flat_map(|pool| destinations_of(pool).map(move |at| (at, pool)))
}

fn destinations_of(pool: &Pool) -> impl Iterator<Item = Destination> + '_ {
    pool.frontends.iter().map(|frontend| {
        let (address, port) = match *frontend {
            Frontend::ClusterIp { address, port } | Frontend::External { address, port } => {
                (Some(address), port)
            }
            Frontend::NodePort { port } => (None, port),
        };
        Destination { family: pool.family, protocol: pool.protocol.number(), address, port }
    })
}
