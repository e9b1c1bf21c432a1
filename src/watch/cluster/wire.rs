//! Objects as the API server sends them, of which only that is read which somebody needs.
//!
//! An object that cannot be read is worse than none: as part of a list it spoils the list, and in a
//! watch its event is lost, also when it says that the object is gone. The types of `k8s_openapi`
//! ask for fields that the API server does not: `lastTransitionTime` of a condition may be `null`
//! (Go's zero time), and whoever may write `status` may write that. Conditions are not read at all.

use std::borrow::Cow;

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::runtime::watcher;
use serde::{Deserialize, Deserializer};

/// An object that was read so.
#[derive(Clone, Debug)]
pub(super) struct Wire<K>(pub(super) K);

/// What is read of a Service.
#[derive(Deserialize)]
struct Service {
    #[serde(default)]
    metadata: ObjectMeta,
    spec: Option<core::ServiceSpec>,
    status: Option<ServiceStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceStatus {
    load_balancer: Option<core::LoadBalancerStatus>,
}

/// What is read of a `ServiceCIDR`.
#[derive(Deserialize)]
struct ServiceCidr {
    #[serde(default)]
    metadata: ObjectMeta,
    spec: Option<networking::ServiceCIDRSpec>,
}

impl<'de> Deserialize<'de> for Wire<core::Service> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let Service { metadata, spec, status } = Service::deserialize(from)?;
        let status = status.map(|ServiceStatus { load_balancer }| core::ServiceStatus {
            load_balancer,
            conditions: None,
        });
        Ok(Wire(core::Service { metadata, spec, status }))
    }
}

impl<'de> Deserialize<'de> for Wire<networking::ServiceCIDR> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let ServiceCidr { metadata, spec } = ServiceCidr::deserialize(from)?;
        Ok(Wire(networking::ServiceCIDR { metadata, spec, status: None }))
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Wire<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.meta_mut()
    }
}

/// The objects themselves, as a watcher tells of them.
pub(super) fn unwrapped<K>(
    told: impl Stream<Item = watcher::Result<watcher::Event<Wire<K>>>>,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> {
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
    told.map(|told| {
        told.map(|event| match event {
            Init => Init,
            InitApply(Wire(object)) => InitApply(object),
            InitDone => InitDone,
            Apply(Wire(object)) => Apply(object),
            Delete(Wire(object)) => Delete(object),
        })
    })
}

#[cfg(test)]
mod tests {
    use kube::core::{ObjectList, WatchEvent};
    use serde_json::{Value, json};

    use super::*;
    use crate::watch::lower;

    fn conditions() -> Value {
        json!([{"type": "Ready", "status": "True", "reason": "E2E", "message": "",
            "lastTransitionTime": null}])
    }

    #[test]
    fn a_service_with_a_condition_without_time_is_read() {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "a", "namespace": "n", "resourceVersion": "7"},
            "spec": {"clusterIP": "10.96.0.1", "type": "LoadBalancer", "ports": [{"port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
        });
        let expected: core::Service = serde_json::from_value(object.clone()).unwrap();
        object["status"]["conditions"] = conditions();
        // This is what it is about.
        assert!(serde_json::from_value::<core::Service>(object.clone()).is_err());
        let list =
            json!({"apiVersion": "v1", "kind": "ServiceList", "metadata": {}, "items": [object]});
        let list: ObjectList<Wire<core::Service>> = serde_json::from_value(list).unwrap();
        assert_eq!(list.items[0].0, expected);
        let gone = json!({"type": "DELETED", "object": object}).to_string();
        let gone: WatchEvent<Wire<core::Service>> = serde_json::from_str(&gone).unwrap();
        let WatchEvent::Deleted(Wire(gone)) = gone else { panic!("{gone:?}") };
        assert_eq!(lower::service(&gone), lower::service(&expected));
    }

    #[test]
    fn a_service_cidr_with_a_condition_without_time_is_read() {
        let object = json!({
            "metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]},
            "status": {"conditions": conditions()},
        });
        let Wire(read): Wire<networking::ServiceCIDR> = serde_json::from_value(object).unwrap();
        assert_eq!(read.spec.unwrap().cidrs.unwrap(), ["10.96.0.0/16"]);
    }
}
