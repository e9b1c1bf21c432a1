//! Nodes.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use k8s_openapi::api::core::v1 as core;

use super::{Findings, shown, unicast};
use crate::model::{Diagnostic, Family, Node, ObjectKind, ObjectRef, Severity};

/// The label that says in which zone a node is.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The taint by which the cluster autoscaler says that it is about to remove a node.
const AUTOSCALER_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// What the proxy needs of a Node: the first address of each family, `InternalIP` before
/// `ExternalIP`, in the object's order. kube-proxy's default for `--nodeport-addresses=primary`
/// is the same.
pub fn node(object: &core::Node) -> Node {
    let mut findings = Findings::of(ObjectKind::Node, &object.metadata);
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref());
    let addresses = addresses.unwrap_or_default();
    let mut primary_addresses: Vec<IpAddr> = Vec::new();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (index, entry) in addresses.iter().enumerate().filter(|(_, e)| e.type_ == wanted) {
            match unicast(&entry.address) {
                Ok(address) => {
                    let family = Family::of(address);
                    if primary_addresses.iter().all(|known| Family::of(*known) != family) {
                        primary_addresses.push(address);
                    }
                }
                Err(why) => findings.error(
                    format!("status.addresses[{index}].address"),
                    format!("{} {why}; node ports are not served there", shown(&entry.address)),
                ),
            }
        }
    }
    let zone = object.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE_LABEL));
    let zone = zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into());
    let pod_cidrs = pod_cidrs(object, &mut findings);
    let leaving = leaving(object);
    Node { primary_addresses, zone, leaving, pod_cidrs, diagnostics: findings.diagnostics }
}

/// Whether the node is being deleted, or about to be (KEP-3458).
fn leaving(object: &core::Node) -> bool {
    let taints = object.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    object.metadata.deletion_timestamp.is_some() || { taints }
        .any(|taint| taint.key == AUTOSCALER_TAINT)
}

/// `podCIDRs`, or else `podCIDR`.
fn pod_cidrs(object: &core::Node, findings: &mut Findings) -> Vec<IpNet> {
    let Some(spec) = &object.spec else { return Vec::new() };
    let many = spec.pod_cidrs.iter().flatten().enumerate();
    let many: Vec<_> = many.map(|(i, cidr)| (format!("spec.podCIDRs[{i}]"), cidr)).collect();
    let one = || spec.pod_cidr.iter().map(|cidr| ("spec.podCIDR".to_owned(), cidr)).collect();
    let written: Vec<(String, &String)> = if many.is_empty() { one() } else { many };
    let mut cidrs = Vec::new();
    for (field, text) in written.into_iter().filter(|(_, text)| !text.is_empty()) {
        match text.parse::<IpNet>() {
            Ok(cidr) => cidrs.push(cidr),
            Err(_) => findings.error(
                field,
                format!("{} is not a CIDR; its addresses do not count as pods'", shown(text)),
            ),
        }
    }
    cidrs
}

/// What to tell the operator when node ports are to be served at the node's primary addresses and
/// the node called `name` has none, be it that there is no such object.
pub(crate) fn no_primary_addresses(name: &Arc<str>) -> Diagnostic {
    Diagnostic {
        object: ObjectRef { kind: ObjectKind::Node, namespace: "".into(), name: name.clone() },
        field: "status.addresses".to_owned(),
        severity: Severity::Error,
        message: "no InternalIP or ExternalIP is known of this node (is there a Node of this \
                  name?): node ports are served at no address"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered(addresses: &[(&str, &str)]) -> Node {
        let addresses = addresses
            .iter()
            .map(|(type_, address)| core::NodeAddress {
                type_: (*type_).to_owned(),
                address: (*address).to_owned(),
            })
            .collect();
        let mut object = core::Node::default();
        object.metadata.name = Some("worker".to_owned());
        object.status =
            Some(core::NodeStatus { addresses: Some(addresses), ..core::NodeStatus::default() });
        node(&object)
    }

    #[test]
    fn primary_addresses() {
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
        let table: &[Case] = &[
            (&[], &[]),
            (&[("Hostname", "worker"), ("InternalDNS", "10.0.0.1")], &[]),
            (&[("InternalIP", "10.0.0.1"), ("InternalIP", "10.0.0.2")], &["10.0.0.1"]),
            (&[("ExternalIP", "192.0.2.1"), ("InternalIP", "10.0.0.1")], &["10.0.0.1"]),
            (&[("ExternalIP", "192.0.2.1")], &["192.0.2.1"]),
            (
                &[("InternalIP", "2001:db8::1"), ("InternalIP", "10.0.0.1")],
                &["2001:db8::1", "10.0.0.1"],
            ),
            (
                &[("ExternalIP", "2001:db8::1"), ("InternalIP", "10.0.0.1")],
                &["10.0.0.1", "2001:db8::1"],
            ),
            // What cannot be served does not hide what can.
            (&[("InternalIP", "127.0.0.1"), ("InternalIP", "10.0.0.2")], &["10.0.0.2"]),
        ];
        for (addresses, expected) in table {
            let got: Vec<String> =
                lowered(addresses).primary_addresses.iter().map(ToString::to_string).collect();
            assert_eq!(&got, expected, "{addresses:?}");
        }
    }

    #[test]
    fn says_which_address_is_wrong() {
        let got = lowered(&[("Hostname", "x"), ("ExternalIP", "10.0.0.300")]);
        assert_eq!(
            got.diagnostics.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["error: Node worker: status.addresses[1].address: \"10.0.0.300\" is not an IP \
                 address; node ports are not served there"],
        );
    }

    #[test]
    fn a_node_without_status_has_no_addresses() {
        assert_eq!(node(&core::Node::default()), Node::default());
    }
}
