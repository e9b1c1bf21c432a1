//! `portcullis run` on a node of the laboratory.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::binary;
use crate::controlplane::ControlPlane;
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
    command.env_remove("RUST_LOG");
    Ok(command)
}

/// Starts `portcullis run` on the manifests in `directory` and waits until the node is programmed.
pub fn follow_manifests(lab: &Lab, directory: &Path) -> Result<Process> {
    let directory = directory.to_str().context("a path in UTF-8")?;
    follow(lab, &["--manifests", directory])
}

/// Starts `portcullis run` with these arguments and waits until the node is programmed.
pub fn follow(lab: &Lab, arguments: &[&str]) -> Result<Process> {
    let mut daemon = start(lab, NODE_NAME, arguments)?;
    daemon.wait_for_output(PROGRAMMED, START_LIMIT)?;
    Ok(daemon)
}

/// Starts `portcullis run` for `node` on the API server of `plane`, to which the laboratory's node
/// must be attached, and waits until the node is programmed.
pub fn follow_cluster(lab: &Lab, plane: &ControlPlane, node: &str) -> Result<Process> {
    let mut daemon = start_on_cluster(lab, plane, node)?;
    daemon.wait_for_output(PROGRAMMED, START_LIMIT)?;
    Ok(daemon)
}

/// As [`follow_cluster`], without waiting: for an API server that does not answer.
pub fn start_on_cluster(lab: &Lab, plane: &ControlPlane, node: &str) -> Result<Process> {
    let kubeconfig = plane.kubeconfig();
    start(lab, node, &["--kubeconfig", kubeconfig.to_str().context("a path in UTF-8")?])
}

/// Waits until the daemon has programmed the node for the first time.
pub fn wait_until_programmed(daemon: &mut Process) -> Result<()> {
    daemon.wait_for_output(PROGRAMMED, START_LIMIT)
}

fn start(lab: &Lab, node: &str, arguments: &[&str]) -> Result<Process> {
    let arguments = [&["run", "--node-name", node], arguments].concat();
    lab.spawn(&command(&arguments)?, "portcullis")
}
