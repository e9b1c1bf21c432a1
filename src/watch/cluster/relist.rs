//! What vanished between two lists.

use std::collections::HashSet;
use std::hash::Hash;

/// The objects of one kind that a watcher has told of. A watcher lists everything, then tells of
/// changes; when it has lost track it lists everything again, and does not tell what is gone.
#[derive(Clone, Debug)]
pub(super) struct Relist<K> {
    /// Everything told of and not told to be gone.
    known: HashSet<K>,
    /// What the list that is being read has named so far.
    listed: HashSet<K>,
    complete: bool,
}

impl<K: Clone + Eq + Hash> Relist<K> {
    /// Nothing told yet.
    pub(super) fn new() -> Relist<K> {
        Relist { known: HashSet::new(), listed: HashSet::new(), complete: false }
    }

    /// Whether a list has ever been complete.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// A list begins. One that was being read has failed: what it named may be gone already.
    pub(super) fn begin(&mut self) {
        self.listed.clear();
    }

    /// The list names an object.
    pub(super) fn list(&mut self, key: K) {
        self.known.insert(key.clone());
        self.listed.insert(key);
    }

    /// The list is complete. Gives what is not in it and was told of before.
    pub(super) fn end(&mut self) -> Vec<K> {
        let listed = std::mem::take(&mut self.listed);
        let known = std::mem::replace(&mut self.known, listed);
        self.complete = true;
        known.into_iter().filter(|key| !self.known.contains(key)).collect()
    }

    /// An object has come or changed.
    pub(super) fn apply(&mut self, key: K) {
        self.known.insert(key);
    }

    /// An object is gone.
    pub(super) fn delete(&mut self, key: &K) {
        self.known.remove(key);
    }

    /// Everything told of and not told to be gone.
    pub(super) fn known(&self) -> impl Iterator<Item = &K> {
        self.known.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tells_what_vanished() {
        let mut relist = Relist::new();
        assert!(!relist.is_complete());
        relist.begin();
        relist.list("a");
        relist.list("b");
        assert!(!relist.is_complete());
        assert_eq!(relist.end(), [""; 0]);
        assert!(relist.is_complete());
        relist.apply("c");
        relist.delete(&"b");
        // Between two lists `a` went, `c` stayed and `d` came.
        relist.begin();
        relist.list("c");
        relist.list("d");
        assert_eq!(relist.end(), ["a"]);
        assert_eq!(relist.known().collect::<BTreeSet<_>>(), BTreeSet::from([&"c", &"d"]));
    }

    #[test]
    fn what_a_failed_list_named_may_vanish_too() {
        let mut relist = Relist::new();
        relist.begin();
        relist.list("a");
        relist.begin();
        relist.list("b");
        assert_eq!(relist.end(), ["a"]);
        relist.begin();
        assert_eq!(relist.end(), ["b"]);
    }

    /// What happens to the objects, and whether anybody tells.
    #[derive(Clone, Debug)]
    enum Step {
        Apply(u8),
        Delete(u8),
        Lose(u8),
        Gain(u8),
        /// A list that fails after some objects.
        Fail(usize),
        List,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let one = prop_oneof![
            (0..6u8).prop_map(Step::Apply),
            (0..6u8).prop_map(Step::Delete),
            (0..6u8).prop_map(Step::Lose),
            (0..6u8).prop_map(Step::Gain),
            (0..6usize).prop_map(Step::Fail),
            Just(Step::List),
        ];
        prop::collection::vec(one, 0..50)
    }

    proptest! {
        /// Whoever applies what is listed and drops what vanished holds, after each list, what is
        /// there.
        #[test]
        fn following_equals_listing(steps in steps()) {
            let (mut relist, mut there, mut held) =
                (Relist::new(), BTreeSet::new(), BTreeSet::new());
            for step in steps.into_iter().chain([Step::List]) {
                match step {
                    Step::Apply(key) => {
                        there.insert(key);
                        held.insert(key);
                        relist.apply(key);
                    }
                    Step::Delete(key) => {
                        there.remove(&key);
                        held.remove(&key);
                        relist.delete(&key);
                    }
                    Step::Lose(key) => drop(there.remove(&key)),
                    Step::Gain(key) => drop(there.insert(key)),
                    Step::Fail(after) => {
                        relist.begin();
                        for key in there.iter().take(after) {
                            relist.list(*key);
                            held.insert(*key);
                        }
                    }
                    Step::List => {
                        relist.begin();
                        for key in &there {
                            relist.list(*key);
                            held.insert(*key);
                        }
                        for key in relist.end() {
                            prop_assert!(held.remove(&key));
                        }
                        prop_assert_eq!(&held, &there);
                    }
                }
                prop_assert_eq!(&relist.known().copied().collect::<BTreeSet<_>>(), &held);
            }
        }
    }
}
