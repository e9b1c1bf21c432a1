//! Clients that are remembered for an endpoint that serves them no more.
//!
//! Rules remember which endpoint a client got ([`crate::ruleset::Remember`]), and send it there again.
//! When the endpoint has left, they drop that first packet and forget the client, which costs it an
//! attempt. So the clients of an endpoint that leaves are forgotten before they come again, where that
//! can be done: finding them means listing all who are remembered, up to a million. That takes the
//! kernel half a minute; it is done on the thread of [`super::flows`], and deleting them between
//! other transactions.

use std::collections::{HashMap, HashSet};
use std::io;

use crate::model::{Family, TrafficPolicy};
use crate::netlink::{Batch, Data, Element, ElementDump, Error, SetDump, Socket};
use crate::plan::{Frontend, Pool};
use crate::ruleset::{Contribution, SetName, TABLE, affinity_key, affinity_value};

/// How many clients are forgotten in one transaction.
pub const AT_ONCE: usize = 1000;

/// A client that is to be forgotten: the family of the map, and the element's key.
pub type Forgotten = (Family, Vec<u8>);

/// Address, protocol and port of a frontend, or protocol and port of a node port, as in the maps' keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    family: Family,
    node_port: bool,
    key: Vec<u8>,
}

/// Who may be remembered for a place.
#[derive(Debug)]
struct Allowed {
    /// Whoever serves somebody there.
    all: HashSet<Vec<u8>>,
    /// Those of this node.
    local: HashSet<Vec<u8>>,
}

/// Who may be remembered, as of the last transaction.
#[derive(Debug, Default)]
pub struct Remembered(HashMap<Place, Allowed>);

/// Where clients may be remembered for somebody who does not serve them any more.
#[derive(Debug, Default)]
pub struct Lapsed {
    places: HashSet<Place>,
    /// Those of them that endpoints of other nodes do not serve any more, but to clients here. Who
    /// is here is not known, so everybody is forgotten who was served from elsewhere.
    only_local: HashSet<Place>,
    /// Also places that nobody has.
    anywhere: bool,
}

impl Remembered {
    /// Takes that this is in force no more.
    pub fn release(&mut self, contribution: &Contribution) {
        for (pool, frontend) in sticky(Some(contribution)) {
            self.0.remove(&place(pool, frontend));
        }
    }

    /// Takes that this is in force now.
    pub fn acquire(&mut self, contribution: &Contribution) {
        for (pool, frontend) in sticky(Some(contribution)) {
            self.0.insert(place(pool, frontend), Allowed::of(pool, frontend));
        }
    }

    /// Whether the client of this element of `family`'s map is to be forgotten.
    pub fn is_stale(&self, lapsed: &Lapsed, family: Family, element: &ElementDump) -> bool {
        let width = match family {
            Family::V4 => 4,
            Family::V6 => 16,
        };
        // The client comes first.
        let Some(address) = element.key.get(width..) else { return false };
        let Some(port) = address.get(width..) else { return false };
        let at = |node_port, key: &[u8]| Place { family, node_port, key: key.to_vec() };
        let places = [at(false, address), at(true, port)];
        // Whoever has the address comes before who has the node port.
        let held = places.iter().find_map(|place| Some((place, self.0.get(place)?)));
        let Some((place, allowed)) = held else {
            return lapsed.anywhere || places.iter().any(|place| lapsed.places.contains(place));
        };
        let Some(Data::Value(value)) = &element.data else { return true };
        if lapsed.only_local.contains(place) {
            return !allowed.local.contains(value);
        }
        let concerns = lapsed.anywhere || places.iter().any(|place| lapsed.places.contains(place));
        concerns && !allowed.all.contains(value)
    }
}

impl Allowed {
    fn of(pool: &Pool, frontend: &Frontend) -> Allowed {
        let local = || pool.local_backends.iter().map(affinity_value);
        let all = match frontend {
            Frontend::ClusterIp { .. } => {
                pool.serving(frontend).iter().map(affinity_value).collect()
            }
            // Clients here are served by all, whatever the policy.
            Frontend::External { .. } | Frontend::NodePort { .. } => {
                pool.backends.iter().map(affinity_value).chain(local()).collect()
            }
        };
        Allowed { all, local: local().collect() }
    }
}

impl Lapsed {
    /// Whether there is nobody to look for.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty() && !self.anywhere
    }

    /// Everybody counts, also where nobody serves: it is not known what was in force.
    pub fn look_anywhere(&mut self) {
        self.anywhere = true;
    }

    /// Notes what a change means for those who are remembered. Nothing, where nobody who serves goes.
    pub fn note(&mut self, old: Option<&Contribution>, next: Option<&Contribution>) {
        let of = |contribution| -> HashMap<Place, (&Pool, &Frontend)> {
            sticky(contribution).map(|(pool, f)| (place(pool, f), (pool, f))).collect()
        };
        let (old, next) = (of(old), of(next));
        for (place, (pool, frontend)) in &old {
            let before = Allowed::of(pool, frontend);
            let Some((pool_now, frontend_now)) = next.get(place) else {
                self.places.insert(place.clone());
                continue;
            };
            let external = !matches!(frontend, Frontend::ClusterIp { .. });
            let [was, is] = [pool.policy(frontend), pool_now.policy(frontend_now)];
            if external && (was, is) == (TrafficPolicy::Cluster, TrafficPolicy::Local) {
                self.only_local.insert(place.clone());
                self.places.insert(place.clone());
            }
            if !Allowed::of(pool_now, frontend_now).all.is_superset(&before.all) {
                self.places.insert(place.clone());
            }
        }
        // Somebody may be remembered there from a time before.
        self.places.extend(next.into_keys().filter(|place| !old.contains_key(place)));
    }

    /// Adds what another one says.
    pub fn extend(&mut self, other: Lapsed) {
        self.places.extend(other.places);
        self.only_local.extend(other.only_local);
        self.anywhere |= other.anywhere;
    }
}

/// Everybody who is remembered, by family.
///
/// # Errors
/// When the kernel does not list them.
pub fn list(socket: &mut Socket) -> Result<[Vec<ElementDump>; 2], Error> {
    let mut all = [Vec::new(), Vec::new()];
    for (listed, family) in all.iter_mut().zip(Family::ALL) {
        let mut set = SetDump::default();
        socket.list_elements(TABLE, &SetName::Affinity(family).name(), &mut set)?;
        *listed = set.elements;
    }
    Ok(all)
}

/// Those of `listed` who are to be forgotten.
pub fn select(
    listed: [Vec<ElementDump>; 2],
    is_stale: impl Fn(Family, &ElementDump) -> bool,
) -> Vec<Forgotten> {
    let all = Family::ALL.into_iter().zip(listed);
    let all = all.flat_map(|(family, elements)| elements.into_iter().map(move |e| (family, e)));
    let stale = all.filter(|(family, element)| is_stale(*family, element));
    stale.map(|(family, element)| (family, element.key)).collect()
}

/// Deletes these clients. Whom the kernel has forgotten by itself meanwhile is left out; of others
/// that it does not forget, the log tells.
pub fn forget(clients: Vec<Forgotten>, mut send: impl FnMut(Batch) -> Result<(), Error>) {
    let mut parts = vec![clients];
    // Each part is deleted, or becomes smaller.
    while let Some(part) = parts.pop() {
        if part.is_empty() {
            continue;
        }
        let mut batch = Batch::new(TABLE);
        for (family, key) in &part {
            batch.delete_element(&SetName::Affinity(*family).name(), &Element::key(key));
        }
        match send(batch) {
            Ok(()) => tracing::debug!(count = part.len(), "forgot clients"),
            // Their time was up.
            Err(Error::Refused(refusals))
                if refusals.iter().all(|r| r.error.kind() == io::ErrorKind::NotFound) =>
            {
                let (first, second) = part.split_at(part.len() / 2);
                if !first.is_empty() {
                    parts.extend([first.to_vec(), second.to_vec()]);
                }
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "clients may be sent to an endpoint that left",
            ),
        }
    }
}

fn place(pool: &Pool, frontend: &Frontend) -> Place {
    Place {
        family: pool.family,
        node_port: matches!(frontend, Frontend::NodePort { .. }),
        key: affinity_key(frontend, pool.protocol),
    }
}

/// The frontends that remember their clients.
fn sticky(contribution: Option<&Contribution>) -> impl Iterator<Item = (&Pool, &Frontend)> {
    let plan = contribution.and_then(Contribution::plan);
    let pools = plan.into_iter().flat_map(|plan| &plan.pools);
    let sticky = pools.filter(|pool| pool.affinity.is_some());
    sticky.flat_map(|pool| pool.frontends.iter().map(move |frontend| (pool, frontend)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        Endpoint, EndpointSlice, NodeContext, Protocol, Service, ServiceName, ServicePort,
        SliceName, SlicePort,
    };
    use crate::plan::plan_service;

    const CLIENT: [u8; 4] = [192, 0, 2, 10];

    /// A Service with session affinity, at a ClusterIP, an external address and a node port.
    fn service(endpoints: &[(u8, bool)], external: TrafficPolicy, sticky: bool) -> Contribution {
        let name = ServiceName::new("shop", "web");
        let service = Service {
            cluster_ips: vec![[10, 96, 0, 1].into()],
            external_ips: vec![[203, 0, 113, 1].into()],
            external_traffic: external,
            session_affinity: sticky.then(|| 60.try_into().unwrap()),
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 80.try_into().unwrap(),
                node_port: 30080.try_into().ok(),
            }],
            ..Service::new(name.clone())
        };
        let slice = EndpointSlice {
            name: SliceName { namespace: "shop".into(), name: "web-1".into() },
            service: name,
            family: Family::V4,
            ports: vec![SlicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 8080.try_into().unwrap(),
            }],
            endpoints: { endpoints.iter() }
                .map(|(number, here)| Endpoint {
                    node: here.then(|| "here".into()),
                    ..Endpoint::new([10, 244, 0, *number].into())
                })
                .collect(),
            diagnostics: Vec::new(),
        };
        let plan = plan_service(&service, &[slice], &NodeContext::new("here".into()));
        Contribution::service(plan.into(), |_| None)
    }

    /// The client is remembered for this endpoint at each of these destinations.
    fn listed(endpoint: u8) -> [Vec<ElementDump>; 2] {
        let of = |address: [u8; 4], port: u16| {
            let [high, low] = port.to_be_bytes();
            let tail = [[6, 0, 0, 0], [high, low, 0, 0]].concat();
            let value = [[10, 244, 0, endpoint], [0x1f, 0x90, 0, 0]].concat();
            ElementDump {
                key: [&CLIENT[..], &address, &tail].concat(),
                data: Some(Data::Value(value)),
                ..ElementDump::default()
            }
        };
        let all = [
            of([10, 96, 0, 1], 80),
            of([203, 0, 113, 1], 80),
            of([192, 168, 0, 1], 30080),
            of([10, 96, 0, 9], 80),
        ];
        [all.into(), Vec::new()]
    }

    /// Before, after, the endpoint that is remembered, and at which destinations it is forgotten.
    type Row<'a> = (Option<Contribution>, Option<Contribution>, u8, &'a [usize]);

    #[test]
    fn who_is_forgotten() {
        use TrafficPolicy::{Cluster, Local};
        let both: &[(u8, bool)] = &[(1, true), (2, false)];
        let here = &both[..1];
        let sticky = |endpoints, policy| Some(service(endpoints, policy, true));
        let table: Vec<Row<'_>> = vec![
            (sticky(both, Cluster), sticky(both, Cluster), 1, &[]),
            (sticky(both, Cluster), sticky(here, Cluster), 1, &[]),
            (sticky(both, Cluster), sticky(here, Cluster), 2, &[0, 1, 2]),
            (sticky(here, Cluster), sticky(both, Cluster), 2, &[]),
            // Clients outside are not served from elsewhere any more, though those here are.
            (sticky(both, Cluster), sticky(both, Local), 2, &[1, 2]),
            (sticky(both, Cluster), sticky(both, Local), 1, &[]),
            (sticky(both, Local), sticky(both, Local), 2, &[]),
            (sticky(both, Local), sticky(both, Cluster), 2, &[]),
            (sticky(both, Local), sticky(here, Local), 2, &[0, 1, 2]),
            // Nobody is remembered by a Service that does not ask for it, or is gone.
            (sticky(both, Cluster), Some(service(both, Cluster, false)), 1, &[0, 1, 2]),
            (sticky(both, Cluster), None, 1, &[0, 1, 2]),
            // Who was remembered before it came?
            (None, sticky(here, Cluster), 2, &[0, 1, 2]),
            (None, sticky(here, Cluster), 1, &[]),
        ];
        for (number, (old, new, endpoint, expected)) in table.into_iter().enumerate() {
            let mut remembered = Remembered::default();
            if let Some(old) = &old {
                remembered.acquire(old);
                remembered.release(old);
            }
            if let Some(new) = &new {
                remembered.acquire(new);
            }
            let mut lapsed = Lapsed::default();
            lapsed.note(old.as_ref(), new.as_ref());
            let listed = listed(endpoint);
            let keys = |wanted: &[usize]| -> Vec<Forgotten> {
                wanted.iter().map(|at| (Family::V4, listed[0][*at].key.clone())).collect()
            };
            let forgotten = |lapsed: &Lapsed| {
                select(listed.clone(), |family, e| remembered.is_stale(lapsed, family, e))
            };
            assert_eq!(forgotten(&lapsed), keys(expected), "row {number}");
            // Where it is not known what was before, nobody is kept whom nobody asks for.
            lapsed.look_anywhere();
            let anywhere = [expected, &[3]].concat();
            assert_eq!(forgotten(&lapsed), keys(&anywhere), "row {number}");
        }
    }
}
