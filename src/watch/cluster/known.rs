//! What the Controller's store holds: that there is such a Service. What is known of it is in the
//! index, once, and in terms of the model.

use std::borrow::Cow;
use std::sync::OnceLock;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::api::DynamicObject;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::watcher;
use serde::{Deserialize, Deserializer};

use super::wire::Wire;
use crate::model::ServiceName;

/// A Service that there is.
#[derive(Debug)]
pub(super) struct Known {
    name: ServiceName,
    /// The name again, made when somebody asks. The store asks what comes, and keeps a clone of it,
    /// which nobody asks: metadata are ten times as large as all else of this.
    metadata: OnceLock<Box<ObjectMeta>>,
}

impl Known {
    /// How the model calls it.
    pub(super) fn name(&self) -> &ServiceName {
        &self.name
    }

    fn metadata(name: &ServiceName) -> Box<ObjectMeta> {
        Box::new(ObjectMeta {
            name: Some(name.name.to_string()),
            namespace: Some(name.namespace.to_string()),
            ..ObjectMeta::default()
        })
    }
}

impl From<ServiceName> for Known {
    fn from(name: ServiceName) -> Known {
        Known { name, metadata: OnceLock::new() }
    }
}

impl Clone for Known {
    fn clone(&self) -> Known {
        Known::from(self.name.clone())
    }
}

/// As the Controller asks for it, which reads none here.
impl<'de> Deserialize<'de> for Known {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Wire::<core::Service>::deserialize(from).map(|object| Known::from(object.name))
    }
}

impl Resource for Known {
    type DynamicType = ();
    type Scope = <core::Service as Resource>::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        <core::Service as Resource>::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        <core::Service as Resource>::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        <core::Service as Resource>::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        <core::Service as Resource>::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.metadata.get_or_init(|| Known::metadata(&self.name))
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.metadata.get_or_init(|| Known::metadata(&self.name));
        self.metadata.get_mut().expect("made just now")
    }
}

/// What the store is told of what a watcher tells.
pub(super) fn known(event: &watcher::Event<Wire<core::Service>>) -> watcher::Event<Known> {
    use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
    let known = |object: &Wire<core::Service>| Known::from(object.name.clone());
    match event {
        Init => Init,
        InitApply(object) => InitApply(known(object)),
        InitDone => InitDone,
        Apply(object) => Apply(known(object)),
        Delete(object) => Delete(known(object)),
    }
}

/// How the store calls a Service.
pub(super) fn reference(service: &ServiceName) -> ObjectRef<Known> {
    ObjectRef::new(&service.name).within(&service.namespace)
}

/// The Service that the Controller calls so.
pub(super) fn named(reference: &ObjectRef<DynamicObject>) -> ServiceName {
    ServiceName::new(reference.namespace.clone().unwrap_or_default(), reference.name.clone())
}
