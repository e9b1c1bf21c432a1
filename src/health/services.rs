//! Answers for each Service with a `healthCheckNodePort`: whether this node has endpoints of it.
//!
//! Load balancers ask every node and send connections to those that say yes. Path, method and
//! headers of the question do not matter; the answer is that of kube-proxy
//! (`pkg/proxy/healthcheck/service_health.go`).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Response};
use ipnet::IpNet;
use nix::sys::socket::sockopt::{IpFreebind, Ipv6V6Only, ReuseAddr};
use serde_json::json;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{Connections, Health};
use crate::commit::Report;
use crate::host::OwnAddresses;
use crate::model::{Diagnostic, Family, NodeContext, ObjectRef, ServiceName, Severity};
use crate::plan::HealthCheck;
use crate::report::Reporter;

/// How often addresses are looked at that come and go, and ports that could not be listened at.
const LOOK: Duration = Duration::from_secs(5);

/// Tells what becomes of Services. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sender(mpsc::UnboundedSender<(ServiceName, Option<HealthCheck>)>);

/// What [`serve`] is told.
#[derive(Debug)]
pub struct Receiver(mpsc::UnboundedReceiver<(ServiceName, Option<HealthCheck>)>);

/// Two ends: one to tell of Services, one to serve what was told.
pub fn channel() -> (Sender, Receiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Sender(sender), Receiver(receiver))
}

impl Sender {
    /// Takes what became of a subject when it was committed.
    pub fn commit(&self, report: &Report) {
        let Some((service, plan)) = report.in_force() else { return };
        let check = plan.and_then(|plan| plan.health_check.clone());
        // Nobody asks a daemon that only programs once.
        let _ = self.0.send((service.clone(), check));
    }
}

/// Answers for all Services that are told of, for ever.
pub async fn serve(
    mut told: Receiver,
    connections: Connections,
    health: Health,
    reporter: Reporter,
) {
    let mut checks: BTreeMap<ServiceName, HealthCheck> = BTreeMap::new();
    let mut listeners = Listeners::new(connections, health);
    let mut node = reporter.watch_node();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut own = OwnAddresses::default();
    let mut addresses = BTreeSet::new();
    let mut news = Vec::new();
    let mut said = BTreeSet::new();
    loop {
        let (mut look_at_node, mut again) = (false, false);
        tokio::select! {
            // All that is there: a port may go from one Service to another.
            count = told.0.recv_many(&mut news, usize::MAX) => {
                if count == 0 {
                    return;
                }
                let mut changed = false;
                for (service, check) in news.drain(..) {
                    let before = match check.clone() {
                        Some(check) => checks.insert(service, check),
                        None => checks.remove(&service),
                    };
                    changed |= before != check;
                }
                if !changed {
                    continue;
                }
            }
            changed = node.changed() => {
                if changed.is_err() {
                    return;
                }
                look_at_node = true;
            }
            _ = look.tick(), if !checks.is_empty() => {
                (look_at_node, again) = (true, true);
            }
        }
        if look_at_node {
            let node = node.borrow();
            addresses = node.as_ref().map(|node| look_at(node, &mut own)).unwrap_or_default();
        }
        let answers = answers(&checks, &addresses);
        listeners.answer(&answers, again).await;
        let mut failed: BTreeMap<&ServiceName, Vec<String>> = BTreeMap::new();
        for (address, error) in listeners.failed() {
            let service = &answers[address].service;
            failed.entry(service).or_default().push(format!("{address}: {error}"));
        }
        said.retain(|service| {
            let resolved = !failed.contains_key(service);
            if resolved {
                reporter.health_check(service, None);
            }
            !resolved
        });
        for (service, failed) in failed {
            reporter.health_check(service, Some(problem(service, &failed)));
            said.insert(service.clone());
        }
    }
}

/// What is to be answered where. No two Services have one port ([`crate::plan::Claim`]), but for the
/// moment in which one of them has been told of and the other has not.
fn answers(
    checks: &BTreeMap<ServiceName, HealthCheck>,
    addresses: &BTreeSet<IpAddr>,
) -> BTreeMap<SocketAddr, Answer> {
    let mut answers = BTreeMap::new();
    for (service, check) in checks {
        for &address in addresses {
            if let Some(&local) = check.local_endpoints.get(&Family::of(address)) {
                let answer = Answer { service: service.clone(), local };
                answers.insert(SocketAddr::new(address, check.port), answer);
            }
        }
    }
    answers
}

fn look_at(node: &NodeContext, own: &mut OwnAddresses) -> BTreeSet<IpAddr> {
    let nothing = HashSet::new();
    served_at(node, own.look().unwrap_or(&nothing))
}

/// The addresses at which node ports are served: the node's primary ones, be they there yet or not,
/// or its own in the configured CIDRs. Where that is all of a family, it is the unspecified address,
/// as with kube-proxy: one listener instead of one for each address.
fn served_at(node: &NodeContext, own: &HashSet<IpAddr>) -> BTreeSet<IpAddr> {
    let mut served = BTreeSet::new();
    for family in Family::ALL {
        let cidrs = node.nodeport_cidrs(family);
        if cidrs.contains(&family.everything()) {
            served.insert(family.everything().addr());
            continue;
        }
        let whole = |cidr: &&IpNet| cidr.prefix_len() == cidr.max_prefix_len();
        served.extend(cidrs.iter().filter(whole).map(IpNet::addr));
        let own = own.iter().filter(|address| !address.is_loopback());
        served.extend(own.filter(|own| cidrs.iter().any(|cidr| cidr.contains(*own))));
    }
    served
}

/// What is answered at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    service: ServiceName,
    /// How many endpoints are here.
    local: usize,
}

/// All listeners. Each belongs to its address and not to a Service: whose turn it is there is only
/// another answer, so that a port which changes hands is never closed.
#[derive(Debug)]
struct Listeners {
    connections: Connections,
    health: Health,
    open: BTreeMap<SocketAddr, Listener>,
    /// Where listening has failed, and is tried again with every look.
    failed: BTreeMap<SocketAddr, Failure>,
}

#[derive(Debug)]
struct Listener {
    answer: watch::Sender<Answer>,
    task: JoinHandle<Infallible>,
}

#[derive(Debug)]
struct Failure {
    error: io::Error,
    /// How many looks have met it. Who holds the port may be about to end, so one says nothing.
    looks: usize,
}

impl Listeners {
    fn new(connections: Connections, health: Health) -> Listeners {
        Listeners { connections, health, open: BTreeMap::new(), failed: BTreeMap::new() }
    }

    /// Answers so from now on, and nowhere else. Where that has failed before, it is tried `again` or
    /// not.
    async fn answer(&mut self, answers: &BTreeMap<SocketAddr, Answer>, again: bool) {
        let ended = self.open.extract_if(.., |address, _| !answers.contains_key(address));
        for (_, listener) in ended {
            listener.task.abort();
            // Only when the task is gone is its address free.
            let _ = listener.task.await;
        }
        self.failed.retain(|address, _| answers.contains_key(address));
        for (&address, answer) in answers {
            if let Some(listener) = self.open.get(&address) {
                listener.answer.send_replace(answer.clone());
                continue;
            }
            let looks = match self.failed.get(&address) {
                Some(_) if !again => continue,
                before => before.map_or(0, |failure| failure.looks) + usize::from(again),
            };
            match bind(address) {
                Ok(listener) => {
                    self.failed.remove(&address);
                    let listener = self.listen(listener, answer.clone());
                    self.open.insert(address, listener);
                }
                Err(error) => {
                    self.failed.insert(address, Failure { error, looks });
                }
            }
        }
    }

    fn listen(&self, listener: TcpListener, answer: Answer) -> Listener {
        let (answer, now) = watch::channel(answer);
        let (health, connections) = (self.health.clone(), self.connections.clone());
        let routes =
            Router::new().fallback(async move || response(&now.borrow(), health.is_alive()));
        let task = tokio::spawn(async move { connections.answer(&listener, &routes).await });
        Listener { answer, task }
    }

    /// Where listening keeps failing, and why.
    fn failed(&self) -> impl Iterator<Item = (&SocketAddr, &io::Error)> {
        let lasting = self.failed.iter().filter(|(_, failure)| failure.looks > 1);
        lasting.map(|(address, failure)| (address, &failure.error))
    }
}

/// Listens at an address, also if the node has not got it yet.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if address.is_ipv6() {
        // The other family has a listener of its own.
        nix::sys::socket::setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    nix::sys::socket::setsockopt(&socket, ReuseAddr, &true)?;
    nix::sys::socket::setsockopt(&socket, IpFreebind, &true)?;
    socket.bind(address)?;
    socket.listen(128)
}

fn response(answer: &Answer, healthy: bool) -> Response<Body> {
    let Answer { service, local } = answer;
    let body = json!({
        "service": { "namespace": &*service.namespace, "name": &*service.name },
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    });
    let mut response = super::server::answer(*local > 0 && healthy, format!("{body:#}\n"));
    response.headers_mut().insert("x-load-balancing-endpoint-weight", HeaderValue::from(*local));
    response
}

fn problem(service: &ServiceName, failed: &[String]) -> Diagnostic {
    Diagnostic {
        object: ObjectRef::service(service),
        field: "spec.healthCheckNodePort".to_owned(),
        severity: Severity::Error,
        message: format!(
            "cannot listen at {}; tried again, and until then load balancers get no answer there",
            failed.join(", "),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::Pulse;
    use crate::model::NodePortAddresses;

    fn listeners() -> Listeners {
        let health = Health::new(Pulse::default(), Reporter::new("worker".into()));
        Listeners::new(Connections::default(), health)
    }

    fn answers(address: SocketAddr, name: &str) -> BTreeMap<SocketAddr, Answer> {
        [(address, Answer { service: ServiceName::new("shop", name), local: 1 })].into()
    }

    fn free_address() -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    }

    #[test]
    fn where_node_ports_are_served() {
        let list = |text: &str| -> Vec<IpAddr> {
            text.split_whitespace().map(|address| address.parse().unwrap()).collect()
        };
        let own = list("127.0.0.1 192.0.2.1 198.51.100.1 ::1 2001:db8::1");
        let own = own.into_iter().collect();
        let mut node = NodeContext::new("node-1".into());
        // One of them is not there yet.
        node.node.primary_addresses = list("192.0.2.1 2001:db8::9");
        assert_eq!(Vec::from_iter(served_at(&node, &own)), list("192.0.2.1 2001:db8::9"));
        for (cidrs, expected) in [
            ("0.0.0.0/0", "0.0.0.0"),
            ("0.0.0.0/0 ::/0", "0.0.0.0 ::"),
            ("0.0.0.0/1 128.0.0.0/1 2001:db8::/32", "0.0.0.0 2001:db8::1"),
            ("128.0.0.0/1 ::/0", "192.0.2.1 198.51.100.1 ::"),
            ("127.0.0.0/8 192.0.2.0/24 203.0.113.9/32", "192.0.2.1 203.0.113.9"),
        ] {
            let parsed = cidrs.split(' ').map(|cidr| cidr.parse().unwrap()).collect();
            node.nodeport_addresses = NodePortAddresses::Cidrs(parsed);
            assert_eq!(Vec::from_iter(served_at(&node, &own)), list(expected), "{cidrs}");
        }
    }

    #[tokio::test]
    async fn a_port_changes_hands() {
        let (address, mut listeners) = (free_address(), listeners());
        listeners.answer(&answers(address, "web"), false).await;
        let task = listeners.open[&address].task.id();
        listeners.answer(&answers(address, "api"), false).await;
        let listener = &listeners.open[&address];
        assert_eq!(*listener.answer.borrow(), answers(address, "api")[&address]);
        assert_eq!(listener.task.id(), task, "it was closed in between");
        for _ in 0..100 {
            listeners.answer(&BTreeMap::new(), false).await;
            listeners.answer(&answers(address, "web"), false).await;
            assert!(listeners.failed.is_empty(), "{:?}", listeners.failed);
        }
    }

    #[tokio::test]
    async fn what_fails_once_is_not_said() {
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, mut listeners) = (holder.local_addr().unwrap(), listeners());
        let answers = answers(address, "web");
        for (again, failed) in [(false, 0), (false, 0), (true, 0), (true, 1), (false, 1)] {
            listeners.answer(&answers, again).await;
            assert_eq!(listeners.failed().count(), failed);
        }
        drop(holder);
        listeners.answer(&answers, true).await;
        assert!(listeners.failed.is_empty() && listeners.open.contains_key(&address));
        // Who has no such port any more has no such trouble.
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = self::answers(holder.local_addr().unwrap(), "web");
        listeners.answer(&other, false).await;
        assert_eq!((listeners.open.len(), listeners.failed.len()), (0, 1));
        listeners.answer(&BTreeMap::new(), false).await;
        assert!(listeners.failed.is_empty());
    }
}
