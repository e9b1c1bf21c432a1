//! What becomes of packets: those that upstream's tests of its nftables proxy follow through its
//! ruleset, followed through ours.
//!
//! The objects are lowered and planned as everywhere, and the packets meet the very expressions and
//! elements that the kernel would get. Upstream sends everything through prerouting; here, what the
//! node itself sends goes through output.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use portcullis::model::{LocalTraffic, Node, NodePortAddresses, Protocol, ServiceCidr};
use portcullis::plan::Desired;
use portcullis::ruleset::Contribution;
use portcullis::watch::{Index, Options, lower};
use serde::Deserialize;

use crate::tracer::{Fate, Packet, Tracer};
use crate::{Comparison, Differences, read};

const FACTS: &str = include_str!("../../upstream/facts/packet-flows.json");

const DIFFERENT: &Differences = &[];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    line: String,
    proxy: Settings,
    services: Vec<core::Service>,
    endpoint_slices: Vec<discovery::EndpointSlice>,
    flows: Vec<Flow>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Settings {
    node_name: Arc<str>,
    #[serde(rename = "nodeIP")]
    node_ip: IpAddr,
    local_addresses: Vec<IpAddr>,
    node_port_addresses: Vec<IpNet>,
    #[serde(rename = "serviceCIDRs")]
    service_cidrs: Vec<IpNet>,
    /// `None` where nobody knows which addresses pods have.
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<IpNet>,
    masquerade_all: bool,
}

#[derive(Deserialize)]
struct Flow {
    source: IpAddr,
    protocol: String,
    destination: IpAddr,
    port: u16,
    /// `REJECT`, `DROP`, or all endpoints that may be chosen; empty where the packet goes on
    /// untranslated.
    outcome: Vec<String>,
    masquerade: bool,
}

#[test]
fn packets_meet_the_fate_that_upstream_expects() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for (number, case) in (1..).zip(read::<Case>(FACTS)?) {
        let tracer = case.tracer();
        for (packet, flow) in (1..).zip(&case.flows) {
            let name = format!("{} (case {number}) packet {packet}", case.line);
            let mut found = tracer.fates(flow.packet()?);
            found.sort_unstable();
            let expected = flow.expected().with_context(|| name.clone())?;
            let difference = (found != expected).then(|| {
                let Flow { source, protocol, destination, port, .. } = flow;
                format!("{source} to {protocol} {destination} {port}: {found:?}, not {expected:?}")
            });
            comparison.case(&name, difference);
        }
    }
    comparison.finish();
    Ok(())
}

impl Case {
    fn tracer(&self) -> Tracer {
        let Settings { node_name, pod_cidr, .. } = &self.proxy;
        let mut index = Index::new(&Options {
            nodeport_addresses: NodePortAddresses::Cidrs(self.proxy.node_port_addresses.clone()),
            local_traffic: LocalTraffic::Cidrs(pod_cidr.iter().copied().collect()),
            masquerade_all: self.proxy.masquerade_all,
            ..Options::new(node_name.clone())
        });
        index.set_node(Node { primary_addresses: vec![self.proxy.node_ip], ..Node::default() });
        let cidrs = self.proxy.service_cidrs.clone();
        let cidr = ServiceCidr { cidrs, ..ServiceCidr::default() };
        index.set_service_cidr(&"kubernetes".into(), Some(cidr));
        for slice in &self.endpoint_slices {
            index.set_slice(&lower::slice_name(slice), lower::slice(slice));
        }
        for service in &self.services {
            index.set_service(&lower::service_name(service), lower::service(service));
        }
        let mut desired = Desired::default();
        for plan in index.plans() {
            let service = plan.service().clone();
            desired.set(&service, Some(plan));
        }
        let plans = desired.services().filter_map(|service| desired.effective(service));
        let services = plans.map(|plan| Contribution::service(plan, |_| None));
        let contributions: Vec<_> =
            [Contribution::node(index.context())].into_iter().chain(services).collect();
        Tracer::new(self.proxy.local_addresses.clone(), &contributions)
    }
}

impl Flow {
    fn packet(&self) -> Result<Packet> {
        Ok(Packet {
            protocol: Protocol::parse(&self.protocol).context("a protocol")?,
            source: self.source,
            destination: (self.destination, self.port).into(),
        })
    }

    /// One fate for each endpoint that may be chosen, sorted.
    fn expected(&self) -> Result<Vec<Fate>> {
        let outcome: Vec<&str> = self.outcome.iter().map(String::as_str).collect();
        let passed = |to| Fate::Passed { to, masqueraded: self.masquerade };
        let mut fates = match outcome[..] {
            ["REJECT"] => vec![Fate::Rejected],
            ["DROP"] => vec![Fate::Dropped],
            [] => vec![passed(None)],
            _ => {
                let endpoints = outcome.iter().map(|endpoint| endpoint.parse::<SocketAddr>());
                let endpoints = endpoints.collect::<Result<Vec<_>, _>>()?;
                endpoints.into_iter().map(|endpoint| passed(Some(endpoint))).collect()
            }
        };
        let told = matches!(fates[0], Fate::Passed { .. }) || !self.masquerade;
        ensure!(told, "nothing tells whether what goes nowhere is masqueraded");
        fates.sort_unstable();
        Ok(fates)
    }
}
