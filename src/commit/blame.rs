//! What an error of a transaction says: who is at fault, and whether trying again can help.

use std::collections::BTreeSet;
use std::io;

use super::adopt::LAYOUT;
use super::worker::Target;
use crate::netlink::{self, Error, Refusal};

/// Whether an error means that the table is not as it was left, or may not be.
pub(super) fn is_surprise(error: &Error) -> bool {
    let surprising = |refusal: &Refusal| {
        // Something is gone, or there already, or used by somebody else.
        matches!(
            refusal.error.raw_os_error(),
            Some(nix::libc::ENOENT | nix::libc::EEXIST | nix::libc::EBUSY)
        )
    };
    match error {
        // What follows the first may be its consequence: what leads to a chain that was refused
        // does not find it.
        Error::Refused(refusals) => refusals.first().is_some_and(surprising),
        Error::Receive(_) => true,
        _ => false,
    }
}

/// Whether an error says nothing about what was sent, so that the same may succeed later. What is
/// too large for the socket never does.
pub(super) fn is_passing(error: &Error) -> bool {
    match error {
        Error::Send(source) => source.raw_os_error() != Some(nix::libc::EMSGSIZE),
        Error::Receive(_) | Error::Interrupted => true,
        _ => false,
    }
}

/// Whether an error comes of table flags that this kernel does not know.
pub(super) fn is_unknown_flag(error: &Error) -> bool {
    let unknown = |refusal: &Refusal| {
        matches!(refusal.subject, netlink::Subject::Table(_))
            && matches!(
                refusal.error.raw_os_error(),
                Some(nix::libc::EOPNOTSUPP | nix::libc::EINVAL)
            )
    };
    matches!(error, Error::Refused(refusals) if refusals.iter().any(unknown))
}

/// Whether the kernel refuses what everybody shares, for lack of a module or of place.
pub(super) fn is_about_layout(error: &Error) -> bool {
    // The table itself may be gone, or somebody else's.
    let shared = |refusal: &Refusal| {
        refusal.tag == Some(LAYOUT) && !matches!(refusal.subject, netlink::Subject::Table(_))
    };
    matches!(error, Error::Refused(refusals) if refusals.iter().any(shared))
}

/// Whether the kernel does not let this process change the table at all.
pub(super) fn is_denied(error: &Error) -> bool {
    let denied = |refusal: &Refusal| refusal.error.kind() == io::ErrorKind::PermissionDenied;
    matches!(error, Error::Refused(refusals) if refusals.iter().any(denied))
}

/// Whom to leave out of the next attempt.
pub(super) enum Split {
    /// Those at fault, and the others.
    Guilty(Vec<Target>, Vec<Target>),
    /// Nobody knows who is at fault.
    Halves(Vec<Target>, Vec<Target>),
}

pub(super) fn split(targets: Vec<Target>, error: &Error) -> Split {
    let guilty: BTreeSet<usize> = match error {
        Error::Refused(refusals) => {
            let missing = |r: &&Refusal| r.error.kind() == io::ErrorKind::NotFound;
            let tags = |refusals: Vec<&Refusal>| {
                refusals.into_iter().filter_map(|r| Some(r.tag? as usize)).collect()
            };
            // Who only misses something may miss what another was refused.
            let (missing, causes): (Vec<_>, Vec<_>) = refusals.iter().partition(missing);
            tags(if causes.is_empty() { missing } else { causes })
        }
        _ => BTreeSet::new(),
    };
    if targets.len() == 1 {
        return Split::Guilty(targets, Vec::new());
    }
    if guilty.is_empty() {
        let mut first = targets;
        let second = first.split_off(first.len() / 2);
        return Split::Halves(first, second);
    }
    let (mut at_fault, mut others) = (Vec::new(), Vec::new());
    for (index, target) in targets.into_iter().enumerate() {
        if guilty.contains(&index) { at_fault.push(target) } else { others.push(target) }
    }
    Split::Guilty(at_fault, others)
}
