//! Chains that remember which endpoint a client got: one for each family and timeout in use.

use super::rule::Selector::{
    L4Proto, OriginalDestination, OriginalDestinationPort, OriginalSource,
};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;

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

    /// The chain's rule. A client that is remembered keeps its endpoint and is remembered longer.
    pub fn rules(self) -> Vec<RuleSpec> {
        let family = self.family;
        let key =
            [OriginalSource(family), OriginalDestination(family), L4Proto, OriginalDestinationPort];
        let map = SetName::Affinity(family);
        vec![RuleBuilder::new().remember(family, &key, &map, self.seconds).build(None)]
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
