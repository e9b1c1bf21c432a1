//! Where the binaries of the control plane are.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/controlplane/build.sh");

/// The directory with the binaries, built first if they are not there. What the build says goes
/// to stderr, past the test runner's capture: it takes minutes when nothing is cached.
pub(super) fn directory() -> Result<PathBuf> {
    let output = Command::new(SCRIPT)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {SCRIPT}"))?;
    ensure!(output.status.success(), "{SCRIPT} failed: {}", output.status);
    let directory = String::from_utf8(output.stdout).context("the directory is not UTF-8")?;
    Ok(directory.trim().into())
}

/// Why the binaries are not there and cannot be built; `None` when they are or can.
pub(crate) fn missing() -> Option<String> {
    match Command::new(SCRIPT).arg("--check").output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("cannot run {SCRIPT}: {error}")),
    }
}
