//! One complete list of everything, without watching.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::api::ListParams;
use kube::{Api, Client};
use serde::de::DeserializeOwned;

use super::Error;
use super::wire::Wire;
use crate::watch::{Index, Options};

/// How many objects the API server is asked for at a time.
const PAGE: u32 = 500;

/// How often a list is begun that the API server says has become too old before its end.
const ATTEMPTS: usize = 3;

/// Lists everything that the proxy needs to know, once.
///
/// # Errors
/// When one of the lists fails.
pub async fn load(client: Client, options: &Options) -> Result<Index, Error> {
    let mut index = Index::new(options);
    let slices: Api<Wire<discovery::EndpointSlice>> = Api::all(client.clone());
    let services: Api<Wire<core::Service>> = Api::all(client.clone());
    let nodes: Api<Wire<core::Node>> = Api::all(client.clone());
    let service_cidrs: Api<Wire<networking::ServiceCIDR>> = Api::all(client);
    let failed = |what| move |source| Error::List { what, source: Box::new(source) };
    for slice in all(&slices, &super::slices()).await.map_err(failed("EndpointSlices"))? {
        index.set_slice(&slice.name, slice.lowered);
    }
    for service in all(&services, &super::services()).await.map_err(failed("Services"))? {
        index.set_service(&service.name, service.lowered);
    }
    let node = nodes.get_opt(&options.node_name).await.map_err(failed("the Node"))?;
    index.set_node(node.map(|node| node.lowered).unwrap_or_default());
    let listed = match all(&service_cidrs, "").await {
        // Before Kubernetes 1.33 there are none, and not every account may list them.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Vec::new(),
        listed => listed.map_err(failed("ServiceCIDRs"))?,
    };
    for cidr in listed {
        index.set_service_cidr(&cidr.name, Some(cidr.lowered));
    }
    Ok(index)
}

async fn all<K>(api: &Api<K>, labels: &str) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut attempts = 1..=ATTEMPTS;
    loop {
        let last = attempts.next().is_none_or(|attempt| attempt == ATTEMPTS);
        match pages(api, labels).await {
            Err(kube::Error::Api(status)) if status.code == 410 && !last => {}
            listed => return listed,
        }
    }
}

async fn pages<K>(api: &Api<K>, labels: &str) -> Result<Vec<K>, kube::Error>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut objects = Vec::new();
    let mut page = ListParams::default().labels(labels).limit(PAGE);
    loop {
        let list = api.list(&page).await?;
        objects.extend(list.items);
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(objects),
        }
    }
}
