//! Scratch directories that do not outlive the test process, even when it is killed.
//!
//! All of them are in one directory of the process. A shell outside our process group holds
//! the reading end of a pipe, of which we hold the other: when we are gone, for whatever reason,
//! the kernel closes it and the shell removes the directory.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The directory of this process and the shell that removes it. A static is never dropped:
/// the pipe in `Child` stays open exactly as long as the process lives.
static BASE: Mutex<Option<(PathBuf, Child)>> = Mutex::new(None);

/// Removes `$1` when stdin ends. Processes of the laboratory may be writing there until they
/// are gone, so it is tried for some seconds.
const UNDERTAKER: &str = r#"
trap '' INT TERM HUP
read -r _
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    rm -rf -- "$1" && exit 0
    sleep 0.2
done
"#;

/// A new directory, removed when the value is dropped, and at the latest when the process ends.
pub fn scratch(purpose: &str) -> Result<TempDir> {
    let base = base()?;
    tempfile::Builder::new()
        .prefix(&format!("{purpose}-"))
        .tempdir_in(&base)
        .with_context(|| format!("make a scratch directory in {}", base.display()))
}

fn base() -> Result<PathBuf> {
    let mut guard = BASE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((path, _)) = &*guard {
        return Ok(path.clone());
    }
    let directory = tempfile::Builder::new()
        .prefix(&format!("portcullis-{}-", std::process::id()))
        .tempdir()
        .context("make the scratch directory of the process")?;
    let undertaker = Command::new("sh")
        .args(["-c", UNDERTAKER, "undertaker"])
        .arg(directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // An interrupt from the terminal goes to the whole process group.
        .process_group(0)
        .spawn()
        .context("start the shell that removes the scratch directory")?;
    let path = directory.keep();
    *guard = Some((path.clone(), undertaker));
    Ok(path)
}
