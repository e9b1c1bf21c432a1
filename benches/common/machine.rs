//! The machine that the figures come from.

use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What readers need to know to judge the figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The CPU's own name.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The version of nft.
    pub nft: String,
    /// The version of the compiler.
    pub rustc: String,
    /// The commit that was measured.
    pub commit: String,
    /// Processes that wanted to run besides, on average over the minute before.
    pub load: String,
    /// When, in UTC.
    pub time: String,
}

impl Machine {
    /// This machine, now.
    pub fn describe() -> Machine {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
        Machine {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib("/proc/meminfo", "MemTotal").unwrap_or_default() / 1024,
            kernel: read("/proc/sys/kernel/osrelease").unwrap_or_else(unknown),
            nft: first_line("nft", &["--version"]).unwrap_or_else(unknown),
            rustc: first_line(&rustc, &["--version"]).unwrap_or_else(unknown),
            commit: first_line("git", &["describe", "--always", "--dirty", "--abbrev=12"])
                .unwrap_or_else(unknown),
            load: read("/proc/loadavg")
                .and_then(|load| Some(load.split_whitespace().next()?.to_owned()))
                .unwrap_or_else(unknown),
            time: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        }
    }

    /// A sentence that says it all, with what was measured besides this commit.
    pub fn sentence(&self, besides: &str) -> String {
        format!(
            "Measured {} at commit `{}`{besides} on {}, {} cores, {:.0} GiB, Linux {}, {}, {}; \
             load average before: {}.",
            self.time,
            self.commit,
            self.cpu,
            self.cores,
            self.memory_mib.div_ceil(1024),
            self.kernel,
            self.nft,
            self.rustc,
            self.load,
        )
    }
}

/// The most memory that a process (`self`, or a number) ever had, in KiB.
///
/// # Errors
/// When /proc does not tell.
pub fn peak_kib(process: &str) -> Result<u64> {
    let file = format!("/proc/{process}/status");
    kib(&file, "VmHWM").with_context(|| format!("{file} has no VmHWM"))
}

fn kib(file: &str, name: &str) -> Option<u64> {
    field(file, name)?.strip_suffix(" kB")?.trim().parse().ok()
}

/// The value behind `name:` in a file of such lines.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

fn read(file: &str) -> Option<String> {
    Some(std::fs::read_to_string(file).ok()?.trim().to_owned())
}

fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

fn unknown() -> String {
    "unknown".to_owned()
}
