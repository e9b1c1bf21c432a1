//! From the watchers' events to what is known and to the Services that are to be reconciled.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::runtime::watcher;

use super::outage::Outages;
use super::reconcile::Context;
use super::relist::Relist;
use crate::model::{Node, NodeContext, ServiceName, SliceName};
use crate::report::Reporter;
use crate::watch::lower;

/// What one of the watchers tells.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time, and taken at once
pub(super) enum Event {
    Service(watcher::Result<watcher::Event<core::Service>>),
    Slice(watcher::Result<watcher::Event<discovery::EndpointSlice>>),
    Node(watcher::Result<watcher::Event<core::Node>>),
    ServiceCidr(watcher::Result<watcher::Event<networking::ServiceCIDR>>),
}

/// Takes the events of all watchers.
pub(super) struct Feed {
    context: Arc<Context>,
    outages: Arc<Outages>,
    reporter: Reporter,
    services: Relist<ServiceName>,
    slices: Relist<SliceName>,
    node: Relist<()>,
    service_cidrs: Relist<Arc<str>>,
    /// Whether the API server has no `ServiceCIDR`s, or none for us: nothing waits for them.
    without_service_cidrs: bool,
    /// Whether changes of the node are committed.
    serves_node: bool,
}

impl Feed {
    /// Nothing was told yet.
    pub(super) fn new(context: Arc<Context>, outages: Arc<Outages>, reporter: Reporter) -> Feed {
        Feed {
            context,
            outages,
            reporter,
            services: Relist::new(),
            slices: Relist::new(),
            node: Relist::new(),
            service_cidrs: Relist::new(),
            without_service_cidrs: false,
            serves_node: false,
        }
    }

    /// Whether all that there is has been told at least once.
    pub(super) fn is_complete(&self) -> bool {
        let cidrs = self.service_cidrs.is_complete() || self.without_service_cidrs;
        self.services.is_complete() && self.slices.is_complete() && self.node.is_complete() && cidrs
    }

    /// Commits changes of the node from now on.
    pub(super) fn serve_node(&mut self) {
        self.serves_node = true;
    }

    /// Takes an event. Gives the Services that are to be reconciled, of which some may be none.
    pub(super) fn take(&mut self, event: Event) -> Vec<ServiceName> {
        match event {
            Event::Service(event) => {
                self.outages.take("Services", &event);
                event.map_or_else(|_| Vec::new(), |event| self.service(event))
            }
            Event::Slice(event) => {
                self.outages.take("EndpointSlices", &event);
                event.map_or_else(|_| Vec::new(), |event| self.slice(&event))
            }
            Event::Node(event) => {
                self.outages.take("the Node", &event);
                event.map_or_else(|_| Vec::new(), |event| self.node(&event))
            }
            Event::ServiceCidr(event) => {
                self.outages.take("ServiceCIDRs", &event);
                match event {
                    Ok(event) => self.service_cidr(&event),
                    Err(error) => self.without_service_cidrs |= is_missing(&error),
                }
                Vec::new()
            }
        }
    }

    /// The store takes a list as a whole at its end, so nothing is to be done before.
    fn service(&mut self, event: watcher::Event<core::Service>) -> Vec<ServiceName> {
        match event {
            watcher::Event::Init => self.services.begin(),
            watcher::Event::InitApply(object) => self.services.list(lower::service_name(&object)),
            watcher::Event::InitDone => {
                let vanished = self.services.end();
                return self.services.known().cloned().chain(vanished).collect();
            }
            watcher::Event::Apply(object) => {
                let name = lower::service_name(&object);
                self.services.apply(name.clone());
                return vec![name];
            }
            watcher::Event::Delete(object) => {
                let name = lower::service_name(&object);
                self.services.delete(&name);
                return vec![name];
            }
        }
        Vec::new()
    }

    fn slice(&mut self, event: &watcher::Event<discovery::EndpointSlice>) -> Vec<ServiceName> {
        match event {
            watcher::Event::Init => {
                self.slices.begin();
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                let name = lower::slice_name(object);
                self.slices.list(name.clone());
                self.context.set_slice(&name, lower::slice(object))
            }
            watcher::Event::InitDone => {
                let vanished = self.slices.end();
                vanished.iter().flat_map(|name| self.context.set_slice(name, None)).collect()
            }
            watcher::Event::Apply(object) => {
                let name = lower::slice_name(object);
                self.slices.apply(name.clone());
                self.context.set_slice(&name, lower::slice(object))
            }
            watcher::Event::Delete(object) => {
                let name = lower::slice_name(object);
                self.slices.delete(&name);
                self.context.set_slice(&name, None)
            }
        }
    }

    fn node(&mut self, event: &watcher::Event<core::Node>) -> Vec<ServiceName> {
        match event {
            watcher::Event::Init => {
                self.node.begin();
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                self.node.list(());
                self.set_node(lower::node(object))
            }
            watcher::Event::InitDone if self.node.end().is_empty() => Vec::new(),
            watcher::Event::InitDone => self.set_node(Node::default()),
            watcher::Event::Apply(object) => {
                self.node.apply(());
                self.set_node(lower::node(object))
            }
            watcher::Event::Delete(_) => {
                self.node.delete(&());
                self.set_node(Node::default())
            }
        }
    }

    fn set_node(&self, node: Node) -> Vec<ServiceName> {
        let Some((context, touched)) = self.context.set_node(node) else { return Vec::new() };
        self.serve(context);
        touched
    }

    fn service_cidr(&mut self, event: &watcher::Event<networking::ServiceCIDR>) {
        match event {
            watcher::Event::Init => self.service_cidrs.begin(),
            watcher::Event::InitApply(object) => {
                self.service_cidrs.list(lower::service_cidr_name(object));
                self.set_service_cidr(object);
            }
            watcher::Event::InitDone => {
                for name in self.service_cidrs.end() {
                    self.delete_service_cidr(&name);
                }
            }
            watcher::Event::Apply(object) => {
                self.service_cidrs.apply(lower::service_cidr_name(object));
                self.set_service_cidr(object);
            }
            watcher::Event::Delete(object) => {
                let name = lower::service_cidr_name(object);
                self.service_cidrs.delete(&name);
                self.delete_service_cidr(&name);
            }
        }
    }

    fn set_service_cidr(&self, object: &networking::ServiceCIDR) {
        let (name, cidr) = (lower::service_cidr_name(object), lower::service_cidr(object));
        if let Some(context) = self.context.set_service_cidr(&name, Some(cidr)) {
            self.serve(context);
        }
    }

    fn delete_service_cidr(&self, name: &Arc<str>) {
        if let Some(context) = self.context.set_service_cidr(name, None) {
            self.serve(context);
        }
    }

    fn serve(&self, context: NodeContext) {
        if self.serves_node {
            self.reporter.node(&context);
            self.context.commit_node(context);
        }
    }
}

/// Whether the API server has no objects of this kind (before Kubernetes 1.33), or does not let this
/// account see them.
fn is_missing(error: &watcher::Error) -> bool {
    let code = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code,
        _ => return false,
    };
    matches!(code, 403 | 404)
}

/// Takes out of a Service what nobody reads, before it is stored.
pub(super) fn prune(object: &mut core::Service) {
    let metadata = &mut object.metadata;
    metadata.managed_fields = None;
    // The watcher has read it; the store keeps it once more in its key.
    metadata.resource_version = None;
    metadata.uid = None;
    metadata.owner_references = None;
    metadata.finalizers = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|key, _| lower::is_ours(key));
    }
    if let Some(labels) = &mut metadata.labels {
        labels.retain(|key, _| key == lower::OTHER_PROXY_LABEL);
    }
    if let Some(spec) = &mut object.spec {
        spec.selector = None;
        spec.ip_family_policy = None;
        if spec.cluster_ips.as_ref().is_some_and(|all| !all.is_empty()) {
            spec.cluster_ip = None;
        }
        if spec.ip_families.as_ref().is_some_and(|all| all.len() < 2) {
            spec.ip_families = None;
        }
        // What the API server fills in where nobody has said anything.
        spec.type_.take_if(|kind| kind == "ClusterIP");
        spec.session_affinity.take_if(|affinity| affinity == "None");
        spec.internal_traffic_policy.take_if(|policy| policy == "Cluster");
        for port in spec.ports.iter_mut().flatten() {
            port.protocol.take_if(|protocol| protocol == "TCP");
            port.target_port = None;
            port.app_protocol = None;
        }
    }
    if let Some(status) = &mut object.status {
        status.conditions = None;
    }
}
