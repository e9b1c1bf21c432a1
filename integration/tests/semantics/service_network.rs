//! Addresses of the Service network that no Service has.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use portcullis_integration::lab::eventually;
use portcullis_integration::manifest::replace;
use portcullis_integration::traffic::{Outcome, Probe, Protocol, Server, probe};
use serde_json::json;

use super::{DROPPED, NOTICE, World, exposed};

#[test]
fn nobody_answers_for_addresses_of_no_service() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let manifest = exposed(20, lab, &json!({}));
    manifest.write(&world.manifests)?;
    // Somebody in the network of the nodes answers there, as a router might.
    let strays: [IpAddr; 2] = ["10.96.200.200".parse()?, "fd00:10:96::c8c8".parse()?];
    for stray in &strays {
        let (host, via) = match stray {
            IpAddr::V4(_) => (format!("{stray}/32"), lab.peer.v4.to_string()),
            IpAddr::V6(_) => (format!("{stray}/128"), lab.peer.v6.to_string()),
        };
        lab.peer.run(&["ip", "addr", "add", &host, "dev", "lo"])?;
        lab.node.run(&["ip", "route", "add", &host, "via", &via])?;
    }
    let _server = Server::start(&lab.peer, "stray", Protocol::Tcp, 80)?;
    let _daemon = world.daemon(&[])?;
    let reach = |stray: &IpAddr| {
        [&lab.allowed, &lab.node].map(|from| {
            let probe = Probe::new(SocketAddr::new(*stray, 80), Protocol::Tcp);
            probe.timeout(DROPPED).run(from).ok()
        })
    };
    let answered =
        |outcome: &Option<Outcome>| outcome.as_ref().and_then(Outcome::by) == Some("stray");
    // Nobody has said that the network is one of Services.
    for stray in &strays {
        ensure!(reach(stray).iter().all(answered), "{stray}: {:?}", reach(stray));
    }
    let file = world.manifests.join("network.json");
    let network = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": { "name": "kubernetes" },
        "spec": { "cidrs": ["10.96.0.0/16", "fd00:10:96::/112"] },
    });
    replace(&file, &network.to_string())?;
    for stray in &strays {
        let silent = || reach(stray).iter().all(|outcome| *outcome == Some(Outcome::TimedOut));
        ensure!(eventually(NOTICE, silent), "{stray} still answers: {:?}", reach(stray));
    }
    // Services of the network are served, and their unknown ports rejected.
    for address in &manifest.cluster_ips {
        let outcome = probe(&lab.node, (*address, 81), Protocol::Tcp)?;
        ensure!(outcome == Outcome::Refused, "{address}: {outcome:?}");
    }
    fs::remove_file(&file)?;
    for stray in &strays {
        let back = || reach(stray).iter().all(answered);
        ensure!(eventually(NOTICE, back), "{stray} does not answer again");
    }
    Ok(())
}
