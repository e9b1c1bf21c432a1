//! Understanding a listing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use nftables::expr::{Elem, Expression, NamedExpression};
use nftables::schema::{Chain as JsonChain, NfListObject};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::foreign::{self, Foreign};
use super::nft::{Error, Listing, documents, entry, flags};
use super::plain;
use super::print;
use super::table::{Element, Rule, Set, Table};
use crate::ruleset::{TABLE, address_text};

/// What the kernel holds, as nft lists it.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Our table, if there is one.
    pub table: Option<Table>,
    /// Base chains of other tables, sorted.
    pub foreign: Vec<Foreign>,
    /// Tables that look like kube-proxy's, such as `ip kube-proxy`, sorted.
    pub kube_proxy: Vec<String>,
}

/// Family, table and chain.
pub(super) type ChainPath = (String, String, String);

impl Observed {
    /// Reads a listing. Objects of other tables that are not understood are passed over; what is
    /// not understood in our table is in [`Table::others`].
    ///
    /// # Errors
    /// [`Error::NotUnderstood`], when a document is not one that nft should write.
    pub fn read(listing: &Listing) -> Result<Observed, Error> {
        let mut reader = Reader::default();
        for document in documents(&listing.json).map_err(not_understood)? {
            for raw in document.nftables {
                let (kind, body) = entry(raw).map_err(not_understood)?;
                reader.object(&kind, body).map_err(not_understood)?;
            }
        }
        if let Some(plain) = &listing.plain {
            reader.plain(plain);
        }
        Ok(reader.finish())
    }
}

fn not_understood(source: serde_json::Error) -> Error {
    Error::NotUnderstood { command: "-j list ruleset".to_owned(), source }
}

/// Where an object belongs.
#[derive(Default, Deserialize)]
struct Place {
    #[serde(default)]
    family: String,
    #[serde(default)]
    table: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    chain: String,
}

#[derive(Deserialize)]
struct TableBody {
    #[serde(default)]
    flags: Value,
}

#[derive(Deserialize)]
struct RuleBody {
    #[serde(default)]
    expr: Vec<Value>,
    comment: Option<String>,
}

#[derive(Deserialize)]
struct SetBody<'a> {
    #[serde(rename = "type")]
    key: Value,
    map: Option<Value>,
    #[serde(default)]
    flags: Value,
    #[serde(borrow, default)]
    elem: Vec<&'a RawValue>,
    /// What we never set, such as `timeout`.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

/// Fields of a set or chain that say nothing of what it does. nft 1.0.6 has no comments of chains.
const WITHOUT_EFFECT: [&str; 5] = ["family", "table", "name", "handle", "comment"];

#[derive(Default)]
struct Reader {
    table: Option<Table>,
    foreign: BTreeMap<ChainPath, Foreign>,
    foreign_rules: BTreeMap<ChainPath, u64>,
    kube_proxy: BTreeSet<String>,
}

impl Reader {
    fn object(&mut self, kind: &str, body: &RawValue) -> Result<(), serde_json::Error> {
        if kind == "metainfo" {
            return Ok(());
        }
        let place: Place = serde_json::from_str(body.get())?;
        let table = if kind == "table" { &place.name } else { &place.table };
        if (&*place.family, &**table) != ("inet", TABLE) {
            self.foreign(kind, place, body);
            return Ok(());
        }
        let table = self.table.get_or_insert_default();
        let understood = match kind {
            "table" => read_flags(body).map(|dormant| table.dormant = dormant),
            "chain" => read_chain(body).map(|hook| {
                table.chains.entry(place.name).or_default().hook = hook;
            }),
            "rule" => read_rule(body).map(|rule| {
                table.chains.entry(place.chain).or_default().rules.push(rule);
            }),
            "set" | "map" => read_set(body).map(|set| {
                table.sets.insert(place.name, set);
            }),
            _ => None,
        };
        if understood.is_none() {
            table.others.push(format!("{kind} {}", body.get()));
        }
        Ok(())
    }

    fn foreign(&mut self, kind: &str, place: Place, body: &RawValue) {
        match kind {
            "chain" => {
                if foreign::is_kube_proxys(&place.table, &place.name) {
                    self.kube_proxy.insert(format!("{} {}", place.family, place.table));
                }
                let chain =
                    chain(body).and_then(|chain| foreign::base_chain(&place.family, &chain));
                if let Some(chain) = chain {
                    self.foreign.insert((place.family, place.table, place.name), chain);
                }
            }
            "rule" => {
                let path = (place.family, place.table, place.chain);
                *self.foreign_rules.entry(path).or_default() += 1;
            }
            _ => {}
        }
    }

    /// Takes rules, and our table's flags, from a listing for people.
    fn plain(&mut self, listing: &str) {
        plain::read(listing, |line| match line {
            plain::Line::Flags { family: "inet", table: TABLE, flags } => {
                self.table.get_or_insert_default().dormant = flags.contains(&"dormant");
            }
            plain::Line::Flags { .. } => {}
            plain::Line::Rule { family: "inet", table: TABLE, chain, rule } => {
                let table = self.table.get_or_insert_default();
                table.chains.entry(chain.to_owned()).or_default().rules.push(plain::rule(rule));
            }
            plain::Line::Rule { family, table, chain, .. } => {
                let path = (family.to_owned(), table.to_owned(), chain.to_owned());
                *self.foreign_rules.entry(path).or_default() += 1;
            }
        });
    }

    fn finish(mut self) -> Observed {
        for (path, chain) in &mut self.foreign {
            chain.rules = self.foreign_rules.get(path).copied().unwrap_or_default();
        }
        if let Some(table) = &mut self.table {
            table.others.sort();
        }
        let mut foreign: Vec<Foreign> = self.foreign.into_values().collect();
        foreign.sort();
        let kube_proxy = self.kube_proxy.into_iter().collect();
        Observed { table: self.table, foreign, kube_proxy }
    }
}

fn read_flags(body: &RawValue) -> Option<bool> {
    let body: TableBody = serde_json::from_str(body.get()).ok()?;
    Some(flags(&body.flags)?.contains(&"dormant"))
}

/// A chain, as the crate has it.
fn chain(body: &RawValue) -> Option<JsonChain<'static>> {
    let mut body: Value = serde_json::from_str(body.get()).ok()?;
    // Several devices are a list, for which the crate has no room.
    if let Some(Value::Array(devices)) = body.get("dev") {
        let devices: Vec<&str> = devices.iter().filter_map(Value::as_str).collect();
        body["dev"] = devices.join(", ").into();
    }
    match serde_json::from_value(serde_json::json!({ "chain": body })).ok()? {
        NfListObject::Chain(chain) => Some(chain),
        _ => None,
    }
}

/// Where a chain of ours is attached; the outer `None` if it is not understood.
#[allow(clippy::option_option)]
fn read_chain(body: &RawValue) -> Option<Option<String>> {
    let chain = chain(body)?;
    let mut words = Vec::new();
    words.extend(chain._type.and_then(print::word).map(|kind| format!("type {kind}")));
    words.extend(chain.hook.and_then(print::word).map(|hook| format!("hook {hook}")));
    words.extend(chain.prio.map(|priority| format!("priority {priority}")));
    words.extend(chain.policy.and_then(print::word).map(|policy| format!("policy {policy}")));
    let mut fields: BTreeMap<String, Value> = serde_json::from_str(body.get()).ok()?;
    fields.retain(|field, _| !["type", "hook", "prio", "policy"].contains(&field.as_str()));
    words.extend(remaining(fields));
    Some((!words.is_empty()).then(|| words.join(" ")))
}

fn read_rule(body: &RawValue) -> Option<Rule> {
    let body: RuleBody = serde_json::from_str(body.get()).ok()?;
    Some(print::rule(body.expr, body.comment.as_deref()))
}

fn read_set(body: &RawValue) -> Option<Set> {
    let body: SetBody = serde_json::from_str(body.get()).ok()?;
    let key = types(&body.key)?;
    let mut definition = format!("type {}", key.join(" . "));
    let data = match &body.map {
        Some(data) => Some(types(data)?),
        None => None,
    };
    if let Some(data) = &data {
        let _ = write!(definition, " : {}", data.join(" . "));
    }
    // One flag is a string or a list of one, depending on the version.
    let mut flags = match body.flags {
        Value::Null => Vec::new(),
        Value::String(flag) => vec![flag],
        Value::Array(flags) => flags.into_iter().map(|flag| word(&flag)).collect(),
        other => vec![other.to_string()],
    };
    // nft 1.0.6 keeps to itself that rules add elements, but names the timeout that goes with it.
    flags.retain(|flag| flag != "dynamic");
    flags.sort();
    if !flags.is_empty() {
        let _ = write!(definition, " flags {}", flags.join(","));
    }
    for rest in remaining(body.rest) {
        let _ = write!(definition, " {rest}");
    }
    let elements = body.elem.into_iter().map(|raw| element(raw, &key, data.as_deref())).collect();
    Some(Set { definition, elements })
}

/// Fields beyond those that are known, which make a difference.
fn remaining(fields: BTreeMap<String, Value>) -> impl Iterator<Item = String> {
    let counts = |name: &String| !WITHOUT_EFFECT.contains(&name.as_str());
    fields
        .into_iter()
        .filter(move |(name, _)| counts(name))
        .map(|(name, value)| format!("{name} {value}"))
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// The types of a concatenation: a list, or (nft 1.0.6, of a map's values) one string.
fn types(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(types) => Some(types.split(" . ").map(str::to_owned).collect()),
        Value::Array(types) => types.iter().map(|t| t.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// An element's key and what stands beside it. What is not understood is a key of its own: the JSON
/// that it was.
fn element(raw: &RawValue, key: &[String], data: Option<&[String]>) -> (String, Element) {
    let parsed = match data {
        None => serde_json::from_str(raw.get()).map(|k: Expression| (k, None)),
        Some(_) => {
            serde_json::from_str(raw.get()).map(|(k, v): (Expression, Expression)| (k, Some(v)))
        }
    };
    let Ok((element, value)) = parsed else {
        return (raw.get().to_owned(), Element::default());
    };
    let (element, comment, timeout) = match element {
        Expression::Named(NamedExpression::Elem(Elem { val, comment, timeout, .. })) => {
            (*val, comment, timeout)
        }
        bare => (bare, None, None),
    };
    let value = value.map(|value| match value {
        Expression::Verdict(verdict) => print::verdict_text(&verdict),
        value => fields(&value, data.unwrap_or_default()),
    });
    // We set none: an element with a timeout will be gone.
    let timeout = timeout.map(|seconds| format!("timeout {seconds}s"));
    let value = [value, timeout].into_iter().flatten().reduce(|value, t| format!("{value} {t}"));
    let comment = comment.map(std::borrow::Cow::into_owned);
    (fields(&element, key), Element { value, comment })
}

/// The parts of a key or value, each printed as its type wants it.
fn fields(expression: &Expression, types: &[String]) -> String {
    let parts = match expression {
        Expression::Named(NamedExpression::Concat(parts)) => parts.as_slice(),
        single => std::slice::from_ref(single),
    };
    let kinds = types.iter().map(String::as_str).chain(std::iter::repeat(""));
    let parts: Vec<String> =
        parts.iter().zip(kinds).map(|(part, kind)| field(part, kind)).collect();
    parts.join(" . ")
}

fn field(expression: &Expression, kind: &str) -> String {
    match expression {
        Expression::Number(number) if kind == "mark" => format!("{number:#010x}"),
        Expression::Number(number) if kind == "inet_proto" => print::protocol(*number),
        Expression::Number(number) => number.to_string(),
        // The C library writes some IPv6 addresses differently.
        Expression::String(text) if matches!(kind, "ipv4_addr" | "ipv6_addr") => {
            text.parse::<IpAddr>().map_or_else(|_| text.to_string(), address_text)
        }
        Expression::String(text) => text.to_string(),
        Expression::Named(NamedExpression::Prefix(prefix)) => {
            format!("{}/{}", field(&prefix.addr, kind), prefix.len)
        }
        Expression::Range(range) => {
            format!("{}-{}", field(&range.range[0], kind), field(&range.range[1], kind))
        }
        other => json(other),
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.to_owned()).expect(json)
    }

    #[test]
    fn elements_read_as_nft_prints_them() {
        const SERVICE: &[&str] = &["ipv4_addr", "inet_proto", "inet_service"];
        const ENDPOINT: &[&str] = &["ipv4_addr", "inet_service"];
        type Types = &'static [&'static str];
        let table: &[(Types, Option<Types>, &str, &str)] = &[
            (&["ipv4_addr"], None, r#""10.0.0.1""#, "10.0.0.1"),
            (&["ipv4_addr"], None, r#"{"prefix": {"addr": "10.0.0.0", "len": 8}}"#, "10.0.0.0/8"),
            (&["ipv4_addr"], None, r#"{"range": ["10.0.0.1", "10.0.0.9"]}"#, "10.0.0.1-10.0.0.9"),
            // The C library writes the last 32 bits as an IPv4 address.
            (&["ipv6_addr"], None, r#""::1.2.3.4""#, "::1.2.3.4"),
            (&["ipv6_addr"], None, r#"{"prefix": {"addr": "::", "len": 0}}"#, "::/0"),
            (SERVICE, None, r#"{"concat": ["10.0.0.1", "tcp", 80]}"#, "10.0.0.1 . tcp . 80"),
            (SERVICE, None, r#"{"concat": ["10.0.0.1", 132, 80]}"#, "10.0.0.1 . sctp . 80"),
            (
                SERVICE,
                None,
                r#"{"elem": {"val": {"concat": ["10.0.0.1", 6, 80]}, "comment": "a/b",
                    "counter": {"packets": 5, "bytes": 300}}}"#,
                "10.0.0.1 . tcp . 80 comment \"a/b\"",
            ),
            (
                &["ipv4_addr"],
                None,
                r#"{"elem": {"val": "10.0.0.1", "timeout": 30, "expires": 9}}"#,
                "10.0.0.1 : timeout 30s",
            ),
            (
                &["inet_proto", "inet_service"],
                Some(&["verdict"]),
                r#"[{"elem": {"val": {"concat": [17, 53]}, "comment": "a/b"}}, {"goto": {"target": "c"}}]"#,
                "udp . 53 comment \"a/b\" : goto c",
            ),
            (&["mark"], Some(&["verdict"]), r#"[3, {"accept": null}]"#, "0x00000003 : accept"),
            (
                &["inet_proto", "inet_service", "mark"],
                Some(ENDPOINT),
                r#"[{"concat": [6, 80, 10]}, {"concat": ["10.0.0.1", 8080]}]"#,
                "tcp . 80 . 0x0000000a : 10.0.0.1 . 8080",
            ),
            // Not understood.
            (&["ipv4_addr"], None, r#"{"new": "kind"}"#, r#"{"new": "kind"}"#),
            (&["ipv4_addr"], Some(ENDPOINT), r#""10.0.0.1""#, r#""10.0.0.1""#),
        ];
        for (key, data, json, expected) in table {
            let types =
                |types: &[&str]| -> Vec<String> { types.iter().map(ToString::to_string).collect() };
            let data = data.map(types);
            let (key, element) = element(&raw(json), &types(key), data.as_deref());
            assert_eq!(element.text(&key), *expected, "{json}");
        }
    }

    #[test]
    fn sets_and_chains_keep_what_they_are() {
        let table = [
            (r#"{"type": "ipv4_addr"}"#, Some("type ipv4_addr")),
            (r#"{"type": "ipv4_addr", "handle": 7, "comment": "x"}"#, Some("type ipv4_addr")),
            (
                r#"{"type": "ipv4_addr", "flags": "interval"}"#,
                Some("type ipv4_addr flags interval"),
            ),
            (
                r#"{"type": ["mark", "mark"], "flags": ["timeout", "dynamic"], "timeout": 30}"#,
                Some("type mark . mark flags timeout timeout 30"),
            ),
            (r#"{"type": "mark", "map": "verdict"}"#, Some("type mark : verdict")),
            (
                r#"{"type": "mark", "map": "ipv4_addr . inet_service"}"#,
                Some("type mark : ipv4_addr . inet_service"),
            ),
            (
                r#"{"type": "mark", "map": ["ipv4_addr", "inet_service"]}"#,
                Some("type mark : ipv4_addr . inet_service"),
            ),
            (r#"{"type": {"typeof": 7}}"#, None),
        ];
        for (json, expected) in table {
            let got = read_set(&raw(json)).map(|set| set.definition);
            assert_eq!(got.as_deref(), expected, "{json}");
        }
        let table = [
            (r#""handle": 7"#, Some(None)),
            (
                r#""type": "nat", "hook": "output", "prio": -100, "policy": "accept""#,
                Some(Some("type nat hook output priority -100 policy accept")),
            ),
            (
                r#""type": "filter", "hook": "ingress", "prio": 0, "dev": ["a", "b"]"#,
                Some(Some(r#"type filter hook ingress priority 0 dev ["a","b"]"#)),
            ),
            (r#""hook": "teleport""#, None),
        ];
        for (fields, expected) in table {
            let json = format!(r#"{{"family": "inet", "table": "t", "name": "c", {fields}}}"#);
            let got = read_chain(&raw(&json));
            assert_eq!(got.as_ref().map(Option::as_deref), expected, "{fields}");
        }
    }
}
