//! One network namespace.

use std::fmt;
use std::fs::{self, File};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use super::eventually;
use super::process::{self, Process};

/// A network namespace, alive as long as this value or a process or socket in it.
///
/// It has no name in the file system: an open file holds it, so that the kernel removes it when
/// the test process ends, in whatever way. Its `Display` is a command that enters it from
/// another terminal, as long as the test runs.
#[derive(Clone)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    /// Makes a namespace with the loopback interface up, IPv6 without duplicate address
    /// detection, no reverse path filter and no limit on ICMP errors (a test counts refusals).
    pub fn new(name: &str) -> Result<Self> {
        let made = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
            for (key, value) in DEFAULTS {
                write_sysctl(key, value)?;
            }
            File::open("/proc/thread-self/ns/net").context("open the namespace")
        });
        let file = made.join().unwrap_or_else(|panic| resume_unwind(panic));
        let file = file.with_context(|| format!("make the namespace {name}"))?;
        let namespace = Self { name: name.to_owned(), file: Arc::new(file) };
        namespace.ip(&["link set lo up"])?;
        Ok(namespace)
    }

    /// What the namespace is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in a thread of its own inside the namespace and gives its result. Sockets
    /// that it opens stay in the namespace wherever they are used later. A panic in `work`
    /// goes on in the caller.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            let entered = scope.spawn(|| {
                setns(&*self.file, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            });
            entered.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs a program (`["nft", "list", "ruleset"]`) and gives its standard output. Fails when
    /// it does not exit with 0, with what it wrote to its standard error.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        self.run_with_input(words, "")
    }

    /// As [`Namespace::run`], with `input` as the program's standard input.
    pub fn run_with_input(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        let shown = process::show(&command);
        let output = self.enter(|| process::output(command, input.as_bytes()));
        output
            .and_then(|output| process::expect_success(&shown, output))
            .with_context(|| format!("in {}", self.name))
    }

    /// Runs `command` to its end and gives its output, whatever its exit status.
    pub fn output(&self, command: Command) -> Result<Output> {
        self.enter(|| process::output(command, b"")).with_context(|| format!("in {}", self.name))
    }

    /// Starts a long-living process, with its output in files `NAME.stdout` and `NAME.stderr`
    /// of `directory` (appended to, if they exist).
    pub fn spawn(&self, command: &Command, name: &str, directory: &Path) -> Result<Process> {
        Process::start(&self.file, command, name, directory)
            .with_context(|| format!("in {}", self.name))
    }

    /// Feeds `ruleset` to `nft -f -`.
    pub fn nft(&self, ruleset: &str) -> Result<String> {
        self.run_with_input(&["nft", "-f", "-"], ruleset)
    }

    /// Runs `ip` with every line (`"link set lo up"`) as a command, in one process.
    pub fn ip<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let mut input = String::new();
        for line in lines {
            input.push_str(line.as_ref());
            input.push('\n');
        }
        self.run_with_input(&["ip", "-batch", "-"], &input)
            .map(drop)
            .with_context(|| format!("commands were:\n{input}"))
    }

    /// Sets a sysctl below `net`, by its dotted name (`net.ipv4.ip_forward`). A name part with a
    /// dot in it (an interface) is written with slashes: `net/ipv4/conf/eth0.1/forwarding`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.enter(|| write_sysctl(key, value)).with_context(|| format!("in {}", self.name))
    }

    /// Reads a sysctl, named as for [`Namespace::set_sysctl`].
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        let text = self.enter(|| fs::read_to_string(&path));
        text.map(|text| text.trim().to_owned()).with_context(|| format!("read {path}"))
    }

    /// Runs a future to its end on a runtime of its own inside the namespace: whatever connects,
    /// connects from here.
    pub fn block_on<F>(&self, future: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        self.enter(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("build a runtime")
                .block_on(future)
        })
    }

    /// Waits until packets go from here to `to`, a machine without a server on the discard port,
    /// and back. A new link passes none until a worker of the kernel has found it up, for which
    /// it waits for the lock that all network namespaces of the machine share.
    pub fn wait_until_reachable(&self, to: IpAddr) -> Result<()> {
        const DISCARD: u16 = 9;
        let unspecified = match to {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let is_refused = || -> io::Result<bool> {
            let socket = UdpSocket::bind((unspecified, 0))?;
            socket.connect((to, DISCARD))?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let answer = socket.send(b"?").and_then(|_| socket.recv(&mut [0]));
            Ok(answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
        };
        let reachable = self.enter(|| eventually(LINK_LIMIT, || is_refused().unwrap_or(false)));
        ensure!(reachable, "{} does not reach {to} within {LINK_LIMIT:?}", self.name());
        Ok(())
    }

    /// A path that names the namespace for `ip link ... netns PATH` and `nsenter --net=PATH`.
    /// It holds as long as this value lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (nsenter --net={})", self.name, self.path())
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How long new links may take to work.
const LINK_LIMIT: Duration = Duration::from_secs(30);

/// What every namespace starts with. `default` is copied to interfaces made later.
const DEFAULTS: &[(&str, &str)] = &[
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv4.conf.all.send_redirects", "0"),
    ("net.ipv4.conf.default.send_redirects", "0"),
    // The limits are for the types in these masks: none.
    ("net.ipv4.icmp_ratemask", "0"),
    ("net.ipv6.icmp.ratemask", "\n"),
    ("net.ipv6.conf.all.disable_ipv6", "0"),
    ("net.ipv6.conf.default.disable_ipv6", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.all.accept_ra", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
];

fn sysctl_path(key: &str) -> String {
    let name = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    format!("/proc/sys/{name}")
}

/// Writes a sysctl of the namespace that the calling thread is in.
fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = sysctl_path(key);
    fs::write(&path, value).with_context(|| format!("write {value:?} to {path}"))
}

/// `/32` or `/128`: the prefix of a single address.
pub(super) fn host_prefix(address: IpAddr) -> String {
    match address {
        IpAddr::V4(_) => format!("{address}/32"),
        IpAddr::V6(_) => format!("{address}/128"),
    }
}
