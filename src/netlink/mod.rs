//! nf_tables, conntrack, nflog and `sock_diag` over netlink: tables, chains, sets, elements and
//! expressions, and nothing of Kubernetes.
//!
//! Numbers and layouts follow the kernel's `include/uapi/linux/netfilter/nf_tables.h` and
//! `nfnetlink.h`; constants carry the kernel's names. nf_tables messages are encoded here, straight
//! into the buffer that is sent, because a first load is millions of elements; for the others, where
//! nothing is hot, `netlink-packet-netfilter` and `netlink-packet-sock-diag` do it.

mod attribute;
mod batch;
mod conntrack;
mod dump;
mod error;
mod expression;
mod listeners;
mod nflog;
mod object;
#[cfg(test)]
pub(crate) mod replay;
mod socket;

pub use batch::{Batch, Encoded, Tag, shorten as shorten_comment};
pub use conntrack::Flow;
pub use dump::{ChainDump, ElementDump, ExpressionDump, HookDump, RuleDump, SetDump, TableDump};
pub use error::{Error, Refusal, Subject};
pub use expression::{
    CmpOp, CtKey, CtOriginalKey, Data, Expression, LimitUnit, MetaKey, NatKind, PayloadBase,
    Register, Verdict,
};
pub use listeners::listeners;
pub use nflog::{Listener, LoggedPacket};
pub use object::{
    Chain, ChainKind, Element, ElementData, Hook, Hooked, Rule, Set, SetData, TableFlags,
};
pub use socket::Socket;
