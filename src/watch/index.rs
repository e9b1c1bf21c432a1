//! Everything that the proxy has been told, found by Service.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{
    Diagnostic, EndpointSlice, Node, NodeContext, NodePortAddresses, ObjectRef, Service,
    ServiceCidr, ServiceName, Severity, SliceName, SourceRestriction,
};
use crate::plan::{ServicePlan, plan_service};

use super::{Options, lower};

/// The Services, their slices and the node, as of the last event of their source.
///
/// What [`plan`](Index::plan) gives depends on what is in the index alone, not on how it came
/// there. A change costs the slices of the Services that it touches, not what exists.
#[derive(Clone, Debug)]
pub struct Index {
    context: NodeContext,
    // Boxes, because a third of the places in either are empty.
    services: BTreeMap<ServiceName, Box<Service>>,
    slices: HashMap<SliceName, Box<EndpointSlice>>,
    /// The slices of each Service, sorted, be there such a Service or not. No entry is empty. A list
    /// and not a set: most have one slice, and the smallest set has room for eleven.
    slices_of: HashMap<ServiceName, Vec<SliceName>>,
    service_cidrs: BTreeMap<Arc<str>, ServiceCidr>,
    /// As [`Options::external_ips`].
    external_ips: bool,
}

impl Index {
    /// An index of nothing: no Service, no slice, no Node.
    pub fn new(options: &Options) -> Index {
        let mut index = Index {
            context: NodeContext {
                nodeport_addresses: options.nodeport_addresses.clone(),
                local_traffic: options.local_traffic.clone(),
                masquerade_all: options.masquerade_all,
                localhost_nodeports: options.localhost_nodeports,
                ..NodeContext::new(options.node_name.clone())
            },
            services: BTreeMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            service_cidrs: BTreeMap::new(),
            external_ips: options.external_ips,
        };
        index.set_node(Node::default());
        index
    }

    /// Replaces a Service, or removes it. Returns whether that changes anything.
    pub fn set_service(&mut self, name: &ServiceName, mut service: Option<Service>) -> bool {
        debug_assert!(service.as_ref().is_none_or(|service| &service.name == name));
        // Here, because every source comes this way.
        if !self.external_ips
            && let Some(service) = &mut service
        {
            withhold_external_ips(service);
        }
        if self.services.get(name).map(Box::as_ref) == service.as_ref() {
            return false;
        }
        match service {
            Some(mut service) => {
                // One copy of the name: that of the slices, where there are some.
                let known = self.slices_of.get_key_value(name);
                service.name = known.map_or(name, |(name, _)| name).clone();
                self.services.insert(service.name.clone(), Box::new(service))
            }
            None => self.services.remove(name),
        };
        true
    }

    /// Replaces a slice, or removes it. Returns the Services whose plan may change by that: the
    /// ones that the slice belonged to and belongs to now, as far as they are here; none if the
    /// slice is what it was.
    pub fn set_slice(
        &mut self,
        name: &SliceName,
        slice: Option<EndpointSlice>,
    ) -> BTreeSet<ServiceName> {
        debug_assert!(slice.as_ref().is_none_or(|slice| &slice.name == name));
        if self.slices.get(name).map(Box::as_ref) == slice.as_ref() {
            return BTreeSet::new();
        }
        let mut owners = BTreeSet::new();
        if let Some(old) = self.slices.remove(name) {
            if let Some(slices) = self.slices_of.get_mut(&old.service) {
                if let Ok(place) = slices.binary_search(name) {
                    slices.remove(place);
                }
                if slices.is_empty() {
                    self.slices_of.remove(&old.service);
                }
            }
            owners.insert(old.service);
        }
        if let Some(mut slice) = slice {
            // One copy of each name.
            slice.name = name.clone();
            if let Some(known) = self.services.get(&slice.service) {
                slice.service = known.name.clone();
            }
            let slices = self.slices_of.entry(slice.service.clone());
            let slices = slices.or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = slices.binary_search(name) {
                slices.insert(place, name.clone());
            }
            owners.insert(slice.service.clone());
            self.slices.insert(name.clone(), Box::new(slice));
        }
        owners.retain(|service| self.services.contains_key(service));
        owners
    }

    /// Replaces the node; [`Node::default`] where there is none. Returns the Services whose plan
    /// may change by that, or `None` if the node is what it was.
    pub fn set_node(&mut self, mut node: Node) -> Option<BTreeSet<ServiceName>> {
        let primary = matches!(self.context.nodeport_addresses, NodePortAddresses::Primary);
        if primary && node.primary_addresses.is_empty() {
            node.diagnostics.push(lower::no_primary_addresses(&self.context.name));
        }
        if self.context.node == node {
            return None;
        }
        let moved = self.context.node.zone != node.zone;
        let renumbered = self.context.node.primary_addresses != node.primary_addresses;
        self.context.node = node;
        let touched = self.services.values().filter(|service| {
            let has_hints = || {
                let mut slices = self.slices_of(&service.name);
                slices.any(|slice| slice.endpoints.iter().any(|e| e.hints.is_some()))
            };
            let asks_for_node = service.load_balancer_sources != SourceRestriction::Unrestricted;
            renumbered && asks_for_node || moved && has_hints()
        });
        Some(touched.map(|service| service.name.clone()).collect())
    }

    /// Replaces a `ServiceCIDR`, or removes it. Returns whether that changes anything about the
    /// node; no plan of a Service depends on it.
    pub fn set_service_cidr(&mut self, name: &Arc<str>, cidr: Option<ServiceCidr>) -> bool {
        match cidr {
            Some(cidr) => self.service_cidrs.insert(name.clone(), cidr),
            None => self.service_cidrs.remove(name),
        };
        let all = self.service_cidrs.values();
        let cidrs: Vec<IpNet> = all.clone().flat_map(|one| one.cidrs.iter().copied()).collect();
        let diagnostics: Vec<_> = all.flat_map(|one| one.diagnostics.iter().cloned()).collect();
        let context = &mut self.context;
        let changed =
            context.service_cidrs != cidrs || context.service_cidr_diagnostics != diagnostics;
        (context.service_cidrs, context.service_cidr_diagnostics) = (cidrs, diagnostics);
        changed
    }

    /// What planning needs to know of the node.
    pub fn context(&self) -> &NodeContext {
        &self.context
    }

    /// Whether there is such a Service.
    pub fn contains(&self, service: &ServiceName) -> bool {
        self.services.contains_key(service)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(Box::as_ref)
    }

    /// The slices of one Service, by name.
    pub fn slices_of(&self, service: &ServiceName) -> impl Iterator<Item = &EndpointSlice> {
        let names = self.slices_of.get(service).into_iter().flatten();
        names.filter_map(|name| self.slices.get(name).map(Box::as_ref))
    }

    /// What is to be done for one Service; `None` where there is no such Service.
    pub fn plan(&self, service: &ServiceName) -> Option<ServicePlan> {
        self.services.get(service).map(|service| self.plan_of(service))
    }

    /// What is to be done for each Service, by name.
    pub fn plans(&self) -> impl Iterator<Item = ServicePlan> + '_ {
        self.services.values().map(|service| self.plan_of(service))
    }

    fn plan_of(&self, service: &Service) -> ServicePlan {
        plan_service(service, self.slices_of(&service.name), &self.context)
    }
}

/// Makes it a Service without `externalIPs`.
fn withhold_external_ips(service: &mut Service) {
    if std::mem::take(&mut service.external_ips).is_empty() {
        return;
    }
    service.diagnostics.push(Diagnostic {
        object: ObjectRef::service(&service.name),
        field: "spec.externalIPs".to_owned(),
        severity: Severity::Warning,
        message: "not served, by configuration (--no-external-ips, AllowServiceExternalIPs)".into(),
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Endpoint, Family, Protocol, ServicePort, SlicePort};

    fn options() -> Options {
        Options::new("worker".into())
    }

    fn service(name: &ServiceName, port: u16) -> Service {
        Service {
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: port.try_into().unwrap(),
                node_port: None,
            }],
            ..Service::new(name.clone())
        }
    }

    fn slice(name: &SliceName, service: &ServiceName, address: u8) -> EndpointSlice {
        EndpointSlice {
            name: name.clone(),
            service: service.clone(),
            family: Family::V4,
            ports: vec![SlicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: 8080.try_into().unwrap(),
            }],
            endpoints: vec![Endpoint::new([10, 0, 0, address].into())],
            diagnostics: Vec::new(),
        }
    }

    fn service_name(number: u8) -> ServiceName {
        ServiceName::new("shop", format!("service-{number}"))
    }

    fn slice_name(number: u8) -> SliceName {
        SliceName { namespace: "shop".into(), name: Arc::from(format!("slice-{number}")) }
    }

    /// A change: to the Service or slice of this number.
    #[derive(Clone, Debug)]
    enum Step {
        Service(u8, Option<u16>),
        Slice(u8, Option<(u8, u8)>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let one = prop_oneof![
            (0..4u8, prop::option::of(1..4u16)).prop_map(|(n, port)| Step::Service(n, port)),
            (0..4u8, prop::option::of((0..4u8, 1..4u8))).prop_map(|(n, s)| Step::Slice(n, s)),
        ];
        prop::collection::vec(one, 0..60)
    }

    proptest! {
        /// Whatever the way, the same objects give the same plans; and nobody's plan changes who
        /// is not named.
        #[test]
        fn only_what_is_in_it_counts(steps in steps()) {
            let mut index = Index::new(&options());
            let mut services = BTreeMap::new();
            let mut slices = BTreeMap::new();
            for step in steps {
                let before: BTreeMap<_, _> =
                    index.plans().map(|plan| (plan.service().clone(), plan)).collect();
                let touched = match step {
                    Step::Service(number, port) => {
                        let name = service_name(number);
                        let value = port.map(|port| service(&name, port));
                        services.insert(name.clone(), value.clone());
                        let changed = index.set_service(&name, value);
                        changed.then_some(name).into_iter().collect()
                    }
                    Step::Slice(number, value) => {
                        let name = slice_name(number);
                        let value = value
                            .map(|(owner, address)| slice(&name, &service_name(owner), address));
                        slices.insert(name.clone(), value.clone());
                        index.set_slice(&name, value)
                    }
                };
                let after: BTreeMap<_, _> =
                    index.plans().map(|plan| (plan.service().clone(), plan)).collect();
                for name in before.keys().chain(after.keys()) {
                    let same = before.get(name) == after.get(name);
                    prop_assert!(same || touched.contains(name), "{} changed unsaid", name);
                }
                for name in &touched {
                    prop_assert!(before.contains_key(name) || after.contains_key(name));
                }
            }
            let mut fresh = Index::new(&options());
            for (name, value) in slices.into_iter().rev() {
                fresh.set_slice(&name, value);
            }
            for (name, value) in services {
                fresh.set_service(&name, value);
            }
            let (all, expected): (Vec<_>, Vec<_>) =
                (index.plans().collect(), fresh.plans().collect());
            prop_assert_eq!(&all, &expected);
            for plan in all {
                prop_assert_eq!(index.plan(plan.service()), Some(plan));
            }
            prop_assert_eq!(index.slices.len(), fresh.slices.len());
            prop_assert_eq!(index.slices_of, fresh.slices_of);
        }
    }

    #[test]
    fn says_what_a_slice_touches() {
        let mut index = Index::new(&options());
        let (a, b, name) = (service_name(0), service_name(1), slice_name(0));
        // Nobody is there whose plan could change.
        assert_eq!(index.set_slice(&name, Some(slice(&name, &a, 1))), BTreeSet::new());
        assert!(index.set_service(&a, Some(service(&a, 80))));
        assert!(!index.set_service(&a, Some(service(&a, 80))));
        assert!(index.set_service(&b, Some(service(&b, 80))));
        assert_eq!(index.plan(&a).unwrap().pools[0].backends.len(), 1);
        for (value, expected) in [
            (Some(slice(&name, &a, 1)), vec![]),
            (Some(slice(&name, &a, 2)), vec![&a]),
            (Some(slice(&name, &b, 2)), vec![&a, &b]),
            (None, vec![&b]),
            (None, vec![]),
        ] {
            let got = index.set_slice(&name, value.clone());
            assert_eq!(got.iter().collect::<Vec<_>>(), expected, "{value:?}");
        }
        assert_eq!(index.plan(&b).unwrap().pools[0].backends, []);
        assert!(index.set_service(&a, None));
        assert_eq!(index.plan(&a), None);
    }

    #[test]
    fn a_node_without_addresses_is_said_where_it_matters() {
        let mut index = Index::new(&options());
        assert_eq!(index.context().node.diagnostics.len(), 1);
        assert_eq!(index.set_node(Node::default()), None);
        let known =
            Node { primary_addresses: vec!["10.0.0.1".parse().unwrap()], ..Node::default() };
        assert_eq!(index.set_node(known.clone()), Some(BTreeSet::new()));
        assert_eq!(index.set_node(known.clone()), None);
        assert_eq!(index.context().node, known);
        assert_eq!(index.set_node(Node::default()), Some(BTreeSet::new()));
        assert_eq!(index.context().node.diagnostics.len(), 1);

        let cidrs = NodePortAddresses::Cidrs(Vec::new());
        let index = Index::new(&Options { nodeport_addresses: cidrs, ..options() });
        assert_eq!(index.context().node, Node::default());
    }

    #[test]
    fn external_addresses_can_be_closed() {
        let name = service_name(0);
        let external =
            Service { external_ips: vec!["203.0.113.1".parse().unwrap()], ..service(&name, 80) };
        for (external_ips, frontends, expected) in
            [(true, 2, None), (false, 1, Some("spec.externalIPs"))]
        {
            let mut index = Index::new(&Options { external_ips, ..options() });
            assert!(index.set_service(&name, Some(external.clone())));
            assert!(!index.set_service(&name, Some(external.clone())));
            let plan = index.plan(&name).unwrap();
            assert_eq!(plan.pools[0].frontends.len(), frontends);
            let said = plan.diagnostics.iter().find(|d| d.severity == Severity::Warning);
            assert_eq!(said.map(|d| &*d.field), expected);
            assert!(index.set_service(&name, None));
        }
        // Nothing is said where there is nothing to withhold.
        let mut index = Index::new(&Options { external_ips: false, ..options() });
        index.set_service(&name, Some(service(&name, 80)));
        assert_eq!(index.plan(&name).unwrap().diagnostics, []);
    }
}
