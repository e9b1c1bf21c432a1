//! What depends on where a connection comes from: source ranges, and who is masqueraded.

use anyhow::{Result, ensure};
use portcullis_integration::lab::{FAMILIES, Host, eventually};
use portcullis_integration::manifest::Endpoint;
use portcullis_integration::traffic::{Flow, Outcome, Probe, Protocol, Server, http_get, probe};
use serde_json::json;

use super::{
    Case, DROPPED, HERE, NOTICE, PROTOCOLS, Placement, Policy, TARGETS, Target, World, address,
    exposed, servers,
};

#[test]
fn source_ranges_guard_load_balancer_addresses() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let manifest = exposed(
        20,
        lab,
        &json!({
            "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:1::/64"],
        }),
    );
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    let case = Case {
        internal: Policy::Cluster,
        external: Policy::Cluster,
        placement: Placement::Here,
        number: 20,
    };
    for family in FAMILIES {
        for target in TARGETS {
            let to = address(lab, &manifest, case, target, family);
            let guarded = target == Target::LoadBalancer;
            ensure!(probe(&lab.allowed, to, Protocol::Tcp)?.by().is_some(), "allowed -> {to}");
            for from in [&lab.refused, &lab.node, &lab.pods[0]] {
                let outcome = Probe::new(to, Protocol::Tcp).timeout(DROPPED).run(from)?;
                ensure!(
                    outcome.by().is_none() == guarded,
                    "{} -> {target:?} {to}: {outcome:?}",
                    from.name(),
                );
            }
        }
    }
    // A flow that is open ends when its source is taken off the list.
    let open = |target| {
        let to = FAMILIES.map(|family| address(lab, &manifest, case, target, family));
        to.into_iter().map(|to| Flow::open(&lab.allowed, to, Protocol::Udp))
    };
    let mut guarded: Vec<Flow> = open(Target::LoadBalancer).collect::<Result<_>>()?;
    let mut others: Vec<Flow> = open(Target::ExternalIp).collect::<Result<_>>()?;
    // The node may use the address if it may use any.
    let manifest = exposed(
        20,
        lab,
        &json!({
            "loadBalancerSourceRanges": ["192.168.77.0/24", "fd00:77::/64"],
        }),
    );
    manifest.write(&world.manifests)?;
    for family in FAMILIES {
        let to = address(lab, &manifest, case, Target::LoadBalancer, family);
        let served = || probe(&lab.node, to, Protocol::Tcp).is_ok_and(|o| o.by().is_some());
        ensure!(eventually(NOTICE, served), "node -> {to}");
        let outcome = Probe::new(to, Protocol::Tcp).timeout(DROPPED).run(&lab.allowed)?;
        ensure!(outcome == Outcome::TimedOut, "allowed -> {to}: {outcome:?}");
    }
    for flow in &mut guarded {
        let ended = || flow.exchange().is_ok_and(|outcome| outcome == Outcome::TimedOut);
        ensure!(eventually(NOTICE, ended), "a flow to a load-balancer address goes on");
    }
    for flow in &mut others {
        ensure!(flow.alive()?, "a flow to an external address ended");
    }
    Ok(())
}

/// The client is `192.0.2.10` and `2001:db8:1::10`.
#[test]
fn source_ranges_may_have_any_length() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let case = Case {
        internal: Policy::Cluster,
        external: Policy::Cluster,
        placement: Placement::Here,
        number: 20,
    };
    let ranges = |list: &[&str]| exposed(20, lab, &json!({ "loadBalancerSourceRanges": list }));
    ranges(&["127.0.0.1/32", "::1/128"]).write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    let table: [(&[&str], bool); 11] = [
        (&["192.0.2.10/32", "2001:db8:1::10/128"], true),
        (&["192.0.2.11/32", "2001:db8:1::11/128"], false),
        (&["128.0.0.0/1", "2000::/3"], true),
        (&["0.0.0.0/1", "4000::/2"], false),
        // In IPv6 these become networks of 128 bits.
        (&["192.0.2.8/29", "2001:db8:1::10/125"], true),
        (&["192.0.2.0/29", "2001:db8:1::/125"], false),
        // The client's network of 24 or 64 bits begins as one that is shorter, but is not listed.
        (&["192.0.2.0/29", "10.1.1.0/24", "2001:db8:1::/124", "fd00:1::/64"], false),
        (&["192.0.2.0/29", "10.0.0.0/8", "192.0.2.8/30", "::/8", "2001:db8:1::/96"], true),
        (&["10.0.0.0/8", "2001:db8:2::/48"], false),
        (&["0.0.0.0/0", "::/0"], true),
        (&["192.0.2.0/24", "2001:db8:1::/64", "nonsense"], false),
    ];
    for (list, lets_in) in table {
        let manifest = ranges(list);
        manifest.write(&world.manifests)?;
        for family in FAMILIES {
            let to = address(lab, &manifest, case, Target::LoadBalancer, family);
            let ask = || Probe::new(to, Protocol::Tcp).timeout(DROPPED).run(&lab.allowed);
            let expected = || ask().is_ok_and(|outcome| outcome.by().is_some() == lets_in);
            ensure!(eventually(NOTICE, expected), "{list:?} -> {to}: {:?}", ask());
        }
    }
    Ok(())
}

/// A health check is answered by the daemon itself, at a port that the Service opens.
#[test]
fn the_firewall_guards_health_checks() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let check = json!({ "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000 });
    let manifest = exposed(20, lab, &check).allowed("192.0.2.0/24, 2001:db8:1::/64");
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    let ask = |from: &Host, family| http_get(from, (lab.node.address(family), 32000), "/");
    for family in FAMILIES {
        let answered = || ask(&lab.allowed, family).is_ok_and(|answer| answer.status == 200);
        ensure!(eventually(NOTICE, answered), "{:?}", ask(&lab.allowed, family));
        ensure!(ask(&lab.refused, family).is_err(), "{family:?}: a refused client is told");
        ensure!(ask(&lab.node, family).is_ok(), "{family:?}: the node itself is not told");
    }
    manifest.allowed("nobody").write(&world.manifests)?;
    for family in FAMILIES {
        let closed = || ask(&lab.allowed, family).is_err();
        ensure!(eventually(NOTICE, closed), "{family:?}: told by a list that is not understood");
    }
    Ok(())
}

/// How pods are known, and who is masqueraded by that.
#[test]
fn who_is_masqueraded() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _server = Server::start(&lab.pods[1], HERE[1], Protocol::Tcp, 8080)?;
    let mut manifest = exposed(20, lab, &json!({}));
    manifest.endpoints = Endpoint::of(&lab.pods[1]).to_vec();
    manifest.write(&world.manifests)?;
    let by_link = lab.node.run(&["ip", "-o", "link"])?;
    let prefix = "pod";
    ensure!(
        by_link.contains(&format!(": {prefix}")),
        "links of pods are called otherwise: {by_link}"
    );
    // Arguments, and whether a pod here and a client elsewhere keep their addresses.
    let [link, other_link] = [0, 1].map(|pod: usize| lab.pods[pod].name());
    let table: [(&[&str], [bool; 2]); 9] = [
        (&[], [true, true]),
        (&["--node-cidr"], [true, false]),
        (&["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56"], [true, false]),
        (&["--cluster-cidr", "192.0.2.0/24,2001:db8:1::/64"], [false, true]),
        (&["--pod-interface-name-prefix", prefix], [true, false]),
        (&["--pod-bridge-interface", link], [true, false]),
        (&["--pod-bridge-interface", other_link], [false, false]),
        (&["--masquerade-all"], [false, false]),
        (&["--masquerade-all", "--pod-interface-name-prefix", prefix], [false, false]),
    ];
    for (arguments, expected) in table {
        let daemon = world.daemon(arguments)?;
        for (family, cluster_ip) in FAMILIES.into_iter().zip(&manifest.cluster_ips) {
            let clients = [&lab.pods[0], &lab.allowed];
            for (client, keeps) in clients.into_iter().zip(expected) {
                // The logs of all daemons are in one file, so this one may not be ready yet.
                let mut last = None;
                let settled = eventually(NOTICE, || {
                    let outcome = probe(client, (*cluster_ip, 80), Protocol::Tcp).ok();
                    let source = outcome.as_ref().and_then(Outcome::seen_source);
                    let same = source.map(|source| source.ip() == client.address(family));
                    last = outcome;
                    same == Some(keeps)
                });
                ensure!(settled, "{arguments:?}, {}: {last:?}", client.name());
            }
        }
        daemon.terminate(NOTICE)?;
    }
    Ok(())
}

/// A connection to a Service's own address is nothing to a firewall of node ports, though the number
/// of its port is that of a node port, and the address one at which they would be served.
#[test]
fn node_port_firewalls_are_about_addresses_of_the_node() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let node_port = 30_120;
    let with_that_port = |number| {
        let mut manifest = exposed(number, lab, &json!({}));
        manifest.ports.iter_mut().for_each(|port| port.port = node_port);
        manifest
    };
    let (manifest, other) = (with_that_port(20), with_that_port(21));
    manifest.clone().allowed("0.0.0.0/0, ::/0").write(&world.manifests)?;
    other.write(&world.manifests)?;
    let options = ["--nodeport-addresses", "0.0.0.0/0,::/0"];
    let daemon = world.daemon(&options)?;
    let mut flows = Vec::new();
    for address in manifest.cluster_ips.iter().chain(&other.cluster_ips) {
        for protocol in PROTOCOLS {
            let flow = Flow::open(&lab.pods[0], (*address, node_port), protocol)?;
            flows.push((address, protocol, flow));
        }
    }
    let mut revoked = { FAMILIES.iter() }
        .map(|family| {
            Flow::open(&lab.refused, (lab.node.address(*family), node_port), Protocol::Udp)
        })
        .collect::<Result<Vec<Flow>>>()?;
    let mut alive = |after: &str| -> Result<()> {
        for (address, protocol, flow) in &mut flows {
            ensure!(flow.alive()?, "{protocol:?} to {address} does not outlive {after}");
        }
        Ok(())
    };
    manifest.clone().allowed("192.0.2.0/24, 2001:db8:1::/64").write(&world.manifests)?;
    for flow in &mut revoked {
        let ends = || flow.exchange().is_ok_and(|outcome| outcome.by().is_none());
        ensure!(eventually(NOTICE, ends), "the firewall of the node port does not change");
    }
    alive("the change")?;
    daemon.kill()?;
    let _daemon = world.daemon(&options)?;
    let outcome = probe(&lab.allowed, (lab.node.v4, node_port), Protocol::Tcp)?;
    ensure!(outcome.by().is_some(), "{outcome:?}");
    alive("the daemon")
}
