use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::core::{ObjectList, WatchEvent};
use serde_json::json;

use super::*;

fn list<K: Kind + Clone>(items: &Value) -> Vec<Wire<K>> {
    let list = json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "9"},
        "items": items});
    let list: ObjectList<Wire<K>> = serde_json::from_str(&list.to_string()).expect("a list");
    list.items
}

fn told(diagnostics: &[Diagnostic]) -> Vec<String> {
    diagnostics.iter().map(ToString::to_string).collect()
}

fn service(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "n", "resourceVersion": "7"},
        "spec": {"clusterIP": "10.96.0.1", "type": "NodePort",
            "ports": [{"port": 80, "nodePort": 30080, "targetPort": "http"}]},
    })
}

fn slice(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "n", "resourceVersion": "7",
            "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "worker"}],
    })
}

#[test]
fn nothing_is_missed_that_the_model_has() {
    let object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "a", "namespace": "n", "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [{"manager": "m"}],
            "annotations": {"portcullis.dev/allowed-source-cidrs": "10.0.0.0/8",
                "portcullis.dev/balancing": "weighted", "portcullis.dev/alowed": "x"}},
        "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "type": "LoadBalancer", "externalIPs": ["192.0.2.9"], "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local", "healthCheckNodePort": 30081,
            "loadBalancerSourceRanges": ["10.0.0.0/8", "fd00::/8"], "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "ports": [{"name": "a", "port": 80, "protocol": "UDP", "nodePort": 30080}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"},
            {"ip": "192.0.2.2", "ipMode": "Proxy"}]}},
    });
    let [read] = &list::<core::Service>(&json!([object]))[..] else { panic!("one") };
    let whole: core::Service = serde_json::from_value(object).unwrap();
    assert_eq!((&read.name, &read.lowered), (&whole.name(), &whole.lower()));
    assert!(read.lowered.as_ref().is_some_and(|service| !service.diagnostics.is_empty()));

    let object = json!({
        "metadata": {"name": "a", "namespace": "n", "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"portcullis.dev/weight": "7"}},
        "addressType": "IPv6",
        "ports": [{"name": "a", "port": 80, "protocol": "UDP", "appProtocol": "x"}, {"name": "b"}],
        "endpoints": [{"addresses": ["fd00::1", "fd00::2"], "nodeName": "worker", "zone": "z",
            "conditions": {"ready": false, "serving": true, "terminating": true},
            "targetRef": {"kind": "Pod", "name": "p"},
            "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "w"}]}}],
    });
    let [read] = &list::<discovery::EndpointSlice>(&json!([object]))[..] else { panic!("one") };
    let whole: discovery::EndpointSlice = serde_json::from_value(object).unwrap();
    assert_eq!((&read.name, &read.lowered), (&whole.name(), &whole.lower()));

    let object = json!({
        "metadata": {"name": "a", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd01::/64"],
            "taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    });
    let [read] = &list::<core::Node>(&json!([object]))[..] else { panic!("one") };
    let mut whole: core::Node = serde_json::from_value(object).unwrap();
    assert_eq!(read.lowered, whole.lower());
    assert!(read.lowered.leaving);
    (whole.spec, whole.metadata.deletion_timestamp) =
        (None, Some(Time(jiff::Timestamp::UNIX_EPOCH)));
    let leaving = serde_json::to_value(&whole).unwrap();
    assert!(list::<core::Node>(&json!([leaving]))[0].lowered.leaving);
}

/// The API server's own validation lets these through, and `k8s_openapi` does not: whoever may write
/// `status` may write a condition without a time (Go's zero time).
#[test]
fn what_nobody_reads_can_be_anything() {
    let conditions = json!([{"type": "Ready", "status": "True", "lastTransitionTime": null}]);
    let mut object = service("a");
    let expected = list::<core::Service>(&json!([object])).remove(0).lowered;
    object["status"] = json!({"conditions": conditions});
    assert!(serde_json::from_value::<core::Service>(object.clone()).is_err());
    object["spec"]["selector"] = json!([1]);
    object["spec"]["ports"][0]["targetPort"] = json!({});
    object["metadata"]["managedFields"] = json!("x");
    assert_eq!(list::<core::Service>(&json!([object]))[0].lowered, expected);
    let object = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]},
        "status": {"conditions": conditions}});
    let read = list::<networking::ServiceCIDR>(&json!([object])).remove(0);
    assert_eq!((&*read.name, read.lowered.cidrs.len()), ("kubernetes", 1));
}

#[test]
fn an_object_that_cannot_be_read_spoils_no_list() {
    let mut broken = service("broken");
    broken["spec"]["ports"][0]["port"] = json!("http");
    let read = list::<core::Service>(&json!([service("a"), broken, service("z")]));
    let names: Vec<String> = read.iter().map(|object| object.name.to_string()).collect();
    assert_eq!(names, ["n/a", "n/broken", "n/z"]);
    assert_eq!(read[0].lowered.as_ref().map(|service| service.ports.len()), Some(1));
    assert_eq!(read[2].lowered.as_ref().map(|service| service.ports.len()), Some(1));
    let lowered = read[1].lowered.as_ref().expect("something that is told of");
    assert_eq!(
        told(&lowered.diagnostics),
        ["error: Service n/broken: spec.ports[0].port: cannot be read: invalid type: string \
          \"http\", expected i32; the Service is not served"],
    );
    let nothing = Service::new(read[1].name.clone());
    assert_eq!(Service { diagnostics: Vec::new(), ..lowered.clone() }, nothing);

    let mut broken = slice("broken");
    broken["endpoints"][0]["addresses"] = json!("10.0.0.1");
    let mut nobodys = broken.clone();
    nobodys["metadata"]["labels"] = json!({"kubernetes.io/service-name": 1});
    let read = list::<discovery::EndpointSlice>(&json!([broken, nobodys, slice("z")]));
    let lowered = read[0].lowered.as_ref().expect("a slice of a Service");
    assert_eq!(lowered.service, ServiceName::new("n", "web"));
    assert_eq!((lowered.ports.len(), lowered.endpoints.len()), (0, 0));
    assert_eq!(
        told(&lowered.diagnostics),
        ["error: EndpointSlice n/broken: endpoints[0].addresses: cannot be read: invalid type: \
          string \"10.0.0.1\", expected a sequence; no endpoint of this slice is used"],
    );
    assert_eq!(read[1].lowered, None);
    assert_eq!(read[2].lowered.as_ref().map(|slice| slice.endpoints.len()), Some(1));

    let broken = json!({"metadata": {"name": "worker"}, "status": {"addresses": [{"type": 1}]}});
    let read = list::<core::Node>(&json!([broken])).remove(0);
    assert_eq!(
        told(&read.lowered.diagnostics),
        ["error: Node worker: status.addresses[0].type: cannot be read: invalid type: integer \
          `1`, expected a string; nothing is known of the node"],
    );
    let broken = json!({"metadata": {"name": "more"}, "spec": {"cidrs": "10.96.0.0/16"}});
    let read = list::<networking::ServiceCIDR>(&json!([broken])).remove(0);
    assert_eq!(
        told(&read.lowered.diagnostics),
        ["error: ServiceCIDR more: spec.cidrs: cannot be read: invalid type: string \
          \"10.96.0.0/16\", expected a sequence; its addresses are left alone"],
    );
}

/// Objects of no shape at all, and with metadata that cannot be read.
#[test]
fn reading_never_fails() {
    let mut odd = service("odd");
    odd["metadata"]["creationTimestamp"] = json!("yesterday");
    let long = json!({"metadata": {"name": "long"}, "spec": "ä".repeat(1000)});
    let read = list::<core::Service>(&json!([
        null, 1, "x", [], {}, {"metadata": null}, {"metadata": 1}, {"metadata": {"name": 1}}, odd, long
    ]));
    let names: Vec<&str> = read.iter().map(|object| &*object.name.name).collect();
    assert_eq!(names, ["", "", "", "", "", "", "", "", "odd", "long"]);
    let messages: Vec<String> = read
        .iter()
        .map(|object| object.lowered.as_ref().map(|s| told(&s.diagnostics).concat()))
        .map(Option::unwrap_or_default)
        .collect();
    assert!(messages[8].contains("metadata.creationTimestamp: cannot be read"), "{messages:?}");
    assert!(messages[9].len() < 400, "{messages:?}");
    // A store asks for it.
    assert!(read.iter().all(|object| object.meta().name.is_some()));
    let twice = r#"{"metadata": {"name": "a"}, "spec": {"clusterIP": "::1", "clusterIP": "::2"}}"#;
    let twice: Wire<core::Service> = serde_json::from_str(twice).unwrap();
    let message = told(&twice.lowered.expect("something").diagnostics).concat();
    assert!(message.contains("a field stands there twice"), "{message}");
    // What a `Value` refuses: nested too deep, half a character, a number that is too large.
    let start = r#"{"metadata": {"namespace": "n", "resourceVersion": "7", "labels": {
        "kubernetes.io/service-name": "web""#;
    let deep = "[".repeat(200) + &"]".repeat(200);
    for odd in [&deep, r#""\ud800""#, "1e999"] {
        for (rest, name, field) in [
            (r#"}, "name": "a", "managedFields": ODD}, "addressType": 1}"#, "a", "addressType"),
            (r#"}, "name": "a"}, "addressType": ODD}"#, "a", "addressType"),
            (r#", "x": ODD}, "name": "a"}}"#, "a", "metadata.labels.x"),
            (r#"}, "name": ODD}}"#, "", "metadata.name"),
        ] {
            let text = format!("{start}{}", rest.replace("ODD", odd));
            let read: Wire<discovery::EndpointSlice> = serde_json::from_str(&text).unwrap();
            assert_eq!((&*read.name.namespace, &*read.name.name), ("n", name), "{text}");
            assert_eq!(read.meta().resource_version.as_deref(), Some("7"), "{text}");
            let lowered = read.lowered.expect("a slice of a Service");
            assert_eq!(lowered.service, ServiceName::new("n", "web"), "{text}");
            assert_eq!(lowered.diagnostics[0].field, field, "{text}");
        }
    }
}

#[test]
fn an_object_that_cannot_be_read_is_watched() {
    let mut broken = service("a");
    broken["spec"]["ports"] = json!({});
    for kind in ["ADDED", "MODIFIED", "DELETED"] {
        // In the API server's order of fields.
        let line = format!(r#"{{"type":"{kind}","object":{broken}}}"#);
        let event: WatchEvent<Wire<core::Service>> = serde_json::from_str(&line).unwrap();
        let (WatchEvent::Added(object)
        | WatchEvent::Modified(object)
        | WatchEvent::Deleted(object)) = event
        else {
            panic!("{event:?}")
        };
        assert_eq!(object.name, ServiceName::new("n", "a"));
        // What the watcher goes on from.
        assert_eq!(object.meta().resource_version.as_deref(), Some("7"));
        let lowered = object.lowered.expect("something that is told of");
        assert_eq!(lowered.diagnostics[0].field, "spec.ports");
    }
}
