//! The real `portcullis` binary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// The binary under test, built when it is not up to date; `PORTCULLIS_BINARY` names another.
///
/// `cargo test` builds binaries for the tests of their own package only, so this asks cargo, once
/// in a process.
pub fn portcullis() -> Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BINARY.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    built.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn build() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("PORTCULLIS_BINARY") {
        return Ok(path.into());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the workspace")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // With the features that a test run of the workspace has, so that nothing is built twice.
    command
        .args(["build", "--quiet", "--locked", "--workspace", "--bin", "portcullis"])
        .current_dir(root);
    // A test of a release build drives a release build.
    let own = std::env::current_exe().context("where this program is")?;
    let release = own.components().any(|part| part.as_os_str() == "release");
    if release {
        command.arg("--release");
    }
    let status = command.status().context("run cargo build")?;
    ensure!(status.success(), "cargo build --bin portcullis: {status}");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let binary = target.join(if release { "release" } else { "debug" }).join("portcullis");
    ensure!(binary.is_file(), "cargo built no {}", binary.display());
    Ok(binary)
}
