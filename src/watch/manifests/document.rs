//! A document of a manifest file: from text to objects of the model.

use std::sync::Arc;

use serde::de::DeserializeSeed;

use super::field::Lines;
use super::reader::{Reader, Root};
use super::split::Syntax;
use crate::model::{EndpointSlice, Node, ObjectRef, Service, ServiceCidr, Severity};

/// What a document holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// The objects, in their order; there may be several of one name.
    pub(super) objects: Vec<Arc<Object>>,
    pub(super) problems: Vec<Problem>,
}

impl Parsed {
    /// Whether something of the document could not be read, so that what is missing in it is not
    /// known to be gone.
    pub(super) fn failed(&self) -> bool {
        self.problems.iter().any(|problem| problem.severity == Severity::Error)
    }
}

/// An object of a kind that the proxy reads.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) name: ObjectRef,
    pub(super) lowered: Lowered,
}

/// An object as the model has it; `None` where it is none of the proxy's business.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lowered {
    Service(Option<Service>),
    Slice(Option<EndpointSlice>),
    Node(Node),
    ServiceCidr(ServiceCidr),
}

/// What is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) severity: Severity,
    /// The object, where it is known.
    pub(super) object: Option<ObjectRef>,
    /// The line within the document, counted from 1, where it is known.
    pub(super) line: Option<usize>,
    /// The field; empty for the document as a whole.
    pub(super) field: String,
    pub(super) message: String,
}

/// Reads one document. Never fails: what is wrong is in [`Parsed::problems`].
pub(super) fn parse(text: &str, syntax: Syntax) -> Parsed {
    let mut reader = Reader::default();
    let read = match syntax {
        Syntax::Yaml => serde_saphyr::with_deserializer_from_str_with_options(
            text,
            yaml(text.len()),
            |document| Root(&mut reader).deserialize(document),
        )
        .map_err(|error| yaml_problem(&error)),
        Syntax::Json => {
            let mut document = serde_json::Deserializer::from_str(text);
            Root(&mut reader)
                .deserialize(&mut document)
                .and_then(|()| document.end())
                .map_err(|error| json_problem(&error))
        }
    };
    // Of a document that does not parse, nobody knows what the part that was read means.
    if let Err(problem) = read {
        return Parsed { objects: Vec::new(), problems: vec![problem] };
    }
    let Reader { objects, findings } = reader;
    let lines = if findings.told.is_empty() { None } else { Lines::of(text, yaml(MOST_LINES)) };
    let mut problems: Vec<Problem> = findings
        .told
        .into_iter()
        .map(|finding| Problem {
            severity: finding.severity,
            object: finding.object,
            line: lines.as_ref().and_then(|lines| lines.line(&finding.path)),
            field: finding.path.to_string(),
            message: finding.message,
        })
        .collect();
    if findings.untold > 0 {
        problems.push(Problem {
            severity: if findings.untold_error { Severity::Error } else { Severity::Warning },
            object: None,
            line: None,
            field: String::new(),
            message: format!("{} more problems, not listed", findings.untold),
        });
    }
    Parsed { objects, problems }
}

/// The largest document, in fields and elements, of which lines are told. They all stand in memory
/// at once.
const MOST_LINES: usize = 500_000;

/// Options for a document of at most so many fields and elements: for a list of all objects of a
/// cluster that may be as many as it has bytes. Its depth is bounded by the stack: 64 levels take
/// some 150 KiB of it, and 2 MiB in a build without optimization.
fn yaml(size: usize) -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 64,
            flow_nesting_limit: 64,
            max_events: size.max(1000).saturating_mul(2),
            max_nodes: size.max(1000),
            max_total_scalar_bytes: size.max(64 << 20),
        },
        // `on` and `y` are strings, as in YAML 1.2.
        strict_booleans: true,
        emit_comments: false,
        with_snippet: false,
    }
}

fn yaml_problem(error: &serde_saphyr::Error) -> Problem {
    /// The line is told in terms of the file, not of the document.
    struct WithoutLocation;
    impl serde_saphyr::Localizer for WithoutLocation {
        fn attach_location<'a>(
            &self,
            base: std::borrow::Cow<'a, str>,
            _: serde_saphyr::Location,
        ) -> std::borrow::Cow<'a, str> {
            base
        }
    }
    let formatter = serde_saphyr::DefaultMessageFormatter.with_localizer(&WithoutLocation);
    let line = error.location().and_then(|location| usize::try_from(location.line()).ok());
    let message = error.without_snippet().render_with_formatter(&formatter);
    Problem {
        severity: Severity::Error,
        object: None,
        line: line.filter(|line| *line > 0),
        field: String::new(),
        message,
    }
}

fn json_problem(error: &serde_json::Error) -> Problem {
    let message = error.to_string();
    let location = format!(" at line {} column {}", error.line(), error.column());
    Problem {
        severity: Severity::Error,
        object: None,
        line: Some(error.line()).filter(|line| *line > 0),
        field: String::new(),
        message: message.strip_suffix(&location).unwrap_or(&message).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::reader::MOST_PROBLEMS;
    use super::*;

    fn names(parsed: &Parsed) -> Vec<String> {
        parsed.objects.iter().map(|object| object.name.to_string()).collect()
    }

    fn problems(parsed: &Parsed) -> Vec<String> {
        let shown = |p: &Problem| {
            let line = p.line.map_or(String::new(), |line| format!("{line}: "));
            format!("{}: {line}{}: {}", p.severity, p.field, p.message)
        };
        parsed.problems.iter().map(shown).collect()
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  \
                           clusterIP: 10.96.0.7\n  ports:\n  - port: 80\n";

    #[test]
    fn reads_the_kinds_of_ours() {
        let table: &[(&str, &[&str])] = &[
            (SERVICE, &["Service default/web"]),
            (
                "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: \
                 {clusterIP: None}",
                &["Service shop/web"],
            ),
            (
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: \
                 web-1}\naddressType: IPv4\nendpoints: []",
                &["EndpointSlice default/web-1"],
            ),
            ("apiVersion: v1\nkind: Node\nmetadata: {name: n, namespace: x}", &["Node n"]),
            ("apiVersion: apps/v1\nkind: Deployment\nspec: {replicas: many}", &[]),
            ("apiVersion: v1\nkind: ConfigMap\ndata: {a: b}", &[]),
            ("apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}", &[]),
            ("apiVersion: v1\nkind: PodList\nitems: [{a: 1}]", &[]),
            ("---\n", &[]),
            ("null", &[]),
        ];
        for (text, expected) in table {
            let parsed = parse(text, Syntax::Yaml);
            assert_eq!(names(&parsed), *expected, "{text}");
            assert_eq!(problems(&parsed), [""; 0], "{text}");
        }
    }

    #[test]
    fn lists_are_flattened() {
        let service = |name: &str| {
            format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: \
                 None}}}}"
            )
        };
        let untyped = "{metadata: {name: c}, spec: {clusterIP: None}}";
        let (a, b) = (service("a"), service("b"));
        let table = [
            (format!("apiVersion: v1\nkind: List\nitems: [{a}, {b}]"), "a b"),
            // As kubectl sorts the fields.
            (format!("apiVersion: v1\nitems: [{a}, {b}]\nkind: List\nmetadata: {{}}"), "a b"),
            (format!("kind: ServiceList\napiVersion: v1\nitems: [{untyped}, {b}]"), "c b"),
            (
                format!(
                    "apiVersion: v1\nkind: List\nitems: [{{apiVersion: v1, kind: List, items: [{a}]}}, {b}]"
                ),
                "a b",
            ),
            ("apiVersion: v1\nkind: List\nitems: null".to_owned(), ""),
            ("apiVersion: v1\nkind: List".to_owned(), ""),
        ];
        for (text, expected) in table {
            let parsed = parse(&text, Syntax::Yaml);
            let names: Vec<_> = parsed.objects.iter().map(|o| o.name.name.to_string()).collect();
            assert_eq!(names.join(" "), expected, "{text}");
            assert_eq!(problems(&parsed), [""; 0], "{text}");
        }
    }

    #[test]
    fn an_item_that_is_wrong_does_not_hide_the_others() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  \
                    metadata: {name: a}\n  spec:\n    ports:\n    - port: eighty\n- apiVersion: \
                    v1\n  kind: Service\n  metadata: {name: b}\n  spec: {clusterIP: None}\n- \
                    nonsense\n";
        let parsed = parse(text, Syntax::Yaml);
        assert_eq!(names(&parsed), ["Service default/b"]);
        assert_eq!(
            problems(&parsed),
            [
                "error: 9: items[0].spec.ports[0].port: invalid type: string \"eighty\", expected \
                 i32",
                "error: 14: items[2]: expected an object",
            ],
        );
        assert!(parsed.failed());
    }

    #[test]
    fn says_what_is_wrong() {
        let table: &[(&str, &str)] = &[
            ("kind: Service\n", "error: 1: apiVersion: kind Service needs apiVersion v1"),
            (
                "apiVersion: v2\nkind: Service",
                "error: 1: apiVersion: kind Service needs apiVersion v1",
            ),
            (
                "apiVersion: core/v1\nkind: Node",
                "error: 1: apiVersion: kind Node needs apiVersion v1",
            ),
            (
                "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice",
                "error: 1: apiVersion: kind EndpointSlice needs apiVersion discovery.k8s.io/v1",
            ),
            ("apiVersion: v1\n", "error: 1: kind: missing: every manifest names its kind"),
            (
                "apiVersion: v1\nkind: Service\nmetadata:\n  namespace: shop\n",
                "error: 4: metadata.name: missing: every object has a name",
            ),
            (
                "apiVersion: v1\nkind: Service\nmetadata: {generateName: web-}\n",
                "error: 3: metadata.name: missing: every object has a name",
            ),
            (
                "apiVersion: v1\nkind: Service\nmetadata: {name: 'a\"b'}\n",
                "error: 3: metadata.name: not a name: lower-case letters, digits, '-' and '.' are \
                 allowed",
            ),
            (
                &format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {}}}\n", "a".repeat(64)),
                "error: 3: metadata.name: longer than 63 characters",
            ),
            (
                "apiVersion: v1\nkind: Service\nmetadata: {name: 7}\n",
                "error: 3: metadata.name: not a name: lower-case letters, digits, '-' and '.' are \
                 allowed",
            ),
            (
                "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: '-'}\n",
                "error: 3: metadata.namespace: not a name: lower-case letters, digits, '-' and \
                 '.' are allowed",
            ),
            (
                "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  annotations:\n    x.y/z: 7",
                "error: 6: metadata.annotations[x.y/z]: invalid type: integer `7`, expected a \
                 string",
            ),
            ("- a\n", "invalid type: sequence"),
            ("just text\n", "invalid type: string"),
            ("a: [\n", "error: 1: : unclosed bracket"),
            ("kind: Service\nkind: Node\n", "duplicate"),
            ("apiVersion: v1\nkind: List\nitems: 7", "expected a list of objects in items"),
        ];
        for (text, expected) in table {
            let parsed = parse(text, Syntax::Yaml);
            let found = problems(&parsed);
            assert_eq!((found.len(), parsed.objects.len()), (1, 0), "{text}: {found:?}");
            assert!(found[0].contains(expected), "{text}: {found:?}");
            assert!(parsed.failed(), "{text}");
        }
    }

    #[test]
    fn warns_of_what_nobody_reads() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\ndata: {}\nspec:\n  \
                    clusterIP: 10.96.0.7\n  ports:\n  - port: 80\n    nodeport: 30080\n";
        let parsed = parse(text, Syntax::Yaml);
        assert_eq!(names(&parsed), ["Service default/a"]);
        assert_eq!(
            problems(&parsed),
            [
                "warning: 4: data: unknown field, ignored",
                "warning: 9: spec.ports[0].nodeport: unknown field, ignored",
            ],
        );
        assert!(!parsed.failed());

        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  type: NodePort\n";
        let parsed = parse(text, Syntax::Yaml);
        assert_eq!(parsed.objects[0].lowered, Lowered::Service(None));
        let found = problems(&parsed);
        assert!(found[0].starts_with("warning: 5: spec.clusterIP: a Service without an address"));
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn json() {
        let service = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"},
            "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}"#;
        assert_eq!(names(&parse(service, Syntax::Json)), ["Service default/a"]);
        for (text, expected) in [
            (service.replace("80", "\"x\""), "error: 2: spec.ports[0].port: invalid type: string"),
            (service.replace("80", "80,"), "error: 2: : trailing comma"),
            (format!("{service}\n{service}"), "error: 3: : trailing characters"),
            (String::new(), "error: 1: : EOF while parsing a value"),
        ] {
            let parsed = parse(&text, Syntax::Json);
            let found = problems(&parsed);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{text}: {found:?}");
        }
    }

    #[test]
    fn strings_are_what_they_look_like() {
        // `on` is a name, and an unquoted number is none, as for the API server.
        let text = SERVICE.replace("web", "on");
        assert_eq!(names(&parse(&text, Syntax::Yaml)), ["Service default/on"]);
    }

    #[test]
    fn hostile_documents_are_refused() {
        let thread = std::thread::Builder::new().stack_size(16 << 20);
        thread.spawn(refuse_hostile_documents).unwrap().join().expect("no panic");
    }

    fn refuse_hostile_documents() {
        let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        bomb.extend(('a'..'k').zip('b'..'l').map(|(last, this)| {
            format!("{this}: &{this} [{}]\n", vec![format!("*{last}"); 10].join(", "))
        }));
        for text in ["[".repeat(100_000), "{a: ".repeat(100_000), "- ".repeat(100_000), bomb] {
            let text = format!("apiVersion: v1\nkind: Service\nspec: \n  {text}");
            let parsed = parse(&text, Syntax::Yaml);
            assert_eq!((parsed.objects.len(), parsed.problems.len()), (0, 1));
            let parsed = parse(&text, Syntax::Json);
            assert_eq!((parsed.objects.len(), parsed.problems.len()), (0, 1));
        }
        let wide = "- {a: 1}\n".repeat(400_000);
        let parsed = parse(&format!("apiVersion: v1\nkind: Service\nspec:\n{wide}"), Syntax::Yaml);
        assert!(parsed.problems[0].message.contains("more than 500000 fields"));
        // Of many objects, each may have as many.
        let field = format!("labels: [{}]", "1, ".repeat(1000));
        let item = format!("- {{apiVersion: v1, kind: ConfigMap, {field}}}\n");
        let list = format!("kind: List\napiVersion: v1\nitems:\n{}", item.repeat(600));
        assert_eq!(parse(&list, Syntax::Yaml).problems, []);
        let deep = format!(r#"{{"kind": "Service", "spec": {}"#, "[".repeat(100_000));
        assert!(parse(&deep, Syntax::Json).failed());
    }

    #[test]
    fn many_problems_are_bounded() {
        let list = |item: &str, count| {
            let list = "apiVersion: v1\nkind: List\nitems:\n".to_owned() + &item.repeat(count);
            parse(&list, Syntax::Yaml)
        };
        let parsed = list("- {}\n", MOST_PROBLEMS + 7);
        assert_eq!(parsed.problems.len(), MOST_PROBLEMS + 1);
        assert_eq!(parsed.problems[MOST_PROBLEMS].message, "7 more problems, not listed");
        assert!(parsed.failed());
        // Many warnings are no error.
        let item = "- {apiVersion: v1, kind: Node, metadata: {name: a}, x: 1}\n";
        let parsed = list(item, MOST_PROBLEMS + 7);
        assert_eq!(parsed.problems.len(), MOST_PROBLEMS + 1);
        assert!(!parsed.failed());
    }
}
