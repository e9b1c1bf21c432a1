//! The real binary on manifests, and what clients then see.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use portcullis_integration::daemon::{command, follow, follow_manifests};
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab, Namespace, eventually};
use portcullis_integration::manifest::{Endpoint, Manifest, Port, replace, write_node};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::distribution::assert_fits;
use portcullis_integration::traffic::{
    Flow, Outcome, PROTOCOLS, Probe, Protocol, Server, Tally, probe, probe_all, probe_many,
};

/// How long a changed file may take until packets notice; it takes milliseconds.
const NOTICE: Duration = Duration::from_secs(10);

/// A laboratory with a directory of manifests that holds the node.
struct World {
    lab: Lab,
    manifests: PathBuf,
}

impl World {
    /// `None`, with a word about it, where the machine cannot run such a test.
    fn new(pods: usize) -> Result<Option<World>> {
        if !available(&[Requirement::Root, Requirement::Nft]) {
            return Ok(None);
        }
        let lab = Lab::new(pods)?;
        let manifests = lab.directory().join("manifests");
        fs::create_dir(&manifests)?;
        write_node(&lab, &manifests)?;
        Ok(Some(World { lab, manifests }))
    }

    fn node_port(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.lab.node.address(family), port)
    }
}

fn serve(pods: &[Host], protocol: Protocol, port: u16) -> Result<Vec<Server>> {
    pods.iter().map(|pod| Server::start(pod, pod.name(), protocol, port)).collect()
}

fn answered(from: &Namespace, to: SocketAddr, protocol: Protocol) -> bool {
    probe(from, to, protocol).is_ok_and(|outcome| outcome.by().is_some())
}

#[test]
fn every_protocol_and_family_from_everywhere() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let mut manifest = Manifest::new("all", 10, lab);
    let mut servers = Vec::new();
    for (number, protocol) in PROTOCOLS.into_iter().enumerate() {
        let offset = u16::try_from(number)?;
        manifest = manifest.port(Port::new(
            &format!("p{number}"),
            protocol,
            80 + offset,
            8080 + offset,
            30080 + offset,
        ));
        servers.extend(serve(&lab.pods, protocol, 8080 + offset)?);
    }
    manifest.write(&world.manifests)?;
    let _daemon = follow_manifests(lab, &world.manifests)?;

    for (number, protocol) in PROTOCOLS.into_iter().enumerate() {
        let offset = u16::try_from(number)?;
        for (family, cluster_ip) in FAMILIES.into_iter().zip(&manifest.cluster_ips) {
            let service = SocketAddr::new(*cluster_ip, 80 + offset);
            // Pods reach the ClusterIP with their own address.
            let outcome = probe(&lab.pods[0], service, protocol)?;
            ensure!(outcome.by().is_some(), "{protocol:?} pod -> {service}: {outcome:?}");
            // The node's own processes reach it, too.
            let outcome = probe(&lab.node, service, protocol)?;
            ensure!(outcome.by().is_some(), "{protocol:?} node -> {service}: {outcome:?}");

            // A node port answers everybody, and the pod sees the node.
            let node_port = world.node_port(family, 30080 + offset);
            for from in [&lab.allowed, &lab.refused, &lab.peer, &lab.remote_pod, &lab.pods[1]] {
                let outcome = probe(from, node_port, protocol)?;
                let source = outcome.seen_source().map(|source| source.ip());
                ensure!(
                    source.is_some_and(|source| source != from.address(family)),
                    "{protocol:?} {} -> {node_port}: {outcome:?}",
                    from.name(),
                );
            }
            let outcome = probe(&lab.node, node_port, protocol)?;
            ensure!(outcome.by().is_some(), "{protocol:?} node -> {node_port}: {outcome:?}");
        }
    }
    Ok(())
}

#[test]
fn pods_keep_their_address_and_reach_themselves() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    let manifest = Manifest::new("web", 10, lab)
        .port(Port { node_port: None, ..Port::new("http", Protocol::Tcp, 80, 8080, 0) });
    manifest.write(&world.manifests)?;
    let _daemon = follow_manifests(lab, &world.manifests)?;
    for (family, cluster_ip) in FAMILIES.into_iter().zip(&manifest.cluster_ips) {
        let outcome = probe(&lab.remote_pod, (*cluster_ip, 80), Protocol::Tcp);
        // A pod of another node is served by the proxy of its own node, which is not here.
        drop(outcome);
        // The only endpoint is the client itself: the answer must come back through the node.
        let outcome = probe(&lab.pods[0], (*cluster_ip, 80), Protocol::Tcp)?;
        let source = outcome.seen_source().map(|source| source.ip());
        ensure!(
            source.is_some_and(|source| source != lab.pods[0].address(family)),
            "hairpin: {outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn the_source_is_kept_between_pods() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _server = Server::start(&lab.pods[1], "pod", Protocol::Tcp, 8080)?;
    let mut manifest = Manifest::new("web", 10, lab)
        .port(Port { node_port: None, ..Port::new("http", Protocol::Tcp, 80, 8080, 0) });
    manifest.endpoints = Endpoint::of(&lab.pods[1]).to_vec();
    manifest.write(&world.manifests)?;
    let _daemon = follow_manifests(lab, &world.manifests)?;
    for (family, cluster_ip) in FAMILIES.into_iter().zip(&manifest.cluster_ips) {
        let outcome = probe(&lab.pods[0], (*cluster_ip, 80), Protocol::Tcp)?;
        let source = outcome.seen_source().map(|source| source.ip());
        ensure!(source == Some(lab.pods[0].address(family)), "{outcome:?}");
    }
    Ok(())
}

#[test]
fn the_firewall_follows_the_annotation() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let _tcp = serve(&lab.pods, Protocol::Tcp, 8080)?;
    let _udp = serve(&lab.pods, Protocol::Udp, 8080)?;
    let open = Manifest::new("web", 10, lab)
        .port(Port::new("tcp", Protocol::Tcp, 80, 8080, 30080))
        .port(Port::new("udp", Protocol::Udp, 80, 8080, 30080));
    let other =
        Manifest::new("other", 11, lab).port(Port::new("tcp", Protocol::Tcp, 80, 8080, 30081));
    other.write(&world.manifests)?;
    let first = open.clone().allowed("192.0.2.0/24, 2001:db8:1::/48");
    first.write(&world.manifests)?;
    let _daemon = follow_manifests(lab, &world.manifests)?;

    // What the annotation says, and whom it lets in: the client `allowed`, the client `refused`.
    let steps: &[(Option<&str>, bool, bool)] = &[
        (Some("192.0.2.0/24, 2001:db8:1::/48"), true, false),
        (Some("198.51.100.0/24, 2001:db8:2::/48"), false, true),
        (Some("0.0.0.0/0, ::/0"), true, true),
        (Some(""), false, false),
        (Some("192.0.2.10, 2001:db8:1::10"), true, false),
        (Some("192.0.2.0/24, everyone"), false, false),
        (None, true, true),
        (Some("192.0.2.0/24, 2001:db8:1::/48"), true, false),
    ];
    for (number, (annotation, allowed, refused)) in steps.iter().enumerate() {
        let manifest = Manifest { allowed: annotation.map(str::to_owned), ..open.clone() };
        manifest.write(&world.manifests)?;
        // A new Service in the same directory is programmed in the same or a later transaction.
        let marker = u8::try_from(100 + number)?;
        let beacon = Manifest::new("beacon", marker, lab)
            .port(Port { node_port: None, ..Port::new("tcp", Protocol::Tcp, 80, 8080, 0) });
        beacon.write(&world.manifests)?;
        let beacon = SocketAddr::new(beacon.cluster_ips[0], 80);
        ensure!(eventually(NOTICE, || answered(&lab.pods[0], beacon, Protocol::Tcp)), "no change");

        let questions: Vec<Probe> = FAMILIES
            .into_iter()
            .flat_map(|family| {
                let to = world.node_port(family, 30080);
                [Probe::new(to, Protocol::Tcp), Probe::new(to, Protocol::Udp)]
            })
            .collect();
        for (client, expected) in [(&lab.allowed, allowed), (&lab.refused, refused)] {
            for outcome in probe_all(client, &questions)? {
                let fits = match expected {
                    true => outcome.by().is_some(),
                    false => outcome == Outcome::TimedOut,
                };
                ensure!(fits, "{annotation:?}: {} got {outcome:?}", client.name());
            }
        }
        // The node itself, pods by ClusterIP and the other Service are none of the firewall's
        // business.
        let node_port = world.node_port(Family::V4, 30080);
        ensure!(answered(&lab.node, node_port, Protocol::Tcp), "{annotation:?}: the node");
        let cluster_ip = SocketAddr::new(open.cluster_ips[0], 80);
        ensure!(answered(&lab.pods[0], cluster_ip, Protocol::Tcp), "{annotation:?}: ClusterIP");
        let other = world.node_port(Family::V4, 30081);
        ensure!(answered(&lab.refused, other, Protocol::Tcp), "{annotation:?}: other Service");
    }
    Ok(())
}

#[test]
fn a_revoked_source_loses_its_flows() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let mut servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    servers.extend(serve(&lab.pods, Protocol::Udp, 8080)?);
    let open = Manifest::new("web", 10, lab)
        .port(Port::new("tcp", Protocol::Tcp, 80, 8080, 30080))
        .port(Port::new("udp", Protocol::Udp, 80, 8080, 30080));
    open.write(&world.manifests)?;
    let daemon = follow_manifests(lab, &world.manifests)?;
    let mut kept = Vec::new();
    let mut revoked = Vec::new();
    for family in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let to = world.node_port(family, 30080);
            kept.push(Flow::open(&lab.allowed, to, protocol)?);
            kept.push(Flow::open(&lab.node, to, protocol)?);
            revoked.push(Flow::open(&lab.refused, to, protocol)?);
        }
    }
    open.allowed("192.0.2.0/24, 2001:db8:1::/48").write(&world.manifests)?;
    for flow in &mut revoked {
        ensure!(eventually(NOTICE, || !flow.alive().unwrap_or(false)), "{flow:?} lived on");
    }
    for flow in &mut kept {
        ensure!(flow.alive()?, "{flow:?} was cut");
    }
    ensure!(
        daemon.stderr().contains("deleted connections of revoked sources"),
        "{}",
        daemon.tail()
    );
    Ok(())
}

#[test]
fn each_endpoint_has_the_same_chance() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    // One pod with a server on each of a hundred ports stands for a hundred endpoints.
    let pod = &lab.pods[0];
    let ports: Vec<u16> = (9000..9100).collect();
    let servers: Vec<Server> = ports
        .iter()
        .map(|port| Server::start(pod, &port.to_string(), Protocol::Udp, *port))
        .collect::<Result<_>>()?;
    let counts = [1, 2, 3, 4, 5, 6, 7, 8, 100];
    for count in counts {
        let mut manifest = Manifest::new(&format!("n{count}"), u8::try_from(count)?, lab)
            .port(Port::new("udp", Protocol::Udp, 53, 0, 30000 + u16::try_from(count)?));
        manifest.endpoints = ports[..count]
            .iter()
            .flat_map(|port| {
                Endpoint::of(pod).map(|endpoint| Endpoint { target: Some(*port), ..endpoint })
            })
            .collect();
        manifest.write(&world.manifests)?;
    }
    let _daemon = follow_manifests(lab, &world.manifests)?;
    for count in counts {
        let weights: Vec<(&str, u64)> =
            servers[..count].iter().map(|server| (server.name(), 1)).collect();
        let cluster_ip = IpAddr::from([10, 96, 0, u8::try_from(count)?]);
        let by_address = probe_many(&lab.node, (cluster_ip, 53), Protocol::Udp, 40 * count + 400)?;
        fits(&by_address, &weights)?;
        let node_port = world.node_port(Family::V6, 30000 + u16::try_from(count)?);
        let by_node_port = probe_many(&lab.allowed, node_port, Protocol::Udp, 40 * count + 400)?;
        fits(&by_node_port, &weights)?;
    }
    Ok(())
}

/// One server must have answered everything; several, by their weights.
fn fits(tally: &Tally, weights: &[(&str, u64)]) -> Result<()> {
    match weights {
        [(only, _)] => {
            let lost = tally.refused + tally.timed_out + tally.unreachable;
            ensure!(lost == 0 && tally.by(only) == tally.answers(), "{tally:?}");
        }
        several => assert_fits(tally, several),
    }
    Ok(())
}

#[test]
fn what_nobody_serves_is_rejected() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    let served =
        Manifest::new("served", 10, lab).port(Port::new("a", Protocol::Tcp, 80, 8080, 30080));
    served.write(&world.manifests)?;
    let mut idle = Manifest::new("idle", 11, lab)
        .port(Port::new("a", Protocol::Tcp, 80, 8080, 30081))
        .port(Port::new("b", Protocol::Udp, 80, 8080, 30081));
    idle.endpoints.iter_mut().for_each(|endpoint| endpoint.ready = false);
    idle.write(&world.manifests)?;
    let guarded = Manifest { name: "guarded".into(), endpoints: Vec::new(), ..served.clone() };
    let guarded = Manifest {
        cluster_ips: Manifest::new("", 12, lab).cluster_ips,
        ports: vec![Port::new("a", Protocol::Tcp, 80, 8080, 30082)],
        ..guarded
    };
    guarded.allowed("192.0.2.0/24, 2001:db8:1::/48").write(&world.manifests)?;
    let _daemon = follow_manifests(lab, &world.manifests)?;

    for (family, host) in FAMILIES.into_iter().zip(0..) {
        let served = served.cluster_ips[host];
        let idle = idle.cluster_ips[host];
        let tcp = |address, port| Probe::new((address, port), Protocol::Tcp);
        let udp = |address, port| Probe::new((address, port), Protocol::Udp);
        let node = lab.node.address(family);
        // A rejected datagram of the node itself fails in send() with EPERM, as any that its own
        // output hook drops, so that only TCP is asked there.
        let streams = [tcp(idle, 80), tcp(served, 81), tcp(idle, 81)];
        let all = [&streams[..], &[udp(idle, 80), udp(served, 80)]].concat();
        for (from, questions) in [(&lab.pods[0], &all[..]), (&lab.node, &streams)] {
            for (question, outcome) in questions.iter().zip(probe_all(from, questions)?) {
                ensure!(outcome == Outcome::Refused, "{} {question:?}: {outcome:?}", from.name());
            }
        }
        let outside = [tcp(node, 30081), udp(node, 30081), tcp(node, 30082)];
        for (question, outcome) in outside.iter().zip(probe_all(&lab.allowed, &outside)?) {
            ensure!(outcome == Outcome::Refused, "{question:?}: {outcome:?}");
        }
        // Who may not connect is not told that nobody is there.
        let outcome = probe(&lab.refused, (node, 30082), Protocol::Tcp)?;
        ensure!(outcome == Outcome::TimedOut, "{outcome:?}");
    }
    Ok(())
}

#[test]
fn endpoints_come_and_go_and_services_too() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    let manifest =
        Manifest::new("web", 10, lab).port(Port::new("http", Protocol::Tcp, 80, 8080, 30080));
    let to = SocketAddr::new(manifest.cluster_ips[0], 80);
    let with = |pods: &[Host]| Manifest {
        endpoints: pods.iter().flat_map(Endpoint::of).collect(),
        ..manifest.clone()
    };
    let served_by = || -> Result<usize> {
        let tally = probe_many(&lab.node, to, Protocol::Tcp, 90)?;
        ensure!(tally.answers() == 90 || tally.answers() == 0, "in between: {tally:?}");
        Ok(tally.answered.len())
    };
    let _daemon = follow_manifests(lab, &world.manifests)?;
    for count in [1, 3, 2, 0, 2, 1, 3] {
        with(&lab.pods[..count]).write(&world.manifests)?;
        ensure!(
            eventually(NOTICE, || served_by().is_ok_and(|servers| servers == count)),
            "not served by {count}"
        );
    }

    // A file that cannot be read leaves in force what it held.
    let file = world.manifests.join("web.json");
    let good = fs::read_to_string(&file)?;
    replace(&file, &good[..good.len() / 2])?;
    with(&lab.pods[..1]).write(&world.manifests.join(".."))?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(served_by()? == 3, "a broken file took effect");
    replace(&file, &good)?;

    // The Service goes, and comes back under the same name at another address.
    fs::remove_file(&file)?;
    ensure!(eventually(NOTICE, || !answered(&lab.node, to, Protocol::Tcp)), "still served");
    let moved =
        Manifest { cluster_ips: Manifest::new("", 77, lab).cluster_ips, ..manifest.clone() };
    moved.write(&world.manifests)?;
    let to = SocketAddr::new(moved.cluster_ips[0], 80);
    ensure!(eventually(NOTICE, || answered(&lab.node, to, Protocol::Tcp)), "not served again");
    Ok(())
}

#[test]
fn rules_outlive_the_daemon_and_a_restart_writes_nothing() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    let manifest = Manifest::new("web", 10, lab)
        .port(Port::new("http", Protocol::Tcp, 80, 8080, 30080))
        .allowed("192.0.2.0/24, 2001:db8:1::/48");
    manifest.write(&world.manifests)?;
    let to = world.node_port(Family::V4, 30080);
    let daemon = follow_manifests(lab, &world.manifests)?;
    let mut flow = Flow::open(&lab.allowed, to, Protocol::Tcp)?;
    daemon.signal(Signal::SIGKILL)?;
    drop(daemon);

    ensure!(flow.alive()?, "the flow died with the daemon");
    ensure!(answered(&lab.allowed, to, Protocol::Tcp), "the rules died with the daemon");
    ensure!(!answered(&lab.refused, to, Protocol::Tcp), "the firewall died with the daemon");
    let directory = world.manifests.to_str().expect("UTF-8");
    let once = command(&["run", "--once", "--node-name", "node-1", "--manifests", directory])?;
    let output = lab.node.output(once)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(text.contains("adopted") && text.contains(" 0 kernel operations"), "{text}");
    ensure!(flow.alive()?, "the flow died at the restart");

    let output = lab.node.output(command(&["cleanup"])?)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left = lab.node.run(&["nft", "list", "ruleset"])?;
    ensure!(left.trim().is_empty(), "cleanup left: {left}");
    Ok(())
}

#[test]
fn node_ports_are_served_at_the_addresses_that_are_asked_for() -> Result<()> {
    let Some(world) = World::new(1)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = serve(&lab.pods, Protocol::Tcp, 8080)?;
    Manifest::new("web", 10, lab)
        .port(Port::new("http", Protocol::Tcp, 80, 8080, 30080))
        .write(&world.manifests)?;
    lab.node.ip(&["addr add 203.0.113.5/32 dev lo", "addr add 203.0.113.200/32 dev lo"])?;
    let directory = world.manifests.to_str().expect("UTF-8");
    let _daemon =
        follow(lab, &["--manifests", directory, "--nodeport-addresses", "203.0.113.0/25"])?;
    let at = |address: [u8; 4]| SocketAddr::from((address, 30080));
    ensure!(answered(&lab.allowed, at([203, 0, 113, 5]), Protocol::Tcp));
    for other in [[203, 0, 113, 200], [192, 168, 77, 1]] {
        ensure!(!answered(&lab.allowed, at(other), Protocol::Tcp), "{other:?}");
    }
    ensure!(!answered(&lab.node, at([127, 0, 0, 1]), Protocol::Tcp));
    // An address that comes later is served without a change of ours.
    lab.node.ip(&["addr add 203.0.113.9/32 dev lo"])?;
    ensure!(answered(&lab.allowed, at([203, 0, 113, 9]), Protocol::Tcp));
    Ok(())
}
