//! What is wrong with an object, said to the person who can mend it.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::ServiceName;

/// A finding about one field of one object. Diagnostics never stop the proxy: the part of the
/// object that was not understood is left out (or closed, where leaving it out would open
/// something), and everything else goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Diagnostic {
    /// The object.
    pub object: ObjectRef,
    /// The field, as a path such as `spec.ports[1].nodePort`; empty for the object as a whole.
    pub field: String,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong and what the proxy does about it.
    pub message: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A part of the object is not in force.
    Error,
    /// All of the object is in force, though maybe not as its author thinks.
    Warning,
}

/// An object's kind, namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ObjectRef {
    /// The kind.
    pub kind: ObjectKind,
    /// The namespace; empty for kinds without one.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

/// The kinds of objects that the proxy reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum ObjectKind {
    /// A Service.
    Service,
    /// An `EndpointSlice`.
    EndpointSlice,
    /// A Node.
    Node,
    /// A `ServiceCIDR`.
    #[serde(rename = "ServiceCIDR")]
    ServiceCidr,
    /// A file of manifests, where no object could be told from it.
    File,
}

impl ObjectRef {
    /// A Service.
    pub fn service(service: &ServiceName) -> ObjectRef {
        let ServiceName { namespace, name } = service.clone();
        ObjectRef { kind: ObjectKind::Service, namespace, name }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObjectKind::Service => "Service",
            ObjectKind::EndpointSlice => "EndpointSlice",
            ObjectKind::Node => "Node",
            ObjectKind::ServiceCidr => "ServiceCIDR",
            ObjectKind::File => "File",
        })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: ", self.severity, self.object)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}
