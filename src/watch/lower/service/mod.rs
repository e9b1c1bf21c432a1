//! Services.

mod external;
mod traffic;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use k8s_openapi::api::core::v1 as core;

use super::{Findings, WrittenPort, name, namespace, port, shown, unicast, valid_port};
use crate::model::{
    CidrSet, Family, ObjectKind, Protocol, Service, ServiceName, ServicePort, Severity,
    SourceRestriction,
};
use external::External;
use traffic::{balancing, policy, session_affinity};

pub use traffic::BALANCING_ANNOTATION;

/// The annotation that says who may reach a Service's node ports, as comma-separated CIDRs.
pub const SOURCES_ANNOTATION: &str = "portcullis.dev/allowed-source-cidrs";

/// What annotations of ours begin with.
const OUR_ANNOTATIONS: &str = "portcullis.dev/";

/// The label that hands a Service to another proxy (KEP-2447).
pub(crate) const OTHER_PROXY_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// Whether a Service is this proxy's business, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relevance {
    /// It is.
    Ours,
    /// It has the label `service.kubernetes.io/service-proxy-name`, with whatever value.
    OtherProxy,
    /// It is a name in the DNS.
    ExternalName,
    /// `clusterIP: None`: clients talk to the endpoints themselves.
    Headless,
    /// It has no cluster IP yet.
    NoClusterIp,
}

/// Namespace and name of the object.
pub fn service_name(object: &core::Service) -> ServiceName {
    ServiceName::new(namespace(&object.metadata), name(&object.metadata))
}

/// Whether a Service is this proxy's business.
pub fn relevance(object: &core::Service) -> Relevance {
    let labels = object.metadata.labels.as_ref();
    if labels.is_some_and(|labels| labels.contains_key(OTHER_PROXY_LABEL)) {
        return Relevance::OtherProxy;
    }
    let Some(spec) = &object.spec else { return Relevance::NoClusterIp };
    if spec.type_.as_deref() == Some("ExternalName") {
        return Relevance::ExternalName;
    }
    let addresses = written_cluster_ips(spec);
    if addresses.iter().any(|(_, address)| *address == "None") {
        return Relevance::Headless;
    }
    if addresses.is_empty() { Relevance::NoClusterIp } else { Relevance::Ours }
}

/// Lowers a Service; `None` where it is none of this proxy's business ([`relevance`]).
///
/// A Service of which no cluster IP can be used becomes one without addresses and ports, which
/// only carries its diagnostics.
pub fn service(object: &core::Service) -> Option<Service> {
    if relevance(object) != Relevance::Ours {
        return None;
    }
    let spec = object.spec.as_ref()?;
    let mut findings = Findings::of(ObjectKind::Service, &object.metadata);
    let cluster_ips = cluster_ips(spec, &mut findings);
    let exposure = exposure(spec, &mut findings);
    let ports =
        if cluster_ips.is_empty() { Vec::new() } else { ports(spec, exposure, &mut findings) };
    let created = object.metadata.creation_timestamp.as_ref();
    let mut external = External::of(object, spec, exposure, &cluster_ips, &mut findings);
    let own = |port: &ServicePort| {
        port.protocol == Protocol::Tcp && port.node_port == external.health_check_port
    };
    if external.health_check_port.is_some() && ports.iter().any(own) {
        let message = "is one of the Service's own node ports; nothing else answers there";
        findings.error("spec.healthCheckNodePort", message);
        external.health_check_port = None;
    }
    let has_node_ports =
        external.health_check_port.is_some() || ports.iter().any(|port| port.node_port.is_some());
    let node_port_sources = sources(object, has_node_ports, &mut findings);
    unknown_annotations(object, &mut findings);
    Some(Service {
        created: created.map_or(0, |time| time.0.as_second()),
        ports,
        internal_traffic: policy(
            spec.internal_traffic_policy.as_deref(),
            "spec.internalTrafficPolicy",
            &mut findings,
        ),
        external_traffic: external.traffic,
        session_affinity: session_affinity(spec, &mut findings),
        balancing: balancing(object, &mut findings),
        node_port_sources,
        load_balancer_ips: external.load_balancer_ips,
        external_ips: external.addresses,
        load_balancer_sources: external.load_balancer_sources,
        health_check_port: external.health_check_port,
        cluster_ips,
        diagnostics: findings.diagnostics,
        ..Service::new(service_name(object))
    })
}

/// Whether a Service is reached from outside the cluster: what `type` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exposure {
    Internal,
    NodePort,
    LoadBalancer,
}

fn exposure(spec: &core::ServiceSpec, findings: &mut Findings) -> Exposure {
    match spec.type_.as_deref() {
        None | Some("" | "ClusterIP") => Exposure::Internal,
        Some("NodePort") => Exposure::NodePort,
        Some("LoadBalancer") => Exposure::LoadBalancer,
        Some(other) => {
            let message = format!("{} is not a type of Service; served as ClusterIP", shown(other));
            findings.error("spec.type", message);
            Exposure::Internal
        }
    }
}

/// `clusterIPs`, or else `clusterIP`: each with its field, without empty ones.
fn written_cluster_ips(spec: &core::ServiceSpec) -> Vec<(String, &str)> {
    let many = spec.cluster_ips.iter().flatten().enumerate();
    let many = many.map(|(index, address)| (format!("spec.clusterIPs[{index}]"), address.as_str()));
    let many: Vec<_> = many.filter(|(_, address)| !address.is_empty()).collect();
    if !many.is_empty() {
        return many;
    }
    let one = spec.cluster_ip.as_deref().filter(|address| !address.is_empty());
    one.map(|address| ("spec.clusterIP".to_owned(), address)).into_iter().collect()
}

fn cluster_ips(spec: &core::ServiceSpec, findings: &mut Findings) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for (field, text) in written_cluster_ips(spec) {
        match unicast(text) {
            Ok(address) => {
                let family = Family::of(address);
                if addresses.iter().any(|known| Family::of(*known) == family) {
                    let message =
                        format!("{address} is a second address of its family; not served");
                    findings.error(field, message);
                } else {
                    addresses.push(address);
                }
            }
            Err(why) => findings.error(field, format!("{} {why}; not served", shown(text))),
        }
    }
    addresses
}

fn ports(
    spec: &core::ServiceSpec,
    exposure: Exposure,
    findings: &mut Findings,
) -> Vec<ServicePort> {
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut node_ports = BTreeSet::new();
    let mut ports = Vec::with_capacity(spec.ports.as_ref().map_or(0, Vec::len));
    for (index, entry) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let written = WrittenPort {
            number: entry.port,
            protocol: entry.protocol.as_deref(),
            name: entry.name.as_deref(),
        };
        let Some((port, protocol, name)) = valid_port(&written, field, findings) else { continue };
        // Slices tell ports apart by name.
        if names.contains(name) {
            let message = match name {
                "" => "a Service with several ports must name them; this one is left out".into(),
                name => format!("an earlier port is called {name:?} too; this one is left out"),
            };
            findings.error(field("name"), message);
            continue;
        }
        if !numbers.insert((protocol, port)) {
            let message = format!("{protocol} port {port} is an earlier one too; left out");
            findings.error(field("port"), message);
            continue;
        }
        names.insert(name);
        let node_port = match node_port(entry, protocol, exposure, &mut node_ports) {
            Ok(node_port) => node_port,
            Err((severity, message)) => {
                findings.add(severity, field("nodePort"), message);
                None
            }
        };
        ports.push(ServicePort { name: name.into(), protocol, port, node_port });
    }
    ports
}

/// The node port of one port.
///
/// # Errors
/// Why there is none although the object has a number.
fn node_port(
    entry: &core::ServicePort,
    protocol: Protocol,
    exposure: Exposure,
    taken: &mut BTreeSet<(Protocol, NonZeroU16)>,
) -> Result<Option<NonZeroU16>, (Severity, String)> {
    let Some(number) = entry.node_port.filter(|number| *number != 0) else { return Ok(None) };
    if exposure == Exposure::Internal {
        let message = "node ports are for the types NodePort and LoadBalancer; not served";
        return Err((Severity::Warning, message.to_owned()));
    }
    let Some(node_port) = port(number) else {
        return Err((Severity::Error, format!("{number} is not a port; not served")));
    };
    if !taken.insert((protocol, node_port)) {
        let message =
            format!("{protocol} node port {node_port} is an earlier port's too; not served here");
        return Err((Severity::Error, message));
    }
    Ok(Some(node_port))
}

fn sources(
    object: &core::Service,
    has_node_ports: bool,
    findings: &mut Findings,
) -> SourceRestriction {
    let annotations = object.metadata.annotations.as_ref();
    let Some(list) = annotations.and_then(|annotations| annotations.get(SOURCES_ANNOTATION)) else {
        return SourceRestriction::Unrestricted;
    };
    let field = annotation_field(SOURCES_ANNOTATION);
    match (CidrSet::parse(list), has_node_ports) {
        (Ok(cidrs), true) => SourceRestriction::Allow(cidrs),
        (Ok(cidrs), false) => {
            findings.warning(field, "the Service has no node port that this could apply to");
            SourceRestriction::Allow(cidrs)
        }
        (Err(error), true) => {
            let message = format!("{error}; the Service's node ports are closed to everyone");
            findings.error(field, message);
            SourceRestriction::Closed
        }
        (Err(error), false) => {
            let message = format!("{error}; the Service has no node port that this could apply to");
            findings.error(field, message);
            SourceRestriction::Closed
        }
    }
}

/// Whether an annotation is meant for this proxy. Case does not matter, because the API server
/// accepts any.
fn is_ours(annotation: &str) -> bool {
    let prefix = annotation.as_bytes().get(..OUR_ANNOTATIONS.len());
    prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(OUR_ANNOTATIONS.as_bytes()))
}

/// A misspelt annotation leaves node ports open that its author thinks closed.
fn unknown_annotations(object: &core::Service, findings: &mut Findings) {
    for key in object.metadata.annotations.iter().flatten().map(|(key, _)| key) {
        if is_ours(key) && ![SOURCES_ANNOTATION, BALANCING_ANNOTATION].contains(&key.as_str()) {
            let message = format!(
                "unknown, and ignored; the annotation that restricts node ports is called \
                 {SOURCES_ANNOTATION}"
            );
            findings.warning(annotation_field(key), message);
        }
    }
}

fn annotation_field(key: &str) -> String {
    format!("metadata.annotations[{key}]")
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json! at the call reads better
mod tests;
