//! Which endpoints serve: the cases of upstream's `TestCategorizeEndpoints`, against the plan.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use anyhow::{Context, Result};
use portcullis::model::{
    Backend, Endpoint, EndpointSlice, Family, Hints, Node, NodeContext, Protocol, Readiness,
    Service, ServiceName, ServicePort, SliceName, SlicePort, TrafficPolicy,
};
use portcullis::plan::plan_service;
use serde::Deserialize;

use crate::{Comparison, Differences, read};

const FACTS: &str = include_str!("../../upstream/facts/categorize-endpoints.json");

const DIFFERENT: &Differences =
    &[("topology_test.go:182", "it turns hints for nodes off, and here they always count")];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    line: String,
    node: KnownNode,
    service: Policies,
    endpoints: Vec<KnownEndpoint>,
    expected: Expected,
}

#[derive(Deserialize)]
struct KnownNode {
    name: Arc<str>,
    zone: Option<Arc<str>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Policies {
    internal_traffic_policy: String,
    external_traffic_policy: String,
    node_port: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KnownEndpoint {
    address: SocketAddr,
    local: bool,
    ready: bool,
    serving: bool,
    terminating: bool,
    #[serde(default)]
    zone_hints: Vec<Arc<str>>,
    #[serde(default)]
    node_hints: Vec<Arc<str>>,
}

#[derive(Deserialize)]
struct Expected {
    /// `None` where the Service uses none by this policy; so we have none there either.
    cluster: Option<BTreeSet<SocketAddr>>,
    local: Option<BTreeSet<SocketAddr>>,
    all: Option<BTreeSet<SocketAddr>>,
    any: bool,
}

/// What serves.
#[derive(Debug, PartialEq, Eq)]
struct Serving {
    cluster: BTreeSet<SocketAddr>,
    local: BTreeSet<SocketAddr>,
    all: BTreeSet<SocketAddr>,
    any: bool,
}

#[test]
fn the_endpoints_serve_that_upstream_expects() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for case in read::<Case>(FACTS)? {
        let found = case.serving().with_context(|| case.line.clone())?;
        let expected = case.expected();
        let difference = (found != expected).then(|| format!("{found:?}, not {expected:?}"));
        comparison.case(&case.line, difference);
    }
    comparison.finish();
    Ok(())
}

impl Case {
    fn expected(&self) -> Serving {
        let Expected { cluster, local, all, any } = &self.expected;
        Serving {
            cluster: cluster.clone().unwrap_or_default(),
            local: local.clone().unwrap_or_default(),
            all: all.clone().unwrap_or_default(),
            any: *any,
        }
    }

    /// What serves by our plan.
    fn serving(&self) -> Result<Serving> {
        let name = ServiceName::new("ns", "svc");
        let port = ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::MIN,
            node_port: NonZeroU16::new(self.service.node_port),
        };
        let service = Service {
            cluster_ips: vec!["172.30.0.1".parse()?],
            ports: vec![port],
            internal_traffic: policy(&self.service.internal_traffic_policy)?,
            external_traffic: policy(&self.service.external_traffic_policy)?,
            ..Service::new(name.clone())
        };
        let node = NodeContext {
            // As reading a Node has it.
            node: Node {
                zone: self.node.zone.clone().filter(|zone| !zone.is_empty()),
                ..Node::default()
            },
            ..NodeContext::new(self.node.name.clone())
        };
        let slices = self.endpoints.iter().enumerate().map(|(index, endpoint)| {
            let port = NonZeroU16::new(endpoint.address.port()).context("a port")?;
            Ok(EndpointSlice {
                name: SliceName { namespace: "ns".into(), name: format!("svc-{index}").into() },
                service: name.clone(),
                family: Family::of(endpoint.address.ip()),
                ports: vec![SlicePort { name: "".into(), protocol: Protocol::Tcp, port }],
                endpoints: vec![endpoint.model(&node)],
                diagnostics: Vec::new(),
            })
        });
        let slices = slices.collect::<Result<Vec<EndpointSlice>>>()?;
        let plan = plan_service(&service, &slices, &node);
        let [pool] = &plan.pools[..] else { anyhow::bail!("{} pools", plan.pools.len()) };
        let set = |list: &[Backend]| -> BTreeSet<SocketAddr> {
            list.iter().map(|backend| (backend.address, backend.port).into()).collect()
        };
        let (cluster, local) = (set(&pool.backends), set(&pool.local_backends));
        Ok(Serving { all: cluster.union(&local).copied().collect(), cluster, local, any: pool.any })
    }
}

impl KnownEndpoint {
    fn model(&self, node: &NodeContext) -> Endpoint {
        let hints = Hints { zones: self.zone_hints.clone(), nodes: self.node_hints.clone() };
        Endpoint {
            readiness: match (self.ready, self.serving && self.terminating) {
                (true, _) => Readiness::Ready,
                (false, true) => Readiness::ServingTerminating,
                (false, false) => Readiness::NotReady,
            },
            node: self.local.then(|| node.name.clone()),
            hints: (hints != Hints::default()).then(|| Arc::new(hints)),
            ..Endpoint::new(self.address.ip())
        }
    }
}

fn policy(text: &str) -> Result<TrafficPolicy> {
    match text {
        "Cluster" => Ok(TrafficPolicy::Cluster),
        "Local" => Ok(TrafficPolicy::Local),
        other => anyhow::bail!("{other:?} is no traffic policy"),
    }
}
