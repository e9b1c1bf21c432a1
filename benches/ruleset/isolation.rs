//! One child process for each job, in a network namespace of its own: what one job leaves behind
//! never meets another one, and its peak memory is its own.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::measure::{Job, Measurement};

/// How a child is told its job ...
pub const CHILD_FLAG: &str = "--child-job";
/// ... and that it is to stay in the namespace that it was started in.
pub const STAY_FLAG: &str = "--stay";

/// Does `job` in a child process.
///
/// # Errors
/// When the child fails, or takes longer than `limit`; then it is ended, with the nft processes
/// that it started.
pub fn run(job: Job, limit: Duration) -> Result<Vec<Measurement>> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(CHILD_FLAG)
        .arg(serde_json::to_string(&job)?)
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("cannot start a child process")?;
    let mut out = child.stdout.take().expect("it is piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).map(|_| text)
    });
    wait(&mut child, limit).with_context(|| format!("{job:?}"))?;
    let text = reader.join().expect("reading does not panic")?;
    serde_json::from_str(&text).with_context(|| format!("{job:?} printed {text:?}"))
}

/// Does `job` in a child process in this process's namespace, which is not the machine's own.
///
/// # Errors
/// When the child fails.
pub fn run_here(job: Job) -> Result<()> {
    let status = Command::new(std::env::current_exe()?)
        .args([CHILD_FLAG, &serde_json::to_string(&job)?, STAY_FLAG])
        .stdout(Stdio::null())
        .status()
        .context("cannot start a child process")?;
    ensure!(status.success(), "{job:?}: the child process ended with {status}");
    Ok(())
}

fn wait(child: &mut Child, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "the child process ended with {status}");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL)?;
    child.wait()?;
    bail!("took longer than {limit:?}")
}

/// Leaves the network namespace that this process was started in for a new one.
///
/// # Errors
/// Without the right to do so.
pub fn enter_new_namespace() -> Result<()> {
    let before = namespace()?;
    match unshare(CloneFlags::CLONE_NEWNET) {
        Err(Errno::EPERM) => bail!("network namespaces need root: run this as root"),
        result => result.context("cannot make a network namespace")?,
    }
    ensure!(namespace()? != before, "still in the namespace that this was started in");
    Ok(())
}

fn namespace() -> Result<PathBuf> {
    std::fs::read_link("/proc/thread-self/ns/net").context("cannot tell the network namespace")
}
