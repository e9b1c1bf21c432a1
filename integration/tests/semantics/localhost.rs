//! Node ports at loopback addresses, where that was asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Result, ensure};
use portcullis_integration::daemon::command;
use portcullis_integration::lab::eventually;
use portcullis_integration::traffic::{Flow, Outcome, Probe, Protocol, Server};
use serde_json::json;

use super::{DROPPED, NOTICE, PROTOCOLS, World, exposed, servers};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const NODE_PORT: u16 = 30_120;
/// Where a process of the node listens for those of the node alone.
const OWN_PORT: u16 = 9000;

#[test]
fn node_ports_at_localhost() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let manifest = exposed(20, lab, &json!({}));
    manifest.write(&world.manifests)?;
    let at = |address: IpAddr| SocketAddr::new(address, NODE_PORT);
    let served = |to: SocketAddr, protocol| {
        Probe::new(to, protocol).timeout(DROPPED).run(&lab.node).map(|o| o.by().is_some())
    };
    // Who is on the same link may send anything.
    let neighbour = &lab.peer;
    neighbour.set_sysctl("net.ipv4.conf.all.route_localnet", "1")?;
    neighbour.ip(&[
        "address delete 127.0.0.1/8 dev lo",
        &format!("route add 127.0.0.1/32 via {}", lab.node.v4),
    ])?;
    let own = Server::bind(&lab.node, "own", Protocol::Tcp, (LOCALHOST, OWN_PORT))?;
    let from_neighbour = |port: u16| {
        let to = SocketAddr::from((LOCALHOST, port));
        Probe::new(to, Protocol::Tcp).timeout(DROPPED).run(neighbour)
    };
    let daemon = world.daemon(&[])?;
    for protocol in PROTOCOLS {
        ensure!(served(at(lab.node.v4.into()), protocol)?, "not served at all");
        ensure!(!served(at(LOCALHOST.into()), protocol)?, "served without being asked");
    }
    daemon.terminate(NOTICE)?;

    let daemon = world.daemon(&["--localhost-nodeports"])?;
    for protocol in PROTOCOLS {
        for address in [LOCALHOST, Ipv4Addr::new(127, 1, 2, 3)] {
            let is_served = || served(at(address.into()), protocol).unwrap_or_default();
            ensure!(eventually(NOTICE, is_served), "{address} {protocol:?}");
        }
        let mut flow = Flow::open(&lab.node, at(LOCALHOST.into()), protocol)?;
        ensure!(flow.alive()? && flow.alive()?, "{protocol:?}: the flow ended");
    }
    ensure!(!served(at("::1".parse()?), Protocol::Tcp)?, "IPv6 has no way for this");
    // The kernel would let anybody else in with such addresses now, so they are dropped.
    for port in [NODE_PORT, OWN_PORT] {
        let outcome = from_neighbour(port)?;
        ensure!(outcome == Outcome::TimedOut, "a neighbour gets at port {port}: {outcome:?}");
    }
    let guard =
        lab.node.run(&["nft", "list", "chain", "inet", "portcullis", "firewall-prerouting"])?;
    for direction in ["daddr", "saddr"] {
        let rule = format!("iifname != \"lo\" ip {direction} 127.0.0.0/8 drop");
        ensure!(guard.contains(&rule), "{guard}");
    }
    let set = lab.node.run(&["nft", "list", "set", "inet", "portcullis", "localhost-ips4"])?;
    ensure!(set.contains("127.0.0.0/8"), "{set}");
    daemon.terminate(NOTICE)?;
    // Who cleans up closes what was opened.
    let setting = "net.ipv4.conf.all.route_localnet";
    ensure!(lab.node.sysctl(setting)?.trim() == "1", "never set");
    let output = lab.node.output(command(&["cleanup"])?)?;
    ensure!(output.status.success() && lab.node.sysctl(setting)?.trim() == "0", "{output:?}");
    // If it stays when nobody asks for it any more, or is somebody else's, so do the rules.
    lab.node.set_sysctl(setting, "1")?;
    let daemon = world.daemon(&[])?;
    let outcome = from_neighbour(OWN_PORT)?;
    ensure!(outcome == Outcome::TimedOut, "a neighbour gets in without the flag: {outcome:?}");
    daemon.terminate(NOTICE)?;
    let output = lab.node.output(command(&["cleanup"])?)?;
    let said = String::from_utf8_lossy(&output.stderr).contains("route_localnet is 1");
    ensure!(output.status.success() && said, "{output:?}");
    let outcome = from_neighbour(OWN_PORT)?;
    ensure!(
        outcome.by() == Some(own.name()),
        "the neighbour's packets do not arrive at all: {outcome:?}"
    );
    Ok(())
}
