//! What is not as it should be.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::read::Observed;
use super::table::{Chain, Element, Rule, Set, Table};
use crate::ruleset::{Contribution, LOCAL_SLOTS, TABLE};

/// One thing in the kernel that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// What kind of thing it is.
    pub object: Object,
    /// The table, or the chain or set that it is or is in.
    pub name: String,
    /// The key, for an element.
    pub key: Option<String>,
    /// Whether it is missing, unexpected or another than expected.
    pub change: Change,
    /// What should be there, as nft would print it; `null` for what is unexpected.
    pub expected: Option<String>,
    /// What is there, as nft prints it; `null` for what is missing.
    pub found: Option<String>,
}

/// What kind of thing differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Object {
    /// The table as a whole.
    Table,
    /// A chain, or where it is attached.
    Chain,
    /// A rule.
    Rule,
    /// A set or map, or its type.
    Set,
    /// An element of a set or map.
    Element,
    /// Something of a kind that we never make, or that was not understood.
    Other,
}

/// How it differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It is not there.
    Missing,
    /// It is there and should not be.
    Unexpected,
    /// It is there, but not as it should be.
    Changed,
}

/// Compares what `contributions` add up to with what is there; sorted.
///
/// What is inside of something that is missing or unexpected as a whole is not listed again.
/// Values of counters do not matter. Which slot an endpoint has does not matter either, for that
/// is history: the slots of a frontend must be 0 to N-1, each once, for the N endpoints that it
/// should have.
pub fn compare(
    contributions: impl IntoIterator<Item = impl Borrow<Contribution>>,
    observed: &Observed,
) -> Vec<Difference> {
    let mut differences = Differences::default();
    match &observed.table {
        None => differences.missing(Object::Table, TABLE, None, format!("table inet {TABLE}")),
        Some(found) => differences.tables(&Table::desired(contributions), found),
    }
    differences.0.sort();
    differences.0
}

#[derive(Default)]
struct Differences(Vec<Difference>);

impl Differences {
    fn tables(&mut self, expected: &Table, found: &Table) {
        if found.dormant {
            let (active, dormant) = ("in force".to_owned(), "flags dormant".to_owned());
            self.add(Object::Table, TABLE, None, Some(active), Some(dormant));
        }
        for other in &found.others {
            self.add(Object::Other, TABLE, None, None, Some(other.clone()));
        }
        let names: BTreeSet<&String> = expected.chains.keys().chain(found.chains.keys()).collect();
        for name in names {
            match (expected.chains.get(name), found.chains.get(name)) {
                (Some(expected), Some(found)) => self.chains(name, expected, found),
                (expected, found) => {
                    self.add(
                        Object::Chain,
                        name,
                        None,
                        expected.map(chain_text),
                        found.map(chain_text),
                    );
                }
            }
        }
        let names: BTreeSet<&String> = expected.sets.keys().chain(found.sets.keys()).collect();
        for name in names {
            match (expected.sets.get(name), found.sets.get(name)) {
                (Some(expected), Some(found)) => self.sets(name, expected, found),
                (expected, found) => {
                    self.add(Object::Set, name, None, expected.map(set_text), found.map(set_text));
                }
            }
        }
    }

    fn chains(&mut self, name: &str, expected: &Chain, found: &Chain) {
        if expected.hook != found.hook {
            let (expected, found) = (hook_text(expected), hook_text(found));
            self.add(Object::Chain, name, None, Some(expected), Some(found));
        }
        let (expected, found) = (&expected.rules, &found.rules);
        let (kept_expected, kept_found) = in_common(expected, found);
        for rule in without(expected, &kept_expected) {
            self.missing(Object::Rule, name, None, rule.text.clone());
        }
        for rule in without(found, &kept_found) {
            self.add(Object::Rule, name, None, None, Some(rule.text.clone()));
        }
    }

    fn sets(&mut self, name: &str, expected: &Set, found: &Set) {
        if expected.definition != found.definition {
            let (expected, found) = (expected.definition.clone(), found.definition.clone());
            self.add(Object::Set, name, None, Some(expected), Some(found));
        }
        if expected.is_filled_by_rules() {
            return;
        }
        if !expected.has_slots() {
            return self.elements(name, &expected.elements, &found.elements);
        }
        let settled = settle(&expected.elements, &found.elements);
        self.elements(name, &settled, &found.elements);
    }

    fn elements(
        &mut self,
        set: &str,
        expected: &BTreeMap<String, Element>,
        found: &BTreeMap<String, Element>,
    ) {
        for (key, element) in expected {
            let there = found.get(key);
            if there != Some(element) {
                let there = there.map(|there| there.text(key));
                self.add(Object::Element, set, Some(key), Some(element.text(key)), there);
            }
        }
        for (key, element) in found {
            if !expected.contains_key(key) {
                self.add(Object::Element, set, Some(key), None, Some(element.text(key)));
            }
        }
    }

    fn missing(&mut self, object: Object, name: &str, key: Option<&str>, expected: String) {
        self.add(object, name, key, Some(expected), None);
    }

    fn add(
        &mut self,
        object: Object,
        name: &str,
        key: Option<&str>,
        expected: Option<String>,
        found: Option<String>,
    ) {
        let change = match (&expected, &found) {
            (_, None) => Change::Missing,
            (None, Some(_)) => Change::Unexpected,
            (Some(_), Some(_)) => Change::Changed,
        };
        let (name, key) = (name.to_owned(), key.map(str::to_owned));
        self.0.push(Difference { object, name, key, change, expected, found });
    }
}

/// Gives the expected endpoints of every frontend the slots that they have, where those can be
/// true, and others the slots that are left. So an endpoint that is missing is one difference, and
/// none if only the order is another.
fn settle(
    expected: &BTreeMap<String, Element>,
    found: &BTreeMap<String, Element>,
) -> BTreeMap<String, Element> {
    let mut there: BTreeMap<List<'_>, Vec<(u32, &Element)>> = BTreeMap::new();
    for (key, element) in found {
        if let Some((list, place)) = split_slot(key) {
            there.entry(list).or_default().push((place, element));
        }
    }
    let mut wanted: BTreeMap<List<'_>, Vec<&Element>> = BTreeMap::new();
    for (key, element) in expected {
        let (list, _) = split_slot(key).expect("we gave every key a slot");
        wanted.entry(list).or_default().push(element);
    }
    let mut settled = BTreeMap::new();
    for (list, wanted) in wanted {
        let mut slots: Vec<Option<&Element>> = vec![None; wanted.len()];
        let mut homeless: BTreeMap<Option<&str>, Vec<&Element>> = BTreeMap::new();
        for element in wanted {
            homeless.entry(element.value.as_deref()).or_default().push(element);
        }
        for (place, element) in there.get(&list).into_iter().flatten() {
            let Some(place) = slots.get_mut(*place as usize) else { continue };
            *place = homeless.get_mut(&element.value.as_deref()).and_then(Vec::pop);
        }
        let mut homeless = homeless.into_values().flatten();
        let (frontend, first) = list;
        for (slot, element) in (first..).zip(slots) {
            let element = element.or_else(|| homeless.next()).expect("as many as slots");
            settled.insert(format!("{frontend} . {slot:#010x}"), element.clone());
        }
    }
    settled
}

/// One of the lists of endpoints of a frontend: the frontend, and the first slot.
type List<'a> = (&'a str, u32);

/// The list that an endpoint is in by its key, and its place there.
fn split_slot(key: &str) -> Option<(List<'_>, u32)> {
    let (frontend, slot) = key.rsplit_once(" . ")?;
    let slot = u32::from_str_radix(slot.strip_prefix("0x")?, 16).ok()?;
    let first = slot & LOCAL_SLOTS;
    Some(((frontend, first), slot - first))
}

/// The positions, in both lists, of the longest sequence of rules that they have in common.
fn in_common(expected: &[Rule], found: &[Rule]) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let columns = found.len() + 1;
    // The length of the sequence for the ends of both lists that start at row and column. A chain
    // of ours has a handful of rules, so this is small whatever others have added.
    let mut length = vec![0_u32; (expected.len() + 1) * columns];
    for row in (0..expected.len()).rev() {
        for column in (0..found.len()).rev() {
            length[row * columns + column] = if expected[row].text == found[column].text {
                length[(row + 1) * columns + column + 1] + 1
            } else {
                length[(row + 1) * columns + column].max(length[row * columns + column + 1])
            };
        }
    }
    let (mut row, mut column) = (0, 0);
    let (mut rows, mut kept) = (BTreeSet::new(), BTreeSet::new());
    while row < expected.len() && column < found.len() {
        if expected[row].text == found[column].text {
            rows.insert(row);
            kept.insert(column);
            (row, column) = (row + 1, column + 1);
        } else if length[(row + 1) * columns + column] >= length[row * columns + column + 1] {
            row += 1;
        } else {
            column += 1;
        }
    }
    (rows, kept)
}

fn without<'a>(rules: &'a [Rule], kept: &BTreeSet<usize>) -> impl Iterator<Item = &'a Rule> {
    rules.iter().enumerate().filter(|(index, _)| !kept.contains(index)).map(|(_, rule)| rule)
}

fn hook_text(chain: &Chain) -> String {
    chain.hook.clone().unwrap_or_else(|| "not attached".to_owned())
}

fn chain_text(chain: &Chain) -> String {
    let hook = chain.hook.as_ref().map(|hook| format!("{hook}, ")).unwrap_or_default();
    format!("{hook}{}", count(chain.rules.len(), "rule"))
}

fn set_text(set: &Set) -> String {
    format!("{}, {}", set.definition, count(set.elements.len(), "element"))
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements from slot and value.
    fn elements(slots: &[(&str, &str)]) -> BTreeMap<String, Element> {
        let element = |value: &str| Element { value: Some(value.to_owned()), comment: None };
        slots.iter().map(|(slot, value)| (format!("f . {slot}"), element(value))).collect()
    }

    #[test]
    fn endpoints_settle_in_the_slots_that_they_have() {
        const SLOTS: [&str; 4] = ["0x00000000", "0x00000001", "0x00000002", "0x00000003"];
        /// Wanted endpoints; what the kernel has in slots; what is expected of it then.
        type Case =
            (&'static [&'static str], &'static [(usize, &'static str)], &'static [&'static str]);
        let table: &[Case] = &[
            (&[], &[], &[]),
            (&["a", "b"], &[], &["a", "b"]),
            (&["a", "b"], &[(0, "b"), (1, "a")], &["b", "a"]),
            (&["a", "b", "c"], &[(0, "c"), (2, "a")], &["c", "b", "a"]),
            (&["a", "b"], &[(0, "x"), (1, "a")], &["b", "a"]),
            (&["a", "b"], &[(0, "a"), (1, "a")], &["a", "b"]),
            (&["a", "b"], &[(2, "a"), (1, "b")], &["a", "b"]),
            (&["a"], &[(0, "b"), (1, "a")], &["a"]),
            // A weight is the same endpoint in several slots.
            (&["a", "a", "b"], &[(0, "b"), (1, "a"), (2, "a")], &["b", "a", "a"]),
        ];
        for (wanted, found, expected) in table {
            let of = |values: &[&'static str]| {
                let slots: Vec<_> = SLOTS.iter().copied().zip(values.iter().copied()).collect();
                elements(&slots)
            };
            let there: Vec<_> = found.iter().map(|(slot, value)| (SLOTS[*slot], *value)).collect();
            let got = settle(&of(wanted), &elements(&there));
            assert_eq!(got, of(expected), "{wanted:?} {found:?}");
        }
    }

    #[test]
    fn the_longest_common_sequence_is_kept() {
        let table = [
            ("", "", 0),
            ("abc", "abc", 3),
            ("abc", "xabc", 3),
            ("abc", "axbxc", 3),
            ("abc", "", 0),
            ("abc", "cab", 2),
            ("abab", "bab", 3),
        ];
        for (expected, found, length) in table {
            let rules = |text: &str| -> Vec<Rule> {
                let rule = |c: char| Rule { text: c.to_string(), counts: vec![] };
                text.chars().map(rule).collect()
            };
            let (expected_rules, found_rules) = (rules(expected), rules(found));
            let (kept_expected, kept_found) = in_common(&expected_rules, &found_rules);
            let text = |rules: &[Rule], kept: &BTreeSet<usize>| -> Vec<String> {
                kept.iter().map(|index| rules[*index].text.clone()).collect()
            };
            let common = text(&expected_rules, &kept_expected);
            assert_eq!(common, text(&found_rules, &kept_found), "{expected} {found}");
            assert_eq!(common.len(), length, "{expected} {found}");
        }
    }
}
