//! What inotify tells of a directory: when to look at it, and at which files not yet.
//!
//! Who writes a file truncates it first, and an editor that replaces one may remove it first. What
//! stands there in between looks like a file whose objects are all gone. So a file that somebody
//! is writing or has just removed is in motion, and is looked at when it is closed or renamed, or
//! when nothing has come for a while.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::EventKind;
use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RenameMode};
use tokio::sync::Notify;

/// How long a writer may pause before its file is read as it is.
pub(super) const WRITING: Duration = Duration::from_secs(1);

/// How long a writer may keep a file from being read at all.
pub(super) const WRITING_AT_MOST: Duration = Duration::from_secs(10);

/// How long a file that is gone may take to come back.
const REMOVED: Duration = Duration::from_millis(250);

/// What has been told since the last look. Shared with the thread that reads inotify.
#[derive(Debug)]
pub(super) struct Motion {
    told: Mutex<Told>,
    changed: Notify,
}

/// The state of a [`Motion`], apart from locks and clocks.
#[derive(Debug, Default)]
struct Told {
    /// Whether there is something to look at now.
    due: bool,
    /// Files in motion.
    moving: HashMap<OsString, Moving>,
    /// The only file that matters; otherwise all manifests do.
    only: Option<OsString>,
}

#[derive(Clone, Copy, Debug)]
struct Moving {
    since: Instant,
    until: Instant,
}

const RENAMED_AWAY: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::From));

impl Motion {
    /// Nothing is told yet. `only` is the name of the only file that matters, if it is so.
    pub(super) fn new(only: Option<OsString>) -> Motion {
        let told = Told { only, ..Told::default() };
        Motion { told: Mutex::new(told), changed: Notify::new() }
    }

    /// Takes what inotify tells.
    pub(super) fn take(&self, event: notify::Result<notify::Event>) {
        let mut told = self.told();
        match event {
            Ok(event) => {
                let now = Instant::now();
                match event.paths.last() {
                    Some(path) => told.take(now, event.kind, path),
                    // The queue of events ran over.
                    None => told.due = true,
                }
            }
            Err(error) => {
                tracing::debug!(%error, "inotify failed to tell of a change");
                told.due = true;
            }
        }
        drop(told);
        self.changed.notify_one();
    }

    /// Waits until there is something to look at. Only one may wait at a time.
    pub(super) async fn due(&self) {
        loop {
            let now = Instant::now();
            let next = self.told().next(now);
            match next {
                Some(at) if at <= now => return,
                Some(at) => {
                    let changed = self.changed.notified();
                    let _ = tokio::time::timeout_at(at.into(), changed).await;
                }
                None => self.changed.notified().await,
            }
        }
    }

    /// Tells that a look begins, which will see everything that was told before.
    pub(super) fn look(&self) {
        self.told().look(Instant::now());
    }

    /// Whether the file of this name is not to be looked at.
    pub(super) fn holds(&self, name: &OsStr) -> bool {
        self.told().moving.contains_key(name)
    }

    /// Whether any file is not to be looked at.
    pub(super) fn holds_any(&self) -> bool {
        !self.told().moving.is_empty()
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Whoever panicked, the state is whole.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    fn take(&mut self, now: Instant, kind: EventKind, path: &Path) {
        let Some(name) = path.file_name() else { return self.due = true };
        let matters = match &self.only {
            Some(only) => only == name,
            None => super::directory::is_manifest(name),
        };
        match kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) if matters => self.rest(name),
            EventKind::Create(CreateKind::File) if matters && is_being_written(path) => {
                self.moves(now, name, WRITING);
            }
            EventKind::Modify(ModifyKind::Data(_)) if matters => self.moves(now, name, WRITING),
            // Reading a file tells so too.
            EventKind::Access(_) | EventKind::Modify(ModifyKind::Data(_)) => {}
            EventKind::Remove(_) | RENAMED_AWAY if matters => self.moves(now, name, REMOVED),
            EventKind::Modify(ModifyKind::Metadata(_)) => self.due |= matters,
            // An editor's temporary file.
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Name(_))
                if !matters && (is_file(path) || kind == RENAMED_AWAY) => {}
            // Renamed to this, or a link; or something else that a link may lead through.
            _ => self.rest(name),
        }
    }

    fn rest(&mut self, name: &OsStr) {
        self.moving.remove(name);
        self.due = true;
    }

    fn moves(&mut self, now: Instant, name: &OsStr, pause: Duration) {
        let since = self.moving.get(name).map_or(now, |moving| moving.since);
        let until = (now + pause).min(since + WRITING_AT_MOST);
        self.moving.insert(name.to_owned(), Moving { since, until });
    }

    /// When to look next.
    fn next(&self, now: Instant) -> Option<Instant> {
        let rested = self.moving.values().map(|moving| moving.until).min();
        if self.due { Some(now) } else { rested }
    }

    fn look(&mut self, now: Instant) {
        self.due = false;
        self.moving.retain(|_, moving| moving.until > now);
    }
}

/// Whether this is a regular file, which no link can lead through.
fn is_file(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}

/// Whether a file that has just come will be told of again when it is closed. A symbolic link is
/// complete, and so is another name for a file.
fn is_being_written(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.nlink() == 1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use notify::event::{DataChange, MetadataKind, RemoveKind};
    use notify::{RecursiveMode, Watcher};

    use super::*;

    const CREATE: EventKind = EventKind::Create(CreateKind::File);
    const WRITE: EventKind = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    const CLOSE: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
    const OPEN: EventKind = EventKind::Access(AccessKind::Open(AccessMode::Any));
    const REMOVE: EventKind = EventKind::Remove(RemoveKind::File);
    const TO: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));
    const TOUCH: EventKind = EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any));

    /// When to look, in milliseconds, after events at their times.
    fn next(events: &[(u64, EventKind, &str)]) -> Option<u128> {
        let (mut told, start) = (Told::default(), Instant::now());
        let mut now = start;
        for (at, kind, name) in events {
            now = start + Duration::from_millis(*at);
            told.take(now, *kind, &Path::new("/nowhere").join(name));
        }
        told.next(now).map(|at| at.duration_since(start).as_millis())
    }

    #[test]
    fn when_to_look() {
        type Case<'a> = (&'a [(u64, EventKind, &'a str)], Option<u128>);
        let table: &[Case] = &[
            (&[], None),
            (&[(5, OPEN, "a.yaml")], None),
            (&[(5, WRITE, "a.yaml")], Some(1005)),
            (&[(5, WRITE, "a.yaml"), (700, WRITE, "a.yaml")], Some(1700)),
            (&[(5, WRITE, "a.yaml"), (6, CLOSE, "a.yaml")], Some(6)),
            (&[(5, WRITE, "a.yaml"), (6, WRITE, "b.yaml"), (7, CLOSE, "a.yaml")], Some(7)),
            (&[(5, REMOVE, "a.yaml")], Some(255)),
            (&[(5, RENAMED_AWAY, "a.yaml")], Some(255)),
            (&[(5, RENAMED_AWAY, "a.yaml"), (9, TO, "a.yaml")], Some(9)),
            (&[(5, REMOVE, "a.yaml"), (9, WRITE, "a.yaml")], Some(1009)),
            (&[(5, TOUCH, "a.yaml")], Some(5)),
            // Files that nobody reads; but links may lead through them.
            (&[(5, WRITE, "a.txt"), (6, CLOSE, "a.txt"), (7, TOUCH, ".a.yaml")], None),
            (&[(5, RENAMED_AWAY, "..data_tmp")], None),
            (&[(5, TO, "..data")], Some(5)),
            (&[(5, REMOVE, "..2026")], Some(5)),
        ];
        for (events, expected) in table {
            assert_eq!(next(events), *expected, "{events:?}");
        }
    }

    #[test]
    fn nobody_writes_for_ever() {
        let (mut told, start) = (Told::default(), Instant::now());
        let name = Path::new("a.yaml");
        for tenth in 0..200 {
            let now = start + Duration::from_millis(100 * tenth);
            told.take(now, WRITE, name);
            if now >= told.next(now).unwrap() {
                assert_eq!(now - start, WRITING_AT_MOST);
                told.look(now);
                assert!(told.moving.is_empty());
                return;
            }
            told.look(now);
            assert!(told.moving.contains_key(name.as_os_str()));
        }
        panic!("never looked at");
    }

    #[test]
    fn a_single_file_is_all_that_matters() {
        let mut told = Told { only: Some("all.txt".into()), ..Told::default() };
        told.take(Instant::now(), CLOSE, Path::new("a.yaml"));
        assert!(!told.due);
        told.take(Instant::now(), CLOSE, Path::new("all.txt"));
        assert!(told.due);
    }

    /// What the kernel really tells of the ways to change a file.
    #[tokio::test]
    async fn inotify_tells() {
        type Act = fn(&Path) -> std::io::Result<()>;
        let table: &[(&str, Act)] = &[
            ("write", |dir| fs::write(dir.join("a.yaml"), "new")),
            ("rename over", |dir| {
                fs::write(dir.join(".tmp"), "new")?;
                fs::rename(dir.join(".tmp"), dir.join("a.yaml"))
            }),
            ("remove", |dir| fs::remove_file(dir.join("a.yaml"))),
            ("link", |dir| std::os::unix::fs::symlink("a.yaml", dir.join("b.yaml"))),
            ("hard link", |dir| fs::hard_link(dir.join("a.yaml"), dir.join("b.yaml"))),
            ("touch", |dir| {
                let file = fs::File::options().append(true).open(dir.join("a.yaml"))?;
                file.set_modified(std::time::UNIX_EPOCH)
            }),
            ("swap of ..data", |dir| {
                std::os::unix::fs::symlink("x", dir.join("..tmp"))?;
                fs::rename(dir.join("..tmp"), dir.join("..data"))
            }),
        ];
        for (what, act) in table {
            let dir = tempfile::TempDir::new().unwrap();
            fs::write(dir.path().join("a.yaml"), "old").unwrap();
            let motion = Arc::new(Motion::new(None));
            let heard = Arc::clone(&motion);
            let mut watcher = notify::recommended_watcher(move |event| heard.take(event)).unwrap();
            watcher.watch(dir.path(), RecursiveMode::NonRecursive).unwrap();
            act(dir.path()).expect(what);
            let told = tokio::time::timeout(Duration::from_secs(20), motion.due()).await;
            assert!(told.is_ok(), "nothing was told of: {what}");
            // Looking does not tell anything new.
            motion.look();
            for entry in fs::read_dir(dir.path()).unwrap() {
                let _ = fs::read(entry.unwrap().path());
            }
        }
    }

    #[test]
    fn a_file_that_was_created_is_being_written() {
        let dir = tempfile::TempDir::new().unwrap();
        let (file, link, other) =
            (dir.path().join("a.yaml"), dir.path().join("b.yaml"), dir.path().join("c.yaml"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("a.yaml", &link).unwrap();
        let mut told = Told::default();
        told.take(Instant::now(), CREATE, &file);
        assert!(!told.due && told.moving.contains_key(OsStr::new("a.yaml")));
        told.take(Instant::now(), CREATE, &link);
        assert!(told.due && !told.moving.contains_key(OsStr::new("b.yaml")));
        let mut told = Told::default();
        fs::hard_link(&file, &other).unwrap();
        told.take(Instant::now(), CREATE, &other);
        assert!(told.due);
        // A temporary file is not looked at, and a link that manifests may lead through is.
        let (temporary, link) = (dir.path().join("sedXYZ"), dir.path().join("current"));
        fs::write(&temporary, "").unwrap();
        std::os::unix::fs::symlink("v1", &link).unwrap();
        let mut told = Told::default();
        told.take(Instant::now(), CREATE, &temporary);
        told.take(Instant::now(), TO, &temporary);
        assert!(!told.due);
        told.take(Instant::now(), CREATE, &link);
        assert!(told.due);
    }
}
