//! Chains that remember which endpoint a client got: one for each family and timeout in use.

use super::rule::Selector::{
    DestinationAddress, DestinationPort, L4Proto, OriginalDestination, OriginalDestinationPort,
    OriginalSource,
};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;
use crate::netlink::Verdict;

/// The chain that remembers endpoints for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Remember {
    /// In which family.
    pub family: Family,
    /// For how many seconds since the last new connection.
    pub seconds: u32,
}

impl Remember {
    /// The chain's name, such as `remember4-10800s`.
    pub fn name(self) -> String {
        format!("remember{}-{}s", self.family.digit(), self.seconds)
    }

    /// The chain with this name.
    pub fn parse(name: &str) -> Option<Remember> {
        let (family, seconds) =
            name.strip_prefix("remember")?.strip_suffix('s')?.split_once('-')?;
        let family = Family::ALL.into_iter().find(|f| f.digit().to_string() == family)?;
        let remember = Remember { family, seconds: seconds.parse().ok()? };
        (remember.seconds > 0 && remember.name() == name).then_some(remember)
    }

    /// The chain's rules. A client that is remembered keeps its endpoint and is remembered longer, as
    /// long as the endpoint serves there. Else its packet is dropped: the translation is done by now,
    /// and cannot be done again before the client tries again.
    pub fn rules(self) -> Vec<RuleSpec> {
        let family = self.family;
        let port = [L4Proto, OriginalDestinationPort];
        let endpoint = [DestinationAddress(family), DestinationPort];
        let address = [OriginalDestination(family)];
        let client = [&[OriginalSource(family)], &address[..], &port[..]].concat();
        let map = SetName::Affinity(family);
        let keep = |key: &[&[_]], set| {
            let serves = RuleBuilder::new().in_set(&key.concat(), &set);
            let keep = serves.remember(family, &client, &map, self.seconds);
            keep.verdict(Verdict::Accept).build(None)
        };
        vec![
            keep(&[&address, &port, &endpoint], SetName::StickyEndpoints(family)),
            keep(&[&port, &endpoint], SetName::StickyNodePortEndpoints(family)),
            RuleBuilder::new()
                .forget(family, &client, &map)
                .verdict(Verdict::Drop)
                .build(Some("the endpoint has left: the client tries again")),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_a_chain_is() {
        for family in Family::ALL {
            for seconds in [1, 10_800, 86_400, u32::MAX] {
                let remember = Remember { family, seconds };
                assert_eq!(Remember::parse(&remember.name()), Some(remember));
            }
        }
        for other in
            ["remember4-0s", "remember4-010s", "remember4-1", "remember5-1s", "remember-endpoints"]
        {
            assert_eq!(Remember::parse(other), None, "{other}");
        }
    }
}
