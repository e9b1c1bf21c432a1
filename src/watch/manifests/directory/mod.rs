//! A directory of manifest files, and the index of what is in them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::document::{Lowered, Problem};
use super::file::{Document, File, Refreshed};
use super::reader::MOST_PROBLEMS;
use super::{Error, LARGEST_FILE};
use crate::model::{Diagnostic, Node, ObjectKind, ObjectRef, ServiceName, Severity, SliceName};
use crate::watch::{Index, Options};

/// What the manifests at a path say, as of the last [`Directory::scan`].
#[derive(Debug)]
pub(super) struct Directory {
    /// As given.
    path: PathBuf,
    /// Whether that is a file.
    single: bool,
    node_name: Arc<str>,
    largest_file: u64,
    /// By name: this is the order in which the first of several definitions wins.
    files: BTreeMap<OsString, File>,
    /// Which files define an object. No entry is empty.
    definitions: HashMap<ObjectRef, BTreeSet<OsString>>,
    /// Objects that more than one file defines.
    contested: BTreeSet<ObjectRef>,
    index: Index,
}

/// What a scan has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Services whose plan may have changed.
    pub(super) services: BTreeSet<ServiceName>,
    /// Whether the node or a `ServiceCIDR` has changed.
    pub(super) node: bool,
}

impl Directory {
    /// A directory, or a single file, that nobody has looked into yet.
    pub(super) fn new(path: &Path, options: &Options) -> Directory {
        Directory {
            path: path.to_owned(),
            single: false,
            node_name: options.node_name.clone(),
            largest_file: LARGEST_FILE,
            files: BTreeMap::new(),
            definitions: HashMap::new(),
            contested: BTreeSet::new(),
            index: Index::new(options),
        }
    }

    /// The path as it was given.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Everything that is in force.
    pub(super) fn index(&self) -> &Index {
        &self.index
    }

    /// Everything that is in force, without the files.
    pub(super) fn into_index(self) -> Index {
        self.index
    }

    /// Brings the index up to date with the files. Files that `in_motion` says yes to stay as they
    /// were last seen: somebody is writing them. Reads what has changed, and looks at all.
    ///
    /// # Errors
    /// When the path cannot be read; then everything stays as it was.
    pub(super) fn scan(&mut self, in_motion: impl Fn(&OsStr) -> bool) -> Result<Changes, Error> {
        let path = self.path.clone();
        let failed = |source| Error::Read { path: path.clone(), source };
        self.single = !std::fs::metadata(&self.path).map_err(failed)?.is_dir();
        let present = if self.single {
            self.path.file_name().map(OsStr::to_owned).into_iter().collect()
        } else {
            manifests_in(&self.path).map_err(failed)?
        };
        let mut touched = BTreeSet::new();
        let known: BTreeSet<OsString> = self.files.keys().cloned().collect();
        for name in known.union(&present) {
            if in_motion(name) {
                continue;
            }
            if !present.contains(name) {
                self.drop_file(name, &mut touched);
                continue;
            }
            self.refresh(name, || in_motion(name), &mut touched);
        }
        Ok(self.settle(touched))
    }

    /// What is wrong with the files: what cannot be read, and what stands in several places.
    /// Sorted.
    pub(super) fn diagnostics(&self) -> Vec<Diagnostic> {
        let mut diagnostics = Vec::new();
        for (name, file) in &self.files {
            let shown = self.shown(name);
            let mut problems = file.problems();
            let first = problems.by_ref().take(MOST_PROBLEMS);
            diagnostics.extend(first.map(|(at, problem)| told(&shown, file, at, problem)));
            diagnostics.extend(untold(problems).map(|rest| told(&shown, file, None, &rest)));
            for (object, document) in file.repeated() {
                let first = file.objects().get(object).map_or(0, |held| held.document);
                diagnostics.push(defined_again(object, (&shown, *document), (&shown, first)));
            }
        }
        for object in &self.contested {
            let mut places = self.definitions[object].iter().filter_map(|name| {
                let held = self.files.get(name)?.objects().get(object)?;
                Some((self.shown(name), held.document))
            });
            let Some((winner, first)) = places.next() else { continue };
            for (file, document) in places {
                diagnostics.push(defined_again(object, (&file, document), (&winner, first)));
            }
        }
        diagnostics.sort();
        diagnostics
    }

    fn refresh(
        &mut self,
        name: &OsStr,
        in_motion: impl Fn() -> bool,
        touched: &mut BTreeSet<ObjectRef>,
    ) {
        let path = self.path_of(name);
        let file = self.files.entry(name.to_owned()).or_default();
        let before = match file.refresh(&path, self.largest_file, in_motion) {
            Refreshed::Same => return,
            Refreshed::Gone => return self.drop_file(name, touched),
            Refreshed::Read(before) => before,
        };
        let (mut come, mut gone) = (Vec::new(), Vec::new());
        for (object, held) in file.objects() {
            match before.get(object) {
                Some(old) if Arc::ptr_eq(&old.object, &held.object) => {}
                Some(_) => drop(touched.insert(object.clone())),
                None => come.push(object.clone()),
            }
        }
        gone.extend(before.into_keys().filter(|object| !file.objects().contains_key(object)));
        for object in &come {
            self.define(object, name);
        }
        for object in &gone {
            self.undefine(object, name);
        }
        touched.extend(come.into_iter().chain(gone));
    }

    fn drop_file(&mut self, name: &OsStr, touched: &mut BTreeSet<ObjectRef>) {
        let Some(file) = self.files.remove(name) else { return };
        for object in file.objects().keys() {
            self.undefine(object, name);
            touched.insert(object.clone());
        }
    }

    fn define(&mut self, object: &ObjectRef, file: &OsStr) {
        let files = self.definitions.entry(object.clone()).or_default();
        files.insert(file.to_owned());
        if files.len() > 1 {
            self.contested.insert(object.clone());
        }
    }

    fn undefine(&mut self, object: &ObjectRef, file: &OsStr) {
        let Some(files) = self.definitions.get_mut(object) else { return };
        files.remove(file);
        if files.len() < 2 {
            self.contested.remove(object);
        }
        if files.is_empty() {
            self.definitions.remove(object);
        }
    }

    /// Brings the index up to date with the files' objects.
    fn settle(&mut self, touched: BTreeSet<ObjectRef>) -> Changes {
        let mut changes = Changes::default();
        for name in touched {
            let definition = self.definitions.get(&name).and_then(BTreeSet::first);
            let file = definition.and_then(|file| self.files.get(file));
            let held = file.and_then(|file| file.objects().get(&name));
            let lowered = held.map(|held| &held.object.lowered);
            let ObjectRef { kind, namespace, name } = name;
            match (kind, lowered) {
                (ObjectKind::Service, lowered) => {
                    let service = match lowered {
                        Some(Lowered::Service(service)) => service.clone(),
                        _ => None,
                    };
                    let name = ServiceName { namespace, name };
                    if self.index.set_service(&name, service) {
                        changes.services.insert(name);
                    }
                }
                (ObjectKind::EndpointSlice, lowered) => {
                    let slice = match lowered {
                        Some(Lowered::Slice(slice)) => slice.clone(),
                        _ => None,
                    };
                    let name = SliceName { namespace, name };
                    changes.services.extend(self.index.set_slice(&name, slice));
                }
                (ObjectKind::Node, lowered) if name == self.node_name => {
                    let node = match lowered {
                        Some(Lowered::Node(node)) => node.clone(),
                        _ => Node::default(),
                    };
                    if let Some(touched) = self.index.set_node(node) {
                        changes.node = true;
                        changes.services.extend(touched);
                    }
                }
                (ObjectKind::ServiceCidr, lowered) => {
                    let cidr = match lowered {
                        Some(Lowered::ServiceCidr(cidr)) => Some(cidr.clone()),
                        _ => None,
                    };
                    changes.node |= self.index.set_service_cidr(&name, cidr);
                }
                (ObjectKind::Node | ObjectKind::File, _) => {}
            }
        }
        changes
    }

    fn path_of(&self, name: &OsStr) -> PathBuf {
        if self.single { self.path.clone() } else { self.path.join(name) }
    }

    /// A file's name as the operator knows it.
    fn shown(&self, name: &OsStr) -> String {
        self.path_of(name).display().to_string()
    }
}

fn told(shown: &str, file: &File, at: Option<&Document>, problem: &Problem) -> Diagnostic {
    let mut place = at.map(|document| format!("document {}", document.number)).unwrap_or_default();
    if let Some(object) = &problem.object {
        let _ = write!(place, " ({object})");
    }
    if let Some(line) = problem.line {
        let above = at.map_or(0, |document| document.first_line - 1);
        let comma = if place.is_empty() { "" } else { ", " };
        let _ = write!(place, "{comma}line {}", above + line);
    }
    let colon = if place.is_empty() { "" } else { ": " };
    let outcome = match (problem.severity, file.keeps_old()) {
        (Severity::Warning, _) => "",
        (Severity::Error, false) => "; not in force",
        (Severity::Error, true) => "; what the file held before stays in force",
    };
    Diagnostic {
        object: ObjectRef { kind: ObjectKind::File, namespace: "".into(), name: shown.into() },
        field: problem.field.clone(),
        severity: problem.severity,
        message: format!("{place}{colon}{}{outcome}", problem.message),
    }
}

/// The problems that are not told one by one, as one.
fn untold<'a>(
    problems: impl Iterator<Item = (Option<&'a Document>, &'a Problem)>,
) -> Option<Problem> {
    let (count, severity) = problems
        .fold((0, Severity::Warning), |(count, worst), (_, problem)| {
            (count + 1, worst.min(problem.severity))
        });
    (count > 0).then(|| Problem {
        severity,
        object: None,
        line: None,
        field: String::new(),
        message: format!("{count} more problems, not listed"),
    })
}

/// `object` stands in two places, each a file and the number of a document.
fn defined_again(object: &ObjectRef, here: (&str, usize), first: (&str, usize)) -> Diagnostic {
    let message = format!(
        "defined again in {}, document {}, which is ignored: {}, document {}, comes first",
        here.0, here.1, first.0, first.1,
    );
    let (object, field) = (object.clone(), String::new());
    Diagnostic { object, field, severity: Severity::Error, message }
}

/// The names of the manifests in a directory: `*.yaml`, `*.yml` and `*.json` that are not hidden.
fn manifests_in(path: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(path)? {
        let name = entry?.file_name();
        if is_manifest(&name) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// When the youngest of the manifests at `path` was last written; `None` if there is none, or if
/// nobody knows.
pub(super) fn last_written(path: &Path) -> Option<SystemTime> {
    let written = |path: &Path| std::fs::metadata(path).ok()?.modified().ok();
    if !path.is_dir() {
        return written(path);
    }
    let names = manifests_in(path).ok()?;
    names.iter().filter_map(|name| written(&path.join(name))).max()
}

/// Whether a file of this name is read.
pub(super) fn is_manifest(name: &OsStr) -> bool {
    let extension = Path::new(name).extension().unwrap_or_default();
    let known = ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known));
    known && !name.as_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests;
