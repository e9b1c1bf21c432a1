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
        self.state().asked(Instant::now());
    }

    /// So many requests are done.
    pub(super) fn done(&self, count: usize, stale: bool, totals: Totals) {
        let mut state = self.state();
        state.totals = totals;
        state.done(count, stale, Instant::now());
    }

    /// For how long changes have waited to get into the kernel, at least; zero if none does.
    pub fn behind(&self) -> Duration {
        self.state().behind(Instant::now())
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

impl State {
    fn asked(&mut self, now: Instant) {
        self.waiting += 1;
        self.since.get_or_insert(now);
    }

    fn done(&mut self, count: usize, stale: bool, now: Instant) {
        self.waiting = self.waiting.saturating_sub(count);
        // Whoever still waits came while these were done.
        self.since = (self.waiting > 0).then_some(now);
        self.stale = stale.then(|| self.stale.unwrap_or(now));
    }

    fn behind(&self, now: Instant) -> Duration {
        let oldest = [self.since, self.stale].into_iter().flatten().min();
        oldest.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_behind() {
        let mut state = State::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let behind = |state: &State, now| state.behind(at(now)).as_secs();
        assert_eq!(behind(&state, 9), 0);
        state.asked(at(10));
        state.asked(at(12));
        assert_eq!(behind(&state, 15), 5);
        // One came while the other was done.
        state.done(1, false, at(16));
        assert_eq!(behind(&state, 18), 2);
        state.done(1, false, at(19));
        assert_eq!(behind(&state, 20), 0);
        // The kernel does not let anybody do anything.
        state.asked(at(20));
        state.done(1, true, at(21));
        state.done(0, true, at(24));
        assert_eq!(behind(&state, 25), 4);
        state.done(0, false, at(26));
        assert_eq!(behind(&state, 27), 0);
    }
}
