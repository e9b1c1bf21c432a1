//! Filling the API server.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use portcullis_integration::controlplane::objects;
use portcullis_integration::lab::Host;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::task::JoinSet;

use crate::cluster::{Cluster, NAMESPACE, name, slice};

/// Requests under way at once. More of them make nothing faster on two cores.
const CONNECTIONS: usize = 24;
/// How often a request that fails is tried.
const ATTEMPTS: u32 = 5;

/// Makes the Kubernetes namespace of the Services, and the Node that the proxies run on.
///
/// # Errors
/// When the API server refuses.
pub async fn begin(client: &Client, node: &Host, node_name: &str) -> Result<()> {
    let namespaces = Api::<Namespace>::all(client.clone());
    objects::create(&namespaces, json!({ "metadata": { "name": NAMESPACE } })).await?;
    objects::node(client, node_name, node, &[]).await.map(drop)
}

/// Makes a cluster out of the one that was there before (none at first): Services are added,
/// `EndpointSlice`s and session affinity changed where they differ.
///
/// # Errors
/// When the API server refuses an object, [`ATTEMPTS`] times.
pub async fn fill(
    client: &Client,
    before: Option<Cluster>,
    cluster: Cluster,
    pods: &[Host],
) -> Result<()> {
    let existing = before.map_or(0, |before| before.services);
    ensure!(existing <= cluster.services, "Services are only added");
    let pods: Arc<[Host]> = pods.into();
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (client, next, pods) = (client.clone(), Arc::clone(&next), Arc::clone(&pods));
        workers.spawn(async move {
            loop {
                let service = next.fetch_add(1, Ordering::Relaxed);
                match before.filter(|before| service < before.services) {
                    _ if service >= cluster.services => return anyhow::Ok(()),
                    None => create(&client, cluster, service, &pods).await?,
                    Some(before) => change(&client, before, cluster, service, &pods).await?,
                }
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended.context("a worker panicked")??;
    }
    Ok(())
}

/// Replaces an `EndpointSlice`.
///
/// # Errors
/// When the API server refuses.
pub async fn replace(client: &Client, slice: &EndpointSlice) -> Result<()> {
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), NAMESPACE);
    let name = slice.metadata.name.as_deref().unwrap_or_default();
    let replaced = slices.replace(name, &PostParams::default(), slice).await;
    replaced.map(drop).with_context(|| format!("replace the EndpointSlice {name}"))
}

async fn create(client: &Client, cluster: Cluster, number: usize, pods: &[Host]) -> Result<()> {
    let endpoints = cluster.endpoints_of(number, pods);
    create_object(client, &cluster.service(number)?).await?;
    create_object(client, &slice(number, &endpoints, pods)?).await
}

async fn create_object<K>(client: &Client, object: &K) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Serialize,
{
    let api = Api::<K>::namespaced(client.clone(), NAMESPACE);
    for attempt in 1.. {
        match api.create(&PostParams::default(), object).await {
            Ok(_) => break,
            // An attempt that seemed to fail did not.
            Err(kube::Error::Api(status)) if attempt > 1 && status.code == 409 => break,
            Err(_) if attempt < ATTEMPTS => tokio::time::sleep(pause(attempt)).await,
            Err(error) => {
                let name = object.meta().name.clone().unwrap_or_default();
                return Err(error).context(format!("create the {} {name}", K::kind(&())));
            }
        }
    }
    Ok(())
}

async fn change(
    client: &Client,
    before: Cluster,
    cluster: Cluster,
    number: usize,
    pods: &[Host],
) -> Result<()> {
    let endpoints = cluster.endpoints_of(number, pods);
    if before.endpoints_of(number, pods) != endpoints {
        let slice = slice(number, &endpoints, pods)?;
        for attempt in 1.. {
            match replace(client, &slice).await {
                Ok(()) => break,
                Err(_) if attempt < ATTEMPTS => tokio::time::sleep(pause(attempt)).await,
                Err(error) => return Err(error),
            }
        }
    }
    if before.is_sticky(number) != cluster.is_sticky(number) {
        let affinity = if cluster.is_sticky(number) { "ClientIP" } else { "None" };
        // A merge patch: null takes the timeout away, which the API server set by itself.
        let patch =
            json!({ "spec": { "sessionAffinity": affinity, "sessionAffinityConfig": null } });
        let services = Api::<Service>::namespaced(client.clone(), NAMESPACE);
        let name = name(number);
        let patched = services.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        patched.map(drop).with_context(|| format!("change the affinity of the Service {name}"))?;
    }
    Ok(())
}

fn pause(attempt: u32) -> Duration {
    Duration::from_millis(200) * attempt
}
