//! Node ports at loopback addresses, where that was asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Result, ensure};
use portcullis_integration::lab::eventually;
use portcullis_integration::traffic::{Flow, Probe, Protocol};
use serde_json::json;

use super::{DROPPED, NOTICE, PROTOCOLS, World, exposed, servers};

const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const NODE_PORT: u16 = 30_120;

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
    let daemon = world.daemon(&[])?;
    for protocol in PROTOCOLS {
        ensure!(served(at(lab.node.v4.into()), protocol)?, "not served at all");
        ensure!(!served(at(LOCALHOST.into()), protocol)?, "served without being asked");
    }
    daemon.terminate(NOTICE)?;

    let _daemon = world.daemon(&["--localhost-nodeports"])?;
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
    let guard =
        lab.node.run(&["nft", "list", "chain", "inet", "portcullis", "firewall-prerouting"])?;
    for direction in ["daddr", "saddr"] {
        let rule = format!("iifname != \"lo\" ip {direction} @localhost-ips4 drop");
        ensure!(guard.contains(&rule), "{guard}");
    }
    let set = lab.node.run(&["nft", "list", "set", "inet", "portcullis", "localhost-ips4"])?;
    ensure!(set.contains("127.0.0.0/8"), "{set}");
    Ok(())
}
