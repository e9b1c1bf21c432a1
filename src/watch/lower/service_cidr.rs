//! `ServiceCIDR`s.

use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;

use super::{Findings, name, shown};
use crate::model::{ObjectKind, ServiceCidr};

/// The name of the object.
pub fn service_cidr_name(object: &networking::ServiceCIDR) -> Arc<str> {
    name(&object.metadata)
}

/// Lowers a `ServiceCIDR`. One that is being deleted counts until it is gone: Services may have
/// addresses of it.
pub fn service_cidr(object: &networking::ServiceCIDR) -> ServiceCidr {
    let mut findings = Findings::of(ObjectKind::ServiceCidr, &object.metadata);
    let written = object.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten()).enumerate();
    let mut cidrs = Vec::new();
    for (index, text) in written {
        match text.parse::<IpNet>() {
            Ok(cidr) => cidrs.push(cidr.trunc()),
            Err(_) => findings.error(
                format!("spec.cidrs[{index}]"),
                format!("{} is not a CIDR; its addresses are left alone", shown(text)),
            ),
        }
    }
    ServiceCidr { cidrs, diagnostics: findings.diagnostics }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_is_a_cidr() {
        let object = serde_json::from_value(json!({
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112", "10.96.0.0/33", "10.97.0.1/16"]},
        }));
        let lowered = service_cidr(&object.unwrap());
        let cidrs: Vec<String> = lowered.cidrs.iter().map(ToString::to_string).collect();
        assert_eq!(cidrs, ["10.96.0.0/16", "fd00:10:96::/112", "10.97.0.0/16"]);
        let told: Vec<String> = lowered.diagnostics.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["error: ServiceCIDR kubernetes: spec.cidrs[2]: \"10.96.0.0/33\" is not a CIDR; its \
              addresses are left alone"]
        );
        assert_eq!(service_cidr(&networking::ServiceCIDR::default()), ServiceCidr::default());
    }
}
