//! Whether this process may change the kernel's ruleset, told before anything else is tried.

use std::io;

use anyhow::anyhow;
use portcullis::commit::{CommitError, Report, Worker};
use portcullis::netlink::{Error, Socket};
use portcullis::ruleset::TABLE;

/// A worker on this kernel.
///
/// # Errors
/// Says in one line what is missing: rights, or nf_tables.
pub fn open_worker(report: impl FnMut(Report) + Send + 'static) -> anyhow::Result<Worker> {
    check()?;
    Worker::open(report).map_err(explain)
}

fn check() -> anyhow::Result<()> {
    let mut socket = Socket::open().map_err(explain)?;
    // Nothing is as cheap to ask for; the table may be large.
    socket.generation().map_err(explain)?;
    Ok(())
}

/// A commit error with what can be done about it.
pub fn explain_commit(error: CommitError) -> anyhow::Error {
    let denied = match &error {
        CommitError::Kernel(cause) => match cause.as_ref() {
            Error::Refused(refusals) => refusals.iter().any(|r| is_denied(&r.error)),
            _ => false,
        },
        CommitError::Ended => false,
    };
    if denied {
        anyhow!(
            "the kernel does not let this process change table inet {TABLE}: run as root \
             (CAP_NET_ADMIN), and only one portcullis on a node"
        )
    } else {
        anyhow::Error::from(error).context("cannot program the kernel")
    }
}

/// A netlink error with what can be done about it.
pub fn explain(error: Error) -> anyhow::Error {
    let unreachable =
        |error| anyhow::Error::from(error).context("cannot reach the kernel's ruleset");
    let (Error::Open(code) | Error::List { source: code, .. }) = &error else {
        return unreachable(error);
    };
    match code.raw_os_error() {
        _ if is_denied(code) => {
            anyhow!("changing the kernel's ruleset needs root (CAP_NET_ADMIN)")
        }
        Some(libc_code)
            if [nix::libc::EPROTONOSUPPORT, nix::libc::EOPNOTSUPP, nix::libc::EINVAL]
                .contains(&libc_code) =>
        {
            anyhow!("this kernel has no nf_tables (CONFIG_NF_TABLES_INET)")
        }
        _ => unreachable(error),
    }
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}
