//! The sets and maps: their names, types and meaning.

use std::borrow::Cow;
use std::fmt;

use crate::model::{Family, ServiceName};
use crate::netlink;

/// The type of a part of a key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// An address of the set's family.
    Address(Family),
    /// A transport protocol.
    Protocol,
    /// A port.
    Port,
    /// The number of an endpoint among those of its Service port. nft has no listing for plain
    /// integers in a concatenation (1.0.6 dies of it) but prints marks well, and to the kernel both
    /// are four bytes.
    Slot,
}

impl Field {
    /// nft's name of the type.
    pub fn type_name(self) -> &'static str {
        match self {
            Field::Address(Family::V4) => "ipv4_addr",
            Field::Address(Family::V6) => "ipv6_addr",
            Field::Protocol => "inet_proto",
            Field::Port => "inet_service",
            Field::Slot => "mark",
        }
    }

    /// nft's number of the type (`enum datatypes` in nftables' include/datatype.h).
    fn type_id(self) -> u32 {
        match self {
            Field::Address(Family::V4) => 7,
            Field::Address(Family::V6) => 8,
            Field::Protocol => 12,
            Field::Port => 13,
            Field::Slot => 19,
        }
    }

    /// Bytes in a key; every field is padded to four.
    pub fn width(self) -> usize {
        match self {
            Field::Address(Family::V6) => 16,
            _ => 4,
        }
    }
}

/// A set or map of the table.
///
/// The order is the one in which a listing shows them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SetName {
    /// Every ClusterIP in use: what is sent to one and served by no port of it is rejected.
    ClusterIps(Family),
    /// CIDRs at whose local addresses node ports are served.
    NodePortIps(Family),
    /// Service address and port to the chain for its number of endpoints.
    ServiceIps(Family),
    /// Node port to the chain for its number of endpoints.
    NodePorts(Family),
    /// Service address, port and slot to an endpoint.
    Endpoints(Family),
    /// Node port and slot to an endpoint.
    NodePortEndpoints(Family),
    /// Service addresses and ports without an endpoint.
    NoEndpoints(Family),
    /// Node ports without an endpoint.
    NoEndpointNodePorts(Family),
    /// Endpoints on this node, as source and destination: connections that come back to where
    /// they began.
    Hairpin(Family),
    /// Node port to the firewall of its Service.
    NodePortFirewall,
    /// Sources that may reach a Service's node ports.
    Allow(Family, ServiceName),
}

/// What a map leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetData {
    /// Nothing: this is a set.
    None,
    /// An endpoint: address and port.
    Endpoint(Family),
    /// A chain.
    Verdict,
}

/// The definition of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetSpec {
    /// The parts of a key.
    pub key: Vec<Field>,
    /// What a key leads to.
    pub data: SetData,
    /// Whether elements are intervals.
    pub interval: bool,
    /// A comment for readers.
    pub comment: &'static str,
}

impl SetName {
    /// The sets that are always there, in listing order.
    pub fn fixed() -> Vec<SetName> {
        type OfFamily = fn(Family) -> SetName;
        const OF_FAMILY: [OfFamily; 9] = [
            SetName::ClusterIps,
            SetName::NodePortIps,
            SetName::ServiceIps,
            SetName::NodePorts,
            SetName::Endpoints,
            SetName::NodePortEndpoints,
            SetName::NoEndpoints,
            SetName::NoEndpointNodePorts,
            SetName::Hairpin,
        ];
        let of_family = OF_FAMILY.iter().flat_map(|set| Family::ALL.map(set));
        of_family.chain([SetName::NodePortFirewall]).collect()
    }

    /// The name in the table.
    pub fn name(&self) -> Cow<'static, str> {
        let by_family = |family: &Family, v4: &'static str, v6: &'static str| match family {
            Family::V4 => Cow::Borrowed(v4),
            Family::V6 => Cow::Borrowed(v6),
        };
        match self {
            SetName::ClusterIps(f) => by_family(f, "cluster-ips4", "cluster-ips6"),
            SetName::NodePortIps(f) => by_family(f, "nodeport-ips4", "nodeport-ips6"),
            SetName::ServiceIps(f) => by_family(f, "service-ips4", "service-ips6"),
            SetName::NodePorts(f) => by_family(f, "nodeports4", "nodeports6"),
            SetName::Endpoints(f) => by_family(f, "endpoints4", "endpoints6"),
            SetName::NodePortEndpoints(f) => {
                by_family(f, "nodeport-endpoints4", "nodeport-endpoints6")
            }
            SetName::NoEndpoints(f) => by_family(f, "no-endpoints4", "no-endpoints6"),
            SetName::NoEndpointNodePorts(f) => {
                by_family(f, "no-endpoint-nodeports4", "no-endpoint-nodeports6")
            }
            SetName::Hairpin(f) => by_family(f, "hairpin4", "hairpin6"),
            SetName::NodePortFirewall => Cow::Borrowed("nodeport-firewall"),
            SetName::Allow(f, service) => Cow::Owned(format!("allow{}-{service}", f.digit())),
        }
    }

    /// The definition.
    pub fn spec(&self) -> SetSpec {
        use Field::{Address, Port, Protocol, Slot};
        let (key, data, interval, comment) = match *self {
            SetName::ClusterIps(f) => {
                (vec![Address(f)], SetData::None, false, "ClusterIPs: other ports are rejected")
            }
            SetName::NodePortIps(f) => {
                (vec![Address(f)], SetData::None, true, "where node ports are served")
            }
            SetName::ServiceIps(f) => (
                vec![Address(f), Protocol, Port],
                SetData::Verdict,
                false,
                "Service address to the chain for its number of endpoints",
            ),
            SetName::NodePorts(_) => (
                vec![Protocol, Port],
                SetData::Verdict,
                false,
                "node port to the chain for its number of endpoints",
            ),
            SetName::Endpoints(f) => (
                vec![Address(f), Protocol, Port, Slot],
                SetData::Endpoint(f),
                false,
                "Service address and slot to an endpoint",
            ),
            SetName::NodePortEndpoints(f) => (
                vec![Protocol, Port, Slot],
                SetData::Endpoint(f),
                false,
                "node port and slot to an endpoint",
            ),
            SetName::NoEndpoints(f) => (
                vec![Address(f), Protocol, Port],
                SetData::None,
                false,
                "Service addresses without an endpoint: rejected",
            ),
            SetName::NoEndpointNodePorts(_) => (
                vec![Protocol, Port],
                SetData::None,
                false,
                "node ports without an endpoint: rejected",
            ),
            SetName::Hairpin(f) => (
                vec![Address(f), Address(f)],
                SetData::None,
                false,
                "endpoints here that may be balanced to themselves",
            ),
            SetName::NodePortFirewall => (
                vec![Protocol, Port],
                SetData::Verdict,
                false,
                "node port to the firewall of its Service",
            ),
            SetName::Allow(f, _) => {
                (vec![Address(f)], SetData::None, true, "who may reach the Service's node ports")
            }
        };
        SetSpec { key, data, interval, comment }
    }
}

impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl SetSpec {
    /// The netlink description of a set of this definition.
    pub fn netlink<'a>(&self, name: &'a str) -> netlink::Set<'a> {
        netlink::Set {
            name,
            key_type: concatenation(&self.key),
            key_length: length(&self.key),
            data: match self.data {
                SetData::None => None,
                SetData::Verdict => Some(netlink::SetData::Verdict),
                SetData::Endpoint(family) => {
                    let fields = [Field::Address(family), Field::Port];
                    Some(netlink::SetData::Value {
                        kind: concatenation(&fields),
                        length: length(&fields),
                    })
                }
            },
            interval: self.interval,
            timeout: false,
            comment: Some(self.comment),
        }
    }

    /// The definition as nft prints it behind `type`.
    pub fn type_text(&self) -> String {
        let key: Vec<&str> = self.key.iter().map(|field| field.type_name()).collect();
        let key = key.join(" . ");
        match self.data {
            SetData::None => key,
            SetData::Verdict => format!("{key} : verdict"),
            SetData::Endpoint(family) => {
                format!("{key} : {} . inet_service", Field::Address(family).type_name())
            }
        }
    }
}

/// nft's type of a concatenation: six bits for each field (`TYPE_BITS`).
fn concatenation(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |kind, field| kind << 6 | field.type_id())
}

fn length(fields: &[Field]) -> u32 {
    u32::try_from(fields.iter().map(|field| field.width()).sum::<usize>()).expect("keys are short")
}
