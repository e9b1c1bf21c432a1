//! Which endpoints there are: what upstream's caches make of slices that come, change and go,
//! against our index and our plans.
//!
//! A plan has no word for an endpoint that nobody is led to, so each one is looked at beside a
//! witness that terminates elsewhere: the witness serves unless the endpoint is ready.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::discovery::v1 as discovery;
use portcullis::model::{
    Endpoint, EndpointSlice, Family, Protocol, Readiness, Service, ServiceName, ServicePort,
    SliceName, SlicePort, TrafficPolicy,
};
use portcullis::plan::{Pool, ServicePlan};
use portcullis::watch::{Index, Options, lower};
use serde::Deserialize;

use crate::{Comparison, Differences, read};

const SLICES: &str = include_str!("../../upstream/facts/endpoint-slices.json");
const UPDATES: &str = include_str!("../../upstream/facts/endpoint-updates.json");
const ALTERATIONS: &str = include_str!("../../upstream/facts/slice-alterations.json");

const DIFFERENT: &Differences = &[];

/// What a proxy is told, and which endpoints it knows of by that.
#[derive(Deserialize)]
struct Case {
    line: String,
    node: Arc<str>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Step {
    slices: Vec<discovery::EndpointSlice>,
    #[serde(default)]
    removed: Vec<String>,
    /// The Service that is looked at; all where none is named.
    service: Option<String>,
    endpoints: Vec<Known>,
    /// How many addresses on the node are ready, of each Service that has one; `None` where nobody
    /// looks.
    local_ready: Option<BTreeMap<String, usize>>,
    /// The Services whose endpoints change by the step; `None` where nobody looks.
    changed: Option<BTreeSet<String>>,
}

#[derive(Deserialize)]
#[allow(clippy::struct_excessive_bools)] // as upstream's
struct Known {
    service: String,
    port: String,
    protocol: String,
    address: SocketAddr,
    local: bool,
    ready: bool,
    serving: bool,
    terminating: bool,
}

/// Another slice in the place of one.
#[derive(Deserialize)]
struct Alteration {
    line: String,
    before: discovery::EndpointSlice,
    after: discovery::EndpointSlice,
    changed: bool,
}

/// An endpoint of a Service port that can serve: Service, port, protocol, address.
type Place = (String, String, Protocol, SocketAddr);

/// When it does, and whether it is on the node.
type State = (Readiness, bool);

#[test]
fn slices_have_the_endpoints_that_upstream_finds() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for case in read::<Case>(SLICES)?.into_iter().chain(read(UPDATES)?) {
        let difference = case.difference().with_context(|| case.line.clone())?;
        comparison.case(&case.line, difference);
    }
    comparison.finish();
    Ok(())
}

#[test]
fn a_slice_changes_where_upstream_sees_a_change() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for Alteration { line, mut before, mut after, changed } in read(ALTERATIONS)? {
        // These slices do not say of which family they are, which no API server lets pass. We would
        // use nothing of them.
        for slice in [&mut before, &mut after] {
            ensure!(slice.address_type.is_empty(), "{line}: {}", slice.address_type);
            slice.address_type = "IPv4".to_owned();
        }
        let mut index = Index::new(&Options::new("node".into()));
        let slice = lower::slice(&before).context("a slice of a Service")?;
        let service = Service::new(slice.service.clone());
        index.set_service(&service.name.clone(), Some(service));
        index.set_slice(&slice.name.clone(), Some(slice));
        let found = !index.set_slice(&lower::slice_name(&after), lower::slice(&after)).is_empty();
        comparison.case(&line, (found != changed).then(|| format!("changed: {found}")));
    }
    comparison.finish();
    Ok(())
}

impl Case {
    /// What is different, if anything is.
    fn difference(&self) -> Result<Option<String>> {
        let mut slices: BTreeMap<SliceName, EndpointSlice> = BTreeMap::new();
        let mut index = Index::new(&Options::new(self.node.clone()));
        for step in &self.steps {
            let mut changed = BTreeSet::new();
            let removed = { slices.keys() }
                .filter(|name| step.removed.contains(&format!("{}/{}", name.namespace, name.name)));
            for name in removed.cloned().collect::<Vec<_>>() {
                slices.remove(&name);
                changed.extend(index.set_slice(&name, None));
            }
            for object in &step.slices {
                let slice = lower::slice(object).context("a slice of a Service")?;
                slices.insert(slice.name.clone(), slice.clone());
                // So that the index says what changes for it.
                index.set_service(&slice.service, Some(Service::new(slice.service.clone())));
                changed.extend(index.set_slice(&slice.name.clone(), Some(slice)));
            }
            let services = services(&slices);
            for service in services.values().cloned() {
                index.set_service(&service.name.clone(), Some(service));
            }
            if let Some(difference) = step.difference(&index, &slices, &changed, &self.node) {
                return Ok(Some(difference));
            }
        }
        Ok(None)
    }
}

impl Step {
    fn difference(
        &self,
        index: &Index,
        slices: &BTreeMap<SliceName, EndpointSlice>,
        changed: &BTreeSet<ServiceName>,
        node: &Arc<str>,
    ) -> Option<String> {
        let expected = self.expected();
        let looked_at =
            |(service, ..): &Place| self.service.as_ref().is_none_or(|one| one == service);
        let mut found = states(slices, node);
        found.retain(|place, _| looked_at(place));
        if found != expected {
            return Some(format!("{found:?}, not {expected:?}"));
        }
        // All together: whoever is ready serves, or else whoever terminates.
        let plans: Vec<ServicePlan> = index.plans().collect();
        for (of_local, list) in
            [(false, backends as fn(&Pool) -> Vec<SocketAddr>), (true, local_backends)]
        {
            let mut found: BTreeSet<Place> =
                plans.iter().flat_map(|plan| places(plan, list)).collect();
            found.retain(looked_at);
            let expected = chosen(&expected, of_local);
            if found != expected {
                return Some(format!("local: {of_local}, {found:?}, not {expected:?}"));
            }
        }
        let local_ready = plans.iter().filter_map(|plan| {
            let count = *plan.health_check.as_ref()?.local_endpoints.get(&Family::V4)?;
            (count > 0).then(|| (name(plan.service()), count))
        });
        let local_ready: BTreeMap<String, usize> = local_ready.collect();
        if self.local_ready.as_ref().is_some_and(|expected| *expected != local_ready) {
            return Some(format!("ready here: {local_ready:?}, not {:?}", self.local_ready));
        }
        // We may look at a Service without need, but have to look where something changes.
        let changed: BTreeSet<String> = changed.iter().map(name).collect();
        let missed = self.changed.as_ref().is_some_and(|expected| !expected.is_subset(&changed));
        missed.then(|| format!("changed: {changed:?}, not {:?}", self.changed))
    }

    /// Whoever can serve, in upstream's words.
    fn expected(&self) -> BTreeMap<Place, State> {
        let usable = self.endpoints.iter().filter_map(|one| {
            let readiness = match (one.ready, one.serving && one.terminating) {
                (true, _) => Readiness::Ready,
                (false, true) => Readiness::ServingTerminating,
                (false, false) => return None,
            };
            let protocol = Protocol::parse(&one.protocol).expect("a protocol");
            let place = (one.service.clone(), one.port.clone(), protocol, one.address);
            Some((place, (readiness, one.local)))
        });
        usable.collect()
    }
}

/// Whom each port's list is to have: of all endpoints or of those on the node.
fn chosen(states: &BTreeMap<Place, State>, of_local: bool) -> BTreeSet<Place> {
    let mut ready: BTreeSet<Place> = BTreeSet::new();
    let mut leaving: BTreeSet<Place> = BTreeSet::new();
    for (place, (readiness, local)) in states {
        if *local || !of_local {
            let list = if *readiness == Readiness::Ready { &mut ready } else { &mut leaving };
            list.insert(place.clone());
        }
    }
    let port = |place: &Place| (place.0.clone(), place.1.clone(), place.2);
    let served: BTreeSet<_> = ready.iter().map(port).collect();
    leaving.retain(|place| !served.contains(&port(place)));
    &ready | &leaving
}

/// The Services that the slices belong to, with every port that a slice has, and with both policies:
/// all endpoints at the ClusterIP, those of the node at the node port.
fn services(slices: &BTreeMap<SliceName, EndpointSlice>) -> BTreeMap<ServiceName, Service> {
    let mut services: BTreeMap<ServiceName, Service> = BTreeMap::new();
    let mut number = 0;
    for slice in slices.values() {
        let service = services.entry(slice.service.clone()).or_insert_with(|| Service {
            cluster_ips: vec!["10.96.0.1".parse().expect("an address")],
            external_traffic: TrafficPolicy::Local,
            health_check_port: NonZeroU16::new(32000),
            ..Service::new(slice.service.clone())
        });
        for port in &slice.ports {
            let known =
                |known: &ServicePort| (&known.name, known.protocol) == (&port.name, port.protocol);
            if !service.ports.iter().any(known) {
                number += 1;
                service.ports.push(ServicePort {
                    name: port.name.clone(),
                    protocol: port.protocol,
                    port: NonZeroU16::new(number).expect("not 0"),
                    node_port: NonZeroU16::new(30000 + number),
                });
            }
        }
    }
    services
}

/// Every endpoint that can serve, each looked at on its own beside the witness.
fn states(slices: &BTreeMap<SliceName, EndpointSlice>, node: &Arc<str>) -> BTreeMap<Place, State> {
    let all = slices.values().flat_map(|slice| &slice.endpoints).map(|endpoint| endpoint.address);
    let mut states = BTreeMap::new();
    for address in all.collect::<BTreeSet<_>>() {
        let mut index = Index::new(&Options::new(node.clone()));
        for (name, slice) in slices {
            let mut slice = slice.clone();
            slice.endpoints.retain(|endpoint| endpoint.address == address);
            index.set_slice(name, Some(slice));
        }
        for (name, service) in services(slices) {
            let witness = witness(&service);
            index.set_slice(&witness.name.clone(), Some(witness));
            index.set_service(&name, Some(service));
        }
        for plan in index.plans() {
            let serving: BTreeSet<Place> = places(&plan, backends).collect();
            let local: BTreeSet<Place> = places(&plan, local_backends).collect();
            for place in serving.iter().filter(|place| place.3 != WITNESS) {
                let beside =
                    serving.contains(&(place.0.clone(), place.1.clone(), place.2, WITNESS));
                let readiness =
                    if beside { Readiness::ServingTerminating } else { Readiness::Ready };
                states.insert(place.clone(), (readiness, local.contains(place)));
            }
        }
    }
    states
}

/// Where nobody of upstream's is.
const WITNESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

/// An endpoint of every port that terminates and serves, on no node.
fn witness(service: &Service) -> EndpointSlice {
    let port = NonZeroU16::new(WITNESS.port()).expect("not 0");
    let ports = service.ports.iter();
    EndpointSlice {
        name: SliceName { namespace: service.name.namespace.clone(), name: "witness".into() },
        service: service.name.clone(),
        family: Family::V4,
        ports: ports
            .map(|known| SlicePort { name: known.name.clone(), protocol: known.protocol, port })
            .collect(),
        endpoints: vec![Endpoint {
            readiness: Readiness::ServingTerminating,
            ..Endpoint::new(WITNESS.ip())
        }],
        diagnostics: Vec::new(),
    }
}

fn places(plan: &ServicePlan, list: fn(&Pool) -> Vec<SocketAddr>) -> impl Iterator<Item = Place> {
    plan.pools.iter().flat_map(move |pool| {
        let place =
            |address| (name(plan.service()), pool.port_name.to_string(), pool.protocol, address);
        list(pool).into_iter().map(place).collect::<Vec<_>>()
    })
}

fn backends(pool: &Pool) -> Vec<SocketAddr> {
    pool.backends.iter().map(|backend| (backend.address, backend.port).into()).collect()
}

fn local_backends(pool: &Pool) -> Vec<SocketAddr> {
    pool.local_backends.iter().map(|backend| (backend.address, backend.port).into()).collect()
}

fn name(service: &ServiceName) -> String {
    format!("{}/{}", service.namespace, service.name)
}
