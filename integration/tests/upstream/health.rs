//! What load balancers and probes are told: the answers of upstream's two health servers, against
//! those of ours over HTTP.
//!
//! The servers are the library's own, in a network namespace. What they are told comes from plans,
//! and a clock from upstream's table is waited for: there, time passes only while a change waits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1 as core;
use portcullis::commit::{Pulse, Report, Totals};
use portcullis::health::{Connections, Health, server, services};
use portcullis::model::{
    Endpoint, EndpointSlice, Family, NodeContext, NodePortAddresses, Protocol, Service,
    ServiceName, ServicePort, SliceName, SlicePort, TrafficPolicy,
};
use portcullis::plan::plan_service;
use portcullis::report::Reporter;
use portcullis::ruleset::Subject;
use portcullis::watch::lower;
use portcullis_integration::lab::{Namespace, eventually};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Response, http_get};
use serde::Deserialize;
use serde_json::Value;

use crate::{Comparison, Differences, read};

const SERVICES: &str = include_str!("../../upstream/facts/service-health.json");
const PROXIES: &str = include_str!("../../upstream/facts/proxy-health.json");

const DIFFERENT_SERVICES: &Differences = &[(
    "healthcheck_test.go:1013",
    "load balancers do not ask from the node, so loopback has no answers",
)];
const DIFFERENT_PROXIES: &Differences = &[
    ("/healthz healthcheck_test.go:715", ONE_TRANSACTION),
    ("/healthz healthcheck_test.go:751", ONE_TRANSACTION),
    ("/healthz healthcheck_test.go:824", ONE_TRANSACTION),
    ("/healthz healthcheck_test.go:839", ONE_TRANSACTION),
    ("/livez healthcheck_test.go:715", ONE_TRANSACTION),
    ("/livez healthcheck_test.go:751", ONE_TRANSACTION),
    ("/livez healthcheck_test.go:824", ONE_TRANSACTION),
    ("/livez healthcheck_test.go:839", ONE_TRANSACTION),
];
const ONE_TRANSACTION: &str = "one family waits there; here both are in one transaction, and neither is healthy without the other";

/// The node, its address in its namespace, and where its proxy answers.
const NODE: &str = "test-node";
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const PROXY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);

/// After how long a change that waits makes the proxy unhealthy: upstream's seconds, made short.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long an answer may take to become another; it takes milliseconds.
const NOTICE: Duration = Duration::from_secs(5);

/// A question about a Service, and the answer.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    line: String,
    services: Vec<Known>,
    /// Addresses with ports.
    listening: BTreeSet<SocketAddr>,
    proxy_healthy: bool,
    /// Who is asked about.
    service: String,
    status: u16,
    headers: BTreeMap<String, String>,
    body: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Known {
    name: String,
    port: NonZeroU16,
    local_endpoints: u8,
}

/// What happens to a proxy.
#[derive(Deserialize)]
struct Life {
    test: String,
    /// In seconds, as `at`.
    patience: f64,
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    at: f64,
    #[serde(flatten)]
    what: What,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum What {
    /// A change for a family waits.
    Queued(String),
    /// Nothing waits for a family any more.
    Updated(String),
    Question(Box<Question>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Question {
    line: String,
    path: String,
    node: core::Node,
    status: u16,
    healthy: bool,
    node_eligible: Option<bool>,
    /// Whether the time of the last update is that of the answer.
    updated_now: bool,
    /// Which families are healthy.
    families: BTreeMap<String, bool>,
}

/// A proxy without a kernel: whether it works is what it is told.
struct Proxy {
    pulse: Pulse,
    reporter: Reporter,
    node: Namespace,
}

impl Proxy {
    fn new() -> Result<Proxy> {
        let node = Namespace::new("node")?;
        node.ip(&[format!("addr add {ADDRESS}/32 dev lo")])?;
        Ok(Proxy { pulse: Pulse::default(), reporter: Reporter::new(NODE.into()), node })
    }

    fn health(&self) -> Health {
        Health::new(self.pulse.clone(), self.reporter.clone()).with_patience(PATIENCE)
    }

    /// Whether nobody answers at a port, in a moment if not now.
    fn is_closed(&self, port: NonZeroU16) -> bool {
        eventually(NOTICE, || http_get(&self.node, (ADDRESS, port.get()), "/").is_err())
    }

    fn queue(&self) {
        self.pulse.asked();
    }

    fn finish(&self, count: usize) {
        self.pulse.done(count, false, Totals::default());
    }

    /// Waits until what waits has waited too long.
    fn fall_behind(&self) -> Result<()> {
        let late = eventually(NOTICE, || self.pulse.behind() >= PATIENCE);
        ensure!(late, "nothing waits");
        Ok(())
    }

    /// Runs `questions` beside `server`, which never ends by itself.
    fn serve<T: Send + 'static>(
        &self,
        server: impl Future<Output = T> + Send + 'static,
        questions: impl FnOnce() -> Result<()> + Send,
    ) -> Result<()> {
        let (done, stop) = tokio::sync::oneshot::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                self.node.block_on(async {
                    tokio::select! { _ = server => {}, _ = stop => {} }
                });
            });
            let result = questions();
            drop(done);
            result
        })
    }
}

#[test]
fn load_balancers_are_told_what_upstream_tells_them() -> Result<()> {
    if !available(&[Requirement::Root]) {
        return Ok(());
    }
    let checks: Vec<Check> = read(SERVICES)?;
    let mut comparison = Comparison::new(DIFFERENT_SERVICES);
    for of_one_listener in checks.chunk_by(|a, b| a.is_at_loopback() == b.is_at_loopback()) {
        let proxy = Proxy::new()?;
        let context = context(of_one_listener[0].is_at_loopback())?;
        proxy.reporter.node(&context);
        let (told, tells) = services::channel();
        let server =
            services::serve(tells, Connections::default(), proxy.health(), proxy.reporter.clone());
        proxy.serve(server, || {
            let mut before: BTreeMap<&str, NonZeroU16> = BTreeMap::new();
            for check in of_one_listener {
                let known = check.services.iter();
                let now: BTreeMap<_, _> = known.map(|one| (one.name.as_str(), one.port)).collect();
                for gone in before.keys().filter(|name| !now.contains_key(*name)) {
                    told.commit(&report(&service_name(gone), None));
                }
                for known in &check.services {
                    told.commit(&known.report(&context));
                }
                let difference = check.difference(&proxy)?;
                let mut closed =
                    before.values().filter(|port| !now.values().any(|now| now == *port));
                let open = closed.find(|port| !proxy.is_closed(**port));
                let open = open.map(|port| format!("port {port} still answers"));
                comparison.case(&check.line, difference.or(open));
                before = now;
            }
            Ok(())
        })?;
    }
    comparison.finish();
    Ok(())
}

#[test]
fn probes_are_told_what_upstream_tells_them() -> Result<()> {
    if !available(&[Requirement::Root]) {
        return Ok(());
    }
    let mut comparison = Comparison::new(DIFFERENT_PROXIES);
    for life in read::<Life>(PROXIES)? {
        let proxy = Proxy::new()?;
        let routes = server::routes(&proxy.health());
        let server = server::serve("health checks", PROXY, routes, Connections::default());
        let listens = || http_get(&proxy.node, PROXY, "/livez").is_ok();
        proxy.serve(server, || {
            ensure!(eventually(NOTICE, listens), "nobody listens");
            life.happen(&proxy, &mut comparison).with_context(|| life.test.clone())
        })?;
    }
    comparison.finish();
    Ok(())
}

/// The node, which serves node ports at all of its addresses, or at loopback ones.
fn context(at_loopback: bool) -> Result<NodeContext> {
    let cidr = if at_loopback { "127.0.0.0/8" } else { "0.0.0.0/0" };
    Ok(NodeContext {
        nodeport_addresses: NodePortAddresses::Cidrs(vec![cidr.parse()?]),
        ..NodeContext::new(NODE.into())
    })
}

fn service_name(name: &str) -> ServiceName {
    let (namespace, name) = name.split_once('/').expect("NAMESPACE/NAME");
    ServiceName::new(namespace, name)
}

impl Known {
    /// What is told of the Service when it is committed.
    fn report(&self, node: &NodeContext) -> Report {
        let name = service_name(&self.name);
        let service = Service {
            cluster_ips: vec![[10, 96, 0, 1].into()],
            ports: vec![ServicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::MIN,
                node_port: None,
            }],
            external_traffic: TrafficPolicy::Local,
            health_check_port: Some(self.port),
            ..Service::new(name.clone())
        };
        let endpoint = |number| Endpoint {
            node: Some(node.name.clone()),
            ..Endpoint::new([10, 0, 0, number].into())
        };
        let slice = EndpointSlice {
            name: SliceName { namespace: name.namespace.clone(), name: "slice".into() },
            service: name.clone(),
            family: Family::V4,
            ports: vec![SlicePort {
                name: "".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::MIN,
            }],
            endpoints: (1..=self.local_endpoints).map(endpoint).collect(),
            diagnostics: Vec::new(),
        };
        report(&name, Some(plan_service(&service, [&slice], node)))
    }
}

fn report(service: &ServiceName, plan: Option<portcullis::plan::ServicePlan>) -> Report {
    Report { subject: Subject::Service(service.clone()), refused: None, plan: plan.map(Arc::new) }
}

impl Check {
    fn is_at_loopback(&self) -> bool {
        self.listening.iter().all(|address| address.ip().is_loopback())
    }

    /// What is different, if anything is.
    fn difference(&self, proxy: &Proxy) -> Result<Option<String>> {
        if !self.proxy_healthy {
            proxy.queue();
            proxy.fall_behind()?;
        }
        let difference = self.difference_of_answers(proxy);
        if !self.proxy_healthy {
            proxy.finish(1);
        }
        difference
    }

    fn difference_of_answers(&self, proxy: &Proxy) -> Result<Option<String>> {
        let asked = self.services.iter().find(|known| known.name == self.service);
        let port = asked.context("nobody knows the Service")?.port.get();
        let listening = self.listening.iter().find(|address| address.port() == port);
        let listening = listening.context("nobody listens for the Service")?.ip();
        let at = if listening.is_unspecified() { ADDRESS } else { listening };
        let mut last = None;
        let told = eventually(NOTICE, || {
            let answer = http_get(&proxy.node, (at, port), "/healthz");
            let same = answer.as_ref().is_ok_and(|answer| self.is_told(answer));
            last = Some(answer);
            same
        });
        Ok((!told).then(|| format!("{at}:{port}: {last:?}")))
    }

    fn is_told(&self, answer: &Response) -> bool {
        let headers =
            self.headers.iter().all(|(name, value)| answer.headers.get(name) == Some(value));
        let body = serde_json::from_str::<Value>(&answer.body).ok();
        answer.status == self.status && headers && body.as_ref() == Some(&self.body)
    }
}

impl Life {
    fn happen(&self, proxy: &Proxy, comparison: &mut Comparison<'_>) -> Result<()> {
        // Of each family, how many changes wait.
        let mut waiting: BTreeMap<&str, usize> = BTreeMap::new();
        let mut since = 0.0;
        for event in &self.events {
            if event.at - since >= self.patience && waiting.values().any(|count| *count > 0) {
                proxy.fall_behind()?;
            }
            since = event.at;
            match &event.what {
                What::Queued(family) => {
                    proxy.queue();
                    *waiting.entry(family).or_default() += 1;
                }
                What::Updated(family) => {
                    if let Some(count) = waiting.remove(family.as_str()) {
                        proxy.finish(count);
                    }
                }
                What::Question(question) => {
                    let name = format!("{} {}", question.path, question.line);
                    comparison.case(&name, question.difference(proxy)?);
                }
            }
        }
        Ok(())
    }
}

impl Question {
    fn difference(&self, proxy: &Proxy) -> Result<Option<String>> {
        let node = lower::node(&self.node);
        proxy.reporter.node(&NodeContext { node, ..NodeContext::new(NODE.into()) });
        let answer = http_get(&proxy.node, PROXY, &self.path)?;
        let body: Value = serde_json::from_str(&answer.body).context(answer.body.clone())?;
        let families = self.families.iter();
        let same = answer.status == self.status
            && body["healthy"] == self.healthy
            && body.get("nodeEligible").and_then(Value::as_bool) == self.node_eligible
            && (body["lastUpdated"] == body["currentTime"]) == self.updated_now
            && { families }.all(|(family, healthy)| body["status"][family]["healthy"] == *healthy);
        Ok((!same).then(|| format!("{} {body}", answer.status)))
    }
}
