//! The control plane, tested by what it makes of a Service and its pods.

use std::net::IpAddr;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::api::Api;
use portcullis_integration::controlplane::{ADDRESS, ControlPlane, PORT, objects};
use portcullis_integration::lab::Lab;
use portcullis_integration::requirement::{Requirement, available};
use serde_json::json;

fn ready() -> bool {
    available(&[Requirement::Root, Requirement::ControlPlane])
}

/// The addresses of all endpoints of a Service, sorted.
async fn addresses(
    client: &kube::Client,
    namespace: &str,
    service: &str,
    count: usize,
) -> Result<Vec<IpAddr>> {
    let slices = objects::wait_for_endpoints(client, namespace, service, count).await?;
    let endpoints = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    let addresses = endpoints.flat_map(|endpoint| &endpoint.addresses);
    let mut addresses = addresses.map(|a| a.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
    addresses.sort();
    Ok(addresses)
}

#[test]
fn controllers_follow_pods_and_services() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(2)?;
    plane.block_on(async |client| {
        objects::node(&client, "follow-1", &lab.node, &[("zone", "a")]).await?;
        let namespace = objects::namespace(&client, "follow").await?;
        for (pod, name) in lab.pods.iter().zip(["web-0", "web-1"]) {
            objects::pod(&client, &namespace, name, &[("app", "web")], "follow-1", pod).await?;
        }
        let spec = json!({
            "type": "NodePort",
            "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": 8080}],
        });
        let annotation = ("portcullis.dev/allowed-source-cidrs", "192.0.2.0/24");
        let service =
            objects::service_with_annotations(&client, &namespace, "web", &[annotation], spec)
                .await?;
        assert_eq!(service.metadata.annotations.unwrap()[annotation.0], annotation.1);
        let spec = service.spec.context("no spec")?;
        let ips = spec.cluster_ips.context("no cluster IPs")?;
        assert!(ips[0].starts_with("10.96.") && ips[1].starts_with("fd00:10:96::"), "{ips:?}");
        let ports = spec.ports.context("no ports")?;
        assert!((30000..=32767).contains(&ports[0].node_port.context("no node port")?));

        let both: Vec<IpAddr> = vec![
            lab.pods[0].v4.into(),
            lab.pods[1].v4.into(),
            lab.pods[0].v6.into(),
            lab.pods[1].v6.into(),
        ];
        assert_eq!(addresses(&client, &namespace, "web", 2).await?, both);
        let slices = objects::endpoint_slices(&client, &namespace, "web").await?;
        assert_eq!(slices.len(), 2, "one per family");
        for slice in &slices {
            let mut endpoints = slice.endpoints.iter().flatten();
            assert!(endpoints.all(|e| e.node_name.as_deref() == Some("follow-1")));
            let owner = &slice.metadata.owner_references.as_ref().context("no owner")?[0];
            assert_eq!((&*owner.kind, &*owner.name), ("Service", "web"));
        }

        objects::set_ready(&client, &namespace, "web-0", false).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", 1).await?;
        objects::set_ready(&client, &namespace, "web-0", true).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", 2).await?;

        objects::terminate_pod(&client, &namespace, "web-0").await?;
        let slices = objects::wait_for_endpoints(&client, &namespace, "web", 1).await?;
        let endpoints = slices[0].endpoints.iter().flatten();
        let conditions = endpoints.filter_map(|e| e.conditions.as_ref());
        let terminating = conditions.filter(|c| c.terminating == Some(true));
        assert!(
            terminating.clone().count() == 1
                && terminating.clone().all(|c| c.serving == Some(true))
        );
        objects::remove_pod(&client, &namespace, "web-0").await?;
        objects::wait_for_endpoints(&client, &namespace, "web", 1).await?;

        // The garbage collector removes the slices of a Service that is gone.
        let services = Api::<Service>::namespaced(client.clone(), &namespace);
        services.delete("web", &kube::api::DeleteParams::default()).await?;
        for _ in 0..600 {
            if objects::endpoint_slices(&client, &namespace, "web").await?.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        anyhow::bail!("the slices of the deleted Service are still there");
    })
}

#[test]
fn attached_nodes_reach_the_api_server() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let labs = [Lab::new(0)?, Lab::new(0)?];
    for lab in &labs {
        let reach = || -> Result<String> {
            lab.node.block_on(async {
                let client = plane.client().await?;
                Ok(client.apiserver_version().await?.git_version)
            })
        };
        assert!(reach().is_err(), "not attached");
        plane.attach(&lab.node)?;
        assert!(reach()?.starts_with("v1."));
        // Nobody gets there through the node's other links.
        let address = std::net::SocketAddr::from((ADDRESS, PORT));
        let limit = std::time::Duration::from_millis(300);
        let connect = || std::net::TcpStream::connect_timeout(&address, limit).is_ok();
        assert!(lab.node.enter(connect) && !lab.peer.enter(connect));
    }
    Ok(())
}

#[test]
fn the_api_server_comes_back_with_its_data() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut plane = ControlPlane::start()?;
    let lab = Lab::new(2)?;
    let namespace = plane.block_on(async |client| {
        objects::node(&client, "node-1", &lab.node, &[]).await?;
        let namespace = objects::namespace(&client, "restart").await?;
        objects::pod(&client, &namespace, "web-0", &[("app", "web")], "node-1", &lab.pods[0])
            .await?;
        let spec = json!({"selector": {"app": "web"}, "ports": [{"port": 80}]});
        objects::service(&client, &namespace, "web", spec).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", 1).await?;
        Ok(namespace)
    })?;
    let slices = |plane: &ControlPlane, count| {
        plane.block_on(async |client| addresses(&client, &namespace, "web", count).await)
    };
    let before = slices(&plane, 1)?;
    let version = |plane: &ControlPlane| {
        plane.block_on(async |client| Ok(client.apiserver_version().await?))
    };

    plane.stop_api_server()?;
    assert!(version(&plane).is_err(), "it answers after it was stopped");
    assert!(plane.stop_api_server().is_err() && plane.kill_api_server().is_err());
    plane.start_api_server()?;
    assert!(plane.start_api_server().is_err());
    assert_eq!(slices(&plane, 1)?, before);

    plane.kill_api_server()?;
    assert!(version(&plane).is_err(), "it answers after it was killed");
    plane.start_api_server()?;
    assert_eq!(slices(&plane, 1)?, before);
    // The controllers have survived it.
    plane.block_on(async |client| {
        objects::pod(&client, &namespace, "web-1", &[("app", "web")], "node-1", &lab.pods[1]).await
    })?;
    assert_eq!(slices(&plane, 2)?.len(), 4, "{}", plane.logs());
    Ok(())
}
