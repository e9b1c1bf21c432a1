//! A node with the addresses of a case, its pods, its clients, and what is beyond it.
//!
//! ```text
//!   clients, pods here              pods elsewhere
//!        \  |  |  /                     |  |
//!          node ---------- peer --------+--+
//!           |
//!         outside: has every address that the node has not
//! ```
//!
//! Every link is a pair of devices between two addresses, as a CNI plugin makes them for pods.
//! Everybody's default route is over the node, and the node's is `outside`. So an answer comes
//! back the way it went, masqueraded or not, and what the node neither translates nor stops ends
//! at a server that says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use ipnet::IpNet;
use portcullis_integration::daemon::{self, wait_until_programmed};
use portcullis_integration::lab::{Namespace, Process, scratch};
use portcullis_integration::traffic::{Outcome, Probe, Server, probe_all};
use tempfile::TempDir;

use crate::kernel::transport;
use crate::packets::Case;

/// The node's address on every link, of each family: what it masquerades with.
const NODE: [&str; 2] = ["198.18.0.1", "fd00:198:18::1"];
/// The peer's, on the links of its pods.
const PEER: [&str; 2] = ["198.18.1.1", "fd00:198:18:1::1"];
/// The peer's on its link with the node.
const PEER_UPLINK: [&str; 2] = ["198.18.0.2", "fd00:198:18::2"];
/// The address of `outside` on its link with the node.
const OUTSIDE: [&str; 2] = ["198.18.0.3", "fd00:198:18::3"];
/// The name of servers that only untranslated packets reach.
const UNTRANSLATED: &str = "untranslated";

/// A node and whoever is around it. Dropping it removes it.
pub struct Network {
    node: Namespace,
    node_addresses: BTreeSet<IpAddr>,
    peer: Namespace,
    outside: Namespace,
    /// Pods and clients.
    hosts: BTreeMap<IpAddr, Namespace>,
    directory: TempDir,
}

/// Which endpoint a server is, by its name; `None` if it is none.
pub fn endpoint(name: &str) -> Result<Option<SocketAddr>> {
    if name == UNTRANSLATED { Ok(None) } else { Ok(Some(name.parse().context(name.to_owned())?)) }
}

impl Network {
    /// The namespaces of a case, wired, without anybody in them.
    pub fn new(case: &Case) -> Result<Network> {
        let node_addresses = BTreeSet::from_iter(case.proxy.local_addresses.clone());
        let destinations: BTreeSet<IpAddr> =
            case.flows.iter().map(|flow| flow.destination).collect();
        let here = case.endpoints(true);
        let elsewhere = &case.endpoints(false) - &here;
        let sources = case.flows.iter().map(|flow| flow.source);
        let hosts: BTreeSet<IpAddr> = sources.chain(here).chain(elsewhere.clone()).collect();
        // Somebody who sends from an address of a Service is the node, which has it for a while.
        let hosts = hosts
            .into_iter()
            .filter(|one| !node_addresses.contains(one) && !destinations.contains(one));
        let hosts = hosts
            .enumerate()
            .map(|(number, address)| Ok((address, Namespace::new(&format!("host-{number}"))?)));
        let network = Network {
            node: Namespace::new("node")?,
            peer: Namespace::new("peer")?,
            outside: Namespace::new("outside")?,
            hosts: hosts.collect::<Result<_>>()?,
            node_addresses,
            directory: scratch("upstream")?,
        };
        network.wire(&elsewhere, &destinations)?;
        for host in network.hosts.values().chain([&network.outside]) {
            host.wait_until_reachable(case.proxy.node_ip)?;
        }
        Ok(network)
    }

    fn wire(&self, elsewhere: &BTreeSet<IpAddr>, destinations: &BTreeSet<IpAddr>) -> Result<()> {
        for router in [&self.node, &self.peer] {
            router.set_sysctl("net.ipv4.ip_forward", "1")?;
            router.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        link(&self.node, NODE, &self.outside, &OUTSIDE.map(parse))?;
        link(&self.node, NODE, &self.peer, &PEER_UPLINK.map(parse))?;
        let own = self.node_addresses.iter().map(|address| address_line(*address, "outside"));
        let default = OUTSIDE.iter().map(|outside| format!("route add default via {outside}"));
        let elsewhere_too = elsewhere.iter().map(|address| {
            let via = PEER_UPLINK[usize::from(address.is_ipv6())];
            format!("route add {} via {via}", IpNet::from(*address))
        });
        self.node.ip(&own.chain(default).chain(elsewhere_too).collect::<Vec<_>>())?;
        for (address, host) in &self.hosts {
            let (router, gateways) =
                if elsewhere.contains(address) { (&self.peer, PEER) } else { (&self.node, NODE) };
            link(router, gateways, host, &[*address])?;
        }
        let beyond = destinations.difference(&self.node_addresses);
        self.outside.ip(&beyond.map(|address| address_line(*address, "lo")).collect::<Vec<_>>())
    }

    /// Asks as `source`. If nobody has that address, the node has it meanwhile.
    pub fn ask(&self, source: IpAddr, probes: &[Probe]) -> Result<Vec<Outcome>> {
        if let Some(host) = self.hosts.get(&source) {
            return probe_all(host, probes);
        }
        if self.node_addresses.contains(&source) {
            return probe_all(&self.node, probes);
        }
        self.node.ip(&[address_line(source, "outside")])?;
        let outcomes = probe_all(&self.node, probes);
        self.node.ip(&[format!("addr del {} dev outside", IpNet::from(source))])?;
        outcomes
    }

    /// Servers on every port of every endpoint, and wherever a packet goes that is not translated.
    pub fn servers(&self, case: &Case) -> Result<Vec<Server>> {
        let mut servers = Vec::new();
        for (protocol, address) in case.backends() {
            let host = &self.hosts[&address.ip()];
            servers.push(Server::bind(host, &address.to_string(), transport(&protocol)?, address)?);
        }
        for (protocol, address) in case.frontends() {
            let own = self.node_addresses.contains(&address.ip());
            let host = if own { &self.node } else { &self.outside };
            servers.push(Server::bind(host, UNTRANSLATED, transport(&protocol)?, address)?);
        }
        Ok(servers)
    }

    /// The program on the objects of the case and with its settings, when the node is programmed.
    pub fn daemon(&self, case: &Case) -> Result<Process> {
        let manifests = self.directory.path().join("manifests");
        fs::create_dir(&manifests)?;
        fs::write(manifests.join("objects.json"), case.objects()?.to_string())?;
        let settings = &case.proxy;
        let mut command = daemon::command(&["run", "--node-name", &settings.node_name])?;
        command.arg("--manifests").arg(&manifests);
        let cidrs: Vec<String> =
            settings.node_port_addresses.iter().map(IpNet::to_string).collect();
        command.args(["--nodeport-addresses", &cidrs.join(",")]);
        if let Some(cidr) = settings.pod_cidr {
            command.args(["--cluster-cidr", &cidr.to_string()]);
        }
        if settings.masquerade_all {
            command.arg("--masquerade-all");
        }
        let mut daemon = self.node.spawn(&command, "portcullis", self.directory.path())?;
        wait_until_programmed(&mut daemon)?;
        Ok(daemon)
    }
}

/// A pair of devices between a router, where it is called as the host, and a host, where it is
/// called `eth0`. The host has `addresses`, and its default routes are over the router.
fn link(
    router: &Namespace,
    gateways: [&str; 2],
    host: &Namespace,
    addresses: &[IpAddr],
) -> Result<()> {
    let name = host.name();
    let mut there = vec![format!("link add {name} type veth peer name eth0 netns {}", host.path())];
    there.extend(gateways.map(|gateway| address_line(parse(gateway), name)));
    there.push(format!("link set {name} up"));
    let mut here: Vec<String> =
        addresses.iter().map(|address| address_line(*address, "eth0")).collect();
    here.push("link set eth0 up".to_owned());
    for address in addresses {
        let gateway = gateways[usize::from(address.is_ipv6())];
        there.push(format!("route add {} dev {name}", IpNet::from(*address)));
        here.push(format!("route add {gateway} dev eth0"));
        here.push(format!("route add default via {gateway} dev eth0"));
    }
    router.ip(&there)?;
    host.ip(&here)
}

/// The line of `ip` that gives a device an address.
fn address_line(address: IpAddr, device: &str) -> String {
    let nodad = if address.is_ipv6() { " nodad" } else { "" };
    format!("addr add {} dev {device}{nodad}", IpNet::from(address))
}

fn parse(address: &str) -> IpAddr {
    address.parse().expect("an address")
}
