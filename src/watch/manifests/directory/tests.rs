//! Real files in real directories.

use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn options() -> Options {
    Options::new("worker".into())
}

/// A directory of manifests, and what is known of it.
struct Place {
    dir: TempDir,
    manifests: Directory,
}

impl Place {
    fn new() -> Place {
        let dir = TempDir::new().expect("a directory");
        let manifests = Directory::new(dir.path(), &options());
        Place { dir, manifests }
    }

    fn write(&self, file: &str, content: impl AsRef<[u8]>) -> &Place {
        fs::write(self.dir.path().join(file), content).expect(file);
        self
    }

    fn remove(&self, file: &str) -> &Place {
        fs::remove_file(self.dir.path().join(file)).expect(file);
        self
    }

    /// Names of the Services that a scan changes.
    fn scan(&mut self) -> Vec<String> {
        let changes = self.manifests.scan(|_| false).expect("the directory is there");
        changes.services.iter().map(|service| service.name.to_string()).collect()
    }

    /// Each Service with its port.
    fn services(&self) -> Vec<(String, u16)> {
        let services = self.manifests.index().services();
        let port = |service: &crate::model::Service| service.ports[0].port.get();
        services.map(|service| (service.name.name.to_string(), port(service))).collect()
    }

    /// What is wrong, without the way to the directory.
    fn diagnostics(&self) -> Vec<String> {
        let prefix = format!("{}/", self.dir.path().display());
        let all = self.manifests.diagnostics().into_iter();
        all.map(|diagnostic| diagnostic.to_string().replace(&prefix, "")).collect()
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: \
         10.96.0.7\n  ports:\n  - port: {port}\n"
    )
}

fn slice(name: &str, service: &str, address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  \
         labels:\n    kubernetes.io/service-name: {service}\naddressType: IPv4\nports:\n- \
         port: 8080\nendpoints:\n- addresses: [{address}]\n"
    )
}

fn node(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nstatus:\n  addresses:\n  - \
         type: InternalIP\n    address: {address}\n"
    )
}

fn named(pairs: &[(&str, u16)]) -> Vec<(String, u16)> {
    pairs.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect()
}

#[test]
fn reads_manifests_and_nothing_else() {
    let mut place = Place::new();
    for name in ["a.yaml", "b.yml", "C.YAML"] {
        place.write(name, service(&name[..1].to_lowercase(), 80));
    }
    let json = serde_json::json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "d"}, "spec": {"clusterIP": "10.96.0.8", "ports": [{"port": 80}]}});
    place.write("d.json", json.to_string());
    for name in [".hidden.yaml", "e.yaml.swp", "e.txt", "yaml", "e.yaml~"] {
        place.write(name, service("no", 80));
    }
    fs::create_dir(place.dir.path().join("below.yaml")).unwrap();
    place.write("below.yaml/f.yaml", service("no", 80));
    assert_eq!(place.scan(), ["a", "b", "c", "d"]);
    assert_eq!(place.diagnostics(), [""; 0]);
    assert_eq!(place.scan(), [""; 0]);
}

#[test]
fn a_single_file_may_have_any_name() {
    let place = Place::new();
    place.write("all.txt", service("a", 80) + "---\n" + &slice("a-1", "a", "10.0.0.1"));
    let path = place.dir.path().join("all.txt");
    let loaded = super::super::load(&path, &options()).expect("it is there");
    assert_eq!(loaded.diagnostics, []);
    let plans: Vec<_> = loaded.index.plans().collect();
    assert_eq!((plans.len(), plans[0].pools[0].backends.len()), (1, 1));

    fs::write(&path, "kind: [").unwrap();
    let loaded = super::super::load(&path, &options()).expect("it is there");
    assert_eq!(*loaded.diagnostics[0].object.name, *path.to_string_lossy());
}

#[test]
fn what_is_not_there_is_an_error_and_changes_nothing() {
    let mut place = Place::new();
    place.write("a.yaml", service("a", 80));
    place.scan();
    let path = place.dir.path().to_owned();
    fs::rename(&path, path.with_extension("gone")).unwrap();
    let error = place.manifests.scan(|_| false).expect_err("the directory is gone");
    let expected = format!("manifests at {} cannot be read", path.display());
    assert_eq!(error.to_string(), expected);
    assert_eq!(place.services(), named(&[("a", 80)]));
    fs::rename(path.with_extension("gone"), &path).unwrap();
    assert_eq!(place.scan(), [""; 0]);
}

#[test]
fn tells_which_services_change() {
    let mut place = Place::new();
    place.write("services.yaml", service("a", 80) + "---\n" + &service("b", 81));
    assert_eq!(place.scan(), ["a", "b"]);
    place.write("slices.yaml", slice("b-1", "b", "10.0.0.1"));
    assert_eq!(place.scan(), ["b"]);
    // The same in other words, or in another place.
    place.write("slices.yaml", format!("# moved\n---\n{}", slice("b-1", "b", "10.0.0.1")));
    assert_eq!(place.scan(), [""; 0]);
    place.remove("slices.yaml").write("moved.yaml", slice("b-1", "b", "10.0.0.1"));
    assert_eq!(place.scan(), [""; 0]);
    place.write("services.yaml", service("a", 82));
    assert_eq!(place.scan(), ["a", "b"]);
    assert_eq!(place.services(), named(&[("a", 82)]));
    place.remove("moved.yaml");
    assert_eq!(place.scan(), [""; 0]);
}

#[test]
fn a_document_that_did_not_change_is_not_read_again() {
    let mut place = Place::new();
    place.write("a.yaml", service("a", 80) + "---\n" + &service("b", 81));
    place.scan();
    let parsed = |place: &Place, name: &str| {
        let file = &place.manifests.files[OsStr::new("a.yaml")];
        let mut objects = file.objects().values();
        Arc::clone(&objects.find(|held| &*held.object.name.name == name).unwrap().object)
    };
    let (a, b) = (parsed(&place, "a"), parsed(&place, "b"));
    place.write("a.yaml", service("a", 82) + "---\n" + &service("b", 81));
    assert_eq!(place.scan(), ["a"]);
    assert!(!Arc::ptr_eq(&a, &parsed(&place, "a")));
    assert!(Arc::ptr_eq(&b, &parsed(&place, "b")));
}

#[test]
fn the_first_definition_wins() {
    let mut place = Place::new();
    place.write("b.yaml", service("x", 1) + "---\n" + &service("x", 2));
    place.write("c.yaml", service("x", 3));
    place.scan();
    assert_eq!(place.services(), named(&[("x", 1)]));
    let again = |here: &str, first: &str| {
        format!(
            "error: Service default/x: defined again in {here}, which is ignored: {first}, \
             comes first"
        )
    };
    let (b1, b2) = ("b.yaml, document 1", "b.yaml, document 2");
    let c1 = "c.yaml, document 1";
    assert_eq!(place.diagnostics(), [again(b2, b1), again(c1, b1)]);

    place.write("a.yaml", service("x", 4));
    assert_eq!(place.scan(), ["x"]);
    assert_eq!(place.services(), named(&[("x", 4)]));
    let a1 = "a.yaml, document 1";
    assert_eq!(place.diagnostics(), [again(b1, a1), again(b2, b1), again(c1, a1)]);

    // Who comes next takes over.
    place.remove("a.yaml").remove("b.yaml");
    assert_eq!(place.scan(), ["x"]);
    assert_eq!(place.services(), named(&[("x", 3)]));
    assert_eq!(place.diagnostics(), [""; 0]);
    place.remove("c.yaml");
    assert_eq!(place.scan(), ["x"]);
    assert_eq!(place.services(), []);
}

#[test]
fn the_last_good_version_stays() {
    let mut place = Place::new();
    let both = service("a", 1) + "---\n" + &service("b", 1);
    place.write("x.yaml", &both).write("y.yaml", service("c", 1));
    place.scan();
    // One document breaks, another changes.
    place.write("x.yaml", service("a", 2) + "---\n" + &service("b", 2).replace('2', "two"));
    assert_eq!(place.scan(), ["a"]);
    assert_eq!(place.services(), named(&[("a", 2), ("b", 1), ("c", 1)]));
    assert_eq!(
        place.diagnostics(),
        ["error: File x.yaml: spec.ports[0].port: document 2 (Service default/b), line 17: \
          invalid type: string \"two\", expected i32; what the file held before stays in \
          force"],
    );
    // It is worse now, and others go on.
    place.write("x.yaml", "kind: [").write("y.yaml", service("c", 2));
    assert_eq!(place.scan(), ["c"]);
    assert_eq!(place.services(), named(&[("a", 2), ("b", 1), ("c", 2)]));
    place.write("x.yaml", [0xff, 0xfe]);
    assert_eq!(place.scan(), [""; 0]);
    assert_eq!(
        place.diagnostics(),
        ["error: File x.yaml: line 1: not UTF-8 text; what the file held before stays in \
          force"],
    );
    // Mended: what it does not hold any more is gone now.
    place.write("x.yaml", service("b", 3));
    assert_eq!(place.scan(), ["a", "b"]);
    assert_eq!(place.services(), named(&[("b", 3), ("c", 2)]));
    assert_eq!(place.diagnostics(), [""; 0]);
    // A file that is gone takes along what it held, whatever that was.
    place.write("x.yaml", "kind: [");
    place.scan();
    place.remove("x.yaml");
    assert_eq!(place.scan(), ["b"]);
    assert_eq!(place.services(), named(&[("c", 2)]));
    assert_eq!(place.diagnostics(), [""; 0]);
}

#[test]
fn files_that_cannot_be_read_are_said() {
    let mut place = Place::new();
    place.manifests.largest_file = 1000;
    place.write("a.yaml", service("a", 80));
    place.write("large.yaml", "#".repeat(1001));
    place.write("text.yaml", b"kind: x\napiVersion: \xff\n");
    symlink("loop.yaml", place.dir.path().join("loop.yaml")).unwrap();
    symlink("nowhere", place.dir.path().join("dangling.yaml")).unwrap();
    let pipe = place.dir.path().join("pipe.yaml");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(place.scan(), ["a"]);
    let found = place.diagnostics();
    assert_eq!(
        found[..1],
        ["error: File large.yaml: larger than 1000 bytes, and not read; split it; not in \
          force"],
    );
    assert!(found[1].starts_with("error: File loop.yaml: cannot be read: "), "{found:?}");
    assert_eq!(
        found[2..],
        [
            "error: File pipe.yaml: a pipe, socket or device, and not read; not in force",
            "error: File text.yaml: line 2: not UTF-8 text; not in force",
        ],
    );
    // A file that grew too large keeps what it held.
    place.write("a.yaml", service("a", 81) + &"#".repeat(1000));
    assert_eq!(place.scan(), [""; 0]);
    assert_eq!(place.services(), named(&[("a", 80)]));
    place.write("a.yaml", service("a", 81));
    assert_eq!(place.scan(), ["a"]);
}

#[test]
fn many_problems_of_a_file_are_bounded() {
    let mut place = Place::new();
    place.write("a.yaml", "nonsense\n---\n".repeat(MOST_PROBLEMS + 7));
    place.scan();
    let found = place.diagnostics();
    assert_eq!(found.len(), MOST_PROBLEMS + 1);
    assert_eq!(found[0], "error: File a.yaml: 7 more problems, not listed; not in force");
    let warning = "apiVersion: v1\nkind: Node\nmetadata: {name: n}\nx: 1\n---\n";
    place.write("a.yaml", warning.repeat(MOST_PROBLEMS + 7));
    place.scan();
    let found = place.diagnostics();
    assert!(found.contains(&"warning: File a.yaml: 7 more problems, not listed".to_owned()));
}

/// The kubelet swaps the link `..data` from one directory to another.
#[test]
fn follows_the_links_of_a_config_map() {
    let mut place = Place::new();
    let path = place.dir.path().to_owned();
    for (version, port) in [("..1", 80), ("..2", 81)] {
        fs::create_dir(path.join(version)).unwrap();
        place.write(&format!("{version}/web.yaml"), service("a", port));
    }
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/web.yaml", path.join("web.yaml")).unwrap();
    assert_eq!(place.scan(), ["a"]);
    symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    assert_eq!(place.scan(), ["a"]);
    assert_eq!(place.services(), named(&[("a", 81)]));
    assert_eq!(place.diagnostics(), [""; 0]);
}

#[test]
fn files_in_motion_wait() {
    let mut place = Place::new();
    place.write("a.yaml", service("a", 80)).write("b.yaml", service("b", 80));
    place.scan();
    place.write("a.yaml", "").remove("b.yaml").write("c.yaml", service("c", 80));
    let in_motion = |name: &OsStr| name == "a.yaml" || name == "b.yaml";
    let changes = place.manifests.scan(in_motion).unwrap();
    assert_eq!(changes.services, BTreeSet::from([ServiceName::new("default", "c")]));
    // Somebody begins to write while it is read.
    let asked = std::cell::Cell::new(0);
    let begins = |name: &OsStr| {
        asked.set(asked.get() + 1);
        name == "b.yaml" || (name == "a.yaml" && asked.get() > 1)
    };
    assert_eq!(place.manifests.scan(begins).unwrap(), Changes::default());
    assert_eq!(place.scan(), ["a", "b"]);
}

#[test]
fn our_node_counts() {
    let mut place = Place::new();
    place.write("nodes.yaml", node("other", "10.0.0.2") + "---\n" + &node("worker", "10.0.0.1"));
    let addresses = |place: &Place| {
        let node = &place.manifests.index().context().node;
        node.primary_addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let changes = place.manifests.scan(|_| false).unwrap();
    assert!(changes.node && changes.services.is_empty());
    assert_eq!(addresses(&place), ["10.0.0.1"]);
    place.write("nodes.yaml", node("other", "10.0.0.3") + "---\n" + &node("worker", "10.0.0.1"));
    assert_eq!(place.manifests.scan(|_| false).unwrap(), Changes::default());
    place.remove("nodes.yaml");
    assert!(place.manifests.scan(|_| false).unwrap().node);
    assert_eq!(addresses(&place), [""; 0]);
    assert_eq!(place.manifests.index().context().node.diagnostics.len(), 1);
}

/// What a step leaves in a file: Services with their port; `None` removes the file.
type Step = (u8, Option<Vec<(u8, u16)>>);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let content = prop::option::weighted(0.8, prop::collection::vec((0..4u8, 1..3u16), 0..4));
    prop::collection::vec((0..3u8, content), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happened before, what is in force is what is in the files.
    #[test]
    fn following_equals_reading_anew(steps in steps()) {
        let mut place = Place::new();
        for (file, content) in steps {
            let name = format!("{file}.yaml");
            match content {
                None => drop(fs::remove_file(place.dir.path().join(&name))),
                Some(services) => {
                    let documents = services.iter();
                    let documents: Vec<String> = documents
                        .map(|(name, port)| service(&format!("s{name}"), *port))
                        .collect();
                    place.write(&name, documents.join("---\n"));
                }
            }
            place.scan();
        }
        let fresh = super::super::load(place.dir.path(), &options()).unwrap();
        let followed: Vec<_> = place.manifests.index().services().collect();
        prop_assert_eq!(followed, fresh.index.services().collect::<Vec<_>>());
        prop_assert_eq!(place.manifests.diagnostics(), fresh.diagnostics);
    }
}
