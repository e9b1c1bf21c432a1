//! Events as watchers tell them, and what they lead to in a real kernel.

use std::time::Duration;

use futures::channel::mpsc::{UnboundedSender, unbounded};
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::runtime::watcher::Event as Watched;
use serde_json::json;
use tokio::task::JoinHandle;

use super::*;
use crate::watch::testing::{Kernel, PATIENCE, until};

/// A cluster that tells what a test says.
struct Cluster {
    kernel: Kernel,
    reporter: Reporter,
    store: Store<core::Service>,
    events: UnboundedSender<Event>,
    shutdown: CancellationToken,
    served: JoinHandle<Result<(), Error>>,
}

impl Cluster {
    fn new() -> Option<Cluster> {
        let reporter = Reporter::new("worker".into());
        let (kernel, worker) = Kernel::new(&reporter)?;
        let (committer, _thread) = Committer::start(worker);
        let (events, told) = unbounded();
        let (store, mut writer) = reflector::store();
        let told = told.inspect(move |event| {
            if let Event::Service(Ok(event)) = event {
                writer.apply_watcher_event(event);
            }
        });
        let shutdown = CancellationToken::new();
        let (store2, reporter2, shutdown2) = (store.clone(), reporter.clone(), shutdown.clone());
        let served = tokio::spawn(async move {
            let options = Options::new("worker".into());
            let outages = Arc::default();
            serve(store2, told.boxed(), outages, &options, committer, reporter2, shutdown2).await
        });
        Some(Cluster { kernel, reporter, store, events, shutdown, served })
    }

    /// A cluster whose lists are complete and that is served.
    async fn listed(
        services: &[core::Service],
        slices: &[discovery::EndpointSlice],
    ) -> Option<Cluster> {
        let cluster = Cluster::new()?;
        cluster.list(Event::Service, services);
        cluster.list(Event::Slice, slices);
        cluster.list(Event::Node, &[]);
        cluster.list(Event::ServiceCidr, &[]);
        until("adoption", true, || cluster.reporter.adoption().is_some()).await;
        Some(cluster)
    }

    fn tell<K>(&self, wrap: fn(watcher::Result<Watched<K>>) -> Event, event: Watched<K>) {
        self.events.unbounded_send(wrap(Ok(event))).expect("somebody listens");
    }

    fn list<K: Clone>(&self, wrap: fn(watcher::Result<Watched<K>>) -> Event, objects: &[K]) {
        self.tell(wrap, Watched::Init);
        for object in objects {
            self.tell(wrap, Watched::InitApply(object.clone()));
        }
        self.tell(wrap, Watched::InitDone);
    }

    async fn services(&mut self, what: &str, expected: &[&str]) {
        let expected = expected.iter().map(ToString::to_string).collect::<Vec<_>>();
        until(what, expected, || self.kernel.services()).await;
    }

    async fn end(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.served).await;
        ended.expect("in time").expect("no panic").expect("no error");
    }
}

fn service(name: &str, ip: &str) -> core::Service {
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}))
    .expect("a Service")
}

fn slice(name: &str, service: &str, address: &str) -> discovery::EndpointSlice {
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4",
        "ports": [{"port": 8080}], "endpoints": [{"addresses": [address]}]}))
    .expect("an EndpointSlice")
}

fn node(address: &str) -> core::Node {
    serde_json::from_value(json!({"metadata": {"name": "worker"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}}))
    .expect("a Node")
}

fn service_cidr(name: &str, cidrs: &[&str]) -> networking::ServiceCIDR {
    serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}}))
        .expect("a ServiceCIDR")
}

const A: &str = "10.96.0.1";
const B: &str = "10.96.0.2";

#[tokio::test]
async fn nothing_is_committed_before_every_list_is_complete() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.list(Event::Service, &[service("a", A)]);
    cluster.list(Event::Slice, &[slice("a-1", "a", "10.0.0.1")]);
    cluster.tell(Event::Service, Watched::Apply(service("b", B)));
    cluster.tell(Event::Node, Watched::Init);
    // What was told has been heard.
    until("two Services", 2, || cluster.store.len()).await;
    tokio::task::yield_now().await;
    assert_eq!(cluster.reporter.adoption(), None);
    assert_eq!(cluster.kernel.services(), [""; 0]);
    // There may be no such Node.
    cluster.tell(Event::Node, Watched::InitDone);
    tokio::task::yield_now().await;
    assert_eq!(cluster.reporter.adoption(), None);
    // Nor may there be this kind.
    let missing = kube::core::Status { code: 404, ..Default::default() }.boxed();
    let missing = watcher::Error::InitialListFailed(kube::Error::Api(missing));
    cluster.events.unbounded_send(Event::ServiceCidr(Err(missing))).unwrap();
    cluster.services("all", &["default/a 10.96.0.1: 10.0.0.1", "default/b 10.96.0.2:"]).await;
    assert!(cluster.reporter.diagnostics()[0].message.contains("no InternalIP"));
    cluster.end().await;
}

#[tokio::test]
async fn shutdown_ends_the_wait_for_lists() {
    let Some(cluster) = Cluster::new() else { return };
    cluster.list(Event::Service, &[]);
    cluster.end().await;
}

#[tokio::test]
async fn changes_are_committed() {
    let services = [service("a", A)];
    let Some(mut cluster) = Cluster::listed(&services, &[]).await else { return };
    cluster.services("adoption", &["default/a 10.96.0.1:"]).await;
    // A slice before its Service, and after it.
    cluster.tell(Event::Slice, Watched::Apply(slice("b-1", "b", "10.0.0.2")));
    cluster.tell(Event::Service, Watched::Apply(service("b", B)));
    cluster.tell(Event::Slice, Watched::Apply(slice("a-1", "a", "10.0.0.1")));
    cluster
        .services("both", &["default/a 10.96.0.1: 10.0.0.1", "default/b 10.96.0.2: 10.0.0.2"])
        .await;
    // A slice changes its Service.
    cluster.tell(Event::Slice, Watched::Apply(slice("b-1", "a", "10.0.0.2")));
    cluster
        .services("moved", &["default/a 10.96.0.1: 10.0.0.1 10.0.0.2", "default/b 10.96.0.2:"])
        .await;
    cluster.tell(Event::Slice, Watched::Delete(slice("a-1", "a", "10.0.0.1")));
    cluster.tell(Event::Service, Watched::Delete(service("b", B)));
    cluster.services("gone", &["default/a 10.96.0.1: 10.0.0.2"]).await;
    // A Service that another proxy takes is told to be gone; one that turns headless is not.
    cluster.tell(Event::Service, Watched::Apply(service("a", "None")));
    cluster.services("headless", &[]).await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_object_of_an_old_name_stays() {
    let Some(mut cluster) = Cluster::listed(&[service("a", A)], &[]).await else { return };
    // The same object comes back: what was removed must be put back.
    cluster.tell(Event::Service, Watched::Delete(service("a", A)));
    cluster.services("gone", &[]).await;
    cluster.tell(Event::Service, Watched::Apply(service("a", A)));
    cluster.services("back", &["default/a 10.96.0.1:"]).await;
    // It comes back at every moment of its removal.
    for round in 0..200 {
        cluster.tell(Event::Service, Watched::Delete(service("a", A)));
        tokio::time::sleep(Duration::from_micros(round * 11)).await;
        cluster.tell(Event::Service, Watched::Apply(service("a", A)));
    }
    cluster.tell(Event::Service, Watched::Apply(service("b", B)));
    cluster.services("same", &["default/a 10.96.0.1:", "default/b 10.96.0.2:"]).await;
    // Nothing comes late.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(cluster.kernel.services(), ["default/a 10.96.0.1:", "default/b 10.96.0.2:"]);
    for _ in 0..50 {
        cluster.tell(Event::Service, Watched::Delete(service("a", A)));
        cluster.tell(Event::Service, Watched::Apply(service("a", "10.96.0.3")));
    }
    cluster.services("another", &["default/a 10.96.0.3:", "default/b 10.96.0.2:"]).await;
    for _ in 0..50 {
        cluster.tell(Event::Service, Watched::Apply(service("a", A)));
        cluster.tell(Event::Service, Watched::Delete(service("a", A)));
    }
    cluster.services("none", &["default/b 10.96.0.2:"]).await;
    cluster.end().await;
}

#[tokio::test]
async fn what_vanishes_between_lists_goes() {
    let services = [service("a", A), service("b", B)];
    let slices = [slice("a-1", "a", "10.0.0.1"), slice("a-2", "a", "10.0.0.2")];
    let Some(mut cluster) = Cluster::listed(&services, &slices).await else { return };
    let both = ["default/a 10.96.0.1: 10.0.0.1 10.0.0.2", "default/b 10.96.0.2:"];
    cluster.services("adoption", &both).await;
    // The watches fail, and nothing happens.
    let failed = watcher::Error::NoResourceVersion;
    cluster.events.unbounded_send(Event::Service(Err(failed))).unwrap();
    let failed = watcher::Error::NoResourceVersion;
    cluster.events.unbounded_send(Event::Slice(Err(failed))).unwrap();
    cluster.tell(Event::Service, Watched::Init);
    cluster.tell(Event::Slice, Watched::Init);
    // Another change shows that all this was heard.
    cluster.tell(Event::Node, Watched::Apply(node("192.0.2.1")));
    until("node", vec!["192.0.2.1".to_owned()], || cluster.kernel.node_port_addresses()).await;
    assert_eq!(cluster.kernel.services(), both);

    cluster.list(Event::Slice, &slices[1..]);
    cluster.services("a slice", &["default/a 10.96.0.1: 10.0.0.2", "default/b 10.96.0.2:"]).await;
    // One went, one changed, one came.
    cluster.list(Event::Service, &[service("b", "10.96.0.3"), service("c", "10.96.0.4")]);
    cluster.services("Services", &["default/b 10.96.0.3:", "default/c 10.96.0.4:"]).await;
    cluster.list(Event::Node, &[]);
    until("no node", vec![], || cluster.kernel.node_port_addresses()).await;
    cluster.end().await;
}

#[tokio::test]
async fn the_node_is_committed() {
    let Some(mut cluster) = Cluster::listed(&[], &[]).await else { return };
    let says = |cluster: &Cluster| {
        let diagnostics = cluster.reporter.diagnostics();
        diagnostics.iter().any(|diagnostic| diagnostic.message.contains("no InternalIP"))
    };
    assert!(says(&cluster));
    for (event, expected) in [
        (Watched::Apply(node("192.0.2.1")), vec!["192.0.2.1"]),
        (Watched::Apply(node("192.0.2.2")), vec!["192.0.2.2"]),
        (Watched::Delete(node("192.0.2.2")), vec![]),
    ] {
        cluster.tell(Event::Node, event);
        let expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
        let none = expected.is_empty();
        until("node", expected, || cluster.kernel.node_port_addresses()).await;
        assert_eq!(says(&cluster), none);
    }
    cluster.end().await;
}

#[tokio::test]
async fn service_cidrs_are_committed() {
    let Some(mut cluster) = Cluster::listed(&[], &[]).await else { return };
    let says = |cluster: &Cluster| {
        let diagnostics = cluster.reporter.diagnostics();
        diagnostics.iter().any(|d| d.field == "spec.cidrs[1]")
    };
    assert_eq!(cluster.kernel.service_networks(), [""; 0]);
    let first = || service_cidr("kubernetes", &["10.96.0.0/16", "no network"]);
    for (event, expected) in [
        (Watched::Apply(first()), vec!["10.96.0.0"]),
        (Watched::Apply(service_cidr("more", &["10.95.0.0/24"])), vec!["10.95.0.0", "10.96.0.0"]),
        (Watched::Delete(service_cidr("more", &[])), vec!["10.96.0.0"]),
    ] {
        cluster.tell(Event::ServiceCidr, event);
        let expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
        until("networks", expected, || cluster.kernel.service_networks()).await;
        assert!(says(&cluster));
    }
    // A list without it.
    cluster.list(Event::ServiceCidr, &[]);
    until("no networks", vec![], || cluster.kernel.service_networks()).await;
    assert!(!says(&cluster));
    cluster.end().await;
}

#[tokio::test]
async fn many_services_at_once() {
    let many: Vec<_> = (0..1000)
        .map(|n| service(&format!("s{n}"), &format!("10.96.{}.{}", n / 250, n % 250 + 1)))
        .collect();
    let Some(mut cluster) = Cluster::listed(&[], &[]).await else { return };
    for service in &many {
        cluster.tell(Event::Service, Watched::Apply(service.clone()));
    }
    until("all", 1000, || cluster.kernel.services().len()).await;
    for service in &many {
        cluster.tell(Event::Service, Watched::Delete(service.clone()));
    }
    cluster.services("none", &[]).await;
    cluster.end().await;
}

#[test]
fn stored_services_are_pruned() {
    let full = json!({
        "metadata": {"name": "a", "namespace": "n", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": "x"}, "managedFields": [{"manager": "m"}],
            "annotations": {"portcullis.dev/allowed-source-cidrs": "10.0.0.0/8",
                "kubectl.kubernetes.io/last-applied-configuration": "{}"}},
        "spec": {"clusterIP": A, "type": "NodePort", "selector": {"app": "x"},
            "clusterIPs": [A], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "externalTrafficPolicy": "Local",
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": "http"}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}, "conditions": []},
    });
    let full: core::Service = serde_json::from_value(full).unwrap();
    let mut pruned = full.clone();
    prune(&mut pruned);
    let text = serde_json::to_string(&pruned).unwrap();
    for gone in
        ["managedFields", "selector", "last-applied", "\"app\"", "IPv4", "None", "targetPort"]
    {
        assert!(!text.contains(gone), "{gone}: {text}");
    }
    // Nothing is missed.
    assert_eq!(lower::service(&pruned), lower::service(&full));
    let mut other = full;
    other.metadata.labels = Some([(lower::OTHER_PROXY_LABEL.to_owned(), String::new())].into());
    prune(&mut other);
    assert_eq!(lower::service(&other), None);
}
