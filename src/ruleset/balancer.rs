//! Chains that choose an endpoint: one for each number of endpoints in use.

use super::chains::{MASQUERADE_BIT, jump, short_circuit_chain};
use super::rule::Selector::{self, DestinationAddress, DestinationPort, L4Proto, SourceAddress};
use super::rule::{RuleBuilder, RuleSpec};
use super::sets::SetName;
use crate::model::Family;
use crate::plan::Choice;

/// The slot of the first endpoint of a Service's second list, that of its node-local endpoints,
/// where it has both.
pub const LOCAL_SLOTS: u32 = 1 << 31;

/// Up to so many endpoints, Services of the common kind stand in a set for each number of endpoints.
///
/// The kernel validates a map of verdicts as a whole, element by element, when one comes that leads to a
/// chain. Sets lead nowhere, so changes of them cost the same in clusters of any size. Every new
/// connection pays for it by looking into each of these sets until one has its destination.
pub const COMMON: u32 = 8;

/// By which kind of address a chain is reached, and what that means for who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Route {
    /// An address of the Service; the client keeps its address.
    Service,
    /// An external address: the answer must come back through this node.
    External,
    /// An external address that only endpoints of this node serve. Pods of this node and the node
    /// itself are served by all.
    ExternalLocal,
    /// A port of the node: the answer must come back through this node.
    NodePort,
    /// A port of the node that only endpoints of this node serve. Pods of this node and the node
    /// itself are served by all.
    NodePortLocal,
    /// A port of the node, for pods of this node and the node itself.
    NodePortFromHere,
}

impl Route {
    /// Every one, in the order in which a listing shows them.
    pub const ALL: [Route; 6] = [
        Route::Service,
        Route::External,
        Route::ExternalLocal,
        Route::NodePort,
        Route::NodePortLocal,
        Route::NodePortFromHere,
    ];

    fn name(self) -> &'static str {
        match self {
            Route::Service => "service",
            Route::External => "external",
            Route::ExternalLocal => "external-local",
            Route::NodePort => "nodeport",
            Route::NodePortLocal => "nodeport-local",
            Route::NodePortFromHere => "nodeport-from-here",
        }
    }

    /// Whether it is by the node's addresses.
    pub fn is_node_port(self) -> bool {
        matches!(self, Route::NodePort | Route::NodePortLocal | Route::NodePortFromHere)
    }

    /// Whether it leads to endpoints of this node only.
    pub fn is_local(self) -> bool {
        matches!(self, Route::ExternalLocal | Route::NodePortLocal)
    }
}

/// The chain that all Services with one number of endpoints share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Balancer {
    /// By which kind of address.
    pub route: Route,
    /// In which family.
    pub family: Family,
    /// Over how many endpoints; zero only for the local routes.
    pub endpoints: u32,
    /// Whether a client that is remembered gets its endpoint again.
    pub sticky: bool,
    /// How the others get one.
    pub choice: Choice,
}

impl Balancer {
    /// The chain's name, such as `service4-over-3` or `nodeport6-over-2-sticky`.
    pub fn name(self) -> String {
        let sticky = if self.sticky { "-sticky" } else { "" };
        let choice = match self.choice {
            Choice::Random => "",
            Choice::SourceHash => "-by-source",
        };
        let (route, family) = (self.route.name(), self.family.digit());
        format!("{route}{family}-over-{}{sticky}{choice}", self.endpoints)
    }

    /// The chains of the common kind: by ClusterIP, by chance, and over few endpoints. They are always
    /// there.
    pub(super) fn common(family: Family) -> impl Iterator<Item = Balancer> {
        (1..=COMMON).map(move |endpoints| Balancer {
            route: Route::Service,
            family,
            endpoints,
            sticky: false,
            choice: Choice::Random,
        })
    }

    /// The set of the addresses that are led here, if this is one of [`Balancer::common`].
    pub(super) fn set(self) -> Option<SetName> {
        let Balancer { route, family, endpoints, sticky, choice } = self;
        let is_common = route == Route::Service
            && (1..=COMMON).contains(&endpoints)
            && !sticky
            && choice == Choice::Random;
        is_common.then_some(SetName::ServiceIpsOver(family, endpoints))
    }

    /// The balancing chain with this name.
    pub fn parse(name: &str) -> Option<Balancer> {
        let (head, tail) = name.split_once("-over-")?;
        let mut parts = tail.splitn(2, '-');
        let endpoints = parts.next()?.parse().ok()?;
        let (sticky, choice) = match parts.next() {
            None => (false, Choice::Random),
            Some("sticky") => (true, Choice::Random),
            Some("by-source") => (false, Choice::SourceHash),
            Some("sticky-by-source") => (true, Choice::SourceHash),
            Some(_) => return None,
        };
        let all = Route::ALL.into_iter().flat_map(|route| Family::ALL.map(|f| (route, f)));
        let named = |(route, family): &(Route, Family)| {
            head.strip_prefix(route.name()).is_some_and(|rest| rest == family.digit().to_string())
        };
        let (route, family) = { all }.find(named)?;
        let balancer = Balancer { route, family, endpoints, sticky, choice };
        let possible = endpoints > 0 || route.is_local();
        (possible && balancer.name() == name).then_some(balancer)
    }

    /// The slots of the endpoints that it leads to.
    pub fn slots(self) -> std::ops::Range<u32> {
        let first = if self.route.is_local() { LOCAL_SLOTS } else { 0 };
        first..first + self.endpoints
    }

    /// The chain's rules.
    pub fn rules(self) -> Vec<RuleSpec> {
        let mut rules = Vec::new();
        if self.route.is_local() {
            let short_circuit = short_circuit_chain(self.family, self.route.is_node_port());
            rules.push(RuleBuilder::new().verdict(jump(short_circuit)).build(None));
        }
        if self.endpoints == 0 {
            return rules;
        }
        let map = if self.route.is_node_port() {
            SetName::NodePortEndpoints(self.family)
        } else {
            SetName::Endpoints(self.family)
        };
        if self.sticky {
            let key = [
                SourceAddress(self.family),
                DestinationAddress(self.family),
                L4Proto,
                DestinationPort,
            ];
            let remembered = SetName::Affinity(self.family);
            rules.push(self.begin().dnat_map(self.family, &key, &remembered).build(None));
        }
        // dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints4
        let mut key = self.frontend();
        let std::ops::Range { start: offset, .. } = self.slots();
        let modulus = self.endpoints;
        key.push(match self.choice {
            Choice::Random => Selector::Random { modulus, offset },
            Choice::SourceHash => Selector::SourceHash { family: self.family, modulus, offset },
        });
        rules.push(self.begin().dnat_map(self.family, &key, &map).build(None));
        rules
    }

    /// The answer must come back through this node, unless the endpoint is here: so the source
    /// becomes the node.
    fn begin(self) -> RuleBuilder {
        match self.route {
            Route::External | Route::NodePort => RuleBuilder::new().mark(MASQUERADE_BIT),
            _ => RuleBuilder::new(),
        }
    }

    fn frontend(self) -> Vec<Selector> {
        if self.route.is_node_port() {
            vec![L4Proto, DestinationPort]
        } else {
            vec![DestinationAddress(self.family), L4Proto, DestinationPort]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_a_chain_is() {
        for route in Route::ALL {
            for family in Family::ALL {
                for (endpoints, sticky, choice) in [
                    (0, false, Choice::Random),
                    (1, false, Choice::Random),
                    (100, true, Choice::Random),
                    (2, false, Choice::SourceHash),
                    (u32::MAX >> 1, true, Choice::SourceHash),
                ] {
                    let balancer = Balancer { route, family, endpoints, sticky, choice };
                    let possible = endpoints > 0 || route.is_local();
                    let expected = possible.then_some(balancer);
                    assert_eq!(Balancer::parse(&balancer.name()), expected, "{balancer:?}");
                }
            }
        }
        for other in [
            "service4-over-",
            "service4-over-03",
            "service4-over-0",
            "service5-over-1",
            "service-over-1",
            "external4-local-over-1",
            "service4-over-1-",
            "service4-over-1-by-source-sticky",
            "service4-over-4294967296",
            "services",
        ] {
            assert_eq!(Balancer::parse(other), None, "{other}");
        }
    }
}
