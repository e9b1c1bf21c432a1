//! `EndpointSlice`s.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery;

use super::{Findings, WrittenPort, name, namespace, shown, unicast, valid_port};
use crate::model::{
    Endpoint, EndpointSlice, Family, Hints, ObjectKind, Readiness, ServiceName, SliceName,
    SlicePort,
};

/// The label that names a slice's Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The label of slices of headless Services, which no proxy serves.
pub(crate) const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// The annotation that says how many connections each endpoint of a slice gets in proportion to
/// those of other slices, from 0 to [`MOST_WEIGHT`].
pub const WEIGHT_ANNOTATION: &str = "portcullis.dev/weight";

/// The largest weight: each unit is a slot of the balancer.
const MOST_WEIGHT: u8 = 100;

/// Namespace and name of the object.
pub fn slice_name(object: &discovery::EndpointSlice) -> SliceName {
    SliceName { namespace: namespace(&object.metadata), name: name(&object.metadata) }
}

/// The name of the Service that a slice belongs to, if it belongs to one.
pub(crate) fn slice_owner(object: &discovery::EndpointSlice) -> Option<&str> {
    let owner = object.metadata.labels.as_ref()?.get(SERVICE_LABEL)?.as_str();
    (!owner.is_empty()).then_some(owner)
}

/// Lowers a slice. `None` where it belongs to no Service, to a headless one, or holds host names
/// (`addressType: FQDN`).
pub fn slice(object: &discovery::EndpointSlice) -> Option<EndpointSlice> {
    let labels = object.metadata.labels.as_ref();
    let label = |key: &str| labels.and_then(|labels| labels.get(key));
    if label(HEADLESS_LABEL).is_some() || object.address_type == "FQDN" {
        return None;
    }
    let service = slice_owner(object)?;
    let name = slice_name(object);
    let mut findings = Findings::of(ObjectKind::EndpointSlice, &object.metadata);
    let family = match object.address_type.as_str() {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        other => {
            let message = format!(
                "{} is none of IPv4, IPv6 and FQDN; no endpoint of this slice is used",
                shown(other),
            );
            findings.error("addressType", message);
            None
        }
    };
    let (ports, endpoints) = match family {
        Some(family) => (ports(object, &mut findings), endpoints(object, family, &mut findings)),
        None => (Vec::new(), Vec::new()),
    };
    Some(EndpointSlice {
        service: ServiceName::new(name.namespace.clone(), service),
        name,
        family: family.unwrap_or(Family::V4),
        ports,
        endpoints,
        diagnostics: findings.diagnostics,
    })
}

/// 1 where nobody says.
fn weight(object: &discovery::EndpointSlice, findings: &mut Findings) -> u8 {
    let annotations = object.metadata.annotations.as_ref();
    let Some(text) = annotations.and_then(|all| all.get(WEIGHT_ANNOTATION)) else { return 1 };
    let weight = text.trim().parse().ok().filter(|weight| *weight <= MOST_WEIGHT);
    if weight.is_none() {
        let message = format!("{} is not a number from 0 to {MOST_WEIGHT}; 1 is used", shown(text));
        findings.error(format!("metadata.annotations[{WEIGHT_ANNOTATION}]"), message);
    }
    weight.unwrap_or(1)
}

fn ports(object: &discovery::EndpointSlice, findings: &mut Findings) -> Vec<SlicePort> {
    let mut seen = BTreeSet::new();
    let mut ports = Vec::with_capacity(object.ports.as_ref().map_or(0, Vec::len));
    for (index, entry) in object.ports.iter().flatten().enumerate() {
        // No port means "all ports" (KEP-752), which no Service port can be forwarded to.
        let Some(number) = entry.port.filter(|number| *number != 0) else { continue };
        let field = |name: &str| format!("ports[{index}].{name}");
        let written = WrittenPort {
            number,
            protocol: entry.protocol.as_deref(),
            name: entry.name.as_deref(),
        };
        let Some((port, protocol, name)) = valid_port(&written, field, findings) else { continue };
        if !seen.insert((name, protocol)) {
            let message = format!(
                "{} is the name of an earlier {protocol} port too; this one is left out",
                shown(name),
            );
            findings.error(field("name"), message);
            continue;
        }
        ports.push(SlicePort { name: name.into(), protocol, port });
    }
    ports
}

fn endpoints(
    object: &discovery::EndpointSlice,
    family: Family,
    findings: &mut Findings,
) -> Vec<Endpoint> {
    // Many endpoints, few nodes: one copy of each name.
    let mut nodes: BTreeMap<&str, Arc<str>> = BTreeMap::new();
    let mut hints = SharedHints::default();
    let weight = weight(object, findings);
    let mut endpoints = Vec::with_capacity(object.endpoints.as_ref().map_or(0, Vec::len));
    for (index, entry) in object.endpoints.iter().flatten().enumerate() {
        let Some(text) = entry.addresses.first() else {
            let message = "an endpoint needs an address; left out";
            findings.error(format!("endpoints[{index}].addresses"), message);
            continue;
        };
        let address = match endpoint_address(text, family) {
            Ok(address) => address,
            Err(why) => {
                findings.error(
                    format!("endpoints[{index}].addresses[0]"),
                    format!("{} {why}; the endpoint is left out", shown(text)),
                );
                continue;
            }
        };
        let node = entry
            .node_name
            .as_deref()
            .map(|name| Arc::clone(nodes.entry(name).or_insert_with(|| name.into())));
        let readiness = readiness(entry.conditions.as_ref());
        endpoints.push(Endpoint { address, readiness, node, weight, hints: hints.of(entry) });
    }
    endpoints
}

/// Many endpoints, few different hints: one copy of each.
#[derive(Default)]
struct SharedHints(BTreeSet<Arc<Hints>>);

impl SharedHints {
    fn of(&mut self, endpoint: &discovery::Endpoint) -> Option<Arc<Hints>> {
        let hints = endpoint.hints.as_ref()?;
        let zones = hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into());
        let nodes = hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into());
        let hints = Hints { zones: zones.collect(), nodes: nodes.collect() };
        if hints == Hints::default() {
            return None;
        }
        if let Some(same) = self.0.get(&hints) {
            return Some(Arc::clone(same));
        }
        let hints = Arc::new(hints);
        self.0.insert(Arc::clone(&hints));
        Some(hints)
    }
}

fn endpoint_address(text: &str, family: Family) -> Result<IpAddr, &'static str> {
    let address = unicast(text)?;
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    match (link_local, Family::of(address), family) {
        // As the API server has it: such an address means something else on every node.
        (true, _, _) => Err("is a link-local address"),
        (false, Family::V6, Family::V4) => Err("is not an IPv4 address, as addressType says"),
        (false, Family::V4, Family::V6) => Err("is not an IPv6 address, as addressType says"),
        (false, _, _) => Ok(address),
    }
}

/// The defaults of conditions that nobody set are the API's own (`EndpointConditions` in
/// discovery/v1, and kube-proxy): ready, serving, not terminating.
fn readiness(conditions: Option<&discovery::EndpointConditions>) -> Readiness {
    let condition = |choose: fn(&discovery::EndpointConditions) -> Option<bool>, default| {
        conditions.and_then(choose).unwrap_or(default)
    };
    let ready = condition(|c| c.ready, true);
    let serving = condition(|c| c.serving, true);
    let terminating = condition(|c| c.terminating, false);
    match (ready, serving && terminating) {
        // Also when it terminates: `publishNotReadyAddresses` asks for it.
        (true, _) => Readiness::Ready,
        (false, true) => Readiness::ServingTerminating,
        (false, false) => Readiness::NotReady,
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value)] // json! at the call reads better
mod tests {
    use serde_json::json;

    use super::*;

    fn lowered(object: serde_json::Value) -> Option<EndpointSlice> {
        slice(&serde_json::from_value(object).expect("an EndpointSlice"))
    }

    fn with(ports: serde_json::Value, endpoints: serde_json::Value) -> EndpointSlice {
        lowered(json!({
            "metadata": {"name": "web-x", "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        }))
        .expect("a slice of ours")
    }

    fn findings(slice: &EndpointSlice) -> Vec<String> {
        slice.diagnostics.iter().map(|d| format!("{}: {}", d.field, d.message)).collect()
    }

    #[test]
    fn what_is_ours() {
        let ours = json!({"kubernetes.io/service-name": "web"});
        let headless = json!({"kubernetes.io/service-name": "web",
            "service.kubernetes.io/headless": ""});
        for (labels, address_type, expected) in [
            (&ours, "IPv4", true),
            (&ours, "IPv6", true),
            (&ours, "FQDN", false),
            (&headless, "IPv4", false),
            (&json!({}), "IPv4", false),
            (&json!({"kubernetes.io/service-name": ""}), "IPv4", false),
        ] {
            let object = json!({"metadata": {"name": "x", "labels": labels},
                "addressType": address_type, "endpoints": []});
            let got = lowered(object);
            assert_eq!(got.is_some(), expected, "{labels} {address_type}");
            if let Some(slice) = got {
                assert_eq!(slice.service, ServiceName::new("default", "web"));
                assert_eq!(slice.diagnostics, []);
            }
        }
    }

    #[test]
    fn an_unknown_address_type_is_said_and_holds_nothing() {
        let got = lowered(json!({"metadata": {"name": "x",
            "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "ipv4",
            "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}]}));
        let got = got.expect("ours");
        assert_eq!((got.ports.len(), got.endpoints.len()), (0, 0));
        assert_eq!(
            findings(&got),
            ["addressType: \"ipv4\" is none of IPv4, IPv6 and FQDN; no endpoint of this slice is \
              used"],
        );
    }

    #[test]
    fn ports() {
        let got = with(
            json!([
                {"name": "http", "port": 8080, "protocol": "TCP"},
                {"port": 53, "protocol": "UDP"},
                {"name": "all"},
                {"name": "zero", "port": 0},
                {"name": "", "port": 99},
                {"name": "http", "port": 8081},
                {"name": "http", "port": 8080, "protocol": "SCTP"},
                {"name": "big", "port": 65536},
                {"name": "small", "port": -1},
                {"name": "odd", "port": 1, "protocol": "tcp"},
                {"name": "a\"b", "port": 1},
            ]),
            json!([]),
        );
        let ports: Vec<_> =
            got.ports.iter().map(|p| (&*p.name, p.protocol, p.port.get())).collect();
        assert_eq!(
            ports,
            [
                ("http", crate::model::Protocol::Tcp, 8080),
                ("", crate::model::Protocol::Udp, 53),
                ("", crate::model::Protocol::Tcp, 99),
                ("http", crate::model::Protocol::Sctp, 8080),
            ],
        );
        assert_eq!(
            findings(&got),
            [
                "ports[5].name: \"http\" is the name of an earlier tcp port too; this one is left \
                 out",
                "ports[7].port: 65536 is not a port; the port is left out",
                "ports[8].port: -1 is not a port; the port is left out",
                "ports[9].protocol: \"tcp\" is none of TCP, UDP and SCTP; the port is left out",
                "ports[10].name: \"a\\\"b\" is not a port name; the port is left out",
            ],
        );
    }

    #[test]
    fn addresses() {
        for (addresses, expected) in [
            (json!(["10.0.0.1", "10.0.0.2"]), Ok("10.0.0.1")),
            (json!([]), Err("addresses: an endpoint needs an address; left out")),
            (
                json!(["10.0.0"]),
                Err("addresses[0]: \"10.0.0\" is not an IP address; the endpoint is left out"),
            ),
            (
                json!(["2001:db8::1"]),
                Err("addresses[0]: \"2001:db8::1\" is not an IPv4 address, as addressType says; \
                     the endpoint is left out"),
            ),
            (
                json!(["127.0.0.1"]),
                Err("addresses[0]: \"127.0.0.1\" is a loopback address; the endpoint is left out"),
            ),
            (
                json!(["169.254.0.1"]),
                Err(
                    "addresses[0]: \"169.254.0.1\" is a link-local address; the endpoint is left out",
                ),
            ),
        ] {
            // The wrong one does not hide the one behind it.
            let got =
                with(json!([]), json!([{"addresses": addresses}, {"addresses": ["10.9.9.9"]}]));
            let seen: Vec<String> =
                got.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
            match expected {
                Ok(address) => {
                    assert_eq!(seen, [address, "10.9.9.9"]);
                    assert_eq!(got.diagnostics, []);
                }
                Err(message) => {
                    assert_eq!(seen, ["10.9.9.9"], "{addresses}");
                    assert_eq!(findings(&got), [format!("endpoints[0].{message}")]);
                }
            }
        }
    }

    #[test]
    fn conditions() {
        use Readiness::{NotReady, Ready, ServingTerminating};
        let (yes, no) = (Some(true), Some(false));
        for (ready, serving, terminating, expected) in [
            (None, None, None, Ready),
            (yes, None, None, Ready),
            (yes, yes, yes, Ready),
            (None, no, None, Ready),
            (no, None, None, NotReady),
            (no, yes, None, NotReady),
            (no, yes, no, NotReady),
            (no, yes, yes, ServingTerminating),
            (no, None, yes, ServingTerminating),
            (no, no, yes, NotReady),
        ] {
            let conditions = discovery::EndpointConditions { ready, serving, terminating };
            assert_eq!(readiness(Some(&conditions)), expected, "{conditions:?}");
        }
        assert_eq!(readiness(None), Ready);
    }

    #[test]
    fn node_names_are_shared() {
        let got = with(
            json!([]),
            json!([
                {"addresses": ["10.0.0.1"], "nodeName": "a"},
                {"addresses": ["10.0.0.2"], "nodeName": "a"},
                {"addresses": ["10.0.0.3"]},
            ]),
        );
        let nodes: Vec<_> = got.endpoints.iter().map(|endpoint| endpoint.node.as_ref()).collect();
        assert_eq!(nodes[0].map(|n| &**n), Some("a"));
        assert!(Arc::ptr_eq(nodes[0].unwrap(), nodes[1].unwrap()));
        assert_eq!(nodes[2], None);
    }
}
