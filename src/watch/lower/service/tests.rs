//! Every rule of lowering Services, as tables.

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
