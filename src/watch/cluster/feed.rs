//! From the watchers' events to what is known and to the Services that are to be reconciled.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher;

use super::known::{Known, known};
use super::reconcile::Context;
use super::relist::Relist;
use super::wire::Wire;
use crate::model::{Node, NodeContext, ServiceCidr, ServiceName, SliceName};
use crate::report::Reporter;

/// What the watcher of objects of the kind `K` tells.
pub(super) type Told<K> = watcher::Result<watcher::Event<Wire<K>>>;

/// What one of the watchers tells.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time, and taken at once
pub(super) enum Event {
    Service(Told<core::Service>),
    Slice(Told<discovery::EndpointSlice>),
    Node(Told<core::Node>),
    ServiceCidr(Told<networking::ServiceCIDR>),
}

/// Takes the events of all watchers.
pub(super) struct Feed {
    store: Writer<Known>,
    context: Arc<Context>,
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
    pub(super) fn new(store: Writer<Known>, context: Arc<Context>, reporter: Reporter) -> Feed {
        Feed {
            store,
            context,
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
            Event::Service(event) => event.map_or_else(|_| Vec::new(), |event| self.service(event)),
            Event::Slice(event) => event.map_or_else(|_| Vec::new(), |event| self.slice(event)),
            Event::Node(event) => event.map_or_else(|_| Vec::new(), |event| self.node(event)),
            Event::ServiceCidr(event) => {
                match event {
                    Ok(event) => self.service_cidr(event),
                    Err(error) => self.without_service_cidrs |= is_missing(&error),
                }
                Vec::new()
            }
        }
    }

    fn service(&mut self, event: watcher::Event<Wire<core::Service>>) -> Vec<ServiceName> {
        self.store.apply_watcher_event(&known(&event));
        match event {
            watcher::Event::Init => self.services.begin(),
            watcher::Event::InitApply(object) => {
                self.context.set_service(&object.name, object.lowered);
                self.services.list(object.name);
            }
            // The store takes a list as a whole at its end, so nothing is reconciled before.
            watcher::Event::InitDone => {
                let vanished = self.services.end();
                for name in &vanished {
                    self.context.set_service(name, None);
                }
                return self.services.known().cloned().chain(vanished).collect();
            }
            watcher::Event::Apply(object) => {
                self.context.set_service(&object.name, object.lowered);
                self.services.apply(object.name.clone());
                return vec![object.name];
            }
            watcher::Event::Delete(object) => {
                self.context.set_service(&object.name, None);
                self.services.delete(&object.name);
                return vec![object.name];
            }
        }
        Vec::new()
    }

    fn slice(&mut self, event: watcher::Event<Wire<discovery::EndpointSlice>>) -> Vec<ServiceName> {
        match event {
            watcher::Event::Init => {
                self.slices.begin();
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                self.slices.list(object.name.clone());
                self.context.set_slice(&object.name, object.lowered)
            }
            watcher::Event::InitDone => {
                let vanished = self.slices.end();
                vanished.iter().flat_map(|name| self.context.set_slice(name, None)).collect()
            }
            watcher::Event::Apply(object) => {
                self.slices.apply(object.name.clone());
                self.context.set_slice(&object.name, object.lowered)
            }
            watcher::Event::Delete(object) => {
                self.slices.delete(&object.name);
                self.context.set_slice(&object.name, None)
            }
        }
    }

    fn node(&mut self, event: watcher::Event<Wire<core::Node>>) -> Vec<ServiceName> {
        match event {
            watcher::Event::Init => {
                self.node.begin();
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                self.node.list(());
                self.set_node(object.lowered)
            }
            watcher::Event::InitDone if self.node.end().is_empty() => Vec::new(),
            watcher::Event::InitDone => self.set_node(Node::default()),
            watcher::Event::Apply(object) => {
                self.node.apply(());
                self.set_node(object.lowered)
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

    fn service_cidr(&mut self, event: watcher::Event<Wire<networking::ServiceCIDR>>) {
        match event {
            watcher::Event::Init => self.service_cidrs.begin(),
            watcher::Event::InitApply(object) => {
                self.set_service_cidr(&object.name, Some(object.lowered));
                self.service_cidrs.list(object.name);
            }
            watcher::Event::InitDone => {
                for name in self.service_cidrs.end() {
                    self.set_service_cidr(&name, None);
                }
            }
            watcher::Event::Apply(object) => {
                self.set_service_cidr(&object.name, Some(object.lowered));
                self.service_cidrs.apply(object.name);
            }
            watcher::Event::Delete(object) => {
                self.service_cidrs.delete(&object.name);
                self.set_service_cidr(&object.name, None);
            }
        }
    }

    fn set_service_cidr(&self, name: &Arc<str>, cidr: Option<ServiceCidr>) {
        if let Some(context) = self.context.set_service_cidr(name, cidr) {
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
