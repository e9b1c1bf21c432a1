//! Rules in the making: expressions, and the nft line that a listing prints for them, side by side.

use crate::model::{Family, Protocol};
use crate::netlink::{
    CmpOp, CtKey, Expression, LimitUnit, MetaKey, NatKind, PayloadBase, Register, Verdict,
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
    DestinationAddress(Family),
    L4Proto,
    DestinationPort,
    /// A number below this, by chance.
    Random(u32),
}

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
            Family::V6 => (16, std::net::Ipv6Addr::LOCALHOST.octets().to_vec()),
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

    /// `fib daddr type local`
    pub fn at_local_address(mut self) -> Self {
        self.word("fib daddr type local");
        self.expressions.extend([
            Expression::FibDaddrType { into: Register::word(0) },
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
        for selector in selectors {
            if let Selector::SourceAddress(f) | Selector::DestinationAddress(f) = selector {
                self.see(*f);
            }
        }
        let (mut word, mut texts) = (0, Vec::new());
        for selector in selectors {
            let into = Register::word(word);
            let network = |offset, family| Expression::Payload {
                base: PayloadBase::Network,
                offset,
                length: address_length(family),
                into,
            };
            let (text, expression) = match *selector {
                Selector::SourceAddress(f) => {
                    (format!("{} saddr", ip(f)), network(source_offset(f), f))
                }
                Selector::DestinationAddress(f) => {
                    (format!("{} daddr", ip(f)), network(destination_offset(f), f))
                }
                Selector::L4Proto => {
                    ("meta l4proto".to_owned(), Expression::Meta { key: MetaKey::L4Proto, into })
                }
                Selector::DestinationPort => (
                    "th dport".to_owned(),
                    Expression::Payload {
                        base: PayloadBase::Transport,
                        offset: 2,
                        length: 2,
                        into,
                    },
                ),
                Selector::Random(modulus) => (
                    format!("numgen random mod {modulus}"),
                    Expression::NumgenRandom { modulus, offset: 0, into },
                ),
            };
            texts.push(text);
            self.expressions.push(expression);
            word += match selector {
                Selector::SourceAddress(f) | Selector::DestinationAddress(f) => {
                    address_length(*f) / 4
                }
                _ => 1,
            };
        }
        texts.join(" . ")
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
