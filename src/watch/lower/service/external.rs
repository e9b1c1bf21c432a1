//! What clients outside the cluster see of a Service, apart from its node ports.

use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::{IpNet, Ipv4Net};
use k8s_openapi::api::core::v1 as core;

use super::super::{Findings, port, shown, unicast};
use super::traffic::policy;
use super::{Exposure, SOURCES_ANNOTATION};
use crate::model::{CidrSet, Family, SourceRestriction, TrafficPolicy};

/// The fields of a Service that are about clients outside the cluster.
pub(super) struct External {
    pub load_balancer_ips: Vec<IpAddr>,
    pub addresses: Vec<IpAddr>,
    pub traffic: TrafficPolicy,
    pub load_balancer_sources: SourceRestriction,
    pub health_check_port: Option<NonZeroU16>,
}

/// How many ranges a Service may list, counted once for each load-balancer address and port: each is
/// an element in the kernel, and whoever may make a Service must not fill its memory.
const MOST_SOURCES: usize = 1 << 16;

impl External {
    pub fn of(
        object: &core::Service,
        spec: &core::ServiceSpec,
        exposure: Exposure,
        cluster_ips: &[IpAddr],
        findings: &mut Findings,
    ) -> External {
        let balanced = exposure == Exposure::LoadBalancer;
        let field = "spec.externalTrafficPolicy";
        let traffic = policy(spec.external_traffic_policy.as_deref(), field, findings);
        let load_balancer_ips =
            if balanced { load_balancer_ips(object, cluster_ips, findings) } else { Vec::new() };
        let ranges = if balanced {
            ranges(spec, cluster_ips, load_balancer_ips.len(), findings)
        } else {
            SourceRestriction::Unrestricted
        };
        let asks = balanced && traffic == TrafficPolicy::Local;
        let health_check_port = if asks { health_check_port(spec, findings) } else { None };
        External {
            load_balancer_ips,
            addresses: external_ips(spec, cluster_ips, findings),
            traffic,
            load_balancer_sources: ranges,
            health_check_port,
        }
    }
}

fn external_ips(
    spec: &core::ServiceSpec,
    cluster_ips: &[IpAddr],
    findings: &mut Findings,
) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (index, text) in spec.external_ips.iter().flatten().enumerate() {
        let field = format!("spec.externalIPs[{index}]");
        take(text, field, cluster_ips, &mut addresses, findings);
    }
    addresses
}

fn load_balancer_ips(
    object: &core::Service,
    cluster_ips: &[IpAddr],
    findings: &mut Findings,
) -> Vec<IpAddr> {
    let status = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|balancer| balancer.ingress.as_ref());
    let mut addresses = Vec::new();
    for (index, entry) in ingress.into_iter().flatten().enumerate() {
        // An address in mode Proxy is the load balancer's own; its connections come to node ports
        // or pods (KEP-1860).
        if entry.ip_mode.as_deref() == Some("Proxy") {
            continue;
        }
        // A load balancer may be known by its host name alone.
        let Some(text) = entry.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        let field = format!("status.loadBalancer.ingress[{index}].ip");
        take(text, field, cluster_ips, &mut addresses, findings);
    }
    addresses
}

/// Adds an address, or says why not.
fn take(
    text: &str,
    field: String,
    cluster_ips: &[IpAddr],
    addresses: &mut Vec<IpAddr>,
    findings: &mut Findings,
) {
    match unicast(text) {
        Ok(address) if addresses.contains(&address) => {}
        Ok(address) => {
            let family = Family::of(address);
            if cluster_ips.iter().any(|own| Family::of(*own) == family) {
                addresses.push(address);
            } else if !cluster_ips.is_empty() {
                let message =
                    format!("{address} is of another family than the Service's; not served");
                findings.warning(field, message);
            }
        }
        Err(why) => findings.error(field, format!("{} {why}; not served", shown(text))),
    }
}

/// `loadBalancerSourceRanges`. A list that is not understood closes the addresses that it is about.
fn ranges(
    spec: &core::ServiceSpec,
    cluster_ips: &[IpAddr],
    load_balancer_ips: usize,
    findings: &mut Findings,
) -> SourceRestriction {
    let mut cidrs: Vec<IpNet> = Vec::new();
    let mut closed = false;
    for (index, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
        // The API server leaves white space where it is, as kube-proxy does.
        if let Ok(cidr) = text.trim().parse::<IpNet>() {
            cidrs.push(unmapped(cidr));
            continue;
        }
        closed = true;
        let field = format!("spec.loadBalancerSourceRanges[{index}]");
        let message = format!(
            "{} is not a CIDR; the Service's load-balancer addresses are closed to everyone",
            shown(text)
        );
        findings.error(field, message);
    }
    let places = load_balancer_ips * spec.ports.as_ref().map_or(0, Vec::len);
    if cidrs.len() * places > MOST_SOURCES {
        closed = true;
        let message = format!(
            "{} ranges for {places} load-balancer addresses and ports are more than {MOST_SOURCES} \
             together; the addresses are closed to everyone",
            cidrs.len()
        );
        findings.error("spec.loadBalancerSourceRanges", message);
    }
    if closed {
        return SourceRestriction::Closed;
    }
    if cidrs.is_empty() {
        return SourceRestriction::Unrestricted;
    }
    let restricted = |family| cidrs.iter().any(|cidr| Family::of(cidr.network()) == family);
    let served = |family| cluster_ips.iter().any(|address| Family::of(*address) == family);
    for family in Family::ALL {
        if served(family) && !restricted(family) {
            let message = format!(
                "no range is of IPv{}: over that family everyone may connect, as with kube-proxy \
                 (node ports are restricted by the annotation {SOURCES_ANNOTATION})",
                family.digit()
            );
            findings.warning("spec.loadBalancerSourceRanges", message);
        }
    }
    SourceRestriction::Allow(CidrSet::new(cidrs))
}

/// IPv4 as it is, also where it is written as IPv6 (`::ffff:192.0.2.0/120`): to kube-proxy such a
/// range is one of IPv4, and packets never have such addresses.
fn unmapped(cidr: IpNet) -> IpNet {
    let IpNet::V6(v6) = cidr else { return cidr };
    let v4 = v6.addr().to_ipv4_mapped().zip(v6.prefix_len().checked_sub(96));
    let v4 = v4.and_then(|(address, length)| Ipv4Net::new(address, length).ok());
    v4.map_or(cidr, IpNet::V4)
}

fn health_check_port(spec: &core::ServiceSpec, findings: &mut Findings) -> Option<NonZeroU16> {
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    let valid = port(number);
    if valid.is_none() {
        let message = format!("{number} is not a port; nothing answers there");
        findings.error("spec.healthCheckNodePort", message);
    }
    valid
}
