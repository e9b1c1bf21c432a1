//! Rule expressions: what a packet is asked and what is done with it.
//!
//! Every variant quotes the nft syntax it stands for. Registers and attribute numbers follow
//! `include/uapi/linux/netfilter/nf_tables.h`.

use super::attribute::{are_among, nest, put, put_str, put_u16, put_u32, put_u64};
use super::dump::ExpressionDump;
use crate::model::Family;

/// `NFTA_LIST_ELEM`.
pub(super) const LIST_ELEM: u16 = 1;
pub(super) const EXPR_NAME: u16 = 1;
pub(super) const EXPR_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

/// A register of the nf_tables machine. nft's listing expects the fields of a concatenation one
/// behind the other, each at the next multiple of four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register(u32);

impl Register {
    /// The verdict register: what is loaded here decides about the packet.
    pub const VERDICT: Register = Register(0);

    /// The data register that starts `words` words of four bytes behind the first. 16-byte
    /// registers have the numbers 1 to 4 and 4-byte registers those from 8 on; where both fit, the
    /// kernel and nft print the 16-byte one.
    pub const fn word(words: u32) -> Register {
        if words.is_multiple_of(4) { Register(1 + words / 4) } else { Register(8 + words) }
    }
}

/// Where a payload expression starts to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PayloadBase {
    /// The IP header.
    Network = 1,
    /// The TCP, UDP or SCTP header.
    Transport = 2,
}

/// `enum nft_meta_keys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MetaKey {
    /// The packet's mark, four bytes in the machine's order.
    Mark = 3,
    /// The name of the input interface, sixteen bytes.
    IifName = 6,
    /// The protocol family, one byte.
    NfProto = 15,
    /// The transport protocol, one byte.
    L4Proto = 16,
}

/// `enum nft_ct_keys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CtKey {
    /// Bits of `NF_CT_STATE_BIT`.
    State = 0,
    /// Bits of `enum ip_conntrack_status`.
    Status = 2,
}

/// What the first packet of a connection carried (`enum nft_ct_keys`, with the direction
/// `IP_CT_DIR_ORIGINAL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CtOriginalKey {
    /// The destination port.
    DestinationPort = 12,
    /// The IPv4 source address.
    SourceIp4 = 19,
    /// The IPv4 destination address.
    DestinationIp4 = 20,
    /// The IPv6 source address.
    SourceIp6 = 21,
    /// The IPv6 destination address.
    DestinationIp6 = 22,
}

/// `enum nft_cmp_ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CmpOp {
    /// `==`
    Eq = 0,
    /// `!=`
    Neq = 1,
}

/// `enum nft_nat_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NatKind {
    /// `snat`
    Source = 0,
    /// `dnat`
    Destination = 1,
}

/// The time that a limit's rate counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum LimitUnit {
    /// `/second`
    Second = 1,
    /// `/minute`
    Minute = 60,
}

/// What happens to a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// `accept`: no further rule of this hook's chain; other chains still see the packet.
    Accept,
    /// `drop`
    Drop,
    /// `jump CHAIN`
    Jump(String),
    /// `goto CHAIN`
    Goto(String),
    /// `return`
    Return,
}

/// What an element or an immediate expression carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Data {
    /// Bytes.
    Value(Vec<u8>),
    /// A verdict.
    Verdict(Verdict),
}

/// One expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// `ip daddr`, `th dport` ...: bytes of the packet into a register.
    Payload {
        /// Which header.
        base: PayloadBase,
        /// Bytes from its start.
        offset: u32,
        /// How many bytes.
        length: u32,
        /// Where to.
        into: Register,
    },
    /// `meta mark`, `iifname` ... into a register.
    Meta {
        /// What.
        key: MetaKey,
        /// Where to.
        into: Register,
    },
    /// `meta mark set`: a register into the packet's metadata.
    MetaSet {
        /// What.
        key: MetaKey,
        /// Where from.
        from: Register,
    },
    /// `ct state`, `ct status` into a register.
    Ct {
        /// What.
        key: CtKey,
        /// Where to.
        into: Register,
    },
    /// `ct original ip saddr`, `ct original proto-dst` ... into a register. The rule ends where the
    /// connection is of another family.
    CtOriginal {
        /// What.
        key: CtOriginalKey,
        /// Where to.
        into: Register,
    },
    /// `fib daddr type`: the kind of route to the destination (`RTN_*`) into a register.
    FibDaddrType {
        /// Where to.
        into: Register,
    },
    /// `fib saddr type`: the kind of route to the source (`RTN_*`) into a register.
    FibSaddrType {
        /// Where to.
        into: Register,
    },
    /// `numgen random mod MODULUS offset OFFSET`: a number of the machine's byte order.
    NumgenRandom {
        /// How many numbers there are.
        modulus: u32,
        /// The smallest of them.
        offset: u32,
        /// Where to.
        into: Register,
    },
    /// `jhash KEY mod MODULUS seed SEED offset OFFSET`: a number of the machine's byte order, the
    /// same for the same key.
    JenkinsHash {
        /// Where the key starts.
        key: Register,
        /// Bytes of the key.
        length: u32,
        /// How many numbers there are.
        modulus: u32,
        /// What tells this hash from others. Not 0: then the kernel would choose one.
        seed: u32,
        /// The smallest of the numbers.
        offset: u32,
        /// Where to.
        into: Register,
    },
    /// `& MASK ^ XOR`, in place.
    Bitwise {
        /// The register.
        register: Register,
        /// Bits to keep.
        mask: Vec<u8>,
        /// Bits to flip then.
        xor: Vec<u8>,
    },
    /// Goes on with the rule only if the register compares so.
    Cmp {
        /// The register.
        register: Register,
        /// How.
        op: CmpOp,
        /// With what.
        with: Vec<u8>,
    },
    /// `@SET`: goes on with the rule only if the registers' content is in the set.
    Lookup {
        /// The set's name.
        set: String,
        /// Where the key starts.
        key: Register,
    },
    /// `!= @SET`: goes on with the rule only if the registers' content is not in the set.
    LookupInverted {
        /// The set's name.
        set: String,
        /// Where the key starts.
        key: Register,
    },
    /// `map @MAP` and `vmap @MAP`: the value for the key into a register, or end of the rule.
    LookupMap {
        /// The map's name.
        map: String,
        /// Where the key starts.
        key: Register,
        /// Where to; [`Register::VERDICT`] for a verdict map.
        into: Register,
    },
    /// Loads a constant; into [`Register::VERDICT`] it ends the rule.
    Immediate {
        /// Where to.
        into: Register,
        /// What.
        data: Data,
    },
    /// `dnat ip to ADDRESS . PORT`
    Nat {
        /// Which direction.
        kind: NatKind,
        /// The family of the address.
        family: Family,
        /// Where the address is.
        address: Register,
        /// Where the port is.
        port: Register,
    },
    /// `masquerade fully-random`
    MasqueradeFullyRandom,
    /// `reject`: ICMP or ICMPv6 port unreachable, by family.
    RejectPortUnreachable,
    /// `reject with tcp reset`; only for what is known to be TCP.
    RejectTcpReset,
    /// `update @MAP { KEY timeout TIMEOUT : DATA }`: adds the element if there is none of this
    /// key, and makes one that there is live from now on again; its data stay as they are.
    UpdateMap {
        /// The map's name.
        map: String,
        /// Where the key starts.
        key: Register,
        /// Where the data start.
        data: Register,
        /// How long the element lives from now on, in milliseconds.
        timeout: u64,
    },
    /// `delete @MAP { KEY : DATA }`: deletes the element with this key, if there is one, whatever its
    /// data are.
    DeleteFromMap {
        /// The map's name.
        map: String,
        /// Where the key starts.
        key: Register,
        /// Where data start; the kernel wants to be told, and does not look.
        data: Register,
    },
    /// `counter`
    Counter,
    /// `limit rate RATE/UNIT burst BURST packets`
    Limit {
        /// Packets in each unit of time.
        rate: u64,
        /// The unit.
        unit: LimitUnit,
        /// Packets at once.
        burst: u32,
    },
    /// `log prefix PREFIX group GROUP snaplen SNAPLEN`
    LogGroup {
        /// The prefix; at most 127 bytes (`NF_LOG_PREFIXLEN`).
        prefix: String,
        /// The nflog group that gets the packet.
        group: u16,
        /// How many bytes of the packet to copy.
        snaplen: u32,
    },
}

impl Expression {
    /// Ends the rule with `verdict`.
    pub fn verdict(verdict: Verdict) -> Expression {
        Expression::Immediate { into: Register::VERDICT, data: Data::Verdict(verdict) }
    }

    /// The kernel's name of the expression's type.
    pub fn name(&self) -> &'static str {
        match self {
            Expression::Payload { .. } => "payload",
            Expression::Meta { .. } | Expression::MetaSet { .. } => "meta",
            Expression::Ct { .. } | Expression::CtOriginal { .. } => "ct",
            Expression::FibDaddrType { .. } | Expression::FibSaddrType { .. } => "fib",
            Expression::NumgenRandom { .. } => "numgen",
            Expression::JenkinsHash { .. } => "hash",
            Expression::Bitwise { .. } => "bitwise",
            Expression::Cmp { .. } => "cmp",
            Expression::Lookup { .. }
            | Expression::LookupInverted { .. }
            | Expression::LookupMap { .. } => "lookup",
            Expression::Immediate { .. } => "immediate",
            Expression::Nat { .. } => "nat",
            Expression::MasqueradeFullyRandom => "masq",
            Expression::RejectPortUnreachable | Expression::RejectTcpReset => "reject",
            Expression::UpdateMap { .. } | Expression::DeleteFromMap { .. } => "dynset",
            Expression::Counter => "counter",
            Expression::Limit { .. } => "limit",
            Expression::LogGroup { .. } => "log",
        }
    }

    /// Whether a listed expression is this one, as far as it was written here; what a counter has
    /// counted does not matter.
    pub fn is_listed_as(&self, listed: &ExpressionDump) -> bool {
        let mut data = Vec::new();
        if *self != Expression::Counter {
            self.encode_data(&mut data);
        }
        self.name() == listed.name && are_among(&data, &listed.data)
    }

    /// Appends the expression as an element of a list (`NFTA_LIST_ELEM`).
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        nest(out, LIST_ELEM, |out| {
            put_str(out, EXPR_NAME, self.name());
            nest(out, EXPR_DATA, |out| self.encode_data(out));
        });
    }

    fn encode_data(&self, out: &mut Vec<u8>) {
        match self {
            Expression::Payload { base, offset, length, into } => {
                put_u32(out, 1, into.0); // NFTA_PAYLOAD_DREG
                put_u32(out, 2, *base as u32); // NFTA_PAYLOAD_BASE
                put_u32(out, 3, *offset); // NFTA_PAYLOAD_OFFSET
                put_u32(out, 4, *length); // NFTA_PAYLOAD_LEN
            }
            Expression::Meta { key, into } => {
                put_u32(out, 1, into.0); // NFTA_META_DREG
                put_u32(out, 2, *key as u32); // NFTA_META_KEY
            }
            Expression::MetaSet { key, from } => {
                put_u32(out, 2, *key as u32); // NFTA_META_KEY
                put_u32(out, 3, from.0); // NFTA_META_SREG
            }
            Expression::Ct { key, into } => {
                put_u32(out, 1, into.0); // NFTA_CT_DREG
                put_u32(out, 2, *key as u32); // NFTA_CT_KEY
            }
            Expression::CtOriginal { key, into } => {
                put_u32(out, 1, into.0); // NFTA_CT_DREG
                put_u32(out, 2, *key as u32); // NFTA_CT_KEY
                put(out, 3, &[0]); // NFTA_CT_DIRECTION: IP_CT_DIR_ORIGINAL
            }
            Expression::FibDaddrType { into } => fib_type(out, *into, 2), // NFTA_FIB_F_DADDR
            Expression::FibSaddrType { into } => fib_type(out, *into, 1), // NFTA_FIB_F_SADDR
            Expression::NumgenRandom { modulus, offset, into } => {
                put_u32(out, 1, into.0); // NFTA_NG_DREG
                put_u32(out, 2, *modulus); // NFTA_NG_MODULUS
                put_u32(out, 3, 1); // NFTA_NG_TYPE: NFT_NG_RANDOM
                put_u32(out, 4, *offset); // NFTA_NG_OFFSET
            }
            Expression::JenkinsHash { key, length, modulus, seed, offset, into } => {
                put_u32(out, 1, key.0); // NFTA_HASH_SREG
                put_u32(out, 2, into.0); // NFTA_HASH_DREG
                put_u32(out, 3, *length); // NFTA_HASH_LEN
                put_u32(out, 4, *modulus); // NFTA_HASH_MODULUS
                put_u32(out, 5, *seed); // NFTA_HASH_SEED
                // The kernel does not list 0.
                if *offset != 0 {
                    put_u32(out, 6, *offset); // NFTA_HASH_OFFSET
                }
                put_u32(out, 7, 0); // NFTA_HASH_TYPE: NFT_HASH_JENKINS
            }
            Expression::Bitwise { register, mask, xor } => {
                let length = u32::try_from(mask.len()).expect("a mask fits a register");
                put_u32(out, 1, register.0); // NFTA_BITWISE_SREG
                put_u32(out, 2, register.0); // NFTA_BITWISE_DREG
                put_u32(out, 3, length); // NFTA_BITWISE_LEN
                nest(out, 4, |out| put(out, DATA_VALUE, mask)); // NFTA_BITWISE_MASK
                nest(out, 5, |out| put(out, DATA_VALUE, xor)); // NFTA_BITWISE_XOR
            }
            Expression::Cmp { register, op, with } => {
                put_u32(out, 1, register.0); // NFTA_CMP_SREG
                put_u32(out, 2, *op as u32); // NFTA_CMP_OP
                nest(out, 3, |out| put(out, DATA_VALUE, with)); // NFTA_CMP_DATA
            }
            Expression::Lookup { set, key } => {
                put_str(out, 1, set); // NFTA_LOOKUP_SET
                put_u32(out, 2, key.0); // NFTA_LOOKUP_SREG
            }
            Expression::LookupInverted { set, key } => {
                put_str(out, 1, set); // NFTA_LOOKUP_SET
                put_u32(out, 2, key.0); // NFTA_LOOKUP_SREG
                put_u32(out, 5, 1); // NFTA_LOOKUP_FLAGS: NFT_LOOKUP_F_INV
            }
            Expression::LookupMap { map, key, into } => {
                put_str(out, 1, map); // NFTA_LOOKUP_SET
                put_u32(out, 2, key.0); // NFTA_LOOKUP_SREG
                put_u32(out, 3, into.0); // NFTA_LOOKUP_DREG
            }
            Expression::Immediate { into, data } => {
                put_u32(out, 1, into.0); // NFTA_IMMEDIATE_DREG
                nest(out, 2, |out| data.encode(out)); // NFTA_IMMEDIATE_DATA
            }
            Expression::Nat { kind, family, address, port } => {
                put_u32(out, 1, *kind as u32); // NFTA_NAT_TYPE
                put_u32(out, 2, nfproto(*family).into()); // NFTA_NAT_FAMILY
                put_u32(out, 3, address.0); // NFTA_NAT_REG_ADDR_MIN
                put_u32(out, 5, port.0); // NFTA_NAT_REG_PROTO_MIN
            }
            Expression::MasqueradeFullyRandom => {
                put_u32(out, 1, 1 << 4); // NFTA_MASQ_FLAGS: NF_NAT_RANGE_PROTO_RANDOM_FULLY
            }
            Expression::RejectPortUnreachable => {
                put_u32(out, 1, 2); // NFTA_REJECT_TYPE: NFT_REJECT_ICMPX_UNREACH
                put(out, 2, &[1]); // NFTA_REJECT_ICMP_CODE: NFT_REJECT_ICMPX_PORT_UNREACH
            }
            Expression::RejectTcpReset => {
                put_u32(out, 1, 1); // NFTA_REJECT_TYPE: NFT_REJECT_TCP_RST
            }
            Expression::UpdateMap { map, key, data, timeout } => {
                put_str(out, 1, map); // NFTA_DYNSET_SET_NAME
                put_u32(out, 3, 1); // NFTA_DYNSET_OP: NFT_DYNSET_OP_UPDATE
                put_u32(out, 4, key.0); // NFTA_DYNSET_SREG_KEY
                put_u32(out, 5, data.0); // NFTA_DYNSET_SREG_DATA
                put_u64(out, 6, *timeout); // NFTA_DYNSET_TIMEOUT
            }
            Expression::DeleteFromMap { map, key, data } => {
                put_str(out, 1, map); // NFTA_DYNSET_SET_NAME
                put_u32(out, 3, 2); // NFTA_DYNSET_OP: NFT_DYNSET_OP_DELETE
                put_u32(out, 4, key.0); // NFTA_DYNSET_SREG_KEY
                put_u32(out, 5, data.0); // NFTA_DYNSET_SREG_DATA
            }
            Expression::Counter => {
                put_u64(out, 1, 0); // NFTA_COUNTER_BYTES
                put_u64(out, 2, 0); // NFTA_COUNTER_PACKETS
            }
            Expression::Limit { rate, unit, burst } => {
                put_u64(out, 1, *rate); // NFTA_LIMIT_RATE
                put_u64(out, 2, *unit as u64); // NFTA_LIMIT_UNIT
                put_u32(out, 3, *burst); // NFTA_LIMIT_BURST
                put_u32(out, 4, 0); // NFTA_LIMIT_TYPE: NFT_LIMIT_PKTS
            }
            Expression::LogGroup { prefix, group, snaplen } => {
                put_u16(out, 1, *group); // NFTA_LOG_GROUP
                put_str(out, 2, prefix); // NFTA_LOG_PREFIX
                put_u32(out, 3, *snaplen); // NFTA_LOG_SNAPLEN
            }
        }
    }
}

impl Data {
    /// Appends the content of an `NFTA_*_DATA` attribute.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Data::Value(bytes) => put(out, DATA_VALUE, bytes),
            Data::Verdict(verdict) => encode_verdict(
                out,
                verdict.code(),
                match verdict {
                    Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain),
                    _ => None,
                },
            ),
        }
    }

    /// Reads the content of an `NFTA_*_DATA` attribute; `None` for a verdict that is not known.
    pub(super) fn decode(bytes: &[u8]) -> Option<Data> {
        use super::attribute::{find, string, u32_of};
        if let Some(value) = find(bytes, DATA_VALUE) {
            return Some(Data::Value(value.to_vec()));
        }
        let verdict = find(bytes, DATA_VERDICT)?;
        let code = u32_of(find(verdict, VERDICT_CODE)?)?.cast_signed();
        let chain = || find(verdict, VERDICT_CHAIN).map(string);
        Some(Data::Verdict(match code {
            0 => Verdict::Drop,
            1 => Verdict::Accept,
            -3 => Verdict::Jump(chain()?),
            -4 => Verdict::Goto(chain()?),
            -5 => Verdict::Return,
            _ => return None,
        }))
    }
}

fn fib_type(out: &mut Vec<u8>, into: Register, flags: u32) {
    put_u32(out, 1, into.0); // NFTA_FIB_DREG
    put_u32(out, 2, 3); // NFTA_FIB_RESULT: NFT_FIB_RESULT_ADDRTYPE
    put_u32(out, 3, flags); // NFTA_FIB_FLAGS
}

/// `NFT_GOTO`.
const NFT_GOTO: i32 = -4;

impl Verdict {
    /// `enum nft_verdicts` and `NF_DROP`, `NF_ACCEPT`.
    fn code(&self) -> i32 {
        match self {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Jump(_) => -3,
            Verdict::Goto(_) => NFT_GOTO,
            Verdict::Return => -5,
        }
    }
}

/// Appends the data `goto CHAIN`, without an owned verdict in between.
pub(super) fn encode_goto(out: &mut Vec<u8>, chain: &str) {
    encode_verdict(out, NFT_GOTO, Some(chain));
}

fn encode_verdict(out: &mut Vec<u8>, code: i32, chain: Option<&str>) {
    nest(out, DATA_VERDICT, |out| {
        put_u32(out, VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            put_str(out, VERDICT_CHAIN, chain);
        }
    });
}

/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}
