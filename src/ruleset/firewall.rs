//! The chain of a Service's firewall.

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

/// What a firewall guards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Guarded {
    /// The Service's node ports.
    NodePorts,
    /// The Service's load-balancer addresses.
    LoadBalancer,
}

/// The firewall of one Service: who is in its sets passes, all others are counted and dropped.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FirewallChain {
    /// What it guards.
    pub guarded: Guarded,
    /// The Service.
    pub service: ServiceName,
}

impl FirewallChain {
    /// The firewall of a Service's node ports.
    pub fn of_node_ports(service: ServiceName) -> FirewallChain {
        FirewallChain { guarded: Guarded::NodePorts, service }
    }

    /// The firewall of a Service's load-balancer addresses.
    pub fn of_load_balancer(service: ServiceName) -> FirewallChain {
        FirewallChain { guarded: Guarded::LoadBalancer, service }
    }

    /// The chain's name, `fw-NAMESPACE/NAME` or `lb-NAMESPACE/NAME`.
    pub fn name(&self) -> String {
        match self.guarded {
            Guarded::NodePorts => format!("fw-{}", self.service),
            Guarded::LoadBalancer => format!("lb-{}", self.service),
        }
    }

    /// The sets of allowed sources.
    pub fn sets(&self) -> [SetName; 2] {
        Family::ALL.map(|family| self.set(family))
    }

    /// The set of allowed sources of one family.
    pub fn set(&self, family: Family) -> SetName {
        match self.guarded {
            Guarded::NodePorts => SetName::Allow(family, self.service.clone()),
            Guarded::LoadBalancer => SetName::Ranges(family, self.service.clone()),
        }
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
        let logged = match self.guarded {
            Guarded::NodePorts => Some(
                RuleBuilder::new()
                    .limit_per_second(LOG_RATE, LOG_BURST)
                    .log(&self.service.to_string(), REFUSED_LOG_GROUP, LOG_SNAPLEN)
                    .build(Some("sample of the refused")),
            ),
            Guarded::LoadBalancer => None,
        };
        let refused = RuleBuilder::new().counter().verdict(Verdict::Drop).build(Some("refused"));
        allowed.into_iter().chain(logged).chain([refused]).collect()
    }
}
