//! A laboratory of network namespaces with the standard topology.
//!
//! ```text
//!   allowed 192.0.2.10         refused 198.51.100.10
//!   2001:db8:1::10             2001:db8:2::10
//!          \                   /
//!           outside (router and switch; 192.168.77.254, fd00:77::fe)
//!          /                   \
//!   node 192.168.77.1          peer 192.168.77.2
//!   fd00:77::1                 fd00:77::2
//!     |  |  ... one veth each    |
//!   pods[i] 10.244.0.(10+i)    remote_pod 10.244.1.10
//!   fd00:10:244::(10+i, hex)   fd00:10:244:1::a
//! ```
//!
//! - `node` is the machine under test, `peer` another node of the cluster. They share a link,
//!   route each other's pods and have `outside` as their default gateway, so that an answer which
//!   should have gone back through the node but was not masqueraded takes another way and
//!   is lost, as in a real cluster.
//! - `outside` sends what clients address to [`SERVICES_V4`], [`SERVICES_V6`], [`VIPS_V4`]
//!   and [`VIPS_V6`] to the node, and discards what the nodes send there: an address that the
//!   node did not translate is a timeout.
//! - Pods have point-to-point links as the CNI plugin `ptp` makes them (a /32 with a default
//!   route over the node's 10.244.0.1), so everything that a pod sends, also to itself by way
//!   of a Service, passes the node's hooks.
//!
//! # What is left behind
//! Nothing. Namespaces are held by open files and have no name, processes are killed by the
//! kernel when ours ends, and scratch directories are removed by a shell that waits for our end.
//! This holds for a test that is killed, too.
//!
//! # Looking into a running test
//! Print a namespace: `eprintln!("{}", *lab.node)` writes the `nsenter` command that enters it.

mod namespace;
mod process;
mod scratch;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

pub use namespace::Namespace;
pub use process::Process;
pub use scratch::scratch;

use namespace::host_prefix;

/// Service addresses, IPv4.
pub const SERVICES_V4: &str = "10.96.0.0/16";
/// Service addresses, IPv6.
pub const SERVICES_V6: &str = "fd00:10:96::/112";
/// Pods of every node, IPv4.
pub const PODS_V4: &str = "10.244.0.0/16";
/// Pods of every node, IPv6.
pub const PODS_V6: &str = "fd00:10:244::/56";
/// Addresses for load balancers and `externalIPs`, IPv4.
pub const VIPS_V4: &str = "203.0.113.0/24";
/// Addresses for load balancers and `externalIPs`, IPv6.
pub const VIPS_V6: &str = "2001:db8:53::/64";

/// The pods of one node: `spec.podCIDRs` and the node's side of every pod's link, IPv4 and IPv6.
struct PodNetwork {
    cidrs: [&'static str; 2],
    gateways: [&'static str; 2],
}

const NODE_PODS: PodNetwork = PodNetwork {
    cidrs: ["10.244.0.0/24", "fd00:10:244::/64"],
    gateways: ["10.244.0.1", "fd00:10:244::1"],
};
const PEER_PODS: PodNetwork = PodNetwork {
    cidrs: ["10.244.1.0/24", "fd00:10:244:1::/64"],
    gateways: ["10.244.1.1", "fd00:10:244:1::1"],
};
/// Host part of the first pod's address.
const FIRST_POD: u8 = 10;
/// More than this would leave the pods' /24.
const MAX_PODS: usize = 200;

/// A machine or pod: a namespace with one address of each family. It can be used wherever a
/// [`Namespace`] is asked for.
#[derive(Clone, Debug)]
pub struct Host {
    /// The namespace.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Both families, for loops.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The topology that the module's documentation draws. Dropping it removes it.
#[derive(Debug)]
pub struct Lab {
    /// The machine under test.
    pub node: Host,
    /// Another node of the cluster.
    pub peer: Host,
    /// A client that firewalls of tests let in.
    pub allowed: Host,
    /// A client that firewalls of tests keep out.
    pub refused: Host,
    /// The router between the nodes and the clients.
    pub outside: Host,
    /// Pods on `node`.
    pub pods: Vec<Host>,
    /// A pod on `peer`.
    pub remote_pod: Host,
    directory: TempDir,
}

impl Lab {
    /// Builds the topology with `pods` pods (at most 200) on the node.
    pub fn new(pods: usize) -> Result<Self> {
        ensure!(pods <= MAX_PODS, "a laboratory has at most {MAX_PODS} pods, not {pods}");
        let lab = Self {
            node: Host::new("node", [192, 168, 77, 1], "fd00:77::1")?,
            peer: Host::new("peer", [192, 168, 77, 2], "fd00:77::2")?,
            allowed: Host::new("allowed", [192, 0, 2, 10], "2001:db8:1::10")?,
            refused: Host::new("refused", [198, 51, 100, 10], "2001:db8:2::10")?,
            outside: Host::new("outside", [192, 168, 77, 254], "fd00:77::fe")?,
            pods: (0..pods).map(pod).collect::<Result<_>>()?,
            remote_pod: Host::new("remote-pod", [10, 244, 1, FIRST_POD], "fd00:10:244:1::a")?,
            directory: scratch("lab")?,
        };
        for router in [&lab.node, &lab.peer, &lab.outside] {
            router.set_sysctl("net.ipv4.ip_forward", "1")?;
            router.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
        }
        lab.wire_outside().context("wire the outside")?;
        let pods: Vec<&Host> = lab.pods.iter().collect();
        lab.node.wire_node(&NODE_PODS, &pods, &lab.peer, &PEER_PODS)?;
        lab.peer.wire_node(&PEER_PODS, &[&lab.remote_pod], &lab.node, &NODE_PODS)?;
        let machines = [&lab.allowed, &lab.refused, &lab.peer, &lab.remote_pod];
        for host in machines.into_iter().chain(&lab.pods) {
            for family in FAMILIES {
                host.wait_until_reachable(lab.node.address(family))?;
            }
        }
        Ok(lab)
    }

    /// `spec.podCIDRs` of the node.
    pub fn pod_cidrs(&self) -> [&'static str; 2] {
        NODE_PODS.cidrs
    }

    /// A directory for the test's files, removed with the laboratory. Output of processes that
    /// [`Lab::spawn`] started is here.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts a long-living process on the node; `name` names the files of its output.
    pub fn spawn(&self, command: &Command, name: &str) -> Result<Process> {
        self.node.spawn(command, name, self.directory())
    }

    fn wire_outside(&self) -> Result<()> {
        let mut lines = vec![
            "link add lan type bridge forward_delay 0 mcast_snooping 0".to_owned(),
            "addr add 192.168.77.254/24 dev lan".to_owned(),
            "addr add fd00:77::fe/64 dev lan nodad".to_owned(),
            "link set lan up".to_owned(),
        ];
        for node in [&self.node, &self.peer] {
            let name = node.name();
            lines.push(format!("link add {name} type veth peer name eth0 netns {}", node.path()));
            lines.push(format!("link set {name} master lan up"));
        }
        for (client, gateway) in [
            (&self.allowed, ["192.0.2.1/24", "2001:db8:1::1/64"]),
            (&self.refused, ["198.51.100.1/24", "2001:db8:2::1/64"]),
        ] {
            let name = client.name();
            lines.push(format!("link add {name} type veth peer name eth0 netns {}", client.path()));
            lines.push(format!("addr add {} dev {name}", gateway[0]));
            lines.push(format!("addr add {} dev {name} nodad", gateway[1]));
            lines.push(format!("link set {name} up"));
        }
        for (destination, gateway) in [
            (SERVICES_V4, self.node.address(Family::V4)),
            (VIPS_V4, self.node.address(Family::V4)),
            (SERVICES_V6, self.node.address(Family::V6)),
            (VIPS_V6, self.node.address(Family::V6)),
        ] {
            lines.push(format!("route add {destination} via {gateway} dev lan"));
        }
        self.outside.ip(&lines)?;
        // Not in the batch: there is no way to give a rule's family there.
        for (family, destination) in
            [("-4", SERVICES_V4), ("-4", VIPS_V4), ("-6", SERVICES_V6), ("-6", VIPS_V6)]
        {
            let rule = ["rule", "add", "iif", "lan", "to", destination, "blackhole"];
            self.outside.run(&[&["ip", family], &rule[..]].concat())?;
        }
        for (client, gateway) in [
            (&self.allowed, ["192.0.2.1", "2001:db8:1::1"]),
            (&self.refused, ["198.51.100.1", "2001:db8:2::1"]),
        ] {
            client.ip(&client.uplink(gateway))?;
        }
        Ok(())
    }
}

impl Host {
    fn new(name: &str, v4: impl Into<Ipv4Addr>, v6: &str) -> Result<Self> {
        Ok(Self { namespace: Namespace::new(name)?, v4: v4.into(), v6: v6.parse()? })
    }

    /// Its address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// `ip` lines for an `eth0` in a /24 and a /64 with a default gateway.
    fn uplink(&self, gateway: [&str; 2]) -> [String; 5] {
        [
            format!("addr add {}/24 dev eth0", self.v4),
            format!("addr add {}/64 dev eth0 nodad", self.v6),
            "link set eth0 up".to_owned(),
            format!("route add default via {}", gateway[0]),
            format!("route add default via {}", gateway[1]),
        ]
    }

    /// Wires a node: its uplink, a veth to each of its pods, and the route to the pods of the
    /// other node.
    fn wire_node(
        &self,
        network: &PodNetwork,
        pods: &[&Host],
        other: &Host,
        other_network: &PodNetwork,
    ) -> Result<()> {
        let gateway = network.gateways;
        let mut lines = self.uplink(["192.168.77.254", "fd00:77::fe"]).to_vec();
        lines.push(format!("route add {} via {}", other_network.cidrs[0], other.v4));
        lines.push(format!("route add {} via {}", other_network.cidrs[1], other.v6));
        for pod in pods {
            let name = pod.name();
            lines.push(format!("link add {name} type veth peer name eth0 netns {}", pod.path()));
            lines.push(format!("addr add {}/32 dev {name}", gateway[0]));
            lines.push(format!("addr add {}/128 dev {name} nodad", gateway[1]));
            lines.push(format!("link set {name} up"));
            for family in FAMILIES {
                let prefix = host_prefix(pod.address(family));
                lines.push(format!("route add {prefix} dev {name}"));
            }
        }
        self.ip(&lines).with_context(|| format!("wire {}", self.name()))?;
        for pod in pods {
            pod.ip(&[
                format!("addr add {} dev eth0", host_prefix(pod.v4.into())),
                format!("addr add {} dev eth0 nodad", host_prefix(pod.v6.into())),
                "link set eth0 up".to_owned(),
                format!("route add {} dev eth0 scope link", gateway[0]),
                format!("route add default via {} dev eth0", gateway[0]),
                format!("route add {} dev eth0", gateway[1]),
                format!("route add default via {} dev eth0", gateway[1]),
            ])?;
        }
        Ok(())
    }
}

impl Deref for Host {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}

/// Asks `condition` every 20 ms until it is true; gives whether it became true within `limit`.
/// For what happens at a time that the test does not decide, such as a change being programmed.
pub fn eventually(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Pod number `index` of the node.
fn pod(index: usize) -> Result<Host> {
    let host = FIRST_POD + u8::try_from(index)?;
    Host::new(&format!("pod-{index}"), [10, 244, 0, host], &format!("fd00:10:244::{host:x}"))
}
