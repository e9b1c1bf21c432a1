//! `portcullis run` on a node of the laboratory.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::binary;
use crate::lab::{Lab, Process};

/// How long the daemon may take until it has programmed its node: far more than it needs.
const START_LIMIT: Duration = Duration::from_secs(30);
/// What the daemon logs when the node is programmed for the first time.
const PROGRAMMED: &str = "the kernel holds what it should";

/// The name by which manifests and API objects know the node of the laboratory.
pub const NODE_NAME: &str = "node-1";

/// A command line of the real binary, ready for more arguments.
pub fn command(arguments: &[&str]) -> Result<Command> {
    let mut command = binary::command(arguments)?;
    command.env("RUST_LOG", "info");
    Ok(command)
}

/// Starts `portcullis run` on the manifests in `directory` and waits until the node is programmed.
pub fn follow_manifests(lab: &Lab, directory: &Path) -> Result<Process> {
    let directory = directory.to_str().context("a path in UTF-8")?;
    follow(lab, &["--manifests", directory])
}

/// Starts `portcullis run` with these arguments and waits until the node is programmed.
pub fn follow(lab: &Lab, arguments: &[&str]) -> Result<Process> {
    let arguments = [&["run", "--node-name", NODE_NAME], arguments].concat();
    let mut daemon = lab.spawn(&command(&arguments)?, "portcullis")?;
    daemon.wait_for_output(PROGRAMMED, START_LIMIT)?;
    Ok(daemon)
}
