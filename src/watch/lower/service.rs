//! Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use k8s_openapi::api::core::v1 as core;

use super::{Findings, is_port_name, name, namespace, port, protocol, shown, unicast};
use crate::model::{
    CidrSet, Family, ObjectKind, Protocol, Service, ServiceName, ServicePort, Severity,
    SourceRestriction,
};

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
    let has_node_ports = ports.iter().any(|port| port.node_port.is_some());
    let node_port_sources = sources(object, has_node_ports, &mut findings);
    unknown_annotations(object, &mut findings);
    not_implemented(object, spec, exposure, &mut findings);
    let created = object.metadata.creation_timestamp.as_ref();
    Some(Service {
        name: service_name(object),
        created: created.map_or(0, |time| time.0.as_second()),
        cluster_ips,
        ports,
        node_port_sources,
        diagnostics: findings.diagnostics,
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
    let mut ports = Vec::new();
    for (index, entry) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let Some(port) = port(entry.port) else {
            let message = format!("{} is not a port; the port is left out", entry.port);
            findings.error(field("port"), message);
            continue;
        };
        let Some(protocol) = protocol(entry.protocol.as_deref()) else {
            let other = shown(entry.protocol.as_deref().unwrap_or_default());
            let message = format!("{other} is none of TCP, UDP and SCTP; the port is left out");
            findings.error(field("protocol"), message);
            continue;
        };
        let name = entry.name.as_deref().unwrap_or_default();
        if !is_port_name(name) {
            let message = format!("{} is not a port name; the port is left out", shown(name));
            findings.error(field("name"), message);
            continue;
        }
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
pub(crate) fn is_ours(annotation: &str) -> bool {
    let prefix = annotation.as_bytes().get(..OUR_ANNOTATIONS.len());
    prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(OUR_ANNOTATIONS.as_bytes()))
}

/// A misspelt annotation leaves node ports open that its author thinks closed.
fn unknown_annotations(object: &core::Service, findings: &mut Findings) {
    for key in object.metadata.annotations.iter().flatten().map(|(key, _)| key) {
        if is_ours(key) && key != SOURCES_ANNOTATION {
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

/// What an object may ask for and does not get yet: said, with what happens instead.
fn not_implemented(
    object: &core::Service,
    spec: &core::ServiceSpec,
    exposure: Exposure,
    findings: &mut Findings,
) {
    let is = |value: &Option<String>, wanted: &str| value.as_deref() == Some(wanted);
    let external = exposure != Exposure::Internal;
    if external && is(&spec.external_traffic_policy, "Local") {
        findings.warning(
            "spec.externalTrafficPolicy",
            "Local is not supported yet: treated as Cluster, so endpoints of all nodes are used \
             and the client's address is hidden from them",
        );
    }
    if is(&spec.internal_traffic_policy, "Local") {
        findings.warning(
            "spec.internalTrafficPolicy",
            "Local is not supported yet: treated as Cluster, so endpoints of all nodes are used",
        );
    }
    if is(&spec.session_affinity, "ClientIP") {
        findings.warning(
            "spec.sessionAffinity",
            "ClientIP is not supported yet: each connection goes to any endpoint",
        );
    }
    if spec.traffic_distribution.as_deref().is_some_and(|value| !value.is_empty()) {
        findings.warning(
            "spec.trafficDistribution",
            "not supported yet: endpoints of all zones and nodes are used alike",
        );
    }
    if spec.external_ips.iter().flatten().next().is_some() {
        findings.warning("spec.externalIPs", "not supported yet: not served at these addresses");
    }
    if spec.load_balancer_source_ranges.iter().flatten().next().is_some() {
        findings.warning(
            "spec.loadBalancerSourceRanges",
            format!(
                "not supported yet: nothing is filtered by it; to restrict node ports use the \
                 annotation {SOURCES_ANNOTATION}"
            ),
        );
    }
    if external && spec.health_check_node_port.is_some_and(|port| port != 0) {
        findings.warning("spec.healthCheckNodePort", "not supported yet: nothing answers there");
    }
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|balancer| balancer.ingress.as_ref());
    // An address in mode Proxy is the load balancer's own; traffic for it never comes here.
    let ours = |ingress: &core::LoadBalancerIngress| {
        ingress.ip.as_deref().is_some_and(|ip| !ip.is_empty()) && !is(&ingress.ip_mode, "Proxy")
    };
    if exposure == Exposure::LoadBalancer && ingress.is_some_and(|all| all.iter().any(ours)) {
        findings.warning(
            "status.loadBalancer.ingress",
            "load-balancer addresses are not supported yet: not served there; node ports are",
        );
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json! at the call reads better
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn object(metadata: Value, spec: Value) -> core::Service {
        let object = json!({"metadata": metadata, "spec": spec});
        serde_json::from_value(object).expect("a Service")
    }

    fn with(annotations: Value, mut spec: Value) -> Service {
        let fields = spec.as_object_mut().expect("a mapping");
        fields.entry("clusterIP").or_insert(json!("10.96.0.7"));
        let metadata = json!({"name": "web", "namespace": "shop", "annotations": annotations});
        service(&object(metadata, spec)).expect("ours")
    }

    fn findings(service: &Service) -> Vec<String> {
        service
            .diagnostics
            .iter()
            .map(|d| format!("{}: {}: {}", d.severity, d.field, d.message))
            .collect()
    }

    fn numbers(service: &Service) -> Vec<(u16, u16)> {
        let node_port = |port: &ServicePort| port.node_port.map_or(0, NonZeroU16::get);
        service.ports.iter().map(|port| (port.port.get(), node_port(port))).collect()
    }

    #[test]
    fn what_is_ours() {
        let none = json!({});
        let other = json!({"service.kubernetes.io/service-proxy-name": ""});
        for (labels, spec, expected) in [
            (&none, json!({"clusterIP": "10.96.0.7"}), Relevance::Ours),
            (&none, json!({"clusterIPs": ["10.96.0.7"]}), Relevance::Ours),
            (&none, json!({"clusterIP": "nonsense"}), Relevance::Ours),
            (&other, json!({"clusterIP": "10.96.0.7"}), Relevance::OtherProxy),
            (
                &none,
                json!({"type": "ExternalName", "externalName": "x.y"}),
                Relevance::ExternalName,
            ),
            (
                &none,
                json!({"type": "ExternalName", "clusterIP": "10.96.0.7"}),
                Relevance::ExternalName,
            ),
            (&none, json!({"clusterIP": "None", "clusterIPs": ["None"]}), Relevance::Headless),
            (&none, json!({"clusterIP": "None"}), Relevance::Headless),
            (&none, json!({}), Relevance::NoClusterIp),
            (&none, json!({"clusterIP": "", "clusterIPs": []}), Relevance::NoClusterIp),
        ] {
            let object = object(json!({"name": "web", "labels": labels}), spec.clone());
            assert_eq!(relevance(&object), expected, "{labels} {spec}");
            assert_eq!(service(&object).is_some(), expected == Relevance::Ours, "{spec}");
        }
        assert_eq!(relevance(&core::Service::default()), Relevance::NoClusterIp);
    }

    #[test]
    fn name_and_age() {
        let metadata = json!({"name": "web", "creationTimestamp": "1970-01-01T00:01:01Z"});
        let got = service(&object(metadata, json!({"clusterIP": "10.96.0.7"}))).unwrap();
        assert_eq!((got.name, got.created), (ServiceName::new("default", "web"), 61));
        assert_eq!(with(json!({}), json!({})).created, 0);
    }

    #[test]
    fn cluster_ips() {
        type Case = (Value, &'static [&'static str], &'static [&'static str]);
        let table: Vec<Case> = vec![
            (json!({"clusterIP": "10.96.0.7"}), &["10.96.0.7"], &[]),
            (
                json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"]}),
                &["10.96.0.7", "fd00::7"],
                &[],
            ),
            // The list is the truth.
            (json!({"clusterIP": "10.96.0.7", "clusterIPs": ["fd00::7"]}), &["fd00::7"], &[]),
            (
                json!({"clusterIPs": ["10.96.0.7", "10.96.0.8", "fd00::7"]}),
                &["10.96.0.7", "fd00::7"],
                &["error: spec.clusterIPs[1]: 10.96.0.8 is a second address of its family; not \
                   served"],
            ),
            (
                json!({"clusterIP": "10.96.0", "ports": [{"port": 80}]}),
                &[],
                &["error: spec.clusterIP: \"10.96.0\" is not an IP address; not served"],
            ),
            (
                json!({"clusterIPs": ["0.0.0.0", "fd00::7"]}),
                &["fd00::7"],
                &["error: spec.clusterIPs[0]: \"0.0.0.0\" is the unspecified address; not served"],
            ),
        ];
        for (spec, expected, messages) in table {
            let got = with(json!({}), spec.clone());
            let addresses: Vec<String> = got.cluster_ips.iter().map(ToString::to_string).collect();
            assert_eq!(addresses, expected, "{spec}");
            assert_eq!(findings(&got), messages, "{spec}");
            assert!(!got.cluster_ips.is_empty() || got.ports.is_empty(), "{spec}");
        }
    }

    #[test]
    fn ports() {
        type Case = (Value, &'static [(u16, u16)], &'static [&'static str]);
        let table: Vec<Case> = vec![
            (json!([{"port": 80}]), &[(80, 0)], &[]),
            (json!([{"port": 80, "nodePort": 0}]), &[(80, 0)], &[]),
            (json!([{"port": 80, "nodePort": 30080}]), &[(80, 30080)], &[]),
            (json!([{"port": 1}, {"name": "b", "port": 65535}]), &[(1, 0), (65535, 0)], &[]),
            (
                json!([{"name": "a", "port": 0}, {"name": "b", "port": 65536}, {"port": 80}]),
                &[(80, 0)],
                &[
                    "error: spec.ports[0].port: 0 is not a port; the port is left out",
                    "error: spec.ports[1].port: 65536 is not a port; the port is left out",
                ],
            ),
            (
                json!([{"port": 80, "protocol": "QUIC"}, {"name": "b", "port": 81}]),
                &[(81, 0)],
                &[
                    "error: spec.ports[0].protocol: \"QUIC\" is none of TCP, UDP and SCTP; the port \
                   is left out",
                ],
            ),
            // One number, two protocols.
            (
                json!([{"name": "a", "port": 53, "nodePort": 30053, "protocol": "UDP"},
                    {"name": "b", "port": 53, "nodePort": 30053, "protocol": "TCP"}]),
                &[(53, 30053), (53, 30053)],
                &[],
            ),
            (
                json!([{"name": "a", "port": 80}, {"name": "b", "port": 80}]),
                &[(80, 0)],
                &["error: spec.ports[1].port: tcp port 80 is an earlier one too; left out"],
            ),
            (
                json!([{"name": "a", "port": 80}, {"name": "a", "port": 81},
                    {"port": 82}, {"port": 83}]),
                &[(80, 0), (82, 0)],
                &[
                    "error: spec.ports[1].name: an earlier port is called \"a\" too; this one is \
                     left out",
                    "error: spec.ports[3].name: a Service with several ports must name them; this \
                     one is left out",
                ],
            ),
            (
                json!([{"name": "a\"b", "port": 80}]),
                &[],
                &["error: spec.ports[0].name: \"a\\\"b\" is not a port name; the port is left \
                   out"],
            ),
            // Without its node port, a port still has its ClusterIP.
            (
                json!([{"name": "a", "port": 80, "nodePort": 30080},
                    {"name": "b", "port": 81, "nodePort": 30080},
                    {"name": "c", "port": 82, "nodePort": 70000}]),
                &[(80, 30080), (81, 0), (82, 0)],
                &[
                    "error: spec.ports[1].nodePort: tcp node port 30080 is an earlier port's too; \
                     not served here",
                    "error: spec.ports[2].nodePort: 70000 is not a port; not served",
                ],
            ),
        ];
        for (ports, expected, messages) in table {
            for service_type in ["NodePort", "LoadBalancer"] {
                let got = with(json!({}), json!({"type": service_type, "ports": ports}));
                assert_eq!(numbers(&got), expected, "{ports}");
                assert_eq!(findings(&got), messages, "{ports}");
            }
        }
    }

    #[test]
    fn node_ports_need_a_type() {
        let ports = json!([{"port": 80, "nodePort": 30080}]);
        for spec in [json!({"ports": ports}), json!({"ports": ports, "type": "ClusterIP"})] {
            let got = with(json!({}), spec);
            assert_eq!(numbers(&got), [(80, 0)]);
            assert_eq!(
                findings(&got),
                ["warning: spec.ports[0].nodePort: node ports are for the types NodePort and \
                  LoadBalancer; not served"],
            );
        }
        let got = with(json!({}), json!({"ports": [{"port": 80}], "type": "Nodeport"}));
        assert_eq!(numbers(&got), [(80, 0)]);
        assert_eq!(
            findings(&got),
            ["error: spec.type: \"Nodeport\" is not a type of Service; served as ClusterIP"],
        );
    }

    #[test]
    fn source_restrictions() {
        let allow = |list| SourceRestriction::Allow(CidrSet::parse(list).unwrap());
        let field = "metadata.annotations[portcullis.dev/allowed-source-cidrs]";
        let no_port = "the Service has no node port that this could apply to";
        for (node_port, list, expected, finding) in [
            (30080, "10.0.0.0/8, 2001:db8::/32", allow("10.0.0.0/8,2001:db8::/32"), None),
            (30080, "", allow(""), None),
            (30080, "10.1.2.3/8", allow("10.0.0.0/8"), None),
            (
                30080,
                "10.0.0.0/8, office",
                SourceRestriction::Closed,
                Some(format!(
                    "error: {field}: entry 2: \"office\" is neither a CIDR nor an IP address; the \
                     Service's node ports are closed to everyone"
                )),
            ),
            (0, "10.0.0.0/8", allow("10.0.0.0/8"), Some(format!("warning: {field}: {no_port}"))),
            (
                0,
                "office",
                SourceRestriction::Closed,
                Some(format!(
                    "error: {field}: entry 1: \"office\" is neither a CIDR nor an IP address; \
                     {no_port}"
                )),
            ),
        ] {
            let annotations = json!({SOURCES_ANNOTATION: list});
            let ports = json!([{"port": 80, "nodePort": node_port}]);
            let got = with(annotations, json!({"type": "NodePort", "ports": ports}));
            assert_eq!(got.node_port_sources, expected, "{list:?}");
            assert_eq!(findings(&got), Vec::from_iter(finding), "{list:?}");
        }
        let got = with(json!({"example.com/note": "x"}), json!({}));
        assert_eq!(got.node_port_sources, SourceRestriction::Unrestricted);
        assert_eq!(got.diagnostics, []);
    }

    #[test]
    fn misspelt_annotations() {
        for key in [
            "portcullis.dev/allowed-source-cidr",
            "Portcullis.dev/allowed-source-cidrs",
            "portcullis.dev/",
        ] {
            let got = with(json!({key: "10.0.0.0/8"}), json!({}));
            assert_eq!(got.node_port_sources, SourceRestriction::Unrestricted);
            let found = findings(&got);
            assert_eq!(found.len(), 1, "{found:?}");
            let expected = format!("warning: metadata.annotations[{key}]: unknown, and ignored");
            assert!(found[0].starts_with(&expected), "{found:?}");
        }
        for key in ["portcullis.developers/x", "portcullis", "x.portcullis.dev/y"] {
            assert_eq!(with(json!({key: ""}), json!({})).diagnostics, [], "{key}");
        }
    }

    #[test]
    fn what_is_not_implemented_is_said() {
        let node_port = |field: &str, value: Value| json!({"type": "NodePort", field: value});
        let balancer = |field: &str, value: Value| json!({"type": "LoadBalancer", field: value});
        for (spec, field) in [
            (node_port("externalTrafficPolicy", json!("Local")), "spec.externalTrafficPolicy"),
            (balancer("externalTrafficPolicy", json!("Local")), "spec.externalTrafficPolicy"),
            (json!({"internalTrafficPolicy": "Local"}), "spec.internalTrafficPolicy"),
            (json!({"sessionAffinity": "ClientIP"}), "spec.sessionAffinity"),
            (json!({"trafficDistribution": "PreferSameZone"}), "spec.trafficDistribution"),
            (json!({"externalIPs": ["192.0.2.1"]}), "spec.externalIPs"),
            (
                balancer("loadBalancerSourceRanges", json!(["10.0.0.0/8"])),
                "spec.loadBalancerSourceRanges",
            ),
            (balancer("healthCheckNodePort", json!(31000)), "spec.healthCheckNodePort"),
        ] {
            let got = with(json!({}), spec.clone());
            let fields: Vec<_> =
                got.diagnostics.iter().map(|d| (d.field.as_str(), d.severity)).collect();
            assert_eq!(fields, [(field, Severity::Warning)], "{spec}");
        }
        let defaults = json!({"externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None", "externalIPs": [], "healthCheckNodePort": 0, "type": "NodePort",
            "publishNotReadyAddresses": true, "loadBalancerSourceRanges": []});
        assert_eq!(with(json!({}), defaults).diagnostics, []);
    }

    #[test]
    fn load_balancer_addresses() {
        for (ingress, said) in [
            (json!([]), false),
            (json!([{"hostname": "lb.example.com"}]), false),
            (json!([{"ip": "192.0.2.1", "ipMode": "Proxy"}]), false),
            (json!([{"ip": "192.0.2.1"}]), true),
            (json!([{"ip": "192.0.2.1", "ipMode": "VIP"}]), true),
        ] {
            let mut object = object(
                json!({"name": "web"}),
                json!({"type": "LoadBalancer", "clusterIP": "10.96.0.7"}),
            );
            object.status =
                serde_json::from_value(json!({"loadBalancer": {"ingress": ingress}})).unwrap();
            let got = service(&object).unwrap();
            let fields: Vec<_> = got.diagnostics.iter().map(|d| d.field.as_str()).collect();
            let expected: &[&str] = if said { &["status.loadBalancer.ingress"] } else { &[] };
            assert_eq!(fields, expected, "{ingress}");
        }
    }
}
