//! The clusters that the proxies are measured on, and the objects that they consist of.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::Result;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use portcullis_integration::daemon::NODE_NAME;
use portcullis_integration::lab::Host;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Where all Services are.
pub const NAMESPACE: &str = "peer";
/// The port of every Service.
pub const PORT: u16 = 80;
/// The port of every endpoint.
pub const ENDPOINT_PORT: u16 = 8080;
/// The most endpoints that a Service has.
pub const MAX_ENDPOINTS: usize = 10;

/// The first `ClusterIP`; the API server keeps the ones before for itself and for the DNS.
const FIRST_CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 0);
/// The first address of an endpoint that does not exist.
const FIRST_ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 0);
/// Pods that a node runs by default (`maxPods` of the kubelet).
const PODS_PER_NODE: usize = 110;

/// A cluster: Services of one port with an `EndpointSlice` each. Two of them, one in the middle
/// and the last one, lead to pods that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// How many Services there are, besides `default/kubernetes`.
    pub services: usize,
    /// How many endpoints each of them has.
    pub endpoints: usize,
    /// How many of them, of every second one, have the session affinity `ClientIP`.
    pub sticky: usize,
}

impl Cluster {
    /// The Services that lead to pods that exist.
    pub fn probed(&self) -> [usize; 2] {
        [self.services / 2, self.services - 1]
    }

    /// Whether a Service has session affinity.
    pub fn is_sticky(&self, service: usize) -> bool {
        service % 2 == 1 && service / 2 < self.sticky
    }

    /// The endpoints of a Service.
    pub fn endpoints_of(&self, service: usize, pods: &[Host]) -> Vec<Ipv4Addr> {
        if self.probed().contains(&service) {
            return pods[..self.endpoints].iter().map(|pod| pod.v4).collect();
        }
        (0..self.endpoints).map(|n| offset(FIRST_ENDPOINT, service * MAX_ENDPOINTS + n)).collect()
    }

    /// A Service as the API server takes it.
    ///
    /// # Errors
    /// Never in practice: the object is well-formed.
    pub fn service(&self, service: usize) -> Result<Service> {
        let ip = cluster_ip(service);
        let affinity = if self.is_sticky(service) { "ClientIP" } else { "None" };
        Ok(serde_json::from_value(json!({
            "metadata": { "name": name(service), "namespace": NAMESPACE },
            "spec": {
                "clusterIP": ip,
                "clusterIPs": [ip],
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "ports": [{ "name": "http", "port": PORT, "targetPort": ENDPOINT_PORT }],
                "sessionAffinity": affinity,
            },
        }))?)
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { services, endpoints, sticky } = self;
        write!(f, "{} x {endpoints}", crate::markdown::thousands(*services))?;
        if *sticky > 0 {
            write!(f, ", {} with affinity", crate::markdown::thousands(*sticky))?;
        }
        Ok(())
    }
}

/// The `EndpointSlice` of a Service.
///
/// # Errors
/// Never in practice: the object is well-formed.
pub fn slice(service: usize, addresses: &[Ipv4Addr], pods: &[Host]) -> Result<EndpointSlice> {
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|address| {
            let is_here = pods.iter().any(|pod| pod.v4 == *address);
            let elsewhere = || format!("other-{}", service / PODS_PER_NODE);
            let node = if is_here { NODE_NAME.to_owned() } else { elsewhere() };
            json!({ "addresses": [address], "conditions": { "ready": true }, "nodeName": node })
        })
        .collect();
    Ok(serde_json::from_value(json!({
        "metadata": {
            "name": name(service),
            "namespace": NAMESPACE,
            "labels": {
                "kubernetes.io/service-name": name(service),
                "endpointslice.kubernetes.io/managed-by": NAMESPACE,
            },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": ENDPOINT_PORT, "protocol": "TCP" }],
        "endpoints": endpoints,
    }))?)
}

/// The name of a Service and of its `EndpointSlice`.
pub fn name(service: usize) -> String {
    format!("service-{service:05}")
}

/// The `ClusterIP` of a Service.
pub fn cluster_ip(service: usize) -> Ipv4Addr {
    offset(FIRST_CLUSTER_IP, service)
}

/// The address `number` addresses behind `first`.
pub fn offset(first: Ipv4Addr, number: usize) -> Ipv4Addr {
    let number = u32::try_from(number).expect("fewer than there are addresses");
    Ipv4Addr::from_bits(first.to_bits() + number)
}
