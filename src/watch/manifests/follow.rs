//! Following a directory of manifests as it changes.

use std::error::Error as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::join_all;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio_util::sync::CancellationToken;

use super::Error;
use super::directory::{Changes, Directory, last_written};
use super::motion::{Motion, WRITING, WRITING_AT_MOST};
use crate::commit::{Change, CommitError, Committer};
use crate::model::{Diagnostic, ObjectKind, ObjectRef, Severity};
use crate::report::Reporter;
use crate::watch::{self, Index, Options};

/// How often the directory is looked at although nobody tells of a change: not every file system
/// does, and nobody watches where a symbolic link leads.
const POLL: Duration = Duration::from_secs(15);

/// How often a directory is looked at that is not there, or that cannot be watched.
const POLL_BLIND: Duration = Duration::from_secs(1);

/// Serves what the manifests at `path` say, a directory or a single file, until `shutdown`.
///
/// Nothing is committed before all manifests were read once. From then on each change of a file is
/// committed as one transaction, if the kernel takes it. What the kernel refuses is tried again
/// every 30 seconds.
///
/// # Errors
/// When the path cannot be read at first, or nothing at all can be committed. A directory that
/// becomes unreadable later is reported, and everything stays as it was until it comes back.
pub async fn run(
    path: &Path,
    options: &Options,
    committer: Committer,
    reporter: Reporter,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut follower = Follower::new(path, options);
    follower.first_look().await?;
    reporter.manifests(follower.directory().diagnostics());
    let index = follower.directory().index();
    let (node, plans) = (index.context().clone(), index.plans().map(Arc::new).collect());
    watch::adopt(node, plans, &committer, &reporter).await.map_err(Error::Commit)?;

    let mut tend = pin!(watch::tend(&committer));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = follower.due() => {}
            never = &mut tend => match never {},
        }
        let looked = follower.look().await;
        let mut diagnostics = follower.directory().diagnostics();
        match looked {
            Ok(changes) => {
                let index = follower.directory().index();
                commit(index, changes, &committer, &reporter).await.map_err(Error::Commit)?;
            }
            Err(error) => diagnostics.push(unreadable(path, &error)),
        }
        reporter.manifests(diagnostics);
    }
}

/// Commits the changes of one look together.
async fn commit(
    index: &Index,
    changes: Changes,
    committer: &Committer,
    reporter: &Reporter,
) -> Result<(), CommitError> {
    let mut waiting = Vec::new();
    if changes.node {
        reporter.node(index.context());
        waiting.push(committer.commit(Change::Node(index.context().clone())));
    }
    for service in changes.services {
        let plan = index.plan(&service);
        waiting.push(committer.commit(Change::Service(service, plan)));
    }
    let ended = |result| matches!(result, Err(CommitError::Ended));
    // What the kernel refuses has been reported, and is tried again.
    if join_all(waiting).await.into_iter().any(ended) { Err(CommitError::Ended) } else { Ok(()) }
}

fn unreadable(path: &Path, error: &Error) -> Diagnostic {
    let name = path.display().to_string().into();
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    Diagnostic {
        object: ObjectRef { kind: ObjectKind::File, namespace: "".into(), name },
        field: String::new(),
        severity: Severity::Error,
        message: format!("cannot be read{cause}; what was in force before stays so"),
    }
}

/// A directory, and what tells when to look at it.
struct Follower {
    /// `None` only while a thread looks at it.
    seen: Option<(Directory, Watch)>,
    motion: Arc<Motion>,
    /// Whether the last look could not see anything, or nobody tells of changes.
    blind: bool,
}

impl Follower {
    fn new(path: &Path, options: &Options) -> Follower {
        let only = (!path.is_dir()).then(|| path.file_name().map(ToOwned::to_owned)).flatten();
        let motion = Arc::new(Motion::new(only));
        let watch = Watch::new(path, &motion);
        Follower { seen: Some((Directory::new(path, options), watch)), motion, blind: false }
    }

    fn directory(&self) -> &Directory {
        &self.seen.as_ref().expect("nobody looks at it").0
    }

    /// Waits until it is time to look.
    async fn due(&self) {
        let poll = if self.blind { POLL_BLIND } else { POLL };
        let _ = tokio::time::timeout(poll, self.motion.due()).await;
    }

    /// Looks until no file is in motion, for a bounded time: what is being written at start must not
    /// count as absent, or its Services would lose what the kernel still holds of them.
    async fn first_look(&mut self) -> Result<(), Error> {
        let end = Instant::now() + WRITING_AT_MOST;
        let path = self.directory().path().to_owned();
        wait_for_writers(&path).await;
        self.look().await?;
        while self.motion.holds_any() && Instant::now() < end {
            let _ = tokio::time::timeout_at(end.into(), self.motion.due()).await;
            self.look().await?;
        }
        Ok(())
    }

    /// Looks at the files, on a thread that may wait for them.
    async fn look(&mut self) -> Result<Changes, Error> {
        let (mut directory, mut watch) = self.seen.take().expect("nobody looks at it");
        let motion = Arc::clone(&self.motion);
        let looked = tokio::task::spawn_blocking(move || {
            // Watched before it is read: a change in between is told.
            watch.renew();
            motion.look();
            let scanned = directory.scan(|name| motion.holds(name));
            (directory, watch, scanned)
        });
        let (directory, watch, scanned) = match looked.await {
            Ok(looked) => looked,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this task with it.
                Err(_) => std::future::pending().await,
            },
        };
        self.blind = scanned.is_err() || watch.watched.is_none();
        self.seen = Some((directory, watch));
        scanned
    }
}

/// Waits until nobody has written a manifest at `path` for a moment, for a bounded time. Whoever
/// opened a file before anybody watched has truncated it, and may be about to write it.
pub async fn wait_for_writers(path: &Path) {
    let end = Instant::now() + WRITING_AT_MOST;
    while Instant::now() < end {
        let written = last_written(path);
        let Some(pause) = pause_until_rested(SystemTime::now(), written) else { return };
        tokio::time::sleep(pause).await;
    }
}

/// How long to wait for whoever wrote a file at `written`; `None` if that is long enough ago, or in
/// the future, where only a clock can have put it.
fn pause_until_rested(now: SystemTime, written: Option<SystemTime>) -> Option<Duration> {
    let age = now.duration_since(written?).ok()?;
    WRITING.checked_sub(age).filter(|pause| !pause.is_zero())
}

/// Has inotify tell of changes in a directory, as long as the path leads to it.
struct Watch {
    path: PathBuf,
    watcher: Option<RecommendedWatcher>,
    /// What is watched, and by which path.
    watched: Option<(Inode, PathBuf)>,
    warned: bool,
}

/// Device and number.
type Inode = (u64, u64);

impl Watch {
    /// Watches nothing yet.
    fn new(path: &Path, motion: &Arc<Motion>) -> Watch {
        let motion = Arc::clone(motion);
        let watcher = notify::recommended_watcher(move |event| motion.take(event));
        let mut watch =
            Watch { path: path.to_owned(), watcher: None, watched: None, warned: false };
        match watcher {
            Ok(watcher) => watch.watcher = Some(watcher),
            Err(error) => watch.warn(&error),
        }
        watch
    }

    /// Watches what the path leads to now.
    fn renew(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let directory = if self.path.is_dir() { Some(&*self.path) } else { self.path.parent() };
        let directory = directory.filter(|path| !path.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let inode = std::fs::metadata(directory).ok().map(|found| (found.dev(), found.ino()));
        if inode.is_some() && inode == self.watched.as_ref().map(|(inode, _)| *inode) {
            return;
        }
        if let Some((_, old)) = self.watched.take() {
            // It fails where the kernel has ended the watch, because the directory is gone.
            let _ = watcher.unwatch(&old);
        }
        let Some(inode) = inode else { return };
        match watcher.watch(directory, RecursiveMode::NonRecursive) {
            Ok(()) => self.watched = Some((inode, directory.to_owned())),
            Err(error) => self.warn(&error),
        }
    }

    fn warn(&mut self, error: &notify::Error) {
        if !self.warned {
            let seconds = POLL_BLIND.as_secs();
            tracing::warn!(%error, seconds, "no word of changed manifests: looking now and then");
            self.warned = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    use crate::watch::testing::{Kernel, PATIENCE, until};

    fn options() -> Options {
        Options::new("worker".into())
    }

    fn services(names: &[&str]) -> String {
        let service = |name: &&str| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: \
                 10.96.0.{}\n  ports:\n  - port: 80\n",
                name.len(),
            )
        };
        names.iter().map(service).collect::<Vec<_>>().join("---\n")
    }

    fn names(index: &Index) -> Vec<String> {
        index.services().map(|service| service.name.name.to_string()).collect()
    }

    /// Follows until the Services are these.
    async fn follow(follower: &mut Follower, expected: &[&str], what: &str) {
        let seen = async {
            while names(follower.directory().index()) != expected {
                follower.due().await;
                // A directory that is away for the moment changes nothing.
                let _ = follower.look().await;
            }
        };
        let seen = tokio::time::timeout(PATIENCE, seen).await;
        let last = names(follower.directory().index());
        assert!(seen.is_ok(), "{what}: {last:?} instead of {expected:?}");
    }

    #[test]
    fn who_writes_is_waited_for() {
        let now = SystemTime::now();
        let ago = |ms| Some(now - Duration::from_millis(ms));
        for (written, expected) in [
            (None, None),
            (ago(0), Some(1000)),
            (ago(300), Some(700)),
            (ago(1000), None),
            (ago(86_400_000), None),
            (Some(now + Duration::from_secs(60)), None),
        ] {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(pause_until_rested(now, written), expected, "{written:?}");
        }
    }

    #[test]
    fn the_youngest_manifest_tells_when_somebody_wrote() {
        let dir = TempDir::new().unwrap();
        assert_eq!(last_written(dir.path()), None);
        assert_eq!(last_written(&dir.path().join("absent")), None);
        let time = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for (name, seconds) in [("a.yaml", 5), ("b.yml", 9), ("c.json", 7), ("d.txt", 11)] {
            let file = fs::File::create(dir.path().join(name)).unwrap();
            file.set_modified(time(seconds)).unwrap();
        }
        assert_eq!(last_written(dir.path()), Some(time(9)));
        assert_eq!(last_written(&dir.path().join("d.txt")), Some(time(11)));
    }

    /// A daemon that starts while an editor writes sees what is written in the end.
    #[tokio::test]
    async fn a_file_that_is_being_written_at_start_is_not_absent() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("a.yaml");
        fs::write(&file, "").unwrap();
        let mut follower = Follower::new(dir.path(), &options());
        let (looked, ()) = tokio::join!(follower.first_look(), async {
            tokio::time::sleep(WRITING / 4).await;
            fs::write(&file, services(&["a"])).unwrap();
        });
        looked.expect("it is there");
        assert_eq!(names(follower.directory().index()), ["a"]);
    }

    #[tokio::test]
    async fn follows_a_directory() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("manifests");
        fs::create_dir(&path).unwrap();
        let mut follower = Follower::new(&path, &options());
        follower.look().await.expect("it is there");
        assert!(!follower.blind);

        fs::write(path.join("a.yaml"), services(&["a"])).unwrap();
        follow(&mut follower, &["a"], "a file comes").await;
        fs::write(path.join("a.yaml"), services(&["a", "bb"])).unwrap();
        follow(&mut follower, &["a", "bb"], "a file changes").await;
        fs::write(path.join(".new"), services(&["bb"])).unwrap();
        fs::rename(path.join(".new"), path.join("a.yaml")).unwrap();
        follow(&mut follower, &["bb"], "a file is replaced").await;
        fs::remove_file(path.join("a.yaml")).unwrap();
        follow(&mut follower, &[], "a file goes").await;

        for (version, content) in [("..1", services(&["x"])), ("..2", services(&["yy"]))] {
            fs::create_dir(path.join(version)).unwrap();
            fs::write(path.join(version).join("web.yaml"), content).unwrap();
        }
        symlink("..1", path.join("..data")).unwrap();
        symlink("..data/web.yaml", path.join("web.yaml")).unwrap();
        follow(&mut follower, &["x"], "a volume is mounted").await;
        symlink("..2", path.join("..data_tmp")).unwrap();
        fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
        follow(&mut follower, &["yy"], "a volume changes").await;

        // The path leads to another directory from now on.
        fs::rename(&path, dir.path().join("old")).unwrap();
        follower.look().await.expect_err("it is away");
        assert!(follower.blind);
        assert_eq!(names(follower.directory().index()), ["yy"]);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("b.yaml"), services(&["b"])).unwrap();
        follow(&mut follower, &["b"], "another directory").await;
        assert!(!follower.blind);
        fs::write(path.join("b.yaml"), services(&["b", "cc"])).unwrap();
        follow(&mut follower, &["b", "cc"], "it is watched").await;
    }

    #[tokio::test]
    async fn follows_a_single_file() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("all.txt");
        fs::write(&path, services(&["a"])).unwrap();
        let mut follower = Follower::new(&path, &options());
        follower.look().await.expect("it is there");
        fs::write(dir.path().join("other.yaml"), services(&["other"])).unwrap();
        fs::write(&path, services(&["a", "bb"])).unwrap();
        follow(&mut follower, &["a", "bb"], "the file changes").await;
    }

    #[tokio::test]
    async fn serves_what_the_manifests_say() {
        let reporter = Reporter::new("worker".into());
        let Some((mut kernel, worker)) = Kernel::new(&reporter) else { return };
        let (committer, thread) = Committer::start(worker);
        let dir = TempDir::new().unwrap();
        let path = dir.path().to_owned();
        fs::write(path.join("a.yaml"), services(&["a"])).unwrap();
        fs::write(path.join("b.yaml"), "kind: Service").unwrap();
        let shutdown = CancellationToken::new();
        let running = {
            let (path, reporter, shutdown) = (path.clone(), reporter.clone(), shutdown.clone());
            tokio::spawn(async move { run(&path, &options(), committer, reporter, shutdown).await })
        };
        let mut services_are = async |what: &str, expected: &[&str]| {
            let expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
            until(what, expected, || kernel.services()).await;
        };
        let said = |text: &str| reporter.diagnostics().iter().any(|d| d.to_string().contains(text));
        services_are("adoption", &["default/a 10.96.0.1:"]).await;
        until("adoption is told", true, || reporter.adoption().is_some()).await;
        assert!(said("b.yaml: apiVersion") && said("no InternalIP"));

        fs::write(path.join("b.yaml"), services(&["a", "bb"])).unwrap();
        services_are("a file is mended", &["default/a 10.96.0.1:", "default/bb 10.96.0.2:"]).await;
        until("said", true, || !said("b.yaml: apiVersion") && said("defined again")).await;
        // The Service's finding comes back from the committer.
        let more = services(&["a"]).replace("clusterIP", "externalIPs: [nonsense]\n  clusterIP");
        fs::write(path.join("a.yaml"), more).unwrap();
        until("a finding", true, || said("spec.externalIPs")).await;
        fs::remove_file(path.join("a.yaml")).unwrap();
        until("resolved", true, || !said("spec.externalIPs") && !said("defined again")).await;
        fs::remove_file(path.join("b.yaml")).unwrap();
        services_are("all files are gone", &[]).await;

        shutdown.cancel();
        running.await.expect("no panic").expect("no error");
        thread.join().expect("no panic");
    }

    #[tokio::test]
    async fn a_path_that_is_not_there_is_an_error() {
        let reporter = Reporter::new("worker".into());
        let Some((_kernel, worker)) = Kernel::new(&reporter) else { return };
        let (committer, _thread) = Committer::start(worker);
        let path = Path::new("/nowhere/manifests");
        let (options, shutdown) = (options(), CancellationToken::new());
        let ran = run(path, &options, committer, reporter.clone(), shutdown).await;
        let error = ran.expect_err("it is not there");
        assert_eq!(error.to_string(), "manifests at /nowhere/manifests cannot be read");
        assert_eq!(reporter.adoption(), None);
    }
}
