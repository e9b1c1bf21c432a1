//! From the watchers' events to what is known and to the Services that are to be reconciled.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::runtime::watcher;

use super::outage::Outages;
use super::reconcile::Context;
use super::relist::Relist;
use crate::model::{Node, ServiceName, SliceName};
use crate::report::Reporter;
use crate::watch::lower;

/// What one of the watchers tells.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time, and taken at once
pub(super) enum Event {
    Service(watcher::Result<watcher::Event<core::Service>>),
    Slice(watcher::Result<watcher::Event<discovery::EndpointSlice>>),
    Node(watcher::Result<watcher::Event<core::Node>>),
}

/// Takes the events of all watchers.
pub(super) struct Feed {
    context: Arc<Context>,
    outages: Arc<Outages>,
    reporter: Reporter,
    services: Relist<ServiceName>,
    slices: Relist<SliceName>,
    node: Relist<()>,
    /// Whether changes of the node are committed.
    serves_node: bool,
}

impl Feed {
    /// Nothing was told yet.
    pub(super) fn new(context: Arc<Context>, outages: Arc<Outages>, reporter: Reporter) -> Feed {
        let (services, slices, node) = (Relist::new(), Relist::new(), Relist::new());
        Feed { context, outages, reporter, services, slices, node, serves_node: false }
    }

    /// Whether all that there is has been told at least once.
    pub(super) fn is_complete(&self) -> bool {
        self.services.is_complete() && self.slices.is_complete() && self.node.is_complete()
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
        if self.serves_node {
            self.reporter.node(&context.node);
            self.context.commit_node(context);
        }
        touched
    }
}

/// Takes out of a Service what nobody reads, before it is stored.
pub(super) fn prune(object: &mut core::Service) {
    let metadata = &mut object.metadata;
    metadata.managed_fields = None;
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
    }
    if let Some(status) = &mut object.status {
        status.conditions = None;
    }
}
