//! The state last applied, and the transaction that leads from it to the next.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;

use crate::netlink::{self, Batch, Tag};
use crate::ruleset::{
    Contribution, Element, ElementKey, FirewallChain, SharedChain, Subject, Value, hairpin_element,
};

/// What every subject has in the kernel, as of the last transaction that succeeded. Stale when
/// somebody else changes the table; then the kernel is listed and adopted again.
#[derive(Debug, Default)]
pub struct Applied {
    contributions: HashMap<Subject, Contribution>,
    /// How many contributions need the hairpin element of an address.
    hairpins: HashMap<IpAddr, usize>,
    /// How many contributions need a chain.
    chains: HashMap<SharedChain, usize>,
}

/// A step to the next state: nothing of it is true until its transaction has succeeded.
#[derive(Debug)]
pub(super) struct Step {
    changes: Vec<(Subject, Option<Contribution>)>,
    hairpins: HashMap<IpAddr, isize>,
    chains: HashMap<SharedChain, isize>,
}

impl Applied {
    /// The state in which the kernel holds exactly these contributions.
    pub(super) fn new(contributions: Vec<(Subject, Option<Contribution>)>) -> Applied {
        let mut applied = Applied::default();
        for (subject, contribution) in contributions {
            let Some(contribution) = contribution else { continue };
            for address in contribution.hairpins() {
                *applied.hairpins.entry(address).or_default() += 1;
            }
            for chain in contribution.shared_chains() {
                *applied.chains.entry(chain).or_default() += 1;
            }
            applied.contributions.insert(subject, contribution);
        }
        applied
    }

    /// What `subject` has in the kernel.
    pub fn contribution(&self, subject: &Subject) -> Option<&Contribution> {
        self.contributions.get(subject)
    }

    /// All subjects that have something in the kernel.
    pub fn subjects(&self) -> impl Iterator<Item = &Subject> {
        self.contributions.keys()
    }

    /// Everything that subjects have in the kernel.
    pub fn contributions(&self) -> impl Iterator<Item = &Contribution> {
        self.contributions.values()
    }

    /// Writes into `batch` what leads from this state to one where the subjects of `changes` have
    /// these contributions. The tag of everything written is the index of its subject in `changes`.
    pub(super) fn stage(
        &self,
        changes: Vec<(Subject, Option<Contribution>)>,
        batch: &mut Batch,
    ) -> Step {
        let (hairpins, chains) = self.write(&changes, batch);
        Step { changes, hairpins, chains }
    }

    /// [`Applied::stage`] without the step: what it changes in the counts.
    pub(super) fn write(
        &self,
        changes: &[(Subject, Option<Contribution>)],
        batch: &mut Batch,
    ) -> (HashMap<IpAddr, isize>, HashMap<SharedChain, isize>) {
        // In an order of their own, so that the same change is the same transaction.
        let mut hairpins: BTreeMap<IpAddr, (isize, Tag)> = BTreeMap::new();
        let mut chains: BTreeMap<SharedChain, (isize, Tag)> = BTreeMap::new();
        for (index, (subject, next)) in changes.iter().enumerate() {
            let tag = tag(index);
            let (old, next) = (self.contributions.get(subject), next.as_ref());
            if old == next {
                continue;
            }
            batch.set_tag(tag);
            if let Some(comes) = firewall_gone(next, old) {
                add_firewall(batch, &comes);
            }
            let goes = firewall_gone(old, next);
            if let Some(goes) = &goes {
                delete_firewall(batch, goes);
            }
            elements(old, next, goes.as_ref(), batch);
            count(&mut hairpins, old.map(Contribution::hairpins), -1, tag);
            count(&mut hairpins, next.map(Contribution::hairpins), 1, tag);
            count(&mut chains, old.map(Contribution::shared_chains), -1, tag);
            count(&mut chains, next.map(Contribution::shared_chains), 1, tag);
        }
        for (chain, (delta, tag)) in &chains {
            batch.set_tag(*tag);
            match turn(self.chains.get(chain), *delta) {
                Turn::Comes => add_shared_chain(batch, chain),
                Turn::Goes => batch.delete_chain(&chain.name()),
                Turn::Stays => {}
            }
        }
        for (address, (delta, tag)) in &hairpins {
            batch.set_tag(*tag);
            match turn(self.hairpins.get(address), *delta) {
                Turn::Comes => add_element(batch, &hairpin_element(*address)),
                Turn::Goes => delete_element(batch, &hairpin_element(*address).key),
                Turn::Stays => {}
            }
        }
        (
            hairpins.into_iter().map(|(key, (delta, _))| (key, delta)).collect(),
            chains.into_iter().map(|(key, (delta, _))| (key, delta)).collect(),
        )
    }

    /// Makes a step true, after its transaction has succeeded.
    pub(super) fn install(&mut self, step: Step) {
        for (subject, next) in step.changes {
            match next {
                Some(next) => self.contributions.insert(subject, next),
                None => self.contributions.remove(&subject),
            };
        }
        settle(&mut self.hairpins, step.hairpins);
        settle(&mut self.chains, step.chains);
    }
}

impl Step {
    /// The subjects and their next contributions.
    pub(super) fn changes(&self) -> &[(Subject, Option<Contribution>)] {
        &self.changes
    }

    /// Gives up the step.
    pub(super) fn into_changes(self) -> Vec<(Subject, Option<Contribution>)> {
        self.changes
    }
}

/// The tag of the subject at `index`.
pub(super) fn tag(index: usize) -> Tag {
    Tag::try_from(index).expect("fewer than 2^32 subjects")
}

pub(super) fn add_shared_chain(batch: &mut Batch, chain: &SharedChain) {
    let name = chain.name();
    batch.add_chain(&netlink::Chain { name: &name, hooked: None, comment: None });
    for rule in chain.rules() {
        add_rule(batch, &name, &rule);
    }
}

pub(super) fn add_firewall(batch: &mut Batch, firewall: &FirewallChain) {
    let name = firewall.name();
    batch.add_chain(&netlink::Chain { name: &name, hooked: None, comment: None });
    for set in firewall.sets() {
        batch.add_set(&set.spec().netlink(&set.name()));
    }
    for rule in firewall.rules() {
        add_rule(batch, &name, &rule);
    }
}

pub(super) fn delete_firewall(batch: &mut Batch, firewall: &FirewallChain) {
    batch.delete_chain(&firewall.name());
    for set in firewall.sets() {
        batch.delete_set(&set.name());
    }
}

pub(super) fn add_rule(batch: &mut Batch, chain: &str, rule: &crate::ruleset::RuleSpec) {
    batch.add_rule(&netlink::Rule { chain, expressions: &rule.expressions, comment: rule.comment });
}

pub(super) fn add_element(batch: &mut Batch, element: &Element) {
    let goto;
    let data = match &element.value {
        Value::None => None,
        Value::Endpoint(bytes) => Some(netlink::ElementData::Value(bytes.as_slice())),
        Value::Goto(chain) => {
            goto = chain.name();
            Some(netlink::ElementData::Goto(&goto))
        }
        Value::Drop => Some(netlink::ElementData::Drop),
    };
    let description = netlink::Element {
        end: element.key.end.as_ref().map(crate::ruleset::KeyBytes::as_slice),
        data,
        comment: element.comment.as_deref(),
        ..netlink::Element::key(element.key.bytes.as_slice())
    };
    batch.add_element(&element.key.set.name(), &description);
}

pub(super) fn delete_element(batch: &mut Batch, key: &ElementKey) {
    let description = netlink::Element {
        end: key.end.as_ref().map(crate::ruleset::KeyBytes::as_slice),
        ..netlink::Element::key(key.bytes.as_slice())
    };
    batch.delete_element(&key.set.name(), &description);
}

/// The firewall that one has and the other has not. The chain of a firewall is the same for every
/// Service, so there is nothing to change.
fn firewall_gone(old: Option<&Contribution>, next: Option<&Contribution>) -> Option<FirewallChain> {
    let next = next.and_then(Contribution::firewall);
    old.and_then(Contribution::firewall).filter(|firewall| next.as_ref() != Some(firewall))
}

fn elements(
    old: Option<&Contribution>,
    next: Option<&Contribution>,
    goes: Option<&FirewallChain>,
    batch: &mut Batch,
) {
    // A set that goes takes its elements along.
    let goes = goes.map(FirewallChain::sets);
    let goes = goes.as_ref().map_or(&[][..], |sets| sets);
    match (old, next) {
        (None, None) => {}
        (None, Some(next)) => next.elements(|element| add_element(batch, &element)),
        (Some(old), None) => old.elements(|element| {
            if !goes.contains(&element.key.set) {
                delete_element(batch, &element.key);
            }
        }),
        (Some(old), Some(next)) => {
            let mut before: BTreeMap<ElementKey, Element> = BTreeMap::new();
            old.elements(|element| {
                if !goes.contains(&element.key.set) {
                    before.insert(element.key.clone(), element);
                }
            });
            next.elements(|element| match before.remove(&element.key) {
                Some(same) if same == element => {}
                Some(_) => {
                    delete_element(batch, &element.key);
                    add_element(batch, &element);
                }
                None => add_element(batch, &element),
            });
            for key in before.keys() {
                delete_element(batch, key);
            }
        }
    }
}

fn count<K: Ord>(
    deltas: &mut BTreeMap<K, (isize, Tag)>,
    keys: Option<impl IntoIterator<Item = K>>,
    by: isize,
    tag: Tag,
) {
    for key in keys.into_iter().flatten() {
        let entry = deltas.entry(key).or_insert((0, tag));
        entry.0 += by;
        if by > 0 {
            // A refusal of something new is the fault of somebody who wants it.
            entry.1 = tag;
        }
    }
}

enum Turn {
    Comes,
    Goes,
    Stays,
}

fn turn(before: Option<&usize>, delta: isize) -> Turn {
    let before = before.copied().unwrap_or_default();
    match (before > 0, before.saturating_add_signed(delta) > 0) {
        (false, true) => Turn::Comes,
        (true, false) => Turn::Goes,
        _ => Turn::Stays,
    }
}

fn settle<K: Eq + Hash>(counts: &mut HashMap<K, usize>, deltas: HashMap<K, isize>) {
    for (key, delta) in deltas {
        let after = counts.get(&key).copied().unwrap_or_default().saturating_add_signed(delta);
        if after > 0 {
            counts.insert(key, after);
        } else {
            counts.remove(&key);
        }
    }
}
