//! Objects as the API server sends them, lowered as they are read.
//!
//! An object that cannot be read must not be worse than none: it would spoil the list that it is
//! part of, and its events in a watch would be lost, also when it is gone. So reading never fails.
//! What cannot be read has its name all the same, and becomes an object that holds nothing but a
//! diagnostic.
//!
//! Lowering belongs to reading, because watchers read ahead, each in a task of its own, and of what
//! was read the least is to be kept: a list of lowered objects is a fraction of that list as text.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::form;
use crate::model::{
    Diagnostic, EndpointSlice, Family, Node, ObjectKind, ObjectRef, Service, ServiceCidr,
    ServiceName, Severity, SliceName,
};
use crate::watch::lower;

/// An object of the kind `K`, as it was read.
#[derive(Clone, Debug)]
pub(super) struct Wire<K: Kind> {
    /// How the model calls it.
    pub(super) name: K::Name,
    /// What is known of it. Of an object that cannot be read, that is why.
    pub(super) lowered: K::Lowered,
    /// What a watcher needs to know.
    metadata: ObjectMeta,
}

/// A kind of objects that is read.
pub(super) trait Kind: Resource<DynamicType = ()> + From<Self::Form> {
    /// What of it is read.
    type Form: DeserializeOwned;
    /// How the model calls such an object.
    type Name: Clone + Debug + Send + Sync + 'static;
    /// What the model makes of one.
    type Lowered: Clone + Debug + Send + Sync + 'static;

    /// How the model calls it.
    fn name(&self) -> Self::Name;

    /// What the model makes of it.
    fn lower(&self) -> Self::Lowered;

    /// What the model makes of one that cannot be read. Of `self` metadata are known, as far as
    /// those can be read.
    fn unreadable(&self, why: Diagnostic) -> Self::Lowered;

    /// The kind, as the model calls it.
    const KIND: ObjectKind;

    /// What becomes of an object that cannot be read, to end a sentence.
    const UNREADABLE: &'static str;
}

impl<'de, K: Kind> Deserialize<'de> for Wire<K> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        // Only of text that was read to its end something else can be read after a failure.
        let text = <&RawValue>::deserialize(from)?.get();
        let (mut object, lowered) = match serde_json::from_str::<K::Form>(text) {
            Ok(form) => {
                let object = K::from(form);
                let lowered = object.lower();
                (object, lowered)
            }
            Err(_) => unreadable(text),
        };
        let name = object.name();
        let whole = std::mem::take(object.meta_mut());
        let metadata = ObjectMeta {
            // Whoever keeps objects apart by their names may ask.
            name: Some(whole.name.unwrap_or_default()),
            namespace: whole.namespace,
            resource_version: whole.resource_version,
            ..ObjectMeta::default()
        };
        Ok(Wire { name, lowered, metadata })
    }
}

/// What is known of an object that is not of its form.
fn unreadable<K: Kind>(text: &str) -> (K, K::Lowered) {
    let metadata = metadata(text);
    let read = match serde_json::from_str::<Value>(text) {
        Ok(value) => serde_path_to_error::deserialize::<_, K::Form>(value),
        // It is nested too deep, or has half a character or a number that is too large.
        Err(_) => serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text)),
    };
    let (field, error) = match read {
        Err(error) => (error.path().to_string(), bounded(error.into_inner().to_string())),
        // Of a field that stands there twice a `Value` has one.
        Ok(_) => (String::new(), "a field stands there twice".to_owned()),
    };
    let why = Diagnostic {
        object: ObjectRef {
            kind: K::KIND,
            namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
            name: metadata.name.as_deref().unwrap_or_default().into(),
        },
        field,
        severity: Severity::Error,
        message: format!("cannot be read: {error}; {}", K::UNREADABLE),
    };
    let nothing: K::Form = serde_json::from_str("{}").expect("no field is required");
    let mut object = K::from(nothing);
    *object.meta_mut() = metadata;
    let lowered = object.unreadable(why);
    (object, lowered)
}

/// The metadata that say whose an object is, each as far as it can be read.
fn metadata(object: &str) -> ObjectMeta {
    let metadata = || fields(fields(object)?.get("metadata")?.get());
    let metadata = metadata().unwrap_or_default();
    let text = |name: &str| string(metadata.get(name)?);
    let labels = || {
        let labels = fields(metadata.get("labels")?.get())?.into_iter();
        Some(labels.filter_map(|(key, value)| Some((key, string(value)?))).collect())
    };
    ObjectMeta {
        name: text("name"),
        namespace: text("namespace"),
        resource_version: text("resourceVersion"),
        labels: labels(),
        ..ObjectMeta::default()
    }
}

/// The fields of an object, none of them read yet. Of one that stands there twice, the last.
fn fields(object: &str) -> Option<BTreeMap<String, &RawValue>> {
    serde_json::from_str(object).ok()
}

fn string(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok()
}

/// An error may quote what it is about, whatever its length.
fn bounded(mut error: String) -> String {
    const LONGEST: usize = 200;
    if error.len() > LONGEST {
        error.truncate(error.floor_char_boundary(LONGEST));
        error.push_str("...");
    }
    error
}

impl Kind for core::Service {
    type Form = form::Service;
    type Name = ServiceName;
    type Lowered = Option<Service>;
    const KIND: ObjectKind = ObjectKind::Service;
    const UNREADABLE: &'static str = "the Service is not served";

    fn name(&self) -> ServiceName {
        lower::service_name(self)
    }

    fn lower(&self) -> Option<Service> {
        lower::service(self)
    }

    fn unreadable(&self, why: Diagnostic) -> Option<Service> {
        Some(Service { diagnostics: vec![why], ..Service::new(self.name()) })
    }
}

impl Kind for discovery::EndpointSlice {
    type Form = form::EndpointSlice;
    type Name = SliceName;
    type Lowered = Option<EndpointSlice>;
    const KIND: ObjectKind = ObjectKind::EndpointSlice;
    const UNREADABLE: &'static str = "no endpoint of this slice is used";

    fn name(&self) -> SliceName {
        lower::slice_name(self)
    }

    fn lower(&self) -> Option<EndpointSlice> {
        lower::slice(self)
    }

    fn unreadable(&self, why: Diagnostic) -> Option<EndpointSlice> {
        let Some(service) = lower::slice_owner(self) else {
            tracing::warn!(diagnostic = %why, "an object cannot be read that nobody else tells of");
            return None;
        };
        let name = self.name();
        Some(EndpointSlice {
            service: ServiceName::new(name.namespace.clone(), service),
            name,
            family: Family::V4,
            ports: Vec::new(),
            endpoints: Vec::new(),
            diagnostics: vec![why],
        })
    }
}

impl Kind for core::Node {
    type Form = form::Node;
    /// There is one.
    type Name = ();
    type Lowered = Node;
    const KIND: ObjectKind = ObjectKind::Node;
    const UNREADABLE: &'static str = "nothing is known of the node";

    fn name(&self) {}

    fn lower(&self) -> Node {
        lower::node(self)
    }

    fn unreadable(&self, why: Diagnostic) -> Node {
        Node { diagnostics: vec![why], ..Node::default() }
    }
}

impl Kind for networking::ServiceCIDR {
    type Form = form::ServiceCidr;
    type Name = Arc<str>;
    type Lowered = ServiceCidr;
    const KIND: ObjectKind = ObjectKind::ServiceCidr;
    const UNREADABLE: &'static str = "its addresses are left alone";

    fn name(&self) -> Arc<str> {
        lower::service_cidr_name(self)
    }

    fn lower(&self) -> ServiceCidr {
        lower::service_cidr(self)
    }

    fn unreadable(&self, why: Diagnostic) -> ServiceCidr {
        ServiceCidr { cidrs: Vec::new(), diagnostics: vec![why] }
    }
}

impl<K: Kind> Resource for Wire<K> {
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
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests;
