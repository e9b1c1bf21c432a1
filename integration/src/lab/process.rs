//! Commands and long-living processes in a namespace.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a command may take: far more than any needs, so that only a hung one gets there.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How often a process is looked at while something is waited for.
const TICK: Duration = Duration::from_millis(10);
/// Lines of output that are shown when a process is not as expected.
const TAIL: usize = 40;
/// Becomes the command `$2...` if the parent is the process `$1`.
const UNLESS_ORPHANED: &str = r#"[ "$PPID" = "$1" ] && shift && exec "$@""#;

/// A process that runs in a namespace until it is told to end. Dropping it kills it by its pid
/// and waits for it; while panicking the end of its output is printed first. The kernel kills it
/// when the test process ends in another way.
///
/// Its output goes to files: [`Process::stdout`] and [`Process::stderr`] read them at any time.
/// A program that does not exist is such output, too (and exit status 127).
pub struct Process {
    name: String,
    child: Child,
    stdout: Written,
    stderr: Written,
}

/// The file that an output stream goes to. Processes of one name share it, one after the other.
struct Written {
    path: PathBuf,
    /// Where the output of this process begins.
    start: u64,
}

impl Written {
    /// The end of the file at `path`, and what writes there.
    fn open(path: PathBuf) -> Result<(Written, File)> {
        let file = File::options().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        let start = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
        Ok((Written { path, start }, file))
    }

    /// What is there so far; the process may be writing.
    fn read(&self) -> String {
        let mut bytes = Vec::new();
        let _ = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.start))?;
            file.read_to_end(&mut bytes)
        });
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Process {
    /// Starts `command` in the namespace that `namespace` is, with its output in `directory`.
    ///
    /// The child is killed by the kernel when the thread that started it ends
    /// (`PR_SET_PDEATHSIG`, by way of `setpriv`: the standard library has no safe hook for it).
    /// So one thread, which lives as long as the process, starts them all. The shell that
    /// `setpriv` starts first ends itself if we are gone already: then there was nobody left
    /// whose end could have been told.
    pub(super) fn start(
        namespace: &Arc<File>,
        command: &Command,
        name: &str,
        directory: &Path,
    ) -> Result<Self> {
        let (stdout, to_stdout) = Written::open(directory.join(format!("{name}.stdout")))?;
        let (stderr, to_stderr) = Written::open(directory.join(format!("{name}.stderr")))?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--", "sh", "-c", UNLESS_ORPHANED, "sh"]);
        wrapped.arg(std::process::id().to_string()).arg(command.get_program());
        wrapped.args(command.get_args()).stdin(Stdio::null());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            wrapped.current_dir(directory);
        }
        wrapped.stdout(to_stdout).stderr(to_stderr);
        let child = start_in(namespace, wrapped).with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// What it wrote to its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.read()
    }

    /// What it wrote to its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.read()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ended by itself. Fails when it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end within {limit:?}\n{}", self.name, self.tail());
            }
            thread::sleep(TICK);
        }
    }

    /// Waits until its output (either stream) contains `text`. Fails when it ends before, or
    /// after `limit`.
    pub fn wait_for_output(&mut self, text: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let running = self.is_running();
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return Ok(());
            }
            if !running {
                bail!("{} ended before it wrote {text:?}\n{}", self.name, self.tail());
            }
            if Instant::now() > deadline {
                bail!("{} did not write {text:?} within {limit:?}\n{}", self.name, self.tail());
            }
            thread::sleep(TICK);
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Asks it to end with SIGTERM and waits for it. Fails when it still runs after `limit`.
    pub fn terminate(mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(limit)
    }

    /// Kills it, as a crash would, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// The last lines of its output, for messages.
    pub fn tail(&self) -> String {
        let last = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(TAIL)..].join("\n")
        };
        format!(
            "--- stdout of {name}\n{}\n--- stderr of {name}\n{}",
            last(&self.stdout()),
            last(&self.stderr()),
            name = self.name
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.tail());
        }
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("name", &self.name)
            .field("pid", &self.child.id())
            .finish_non_exhaustive()
    }
}

/// Runs `command` to its end with `input` as its standard input, in the namespace of the
/// calling thread. Fails when it cannot be started or takes more than two minutes; its exit
/// status is the caller's to judge.
pub(super) fn output(mut command: Command, input: &[u8]) -> Result<Output> {
    let shown = show(&command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run `{shown}`"))?;
    let pid = pid_of(&child);
    let mut stdin = child.stdin.take();
    let input = input.to_vec();
    // A program that ends without reading its input breaks the pipe; its status tells why.
    thread::spawn(move || stdin.take().map(|mut pipe| pipe.write_all(&input)));
    let (sender, receiver) = mpsc::channel();
    // Not a scoped thread: a grandchild could hold the pipes after we gave up.
    thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(COMMAND_LIMIT) else {
        let _ = kill(pid, Signal::SIGKILL);
        bail!("`{shown}` did not end within {COMMAND_LIMIT:?}");
    };
    output.with_context(|| format!("wait for `{shown}`"))
}

/// The standard output of a command that had to succeed.
pub(super) fn expect_success(shown: &str, output: Output) -> Result<String> {
    let Output { status, stdout, stderr } = output;
    if !status.success() {
        let how = status.signal().map_or_else(|| status.to_string(), |s| format!("signal {s}"));
        bail!("`{shown}` failed ({how}): {}", String::from_utf8_lossy(&stderr).trim());
    }
    String::from_utf8(stdout).with_context(|| format!("output of `{shown}` is not UTF-8"))
}

/// A command as one would type it.
pub(super) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a pid is a positive i32"))
}

/// What the starting thread is asked for.
struct Request {
    namespace: Arc<File>,
    command: Command,
    answer: SyncSender<Result<Child>>,
}

/// Starts `command` from the thread that lives as long as the process.
fn start_in(namespace: &Arc<File>, command: Command) -> Result<Child> {
    static STARTER: OnceLock<Sender<Request>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || start_all(&receiver));
        sender
    });
    let (answer, answered) = mpsc::sync_channel(1);
    let request = Request { namespace: Arc::clone(namespace), command, answer };
    starter.send(request).map_err(|_| anyhow!("the starting thread is gone"))?;
    answered.recv().context("the starting thread is gone")?
}

fn start_all(requests: &Receiver<Request>) {
    let home = File::open("/proc/thread-self/ns/net").expect("open the own namespace");
    for Request { namespace, mut command, answer } in requests {
        let child = setns(&*namespace, CloneFlags::CLONE_NEWNET)
            .context("enter the namespace")
            .and_then(|()| Ok(command.spawn()?));
        // A thread that stayed there would keep the namespace alive.
        setns(&home, CloneFlags::CLONE_NEWNET).expect("leave the namespace");
        let _ = answer.send(child);
    }
}
