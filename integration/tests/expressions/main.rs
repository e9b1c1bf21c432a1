//! Every expression and every kind of element that the library encodes, on the real kernel: what
//! is written is listed by nft as expected, and a packet that crosses it meets the expected fate.

mod actions;
mod clients;
mod elements;
mod matches;
mod verdicts;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::model::Family;
use portcullis::netlink::{
    Batch, Chain, ChainKind, CmpOp, Element, Expression, Hook, Hooked, MetaKey, NatKind,
    PayloadBase, Register, Rule, Set, Socket, TableFlags, Verdict,
};
use portcullis_integration::lab::{Host, Lab};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Outcome, Probe, Protocol, Server, probe_all};

const TABLE: &str = "test";
/// Where all servers listen, and a second port where those of the node do.
const PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;
/// How long silence is waited for: a packet needs less than a millisecond here.
const SILENCE: Duration = Duration::from_millis(250);

/// Something to write, how nft lists it, and what it does to packets.
struct Case {
    name: &'static str,
    /// Writes sets and elements.
    sets: fn(&mut Batch),
    /// Chains, in the order in which they are listed.
    chains: Vec<(&'static str, Option<Hooked>)>,
    rules: Vec<(&'static str, Vec<Expression>)>,
    /// What `nft list table` prints between the braces of the table, white space aside.
    listed: &'static str,
    /// Sends packets and looks at what becomes of them.
    fate: fn(&World) -> Result<()>,
}

impl Case {
    /// A case of one base chain `c` with one rule.
    fn rule(
        name: &'static str,
        hooked: Hooked,
        rule: Vec<Expression>,
        listed: &'static str,
        fate: fn(&World) -> Result<()>,
    ) -> Case {
        let (chains, rules) = (vec![("c", Some(hooked))], vec![("c", rule)]);
        Case { name, sets: |_| {}, chains, rules, listed, fate }
    }
}

/// The laboratory with a server on the node and on each of two pods.
struct World {
    lab: Lab,
    _servers: Vec<Server>,
}

/// What a packet should meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// This server answers.
    By(&'static str),
    /// Nothing comes back.
    Silence,
    /// The port is refused.
    Refusal,
}

#[test]
fn what_is_written_is_listed_and_works() -> Result<()> {
    if !available(&[Requirement::Root, Requirement::Nft]) {
        return Ok(());
    }
    let world = World::new()?;
    let (mut seen, mut failed) = (BTreeSet::new(), Vec::new());
    let cases = [
        matches::cases(),
        verdicts::cases(),
        actions::cases(),
        elements::cases(),
        clients::cases(),
    ];
    for case in cases.iter().flatten() {
        if let Err(error) = world.run(case) {
            failed.push(format!("case {:?}: {error:#}", case.name));
        }
        world.commit(Batch::delete_table)?;
        seen.extend(case.rules.iter().flat_map(|(_, rule)| rule).map(kind));
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let missing: Vec<&str> = KINDS.iter().copied().filter(|kind| !seen.contains(kind)).collect();
    assert!(missing.is_empty(), "no case writes {missing:?}");
    Ok(())
}

/// What [`kind`] can give.
const KINDS: &[&str] = &[
    "payload",
    "meta",
    "meta set",
    "ct",
    "ct original",
    "fib",
    "fib saddr",
    "jhash",
    "numgen",
    "bitwise",
    "cmp eq",
    "cmp neq",
    "lookup",
    "lookup inverted",
    "lookup map",
    "lookup vmap",
    "update map",
    "immediate",
    "accept",
    "drop",
    "jump",
    "goto",
    "return",
    "nat",
    "masquerade",
    "reject",
    "reject with reset",
    "counter",
    "limit",
    "log",
    "delete from map",
];

/// What an expression is, so that none is forgotten: a new variant does not compile here.
fn kind(expression: &Expression) -> &'static str {
    use portcullis::netlink::Data;
    match expression {
        Expression::Payload { .. } => "payload",
        Expression::Meta { .. } => "meta",
        Expression::MetaSet { .. } => "meta set",
        Expression::Ct { .. } => "ct",
        Expression::CtOriginal { .. } => "ct original",
        Expression::FibDaddrType { .. } => "fib",
        Expression::FibSaddrType { .. } => "fib saddr",
        Expression::JenkinsHash { .. } => "jhash",
        Expression::LookupInverted { .. } => "lookup inverted",
        Expression::UpdateMap { .. } => "update map",
        Expression::DeleteFromMap { .. } => "delete from map",
        Expression::NumgenRandom { .. } => "numgen",
        Expression::Bitwise { .. } => "bitwise",
        Expression::Cmp { op: CmpOp::Eq, .. } => "cmp eq",
        Expression::Cmp { op: CmpOp::Neq, .. } => "cmp neq",
        Expression::Lookup { .. } => "lookup",
        Expression::LookupMap { into: Register::VERDICT, .. } => "lookup vmap",
        Expression::LookupMap { .. } => "lookup map",
        Expression::Immediate { data: Data::Value(_), .. } => "immediate",
        Expression::Immediate { data: Data::Verdict(verdict), .. } => match verdict {
            Verdict::Accept => "accept",
            Verdict::Drop => "drop",
            Verdict::Jump(_) => "jump",
            Verdict::Goto(_) => "goto",
            Verdict::Return => "return",
        },
        Expression::Nat { .. } => "nat",
        Expression::MasqueradeFullyRandom => "masquerade",
        Expression::RejectPortUnreachable => "reject",
        Expression::RejectTcpReset => "reject with reset",
        Expression::Counter => "counter",
        Expression::Limit { .. } => "limit",
        Expression::LogGroup { .. } => "log",
    }
}

impl World {
    fn new() -> Result<World> {
        let lab = Lab::new(2)?;
        // For intervals: neighbours of the client's own address.
        lab.allowed.ip(&[
            "addr add 192.0.2.9/24 dev eth0",
            "addr add 192.0.2.11/24 dev eth0",
            "addr add 192.0.2.12/24 dev eth0",
            // Never chosen by itself.
            "addr add 2001:db8:1::11/64 dev eth0 nodad preferred_lft 0",
        ])?;
        let mut servers = Vec::new();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for host in [&lab.node, &lab.pods[0], &lab.pods[1]] {
                servers.push(Server::start(host, host.name(), protocol, PORT)?);
            }
            servers.push(Server::start(&lab.node, "node", protocol, OTHER_PORT)?);
        }
        Ok(World { lab, _servers: servers })
    }

    fn run(&self, case: &Case) -> Result<()> {
        self.write(case)?;
        let text = self.listing()?;
        let expected = format!("table inet {TABLE} {{ {} }}", collapse(case.listed));
        ensure!(text == expected, "nft lists\n{text}\nand not\n{expected}");
        let json = self.lab.node.run(&["nft", "-j", "list", "ruleset"])?;
        let json: serde_json::Value = serde_json::from_str(&json).context("nft -j")?;
        let objects = json["nftables"].as_array().context("nft -j lists no objects")?;
        let rules = objects.iter().filter(|object| object.get("rule").is_some()).count();
        ensure!(rules == case.rules.len(), "nft -j lists {rules} rules");
        (case.fate)(self)
    }

    fn write(&self, case: &Case) -> Result<()> {
        self.commit(|batch| {
            batch.add_table(TableFlags::NONE, None);
            for (name, hooked) in &case.chains {
                batch.add_chain(&Chain { name, hooked: *hooked, comment: None });
            }
            (case.sets)(batch);
            for (chain, expressions) in &case.rules {
                batch.add_rule(&Rule { chain, expressions, comment: None });
            }
        })
    }

    /// Commits a transaction on the table, on the node.
    fn commit(&self, fill: impl FnOnce(&mut Batch) + Send) -> Result<()> {
        self.lab.node.enter(|| {
            let mut batch = Batch::new(TABLE);
            fill(&mut batch);
            Ok(Socket::open()?.commit(batch)?)
        })
    }

    /// What nft lists of the table, with single spaces and without what time changes.
    fn listing(&self) -> Result<String> {
        let text = self.lab.node.run(&["nft", "list", "table", "inet", TABLE])?;
        let mut words: Vec<&str> = Vec::new();
        for word in text.split_whitespace() {
            words.push(match words.last() {
                Some(&"expires") if word.ends_with(',') => "SOON,",
                Some(&"expires") => "SOON",
                _ => word,
            });
        }
        Ok(words.join(" "))
    }

    /// How many packets the counter saw that stands behind `text` in the listing.
    fn packets(&self, text: &str) -> Result<u64> {
        let listing = self.listing()?;
        let find = || {
            let (_, behind) = listing.split_once(text)?;
            let (_, count) = behind.split_once("counter packets ")?;
            count.split(' ').next()?.parse().ok()
        };
        find().with_context(|| format!("no counter behind {text:?} in {listing}"))
    }

    /// Checks that the counter behind `text` saw `expected` packets.
    fn expect_packets(&self, text: &str, expected: u64) -> Result<()> {
        let packets = self.packets(text)?;
        ensure!(packets == expected, "{packets} packets behind {text:?}, not {expected}");
        Ok(())
    }
}

/// Sends a packet of each kind from `from` and checks its fate.
fn expect(from: &Host, packets: &[(Probe, Fate)]) -> Result<()> {
    let questions: Vec<Probe> = packets
        .iter()
        .map(|(probe, fate)| match fate {
            Fate::Silence => probe.timeout(SILENCE),
            Fate::By(_) | Fate::Refusal => *probe,
        })
        .collect();
    for ((probe, fate), outcome) in packets.iter().zip(probe_all(from, &questions)?) {
        let met = match fate {
            Fate::By(name) => outcome.by() == Some(name),
            Fate::Silence => outcome == Outcome::TimedOut,
            Fate::Refusal => outcome == Outcome::Refused,
        };
        ensure!(met, "from {}: {probe:?}: {outcome:?}, not {fate:?}", from.name());
    }
    Ok(())
}

/// The node's addresses, IPv4 first.
fn node(world: &World) -> [IpAddr; 2] {
    [world.lab.node.v4.into(), world.lab.node.v6.into()]
}

fn collapse(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn udp(to: impl Into<IpAddr>, port: u16) -> Probe {
    Probe::new((to.into(), port), Protocol::Udp)
}

fn tcp(to: impl Into<IpAddr>, port: u16) -> Probe {
    Probe::new((to.into(), port), Protocol::Tcp)
}

const fn hooked(kind: ChainKind, hook: Hook, priority: i32) -> Hooked {
    Hooked { kind, hook, priority }
}

const INPUT: Hooked = hooked(ChainKind::Filter, Hook::Input, 0);
const OUTPUT: Hooked = hooked(ChainKind::Filter, Hook::Output, 0);
const FORWARD: Hooked = hooked(ChainKind::Filter, Hook::Forward, 0);
/// Before translation, as the source firewall.
const PREROUTING: Hooked = hooked(ChainKind::Filter, Hook::Prerouting, -110);
const NAT_PREROUTING: Hooked = hooked(ChainKind::Nat, Hook::Prerouting, -100);
const NAT_OUTPUT: Hooked = hooked(ChainKind::Nat, Hook::Output, -100);
const NAT_POSTROUTING: Hooked = hooked(ChainKind::Nat, Hook::Postrouting, 100);

/// The register at which every key starts here.
const FIRST: Register = Register::word(0);

fn network(offset: u32, length: u32, into: Register) -> Expression {
    Expression::Payload { base: PayloadBase::Network, offset, length, into }
}

fn saddr4(into: Register) -> Expression {
    network(12, 4, into)
}

fn daddr4(into: Register) -> Expression {
    network(16, 4, into)
}

fn saddr6(into: Register) -> Expression {
    network(8, 16, into)
}

fn daddr6(into: Register) -> Expression {
    network(24, 16, into)
}

fn dport(into: Register) -> Expression {
    Expression::Payload { base: PayloadBase::Transport, offset: 2, length: 2, into }
}

fn meta(key: MetaKey, into: Register) -> Expression {
    Expression::Meta { key, into }
}

fn eq(with: &[u8]) -> Expression {
    Expression::Cmp { register: FIRST, op: CmpOp::Eq, with: with.to_vec() }
}

fn neq(with: &[u8]) -> Expression {
    Expression::Cmp { register: FIRST, op: CmpOp::Neq, with: with.to_vec() }
}

/// `meta nfproto ipv4`, which nft does not print where `ip` follows.
fn ip4() -> [Expression; 2] {
    [meta(MetaKey::NfProto, FIRST), eq(&[2])]
}

fn ip6() -> [Expression; 2] {
    [meta(MetaKey::NfProto, FIRST), eq(&[10])]
}

/// `th dport PORT`
fn to_port(port: u16) -> [Expression; 2] {
    [dport(FIRST), eq(&port.to_be_bytes())]
}

fn mask(mask: u32, xor: u32) -> Expression {
    let (mask, xor) = (mask.to_ne_bytes().to_vec(), xor.to_ne_bytes().to_vec());
    Expression::Bitwise { register: FIRST, mask, xor }
}

/// Loads a constant into the first register.
fn load(bytes: &[u8]) -> Expression {
    load_at(0, bytes)
}

/// Loads a constant into the register `word` words behind the first.
fn load_at(word: u32, bytes: &[u8]) -> Expression {
    let data = portcullis::netlink::Data::Value(bytes.to_vec());
    Expression::Immediate { into: Register::word(word), data }
}

/// Translates to the address in the first register and the port that follows it.
fn nat(kind: NatKind, family: Family) -> Expression {
    let port = Register::word(if family == Family::V4 { 1 } else { 4 });
    Expression::Nat { kind, family, address: FIRST, port }
}

fn look_up(set: &str) -> Expression {
    Expression::Lookup { set: set.to_owned(), key: FIRST }
}

fn look_up_in_map(map: &str, into: Register) -> Expression {
    Expression::LookupMap { map: map.to_owned(), key: FIRST, into }
}

/// `counter` and a verdict.
fn counted(verdict: Verdict) -> [Expression; 2] {
    [Expression::Counter, Expression::verdict(verdict)]
}

/// A rule from parts.
macro_rules! rule {
    ($($part:expr),* $(,)?) => {
        [$(Vec::from($part)),*].concat()
    };
}
use rule;

// nft's numbers of types (`enum datatypes`).
const IPV4_ADDR: u32 = 7;
const IPV6_ADDR: u32 = 8;
const INET_PROTO: u32 = 12;
const INET_SERVICE: u32 = 13;
const MARK: u32 = 19;

/// The type of a concatenation.
fn concatenation(types: &[u32]) -> u32 {
    types.iter().fold(0, |all, one| all << 6 | one)
}

/// A set that is nothing but keys.
fn set<'a>(name: &'a str, types: &[u32]) -> Set<'a> {
    let length = types.iter().map(|kind| if *kind == IPV6_ADDR { 16 } else { 4 }).sum();
    Set {
        name,
        key_type: concatenation(types),
        key_length: length,
        data: None,
        interval: false,
        timeout: false,
        dynamic: false,
        size: None,
        comment: None,
    }
}

/// Adds elements that are nothing but keys.
fn add_keys(batch: &mut Batch, set: &str, keys: &[&[u8]]) {
    for key in keys {
        batch.add_element(set, &Element::key(key));
    }
}
