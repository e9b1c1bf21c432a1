//! Rules from nft's JSON back to the lines that nft prints for them.
//!
//! Only what our rules are made of is printed; everything else comes out as the JSON that it was,
//! and so differs from any rule of ours.

use crate::ruleset::duration;
use nftables::expr::{BinaryOperation, Expression, NamedExpression, NgMode, Payload, Verdict};
use nftables::stmt::{Counter, JumpTarget, Match, NAT, NATFamily, Operator, RejectType, Statement};
use nftables::types::RejectCode;
use serde::Serialize;
use serde_json::Value;

use super::table::{Count, Rule};

/// A rule from the statements in its `expr`.
pub(super) fn rule(statements: Vec<Value>, comment: Option<&str>) -> Rule {
    let mut counts = Vec::new();
    let words: Vec<String> = statements.into_iter().map(|s| statement(s, &mut counts)).collect();
    Rule::new(words.join(" "), comment, counts)
}

fn statement(mut json: Value, counts: &mut Vec<Count>) -> String {
    normalise(&mut json);
    if let Value::String(text) = &json {
        return printed_statement(text);
    }
    if let Some(text) = json.get("map").and_then(map_statement) {
        return text;
    }
    let statement: Option<Statement> = serde_json::from_value(json.clone()).ok();
    // A field that the crate does not know would be lost: then it would not write what it read.
    let understood = statement.filter(|statement| {
        let mut again = serde_json::to_value(statement).unwrap_or_default();
        normalise(&mut again);
        again == json
    });
    understood.and_then(|s| statement_text(&s, counts)).unwrap_or_else(|| json.to_string())
}

/// A statement that nft has no JSON for (1.0.6: those that add to maps): it gives the line that it
/// prints, but with times in seconds.
fn printed_statement(text: &str) -> String {
    let mut words: Vec<String> = text.split(' ').map(ToOwned::to_owned).collect();
    for index in 1..words.len() {
        if words[index - 1] == "timeout"
            && let Some(Ok(seconds)) = words[index].strip_suffix('s').map(str::parse)
        {
            words[index] = duration(seconds);
        }
    }
    words.join(" ")
}

/// `update @MAP { KEY timeout TIMEOUT : DATA }`, which the crate does not know.
fn map_statement(json: &Value) -> Option<String> {
    let fields = json.as_object()?;
    if fields.len() != 4 {
        return None;
    }
    let expression = |name| serde_json::from_value::<Expression>(fields.get(name)?.clone()).ok();
    let (operation, map) = (fields.get("op")?.as_str()?, fields.get("map")?.as_str()?);
    let data = text(&expression("data")?)?;
    let (key, timeout) = match expression("elem")? {
        Expression::Named(NamedExpression::Elem(elem)) => {
            let timeout = elem.timeout.map(|seconds| format!(" timeout {}", duration(seconds)));
            (text(&elem.val)?, timeout.unwrap_or_default())
        }
        key => (text(&key)?, String::new()),
    };
    Some(format!("{operation} {map} {{ {key}{timeout} : {data} }}"))
}

/// Makes alike what nft versions write differently, and what the crate reads one way only: a single
/// flag is a string up to nft 1.1.3 and a list in 1.1.7; flags are a set; `-n` gives the number of
/// a reject code; an offset, which has 32 bits, is given as if its first bit were a sign.
fn normalise(json: &mut Value) {
    match json {
        Value::Array(list) => list.iter_mut().for_each(normalise),
        Value::Object(fields) => {
            if let Some(flags) = fields.get_mut("flags") {
                if flags.is_string() {
                    *flags = Value::Array(vec![flags.take()]);
                }
                if let Value::Array(list) = flags {
                    list.sort_by_key(Value::to_string);
                }
            }
            if fields.get("type").is_some_and(|kind| kind == "icmpx")
                && let Some(code) = fields.get_mut("expr")
                && let Some(name) = code.as_u64().and_then(icmpx_code)
            {
                *code = name.into();
            }
            if let Some(offset) = fields.get_mut("offset")
                && let Some(Ok(signed)) = offset.as_i64().map(i32::try_from)
            {
                *offset = signed.cast_unsigned().into();
            }
            fields.values_mut().for_each(normalise);
        }
        _ => {}
    }
}

/// `enum nft_reject_inet_code` of `nf_tables.h`
fn icmpx_code(code: u64) -> Option<&'static str> {
    let names = ["no-route", "port-unreachable", "host-unreachable", "admin-prohibited"];
    names.get(usize::try_from(code).ok()?).copied()
}

fn statement_text(statement: &Statement, counts: &mut Vec<Count>) -> Option<String> {
    Some(match statement {
        Statement::Accept(None) => "accept".to_owned(),
        Statement::Drop(None) => "drop".to_owned(),
        Statement::Continue(None) => "continue".to_owned(),
        Statement::Return(None) => "return".to_owned(),
        Statement::Jump(JumpTarget { target }) => format!("jump {target}"),
        Statement::Goto(JumpTarget { target }) => format!("goto {target}"),
        Statement::Match(relation) => relation_text(relation)?,
        Statement::Counter(Counter::Anonymous(Some(counter))) => {
            let value =
                |n: Option<usize>| n.and_then(|n| u64::try_from(n).ok()).unwrap_or_default();
            counts.push(Count { packets: value(counter.packets), bytes: value(counter.bytes) });
            "counter packets 0 bytes 0".to_owned()
        }
        Statement::Mangle(mangle) => {
            let kind = Kind::of(&mangle.key);
            format!("{} set {}", text(&mangle.key)?, value(&mangle.value, kind)?)
        }
        Statement::VerdictMap(map) => format!("{} vmap {}", text(&map.key)?, text(&map.data)?),
        Statement::DNAT(Some(nat)) => nat_text("dnat", nat)?,
        Statement::SNAT(Some(nat)) => nat_text("snat", nat)?,
        Statement::Masquerade(None) => "masquerade".to_owned(),
        Statement::Masquerade(Some(nat)) => nat_text("masquerade", nat)?,
        Statement::Reject(None) => "reject".to_owned(),
        Statement::Reject(Some(reject)) => match (reject._type, reject.expr) {
            // The default in the inet family.
            (Some(RejectType::ICMPX), Some(RejectCode::PortUnreach)) => "reject".to_owned(),
            (Some(RejectType::TCPReset), None) => "reject with tcp reset".to_owned(),
            (Some(kind), Some(code)) => format!("reject with {} {}", word(kind)?, word(code)?),
            _ => return None,
        },
        Statement::Limit(limit) => {
            if limit.rate_unit.as_ref().is_some_and(|unit| unit != "packets") {
                return None;
            }
            let over = if limit.inv == Some(true) { "over " } else { "" };
            let per = limit.per.as_ref()?;
            let burst = limit.burst.map(|b| format!(" burst {b} packets")).unwrap_or_default();
            format!("limit rate {over}{}/{per}{burst}", limit.rate)
        }
        Statement::Log(Some(log)) if log.level.is_none() && log.flags.is_none() => {
            let mut words = vec!["log".to_owned()];
            words.extend(log.prefix.as_ref().map(|prefix| format!("prefix \"{prefix}\"")));
            words.extend(log.group.map(|group| format!("group {group}")));
            words.extend(log.snaplen.map(|snaplen| format!("snaplen {snaplen}")));
            words.extend(log.queue_threshold.map(|n| format!("queue-threshold {n}")));
            words.join(" ")
        }
        _ => return None,
    })
}

fn relation_text(relation: &Match) -> Option<String> {
    let kind = Kind::of(&relation.left);
    let bits = matches!(kind, Kind::CtState | Kind::CtStatus);
    let operator = match relation.op {
        // Any of the bits.
        Operator::IN if bits => "",
        // A reader would take it for the above.
        Operator::EQ if bits => "== ",
        Operator::EQ if matches!(relation.left, Expression::BinaryOperation(_)) => "== ",
        Operator::EQ => "",
        Operator::NEQ => "!= ",
        _ => return None,
    };
    Some(format!("{} {operator}{}", text(&relation.left)?, value(&relation.right, kind)?))
}

fn nat_text(name: &str, nat: &NAT) -> Option<String> {
    let mut words = vec![name.to_owned()];
    words.extend(nat.family.map(|family| match family {
        NATFamily::IP => "ip".to_owned(),
        NATFamily::IP6 => "ip6".to_owned(),
    }));
    if nat.port.is_some() {
        return None;
    }
    if let Some(address) = &nat.addr {
        words.push(format!("to {}", text(address)?));
    }
    let mut flags = nat.flags.iter().flatten().map(word).collect::<Option<Vec<String>>>()?;
    flags.sort();
    if !flags.is_empty() {
        words.push(flags.join(","));
    }
    Some(words.join(" "))
}

/// An expression as nft prints it where its type does not matter.
fn text(expression: &Expression) -> Option<String> {
    value(expression, Kind::Plain)
}

/// How values beside an expression are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Mark,
    InterfaceName,
    CtState,
    CtStatus,
    AddressType,
    Protocol,
    Family,
}

impl Kind {
    fn of(expression: &Expression) -> Kind {
        use nftables::expr::{FibResult, MetaKey};
        match expression {
            Expression::Named(NamedExpression::Meta(meta)) => match meta.key {
                MetaKey::Mark => Kind::Mark,
                MetaKey::Iifname | MetaKey::Oifname => Kind::InterfaceName,
                MetaKey::L4proto => Kind::Protocol,
                MetaKey::Nfproto => Kind::Family,
                _ => Kind::Plain,
            },
            Expression::Named(NamedExpression::CT(ct)) => match &*ct.key {
                "state" => Kind::CtState,
                "status" => Kind::CtStatus,
                "mark" => Kind::Mark,
                _ => Kind::Plain,
            },
            Expression::Named(NamedExpression::Fib(fib)) if fib.result == FibResult::Type => {
                Kind::AddressType
            }
            Expression::BinaryOperation(operation) => match &**operation {
                BinaryOperation::AND(left, _) | BinaryOperation::XOR(left, _) => Kind::of(left),
                BinaryOperation::OR(operands) => operands.first().map_or(Kind::Plain, Kind::of),
                _ => Kind::Plain,
            },
            _ => Kind::Plain,
        }
    }
}

fn value(expression: &Expression, kind: Kind) -> Option<String> {
    Some(match expression {
        Expression::String(name) if kind == Kind::InterfaceName && !name.starts_with('@') => {
            format!("\"{name}\"")
        }
        Expression::String(name) => name.clone().into_owned(),
        Expression::Number(number) => number_text(*number, kind)?,
        Expression::List(items) => {
            items.iter().map(|item| value(item, kind)).collect::<Option<Vec<_>>>()?.join(",")
        }
        Expression::BinaryOperation(operation) => binary_text(operation)?,
        Expression::Range(range) => {
            format!("{}-{}", value(&range.range[0], kind)?, value(&range.range[1], kind)?)
        }
        Expression::Verdict(verdict) => verdict_text(verdict),
        Expression::Named(named) => named_text(named)?,
        Expression::Boolean(_) => return None,
    })
}

fn number_text(number: u32, kind: Kind) -> Option<String> {
    let name = |names: &[(u32, &'static str)]| {
        names.iter().find(|(value, _)| *value == number).map(|(_, name)| (*name).to_owned())
    };
    match kind {
        Kind::Plain => Some(number.to_string()),
        Kind::Mark => Some(format!("{number:#010x}")),
        Kind::InterfaceName => None,
        // enum ip_conntrack_info, include/uapi/linux/netfilter/nf_conntrack_common.h
        Kind::CtState => name(&[
            (1, "invalid"),
            (2, "established"),
            (4, "related"),
            (8, "new"),
            (64, "untracked"),
        ]),
        // enum ip_conntrack_status, in the same place
        Kind::CtStatus => name(&[
            (1, "expected"),
            (2, "seen-reply"),
            (4, "assured"),
            (8, "confirmed"),
            (16, "snat"),
            (32, "dnat"),
            (512, "dying"),
        ]),
        // RTN_*, include/uapi/linux/rtnetlink.h
        Kind::AddressType => name(&[
            (1, "unicast"),
            (2, "local"),
            (3, "broadcast"),
            (4, "anycast"),
            (5, "multicast"),
            (6, "blackhole"),
            (7, "unreachable"),
            (8, "prohibit"),
        ]),
        Kind::Protocol => Some(protocol(number)),
        // NFPROTO_*, include/uapi/linux/netfilter.h
        Kind::Family => name(&[(2, "ipv4"), (10, "ipv6")]),
    }
}

/// The name of a transport protocol (IANA), or its number.
pub(super) fn protocol(number: u32) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        132 => "sctp".to_owned(),
        other => other.to_string(),
    }
}

fn binary_text(operation: &BinaryOperation) -> Option<String> {
    let (operator, operands) = match operation {
        BinaryOperation::AND(left, right) => ("&", vec![left, right]),
        BinaryOperation::XOR(left, right) => ("^", vec![left, right]),
        BinaryOperation::OR(operands) => ("|", operands.iter().collect()),
        _ => return None,
    };
    let kind = operands.first().map_or(Kind::Plain, |left| Kind::of(left));
    let operands = operands.into_iter().map(|operand| value(operand, kind));
    Some(operands.collect::<Option<Vec<_>>>()?.join(&format!(" {operator} ")))
}

fn named_text(named: &NamedExpression) -> Option<String> {
    Some(match named {
        NamedExpression::Concat(parts) => {
            parts.iter().map(text).collect::<Option<Vec<_>>>()?.join(" . ")
        }
        NamedExpression::Map(map) => format!("{} map {}", text(&map.key)?, text(&map.data)?),
        NamedExpression::Prefix(prefix) => format!("{}/{}", text(&prefix.addr)?, prefix.len),
        NamedExpression::Payload(Payload::PayloadField(payload)) => {
            format!("{} {}", payload.protocol, payload.field)
        }
        NamedExpression::Meta(meta) => match word(meta.key)? {
            name if name.starts_with("iif") || name.starts_with("oif") => name,
            name => format!("meta {name}"),
        },
        NamedExpression::CT(ct) => {
            let family = ct.family.map(word).unwrap_or_default().map(|f| format!(" {f}"));
            let direction = ct.dir.map(word).unwrap_or_default().map(|d| format!("{d} "));
            let (family, direction) = (family.unwrap_or_default(), direction.unwrap_or_default());
            format!("ct {direction}{}{family}", ct.key)
        }
        NamedExpression::Numgen(numgen) => {
            let mode = match numgen.mode {
                NgMode::Inc => "inc",
                NgMode::Random => "random",
            };
            let offset = numgen.offset.filter(|offset| *offset != 0);
            let offset = offset.map(|offset| format!(" offset {offset}")).unwrap_or_default();
            format!("numgen {mode} mod {}{offset}", numgen.ng_mod)
        }
        NamedExpression::JHash(hash) => {
            let seed = hash.seed.map(|seed| format!(" seed {seed:#x}")).unwrap_or_default();
            let offset = hash.offset.filter(|offset| *offset != 0);
            let offset = offset.map(|offset| format!(" offset {offset}")).unwrap_or_default();
            format!("jhash {} mod {}{seed}{offset}", text(&hash.expr)?, hash.hash_mod)
        }
        NamedExpression::Fib(fib) => {
            let mut flags = fib.flags.iter().map(word).collect::<Option<Vec<_>>>()?;
            flags.sort();
            format!("fib {} {}", flags.join(" . "), word(fib.result)?)
        }
        _ => return None,
    })
}

/// A verdict as nft prints it.
pub(super) fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".to_owned(),
        Verdict::Drop => "drop".to_owned(),
        Verdict::Continue => "continue".to_owned(),
        Verdict::Return => "return".to_owned(),
        Verdict::Jump(JumpTarget { target }) => format!("jump {target}"),
        Verdict::Goto(JumpTarget { target }) => format!("goto {target}"),
    }
}

/// The one word that a value without fields is in JSON, which is nft's.
pub(super) fn word(value: impl Serialize) -> Option<String> {
    Some(serde_json::to_value(value).ok()?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statements_print_as_nft_prints_them() {
        let daddr = || json!({"payload": {"protocol": "ip", "field": "daddr"}});
        let mark = || json!({"meta": {"key": "mark"}});
        let matching = |left: Value, op: &str, right: Value| json!({"match": {"left": left, "op": op, "right": right}});
        let ct =
            |key: &str, op: &str, right: Value| matching(json!({"ct": {"key": key}}), op, right);
        let fib = |right: Value| {
            matching(json!({"fib": {"result": "type", "flags": ["daddr"]}}), "==", right)
        };
        let reject = |code: Value| json!({"reject": {"type": "icmpx", "expr": code}});
        let table = [
            (json!({"accept": null}), "accept"),
            (json!({"drop": null}), "drop"),
            (json!({"return": null}), "return"),
            (json!({"continue": null}), "continue"),
            (json!({"jump": {"target": "a"}}), "jump a"),
            (json!({"goto": {"target": "fw-a/b"}}), "goto fw-a/b"),
            (matching(daddr(), "==", json!("@set")), "ip daddr @set"),
            (
                matching(daddr(), "!=", json!({"prefix": {"addr": "127.0.0.0", "len": 8}})),
                "ip daddr != 127.0.0.0/8",
            ),
            (
                matching(daddr(), "==", json!({"range": ["10.0.0.1", "10.0.0.9"]})),
                "ip daddr 10.0.0.1-10.0.0.9",
            ),
            (
                matching(
                    json!({"concat": [daddr(), {"meta": {"key": "l4proto"}}]}),
                    "==",
                    json!("@s"),
                ),
                "ip daddr . meta l4proto @s",
            ),
            (matching(json!({"meta": {"key": "iifname"}}), "!=", json!("lo")), "iifname != \"lo\""),
            (matching(json!({"meta": {"key": "l4proto"}}), "==", json!(17)), "meta l4proto udp"),
            (ct("state", "in", json!("new")), "ct state new"),
            (ct("state", "in", json!(8)), "ct state new"),
            (ct("state", "in", json!(["established", "related"])), "ct state established,related"),
            (ct("state", "==", json!("new")), "ct state == new"),
            (ct("state", "!=", json!("new")), "ct state != new"),
            (ct("status", "in", json!("dnat")), "ct status dnat"),
            (ct("status", "in", json!(32)), "ct status dnat"),
            (fib(json!("local")), "fib daddr type local"),
            (fib(json!(2)), "fib daddr type local"),
            (
                matching(json!({"&": [mark(), 16384]}), "==", json!(16384)),
                "meta mark & 0x00004000 == 0x00004000",
            ),
            (
                json!({"mangle": {"key": mark(), "value": {"|": [mark(), 16384]}}}),
                "meta mark set meta mark | 0x00004000",
            ),
            (
                json!({"mangle": {"key": mark(), "value": {"^": [mark(), 16384]}}}),
                "meta mark set meta mark ^ 0x00004000",
            ),
            (json!({"vmap": {"key": daddr(), "data": "@map"}}), "ip daddr vmap @map"),
            (
                json!({"dnat": {"family": "ip6", "addr": {"map": {
                    "key": {"concat": [daddr(), {"numgen": {"mode": "random", "mod": 3, "offset": 0}}]},
                    "data": "@endpoints",
                }}}}),
                "dnat ip6 to ip daddr . numgen random mod 3 map @endpoints",
            ),
            (
                json!({"dnat": {"family": "ip", "addr": {"map": {
                    "key": {"numgen": {"mode": "random", "mod": 1, "offset": -2_147_483_648_i64}},
                    "data": "@endpoints",
                }}}}),
                "dnat ip to numgen random mod 1 offset 2147483648 map @endpoints",
            ),
            (json!({"masquerade": null}), "masquerade"),
            (json!({"masquerade": {"flags": "fully-random"}}), "masquerade fully-random"),
            (
                json!({"masquerade": {"flags": ["random", "persistent"]}}),
                "masquerade persistent,random",
            ),
            (json!({"reject": null}), "reject"),
            (json!({"reject": {"type": "tcp reset"}}), "reject with tcp reset"),
            (reject(json!("port-unreachable")), "reject"),
            (reject(json!(1)), "reject"),
            (reject(json!(3)), "reject with icmpx admin-prohibited"),
            (
                json!({"limit": {"rate": 1, "burst": 10, "per": "second"}}),
                "limit rate 1/second burst 10 packets",
            ),
            (
                json!({"limit": {"rate": 1, "burst": 5, "per": "second", "inv": true}}),
                "limit rate over 1/second burst 5 packets",
            ),
            (
                json!({"log": {"prefix": "a/b", "group": 3210, "snaplen": 64}}),
                "log prefix \"a/b\" group 3210 snaplen 64",
            ),
        ];
        for (json, expected) in table {
            let rule = rule(vec![json.clone()], None);
            assert_eq!(rule, Rule { text: expected.into(), counts: vec![] }, "{json}");
        }
    }

    #[test]
    fn what_is_not_printed_stays_json() {
        for json in [
            r#"{"unheard-of":{"a":1}}"#,
            r#"{"counter":"named"}"#,
            r#"{"accept":{}}"#,
            r#"{"queue":{"num":3}}"#,
            r#"{"limit":{"burst":0,"per":"second","rate":1,"rate_unit":"mbytes"}}"#,
            r#"{"log":{"level":"debug"}}"#,
            r#"{"xt":null}"#,
            // The crate has no room for these fields.
            r#"{"dnat":{"addr":"10.0.0.1","type_flags":["prefix"]}}"#,
            r#"{"log":{"group":3210,"prefix":"a/b","whim":1}}"#,
            r#"{"match":{"left":{"meta":{"key":"mark","whim":1}},"op":"==","right":1}}"#,
            // Beyond what a mark can be.
            r#"{"match":{"left":{"meta":{"key":"mark"}},"op":"==","right":4294967296}}"#,
        ] {
            let rule = rule(vec![serde_json::from_str(json).unwrap()], None);
            assert_eq!(rule.text, json);
        }
    }

    #[test]
    fn counters_are_kept_aside() {
        let counter =
            json!({"counter": {"packets": 4_294_967_296_u64, "bytes": 9_999_999_999_u64}});
        let got = rule(vec![counter, json!({"drop": null})], Some("refused"));
        assert_eq!(got.text, "counter packets 0 bytes 0 drop comment \"refused\"");
        assert_eq!(got.counts, [Count { packets: 1 << 32, bytes: 9_999_999_999 }]);
    }
}
