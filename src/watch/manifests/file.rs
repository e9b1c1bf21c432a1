//! A manifest file: its content, and what of it is in force.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File as OpenFile, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use xxhash_rust::xxh64::xxh64;

use super::document::{Object, Parsed, Problem, parse};
use super::split::{MOST_DOCUMENTS, Syntax, split};
use crate::model::{ObjectRef, Severity};

/// A manifest file as it was last read.
#[derive(Debug, Default)]
pub(super) struct File {
    /// When it was read. `None` where it must be read again.
    signature: Option<Signature>,
    /// The documents of the last content that could be read.
    documents: Vec<Document>,
    /// Why the present content could not be read, if so.
    unreadable: Option<Problem>,
    /// What of the file is in force: the objects in it and, while it is not understood as a whole,
    /// those that were in force before.
    objects: BTreeMap<ObjectRef, Held>,
    repeated: Vec<(ObjectRef, usize)>,
    /// Whether some of the objects are of an earlier version of the file.
    keeps_old: bool,
}

/// One document, as it was parsed.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// Tells whether the text has changed.
    text: Digest,
    /// Which document of the file, counted from 1.
    pub(super) number: usize,
    /// The line of the file on which it begins, counted from 1.
    pub(super) first_line: usize,
    pub(super) parsed: Arc<Parsed>,
}

/// An object that is in force.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) object: Arc<Object>,
    /// The document that it was read from, as of that time.
    pub(super) document: usize,
}

/// What tells one state of a file from another, without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Digest {
    hash: u64,
    length: usize,
}

/// How much older than its reading a file's last change must be to be sure that a later change
/// gets another time: more than the granularity of any file system's time stamps (FAT: 2 s).
const SETTLED: Duration = Duration::from_secs(3);

/// What became of a file.
#[derive(Debug)]
pub(super) enum Refreshed {
    /// What is in force of it stays, though there may be more or less to say about it.
    Same,
    /// It was read. This was in force before.
    Read(BTreeMap<ObjectRef, Held>),
    /// There is no such file, or it is a directory.
    Gone,
}

impl File {
    /// Brings the file up to date with what stands at `path`, unless `in_motion` says that
    /// somebody began to write it while it was read: what was read may be half of it.
    pub(super) fn refresh(
        &mut self,
        path: &Path,
        largest: u64,
        in_motion: impl Fn() -> bool,
    ) -> Refreshed {
        let now = SystemTime::now();
        let content = read(path, largest, self.signature);
        if in_motion() {
            return Refreshed::Same;
        }
        match content {
            Content::Same => Refreshed::Same,
            Content::Gone => Refreshed::Gone,
            Content::Unreadable(message, signature) => {
                self.signature = signature;
                self.fail(None, message)
            }
            Content::Bytes(bytes, signature) => {
                self.signature = signature.settled_at(now).then_some(signature);
                match String::from_utf8(bytes) {
                    Ok(text) => self.parse(&text, syntax(path)),
                    Err(error) => {
                        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                        let line = valid.split(|byte| *byte == b'\n').count();
                        self.fail(Some(line), "not UTF-8 text".to_owned())
                    }
                }
            }
        }
    }

    /// What of the file is in force.
    pub(super) fn objects(&self) -> &BTreeMap<ObjectRef, Held> {
        &self.objects
    }

    /// What is wrong with the present content: with the number and the first line of the document,
    /// where it is one document's fault.
    pub(super) fn problems(&self) -> impl Iterator<Item = (Option<&Document>, &Problem)> {
        let documents = if self.unreadable.is_some() { &[][..] } else { &self.documents };
        let unreadable = self.unreadable.iter().map(|problem| (None, problem));
        let in_documents = documents.iter().flat_map(|document| {
            document.parsed.problems.iter().map(move |problem| (Some(document), problem))
        });
        unreadable.chain(in_documents)
    }

    /// Whether something is in force that the file does not hold now, as far as it can be read.
    pub(super) fn keeps_old(&self) -> bool {
        self.keeps_old
    }

    /// Objects that the file defines more than once, and the document of each definition but the
    /// first, which is in force.
    pub(super) fn repeated(&self) -> &[(ObjectRef, usize)] {
        &self.repeated
    }

    fn parse(&mut self, text: &str, syntax: Syntax) -> Refreshed {
        let known: HashMap<Digest, &Arc<Parsed>> =
            self.documents.iter().map(|document| (document.text, &document.parsed)).collect();
        let chunks = split(text, syntax);
        if chunks.len() > MOST_DOCUMENTS {
            let message = format!("more than {MOST_DOCUMENTS} documents, and not read; split it");
            return self.fail(None, message);
        }
        let documents: Vec<Document> = chunks
            .into_iter()
            .map(|chunk| {
                let digest = Digest::of(chunk.text);
                let parsed = known.get(&digest).map(|parsed| Arc::clone(parsed));
                Document {
                    text: digest,
                    number: chunk.number,
                    first_line: chunk.first_line,
                    parsed: parsed.unwrap_or_else(|| Arc::new(parse(chunk.text, syntax))),
                }
            })
            .collect();
        let (mut objects, mut repeated) = (BTreeMap::new(), Vec::new());
        for document in &documents {
            for object in &document.parsed.objects {
                let held = Held { object: Arc::clone(object), document: document.number };
                match objects.entry(object.name.clone()) {
                    Entry::Vacant(entry) => drop(entry.insert(held)),
                    Entry::Occupied(_) => repeated.push((object.name.clone(), document.number)),
                }
            }
        }
        let here = objects.len();
        if documents.iter().any(|document| document.parsed.failed()) {
            for (name, held) in &self.objects {
                objects.entry(name.clone()).or_insert_with(|| held.clone());
            }
        }
        self.keeps_old = objects.len() > here;
        self.documents = documents;
        self.unreadable = None;
        self.repeated = repeated;
        Refreshed::Read(std::mem::replace(&mut self.objects, objects))
    }

    /// The content cannot be read: what is in force stays so.
    fn fail(&mut self, line: Option<usize>, message: String) -> Refreshed {
        self.keeps_old = !self.objects.is_empty();
        self.repeated = Vec::new();
        self.unreadable = Some(Problem {
            severity: Severity::Error,
            object: None,
            line,
            field: String::new(),
            message,
        });
        Refreshed::Same
    }
}

impl Signature {
    fn of(metadata: &Metadata) -> Signature {
        Signature {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file has been at rest for so long that a later change shows.
    fn settled_at(&self, now: SystemTime) -> bool {
        let age = |(seconds, nanoseconds): (i64, i64)| {
            let since_epoch =
                Duration::new(u64::try_from(seconds).ok()?, u32::try_from(nanoseconds).ok()?);
            now.duration_since(SystemTime::UNIX_EPOCH.checked_add(since_epoch)?).ok()
        };
        let settled = |time| age(time).is_some_and(|age| age > SETTLED);
        settled(self.modified) && settled(self.changed)
    }
}

impl Digest {
    fn of(text: &str) -> Digest {
        Digest { hash: xxh64(text.as_bytes(), 0), length: text.len() }
    }
}

enum Content {
    Same,
    Gone,
    /// With the signature of the file, where reading it again would give the same.
    Unreadable(String, Option<Signature>),
    Bytes(Vec<u8>, Signature),
}

/// Reads at most `largest` bytes of what stands at `path`, unless it is known by its signature.
fn read(path: &Path, largest: u64, known: Option<Signature>) -> Content {
    match try_read(path, largest, known) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Content::Gone,
        // A symbolic link to itself, or through something that is no directory.
        Err(error) => Content::Unreadable(format!("cannot be read: {error}"), None),
    }
}

/// What stands where a file should be: directories may have any name, anything else is a mistake.
fn no_file(metadata: &Metadata) -> Content {
    if metadata.is_dir() {
        return Content::Gone;
    }
    Content::Unreadable("a pipe, socket or device, and not read".to_owned(), None)
}

fn try_read(path: &Path, largest: u64, known: Option<Signature>) -> io::Result<Content> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(no_file(&metadata));
    }
    if known == Some(Signature::of(&metadata)) {
        return Ok(Content::Same);
    }
    // It may have become a pipe meanwhile, and opening one waits for a writer.
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(no_file(&metadata));
    }
    let signature = Signature::of(&metadata);
    if metadata.len() > largest {
        return Ok(too_large(largest, Some(signature)));
    }
    read_bounded(&file, largest, signature)
}

fn read_bounded(file: &OpenFile, largest: u64, signature: Signature) -> io::Result<Content> {
    let mut bytes = Vec::new();
    file.take(largest.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= largest) {
        Ok(Content::Bytes(bytes, signature))
    } else {
        Ok(too_large(largest, None))
    }
}

fn too_large(largest: u64, signature: Option<Signature>) -> Content {
    let message = format!("larger than {largest} bytes, and not read; split it");
    Content::Unreadable(message, signature)
}

fn syntax(path: &Path) -> Syntax {
    let json = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    if json { Syntax::Json } else { Syntax::Yaml }
}
