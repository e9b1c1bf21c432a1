//! Elements of sets and maps.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::affinity::Remember;
use super::balancer::Balancer;
use super::chains::REJECT_CHAIN;
use super::contribution::InterfaceName;
use super::firewall::FirewallChain;
use super::networks::FromNetworks;
use super::rule::RuleSpec;
use super::sets::SetName;
use crate::model::{Backend, Protocol};

/// An element of one of our sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    /// In which set, under which key.
    pub key: ElementKey,
    /// What it leads to.
    pub value: Value,
    /// Whose it is, for readers.
    pub comment: Option<Arc<str>>,
}

/// What tells an element from all others.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ElementKey {
    /// The set.
    pub set: SetName,
    /// The key; the first address of an interval.
    pub bytes: KeyBytes,
    /// The first address behind an interval; `None` where it reaches the last address, and for
    /// sets without intervals.
    pub end: Option<KeyBytes>,
}

/// What an element leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing: an element of a set.
    None,
    /// An endpoint, as address and port.
    Endpoint(KeyBytes),
    /// A chain.
    Goto(ChainName),
    /// The packet is dropped.
    Drop,
}

/// A chain that elements lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChainName {
    /// A chain that Services share.
    Shared(SharedChain),
    /// The firewall of a Service's node ports.
    Firewall(FirewallChain),
    /// The chain that rejects connections.
    Reject,
}

/// A chain that is there as long as some Service needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SharedChain {
    /// Chooses an endpoint.
    Balancer(Balancer),
    /// Remembers which endpoint a client got.
    Remember(Remember),
    /// Lets in who comes from a network that is listed for the address.
    FromNetworks(FromNetworks),
}

impl SharedChain {
    /// The name in the table.
    pub fn name(&self) -> String {
        match self {
            SharedChain::Balancer(balancer) => balancer.name(),
            SharedChain::Remember(remember) => remember.name(),
            SharedChain::FromNetworks(networks) => networks.name(),
        }
    }

    /// The chain with this name, if it is one that we would make.
    pub fn parse(name: &str) -> Option<SharedChain> {
        let balancer = Balancer::parse(name).map(SharedChain::Balancer);
        let remember = || Remember::parse(name).map(SharedChain::Remember);
        let networks = || FromNetworks::parse(name).map(SharedChain::FromNetworks);
        balancer.or_else(remember).or_else(networks)
    }

    /// Whether it is there even if nobody needs it.
    pub(super) fn is_always_there(&self) -> bool {
        matches!(self, SharedChain::Balancer(balancer) if balancer.set().is_some())
    }

    /// The rules.
    pub fn rules(&self) -> Vec<RuleSpec> {
        match self {
            SharedChain::Balancer(balancer) => balancer.rules(),
            SharedChain::Remember(remember) => remember.rules(),
            SharedChain::FromNetworks(networks) => networks.rules(),
        }
    }
}

impl ChainName {
    /// The name in the table.
    pub fn name(&self) -> String {
        match self {
            ChainName::Shared(chain) => chain.name(),
            ChainName::Firewall(firewall) => firewall.name(),
            ChainName::Reject => REJECT_CHAIN.to_owned(),
        }
    }
}

/// The bytes of a key or a value: fields one behind the other, each padded to four bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyBytes {
    // Unused bytes are zero, so comparing all of them compares the keys.
    bytes: [u8; KeyBytes::CAPACITY],
    length: u8,
}

impl KeyBytes {
    /// A Service's IPv6 address and port, and an endpoint's, or a network: the longest keys there are.
    const CAPACITY: usize = 16 + 4 + 4 + 16 + 4;

    /// Bytes of an interface's name (`IFNAMSIZ`).
    const INTERFACE: usize = 16;

    const EMPTY: KeyBytes = KeyBytes { bytes: [0; KeyBytes::CAPACITY], length: 0 };

    /// A key from the bytes of a listing; `None` if it is longer than any key of ours.
    pub fn new(bytes: &[u8]) -> Option<KeyBytes> {
        (bytes.len() <= KeyBytes::CAPACITY).then(|| KeyBytes::EMPTY.push(bytes))
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    fn push(mut self, field: &[u8]) -> KeyBytes {
        let start = usize::from(self.length);
        let end = start + field.len().next_multiple_of(4);
        self.bytes[start..start + field.len()].copy_from_slice(field);
        self.length = u8::try_from(end).expect("keys are short");
        self
    }

    pub(super) fn address(self, address: IpAddr) -> KeyBytes {
        match address {
            IpAddr::V4(address) => self.push(&address.octets()),
            IpAddr::V6(address) => self.push(&address.octets()),
        }
    }

    pub(super) fn protocol(self, protocol: Protocol) -> KeyBytes {
        self.push(&[protocol.number()])
    }

    pub(super) fn port(self, port: u16) -> KeyBytes {
        self.push(&port.to_be_bytes())
    }

    /// Slots are numbers of the machine's byte order, as `numgen` makes them.
    pub(super) fn slot(self, slot: u32) -> KeyBytes {
        self.push(&slot.to_ne_bytes())
    }

    /// A network and its prefix length, which is a number as of a slot.
    pub(super) fn network(self, network: IpNet) -> KeyBytes {
        self.address(network.network()).slot(network.prefix_len().into())
    }

    /// An empty key to append fields to.
    pub(super) fn empty() -> KeyBytes {
        KeyBytes::EMPTY
    }

    pub(super) fn backend(self, backend: &Backend) -> KeyBytes {
        self.address(backend.address).port(backend.port)
    }
}

impl fmt::Debug for KeyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.as_slice() {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl ElementKey {
    /// A key that is no interval.
    pub(super) fn single(set: SetName, bytes: KeyBytes) -> ElementKey {
        ElementKey { set, bytes, end: None }
    }

    /// An interface, or all whose names begin alike, as an interval of names.
    pub(super) fn interface(set: SetName, interface: &InterfaceName) -> ElementKey {
        let (name, at) = match interface {
            InterfaceName::Exact(name) => (name, KeyBytes::INTERFACE - 1),
            InterfaceName::Prefix(name) => (name, name.len().clamp(1, KeyBytes::INTERFACE) - 1),
        };
        let mut first = [0; KeyBytes::INTERFACE];
        let length = name.len().min(KeyBytes::INTERFACE - 1);
        first[..length].copy_from_slice(&name.as_bytes()[..length]);
        let mut behind = first;
        // Names of interfaces are ASCII in practice; who begins with 0xff has no name behind it.
        behind[at] = behind[at].saturating_add(1);
        let [bytes, end] = [first, behind].map(|name| KeyBytes::EMPTY.push(&name));
        ElementKey { set, bytes, end: Some(end) }
    }

    /// A CIDR as the interval from its first address up to the one behind its last.
    pub(super) fn cidr(set: SetName, cidr: IpNet) -> ElementKey {
        let behind = match cidr.broadcast() {
            IpAddr::V4(last) => last.to_bits().checked_add(1).map(|a| IpAddr::V4(a.into())),
            IpAddr::V6(last) => last.to_bits().checked_add(1).map(|a| IpAddr::V6(a.into())),
        };
        ElementKey {
            set,
            bytes: KeyBytes::EMPTY.address(cidr.network()),
            end: behind.map(|address| KeyBytes::EMPTY.address(address)),
        }
    }
}
