//! Rules in the making: expressions, and the nft line that a listing prints for them, side by side.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::model::{Family, Protocol};
use crate::netlink::{
    CmpOp, CtKey, CtOriginalKey, Expression, LimitUnit, MetaKey, NatKind, PayloadBase, Register,
    Verdict,
};

use super::sets::SetName;

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSpec {
    /// The line that nft prints, without the comment.
    pub text: String,
    /// What the kernel gets.
    pub expressions: Vec<Expression>,
    /// A comment for readers. It also tells a rule of ours from another: adoption compares it.
    pub comment: Option<&'static str>,
}

/// Something that can be asked of a packet and looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Selector {
    SourceAddress(Family),
    /// So many bits of the source address; not none, and not all.
    SourceNetwork(Family, u8),
    DestinationAddress(Family),
    L4Proto,
    DestinationPort,
    InputInterface,
    /// Of the connection's first packet, before any translation.
    OriginalSource(Family),
    /// Of the connection's first packet, before any translation.
    OriginalDestination(Family),
    /// Of the connection's first packet, before any translation.
    OriginalDestinationPort,
    /// So many numbers from the offset on, by chance.
    Random {
        modulus: u32,
        offset: u32,
    },
    /// So many numbers from the offset on, by the source address.
    SourceHash {
        family: Family,
        modulus: u32,
        offset: u32,
    },
}

/// What tells our hash of source addresses from others; the same on every node.
const HASH_SEED: u32 = 0x706f_7274;

/// A rule that grows from left to right, as its text reads.
#[derive(Debug, Default)]
pub(super) struct RuleBuilder {
    words: Vec<String>,
    expressions: Vec<Expression>,
    /// The family that the rule is already known to see.
    family: Option<Family>,
}

impl RuleBuilder {
    pub fn new() -> RuleBuilder {
        RuleBuilder::default()
    }

    /// `ct state new`
    pub fn ct_state_new(self) -> Self {
        // NF_CT_STATE_BIT(IP_CT_NEW), include/uapi/linux/netfilter/nf_conntrack_common.h
        self.ct_bits("ct state new", CtKey::State, 1 << 3)
    }

    /// `ct state related,new`: also what a connection tracking helper expects, as the data
    /// connection of an FTP session.
    pub fn ct_state_related_or_new(self) -> Self {
        self.ct_bits("ct state related,new", CtKey::State, 1 << 2 | 1 << 3) // IP_CT_RELATED, IP_CT_NEW
    }

    /// `ct status dnat`
    pub fn ct_status_dnat(self) -> Self {
        self.ct_bits("ct status dnat", CtKey::Status, 1 << 5) // IPS_DST_NAT
    }

    fn ct_bits(mut self, text: &str, key: CtKey, bits: u32) -> Self {
        let register = Register::word(0);
        self.word(text);
        self.expressions.extend([
            Expression::Ct { key, into: register },
            Expression::Bitwise {
                register,
                mask: bits.to_ne_bytes().to_vec(),
                xor: 0_u32.to_ne_bytes().to_vec(),
            },
            Expression::Cmp { register, op: CmpOp::Neq, with: 0_u32.to_ne_bytes().to_vec() },
        ]);
        self
    }

    /// `iifname != "lo"`
    pub fn not_from_loopback(mut self) -> Self {
        let mut name = b"lo".to_vec();
        name.resize(16, 0); // IFNAMSIZ
        self.word("iifname != \"lo\"");
        self.expressions.extend([
            Expression::Meta { key: MetaKey::IifName, into: Register::word(0) },
            Expression::Cmp { register: Register::word(0), op: CmpOp::Neq, with: name },
        ]);
        self
    }

    /// `ip daddr != 127.0.0.0/8`, `ip6 daddr != ::1`
    pub fn not_to_loopback(mut self, family: Family) -> Self {
        self.see(family);
        let (length, with) = match family {
            // nft compares a prefix of whole bytes by loading those bytes only.
            Family::V4 => (1, vec![127]),
            Family::V6 => (16, Ipv6Addr::LOCALHOST.octets().to_vec()),
        };
        self.word(match family {
            Family::V4 => "ip daddr != 127.0.0.0/8",
            Family::V6 => "ip6 daddr != ::1",
        });
        self.expressions.extend([
            Expression::Payload {
                base: PayloadBase::Network,
                offset: destination_offset(family),
                length,
                into: Register::word(0),
            },
            Expression::Cmp { register: Register::word(0), op: CmpOp::Neq, with },
        ]);
        self
    }

    /// `ip daddr 127.0.0.0/8`
    pub fn with_loopback_destination(self) -> Self {
        self.loopback4("ip daddr 127.0.0.0/8", destination_offset(Family::V4))
    }

    /// `ip saddr 127.0.0.0/8`
    pub fn with_loopback_source(self) -> Self {
        self.loopback4("ip saddr 127.0.0.0/8", source_offset(Family::V4))
    }

    fn loopback4(mut self, text: &str, offset: u32) -> Self {
        self.see(Family::V4);
        self.word(text);
        let into = Register::word(0);
        self.expressions.extend([
            // As above.
            Expression::Payload { base: PayloadBase::Network, offset, length: 1, into },
            Expression::Cmp { register: into, op: CmpOp::Eq, with: vec![127] },
        ]);
        self
    }

    /// `fib daddr type local`
    pub fn at_local_address(self) -> Self {
        self.local("fib daddr type local", Expression::FibDaddrType { into: Register::word(0) })
    }

    /// `fib saddr type local`
    pub fn by_local_address(self) -> Self {
        self.local("fib saddr type local", Expression::FibSaddrType { into: Register::word(0) })
    }

    fn local(mut self, text: &str, fib: Expression) -> Self {
        self.word(text);
        self.expressions.extend([
            fib,
            Expression::Cmp {
                register: Register::word(0),
                op: CmpOp::Eq,
                with: 2_u32.to_ne_bytes().to_vec(), // RTN_LOCAL, include/uapi/linux/rtnetlink.h
            },
        ]);
        self
    }

    /// `SELECTORS @SET`
    pub fn in_set(mut self, selectors: &[Selector], set: &SetName) -> Self {
        let key = self.load(selectors);
        self.word(&format!("{key} @{set}"));
        let set = set.name().into_owned();
        self.expressions.push(Expression::Lookup { set, key: Register::word(0) });
        self
    }

    /// `SELECTORS != @SET`
    pub fn not_in_set(mut self, selectors: &[Selector], set: &SetName) -> Self {
        let key = self.load(selectors);
        self.word(&format!("{key} != @{set}"));
        let set = set.name().into_owned();
        self.expressions.push(Expression::LookupInverted { set, key: Register::word(0) });
        self
    }

    /// `SELECTORS vmap @MAP`
    pub fn vmap(mut self, selectors: &[Selector], map: &SetName) -> Self {
        let key = self.load(selectors);
        self.word(&format!("{key} vmap @{map}"));
        self.expressions.push(Expression::LookupMap {
            map: map.name().into_owned(),
            key: Register::word(0),
            into: Register::VERDICT,
        });
        self
    }

    /// `dnat ip to SELECTORS map @MAP`
    pub fn dnat_map(mut self, family: Family, selectors: &[Selector], map: &SetName) -> Self {
        let key = self.load(selectors);
        self.word(&format!("dnat {} to {key} map @{map}", ip(family)));
        self.expressions.extend([
            Expression::LookupMap {
                map: map.name().into_owned(),
                key: Register::word(0),
                into: Register::word(0),
            },
            Expression::Nat {
                kind: NatKind::Destination,
                family,
                address: Register::word(0),
                port: Register::word(if family == Family::V4 { 1 } else { 4 }),
            },
        ]);
        self
    }

    /// `update @MAP { KEY timeout TIMEOUT : ip daddr . th dport }`, the address of `family`.
    pub fn remember(
        mut self,
        family: Family,
        key: &[Selector],
        map: &SetName,
        seconds: u32,
    ) -> Self {
        let (key_text, data_text, data) = self.load_client(family, key);
        let timeout = duration(seconds);
        self.word(&format!("update @{map} {{ {key_text} timeout {timeout} : {data_text} }}"));
        self.expressions.push(Expression::UpdateMap {
            map: map.name().into_owned(),
            key: Register::word(0),
            data,
            timeout: u64::from(seconds) * 1000,
        });
        self
    }

    /// `delete @MAP { KEY : ip daddr . th dport }`, the address of `family`.
    pub fn forget(mut self, family: Family, key: &[Selector], map: &SetName) -> Self {
        let (key_text, data_text, data) = self.load_client(family, key);
        self.word(&format!("delete @{map} {{ {key_text} : {data_text} }}"));
        self.expressions.push(Expression::DeleteFromMap {
            map: map.name().into_owned(),
            key: Register::word(0),
            data,
        });
        self
    }

    /// Loads a key, and behind it where the packet goes; returns the texts and where the latter is.
    fn load_client(&mut self, family: Family, key: &[Selector]) -> (String, String, Register) {
        // Before anything is in the registers.
        self.see(family);
        let data = [Selector::DestinationAddress(family), Selector::DestinationPort];
        let key_text = self.load(key);
        let data_at = key.iter().map(|selector| selector.words()).sum();
        let data_text = self.load_from(data_at, &data);
        (key_text, data_text, Register::word(data_at))
    }

    /// `meta mark & BIT == BIT`
    pub fn marked(mut self, bit: u32) -> Self {
        let register = Register::word(0);
        self.word(&format!("meta mark & {bit:#010x} == {bit:#010x}"));
        self.expressions.extend([
            Expression::Meta { key: MetaKey::Mark, into: register },
            Expression::Bitwise {
                register,
                mask: bit.to_ne_bytes().to_vec(),
                xor: 0_u32.to_ne_bytes().to_vec(),
            },
            Expression::Cmp { register, op: CmpOp::Eq, with: bit.to_ne_bytes().to_vec() },
        ]);
        self
    }

    /// `meta mark set meta mark | BIT`
    pub fn mark(self, bit: u32) -> Self {
        self.set_mark(&format!("meta mark set meta mark | {bit:#010x}"), !bit, bit)
    }

    /// `meta mark set meta mark ^ BIT`
    pub fn flip_mark(self, bit: u32) -> Self {
        self.set_mark(&format!("meta mark set meta mark ^ {bit:#010x}"), u32::MAX, bit)
    }

    fn set_mark(mut self, text: &str, mask: u32, xor: u32) -> Self {
        let register = Register::word(0);
        self.word(text);
        self.expressions.extend([
            Expression::Meta { key: MetaKey::Mark, into: register },
            Expression::Bitwise {
                register,
                mask: mask.to_ne_bytes().to_vec(),
                xor: xor.to_ne_bytes().to_vec(),
            },
            Expression::MetaSet { key: MetaKey::Mark, from: register },
        ]);
        self
    }

    /// `masquerade fully-random`
    pub fn masquerade(mut self) -> Self {
        self.word("masquerade fully-random");
        self.expressions.push(Expression::MasqueradeFullyRandom);
        self
    }

    /// `meta l4proto tcp`
    pub fn tcp(mut self) -> Self {
        let protocol = Protocol::Tcp;
        self.word(&format!("meta l4proto {protocol}"));
        self.expressions.extend([
            Expression::Meta { key: MetaKey::L4Proto, into: Register::word(0) },
            Expression::Cmp {
                register: Register::word(0),
                op: CmpOp::Eq,
                with: vec![protocol.number()],
            },
        ]);
        self
    }

    /// `reject with tcp reset`
    pub fn reject_with_reset(mut self) -> Self {
        self.word("reject with tcp reset");
        self.expressions.push(Expression::RejectTcpReset);
        self
    }

    /// `reject`: ICMP port unreachable.
    pub fn reject(mut self) -> Self {
        self.word("reject");
        self.expressions.push(Expression::RejectPortUnreachable);
        self
    }

    /// `counter`, as it is listed before the first packet.
    pub fn counter(mut self) -> Self {
        self.word("counter packets 0 bytes 0");
        self.expressions.push(Expression::Counter);
        self
    }

    /// `limit rate RATE/second burst BURST packets`
    pub fn limit_per_second(mut self, rate: u64, burst: u32) -> Self {
        self.word(&format!("limit rate {rate}/second burst {burst} packets"));
        self.expressions.push(Expression::Limit { rate, unit: LimitUnit::Second, burst });
        self
    }

    /// `log prefix PREFIX group GROUP snaplen SNAPLEN`
    pub fn log(mut self, prefix: &str, group: u16, snaplen: u32) -> Self {
        // NF_LOG_PREFIXLEN is 128 with the NUL.
        let prefix = prefix[..prefix.floor_char_boundary(127)].to_owned();
        self.word(&format!("log prefix \"{prefix}\" group {group} snaplen {snaplen}"));
        self.expressions.push(Expression::LogGroup { prefix, group, snaplen });
        self
    }

    /// A verdict at the rule's end.
    pub fn verdict(mut self, verdict: Verdict) -> Self {
        let text = match &verdict {
            Verdict::Accept => "accept".to_owned(),
            Verdict::Drop => "drop".to_owned(),
            Verdict::Return => "return".to_owned(),
            Verdict::Jump(chain) => format!("jump {chain}"),
            Verdict::Goto(chain) => format!("goto {chain}"),
        };
        self.word(&text);
        self.expressions.push(Expression::verdict(verdict));
        self
    }

    /// The rule, with a comment for readers.
    pub fn build(self, comment: Option<&'static str>) -> RuleSpec {
        RuleSpec { text: self.words.join(" "), expressions: self.expressions, comment }
    }

    fn word(&mut self, text: &str) {
        self.words.push(text.to_owned());
    }

    /// Makes sure that the rule only sees packets of `family`. nft does not print this where an
    /// `ip` or `ip6` selector follows.
    fn see(&mut self, family: Family) {
        if self.family.replace(family).is_none() {
            // NFPROTO_IPV4, NFPROTO_IPV6
            let with = vec![if family == Family::V4 { 2 } else { 10 }];
            self.expressions.extend([
                Expression::Meta { key: MetaKey::NfProto, into: Register::word(0) },
                Expression::Cmp { register: Register::word(0), op: CmpOp::Eq, with },
            ]);
        }
    }

    /// Loads selectors one behind the other from the first register on; returns their text.
    fn load(&mut self, selectors: &[Selector]) -> String {
        self.load_from(0, selectors)
    }

    /// Loads selectors one behind the other from the register that begins with `word`.
    fn load_from(&mut self, mut word: u32, selectors: &[Selector]) -> String {
        for selector in selectors {
            if let Selector::SourceAddress(f)
            | Selector::SourceNetwork(f, _)
            | Selector::DestinationAddress(f)
            | Selector::SourceHash { family: f, .. } = selector
            {
                self.see(*f);
            }
        }
        let mut texts = Vec::new();
        for selector in selectors {
            let (text, expressions) = selector.load(Register::word(word), word);
            texts.push(text);
            self.expressions.extend(expressions);
            word += selector.words();
        }
        texts.join(" . ")
    }
}

impl Selector {
    /// How many words of four bytes it fills.
    fn words(self) -> u32 {
        match self {
            Selector::SourceAddress(f)
            | Selector::SourceNetwork(f, _)
            | Selector::DestinationAddress(f)
            | Selector::OriginalSource(f)
            | Selector::OriginalDestination(f) => address_length(f) / 4,
            Selector::InputInterface => 4,
            _ => 1,
        }
    }

    /// Its text, and what loads it into a register, which begins with this word.
    fn load(self, into: Register, word: u32) -> (String, Vec<Expression>) {
        let network = |offset, family, into| Expression::Payload {
            base: PayloadBase::Network,
            offset,
            length: address_length(family),
            into,
        };
        let original = |key| vec![Expression::CtOriginal { key, into }];
        match self {
            Selector::SourceAddress(f) => {
                (format!("{} saddr", ip(f)), vec![network(source_offset(f), f, into)])
            }
            Selector::SourceNetwork(f, length) => {
                let (text, mut expressions) = Selector::SourceAddress(f).load(into, word);
                let (netmask, mask) = netmask(f, length);
                let xor = vec![0; mask.len()];
                expressions.push(Expression::Bitwise { register: into, mask, xor });
                (format!("{text} & {netmask}"), expressions)
            }
            Selector::DestinationAddress(f) => {
                (format!("{} daddr", ip(f)), vec![network(destination_offset(f), f, into)])
            }
            Selector::L4Proto => {
                ("meta l4proto".into(), vec![Expression::Meta { key: MetaKey::L4Proto, into }])
            }
            Selector::InputInterface => {
                ("iifname".into(), vec![Expression::Meta { key: MetaKey::IifName, into }])
            }
            Selector::DestinationPort => {
                let base = PayloadBase::Transport;
                ("th dport".into(), vec![Expression::Payload { base, offset: 2, length: 2, into }])
            }
            Selector::OriginalSource(f) => {
                let key = match f {
                    Family::V4 => CtOriginalKey::SourceIp4,
                    Family::V6 => CtOriginalKey::SourceIp6,
                };
                (format!("ct original {} saddr", ip(f)), original(key))
            }
            Selector::OriginalDestination(f) => {
                let key = match f {
                    Family::V4 => CtOriginalKey::DestinationIp4,
                    Family::V6 => CtOriginalKey::DestinationIp6,
                };
                (format!("ct original {} daddr", ip(f)), original(key))
            }
            Selector::OriginalDestinationPort => {
                ("ct original proto-dst".into(), original(CtOriginalKey::DestinationPort))
            }
            Selector::Random { modulus, offset } => (
                format!("numgen random mod {modulus}{}", behind(offset)),
                vec![Expression::NumgenRandom { modulus, offset, into }],
            ),
            Selector::SourceHash { family, modulus, offset } => {
                // The address needs a place behind the key that is being built.
                let key = Register::word(word.next_multiple_of(4));
                let length = address_length(family);
                let seed = HASH_SEED;
                (
                    format!(
                        "jhash {} saddr mod {modulus} seed {seed:#x}{}",
                        ip(family),
                        behind(offset)
                    ),
                    vec![
                        network(source_offset(family), family, key),
                        Expression::JenkinsHash { key, length, modulus, seed, offset, into },
                    ],
                )
            }
        }
    }
}

/// An offset as nft prints it.
fn behind(offset: u32) -> String {
    if offset == 0 { String::new() } else { format!(" offset {offset}") }
}

/// A time as nft prints it: `3h`, `1m30s`.
pub(crate) fn duration(seconds: u32) -> String {
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3_600 % 24, "h"),
        (seconds / 60 % 60, "m"),
        (seconds % 60, "s"),
    ];
    let parts = parts.iter().filter(|(number, _)| *number > 0);
    let parts: Vec<String> = parts.map(|(number, unit)| format!("{number}{unit}")).collect();
    parts.concat()
}

/// The mask of a prefix length, as text and as bytes.
fn netmask(family: Family, length: u8) -> (String, Vec<u8>) {
    let without = family.address_bits() - length;
    match family {
        Family::V4 => {
            let mask = Ipv4Addr::from(u32::MAX << without);
            (mask.to_string(), mask.octets().to_vec())
        }
        Family::V6 => {
            let mask = Ipv6Addr::from(u128::MAX << without);
            (mask.to_string(), mask.octets().to_vec())
        }
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn address_length(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

/// Of `struct iphdr` and `struct ipv6hdr`.
fn source_offset(family: Family) -> u32 {
    match family {
        Family::V4 => 12,
        Family::V6 => 8,
    }
}

/// Of `struct iphdr` and `struct ipv6hdr`.
fn destination_offset(family: Family) -> u32 {
    match family {
        Family::V4 => 16,
        Family::V6 => 24,
    }
}
