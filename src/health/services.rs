//! Answers for each Service with a `healthCheckNodePort`: whether this node has endpoints of it.
//!
//! Load balancers ask every node and send connections to those that say yes. Path, method and
//! headers of the question do not matter; the answer is that of kube-proxy
//! (`pkg/proxy/healthcheck/service_health.go`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Response};
use nix::sys::socket::sockopt::{IpFreebind, ReuseAddr};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::server::answer;
use super::{Connections, Health};
use crate::commit::Report;
use crate::model::{Diagnostic, Family, NodeContext, ObjectKind, ObjectRef, ServiceName, Severity};
use crate::plan::HealthCheck;
use crate::report::Reporter;
use crate::ruleset::Subject;

/// How often addresses are looked at that come and go, and ports that could not be listened at.
const LOOK: Duration = Duration::from_secs(5);

/// Tells what becomes of Services. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Checks(mpsc::UnboundedSender<(ServiceName, Option<HealthCheck>)>);

/// What [`serve`] is told.
#[derive(Debug)]
pub struct Told(mpsc::UnboundedReceiver<(ServiceName, Option<HealthCheck>)>);

/// Two ends: one to tell of Services, one to serve what was told.
pub fn checks() -> (Checks, Told) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Checks(sender), Told(receiver))
}

impl Checks {
    /// Takes what became of a subject when it was committed. Of what the kernel refused, what was
    /// told before stays true.
    pub fn commit(&self, report: &Report) {
        let Subject::Service(service) = &report.subject else { return };
        if report.refused.is_some() && report.plan.is_some() {
            return;
        }
        let check = report.plan.as_ref().and_then(|plan| plan.health_check.clone());
        // Nobody asks a daemon that only programs once.
        let _ = self.0.send((service.clone(), check));
    }
}

/// Answers for all Services that are told of, for ever.
pub async fn serve(mut told: Told, connections: Connections, health: Health, reporter: Reporter) {
    let mut servers: HashMap<ServiceName, Server> = HashMap::new();
    let mut node = reporter.watch_node();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut addresses = BTreeSet::new();
    loop {
        tokio::select! {
            next = told.0.recv() => {
                let Some((service, check)) = next else { return };
                let Some(check) = check else {
                    if let Some(server) = servers.remove(&service) {
                        server.end();
                        reporter.health_check(&service, None);
                    }
                    continue;
                };
                let server = servers.entry(service.clone()).or_default();
                server.set(&check);
                server.listen(&service, &addresses, &connections, &health, &reporter);
            }
            changed = node.changed() => {
                if changed.is_err() {
                    return;
                }
                addresses = node.borrow().as_ref().map(|node| served_at(node)).unwrap_or_default();
                for (service, server) in &mut servers {
                    server.listen(service, &addresses, &connections, &health, &reporter);
                }
            }
            _ = look.tick(), if !servers.is_empty() => {
                addresses = node.borrow().as_ref().map(|node| served_at(node)).unwrap_or_default();
                for (service, server) in &mut servers {
                    server.listen(service, &addresses, &connections, &health, &reporter);
                }
            }
        }
    }
}

/// The addresses at which node ports are served: the node's primary ones, be they there yet or not,
/// or its own in the configured CIDRs.
fn served_at(node: &NodeContext) -> BTreeSet<IpAddr> {
    let cidrs = Family::ALL.map(|family| node.nodeport_cidrs(family)).concat();
    let whole = |cidr: &ipnet::IpNet| cidr.prefix_len() == cidr.max_prefix_len();
    let single = cidrs.iter().filter(|cidr| whole(cidr)).map(ipnet::IpNet::addr);
    let own = crate::host::own_addresses();
    let own = own.into_iter().filter(|address| !address.is_loopback());
    single.chain(own.filter(|own| cidrs.iter().any(|cidr| cidr.contains(own)))).collect()
}

/// The listeners of one Service.
#[derive(Debug, Default)]
struct Server {
    port: u16,
    /// How many endpoints are here, by family.
    local: BTreeMap<Family, Arc<AtomicUsize>>,
    listeners: BTreeMap<IpAddr, AbortHandle>,
}

impl Server {
    fn set(&mut self, check: &HealthCheck) {
        if self.port != check.port {
            self.end_all();
            self.port = check.port;
        }
        self.local.retain(|family, _| check.local_endpoints.contains_key(family));
        for (family, count) in &check.local_endpoints {
            self.local.entry(*family).or_default().store(*count, Ordering::Relaxed);
        }
    }

    /// Listens where it should and does not yet, and no longer where it should not.
    fn listen(
        &mut self,
        service: &ServiceName,
        addresses: &BTreeSet<IpAddr>,
        connections: &Connections,
        health: &Health,
        reporter: &Reporter,
    ) {
        let wanted = |address: &IpAddr| {
            addresses.contains(address) && self.local.contains_key(&Family::of(*address))
        };
        self.listeners.retain(|address, listener| {
            let keep = wanted(address) && !listener.is_finished();
            if !keep {
                listener.abort();
            }
            keep
        });
        let mut failed = Vec::new();
        for &address in addresses {
            let Some(local) = self.local.get(&Family::of(address)) else { continue };
            if self.listeners.contains_key(&address) {
                continue;
            }
            let address_and_port = SocketAddr::new(address, self.port);
            match bind(address_and_port) {
                Ok(listener) => {
                    let routes = routes(service, local, health);
                    let connections = connections.clone();
                    let serving =
                        tokio::spawn(async move { connections.answer(&listener, &routes).await });
                    self.listeners.insert(address, serving.abort_handle());
                }
                Err(error) => failed.push(format!("{address_and_port}: {error}")),
            }
        }
        reporter.health_check(service, problem(service, &failed));
    }

    fn end_all(&mut self) {
        for (_, listener) in std::mem::take(&mut self.listeners) {
            listener.abort();
        }
    }

    fn end(mut self) {
        self.end_all();
    }
}

/// Listens at an address, also if the node has not got it yet.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    nix::sys::socket::setsockopt(&socket, ReuseAddr, &true)?;
    nix::sys::socket::setsockopt(&socket, IpFreebind, &true)?;
    socket.bind(address)?;
    socket.listen(128)
}

fn routes(service: &ServiceName, local: &Arc<AtomicUsize>, health: &Health) -> Router {
    let (service, local, health) = (service.clone(), Arc::clone(local), health.clone());
    let answer = async move || told(&service, local.load(Ordering::Relaxed), health.is_alive());
    Router::new().fallback(answer)
}

fn told(service: &ServiceName, local: usize, healthy: bool) -> Response<Body> {
    let body = json!({
        "service": { "namespace": &*service.namespace, "name": &*service.name },
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    });
    let mut response = answer(local > 0 && healthy, format!("{body:#}\n"));
    response.headers_mut().insert("x-load-balancing-endpoint-weight", HeaderValue::from(local));
    response
}

fn problem(service: &ServiceName, failed: &[String]) -> Option<Diagnostic> {
    (!failed.is_empty()).then(|| Diagnostic {
        object: ObjectRef {
            kind: ObjectKind::Service,
            namespace: service.namespace.clone(),
            name: service.name.clone(),
        },
        field: "spec.healthCheckNodePort".to_owned(),
        severity: Severity::Error,
        message: format!(
            "cannot listen at {}; tried again, and until then load balancers get no answer there",
            failed.join(", "),
        ),
    })
}
