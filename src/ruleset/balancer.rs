//! Chains that choose an endpoint: one for each number of endpoints in use.

use super::chains::MASQUERADE_BIT;
use super::rule::Selector::{DestinationAddress, DestinationPort, L4Proto, Random};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;
use crate::plan::Frontend;

/// What kind of address leads to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FrontendKind {
    /// An address of the Service.
    ServiceIp,
    /// A port of the node.
    NodePort,
}

impl From<&Frontend> for FrontendKind {
    fn from(frontend: &Frontend) -> FrontendKind {
        match frontend {
            Frontend::ClusterIp { .. } => FrontendKind::ServiceIp,
            Frontend::NodePort { .. } => FrontendKind::NodePort,
        }
    }
}

/// The chain that all Services with one number of endpoints share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Balancer {
    /// By which kind of address.
    pub kind: FrontendKind,
    /// In which family.
    pub family: Family,
    /// Over how many endpoints; at least one.
    pub endpoints: u32,
}

impl Balancer {
    /// The chain's name, such as `service4-over-3`.
    pub fn name(&self) -> String {
        let kind = match self.kind {
            FrontendKind::ServiceIp => "service",
            FrontendKind::NodePort => "nodeport",
        };
        format!("{kind}{}-over-{}", self.family.digit(), self.endpoints)
    }

    /// The chain's only rule.
    pub fn rule(&self) -> RuleSpec {
        let (family, slot) = (self.family, Random(self.endpoints));
        match self.kind {
            // dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints4
            FrontendKind::ServiceIp => RuleBuilder::new().dnat_map(
                family,
                &[DestinationAddress(family), L4Proto, DestinationPort, slot],
                &SetName::Endpoints(family),
            ),
            // The answer must come back through this node, so the source becomes the node.
            FrontendKind::NodePort => RuleBuilder::new().mark(MASQUERADE_BIT).dnat_map(
                family,
                &[L4Proto, DestinationPort, slot],
                &SetName::NodePortEndpoints(family),
            ),
        }
        .build(None)
    }
}
