//! The chain of the firewall of a Service's node ports.

use super::rule::Selector::SourceAddress;
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::{Family, ServiceName};
use crate::netlink::Verdict;

/// The nflog group that sampled refusals go to.
pub const REFUSED_LOG_GROUP: u16 = 3210;

/// How many refusals of one Service are logged: this many a second ...
const LOG_RATE: u64 = 1;
/// ... after this many at once.
const LOG_BURST: u32 = 10;
/// Enough of a packet for an IPv6 header and ports.
const LOG_SNAPLEN: u32 = 64;

/// The firewall of one Service's node ports: who is in its sets passes, all others are counted and
/// dropped.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FirewallChain {
    /// The Service.
    pub service: ServiceName,
}

impl FirewallChain {
    /// The firewall of a Service.
    pub fn of(service: ServiceName) -> FirewallChain {
        FirewallChain { service }
    }

    /// The chain's name, `fw-NAMESPACE/NAME`.
    pub fn name(&self) -> String {
        format!("fw-{}", self.service)
    }

    /// The sets of allowed sources.
    pub fn sets(&self) -> [SetName; 2] {
        Family::ALL.map(|family| self.set(family))
    }

    /// The set of allowed sources of one family.
    pub fn set(&self, family: Family) -> SetName {
        SetName::Allow(family, self.service.clone())
    }

    /// The rules, which are the same for every Service but for the names in them.
    pub fn rules(&self) -> Vec<RuleSpec> {
        // ip saddr @allow4-shop/web counter packets 0 bytes 0 accept
        let allowed = Family::ALL.map(|family| {
            RuleBuilder::new()
                .in_set(&[SourceAddress(family)], &self.set(family))
                .counter()
                .verdict(Verdict::Accept)
                .build(Some("allowed"))
        });
        let logged = RuleBuilder::new()
            .limit_per_second(LOG_RATE, LOG_BURST)
            .log(&self.service.to_string(), REFUSED_LOG_GROUP, LOG_SNAPLEN)
            .build(Some("sample of the refused"));
        let refused = RuleBuilder::new().counter().verdict(Verdict::Drop).build(Some("refused"));
        allowed.into_iter().chain([logged, refused]).collect()
    }
}
