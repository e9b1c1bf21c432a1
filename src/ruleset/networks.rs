//! Chains that let in who comes from one of the networks listed for an address: one for each family
//! and combination of prefix lengths in use.
//!
//! The networks of all Services are in one hash set, behind the address and port that they may reach.
//! A hash set knows no intervals, so a chain cuts the client's address down to each prefix length in
//! turn and looks for the network that this gives. The lengths of a Service are the chain that its
//! addresses are led to.
//!
//! A set of intervals for each Service would do without, as the firewalls of node ports have it. But
//! the kernel finds a set by its name in a list of all of them (`nft_set_lookup`
//! of `nf_tables_api.c`), so that thousands take seconds to load; and a set whose intervals
//! stand behind an address (`pipapo`) takes longer still.

use ipnet::IpNet;

use super::rule::Selector::{
    self, DestinationAddress, DestinationPort, L4Proto, SourceAddress, SourceNetwork,
};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;
use crate::netlink::Verdict;

/// The chain of everybody whose networks have these prefix lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FromNetworks {
    family: Family,
    /// One bit for each length in steps of [`step`], the shortest first.
    lengths: u32,
}

/// Prefix lengths are multiples of this many bits. A chain has room for 32 of them in its name, and
/// in IPv6 those in use are multiples of four by custom.
fn step(family: Family) -> u8 {
    match family {
        Family::V4 => 1,
        Family::V6 => 4,
    }
}

/// The networks with prefix lengths that a chain can have which make up this one: itself, or at most
/// eight.
pub(super) fn parts(network: IpNet) -> impl Iterator<Item = IpNet> {
    let length = network.prefix_len().next_multiple_of(step(Family::of(network.network())));
    // A network has parts of every length between its own and that of an address.
    network.subnets(length).into_iter().flatten()
}

impl FromNetworks {
    /// The chain for these networks, which are of this family. `None` where they are everybody.
    pub fn new(family: Family, networks: impl IntoIterator<Item = IpNet>) -> Option<FromNetworks> {
        let mut lengths = 0;
        for network in networks {
            let steps = network.prefix_len().div_ceil(step(family));
            lengths |= 1 << steps.checked_sub(1)?;
        }
        Some(FromNetworks { family, lengths })
    }

    /// The chain's name, such as `from-networks4-8-24`, or `from-nobody4`.
    pub fn name(self) -> String {
        let family = self.family.digit();
        if self.lengths == 0 {
            return format!("from-nobody{family}");
        }
        let lengths = self.lengths().map(|length| format!("-{length}"));
        format!("from-networks{family}{}", lengths.collect::<String>())
    }

    /// The chain with this name.
    pub fn parse(name: &str) -> Option<FromNetworks> {
        let family_of = |digit: char| Family::ALL.into_iter().find(|f| f.digit() == digit);
        let networks = if let Some(rest) = name.strip_prefix("from-nobody") {
            FromNetworks { family: family_of(rest.chars().next()?)?, lengths: 0 }
        } else {
            let mut parts = name.strip_prefix("from-networks")?.split('-');
            let family = family_of(parts.next()?.chars().next()?)?;
            let mut lengths = 0;
            for part in parts {
                let step = u32::from(step(family));
                lengths |= 1_u32.checked_shl((part.parse::<u32>().ok()? / step).checked_sub(1)?)?;
            }
            FromNetworks { family, lengths }
        };
        (networks.name() == name).then_some(networks)
    }

    /// The prefix lengths, the shortest first.
    fn lengths(self) -> impl Iterator<Item = u8> {
        let step = step(self.family);
        (0..32).filter(move |bit| self.lengths & 1 << bit != 0).map(move |bit| (bit + 1) * step)
    }

    /// The chain's rules.
    pub fn rules(self) -> Vec<RuleSpec> {
        let family = self.family;
        let allowed = self.lengths().map(|length| {
            let source = if length == family.address_bits() {
                SourceAddress(family)
            } else {
                SourceNetwork(family, length)
            };
            // nft has no constants in a key. This one number is it, drawn from one.
            let length = Selector::Random { modulus: 1, offset: length.into() };
            let key = [DestinationAddress(family), L4Proto, DestinationPort, source, length];
            let found = RuleBuilder::new().in_set(&key, &SetName::LoadBalancerSources(family));
            found.counter().verdict(Verdict::Accept).build(Some("allowed"))
        });
        let refused = RuleBuilder::new().counter().verdict(Verdict::Drop).build(Some("refused"));
        allowed.chain([refused]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|network| network.parse().unwrap()).collect()
    }

    #[test]
    fn names_tell_what_a_chain_is() {
        let all4: Vec<String> = (1..=32).map(|length| format!("0.0.0.0/{length}")).collect();
        let all6: Vec<String> = (1..=128).map(|length| format!("::/{length}")).collect();
        let all = |list: &'_ [String]| list.iter().map(|n| n.parse().unwrap()).collect::<Vec<_>>();
        let table: [(Family, Vec<IpNet>, &str); 6] = [
            (Family::V4, networks(&[]), "from-nobody4"),
            (Family::V6, networks(&[]), "from-nobody6"),
            (
                Family::V4,
                networks(&["10.0.0.0/8", "192.0.2.7/32", "172.16.0.0/12", "11.0.0.0/8"]),
                "from-networks4-8-12-32",
            ),
            (Family::V6, networks(&["2001:db8::/29", "::1/128"]), "from-networks6-32-128"),
            (Family::V4, all(&all4), ""),
            (Family::V6, all(&all6), ""),
        ];
        for (family, networks, name) in table {
            let chain = FromNetworks::new(family, networks).unwrap();
            assert!(name.is_empty() || chain.name() == name, "{}", chain.name());
            // NFT_NAME_MAXLEN is 256, include/uapi/linux/netfilter/nf_tables.h.
            assert!(chain.name().len() < 256);
            assert_eq!(FromNetworks::parse(&chain.name()), Some(chain));
            assert_eq!(chain.rules().len(), chain.lengths().count() + 1);
        }
        for other in [
            "from-nobody",
            "from-nobody5",
            "from-nobody44",
            "from-networks4",
            "from-networks4-0",
            "from-networks4-24-8",
            "from-networks4-08",
            "from-networks4-33",
            "from-networks6-30",
            "from-networks6-132",
            "from-networks6-4294967296",
        ] {
            assert_eq!(FromNetworks::parse(other), None, "{other}");
        }
    }

    #[test]
    fn everybody_needs_no_chain() {
        assert_eq!(FromNetworks::new(Family::V4, networks(&["0.0.0.0/0"])), None);
        assert_eq!(FromNetworks::new(Family::V6, networks(&["::/0"])), None);
    }

    #[test]
    fn a_network_is_its_parts() {
        for (network, count, first, last) in [
            ("10.0.0.0/7", 1, "10.0.0.0/7", "10.0.0.0/7"),
            ("192.0.2.7/32", 1, "192.0.2.7/32", "192.0.2.7/32"),
            ("2001:db8::/32", 1, "2001:db8::/32", "2001:db8::/32"),
            ("2001:db8::/29", 8, "2001:db8::/32", "2001:dbf::/32"),
            ("2001:db8::/127", 2, "2001:db8::/128", "2001:db8::1/128"),
        ] {
            let parts: Vec<IpNet> = parts(network.parse().unwrap()).collect();
            let [first, last] = [first, last].map(|network| network.parse().unwrap());
            let ends = (parts.first().copied(), parts.last().copied());
            assert_eq!((parts.len(), ends), (count, (Some(first), Some(last))), "{network}");
        }
    }
}
