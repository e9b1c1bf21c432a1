//! Whether this machine can run a privileged test.

use std::env;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use nix::unistd::Uid;

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// The superuser and the right to make network namespaces, and the programs `ip` and
    /// `setpriv`.
    Root,
    /// The `nft` program.
    Nft,
    /// The `conntrack` program.
    Conntrack,
    /// The program `iptables`, in both of its variants.
    Iptables,
    /// The program `setcap`.
    Setcap,
    /// The binaries of a Kubernetes control plane, or what it takes to build them: Go.
    ControlPlane,
}

/// Whether everything that `requirements` names is there.
///
/// When something is missing, this writes the reason to stderr (past the test runner's capture)
/// and gives `false`: the test returns at once. With `CI=true` in the environment it panics, so
/// that a run which must not skip anything does not.
pub fn available(requirements: &[Requirement]) -> bool {
    let missing: Vec<String> = requirements.iter().filter_map(|r| r.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let reason = missing.join("; ");
    let ci = env::var("CI").is_ok_and(|value| value == "true");
    assert!(!ci, "CI=true, but this test cannot run: {reason}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // `eprintln!` would be captured, as the test passes.
    let _ = writeln!(io::stderr(), "SKIPPED {test}: {reason}");
    false
}

impl Requirement {
    /// Why the requirement is not met; `None` when it is.
    fn missing(self) -> Option<String> {
        match self {
            Self::Root if !Uid::effective().is_root() => Some("needs root".into()),
            Self::Root => crate::lab::Namespace::new("probe")
                .err()
                .map(|error| format!("cannot make a network namespace: {error:#}"))
                .or_else(|| program("ip", "-V"))
                .or_else(|| program("setpriv", "--version")),
            Self::Nft => program("nft", "--version"),
            Self::Conntrack => program("conntrack", "--version"),
            Self::Iptables => program("iptables-nft", "--version")
                .or_else(|| program("iptables-legacy", "--version")),
            Self::Setcap => program("setcap", "-h"),
            Self::ControlPlane => crate::controlplane::missing(),
        }
    }
}

/// Why `name` cannot be run; `None` when it can.
fn program(name: &str, argument: &str) -> Option<String> {
    let status =
        Command::new(name).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("`{name} {argument}` failed: {status}")),
        Err(error) => Some(format!("cannot run `{name}`: {error}")),
    }
}
