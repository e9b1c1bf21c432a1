//! Sets of addresses, as CIDRs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use super::Family;

/// A set of addresses: CIDRs that are disjoint, sorted and as few as cover the same addresses.
///
/// The kernel refuses overlapping intervals in one set ("conflicting intervals"), so they are
/// merged here, at the boundary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CidrSet {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

/// Why a list of source CIDRs was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CidrSetError {
    /// An entry is neither a CIDR nor an address.
    #[error("entry {position}: {entry:?} is neither a CIDR nor an IP address")]
    NotACidr {
        /// Which entry, counted from 1.
        position: usize,
        /// The entry itself, shortened.
        entry: String,
    },
    /// An entry is empty although others are not.
    #[error("entry {position} is empty")]
    Empty {
        /// Which entry, counted from 1.
        position: usize,
    },
}

impl CidrSet {
    /// The ranges that cover exactly what `cidrs` cover together.
    pub fn new(cidrs: impl IntoIterator<Item = IpNet>) -> CidrSet {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for cidr in cidrs {
            match cidr {
                IpNet::V4(net) => v4.push(net.trunc()),
                IpNet::V6(net) => v6.push(net.trunc()),
            }
        }
        CidrSet { v4: Ipv4Net::aggregate(&v4), v6: Ipv6Net::aggregate(&v6) }
    }

    /// Parses a comma-separated list such as `10.0.0.0/8, 2001:db8::/32, 192.0.2.7`.
    ///
    /// White space around entries is ignored; a bare address stands for itself alone; bits behind
    /// the prefix length are ignored, as the API server does for `loadBalancerCidrSet`. A
    /// list of nothing but white space holds nobody.
    ///
    /// # Errors
    /// The first entry that is not understood. Nothing is left out silently: a list is understood
    /// as a whole or not at all.
    pub fn parse(list: &str) -> Result<CidrSet, CidrSetError> {
        if list.trim().is_empty() {
            return Ok(CidrSet::default());
        }
        let mut cidrs = Vec::new();
        for (index, entry) in list.split(',').enumerate() {
            let (entry, position) = (entry.trim(), index + 1);
            if entry.is_empty() {
                return Err(CidrSetError::Empty { position });
            }
            let cidr = entry.parse::<IpNet>().or_else(|_| entry.parse::<IpAddr>().map(IpNet::from));
            cidrs.push(cidr.map_err(|_| CidrSetError::NotACidr {
                position,
                entry: entry.chars().take(64).collect(),
            })?);
        }
        Ok(CidrSet::new(cidrs))
    }

    /// The IPv4 CIDRs, disjoint and sorted.
    pub fn v4(&self) -> &[Ipv4Net] {
        &self.v4
    }

    /// The IPv6 CIDRs, disjoint and sorted.
    pub fn v6(&self) -> &[Ipv6Net] {
        &self.v6
    }

    /// The CIDRs of one family, disjoint and sorted.
    pub fn of_family(&self, family: Family) -> Vec<IpNet> {
        match family {
            Family::V4 => self.v4.iter().copied().map(IpNet::V4).collect(),
            Family::V6 => self.v6.iter().copied().map(IpNet::V6).collect(),
        }
    }

    /// Whether nobody is in the list.
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// Whether `address` is in the list.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.contains_v4(address),
            IpAddr::V6(address) => self.contains_v6(address),
        }
    }

    /// Whether everyone in `other` is in this list too.
    pub fn covers(&self, other: &CidrSet) -> bool {
        // Both lists are aggregated, so a CIDR is covered when a single one of ours holds it.
        let covered4 = |net: &Ipv4Net| {
            let behind = self.v4.partition_point(|ours| ours.network() <= net.network());
            behind > 0 && self.v4[behind - 1].contains(net)
        };
        let covered6 = |net: &Ipv6Net| {
            let behind = self.v6.partition_point(|ours| ours.network() <= net.network());
            behind > 0 && self.v6[behind - 1].contains(net)
        };
        other.v4.iter().all(covered4) && other.v6.iter().all(covered6)
    }

    fn contains_v4(&self, address: Ipv4Addr) -> bool {
        let behind = self.v4.partition_point(|net| net.network() <= address);
        behind > 0 && self.v4[behind - 1].contains(&address)
    }

    fn contains_v6(&self, address: Ipv6Addr) -> bool {
        let behind = self.v6.partition_point(|net| net.network() <= address);
        behind > 0 && self.v6[behind - 1].contains(&address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &str) -> CidrSet {
        CidrSet::parse(list).expect(list)
    }

    #[test]
    fn parses_merges_and_sorts() {
        let table: &[(&str, &[&str])] = &[
            ("", &[]),
            ("  ", &[]),
            ("10.0.0.0/8", &["10.0.0.0/8"]),
            ("192.0.2.7", &["192.0.2.7/32"]),
            ("10.1.2.3/8", &["10.0.0.0/8"]),
            ("10.0.0.0/9, 10.128.0.0/9", &["10.0.0.0/8"]),
            ("10.0.0.0/8,10.1.0.0/16,9.0.0.0/8", &["9.0.0.0/8", "10.0.0.0/8"]),
            ("0.0.0.0/0,::/0", &["0.0.0.0/0", "::/0"]),
            ("2001:DB8::/32 , 192.0.2.0/24", &["192.0.2.0/24", "2001:db8::/32"]),
        ];
        for (list, expected) in table {
            let got = ranges(list);
            let got: Vec<String> =
                Family::ALL.iter().flat_map(|f| got.of_family(*f)).map(|n| n.to_string()).collect();
            assert_eq!(&got, expected, "{list:?}");
        }
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for (list, position) in [
            ("10.0.0.0/33", 1),
            ("10.0.0.0/8,", 2),
            (",", 1),
            ("10.0.0.0/8,, 11.0.0.0/8", 2),
            ("10.0.0.0/8 11.0.0.0/8", 1),
            ("010.0.0.1", 1),
            ("example.com", 1),
            ("10.0.0.0-10.0.0.9", 1),
            ("10.0.0.0/8,fe80::1%eth0", 2),
        ] {
            let error = CidrSet::parse(list).expect_err(list);
            let (CidrSetError::NotACidr { position: got, .. }
            | CidrSetError::Empty { position: got }) = error;
            assert_eq!(got, position, "{list:?}");
        }
    }

    #[test]
    fn contains_and_covers() {
        let some = ranges("10.0.0.0/8, 192.0.2.0/24, 2001:db8::/32");
        for (address, expected) in [
            ("9.255.255.255", false),
            ("10.0.0.0", true),
            ("10.255.255.255", true),
            ("11.0.0.0", false),
            ("192.0.2.9", true),
            ("2001:db8::1", true),
            ("2001:db9::", false),
        ] {
            assert_eq!(some.contains(address.parse().unwrap()), expected, "{address}");
        }
        assert!(some.covers(&ranges("10.3.0.0/16, 2001:db8:1::/48")));
        assert!(!some.covers(&ranges("10.0.0.0/7")));
        assert!(some.covers(&CidrSet::default()));
        assert!(ranges("0.0.0.0/0, ::/0").covers(&some));
    }
}
