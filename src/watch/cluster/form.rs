//! What is read of each kind of objects, and nothing else: the types of `k8s_openapi` also read
//! what nobody here looks at, and refuse an object for it. Most of a small object is
//! `managedFields`, and most of an endpoint is `targetRef`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Of a Service.
#[derive(Deserialize)]
pub(super) struct Service {
    metadata: Option<Metadata>,
    spec: Option<ServiceSpec>,
    status: Option<ServiceStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    external_traffic_policy: Option<String>,
    health_check_node_port: Option<i32>,
    internal_traffic_policy: Option<String>,
    load_balancer_source_ranges: Option<Vec<String>>,
    ports: Option<Vec<ServicePort>>,
    session_affinity: Option<String>,
    session_affinity_config: Option<core::SessionAffinityConfig>,
    #[serde(rename = "type")]
    type_: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServicePort {
    name: Option<String>,
    node_port: Option<i32>,
    port: Option<i32>,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatus {
    load_balancer: Option<LoadBalancer>,
}

#[derive(Deserialize)]
struct LoadBalancer {
    ingress: Option<Vec<Ingress>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ingress {
    ip: Option<String>,
    ip_mode: Option<String>,
}

/// Of an `EndpointSlice`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    metadata: Option<Metadata>,
    address_type: Option<String>,
    ports: Option<Vec<EndpointPort>>,
    endpoints: Option<Vec<Endpoint>>,
}

#[derive(Deserialize)]
struct EndpointPort {
    name: Option<String>,
    port: Option<i32>,
    protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    addresses: Option<Vec<String>>,
    conditions: Option<discovery::EndpointConditions>,
    hints: Option<discovery::EndpointHints>,
    node_name: Option<String>,
}

/// Of a Node.
#[derive(Deserialize)]
pub(super) struct Node {
    metadata: Option<Metadata>,
    spec: Option<NodeSpec>,
    status: Option<NodeStatus>,
}

#[derive(Deserialize)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
    taints: Option<Vec<Taint>>,
}

#[derive(Deserialize)]
struct Taint {
    key: Option<String>,
}

#[derive(Deserialize)]
struct NodeStatus {
    addresses: Option<Vec<core::NodeAddress>>,
}

/// Of a `ServiceCIDR`.
#[derive(Deserialize)]
pub(super) struct ServiceCidr {
    metadata: Option<Metadata>,
    spec: Option<ServiceCidrSpec>,
}

#[derive(Deserialize)]
struct ServiceCidrSpec {
    cidrs: Option<Vec<String>>,
}

fn metadata(read: Option<Metadata>) -> ObjectMeta {
    let Some(read) = read else { return ObjectMeta::default() };
    ObjectMeta {
        name: read.name,
        namespace: read.namespace,
        resource_version: read.resource_version,
        creation_timestamp: read.creation_timestamp,
        deletion_timestamp: read.deletion_timestamp,
        labels: read.labels,
        annotations: read.annotations,
        ..ObjectMeta::default()
    }
}

impl From<Service> for core::Service {
    fn from(read: Service) -> Self {
        let status = read.status.map(|status| core::ServiceStatus {
            load_balancer: status.load_balancer.map(Into::into),
            conditions: None,
        });
        Self { metadata: metadata(read.metadata), spec: read.spec.map(Into::into), status }
    }
}

impl From<ServiceSpec> for core::ServiceSpec {
    fn from(read: ServiceSpec) -> Self {
        let port = |port: ServicePort| core::ServicePort {
            name: port.name,
            node_port: port.node_port,
            port: port.port.unwrap_or_default(),
            protocol: port.protocol,
            ..Default::default()
        };
        Self {
            cluster_ip: read.cluster_ip,
            cluster_ips: read.cluster_ips,
            external_ips: read.external_ips,
            external_traffic_policy: read.external_traffic_policy,
            health_check_node_port: read.health_check_node_port,
            internal_traffic_policy: read.internal_traffic_policy,
            load_balancer_source_ranges: read.load_balancer_source_ranges,
            ports: read.ports.map(|ports| ports.into_iter().map(port).collect()),
            session_affinity: read.session_affinity,
            session_affinity_config: read.session_affinity_config,
            type_: read.type_,
            ..Self::default()
        }
    }
}

impl From<LoadBalancer> for core::LoadBalancerStatus {
    fn from(read: LoadBalancer) -> Self {
        let entry = |Ingress { ip, ip_mode }| core::LoadBalancerIngress {
            ip,
            ip_mode,
            ..Default::default()
        };
        Self { ingress: read.ingress.map(|all| all.into_iter().map(entry).collect()) }
    }
}

impl From<EndpointSlice> for discovery::EndpointSlice {
    fn from(read: EndpointSlice) -> Self {
        let port = |EndpointPort { name, port, protocol }| discovery::EndpointPort {
            name,
            port,
            protocol,
            ..Default::default()
        };
        let endpoint = |endpoint: Endpoint| discovery::Endpoint {
            addresses: endpoint.addresses.unwrap_or_default(),
            conditions: endpoint.conditions,
            hints: endpoint.hints,
            node_name: endpoint.node_name,
            ..Default::default()
        };
        Self {
            metadata: metadata(read.metadata),
            address_type: read.address_type.unwrap_or_default(),
            ports: read.ports.map(|all| all.into_iter().map(port).collect()),
            endpoints: read.endpoints.map(|all| all.into_iter().map(endpoint).collect()),
        }
    }
}

impl From<Node> for core::Node {
    fn from(read: Node) -> Self {
        let taint =
            |Taint { key }| core::Taint { key: key.unwrap_or_default(), ..Default::default() };
        let spec = read.spec.map(|spec| core::NodeSpec {
            pod_cidr: spec.pod_cidr,
            pod_cidrs: spec.pod_cidrs,
            taints: spec.taints.map(|all| all.into_iter().map(taint).collect()),
            ..Default::default()
        });
        let status = read
            .status
            .map(|status| core::NodeStatus { addresses: status.addresses, ..Default::default() });
        Self { metadata: metadata(read.metadata), spec, status }
    }
}

impl From<ServiceCidr> for networking::ServiceCIDR {
    fn from(read: ServiceCidr) -> Self {
        let spec = read.spec.map(|ServiceCidrSpec { cidrs }| networking::ServiceCIDRSpec { cidrs });
        Self { metadata: metadata(read.metadata), spec, status: None }
    }
}
