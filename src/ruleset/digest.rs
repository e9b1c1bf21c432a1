//! A digest of everything in the ruleset that is not an element.

use xxhash_rust::xxh64::Xxh64;

use super::affinity::Remember;
use super::balancer::{Balancer, Route};
use super::chains::{BASE_CHAINS, base_rules};
use super::firewall::FirewallChain;
use super::networks::FromNetworks;
use super::sets::SetName;
use crate::model::{Family, ServiceName};
use crate::plan::Choice;

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
    let firewall = FirewallChain::of(sample);
    for set in SetName::fixed().into_iter().chain(firewall.sets()) {
        hash.update(format!("{set} {:?}", set.spec()).as_bytes());
    }
    for (route, family) in Route::ALL.iter().flat_map(|route| Family::ALL.map(|f| (*route, f))) {
        for choice in [Choice::Random, Choice::SourceHash] {
            let balancer = Balancer { route, family, endpoints: 2, sticky: true, choice };
            hash.update(format!("{} {:?}", balancer.name(), balancer.rules()).as_bytes());
        }
    }
    for remember in Family::ALL.map(|family| Remember { family, seconds: 1 }) {
        hash.update(format!("{} {:?}", remember.name(), remember.rules()).as_bytes());
    }
    for (family, networks) in
        [(Family::V4, ["0.0.0.0/1", "0.0.0.0/32"]), (Family::V6, ["::/4", "::/128"])]
    {
        let networks = networks.map(|network| network.parse().expect("a network"));
        let networks = FromNetworks::new(family, networks).expect("it is not everybody");
        hash.update(format!("{} {:?}", networks.name(), networks.rules()).as_bytes());
    }
    hash.update(format!("{} {:?}", firewall.name(), firewall.rules()).as_bytes());
    format!("portcullis: layout {:016x}", hash.digest())
}
