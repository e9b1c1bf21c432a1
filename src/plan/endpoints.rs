//! Which endpoints of a Service port serve.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::model::{
    Backend, Endpoint, EndpointSlice, Family, Hints, NodeContext, Readiness, ServicePort,
};

/// The endpoints of one port in one family that serve.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Serving {
    /// For the policy `Cluster`: all nodes', as far as topology hints allow. Empty if not asked for.
    pub cluster: Vec<Backend>,
    /// For the policy `Local`: this node's. Empty if not asked for.
    pub local: Vec<Backend>,
    /// Whoever is ready, or terminates and still serves, on whatever node.
    pub lasting: Vec<Backend>,
    /// Whether any endpoint could serve, on whatever node.
    pub any: bool,
    /// The addresses of those on this node, sorted.
    pub here: Vec<IpAddr>,
    /// The addresses of endpoints on this node that are ready.
    pub ready_here: BTreeSet<IpAddr>,
}

/// Which lists are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub cluster: bool,
    pub local: bool,
    /// Whether each backend is to be listed as often as its weight says.
    pub weighted: bool,
}

/// What is known of a backend from all slices that have it.
#[derive(Debug)]
struct Known<'a> {
    readiness: Readiness,
    here: bool,
    weight: u8,
    hints: Option<&'a Hints>,
}

/// Chooses the endpoints of `port` as kube-proxy does (`CategorizeEndpoints` in
/// pkg/proxy/topology.go): ready ones, and where there is none, those that terminate but still
/// serve (KEP-1669).
pub(super) fn serving(
    port: &ServicePort,
    family: Family,
    slices: &[&EndpointSlice],
    node: &NodeContext,
    wanted: Wanted,
) -> Serving {
    let known = known(port, family, slices, node);
    let choose = |choose: &dyn Fn(&Known<'_>) -> bool| -> Vec<Backend> {
        known.iter().filter(|(_, known)| choose(known)).map(|(backend, _)| *backend).collect()
    };
    let ready = |known: &Known<'_>| known.readiness == Readiness::Ready;
    let leaving = |known: &Known<'_>| known.readiness == Readiness::ServingTerminating;

    let mut serving = Serving::default();
    if wanted.cluster {
        let near = nearness(&known.values().filter(|known| ready(known)), node);
        serving.cluster = choose(&|known| ready(known) && near.allows(known, node));
        if serving.cluster.is_empty() {
            serving.cluster = choose(&leaving);
        }
    }
    if wanted.local {
        serving.local = choose(&|known| ready(known) && known.here);
        if serving.local.is_empty() {
            serving.local = choose(&|known| leaving(known) && known.here);
        }
    }
    if wanted.weighted {
        for list in [&mut serving.cluster, &mut serving.local] {
            *list = weighted(list, &known);
        }
    }
    serving.lasting = choose(&|known| ready(known) || leaving(known));
    serving.any = !serving.lasting.is_empty();
    let ready_here = known.iter().filter(|(_, known)| ready(known) && known.here);
    serving.ready_here = ready_here.map(|(backend, _)| backend.address).collect();
    let lists = serving.cluster.iter().chain(&serving.local);
    let here = lists.filter(|backend| known[backend].here).map(|backend| backend.address);
    serving.here = here.collect();
    serving.here.sort_unstable();
    serving.here.dedup();
    serving
}

/// Repeats each backend as often as it must be to get its share: as rarely as the weights allow.
/// Weight 0 gets nothing, unless all have it.
fn weighted(list: &[Backend], known: &BTreeMap<Backend, Known<'_>>) -> Vec<Backend> {
    let divisor = list.iter().map(|backend| known[backend].weight).fold(0, greatest_common_divisor);
    if divisor == 0 {
        return list.to_vec();
    }
    let repeated = list.iter().flat_map(|backend| {
        std::iter::repeat_n(*backend, usize::from(known[backend].weight / divisor))
    });
    repeated.collect()
}

fn greatest_common_divisor(a: u8, b: u8) -> u8 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Every backend of the port. While a controller moves an endpoint between slices it stands in
/// both; what is said of it in the one in which it is readier holds (kubernetes/kubernetes#135593),
/// and it is here when either says so.
fn known<'a>(
    port: &ServicePort,
    family: Family,
    slices: &[&'a EndpointSlice],
    node: &NodeContext,
) -> BTreeMap<Backend, Known<'a>> {
    let mut all: BTreeMap<Backend, Known<'_>> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let of_port =
            |p: &&crate::model::SlicePort| p.name == port.name && p.protocol == port.protocol;
        let Some(slice_port) = slice.ports.iter().find(of_port) else { continue };
        for endpoint in &slice.endpoints {
            let backend = Backend { address: endpoint.address, port: slice_port.port.get() };
            let new = of(endpoint, node);
            all.entry(backend)
                .and_modify(|old| {
                    old.here |= new.here;
                    let better = (rank(new.readiness), new.hints, new.weight)
                        > (rank(old.readiness), old.hints, old.weight);
                    if better {
                        (old.readiness, old.hints) = (new.readiness, new.hints);
                        old.weight = new.weight;
                    }
                })
                .or_insert(new);
        }
    }
    all
}

fn of<'a>(endpoint: &'a Endpoint, node: &NodeContext) -> Known<'a> {
    Known {
        readiness: endpoint.readiness,
        here: endpoint.node.as_ref() == Some(&node.name),
        weight: endpoint.weight,
        hints: endpoint.hints.as_deref(),
    }
}

fn rank(readiness: Readiness) -> u8 {
    match readiness {
        Readiness::NotReady => 0,
        Readiness::ServingTerminating => 1,
        Readiness::Ready => 2,
    }
}

/// How near an endpoint must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nearness {
    SameNode,
    SameZone,
    Anywhere,
}

/// Hints count only if every ready endpoint has them and one of them is meant for here: a
/// controller that has not seen all endpoints yet must not leave a node without any.
fn nearness<'a>(
    ready: &(impl Iterator<Item = &'a Known<'a>> + Clone),
    node: &NodeContext,
) -> Nearness {
    let all_and_one = |list: fn(&Hints) -> &[std::sync::Arc<str>], wanted: &str| {
        let lists = ready.clone().map(|known| known.hints.map(list).unwrap_or_default());
        lists.clone().all(|list| !list.is_empty())
            && lists.into_iter().flatten().any(|name| &**name == wanted)
    };
    if all_and_one(|hints| &hints.nodes, &node.name) {
        return Nearness::SameNode;
    }
    match &node.node.zone {
        Some(zone) if all_and_one(|hints| &hints.zones, zone) => Nearness::SameZone,
        _ => Nearness::Anywhere,
    }
}

impl Nearness {
    fn allows(self, known: &Known<'_>, node: &NodeContext) -> bool {
        let Some(hints) = known.hints else { return self == Nearness::Anywhere };
        match self {
            Nearness::SameNode => hints.nodes.contains(&node.name),
            Nearness::SameZone => {
                node.node.zone.as_ref().is_some_and(|zone| hints.zones.contains(zone))
            }
            Nearness::Anywhere => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_shares() {
        let backend = |number: u8| Backend { address: [10, 0, 0, number].into(), port: 80 };
        let table: &[(&[u8], &[u8])] = &[
            (&[], &[]),
            (&[1, 1, 1], &[0, 1, 2]),
            (&[100, 100], &[0, 1]),
            (&[90, 10], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
            (&[2, 3, 4], &[0, 0, 1, 1, 1, 2, 2, 2, 2]),
            // Nobody new, but somebody must serve.
            (&[0, 5, 0], &[1]),
            (&[0, 0], &[0, 1]),
        ];
        for (weights, expected) in table {
            let known: BTreeMap<Backend, Known<'_>> = (0..)
                .zip(*weights)
                .map(|(number, weight)| {
                    let (readiness, here, hints) = (Readiness::Ready, false, None);
                    (backend(number), Known { readiness, here, weight: *weight, hints })
                })
                .collect();
            let list: Vec<Backend> = known.keys().copied().collect();
            let expected: Vec<Backend> = expected.iter().map(|number| backend(*number)).collect();
            assert_eq!(weighted(&list, &known), expected, "{weights:?}");
        }
    }
}
