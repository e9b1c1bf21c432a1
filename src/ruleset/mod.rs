//! The ruleset: which chains, rules, sets and maps there are, and which elements a plan becomes.
//!
//! The number of chains and rules does not depend on how many Services there are; Services are
//! elements. docs/ruleset.md walks a packet through it. Everything here is pure; what is built
//! carries both its expressions and the nft line that a listing prints for it.

mod balancer;
mod chains;
mod contribution;
mod digest;
mod element;
mod firewall;
mod rule;
mod sets;
mod text;

pub use balancer::{Balancer, FrontendKind};
pub use chains::{BASE_CHAINS, BaseChain, base_rules};
pub use contribution::{Contribution, Subject};
pub(crate) use contribution::{endpoint_key, hairpin_element};
pub use digest::layout_comment;
pub use element::{ChainName, Element, ElementKey, KeyBytes, Value};
pub use firewall::{FirewallChain, REFUSED_LOG_GROUP};
pub use rule::RuleSpec;
pub use sets::{Field, SetData, SetName, SetSpec};
pub use text::{Listing, render};
pub(crate) use text::{address_text, key_text, value_text};

/// The one table, of the `inet` family.
pub const TABLE: &str = "portcullis";
