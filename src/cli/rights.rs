//! The right to change the kernel's network settings, where it is given but not yet in force.
//!
//! In a container whose user is not root, the right comes with the program's file, as permitted and
//! not as effective. If the file had it as effective, the program could not be started at all where
//! the right is withheld, and most commands need no right.

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// Puts `CAP_NET_ADMIN` into force, if this process may have it. Threads that start later have it,
/// too; programs that are run do not.
pub fn claim() {
    let Ok(mut sets) = capabilities(None) else { return };
    let wanted = CapabilitySet::NET_ADMIN;
    if sets.permitted.contains(wanted) && !sets.effective.contains(wanted) {
        sets.effective |= wanted;
        // If it fails, the kernel says what is missing as soon as somebody needs it.
        let _ = set_capabilities(None, sets);
    }
}
