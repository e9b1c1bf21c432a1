//! From the fields of a document to objects.

use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::document::{Lowered, Object};
use super::field::FieldPath;
use super::value::{Bounded, MOST_FIELDS};
use crate::model::{ObjectKind, ObjectRef, Severity};
use crate::watch::lower::{self, Relevance};

/// Collects the objects of a document.
#[derive(Default)]
pub(super) struct Reader {
    pub(super) objects: Vec<Arc<Object>>,
    pub(super) findings: Findings,
}

/// What is wrong with a document: the first problems, and how many more there are.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) told: Vec<Finding>,
    pub(super) untold: usize,
    /// Whether one of those is an error.
    pub(super) untold_error: bool,
}

/// How many problems of one document are told, and of one file.
pub(super) const MOST_PROBLEMS: usize = 100;

impl Findings {
    fn push(&mut self, finding: Finding) {
        if self.told.len() < MOST_PROBLEMS {
            self.told.push(finding);
        } else {
            self.untold += 1;
            self.untold_error |= finding.severity == Severity::Error;
        }
    }

    fn append(&mut self, other: Findings) {
        other.told.into_iter().for_each(|finding| self.push(finding));
        self.untold += other.untold;
        self.untold_error |= other.untold_error;
    }
}

/// Something that is wrong with a field.
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// The object, where it is known.
    pub(super) object: Option<ObjectRef>,
    pub(super) path: FieldPath,
    pub(super) message: String,
}

impl Reader {
    /// Takes one object, or a list of objects, that stands at `at`.
    fn object(&mut self, at: &FieldPath, value: Value) {
        let Value::Object(fields) = &value else {
            return self.error(at.clone(), "expected an object");
        };
        let text = |field: &str| fields.get(field).and_then(Value::as_str);
        let Some(kind) = text("kind").filter(|kind| !kind.is_empty()) else {
            return self.error(at.key("kind"), "missing: every manifest names its kind");
        };
        let api_version = text("apiVersion").unwrap_or_default();
        match read_as(kind, api_version) {
            ReadAs::Ours => {
                let kind = kind.to_owned();
                self.read(at, &kind, value);
            }
            ReadAs::Wrong { expected } => {
                let message = format!("kind {kind} needs apiVersion {expected}");
                self.error(at.key("apiVersion"), message);
            }
            ReadAs::Ignored => {
                tracing::debug!(kind, api_version, "object of a kind that is not read");
            }
        }
    }

    fn read(&mut self, at: &FieldPath, kind: &str, value: Value) {
        let read = match kind {
            "Service" => self.typed(at, ObjectKind::Service, value).map(|(name, object)| {
                self.check_address(at, &name, &object);
                (name, Lowered::Service(lower::service(&object)))
            }),
            "EndpointSlice" => {
                let read = self.typed(at, ObjectKind::EndpointSlice, value);
                read.map(|(name, object)| (name, Lowered::Slice(lower::slice(&object))))
            }
            "Node" => {
                let read = self.typed(at, ObjectKind::Node, value);
                read.map(|(name, object)| (name, Lowered::Node(lower::node(&object))))
            }
            "ServiceCIDR" => {
                let read = self.typed(at, ObjectKind::ServiceCidr, value);
                read.map(|(name, object)| {
                    (name, Lowered::ServiceCidr(lower::service_cidr(&object)))
                })
            }
            list => return self.list(at, list, value),
        };
        self.objects.extend(read.map(|(name, lowered)| Arc::new(Object { name, lowered })));
    }

    fn list(&mut self, at: &FieldPath, kind: &str, mut value: Value) {
        let at = at.key("items");
        match value.get_mut("items").map(Value::take) {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) => {
                for (index, item) in items.into_iter().enumerate() {
                    self.item(&at.index(index), item, kind);
                }
            }
            Some(_) => self.error(at, "expected a list of objects"),
        }
    }

    /// Takes an element of a list. The API server's lists of one kind do not repeat it.
    fn item(&mut self, at: &FieldPath, mut value: Value, list: &str) {
        let kind = list.strip_suffix("List").filter(|kind| !kind.is_empty());
        if let (Some(kind), Some(fields)) = (kind, value.as_object_mut())
            && !fields.contains_key("kind")
            && let Some(expected) = expected_version(kind)
        {
            fields.insert("kind".to_owned(), kind.into());
            fields.entry("apiVersion").or_insert_with(|| expected.into());
        }
        self.object(at, value);
    }

    /// Reads an object as the type of its kind.
    fn typed<T: DeserializeOwned>(
        &mut self,
        at: &FieldPath,
        kind: ObjectKind,
        value: Value,
    ) -> Option<(ObjectRef, T)> {
        let name = self.name(at, kind, &value)?;
        let mut unknown = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
        let read = serde_ignored::deserialize(tracked, |path: serde_ignored::Path<'_>| {
            unknown.push(at.join(FieldPath::from(&path)));
        });
        for path in unknown {
            self.find(Severity::Warning, Some(&name), path, "unknown field, ignored");
        }
        match read {
            Ok(object) => Some((name, object)),
            Err(error) => {
                let error: serde_json::Error = error;
                let path = at.join(FieldPath::from(&track.path()));
                self.find(Severity::Error, Some(&name), path, error.to_string());
                None
            }
        }
    }

    fn check_address(&mut self, at: &FieldPath, name: &ObjectRef, object: &core::Service) {
        if lower::relevance(object) == Relevance::NoClusterIp {
            let message = "a Service without an address is not served: nobody assigns one in \
                           manifests (None makes it headless)";
            self.find(Severity::Warning, Some(name), at.key("spec").key("clusterIP"), message);
        }
    }

    /// The name of an object, which must be one that the API server would accept: names stand in
    /// the ruleset.
    fn name(&mut self, at: &FieldPath, kind: ObjectKind, value: &Value) -> Option<ObjectRef> {
        let at = at.key("metadata");
        let field = |field: &str| match value.pointer(&format!("/metadata/{field}")) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            // RFC 1123 labels. The names of both stand in those of chains, which have 255 bytes.
            Some(Value::String(text))
                if text.len() > LONGEST_LABEL
                    && (field == "namespace" || kind == ObjectKind::Service) =>
            {
                Err("longer than 63 characters")
            }
            Some(Value::String(text)) if is_object_name(text) => Ok(Some(Arc::from(&**text))),
            Some(_) => Err("not a name: lower-case letters, digits, '-' and '.' are allowed"),
        };
        let name = match field("name") {
            Ok(Some(name)) => name,
            Ok(None) => {
                self.error(at.key("name"), "missing: every object has a name");
                return None;
            }
            Err(message) => {
                self.error(at.key("name"), message);
                return None;
            }
        };
        let namespace = match (kind, field("namespace")) {
            (ObjectKind::Node | ObjectKind::ServiceCidr, _) => "".into(),
            (_, Ok(namespace)) => namespace.unwrap_or_else(|| "default".into()),
            (_, Err(message)) => {
                self.error(at.key("namespace"), message);
                return None;
            }
        };
        Some(ObjectRef { kind, namespace, name })
    }

    fn error(&mut self, path: FieldPath, message: impl Into<String>) {
        self.find(Severity::Error, None, path, message);
    }

    fn find(
        &mut self,
        severity: Severity,
        object: Option<&ObjectRef>,
        path: FieldPath,
        message: impl Into<String>,
    ) {
        let (object, message) = (object.cloned(), message.into());
        self.findings.push(Finding { severity, object, path, message });
    }
}

/// The most characters that the name of a Service or a namespace has.
const LONGEST_LABEL: usize = 63;

/// Whether an object is of a kind that the proxy reads.
#[derive(Debug, PartialEq, Eq)]
enum ReadAs {
    Ours,
    /// It calls itself so, in a version or group that no such kind is in.
    Wrong {
        expected: &'static str,
    },
    /// It is of another kind.
    Ignored,
}

fn read_as(kind: &str, api_version: &str) -> ReadAs {
    let Some(expected) = expected_version(kind) else { return ReadAs::Ignored };
    if api_version == expected {
        return ReadAs::Ours;
    }
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    // Somebody else's kind of the same name, such as Knative's Service. Groups of custom resources
    // have a dot, and those under k8s.io belong to Kubernetes.
    if group.contains('.') && !group.ends_with(".k8s.io") {
        return ReadAs::Ignored;
    }
    ReadAs::Wrong { expected }
}

/// The `apiVersion` of the kinds that the proxy reads.
fn expected_version(kind: &str) -> Option<&'static str> {
    match kind {
        "List" | "Service" | "ServiceList" | "Node" | "NodeList" => Some("v1"),
        "EndpointSlice" | "EndpointSliceList" => Some("discovery.k8s.io/v1"),
        "ServiceCIDR" | "ServiceCIDRList" => Some("networking.k8s.io/v1"),
        _ => None,
    }
}

/// Whether `kind` is a list of kinds that the proxy reads.
fn is_list(kind: &str) -> bool {
    kind.ends_with("List") && expected_version(kind).is_some()
}

/// Whether the API server lets an object be called so (RFC 1123 subdomain).
fn is_object_name(name: &str) -> bool {
    let outer = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let allowed = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(b);
    bytes.len() <= 253 && bytes.iter().all(allowed) && outer(bytes.first()) && outer(bytes.last())
}

/// Reads the root of a document, and hands the elements of `items` on one by one: the list of all
/// objects of a cluster never stands in memory as a whole.
pub(super) struct Root<'a>(pub(super) &'a mut Reader);

impl<'de> DeserializeSeed<'de> for Root<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Root<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with apiVersion, kind and metadata")
    }

    /// An empty document.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut fields = serde_json::Map::new();
        let mut items = Reader::default();
        let mut left = MOST_FIELDS;
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                let list = fields.get("kind").and_then(Value::as_str);
                map.next_value_seed(Items { reader: &mut items, list })?;
                fields.insert(key, Value::Null);
            } else if FIELDS_OF_OURS.contains(&key.as_str()) {
                fields.insert(key, map.next_value_seed(Bounded { left: &mut left })?);
            } else {
                // Only told to be unknown, or part of a kind that is not read.
                map.next_value::<IgnoredAny>()?;
                fields.insert(key, Value::Null);
            }
        }
        let text = |field: &str| fields.get(field).and_then(Value::as_str).unwrap_or_default();
        let (kind, api_version) = (text("kind"), text("apiVersion"));
        let counts = is_list(kind) && read_as(kind, api_version) == ReadAs::Ours;
        self.0.object(&FieldPath::default(), Value::Object(fields));
        if counts {
            self.0.objects.append(&mut items.objects);
            self.0.findings.append(items.findings);
        }
        Ok(())
    }
}

/// Fields at the root of the kinds that the proxy reads; `data` and the like of others may be
/// large.
const FIELDS_OF_OURS: [&str; 8] =
    ["apiVersion", "kind", "metadata", "spec", "status", "addressType", "endpoints", "ports"];

/// Reads the `items` of a list. What kind of list it is may be known only later.
struct Items<'a> {
    reader: &'a mut Reader,
    list: Option<&'a str>,
}

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects in items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let at = FieldPath::default().key("items");
        let mut index = 0;
        // Each object may be as large as one that stands alone.
        while let Some(value) = seq.next_element_seed(Bounded { left: &mut MOST_FIELDS.clone() })? {
            self.reader.item(&at.index(index), value, self.list.unwrap_or_default());
            index += 1;
        }
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_names() {
        for (name, expected) in [
            ("a", true),
            ("a-b.c9", true),
            (&*"a".repeat(253), true),
            (&*"a".repeat(254), false),
            ("", false),
            ("-a", false),
            ("a.", false),
            ("A", false),
            ("a/b", false),
            ("a b", false),
        ] {
            assert_eq!(is_object_name(name), expected, "{name:?}");
        }
    }
}
