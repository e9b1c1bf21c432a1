//! Objects of the API: the ones that tests need, each in one call.
//!
//! What is not here is made with `kube` directly; [`create`] takes any object as JSON.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::lab::Host;

/// How long the controllers may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Creates an object of any kind from JSON (without `apiVersion` and `kind`).
pub async fn create<K>(api: &Api<K>, object: Value) -> Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
{
    let kind = K::kind(&());
    let shown = object["metadata"].to_string();
    let object: K =
        serde_json::from_value(object).with_context(|| format!("not a {kind}: {shown}"))?;
    let created = api.create(&PostParams::default(), &object).await;
    created.with_context(|| format!("create the {kind} {shown}"))
}

/// Creates a namespace called `prefix-SUFFIX` with a suffix that makes it unique, and gives its
/// name.
pub async fn namespace(client: &Client, prefix: &str) -> Result<String> {
    let api = Api::<Namespace>::all(client.clone());
    let made = create(&api, json!({"metadata": {"generateName": format!("{prefix}-")}})).await?;
    made.metadata.name.context("a namespace without a name")
}

/// Creates a Node that is Ready and has the addresses of `host` as its `InternalIP`s.
pub async fn node(
    client: &Client,
    name: &str,
    host: &Host,
    labels: &[(&str, &str)],
) -> Result<Node> {
    let api = Api::<Node>::all(client.clone());
    create(&api, json!({"metadata": {"name": name, "labels": map(labels)}})).await?;
    let status = json!({"status": {
        "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": "",
            "lastHeartbeatTime": EPOCH, "lastTransitionTime": EPOCH}],
        "addresses": [
            {"type": "InternalIP", "address": host.v4},
            {"type": "InternalIP", "address": host.v6},
            {"type": "Hostname", "address": name},
        ],
    }});
    patch_status(&api, name, &status).await
}

/// Creates a Pod on `node` that runs, is ready and has the addresses of `host`.
pub async fn pod(
    client: &Client,
    namespace: &str,
    name: &str,
    labels: &[(&str, &str)],
    node: &str,
    host: &Host,
) -> Result<Pod> {
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    let spec = json!({
        "nodeName": node,
        "containers": [{"name": "server", "image": "none"}],
    });
    create(&api, json!({"metadata": {"name": name, "labels": map(labels)}, "spec": spec})).await?;
    let status = json!({"status": {
        "phase": "Running",
        "conditions": [ready_condition(true)],
        "podIP": host.v4,
        "podIPs": [{"ip": host.v4}, {"ip": host.v6}],
    }});
    patch_status(&api, name, &status).await
}

/// Makes a Pod ready or not, as its readiness probe would.
pub async fn set_ready(client: &Client, namespace: &str, pod: &str, ready: bool) -> Result<Pod> {
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    patch_status(&api, pod, &json!({"status": {"conditions": [ready_condition(ready)]}})).await
}

/// Deletes a Pod as `kubectl delete` does: it is terminating, and stays, as no kubelet ends it.
/// Its endpoint is Serving and Terminating as long as it is ready.
pub async fn terminate_pod(client: &Client, namespace: &str, pod: &str) -> Result<()> {
    delete_pod(client, namespace, pod, &DeleteParams::default()).await
}

/// Removes a Pod at once.
pub async fn remove_pod(client: &Client, namespace: &str, pod: &str) -> Result<()> {
    delete_pod(client, namespace, pod, &DeleteParams::default().grace_period(0)).await
}

/// Creates a Service with this `spec`, dual stack unless the spec says otherwise.
pub async fn service(client: &Client, namespace: &str, name: &str, spec: Value) -> Result<Service> {
    service_with_annotations(client, namespace, name, &[], spec).await
}

/// As [`service()`], with annotations.
pub async fn service_with_annotations(
    client: &Client,
    namespace: &str,
    name: &str,
    annotations: &[(&str, &str)],
    mut spec: Value,
) -> Result<Service> {
    if spec.get("ipFamilyPolicy").is_none() {
        spec["ipFamilyPolicy"] = json!("PreferDualStack");
    }
    let api = Api::<Service>::namespaced(client.clone(), namespace);
    let metadata = json!({"name": name, "annotations": map(annotations)});
    create(&api, json!({"metadata": metadata, "spec": spec})).await
}

/// The `EndpointSlice`s of a Service, one per family, by the controller.
pub async fn endpoint_slices(
    client: &Client,
    namespace: &str,
    service: &str,
) -> Result<Vec<EndpointSlice>> {
    let api = Api::<EndpointSlice>::namespaced(client.clone(), namespace);
    let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
    let slices = api.list(&of_service).await;
    Ok(slices.with_context(|| format!("list the EndpointSlices of {namespace}/{service}"))?.items)
}

/// Waits until the `EndpointSlice`s of a Service have `count` ready endpoints for each of its
/// families, and gives them. Fails after a minute.
pub async fn wait_for_endpoints(
    client: &Client,
    namespace: &str,
    service: &str,
    count: usize,
) -> Result<Vec<EndpointSlice>> {
    let services = Api::<Service>::namespaced(client.clone(), namespace);
    let found = services.get(service).await;
    let found = found.with_context(|| format!("read the Service {namespace}/{service}"))?;
    let families = found.spec.and_then(|spec| spec.ip_families).context("no ipFamilies")?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let slices = endpoint_slices(client, namespace, service).await?;
        let complete = families.iter().all(|family| {
            let of_family = slices.iter().filter(|slice| slice.address_type == *family);
            // A Service without endpoints has an empty slice, once the controller was there.
            of_family.clone().count() > 0 && of_family.map(ready_endpoints).sum::<usize>() == count
        });
        if complete {
            return Ok(slices);
        }
        if Instant::now() > deadline {
            bail!("{namespace}/{service} has not {count} endpoints after {LIMIT:?}: {slices:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// How many endpoints of a slice are ready.
pub fn ready_endpoints(slice: &EndpointSlice) -> usize {
    let conditions = slice.endpoints.iter().flatten().filter_map(|e| e.conditions.as_ref());
    conditions.filter(|conditions| conditions.ready == Some(true)).count()
}

/// A time for fields that want one; nothing here looks at it.
const EPOCH: &str = "2026-01-01T00:00:00Z";

fn ready_condition(ready: bool) -> Value {
    json!({"type": "Ready", "status": if ready { "True" } else { "False" }})
}

fn map(pairs: &[(&str, &str)]) -> Value {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect()
}

async fn delete_pod(
    client: &Client,
    namespace: &str,
    pod: &str,
    parameters: &DeleteParams,
) -> Result<()> {
    let api = Api::<Pod>::namespaced(client.clone(), namespace);
    let deleted = api.delete(pod, parameters).await;
    deleted.map(drop).with_context(|| format!("delete the Pod {namespace}/{pod}"))
}

async fn patch_status<K>(api: &Api<K>, name: &str, status: &Value) -> Result<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    // A strategic merge patch: conditions are merged by their type.
    let patched = api.patch_status(name, &PatchParams::default(), &Patch::Strategic(status)).await;
    patched.with_context(|| format!("patch the status of the {} {name}", K::kind(&())))
}
