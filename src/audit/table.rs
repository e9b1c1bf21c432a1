//! What our table holds, in words: as it should be, and as nft says that it is.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::netlink::shorten_comment;
use crate::ruleset::{
    BASE_CHAINS, BaseChain, Contribution, Element as RulesetElement, Field, RuleSpec, SetName,
    SetSpec, base_rules, hairpin_element, key_text, value_text,
};

/// Everything in one table. Equal tables do the same to every packet, but for which slot of a
/// frontend an endpoint has; [`super::compare()`] knows about slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Whether the table is switched off (`flags dormant`): its chains see no packet.
    pub dormant: bool,
    /// Sets and maps by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
    /// Objects of kinds that we never make, and what could not be understood, as compact JSON.
    pub others: Vec<String>,
}

/// A set or a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Key, value and flags, such as `type inet_proto . inet_service : verdict`.
    pub definition: String,
    /// Elements by key. The key is as nft prints it.
    pub elements: BTreeMap<String, Element>,
}

/// What stands beside an element's key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// What a map's element leads to, as nft prints it.
    pub value: Option<String>,
    /// The comment.
    pub comment: Option<String>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// For a base chain `type KIND hook HOOK priority NUMBER policy POLICY`; `None` for a chain
    /// that others jump to.
    pub hook: Option<String>,
    /// The rules, in their order.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The line that nft prints, with its comment, and with every counter at zero.
    pub text: String,
    /// The counters' true values, from left to right.
    pub counts: Vec<Count>,
}

/// What a counter counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes, IP headers included.
    pub bytes: u64,
}

impl Table {
    /// The table that these contributions add up to.
    pub fn desired(contributions: impl IntoIterator<Item = impl Borrow<Contribution>>) -> Table {
        let mut table = Table::default();
        for chain in BASE_CHAINS {
            let hook = base_chain_text(chain);
            table.chains.insert(chain.name.to_owned(), Chain { hook, rules: Vec::new() });
        }
        for (chain, rule) in base_rules() {
            table.chains.entry(chain.to_owned()).or_default().rules.push(Rule::desired(&rule));
        }
        for set in SetName::fixed() {
            table.add_set(&set);
        }
        for contribution in contributions {
            let contribution = contribution.borrow();
            if let Some(firewall) = contribution.firewall() {
                firewall.sets().iter().for_each(|set| table.add_set(set));
                table.add_chain(firewall.name(), &firewall.rules());
            }
            for chain in contribution.shared_chains() {
                table.add_chain(chain.name(), &chain.rules());
            }
            contribution.elements(|element| table.add_element(&element));
            for address in contribution.hairpins() {
                table.add_element(&hairpin_element(address));
            }
        }
        table
    }

    fn add_set(&mut self, set: &SetName) {
        let definition = definition(&set.spec());
        self.sets.insert(set.name().into_owned(), Set { definition, elements: BTreeMap::new() });
    }

    fn add_chain(&mut self, name: String, rules: &[RuleSpec]) {
        self.chains.entry(name).or_insert_with(|| Chain {
            hook: None,
            rules: rules.iter().map(Rule::desired).collect(),
        });
    }

    fn add_element(&mut self, element: &RulesetElement) {
        let set = self.sets.entry(element.key.set.name().into_owned()).or_default();
        let comment = element.comment.as_deref().map(|c| shorten_comment(c).to_owned());
        let value = value_text(&element.key.set, &element.value);
        set.elements.insert(key_text(&element.key), Element { value, comment });
    }
}

impl Set {
    /// Whether the last part of a key is the slot of an endpoint.
    pub fn has_slots(&self) -> bool {
        let key = self.definition.split_once(" : ").map(|(key, _)| key);
        key.and_then(|key| key.rsplit(" . ").next()) == Some(Field::Slot.type_name())
    }

    /// Whether rules fill it, so that it holds what clients did.
    pub fn is_filled_by_rules(&self) -> bool {
        self.definition.contains(" flags timeout")
    }
}

impl Element {
    /// The element as nft prints it.
    pub fn text(&self, key: &str) -> String {
        let comment =
            self.comment.as_ref().map(|c| format!(" comment \"{c}\"")).unwrap_or_default();
        let value = self.value.as_ref().map(|v| format!(" : {v}")).unwrap_or_default();
        format!("{key}{comment}{value}")
    }
}

impl Rule {
    /// The rule that we write.
    pub fn desired(spec: &RuleSpec) -> Rule {
        Rule::new(spec.text.clone(), spec.comment, Vec::new())
    }

    /// A rule from its parts.
    pub(super) fn new(mut text: String, comment: Option<&str>, counts: Vec<Count>) -> Rule {
        if let Some(comment) = comment {
            let _ = write!(text, " comment \"{comment}\"");
        }
        Rule { text, counts }
    }
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// The priority is a number here: which names it has depends on hook and nft version.
fn base_chain_text(chain: &BaseChain) -> Option<String> {
    let hooked = chain.hooked?;
    let (kind, hook) = (hooked.kind.name(), hooked.hook.name());
    Some(format!("type {kind} hook {hook} priority {} policy accept", hooked.priority))
}

fn definition(spec: &SetSpec) -> String {
    let flags = match (spec.interval, spec.dynamic) {
        (true, _) => " flags interval",
        (false, true) => " flags timeout",
        (false, false) => "",
    };
    let size = spec.size().map(|size| format!(" size {size}")).unwrap_or_default();
    format!("type {}{flags}{size}", spec.type_text())
}
