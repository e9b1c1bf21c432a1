//! Taking over what the kernel holds: at start, and when it differs from what we believed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::applied::{
    Applied, add_element, add_firewall, add_rule, add_shared_chain, delete_element,
    delete_firewall, tag,
};
use super::listing::{Endpoints, Listing, backend, is_ours, with_slot, without_slot};
use super::stale::Left;
use crate::model::{Backend, Family};
use crate::netlink::{
    self, Batch, ChainDump, Data, ElementDump, HookDump, Hooked, RuleDump, SetData, SetDump,
    TableDump, TableFlags, Tag, Verdict,
};
use crate::plan::Pool;
use crate::ruleset::{
    BASE_CHAINS, Contribution, Element, ElementKey, EndpointLists, FirewallChain, KeyBytes,
    PoolSlots, RuleSpec, SetName, SharedChain, Subject, Value, base_rules, endpoint_lists,
    hairpin_element, layout_comment,
};

/// What the kernel holds, in our terms.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// All elements but those in `endpoints`.
    elements: HashMap<ElementKey, (Option<Data>, Option<String>)>,
    endpoints: Endpoints,
    /// Chains of the table by name.
    chains: BTreeMap<String, ChainDump>,
    /// Sets of allowed sources, by name.
    allow_sets: BTreeSet<String>,
    flags: TableFlags,
}

impl Found {
    /// Understands a listing. `None` if the table is another version's or somebody has changed
    /// more than elements: then it must be laid out anew.
    pub fn new(listing: Listing) -> Option<Found> {
        let Listing { table: dump, endpoints } = listing;
        if !is_ours(&dump) || !base_chains_are_ours(&dump) {
            return None;
        }
        let mut found = Found { flags: dump.flags, endpoints, ..Found::default() };
        let fixed: HashMap<String, SetName> =
            SetName::fixed().into_iter().map(|set| (set.name().into_owned(), set)).collect();
        if !fixed.keys().all(|name| dump.sets.contains_key(name)) {
            return None;
        }
        for (name, set) in dump.sets {
            let id = match fixed.get(&name) {
                Some(id) => id.clone(),
                None => allow_set(&name)?,
            };
            if !same_types(&set, &id.spec().netlink(&name)) {
                return None;
            }
            if let SetName::Allow(..) = id {
                found.allow_sets.insert(name);
            }
            for element in set.elements {
                let ElementDump { key, end, data, comment, .. } = element;
                let end = match end {
                    Some(end) => Some(KeyBytes::new(&end)?),
                    None => None,
                };
                let key = ElementKey { set: id.clone(), bytes: KeyBytes::new(&key)?, end };
                found.elements.insert(key, (data, comment));
            }
        }
        found.chains = dump.chains;
        found.chains.retain(|name, _| BASE_CHAINS.iter().all(|chain| chain.name != name));
        found.only_ours().then_some(found)
    }

    /// Whether every chain is one that we would make, with the rules that we would give it, and
    /// every firewall is complete.
    fn only_ours(&self) -> bool {
        let mut sets = self.allow_sets.clone();
        for (name, chain) in &self.chains {
            if let Some(shared) = SharedChain::parse(name) {
                if !same_hook(chain, None) || !same_rules(chain, &shared.rules()) {
                    return false;
                }
            } else if let Some(firewall) = firewall(name) {
                let complete = firewall.sets().iter().all(|set| sets.remove(&*set.name()));
                let same = same_hook(chain, None) && same_rules(chain, &firewall.rules());
                if !complete || !same {
                    return false;
                }
            } else {
                return false;
            }
        }
        sets.is_empty()
    }

    /// The backends of `pool` in the order of their slots, as its frontends have them.
    pub fn slots_of(&self, pool: &Pool) -> Option<PoolSlots> {
        let lists: Vec<_> = pool.frontends.iter().map(|f| endpoint_lists(pool, f)).collect();
        let read = |which: fn(&EndpointLists) -> Option<u32>| {
            lists.iter().find_map(|list| self.list(pool.family, list, which(list)?))
        };
        let (cluster, local) = (read(|list| list.cluster), read(|list| list.local));
        (cluster.is_some() || local.is_some()).then(|| PoolSlots {
            cluster: cluster.unwrap_or_default(),
            local: local.unwrap_or_default(),
        })
    }

    fn list(&self, family: Family, list: &EndpointLists, first: u32) -> Option<Vec<Backend>> {
        if let Some(slots) = self.endpoints.get(&(list.map.clone(), list.key, first)) {
            return slots.iter().copied().collect();
        }
        let slots: Vec<Backend> = (first..)
            .map_while(|slot| match self.elements.get(&with_slot(&list.map, &list.key, slot))? {
                (Some(Data::Value(value)), _) => backend(family, value),
                _ => None,
            })
            .collect();
        (!slots.is_empty()).then_some(slots)
    }

    /// Whom flows were led to.
    pub fn left(&self) -> Left {
        let mut left = Left::default();
        for ((map, key, _), slots) in &self.endpoints {
            for backend in slots.iter().flatten() {
                left.add(map, key.as_slice(), *backend);
            }
        }
        for (key, (data, _)) in &self.elements {
            let (SetName::Endpoints(family) | SetName::NodePortEndpoints(family)) = key.set else {
                continue;
            };
            if let Some(Data::Value(value)) = data
                && let Some(((map, key, _), _)) = without_slot(key)
                && let Some(backend) = backend(family, value)
            {
                left.add(&map, key.as_slice(), backend);
            }
        }
        left
    }

    /// Writes into `batch` what makes the kernel hold exactly these contributions.
    pub fn stage(mut self, contributions: &[(Subject, Option<Contribution>)], batch: &mut Batch) {
        let mut hairpins: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for (index, (_, contribution)) in contributions.iter().enumerate() {
            let Some(contribution) = contribution else { continue };
            batch.set_tag(tag(index));
            if let Some(firewall) = contribution.firewall()
                && self.chains.remove(&firewall.name()).is_none()
            {
                add_firewall(batch, &firewall);
            }
            contribution.elements(|element| self.element(&element, batch));
            hairpins.extend(contribution.hairpins().into_iter().map(|address| (address, index)));
        }
        let needed: BTreeMap<SharedChain, usize> = contributions
            .iter()
            .enumerate()
            .flat_map(|(index, (_, c))| {
                c.iter().flat_map(Contribution::shared_chains).map(move |chain| (chain, index))
            })
            .collect();
        for (chain, index) in &needed {
            batch.set_tag(tag(*index));
            if self.chains.remove(&chain.name()).is_none() {
                add_shared_chain(batch, chain);
            }
        }
        for (address, index) in hairpins {
            batch.set_tag(tag(index));
            self.element(&hairpin_element(address), batch);
        }
        batch.set_tag(LAYOUT);
        self.delete_the_rest(batch);
    }

    /// Takes an element off what was found, or writes it.
    fn element(&mut self, element: &Element, batch: &mut Batch) {
        if let Some(held) = self.endpoint(&element.key).and_then(Option::take) {
            if !is_backend(element, &held) {
                delete_element(batch, &element.key);
                add_element(batch, element);
            }
            return;
        }
        match self.elements.remove(&element.key) {
            Some((data, comment)) => {
                if !same_data(&element.value, data.as_ref())
                    || element.comment.as_deref().map(netlink::shorten_comment)
                        != comment.as_deref()
                {
                    delete_element(batch, &element.key);
                    add_element(batch, element);
                }
            }
            None => add_element(batch, element),
        }
    }

    /// The endpoint with this key, if it was read by its slot.
    fn endpoint(&mut self, key: &ElementKey) -> Option<&mut Option<Backend>> {
        let (list, slot) = without_slot(key)?;
        self.endpoints.get_mut(&list)?.get_mut(slot)
    }

    fn delete_the_rest(self, batch: &mut Batch) {
        let mut going = BTreeSet::new();
        for name in self.chains.keys() {
            match firewall(name) {
                Some(firewall) => {
                    delete_firewall(batch, &firewall);
                    going.extend(firewall.sets());
                }
                None => batch.delete_chain(name),
            }
        }
        for key in self.elements.keys().filter(|key| !going.contains(&key.set)) {
            delete_element(batch, key);
        }
        for ((map, address, first), slots) in &self.endpoints {
            for (slot, _) in (*first..).zip(slots).filter(|(_, backend)| backend.is_some()) {
                delete_element(batch, &with_slot(map, address, slot));
            }
        }
    }

    /// The flags of the table.
    pub fn flags(&self) -> TableFlags {
        self.flags
    }
}

/// The tag of what everybody shares: nobody in particular is to blame for it.
pub(super) const LAYOUT: Tag = Tag::MAX;

/// Writes the table into `batch` as if there were none; `found` says whether there is one to be
/// deleted in the same transaction.
pub(super) fn lay_out(
    found: bool,
    flags: TableFlags,
    contributions: &[(Subject, Option<Contribution>)],
    batch: &mut Batch,
) {
    batch.set_tag(LAYOUT);
    if found {
        batch.delete_table();
    }
    batch.add_table(flags, Some(&layout_comment()));
    for chain in BASE_CHAINS {
        batch.add_chain(&netlink::Chain {
            name: chain.name,
            hooked: chain.hooked,
            comment: Some(chain.comment),
        });
    }
    for set in SetName::fixed() {
        batch.add_set(&set.spec().netlink(&set.name()));
    }
    for (chain, rule) in base_rules() {
        add_rule(batch, chain, &rule);
    }
    Applied::default().write(contributions, batch);
}

fn base_chains_are_ours(dump: &TableDump) -> bool {
    let rules = base_rules();
    BASE_CHAINS.iter().all(|chain| {
        let own = rules.iter().filter(|(name, _)| *name == chain.name);
        let own: Vec<RuleSpec> = own.map(|(_, rule)| rule.clone()).collect();
        dump.chains
            .get(chain.name)
            .is_some_and(|found| same_hook(found, chain.hooked) && same_rules(found, &own))
    })
}

/// Whether a chain has these rules.
fn same_rules(found: &ChainDump, expected: &[RuleSpec]) -> bool {
    let same = |(found, expected): (&RuleDump, &RuleSpec)| {
        let expressions = expected.expressions.iter().zip(&found.expressions);
        found.comment.as_deref() == expected.comment
            && found.expressions.len() == expected.expressions.len()
            && expressions.into_iter().all(|(expected, found)| expected.is_listed_as(found))
    };
    found.rules.len() == expected.len() && found.rules.iter().zip(expected).all(same)
}

/// Whether a chain is attached there, and lets through what no rule decides about.
fn same_hook(found: &ChainDump, expected: Option<Hooked>) -> bool {
    found.hooked
        == expected.map(|hooked| HookDump {
            kind: hooked.kind.name().to_owned(),
            hook: hooked.hook as u32,
            priority: hooked.priority,
            policy: 1, // NF_ACCEPT
        })
}

/// Whether a set has the types of this definition.
fn same_types(found: &SetDump, expected: &netlink::Set<'_>) -> bool {
    let data_type = expected.data.map_or(0, SetData::kind);
    (found.flags, found.key_type, found.data_type)
        == (expected.flags(), expected.key_type, data_type)
}

fn same_data(value: &Value, data: Option<&Data>) -> bool {
    match (value, data) {
        (Value::None, None) | (Value::Drop, Some(Data::Verdict(Verdict::Drop))) => true,
        (Value::Endpoint(bytes), Some(Data::Value(found))) => bytes.as_slice() == found,
        (Value::Goto(chain), Some(Data::Verdict(Verdict::Goto(found)))) => chain.name() == *found,
        _ => false,
    }
}

/// Whether an element leads to this backend and says nothing besides.
fn is_backend(element: &Element, held: &Backend) -> bool {
    let Value::Endpoint(bytes) = &element.value else { return false };
    let family = Family::of(held.address);
    element.comment.is_none() && backend(family, bytes.as_slice()).as_ref() == Some(held)
}

/// The firewall chain with this name.
fn firewall(name: &str) -> Option<FirewallChain> {
    Some(FirewallChain::of(service(name.strip_prefix("fw-")?)?))
}

/// The set of allowed sources with this name.
fn allow_set(name: &str) -> Option<SetName> {
    let rest = name.strip_prefix("allow")?;
    let family = Family::ALL.into_iter().find(|family| rest.starts_with(family.digit()))?;
    Some(SetName::Allow(family, service(rest[1..].strip_prefix('-')?)?))
}

fn service(name: &str) -> Option<crate::model::ServiceName> {
    let (namespace, name) = name.split_once('/')?;
    Some(crate::model::ServiceName::new(namespace, name))
}
