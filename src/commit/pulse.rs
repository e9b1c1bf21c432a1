//! Whether the committing thread keeps up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Totals;

/// Tells whether what was handed to a [`super::Committer`] gets into the kernel. Cheap to clone; all
/// clones are one.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// How many requests are not done.
    waiting: usize,
    /// When the oldest of them was handed over, or later.
    since: Option<Instant>,
    /// Since when the kernel's table is not known to be what it should be.
    stale: Option<Instant>,
    /// What all transactions have cost so far.
    totals: Totals,
}

impl Pulse {
    /// A request was handed over.
    pub(super) fn asked(&self) {
        let mut state = self.state();
        state.waiting += 1;
        state.since.get_or_insert_with(Instant::now);
    }

    /// So many requests are done.
    pub(super) fn done(&self, count: usize, stale: bool, totals: Totals) {
        let mut state = self.state();
        state.totals = totals;
        state.waiting = state.waiting.saturating_sub(count);
        // Whoever still waits came while these were done.
        state.since = (state.waiting > 0).then(Instant::now);
        state.stale = stale.then(|| state.stale.unwrap_or_else(Instant::now));
    }

    /// For how long changes have waited to get into the kernel, at least; zero if none does.
    pub fn behind(&self) -> Duration {
        let state = self.state();
        let oldest = [state.since, state.stale].into_iter().flatten().min();
        oldest.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What all transactions have cost so far.
    pub fn totals(&self) -> Totals {
        self.state().totals
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked, the state is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_behind() {
        let pulse = Pulse::default();
        assert_eq!(pulse.behind(), Duration::ZERO);
        pulse.asked();
        pulse.asked();
        std::thread::sleep(Duration::from_millis(2));
        assert!(pulse.behind() >= Duration::from_millis(2));
        pulse.done(2, false, Totals::default());
        assert_eq!(pulse.behind(), Duration::ZERO);
        // The kernel does not let anybody do anything.
        pulse.asked();
        pulse.done(1, true, Totals::default());
        std::thread::sleep(Duration::from_millis(2));
        pulse.done(0, true, Totals::default());
        assert!(pulse.behind() >= Duration::from_millis(2));
        pulse.done(0, false, Totals::default());
        assert_eq!(pulse.behind(), Duration::ZERO);
    }
}
