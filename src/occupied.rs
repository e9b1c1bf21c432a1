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

use tokio::sync::mpsc;

use crate::commit::Report;
use crate::host::OwnAddresses;
use crate::model::{Diagnostic, Family, NodeContext, ObjectRef, Protocol, ServiceName, Severity};
use crate::netlink::{self, listeners};
use crate::plan::{Frontend, ServicePlan};
use crate::report::Reporter;

/// How often sockets are looked at when no Service has changed.
const LOOK: Duration = Duration::from_secs(10);
/// How long changes of Services wait for each other before sockets are looked at.
const GATHER: Duration = Duration::from_millis(500);

/// The node ports of a Service, with the names of their Service ports.
type NodePorts = BTreeMap<(Protocol, u16), Arc<str>>;

/// Tells of the node ports that are served. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sender {
    sender: mpsc::UnboundedSender<(ServiceName, NodePorts)>,
    count: Arc<AtomicUsize>,
}

/// What [`watch`] is told.
#[derive(Debug)]
pub struct Receiver {
    receiver: mpsc::UnboundedReceiver<(ServiceName, NodePorts)>,
    count: Arc<AtomicUsize>,
}

/// Two ends: one to tell of Services, one to watch for conflicts with them.
pub fn channel() -> (Sender, Receiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let count = Arc::<AtomicUsize>::default();
    (Sender { sender, count: Arc::clone(&count) }, Receiver { receiver, count })
}

impl Sender {
    /// Takes what became of a subject when it was committed.
    pub fn commit(&self, report: &Report) {
        let Some((service, plan)) = report.in_force() else { return };
        let ports = plan.map(node_ports).unwrap_or_default();
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
pub async fn watch(mut told: Receiver, reporter: Reporter) {
    let mut services: HashMap<ServiceName, NodePorts> = HashMap::new();
    let mut in_conflict: BTreeSet<ServiceName> = BTreeSet::new();
    let mut own = OwnAddresses::default();
    let mut failed = false;
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
        let sockets = match sockets_at(&node, &mut own) {
            Ok(sockets) => sockets,
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "cannot tell who listens on node ports; tried again");
                }
                continue;
            }
        };
        failed = false;
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

fn sockets_at(node: &NodeContext, own: &mut OwnAddresses) -> Result<Sockets, netlink::Error> {
    let cidrs = Family::ALL
        .map(|family| [node.nodeport_cidrs(family), node.localhost_cidrs(family)].concat())
        .concat();
    let listed = own.look();
    let own =
        listed.map_err(|source| netlink::Error::List { what: "the node's addresses", source })?;
    let serves = |address: IpAddr| {
        let address = address.to_canonical();
        address.is_unspecified()
            || own.contains(&address) && cidrs.iter().any(|cidr| cidr.contains(&address))
    };
    let mut sockets = Sockets::new();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        for address in listeners(protocol.number())? {
            if serves(address.ip()) {
                sockets.entry((protocol, address.port())).or_default().insert(address);
            }
        }
    }
    Ok(sockets)
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
                object: ObjectRef::service(service),
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
