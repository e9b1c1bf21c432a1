//! Processes that listen where a node port is.
//!
//! A node port takes connections before a process of the node gets to see them, so a process that
//! listens on the same port is cut off from everybody but itself; kube-proxy lets that happen
//! without a word. Nothing is prevented here either: the API server gave the port to the Service.
//! But it is said, when a Service comes and when such a process comes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use procfs::net::{TcpState, UdpState};
use tokio::sync::mpsc;

use crate::commit::Report;
use crate::host::own_addresses;
use crate::model::{
    Diagnostic, Family, NodeContext, ObjectKind, ObjectRef, Protocol, ServiceName, Severity,
};
use crate::plan::{Frontend, ServicePlan};
use crate::report::Reporter;
use crate::ruleset::Subject;

/// How often sockets are looked at when no Service has changed.
const LOOK: Duration = Duration::from_secs(10);
/// How long changes of Services wait for each other before sockets are looked at.
const GATHER: Duration = Duration::from_millis(500);

/// The node ports of a Service, with the names of their Service ports.
type NodePorts = BTreeMap<(Protocol, u16), Arc<str>>;

/// Tells of the node ports that are served. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Served {
    sender: mpsc::UnboundedSender<(ServiceName, NodePorts)>,
    count: Arc<AtomicUsize>,
}

/// What [`watch`] is told.
#[derive(Debug)]
pub struct Told {
    receiver: mpsc::UnboundedReceiver<(ServiceName, NodePorts)>,
    count: Arc<AtomicUsize>,
}

/// Two ends: one to tell of Services, one to watch for conflicts with them.
pub fn served() -> (Served, Told) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let count = Arc::<AtomicUsize>::default();
    (Served { sender, count: Arc::clone(&count) }, Told { receiver, count })
}

impl Served {
    /// Takes what became of a subject when it was committed.
    pub fn commit(&self, report: &Report) {
        let Subject::Service(service) = &report.subject else { return };
        if report.refused.is_some() && report.plan.is_some() {
            return;
        }
        let ports = report.plan.as_deref().map(node_ports).unwrap_or_default();
        // Nobody watches where a daemon only programs once.
        let _ = self.sender.send((service.clone(), ports));
    }

    /// How many node ports have such a process, as of the last look.
    pub fn conflicts(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

fn node_ports(plan: &ServicePlan) -> NodePorts {
    let frontends = plan.pools.iter().flat_map(|pool| {
        pool.frontends.iter().map(move |frontend| (pool.protocol, frontend, &pool.port_name))
    });
    frontends
        .filter_map(|(protocol, frontend, name)| match frontend {
            Frontend::NodePort { port } => Some(((protocol, *port), name.clone())),
            Frontend::ClusterIp { .. } | Frontend::External { .. } => None,
        })
        .collect()
}

/// Looks for such processes, for ever.
pub async fn watch(mut told: Told, reporter: Reporter) {
    let mut services: HashMap<ServiceName, NodePorts> = HashMap::new();
    let mut in_conflict: BTreeSet<ServiceName> = BTreeSet::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            next = told.receiver.recv() => {
                let Some(mut next) = next else { return };
                let mut changed = false;
                let gathered = tokio::time::sleep(GATHER);
                tokio::pin!(gathered);
                loop {
                    let (service, ports) = next;
                    changed |= set(&mut services, service, ports);
                    tokio::select! {
                        more = told.receiver.recv() => match more {
                            Some(more) => next = more,
                            None => return,
                        },
                        () = &mut gathered => break,
                    }
                }
                if !changed {
                    continue;
                }
            }
            _ = look.tick() => {}
        }
        if services.is_empty() && in_conflict.is_empty() {
            continue;
        }
        let Some(node) = reporter.node_context() else { continue };
        // A node may have very many sockets.
        let Ok(sockets) = tokio::task::spawn_blocking(move || sockets_at(&node)).await else {
            return;
        };
        let found = conflicts(&services, &sockets);
        told.count.store(found.values().map(Vec::len).sum(), Ordering::Relaxed);
        for (service, problems) in &found {
            reporter.conflict(service, problems.clone());
        }
        let now = found.into_keys().collect();
        for resolved in in_conflict.difference(&now) {
            reporter.conflict(resolved, Vec::new());
        }
        in_conflict = now;
    }
}

/// Whether that changes anything.
fn set(
    services: &mut HashMap<ServiceName, NodePorts>,
    service: ServiceName,
    ports: NodePorts,
) -> bool {
    if ports.is_empty() {
        return services.remove(&service).is_some();
    }
    services.insert(service, ports.clone()) != Some(ports)
}

/// Where processes listen that would get connections to node ports.
type Sockets = HashMap<(Protocol, u16), BTreeSet<SocketAddr>>;

fn sockets_at(node: &NodeContext) -> Sockets {
    let cidrs = Family::ALL
        .map(|family| [node.nodeport_cidrs(family), node.localhost_cidrs(family)].concat())
        .concat();
    let own = own_addresses();
    let serves = |address: IpAddr| {
        let address = address.to_canonical();
        address.is_unspecified()
            || own.contains(&address) && cidrs.iter().any(|cidr| cidr.contains(&address))
    };
    let mut sockets = Sockets::new();
    for (protocol, address) in listening() {
        if serves(address.ip()) {
            sockets.entry((protocol, address.port())).or_default().insert(address);
        }
    }
    sockets
}

/// All sockets that wait for clients, TCP and UDP. The kernel lists none of SCTP in this form.
fn listening() -> impl Iterator<Item = (Protocol, SocketAddr)> {
    use procfs::net::{tcp, tcp6, udp, udp6};
    // Where the kernel has no IPv6 there is no such file.
    let tcp = [tcp(), tcp6()].into_iter().flatten().flatten();
    let tcp = tcp.filter(|entry| entry.state == TcpState::Listen);
    let udp = [udp(), udp6()].into_iter().flatten().flatten();
    // One that is connected gets answers only.
    let udp =
        udp.filter(|entry| entry.state == UdpState::Close && entry.remote_address.port() == 0);
    let tcp = tcp.map(|entry| (Protocol::Tcp, entry.local_address));
    tcp.chain(udp.map(|entry| (Protocol::Udp, entry.local_address)))
}

fn conflicts(
    services: &HashMap<ServiceName, NodePorts>,
    sockets: &Sockets,
) -> BTreeMap<ServiceName, Vec<Diagnostic>> {
    let mut found: BTreeMap<ServiceName, Vec<Diagnostic>> = BTreeMap::new();
    for (service, ports) in services {
        for ((protocol, port), name) in ports {
            let Some(addresses) = sockets.get(&(*protocol, *port)) else { continue };
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            let problem = Diagnostic {
                object: ObjectRef {
                    kind: ObjectKind::Service,
                    namespace: service.namespace.clone(),
                    name: service.name.clone(),
                },
                field: format!("spec.ports[{name:?}].nodePort"),
                severity: Severity::Warning,
                message: format!(
                    "a process of this node listens on {protocol} port {port} ({}); clients reach \
                     the Service, and not the process",
                    addresses.join(", ")
                ),
            };
            found.entry(service.clone()).or_default().push(problem);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_this_machine_are_seen() {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect("127.0.0.1:9").unwrap();
        let seen: BTreeSet<_> = listening().collect();
        assert!(seen.contains(&(Protocol::Tcp, tcp.local_addr().unwrap())));
        assert!(seen.contains(&(Protocol::Udp, udp.local_addr().unwrap())));
        assert!(!seen.contains(&(Protocol::Udp, connected.local_addr().unwrap())));
    }

    #[test]
    fn who_is_in_conflict() {
        let name = ServiceName::new("shop", "web");
        let mut services = HashMap::new();
        let ports = NodePorts::from([
            ((Protocol::Tcp, 30080), "http".into()),
            ((Protocol::Udp, 30080), "quic".into()),
        ]);
        assert!(set(&mut services, name.clone(), ports.clone()));
        assert!(!set(&mut services, name.clone(), ports));
        let sockets = |protocol| {
            let addresses = ["0.0.0.0:30080", "[::]:30080"].map(|at| at.parse().unwrap());
            Sockets::from([((protocol, 30080), addresses.into())])
        };
        let found = conflicts(&services, &sockets(Protocol::Tcp));
        let told: Vec<String> = found[&name].iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["warning: Service shop/web: spec.ports[\"http\"].nodePort: a process of this node \
              listens on tcp port 30080 (0.0.0.0:30080, [::]:30080); clients reach the Service, and \
              not the process"]
        );
        assert!(conflicts(&services, &sockets(Protocol::Sctp)).is_empty());
        assert!(set(&mut services, name, NodePorts::new()));
        assert!(conflicts(&services, &sockets(Protocol::Tcp)).is_empty());
    }
}
