//! The plan of one Service.

use std::collections::BTreeMap;

use super::{Firewall, Frontend, NodePort, Pool, ServicePlan, Sources};
use crate::model::{
    Backend, EndpointSlice, Family, NodeContext, Readiness, Service, ServicePort, SourceRestriction,
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
    for port in &service.ports {
        for &address in &service.cluster_ips {
            let family = Family::of(address);
            let mut frontends = vec![Frontend::ClusterIp { address, port: port.port.get() }];
            frontends.extend(port.node_port.map(|p| Frontend::NodePort { port: p.get() }));
            pools.push(pool(port, family, frontends, &slices, node));
        }
    }

    ServicePlan {
        seniority: service.seniority(),
        cluster_ips: service.cluster_ips.clone(),
        pools,
        firewall: firewall(service),
        diagnostics,
    }
}

fn pool(
    port: &ServicePort,
    family: Family,
    frontends: Vec<Frontend>,
    slices: &[&EndpointSlice],
    node: &NodeContext,
) -> Pool {
    // While a controller moves an endpoint between slices it stands in both; it is served when
    // either says so (kubernetes/kubernetes#135593), and it is local when either says so.
    let mut backends: BTreeMap<Backend, bool> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        let of_port =
            |p: &&crate::model::SlicePort| p.name == port.name && p.protocol == port.protocol;
        let Some(slice_port) = slice.ports.iter().find(of_port) else { continue };
        for endpoint in slice.endpoints.iter().filter(|e| e.readiness == Readiness::Ready) {
            let backend = Backend { address: endpoint.address, port: slice_port.port.get() };
            *backends.entry(backend).or_default() |= endpoint.node.as_ref() == Some(&node.name);
        }
    }
    let mut local: Vec<_> =
        backends.iter().filter(|(_, local)| **local).map(|(backend, _)| backend.address).collect();
    local.dedup();
    Pool {
        port_name: port.name.clone(),
        family,
        protocol: port.protocol,
        frontends,
        backends: backends.into_keys().collect(),
        local,
    }
}

fn firewall(service: &Service) -> Option<Firewall> {
    let sources = match &service.node_port_sources {
        SourceRestriction::Unrestricted => return None,
        SourceRestriction::Allow(cidrs) => Sources::Allow(cidrs.clone()),
        SourceRestriction::Closed => Sources::Closed,
    };
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
    node_ports.sort();
    (!node_ports.is_empty()).then_some(Firewall { node_ports, sources })
}
