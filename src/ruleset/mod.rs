//! The ruleset: which chains, rules, sets and maps there are, and which elements a plan becomes.
//!
//! The number of chains and rules does not depend on how many Services there are; Services are
//! elements. docs/ruleset.md walks a packet through it. Everything here is pure; what is built
//! carries both its expressions and the nft line that a listing prints for it.

mod affinity;
mod balancer;
mod chains;
mod contribution;
mod digest;
mod element;
mod firewall;
mod networks;
mod rule;
mod sets;
mod slots;
mod text;

pub use affinity::Remember;
pub use balancer::{Balancer, COMMON, LOCAL_SLOTS, Route};
pub use chains::{BASE_CHAINS, BaseChain, base_rules};
pub use contribution::{Contribution, InterfaceName, NodeElements, PoolSlots, Subject};
pub(crate) use contribution::{
    EndpointLists, affinity_key, affinity_value, endpoint_lists, hairpin_element,
};
pub use digest::layout_comment;
pub use element::{ChainName, Element, ElementKey, KeyBytes, SharedChain, Value};
pub use firewall::{FirewallChain, REFUSED_LOG_GROUP};
pub use networks::FromNetworks;
pub use rule::RuleSpec;
pub(crate) use rule::duration;
pub use sets::{Field, SetData, SetName, SetSpec};
pub use text::{Listing, render};
pub(crate) use text::{address_text, key_text, value_text};

/// The one table, of the `inet` family.
pub const TABLE: &str = "portcullis";
