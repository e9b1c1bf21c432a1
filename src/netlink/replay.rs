//! Replays encoded transactions on a table in memory, for tests of laws: thousands of random
//! transactions a second, with the kernel's rules about what must and must not be there. What the
//! kernel makes of the same bytes is tested in `integration/`.

use std::collections::{BTreeMap, BTreeSet};

use super::attribute::{find, iter, string, u32_of};
use super::batch::{Encoded, HEADERS};

type Elements = BTreeMap<(Vec<u8>, bool), Vec<u8>>;

/// What the transactions have left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Chains with the number of their rules.
    pub chains: BTreeMap<String, usize>,
    /// Elements by set: key and whether it ends an interval, to everything else.
    pub sets: BTreeMap<String, Elements>,
}

impl Table {
    /// Applies a transaction.
    ///
    /// # Panics
    /// Where the kernel would refuse it: something is made that is there or deleted that is not,
    /// or an element leads to a chain that is not there, or a chain goes that is still led to.
    pub fn apply(&mut self, transaction: &Encoded) {
        for message in &transaction.messages {
            let bytes = &transaction.bytes[message.range.clone()];
            let kind = u16::from_ne_bytes([bytes[4], bytes[5]]) & 0xff;
            let attributes = &bytes[HEADERS..];
            let name = |attribute| find(attributes, attribute).map(string).unwrap_or_default();
            match kind {
                3 => assert_eq!(self.chains.insert(name(3), 0), None, "chain {} exists", name(3)),
                5 => {
                    assert!(self.chains.remove(&name(3)).is_some(), "no chain {}", name(3));
                }
                6 => *self.chains.get_mut(&name(2)).expect("the rule's chain") += 1,
                9 => assert_eq!(
                    self.sets.insert(name(2), Elements::new()),
                    None,
                    "set {} exists",
                    name(2)
                ),
                11 => assert!(self.sets.remove(&name(2)).is_some(), "no set {}", name(2)),
                12 | 14 => self.elements(kind == 12, &name(2), find(attributes, 3).unwrap()),
                _ => {}
            }
        }
        self.check_references();
    }

    fn elements(&mut self, add: bool, set: &str, list: &[u8]) {
        let elements = self.sets.get_mut(set).unwrap_or_else(|| panic!("no set {set}"));
        for (_, element) in iter(list) {
            let end = find(element, 3).and_then(u32_of).unwrap_or_default() & 1 != 0;
            let key = (find(find(element, 1).unwrap(), 1).unwrap().to_vec(), end);
            if add {
                let rest = [find(element, 2), find(element, 6)].map(Option::unwrap_or_default);
                assert!(elements.insert(key, rest.concat()).is_none(), "element of {set} exists");
            } else {
                assert!(elements.remove(&key).is_some(), "no such element in {set}");
            }
        }
    }

    fn check_references(&self) {
        let mut led_to = BTreeSet::new();
        for elements in self.sets.values() {
            for rest in elements.values() {
                // NFTA_DATA_VERDICT, NFTA_VERDICT_CHAIN
                let chain = find(rest, 2).and_then(|verdict| find(verdict, 2)).map(string);
                led_to.extend(chain);
            }
        }
        for chain in led_to {
            assert!(self.chains.contains_key(&chain), "an element leads to no chain: {chain}");
        }
    }
}
