//! Every rule of lowering Services, as tables.

use serde_json::{Value, json};

use super::*;
use crate::model::{Balancing, TrafficPolicy};

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
        (&none, json!({"type": "ExternalName", "externalName": "x.y"}), Relevance::ExternalName),
        (&none, json!({"type": "ExternalName", "clusterIP": "10.96.0.7"}), Relevance::ExternalName),
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
            &["error: spec.ports[0].protocol: \"QUIC\" is none of TCP, UDP and SCTP; the port \
               is left out"],
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
fn health_check_ports() {
    let local = |port| {
        json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local",
        "healthCheckNodePort": port})
    };
    let got = with(json!({}), local(31000));
    assert_eq!(findings(&got), [""; 0]);
    assert_eq!(got.health_check_port, NonZeroU16::new(31000));
    let got = with(json!({}), local(65536));
    let expected = ["error: spec.healthCheckNodePort: 65536 is not a port; nothing answers there"];
    assert_eq!(findings(&got), expected);
    let mut own = local(31000);
    own["ports"] = json!([{"port": 80, "nodePort": 31000}]);
    let got = with(json!({}), own);
    let expected = ["error: spec.healthCheckNodePort: is one of the Service's own node ports; \
                     nothing else answers there"];
    assert_eq!(
        (findings(&got), got.health_check_port),
        (expected.map(String::from).to_vec(), None)
    );
    // Nobody asks there with another policy, or of another type.
    let cluster = json!({"type": "LoadBalancer", "healthCheckNodePort": 31000});
    assert_eq!(with(json!({}), cluster).health_check_port, None);
}

#[test]
fn policies() {
    use TrafficPolicy::{Cluster, Local};
    for (text, expected, finding) in [
        (json!(null), Cluster, None),
        (json!(""), Cluster, None),
        (json!("Cluster"), Cluster, None),
        (json!("Local"), Local, None),
        (
            json!("local"),
            Cluster,
            Some("\"local\" is none of Cluster and Local; treated as Cluster"),
        ),
    ] {
        for field in ["internalTrafficPolicy", "externalTrafficPolicy"] {
            let got = with(json!({}), json!({"type": "NodePort", field: text}));
            let finding = finding.map(|finding| format!("error: spec.{field}: {finding}"));
            assert_eq!(findings(&got), Vec::from_iter(finding), "{text}");
            let (internal, external) = (got.internal_traffic, got.external_traffic);
            let of_field = if field.starts_with('i') { internal } else { external };
            assert_eq!(of_field, expected, "{field}: {text}");
        }
    }
}

#[test]
fn affinity() {
    let timeout = |seconds: Value| {
        json!({"sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}})
    };
    let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    for (spec, expected, finding) in [
        (json!({}), None, None),
        (json!({"sessionAffinity": "None"}), None, None),
        (json!({"sessionAffinity": "ClientIP"}), Some(10_800), None),
        (timeout(json!(1)), Some(1), None),
        (timeout(json!(86_400)), Some(86_400), None),
        (timeout(json!(0)), Some(10_800), Some(field)),
        (timeout(json!(86_401)), Some(10_800), Some(field)),
        (json!({"sessionAffinity": "Cookie"}), None, Some("spec.sessionAffinity")),
    ] {
        let got = with(json!({}), spec.clone());
        assert_eq!(got.session_affinity.map(std::num::NonZeroU32::get), expected, "{spec}");
        let fields: Vec<_> = got.diagnostics.iter().map(|d| d.field.as_str()).collect();
        assert_eq!(fields, Vec::from_iter(finding), "{spec}");
    }
}

#[test]
fn ways_to_choose_an_endpoint() {
    for (text, expected, errors) in [
        ("random", Balancing::Random, 0),
        ("source-hash", Balancing::SourceHash, 0),
        ("least-connections", Balancing::Random, 1),
        ("", Balancing::Random, 1),
    ] {
        let got = with(json!({BALANCING_ANNOTATION: text}), json!({}));
        assert_eq!((got.balancing, got.diagnostics.len()), (expected, errors), "{text:?}");
    }
}

#[test]
fn external_addresses() {
    let dual = json!(["10.96.0.7", "fd00::7"]);
    let single = json!(["10.96.0.7"]);
    for (cluster_ips, external, expected, finding) in [
        (&single, json!([]), json!([]), None),
        (&single, json!(["192.0.2.1", "192.0.2.1"]), json!(["192.0.2.1"]), None),
        (&dual, json!(["2001:db8::1", "192.0.2.1"]), json!(["2001:db8::1", "192.0.2.1"]), None),
        (
            &single,
            json!(["2001:db8::1"]),
            json!([]),
            Some(
                "warning: spec.externalIPs[0]: 2001:db8::1 is of another family than the \
                  Service's; not served",
            ),
        ),
        (
            &single,
            json!(["192.0.2.1", "lb.example.com"]),
            json!(["192.0.2.1"]),
            Some("error: spec.externalIPs[1]: \"lb.example.com\" is not an IP address; not served"),
        ),
    ] {
        let got = with(json!({}), json!({"clusterIPs": cluster_ips, "externalIPs": external}));
        assert_eq!(json!(got.external_ips), expected, "{external}");
        assert_eq!(findings(&got), Vec::from_iter(finding.map(str::to_owned)), "{external}");
    }
}

fn balanced(spec: Value, ingress: &Value) -> Service {
    let mut object = object(json!({"name": "web"}), spec);
    object.status = serde_json::from_value(json!({"loadBalancer": {"ingress": ingress}})).unwrap();
    service(&object).unwrap()
}

#[test]
fn load_balancer_addresses() {
    for (ingress, expected) in [
        (json!([]), json!([])),
        (json!([{"hostname": "lb.example.com"}]), json!([])),
        // Its connections come to node ports or endpoints.
        (json!([{"ip": "192.0.2.1", "ipMode": "Proxy"}]), json!([])),
        (json!([{"ip": "192.0.2.1"}]), json!(["192.0.2.1"])),
        (json!([{"ip": "192.0.2.1", "ipMode": "VIP"}]), json!(["192.0.2.1"])),
    ] {
        let spec = |kind| json!({"type": kind, "clusterIP": "10.96.0.7"});
        let got = balanced(spec("LoadBalancer"), &ingress);
        assert_eq!(
            (json!(got.load_balancer_ips), got.diagnostics),
            (expected, vec![]),
            "{ingress}"
        );
        assert!(balanced(spec("NodePort"), &ingress).load_balancer_ips.is_empty());
    }
}

#[test]
fn source_ranges() {
    let cidrs = |list| SourceRestriction::Allow(CidrSet::parse(list).unwrap());
    let field = "spec.loadBalancerSourceRanges";
    for (ranges, expected, finding) in [
        (json!([]), SourceRestriction::Unrestricted, None),
        (json!(["10.0.0.0/8"]), cidrs("10.0.0.0/8"), None),
        (json!([" 10.0.0.0/8 ", "192.0.2.0/24"]), cidrs("10.0.0.0/8, 192.0.2.0/24"), None),
        // IPv4, to kube-proxy too.
        (json!(["::ffff:192.0.2.11/128"]), cidrs("192.0.2.11/32"), None),
        (json!(["::ffff:192.0.2.11/120"]), cidrs("192.0.2.0/24"), None),
        (json!(["10.0.0.0"]), SourceRestriction::Closed, Some(format!("{field}[0]"))),
        (
            json!(["10.0.0.0/8", "everybody"]),
            SourceRestriction::Closed,
            Some(format!("{field}[1]")),
        ),
    ] {
        let spec = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.7",
            "loadBalancerSourceRanges": ranges});
        let got = balanced(spec, &json!([{"ip": "192.0.2.1"}]));
        assert_eq!(got.load_balancer_sources, expected, "{ranges}");
        let fields: Vec<_> = got.diagnostics.iter().map(|d| d.field.clone()).collect();
        assert_eq!(fields, Vec::from_iter(finding), "{ranges}");
    }
}

/// Each range is an element of the kernel for each address and port.
#[test]
fn source_ranges_are_limited() {
    let list = |count: u32| -> Vec<String> {
        (0..count).map(|n| format!("{}/32", std::net::Ipv4Addr::from(n << 1))).collect()
    };
    let ports = json!([{"name": "a", "port": 80}, {"name": "b", "port": 81}]);
    let ingress = json!([{"ip": "192.0.2.1"}, {"ip": "192.0.2.2"}]);
    for (count, closed) in [(1 << 14, false), ((1 << 14) + 1, true)] {
        let spec = json!({"type": "LoadBalancer", "clusterIP": "10.96.0.7", "ports": ports,
            "loadBalancerSourceRanges": list(count)});
        let got = balanced(spec, &ingress);
        assert_eq!(got.load_balancer_sources == SourceRestriction::Closed, closed, "{count}");
        let fields: Vec<_> = got.diagnostics.iter().map(|d| d.field.as_str()).collect();
        let expected = if closed { &["spec.loadBalancerSourceRanges"][..] } else { &[] };
        assert_eq!(fields, expected, "{count}");
    }
}

#[test]
fn source_ranges_of_one_family() {
    let (v4, v6, both) =
        (["10.96.0.7"].as_slice(), ["fd00::7"].as_slice(), ["10.96.0.7", "fd00::7"]);
    for (addresses, ranges, open) in [
        (v4, ["192.0.2.0/24"].as_slice(), None),
        (v6, &["2001:db8::/32"], None),
        (&both, &["192.0.2.0/24", "2001:db8::/32"], None),
        (v4, &["192.0.2.0/24", "2001:db8::/32"], None),
        // Whatever the range is of, the Service's family has none.
        (v4, &["2001:db8::/32"], Some("IPv4")),
        (v6, &["192.0.2.0/24"], Some("IPv6")),
        (&both, &["2001:db8::/32"], Some("IPv4")),
        (&both, &["192.0.2.0/24"], Some("IPv6")),
        (v6, &["::ffff:192.0.2.0/120"], Some("IPv6")),
    ] {
        let spec = json!({"type": "LoadBalancer", "clusterIP": addresses[0],
            "clusterIPs": addresses, "loadBalancerSourceRanges": ranges});
        let got = balanced(spec, &json!([]));
        let found: Vec<_> = { got.diagnostics.iter() }
            .map(|d| (d.severity, d.field.as_str(), d.message.split(':').next().unwrap()))
            .collect();
        let message = open.map(|family| format!("no range is of {family}"));
        let expected: Vec<_> = message
            .iter()
            .map(|m| (Severity::Warning, "spec.loadBalancerSourceRanges", m.as_str()))
            .collect();
        assert_eq!(found, expected, "{addresses:?} {ranges:?}");
    }
}
