//! The portcullis program under test.
//!
//! ```no_run
//! # use portcullis_integration::{binary, lab::Lab};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::new(1)?;
//! let manifests = lab.directory().join("manifests");
//! std::fs::create_dir(&manifests)?;
//! let mut run = binary::command(["run", "--node-name", "node-1", "--manifests"])?;
//! run.arg(&manifests);
//! let portcullis = lab.spawn(&run, "portcullis")?; // killed when it is dropped
//! let plan = lab.node.output(binary::command(["plan", "--help"])?)?;
//! # Ok(())
//! # }
//! ```

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

/// A command that runs portcullis with these arguments.
pub fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Result<Command> {
    let mut command = Command::new(path()?);
    command.args(arguments);
    Ok(command)
}

/// The program, built from the sources first, with the profile of the tests. With `PORTCULLIS_BIN`
/// in the environment it is that file, as it is.
///
/// Cargo tells a test the path of a binary only if both are in one package, and builds it only
/// then.
pub fn path() -> Result<&'static Path> {
    static PATH: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let path = PATH.get_or_init(|| match env::var_os("PORTCULLIS_BIN") {
        Some(path) => Ok(path.into()),
        None => build().map_err(|error| format!("{error:#}")),
    });
    path.as_deref().map_err(|error| anyhow!("{error}"))
}

fn build() -> Result<PathBuf> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // With this package beside it, dependencies have the features that they have in the tests,
    // and are not compiled again.
    cargo.args(["build", "--quiet", "--bin", "portcullis", "--message-format", "json"]);
    cargo.args(["--package", "portcullis", "--package", env!("CARGO_PKG_NAME")]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.current_dir(root).stderr(Stdio::inherit());
    let output = cargo.output().context("run cargo")?;
    ensure!(output.status.success(), "cargo build failed: {}", output.status);
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "portcullis")
        .find_map(|message| Some(message["executable"].as_str()?.into()))
        .context("cargo built no program portcullis")
}
