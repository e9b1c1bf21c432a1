//! A digest of everything in the ruleset that is not an element.

use xxhash_rust::xxh64::Xxh64;

use super::balancer::{Balancer, FrontendKind};
use super::chains::{BASE_CHAINS, base_rules};
use super::firewall::FirewallChain;
use super::sets::SetName;
use crate::model::{Family, ServiceName};

/// The table's comment, which carries a digest of the layout: chains, rules, types of sets, and
/// the rules that balancing and firewall chains are made of.
///
/// The kernel does not give rules back as they were written, so a restarted daemon compares this
/// instead: the same comment means that the same code laid the table out, and only elements are to
/// be compared.
pub fn layout_comment() -> String {
    let mut hash = Xxh64::new(0);
    for chain in BASE_CHAINS {
        hash.update(format!("{chain:?}").as_bytes());
    }
    for (chain, rule) in base_rules() {
        hash.update(format!("{chain} {rule:?}").as_bytes());
    }
    let sample = ServiceName::new("namespace", "name");
    let firewall = FirewallChain { service: sample };
    for set in SetName::fixed().iter().chain(&firewall.sets()) {
        hash.update(format!("{set} {:?}", set.spec()).as_bytes());
    }
    for kind in [FrontendKind::ServiceIp, FrontendKind::NodePort] {
        for family in Family::ALL {
            let balancer = Balancer { kind, family, endpoints: 2 };
            hash.update(format!("{} {:?}", balancer.name(), balancer.rule()).as_bytes());
        }
    }
    hash.update(format!("{} {:?}", firewall.name(), firewall.rules()).as_bytes());
    format!("portcullis: layout {:016x}", hash.digest())
}
