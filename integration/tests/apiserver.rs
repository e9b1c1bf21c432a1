//! The real binary on a real API server, with EndpointSlices made by Kubernetes' own controller:
//! what is done through the API decides where packets go.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use nix::sys::signal::Signal;
use portcullis_integration::controlplane::{ControlPlane, objects};
use portcullis_integration::daemon::{follow_cluster, start_on_cluster, wait_until_programmed};
use portcullis_integration::lab::{FAMILIES, Family, Lab, Namespace, eventually};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Flow, Outcome, Protocol, Server, probe, probe_many};
use serde_json::json;

/// How long a change at the API may take until packets notice, the controllers' work included.
const NOTICE: Duration = Duration::from_secs(30);
const ANNOTATION: &str = "portcullis.dev/allowed-source-cidrs";

fn ready() -> bool {
    available(&[Requirement::Root, Requirement::Nft, Requirement::ControlPlane])
}

fn answered(from: &Namespace, to: SocketAddr) -> bool {
    probe(from, to, Protocol::Tcp).is_ok_and(|outcome| outcome.by().is_some())
}

fn becomes(from: &Namespace, to: SocketAddr, expected: bool) -> bool {
    eventually(NOTICE, || answered(from, to) == expected)
}

/// The ClusterIPs and the first node port of a Service.
struct Reached {
    cluster_ips: Vec<IpAddr>,
    node_port: u16,
}

impl Reached {
    fn of(service: &Service) -> Result<Reached> {
        let spec = service.spec.as_ref().context("no spec")?;
        let ips = spec.cluster_ips.as_ref().context("no ClusterIPs")?;
        let port = &spec.ports.as_ref().context("no ports")?[0];
        Ok(Reached {
            cluster_ips: ips.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?,
            node_port: u16::try_from(port.node_port.unwrap_or_default())?,
        })
    }

    fn cluster_ip(&self) -> SocketAddr {
        SocketAddr::new(self.cluster_ips[0], 80)
    }

    fn node_port(&self, lab: &Lab, family: Family) -> SocketAddr {
        SocketAddr::new(lab.node.address(family), self.node_port)
    }
}

/// A node with pods behind a Service `web` in a namespace of its own.
struct Shop {
    namespace: String,
    web: Reached,
    _servers: Vec<Server>,
}

async fn create_web(client: &kube::Client, namespace: &str, allowed: &str) -> Result<Reached> {
    let spec = json!({
        "type": "NodePort",
        "selector": { "app": "web" },
        "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }],
    });
    let annotations = [(ANNOTATION, allowed)];
    let made = objects::service_with_annotations(client, namespace, "web", &annotations, spec);
    Reached::of(&made.await?)
}

fn open_shop(plane: &ControlPlane, lab: &Lab, node: &str) -> Result<Shop> {
    plane.attach(&lab.node)?;
    let servers = lab
        .pods
        .iter()
        .map(|pod| Server::start(pod, pod.name(), Protocol::Tcp, 8080))
        .collect::<Result<_>>()?;
    let (namespace, web) = plane.block_on(async |client| {
        objects::node(&client, node, &lab.node, &[]).await?;
        let namespace = objects::namespace(&client, node).await?;
        for (number, pod) in lab.pods.iter().enumerate() {
            let name = format!("web-{number}");
            objects::pod(&client, &namespace, &name, &[("app", "web")], node, pod).await?;
        }
        let web = create_web(&client, &namespace, "192.0.2.0/24, 2001:db8:1::/48").await?;
        objects::wait_for_endpoints(&client, &namespace, "web", lab.pods.len()).await?;
        Ok((namespace, web))
    })?;
    Ok(Shop { namespace, web, _servers: servers })
}

async fn annotate(client: &kube::Client, namespace: &str, value: Option<&str>) -> Result<()> {
    let api = Api::<Service>::namespaced(client.clone(), namespace);
    let patch = json!({ "metadata": { "annotations": { ANNOTATION: value } } });
    api.patch("web", &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

async fn delete_web(client: &kube::Client, namespace: &str) -> Result<()> {
    let api = Api::<Service>::namespaced(client.clone(), namespace);
    api.delete("web", &DeleteParams::default()).await?;
    Ok(())
}

#[test]
fn packets_follow_the_api() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(2)?;
    let shop = open_shop(plane, &lab, "follow")?;
    let namespace = shop.namespace.as_str();
    let _daemon = follow_cluster(&lab, plane, "follow")?;

    let node_port = shop.web.node_port(&lab, Family::V4);
    for family in FAMILIES {
        let to = shop.web.node_port(&lab, family);
        ensure!(answered(&lab.allowed, to), "{to}");
        ensure!(probe(&lab.refused, to, Protocol::Tcp)? == Outcome::TimedOut, "{to}");
    }
    for ip in &shop.web.cluster_ips {
        ensure!(answered(&lab.node, (*ip, 80).into()), "{ip}");
    }
    // Both pods serve; then one is not ready, then it is again.
    let servers = || -> usize {
        probe_many(&lab.node, shop.web.cluster_ip(), Protocol::Tcp, 60)
            .map_or(0, |tally| tally.answered.len())
    };
    ensure!(servers() == 2);
    for (ready, expected) in [(false, 1), (true, 2)] {
        plane.block_on(async |client| {
            objects::set_ready(&client, namespace, "web-0", ready).await.map(drop)
        })?;
        ensure!(eventually(NOTICE, || servers() == expected), "not served by {expected}");
    }

    // The annotation changes, becomes nonsense, goes and comes back.
    for (value, allowed, refused) in [
        (Some("198.51.100.0/24"), false, true),
        (Some("198.51.100.0/24, nonsense"), false, false),
        (None, true, true),
        (Some("192.0.2.0/24"), true, false),
    ] {
        plane.block_on(async |client| annotate(&client, namespace, value).await)?;
        ensure!(becomes(&lab.allowed, node_port, allowed), "{value:?}: the allowed client");
        ensure!(becomes(&lab.refused, node_port, refused), "{value:?}: the refused client");
    }

    // All pods go: connections are rejected. The Service goes: its addresses lead nowhere.
    plane.block_on(async |client| {
        objects::remove_pod(&client, namespace, "web-0").await?;
        objects::remove_pod(&client, namespace, "web-1").await
    })?;
    let rejected = || {
        probe(&lab.pods[0], shop.web.cluster_ip(), Protocol::Tcp)
            .is_ok_and(|outcome| outcome == Outcome::Refused)
    };
    ensure!(eventually(NOTICE, rejected), "not rejected");
    plane.block_on(async |client| delete_web(&client, namespace).await)?;
    let nowhere = || {
        probe(&lab.pods[0], shop.web.cluster_ip(), Protocol::Tcp)
            .is_ok_and(|outcome| outcome == Outcome::TimedOut)
    };
    ensure!(eventually(NOTICE, nowhere), "still rejected");
    // The API server makes a ServiceCIDR of the network that it was told.
    let network = lab.node.run(&["nft", "list", "set", "inet", "portcullis", "service-cidrs4"])?;
    ensure!(network.contains("elements"), "the Service network is not known: {network}");
    Ok(())
}

#[test]
fn deleted_and_created_again_under_the_same_name() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(1)?;
    let shop = open_shop(plane, &lab, "again")?;
    let namespace = shop.namespace.as_str();
    let _daemon = follow_cluster(&lab, plane, "again")?;
    let mut web = shop.web;
    for round in 0..5 {
        ensure!(becomes(&lab.allowed, web.node_port(&lab, Family::V4), true), "round {round}");
        let (old, new) = plane.block_on(async |client| {
            delete_web(&client, namespace).await?;
            // At once, so that both events may come together.
            let new = create_web(&client, namespace, "192.0.2.0/24").await?;
            Ok((web, new))
        })?;
        ensure!(becomes(&lab.node, new.cluster_ip(), true), "round {round}: {}", new.cluster_ip());
        if old.cluster_ips[0] != new.cluster_ips[0] {
            ensure!(becomes(&lab.node, old.cluster_ip(), false), "round {round}: the old address");
        }
        ensure!(!answered(&lab.refused, new.node_port(&lab, Family::V4)), "round {round}");
        web = new;
    }
    Ok(())
}

#[test]
fn an_api_server_that_is_away_changes_nothing() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut plane = ControlPlane::start()?;
    let lab = Lab::new(2)?;
    let shop = open_shop(&plane, &lab, "away")?;
    let namespace = shop.namespace.clone();
    let mut daemon = follow_cluster(&lab, &plane, "away")?;
    let node_port = shop.web.node_port(&lab, Family::V4);
    let mut flow = Flow::open(&lab.allowed, node_port, Protocol::Tcp)?;
    let holds = |flow: &mut Flow| -> Result<()> {
        ensure!(flow.alive()?, "an open connection was cut");
        ensure!(answered(&lab.allowed, node_port), "not served");
        ensure!(!answered(&lab.refused, node_port), "open to everyone");
        Ok(())
    };
    holds(&mut flow)?;

    // The API server goes and comes back; then changes are followed again.
    plane.kill_api_server()?;
    std::thread::sleep(Duration::from_secs(3));
    holds(&mut flow)?;
    plane.start_api_server()?;
    holds(&mut flow)?;
    plane.block_on(async |client| annotate(&client, &namespace, Some("198.51.100.0/24")).await)?;
    ensure!(becomes(&lab.refused, node_port, true), "the change was not followed");
    plane.block_on(async |client| annotate(&client, &namespace, Some("192.0.2.0/24")).await)?;
    ensure!(becomes(&lab.allowed, node_port, true), "the change was not followed");
    ensure!(becomes(&lab.refused, node_port, false), "the change was not followed");
    let mut flow = Flow::open(&lab.allowed, node_port, Protocol::Tcp)?;

    // A daemon that starts while nobody answers leaves the kernel as it is. An API server that is
    // told to end would take its own endpoint back, which the first daemon may see or not.
    plane.kill_api_server()?;
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait(Duration::from_secs(10))?;
    let mut daemon = start_on_cluster(&lab, &plane, "away")?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(daemon.is_running(), "{}", daemon.tail());
    holds(&mut flow)?;
    let adopted = "the kernel holds what it should";
    ensure!(!daemon.stderr().contains(adopted), "nobody answered it\n{}", daemon.tail());
    plane.start_api_server()?;
    wait_until_programmed(&mut daemon)?;
    let log = daemon.stderr();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(adopted)).collect();
    ensure!(matches!(lines[..], [line] if line.contains("operations=0")), "{lines:?}");
    holds(&mut flow)
}

#[test]
fn what_is_deleted_while_nobody_watches_goes() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(1)?;
    let shop = open_shop(plane, &lab, "unseen")?;
    let namespace = shop.namespace.as_str();
    let mut daemon = follow_cluster(&lab, plane, "unseen")?;
    let to = shop.web.cluster_ip();
    ensure!(answered(&lab.node, to));
    // Stopped, it cannot see what happens; its connections time out or are resumed later.
    daemon.signal(Signal::SIGSTOP)?;
    plane.block_on(async |client| delete_web(&client, namespace).await)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(answered(&lab.node, to), "who took it away?");
    daemon.signal(Signal::SIGCONT)?;
    ensure!(becomes(&lab.node, to, false), "still served: {}", daemon.tail());

    // The same across a restart.
    let web = plane.block_on(async |client| create_web(&client, namespace, "").await)?;
    ensure!(becomes(&lab.node, web.cluster_ip(), true));
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait(Duration::from_secs(10))?;
    plane.block_on(async |client| delete_web(&client, namespace).await)?;
    ensure!(answered(&lab.node, web.cluster_ip()), "the rules went with the daemon");
    let _daemon = follow_cluster(&lab, plane, "unseen")?;
    ensure!(becomes(&lab.node, web.cluster_ip(), false), "a deleted Service is served");
    Ok(())
}

#[test]
fn many_services_at_once() -> Result<()> {
    const SERVICES: usize = 60;
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(1)?;
    let shop = open_shop(plane, &lab, "many")?;
    let namespace = shop.namespace.as_str();
    let _daemon = follow_cluster(&lab, plane, "many")?;
    let reached: Vec<Reached> = plane.block_on(async |client| {
        let mut made = Vec::new();
        for number in 0..SERVICES {
            let spec = json!({ "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": 8080 }] });
            let name = format!("web-{number}");
            made.push(Reached::of(&objects::service(&client, namespace, &name, spec).await?)?);
        }
        Ok(made)
    })?;
    for web in &reached {
        ensure!(becomes(&lab.node, web.cluster_ip(), true), "{}", web.cluster_ip());
    }
    plane.block_on(async |client| {
        let api = Api::<Service>::namespaced(client.clone(), namespace);
        for number in 0..SERVICES {
            api.delete(&format!("web-{number}"), &DeleteParams::default()).await?;
        }
        Ok(())
    })?;
    let listed = || -> String {
        lab.node.run(&["nft", "list", "table", "inet", "portcullis"]).unwrap_or_default()
    };
    let gone = || !listed().contains(&format!("{namespace}/web-"));
    ensure!(eventually(NOTICE, gone), "{}", listed());
    Ok(())
}
