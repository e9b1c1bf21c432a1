//! The ruleset as text, in the form in which `nft list ruleset` prints it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::TABLE;
use super::chains::{BASE_CHAINS, base_rules};
use super::contribution::{Contribution, hairpin_element};
use super::digest::layout_comment;
use super::element::{Element, ElementKey, Value};
use super::rule::RuleSpec;
use super::sets::{Field, SetData, SetName, SetSpec};
use crate::model::Family;

/// Every object and element of a ruleset, ready to be printed or compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Definition lines (`type ...`, `flags ...`) and elements, by set.
    pub sets: BTreeMap<SetName, BTreeSet<String>>,
    /// Rules by chain, for the chains that depend on what is served.
    pub chains: BTreeMap<String, Vec<RuleSpec>>,
}

impl Listing {
    /// The listing of everything that `contributions` add up to.
    pub fn new<'a>(contributions: impl IntoIterator<Item = &'a Contribution>) -> Listing {
        let mut listing = Listing::default();
        for set in SetName::fixed() {
            listing.sets.insert(set, BTreeSet::new());
        }
        for contribution in contributions {
            if let Some(firewall) = contribution.firewall() {
                listing.sets.extend(firewall.sets().map(|set| (set, BTreeSet::new())));
                listing.chains.insert(firewall.name(), firewall.rules());
            }
            for chain in contribution.shared_chains() {
                listing.chains.insert(chain.name(), chain.rules());
            }
            contribution.elements(|element| listing.add(&element));
            for address in contribution.hairpins() {
                listing.add(&hairpin_element(address));
            }
        }
        listing
    }

    fn add(&mut self, element: &Element) {
        let text = element_text(&element.key, &element.value, element.comment.as_deref());
        self.sets.entry(element.key.set.clone()).or_default().insert(text);
    }
}

/// Prints a ruleset the way nft does, but for one element a line.
pub fn render(listing: &Listing) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "table inet {TABLE} {{");
    let _ = writeln!(out, "\tcomment \"{}\"", layout_comment());
    for (set, elements) in &listing.sets {
        out.push('\n');
        render_set(&mut out, set, elements);
    }
    for (chain, rules) in &listing.chains {
        render_chain(&mut out, chain, None, "", rules.iter());
    }
    let rules = base_rules();
    for chain in BASE_CHAINS {
        let head = chain.hooked.map(|hooked| {
            let (kind, hook) = (hooked.kind.name(), hooked.hook.name());
            format!("type {kind} hook {hook} priority {}; policy accept;", chain.priority)
        });
        let own = rules.iter().filter(|(name, _)| *name == chain.name).map(|(_, rule)| rule);
        render_chain(&mut out, chain.name, head, chain.comment, own);
    }
    out.push_str("}\n");
    out
}

fn render_set(out: &mut String, set: &SetName, elements: &BTreeSet<String>) {
    let spec = set.spec();
    let kind = if spec.data == SetData::None { "set" } else { "map" };
    let _ = writeln!(out, "\t{kind} {set} {{");
    let _ = writeln!(out, "\t\ttype {}", spec.type_text());
    if let Some(size) = spec.size() {
        let _ = writeln!(out, "\t\tsize {size}");
    }
    if let Some(flags) = spec.flags_text() {
        let _ = writeln!(out, "\t\tflags {flags}");
    }
    let _ = writeln!(out, "\t\tcomment \"{}\"", spec.comment);
    for (index, element) in elements.iter().enumerate() {
        let (start, end) = match (index, index + 1 == elements.len()) {
            (0, true) => ("elements = { ", " }"),
            (0, false) => ("elements = { ", ","),
            (_, true) => ("\t     ", " }"),
            (_, false) => ("\t     ", ","),
        };
        let _ = writeln!(out, "\t\t{start}{element}{end}");
    }
    let _ = writeln!(out, "\t}}");
}

fn render_chain<'a>(
    out: &mut String,
    name: &str,
    head: Option<String>,
    comment: &str,
    rules: impl Iterator<Item = &'a RuleSpec>,
) {
    let _ = writeln!(out, "\n\tchain {name} {{");
    if !comment.is_empty() {
        let _ = writeln!(out, "\t\tcomment \"{comment}\"");
    }
    if let Some(head) = head {
        let _ = writeln!(out, "\t\t{head}");
    }
    for rule in rules {
        let _ = write!(out, "\t\t{}", rule.text);
        if let Some(comment) = rule.comment {
            let _ = write!(out, " comment \"{comment}\"");
        }
        out.push('\n');
    }
    let _ = writeln!(out, "\t}}");
}

/// One element as nft prints it.
fn element_text(key: &ElementKey, value: &Value, comment: Option<&str>) -> String {
    let mut text = key_text(key);
    if let Some(comment) = comment {
        let _ = write!(text, " comment \"{}\"", crate::netlink::shorten_comment(comment));
    }
    if let Some(value) = value_text(&key.set, value) {
        let _ = write!(text, " : {value}");
    }
    text
}

/// An element's key as nft prints it.
pub(crate) fn key_text(key: &ElementKey) -> String {
    let spec = key.set.spec();
    if spec.interval {
        interval_text(key, &spec)
    } else {
        fields_text(&spec.key, key.bytes.as_slice())
    }
}

/// What an element of `set` leads to, as nft prints it; `None` for an element of a plain set.
pub(crate) fn value_text(set: &SetName, value: &Value) -> Option<String> {
    match (value, set.spec().data) {
        (Value::Goto(chain), _) => Some(format!("goto {}", chain.name())),
        (Value::Drop, _) => Some("drop".to_owned()),
        (Value::Endpoint(bytes), SetData::Endpoint(family)) => {
            let fields = [Field::Address(family), Field::Port];
            Some(fields_text(&fields, bytes.as_slice()))
        }
        _ => None,
    }
}

/// An interval as the CIDR or the interface that it was made of.
fn interval_text(key: &ElementKey, spec: &SetSpec) -> String {
    let Some(Field::Address(family)) = spec.key.first() else { return interface_text(key) };
    let first = address(*family, key.bytes.as_slice());
    let behind = key.end.map(|end| address(*family, end.as_slice()));
    let size_bits = match (first, behind) {
        (IpAddr::V4(first), behind) => {
            let behind = behind.map_or(1 << 32, |b| match b {
                IpAddr::V4(b) => u64::from(b.to_bits()),
                IpAddr::V6(_) => unreachable!("one family"),
            });
            (behind - u64::from(first.to_bits())).ilog2()
        }
        (IpAddr::V6(first), Some(IpAddr::V6(behind))) => {
            (behind.to_bits() - first.to_bits()).ilog2()
        }
        (IpAddr::V6(first), _) => match first.to_bits() {
            0 => 128,
            first => (u128::MAX - first + 1).ilog2(),
        },
    };
    let (width, host) = if *family == Family::V4 { (32, 32) } else { (128, 128) };
    let prefix = u8::try_from(width - size_bits).expect("at most 128");
    let first = address_text(first);
    if prefix == host { first } else { format!("{first}/{prefix}") }
}

/// `"br0"`, or `"veth*"` where all names that begin so are meant.
fn interface_text(key: &ElementKey) -> String {
    let name = key.bytes.as_slice();
    let text = String::from_utf8_lossy(name);
    let text = text.trim_end_matches('\0');
    let exact = key.end.is_none_or(|end| end.as_slice().last() != name.last());
    format!("\"{text}{}\"", if exact { "" } else { "*" })
}

fn fields_text(fields: &[Field], mut bytes: &[u8]) -> String {
    let mut parts = Vec::with_capacity(fields.len());
    for field in fields {
        let (value, rest) = bytes.split_at(field.width().min(bytes.len()));
        bytes = rest;
        parts.push(field_text(*field, value));
    }
    parts.join(" . ")
}

fn field_text(field: Field, value: &[u8]) -> String {
    let number = |range: std::ops::Range<usize>| {
        value.get(range).unwrap_or_default().iter().fold(0_u32, |n, b| n << 8 | u32::from(*b))
    };
    match field {
        Field::Address(family) => address_text(address(family, value)),
        Field::Protocol => match number(0..1) {
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            132 => "sctp".to_owned(),
            other => other.to_string(),
        },
        Field::Port => number(0..2).to_string(),
        Field::Interface => {
            let name = String::from_utf8_lossy(value);
            format!("\"{}\"", name.trim_end_matches('\0'))
        }
        Field::Slot | Field::PrefixLength => {
            let bytes = value.first_chunk().copied().unwrap_or_default();
            format!("{:#010x}", u32::from_ne_bytes(bytes))
        }
    }
}

fn address(family: Family, value: &[u8]) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from(value.first_chunk().copied().unwrap_or([0; 4])).into(),
        Family::V6 => Ipv6Addr::from(value.first_chunk().copied().unwrap_or([0; 16])).into(),
    }
}

/// An address as nft prints it, which is how glibc's `inet_ntop` does: like Rust, but with the last
/// four bytes as IPv4 where exactly the twelve before them are zero (`::192.0.2.1`).
pub(crate) fn address_text(address: IpAddr) -> String {
    match address {
        IpAddr::V6(v6) if v6.segments()[..6] == [0; 6] && v6.segments()[6] != 0 => {
            let [.., a, b, c, d] = v6.octets();
            format!("::{}", Ipv4Addr::new(a, b, c, d))
        }
        _ => address.to_string(),
    }
}
