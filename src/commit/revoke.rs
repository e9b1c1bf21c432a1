//! Open connections of sources that may no longer connect.
//!
//! The firewall only sees the first packet of a connection, so a source that loses its permission
//! would keep what it has open. After the transaction that takes the permission away, the
//! connections that would not be let in any more are deleted from connection tracking; their next
//! packet is a first packet again and is refused.

use std::collections::HashMap;
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ipnet::IpNet;

use crate::model::{Family, Protocol};
use crate::netlink::{Error, Flow, Socket};
use crate::plan::{Firewall, ServicePlan, Sources};
use crate::ruleset::Contribution;

/// A node port whose firewall lets in less than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    protocol: Protocol,
    port: u16,
    sources: Arc<Sources>,
}

/// What a thread of its own does, so that a long connection table holds up no commit.
#[derive(Debug)]
pub struct Revoker {
    work: mpsc::Sender<Work>,
}

#[derive(Debug)]
enum Work {
    /// Connections to these ports at these addresses.
    Sweep(Vec<Revocation>, Vec<IpNet>),
    /// Says when everything before is done.
    Barrier(mpsc::Sender<()>),
}

/// A packet that passed the old firewall may still be on its way when the new one is in force, and
/// its connection not yet in the table: it is looked for once more after this time. What passes
/// between two hooks takes microseconds.
const STRAGGLERS: Duration = Duration::from_millis(50);

impl Revoker {
    /// Starts the thread; it ends when the `Revoker` is dropped.
    pub fn start() -> Revoker {
        let (work, queue) = mpsc::channel();
        let thread = std::thread::Builder::new().name("revoker".to_owned());
        thread.spawn(move || run(&queue)).expect("a thread can be started");
        Revoker { work }
    }

    /// Deletes the connections that `revocations` forbid, soon.
    pub fn sweep(&self, revocations: Vec<Revocation>, node_addresses: Vec<IpNet>) {
        if !revocations.is_empty() {
            // The thread ends only after this end of the channel.
            let _ = self.work.send(Work::Sweep(revocations, node_addresses));
        }
    }

    /// Waits until everything asked for is done.
    pub fn finish(&self) {
        let (done, wait) = mpsc::channel();
        if self.work.send(Work::Barrier(done)).is_ok() {
            let _ = wait.recv();
        }
    }
}

/// The node ports of a Service whose firewall lets in less after a change than before.
pub fn revocations(old: Option<&Contribution>, new: Option<&Contribution>) -> Vec<Revocation> {
    let old = old.and_then(Contribution::plan);
    let Some(firewall) = new.and_then(Contribution::plan).and_then(|plan| plan.firewall.as_ref())
    else {
        return Vec::new();
    };
    if old.and_then(|old| old.firewall.as_ref()) == Some(firewall) {
        return Vec::new();
    }
    let sources = Arc::new(firewall.sources.clone());
    let narrowed = firewall.node_ports.iter().filter(|port| {
        let (protocol, port) = (port.protocol, port.port);
        old.is_none_or(|old| lets_in_more(old, protocol, port, &firewall.sources))
    });
    narrowed
        .map(|port| Revocation {
            protocol: port.protocol,
            port: port.port,
            sources: Arc::clone(&sources),
        })
        .collect()
}

/// All ports of a firewall whose past is not known.
pub fn all(firewall: &Firewall) -> Vec<Revocation> {
    let sources = Arc::new(firewall.sources.clone());
    let ports = firewall.node_ports.iter();
    ports
        .map(|port| Revocation {
            protocol: port.protocol,
            port: port.port,
            sources: Arc::clone(&sources),
        })
        .collect()
}

/// Whether `plan` lets somebody connect to the port whom `sources` does not, or does not have the
/// port, so that nobody knows who connected to it before.
fn lets_in_more(plan: &ServicePlan, protocol: Protocol, port: u16, sources: &Sources) -> bool {
    let restricted = plan.firewall.as_ref().filter(|firewall| {
        firewall.node_ports.iter().any(|own| (own.protocol, own.port) == (protocol, port))
    });
    match (restricted.map(|firewall| &firewall.sources), sources) {
        (None, _) => true,
        (Some(Sources::Closed), _) => false,
        (Some(Sources::Allow(before)), Sources::Closed) => !before.is_empty(),
        (Some(Sources::Allow(before)), Sources::Allow(now)) => !now.covers(before),
    }
}

fn run(queue: &mpsc::Receiver<Work>) {
    while let Ok(first) = queue.recv() {
        let mut barriers = Vec::new();
        let mut sources: HashMap<(u8, u16), Arc<Sources>> = HashMap::new();
        let mut addresses = Vec::new();
        for work in std::iter::once(first).chain(queue.try_iter()) {
            match work {
                Work::Sweep(revocations, node_addresses) => {
                    // The last word about a port counts.
                    sources.extend(
                        revocations.into_iter().map(|r| ((r.protocol.number(), r.port), r.sources)),
                    );
                    addresses = node_addresses;
                }
                Work::Barrier(done) => barriers.push(done),
            }
        }
        if !sources.is_empty() {
            for _ in 0..2 {
                match sweep(&sources, &addresses) {
                    Ok(0) => {}
                    Ok(count) => tracing::info!(count, "deleted connections of revoked sources"),
                    Err(error) => tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "connections of revoked sources may live on: connection tracking failed",
                    ),
                }
                std::thread::sleep(STRAGGLERS);
            }
        }
        for done in barriers {
            // Who waited may be gone.
            let _ = done.send(());
        }
    }
}

fn sweep(
    sources: &HashMap<(u8, u16), Arc<Sources>>,
    node_addresses: &[IpNet],
) -> Result<usize, Error> {
    // The node's own connections are exempt from the firewall.
    let own = own_addresses();
    let doomed = |flow: &Flow| {
        flow.translated
            && sources
                .get(&(flow.protocol, flow.destination_port))
                .is_some_and(|sources| !sources.contains(flow.source))
            && node_addresses.iter().any(|cidr| cidr.contains(&flow.destination))
            && !own.contains(&flow.source)
    };
    let mut socket = Socket::open()?;
    let mut deleted = 0;
    for family in Family::ALL {
        deleted += socket.delete_flows(family, doomed)?;
    }
    Ok(deleted)
}

fn own_addresses() -> HashSet<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect()
}
