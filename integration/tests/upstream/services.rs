//! What a Service asks for: the ports and addresses that upstream reads out of objects, against what
//! ours are lowered to.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use portcullis::model::{Family, Service, ServicePort, SourceRestriction};
use portcullis::watch::lower;
use serde::Deserialize;

use crate::{Comparison, Differences, read};

const FACTS: &str = include_str!("../../upstream/facts/service-ports.json");

const DIFFERENT: &Differences = &[];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    line: String,
    ip_family: String,
    service: Option<core::Service>,
    ports: BTreeSet<Asked>,
}

/// What a Service asks for at one of its ports, in one family.
#[derive(Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
struct Asked {
    name: String,
    protocol: String,
    #[serde(rename = "clusterIP")]
    cluster_ip: IpAddr,
    port: u16,
    #[serde(rename = "externalIPs")]
    external_ips: BTreeSet<IpAddr>,
    #[serde(rename = "loadBalancerIPs")]
    load_balancer_ips: BTreeSet<IpAddr>,
    /// Everybody where there is none.
    source_ranges: BTreeSet<IpNet>,
    /// 0 where load balancers do not ask.
    health_check_node_port: u16,
}

#[test]
fn services_ask_for_what_upstream_reads() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for case in read::<Case>(FACTS)? {
        let found = case.found().with_context(|| case.line.clone())?;
        let difference = (found != case.ports).then(|| format!("{found:?}, not {:?}", case.ports));
        comparison.case(&case.line, difference);
    }
    comparison.finish();
    Ok(())
}

impl Case {
    fn found(&self) -> Result<BTreeSet<Asked>> {
        let family = match self.ip_family.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => bail!("{other:?} is no family"),
        };
        let Some(mut object) = self.service.clone() else { return Ok(BTreeSet::new()) };
        // Some of upstream's Services say no type, but have what only this one has at an API server.
        let spec = object.spec.get_or_insert_default();
        spec.type_.get_or_insert_with(|| "LoadBalancer".to_owned());
        let Some(service) = lower::service(&object) else { return Ok(BTreeSet::new()) };
        Ok(ports(&service, family)?.into_iter().collect())
    }
}

/// What a proxy of one family would serve.
fn ports(service: &Service, family: Family) -> Result<Vec<Asked>> {
    let of_family = |all: &[IpAddr]| -> BTreeSet<IpAddr> {
        all.iter().copied().filter(|address| Family::of(*address) == family).collect()
    };
    let Some(cluster_ip) = of_family(&service.cluster_ips).first().copied() else {
        return Ok(Vec::new());
    };
    let source_ranges = match &service.load_balancer_sources {
        SourceRestriction::Unrestricted => BTreeSet::new(),
        SourceRestriction::Allow(sources) => sources.of_family(family).into_iter().collect(),
        SourceRestriction::Closed => bail!("nobody may: {:?}", service.diagnostics),
    };
    let port = |port: &ServicePort| Asked {
        name: port.name.to_string(),
        protocol: port.protocol.to_string().to_uppercase(),
        cluster_ip,
        port: port.port.get(),
        external_ips: of_family(&service.external_ips),
        load_balancer_ips: of_family(&service.load_balancer_ips),
        source_ranges: source_ranges.clone(),
        health_check_node_port: service.health_check_port.map_or(0, NonZeroU16::get),
    };
    Ok(service.ports.iter().map(port).collect())
}
