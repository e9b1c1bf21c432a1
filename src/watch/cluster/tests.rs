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
        let shutdown = CancellationToken::new();
        let (reporter2, shutdown2) = (reporter.clone(), shutdown.clone());
        let served = tokio::spawn(async move {
            let options = Options::new("worker".into());
            serve(told.boxed(), &options, committer, reporter2, shutdown2).await
        });
        Some(Cluster { kernel, reporter, events, shutdown, served })
    }

    /// A cluster whose lists are complete and that is served.
    async fn listed(
        services: &[Wire<core::Service>],
        slices: &[Wire<discovery::EndpointSlice>],
    ) -> Option<Cluster> {
        let cluster = Cluster::new()?;
        cluster.list(Event::Service, services);
        cluster.list(Event::Slice, slices);
        cluster.list(Event::Node, &[]);
        cluster.list(Event::ServiceCidr, &[]);
        until("adoption", true, || cluster.reporter.adoption().is_some()).await;
        Some(cluster)
    }

    fn tell<K: Kind>(&self, wrap: fn(Told<K>) -> Event, event: Watched<Wire<K>>) {
        self.events.unbounded_send(wrap(Ok(event))).expect("somebody listens");
    }

    fn list<K: Kind + Clone>(&self, wrap: fn(Told<K>) -> Event, objects: &[Wire<K>]) {
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

fn read<K: Kind>(object: &serde_json::Value) -> Wire<K> {
    serde_json::from_str(&object.to_string()).expect("an object with metadata")
}

fn service(name: &str, ip: &str) -> Wire<core::Service> {
    read(&json!({"metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}}))
}

fn slice(name: &str, service: &str, address: &str) -> Wire<discovery::EndpointSlice> {
    read(&json!({"metadata": {"name": name, "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4",
        "ports": [{"port": 8080}], "endpoints": [{"addresses": [address]}]}))
}

fn node(address: &str) -> Wire<core::Node> {
    read(&json!({"metadata": {"name": "worker"},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}}))
}

fn service_cidr(name: &str, cidrs: &[&str]) -> Wire<networking::ServiceCIDR> {
    read(&json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}}))
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
    until("heard", 0, || cluster.events.len()).await;
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

#[tokio::test]
async fn what_cannot_be_read_disturbs_nobody() {
    let odd_service = || {
        read::<core::Service>(&json!({"metadata": {"name": "b", "namespace": "default"},
            "spec": {"clusterIP": B, "ports": [{"port": "http"}]}}))
    };
    let odd_slice = || {
        read::<discovery::EndpointSlice>(
            &json!({"metadata": {"name": "a-1", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "a"}}, "addressType": 4}),
        )
    };
    let says = |cluster: &Cluster| {
        let all = cluster.reporter.diagnostics();
        let unread = all.iter().filter(|diagnostic| diagnostic.message.contains("cannot be read"));
        unread.map(|diagnostic| diagnostic.field.clone()).collect::<Vec<_>>()
    };
    // In a list.
    let services = [service("a", A), odd_service()];
    let slices = [odd_slice(), slice("a-2", "a", "10.0.0.2")];
    let Some(mut cluster) = Cluster::listed(&services, &slices).await else { return };
    cluster.services("adoption", &["default/a 10.96.0.1: 10.0.0.2"]).await;
    until("both", ["spec.ports[0].port", "addressType"].map(str::to_owned).into(), || {
        says(&cluster)
    })
    .await;
    // Another version of it can be read.
    cluster.tell(Event::Service, Watched::Apply(service("b", B)));
    cluster.tell(Event::Slice, Watched::Apply(slice("a-1", "a", "10.0.0.1")));
    let both = ["default/a 10.96.0.1: 10.0.0.1 10.0.0.2", "default/b 10.96.0.2:"];
    cluster.services("read", &both).await;
    until("nothing", Vec::new(), || says(&cluster)).await;
    // In a watch.
    cluster.tell(Event::Service, Watched::Apply(odd_service()));
    cluster.tell(Event::Slice, Watched::Apply(odd_slice()));
    cluster.services("unread", &["default/a 10.96.0.1: 10.0.0.2"]).await;
    // It goes, and cannot be read then either.
    cluster.tell(Event::Service, Watched::Delete(odd_service()));
    cluster.tell(Event::Slice, Watched::Delete(odd_slice()));
    until("nothing", Vec::new(), || says(&cluster)).await;
    cluster.services("gone", &["default/a 10.96.0.1: 10.0.0.2"]).await;
    cluster.end().await;
}

#[tokio::test]
async fn events_that_wait_keep_their_order() {
    let many = 3 * AHEAD;
    let told: Vec<usize> = ahead(stream::iter(0..many)).collect().await;
    assert!(told.into_iter().eq(0..many));
}

/// Whether it waits for somebody to take an event, or for the API server.
#[tokio::test]
async fn a_watcher_ends_when_nobody_listens() {
    for more in [2 * AHEAD, 1] {
        // Who holds the source holds this.
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let events = stream::iter(0..more).chain(stream::pending());
        let events = events.inspect(move |_| assert!(!held.is_closed()));
        let mut told = Box::pin(ahead(events));
        assert_eq!(told.next().await, Some(0));
        drop(told);
        let ended = tokio::time::timeout(PATIENCE, dropped).await.expect("it ends");
        assert!(ended.is_err(), "the source said something");
    }
}

#[tokio::test]
#[should_panic(expected = "the watcher broke")]
async fn a_watcher_that_panics_is_heard() {
    let events = stream::iter(0..2).map(|event| {
        assert!(event == 0, "the watcher broke");
        event
    });
    let told: Vec<i32> = ahead(events).collect().await;
    unreachable!("{told:?}");
}
