//! The plan of one Service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::endpoints::{Wanted, serving};
use super::{
    Choice, Firewall, Frontend, HealthCheck, LoadBalancerAddress, LoadBalancerFirewall, NodePort,
    Pool, ServicePlan, Sources,
};
use crate::model::{
    Balancing, CidrSet, EndpointSlice, Family, NodeContext, Protocol, Service, ServicePort,
    SourceRestriction, TrafficPolicy,
};

/// Plans one Service from the object, its slices (in any order) and the node.
///
/// Pure and total: the same input gives the same plan, and what is wrong with the input is said in
/// [`ServicePlan::diagnostics`].
pub fn plan_service<'a>(
    service: &Service,
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    node: &NodeContext,
) -> ServicePlan {
    let slices: Vec<&EndpointSlice> = slices.into_iter().collect();
    let mut diagnostics = service.diagnostics.clone();
    diagnostics.extend(slices.iter().flat_map(|slice| slice.diagnostics.iter().cloned()));
    diagnostics.sort();

    let mut pools = Vec::new();
    let mut ready_here: BTreeMap<Family, BTreeSet<IpAddr>> =
        { service.cluster_ips.iter() }.map(|ip| (Family::of(*ip), BTreeSet::new())).collect();
    for port in &service.ports {
        for &address in &service.cluster_ips {
            let (pool, addresses) = pool(service, port, address, &slices, node);
            ready_here.entry(pool.family).or_default().extend(addresses);
            pools.push(pool);
        }
    }
    let health_check = service.health_check_port.map(|port| HealthCheck {
        port: port.get(),
        local_endpoints: { ready_here.iter() }.map(|(family, all)| (*family, all.len())).collect(),
    });

    ServicePlan {
        seniority: service.seniority(),
        cluster_ips: service.cluster_ips.clone(),
        pools,
        firewall: firewall(service),
        load_balancer_firewall: load_balancer_firewall(service, node),
        health_check,
        diagnostics,
    }
}

/// The pool of one port, and the addresses of endpoints of it that are here and ready.
fn pool(
    service: &Service,
    port: &ServicePort,
    cluster_ip: IpAddr,
    slices: &[&EndpointSlice],
    node: &NodeContext,
) -> (Pool, BTreeSet<IpAddr>) {
    use TrafficPolicy::{Cluster, Local};
    let family = Family::of(cluster_ip);
    let number = port.port.get();
    let mut frontends = vec![Frontend::ClusterIp { address: cluster_ip, port: number }];
    let external = service.load_balancer_ips.iter().chain(&service.external_ips);
    frontends.extend(
        external
            .filter(|address| Family::of(**address) == family && **address != cluster_ip)
            .map(|address| Frontend::External { address: *address, port: number }),
    );
    frontends.extend(port.node_port.map(|port| Frontend::NodePort { port: port.get() }));
    // An external address may be a load balancer's too.
    let mut seen = Vec::with_capacity(frontends.len());
    frontends.retain(|frontend| {
        let new = !seen.contains(frontend);
        seen.push(*frontend);
        new
    });

    let reachable_from_outside = frontends.len() > 1;
    let wanted = Wanted {
        // Pods and the node itself reach external addresses by these, whatever the policy.
        cluster: service.internal_traffic == Cluster || reachable_from_outside,
        local: service.internal_traffic == Local
            || (service.external_traffic == Local && reachable_from_outside),
        weighted: service.balancing == Balancing::Weighted,
    };
    let serving = serving(port, family, slices, node, wanted);
    let pool = Pool {
        port_name: port.name.clone(),
        family,
        protocol: port.protocol,
        frontends,
        backends: serving.cluster,
        local_backends: serving.local,
        lasting: if port.protocol == Protocol::Tcp { Vec::new() } else { serving.lasting },
        any: serving.any,
        internal_traffic: service.internal_traffic,
        external_traffic: service.external_traffic,
        affinity: service.session_affinity,
        choice: match service.balancing {
            // Weights are in the list.
            Balancing::Random | Balancing::Weighted => Choice::Random,
            Balancing::SourceHash => Choice::SourceHash,
        },
        hairpins: serving.here,
    };
    (pool, serving.ready_here)
}

fn firewall(service: &Service) -> Option<Firewall> {
    let sources = sources(&service.node_port_sources)?;
    let mut node_ports: Vec<NodePort> = service
        .ports
        .iter()
        .filter_map(|port| {
            Some(NodePort {
                protocol: port.protocol,
                port: port.node_port?.get(),
                port_name: port.name.clone(),
            })
        })
        .collect();
    // Answered by a process of the node, and no less a port that the Service opens.
    node_ports.extend(service.health_check_port.map(|port| NodePort {
        protocol: Protocol::Tcp,
        port: port.get(),
        port_name: "".into(),
    }));
    node_ports.sort();
    (!node_ports.is_empty()).then_some(Firewall { node_ports, sources })
}

/// A family of which no range is listed is not restricted, as kube-proxy has it.
fn load_balancer_firewall(service: &Service, node: &NodeContext) -> Option<LoadBalancerFirewall> {
    let mut sources = sources(&service.load_balancer_sources)?;
    let restricted = |family: Family| match &sources {
        Sources::Closed => true,
        Sources::Allow(cidrs) => !cidrs.of_family(family).is_empty(),
    };
    let addresses: Vec<IpAddr> = service
        .load_balancer_ips
        .iter()
        .copied()
        .filter(|address| restricted(Family::of(*address)))
        .collect();
    let mut all: Vec<_> = service
        .ports
        .iter()
        .flat_map(|port| {
            let of = |address: &IpAddr| LoadBalancerAddress {
                protocol: port.protocol,
                address: *address,
                port: port.port.get(),
                port_name: port.name.clone(),
            };
            addresses.iter().map(of).collect::<Vec<_>>()
        })
        .collect();
    all.sort();
    all.dedup();
    if all.is_empty() {
        return None;
    }
    // Where a load-balancer address is an address of the node, the node's own connections to it
    // come from it.
    if let Sources::Allow(cidrs) = &mut sources
        && node.node.primary_addresses.iter().any(|address| cidrs.contains(*address))
    {
        let all = Family::ALL.iter().flat_map(|family| cidrs.of_family(*family));
        *cidrs = CidrSet::new(all.chain(addresses.iter().copied().map(Into::into)));
    }
    Some(LoadBalancerFirewall { addresses: all, sources })
}

fn sources(restriction: &SourceRestriction) -> Option<Sources> {
    match restriction {
        SourceRestriction::Unrestricted => None,
        SourceRestriction::Allow(cidrs) => Some(Sources::Allow(cidrs.clone())),
        SourceRestriction::Closed => Some(Sources::Closed),
    }
}
