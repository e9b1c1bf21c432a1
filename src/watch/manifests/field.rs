//! Where in a document something stands.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// The way from the root of a document to one of its fields. Prints as `spec.ports[1].port`, and
/// keys that would be ambiguous so as `metadata.annotations[example.com/key]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FieldPath(Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Key(String),
    Index(usize),
}

impl FieldPath {
    /// The field `key` of this one.
    pub(super) fn key(&self, key: &str) -> FieldPath {
        self.and(Step::Key(key.to_owned()))
    }

    /// The element at `index` of this one.
    pub(super) fn index(&self, index: usize) -> FieldPath {
        self.and(Step::Index(index))
    }

    /// What stands at `path` below this one.
    pub(super) fn join(&self, path: FieldPath) -> FieldPath {
        FieldPath(self.0.iter().cloned().chain(path.0).collect())
    }

    fn and(&self, step: Step) -> FieldPath {
        FieldPath(self.0.iter().cloned().chain([step]).collect())
    }
}

impl From<&serde_path_to_error::Path> for FieldPath {
    fn from(path: &serde_path_to_error::Path) -> FieldPath {
        use serde_path_to_error::Segment;
        let steps = path.iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(Step::Index(*index)),
            Segment::Map { key } => Some(Step::Key(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        });
        FieldPath(steps.collect())
    }
}

impl From<&serde_ignored::Path<'_>> for FieldPath {
    fn from(path: &serde_ignored::Path<'_>) -> FieldPath {
        use serde_ignored::Path;
        match path {
            Path::Root => FieldPath::default(),
            Path::Seq { parent, index } => FieldPath::from(*parent).index(*index),
            Path::Map { parent, key } => FieldPath::from(*parent).key(key),
            Path::Some { parent }
            | Path::NewtypeStruct { parent }
            | Path::NewtypeVariant { parent } => FieldPath::from(*parent),
        }
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, step) in self.0.iter().enumerate() {
            let plain = |key: &str| {
                !key.is_empty()
                    && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
            };
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key) if !plain(key) => write!(f, "[{}]", key.escape_debug())?,
                Step::Key(key) if place == 0 => f.write_str(key)?,
                Step::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// The lines of a document's fields. Reading them takes the whole document a second time, so it is
/// done only when there is something to say of one.
#[derive(Debug)]
pub(super) struct Lines(Spanned<Located>);

#[derive(Debug)]
enum Located {
    Scalar,
    Sequence(Vec<Spanned<Located>>),
    Mapping(Vec<(String, Spanned<Located>)>),
}

impl Lines {
    /// Reads the lines of `text`; `None` where it is no YAML.
    pub(super) fn of(text: &str, options: serde_saphyr::Options) -> Option<Lines> {
        serde_saphyr::from_str_with_options(text, options).ok().map(Lines)
    }

    /// The line, counted from 1, of the field at `path`, or of the innermost field on the way to it
    /// that is there.
    pub(super) fn line(&self, path: &FieldPath) -> Option<usize> {
        let mut at = &self.0;
        for step in &path.0 {
            let next = match (&at.value, step) {
                (Located::Sequence(elements), Step::Index(index)) => elements.get(*index),
                (Located::Mapping(fields), Step::Key(key)) => {
                    fields.iter().find(|(name, _)| name == key).map(|(_, value)| value)
                }
                _ => None,
            };
            let Some(next) = next else { break };
            at = next;
        }
        usize::try_from(at.referenced.line()).ok().filter(|line| *line > 0)
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Located, D::Error> {
        deserializer.deserialize_any(LocatedVisitor)
    }
}

struct LocatedVisitor;

impl<'de> Visitor<'de> for LocatedVisitor {
    type Value = Located;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Located, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            elements.push(element);
        }
        Ok(Located::Sequence(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Located, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Located::Mapping(fields))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_none<E>(self) -> Result<Located, E> {
        Ok(Located::Scalar)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Located, D::Error> {
        Located::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(steps: &[&str]) -> FieldPath {
        steps.iter().fold(FieldPath::default(), |path, step| match step.parse() {
            Ok(index) => path.index(index),
            Err(_) => path.key(step),
        })
    }

    #[test]
    fn prints_paths() {
        for (steps, expected) in [
            (&[][..], ""),
            (&["kind"], "kind"),
            (&["spec", "ports", "1", "port"], "spec.ports[1].port"),
            (&["items", "3", "kind"], "items[3].kind"),
            (&["metadata", "annotations", "a.b/c"], "metadata.annotations[a.b/c]"),
            (&["a b"], "[a b]"),
            (&["a\n"], "[a\\n]"),
        ] {
            assert_eq!(path(steps).to_string(), expected);
        }
    }

    #[test]
    fn finds_lines() {
        let text = "kind: Service\nspec:\n  ports:\n  - name: a\n    port: 1\n  - name: b\n    \
                    port: no\n";
        let yaml = Lines::of(text, serde_saphyr::options! {}).expect("YAML");
        for (steps, line) in [
            (&["kind"][..], 1),
            (&["spec", "ports", "0", "port"], 5),
            (&["spec", "ports", "1"], 6),
            (&["spec", "ports", "1", "port"], 7),
            // What is not there is looked for where it should be.
            (&["spec", "ports", "1", "nodePort"], 6),
            (&["metadata", "name"], 1),
        ] {
            assert_eq!(yaml.line(&path(steps)), Some(line), "{steps:?}");
        }
        let json = "{\n \"spec\": {\n  \"ports\": [\n   {\"port\": true}\n]}}";
        let json = Lines::of(json, serde_saphyr::options! {}).expect("JSON is YAML");
        assert_eq!(json.line(&path(&["spec", "ports", "0", "port"])), Some(4));
        assert!(Lines::of("a: [", serde_saphyr::options! {}).is_none());
    }
}
