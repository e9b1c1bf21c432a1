//! The daemon is killed, restarted and replaced, also by one that lays its table out anew, while clients open
//! thousands of connections a second: none fails. With a real API server.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use portcullis_integration::controlplane::{ControlPlane, objects};
use portcullis_integration::daemon::follow_cluster;
use portcullis_integration::lab::{FAMILIES, Host, Lab};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Protocol, Server};
use portcullis_load::{Load, Report};
use serde_json::json;

const NAME: &str = "load";
/// Connections a second, half of them from outside to the node ports and half from a pod to the ClusterIPs.
/// How many the machine really opens is in the output; the test fails by failed connections alone.
const RATE: u32 = 2000;
/// How often the daemon is killed, how often it is replaced, and how often it finds another layout.
const TIMES: usize = 3;
const END: Duration = Duration::from_secs(10);
/// Between two of these, with the daemon there and without.
const PAUSE: Duration = Duration::from_secs(1);
/// The comment of a rule that no version has.
const ALTERED: &str = "another layout";

#[test]
fn no_connection_fails_while_the_daemon_is_killed_and_replaced() -> Result<()> {
    if !available(&[Requirement::Root, Requirement::Nft, Requirement::ControlPlane]) {
        return Ok(());
    }
    let plane = ControlPlane::shared()?;
    let lab = Lab::new(3)?;
    plane.attach(&lab.node)?;
    let (client, endpoints) = lab.pods.split_last().context("no pods")?;
    let _servers: Vec<Server> = endpoints
        .iter()
        .map(|pod| Server::start(pod, pod.name(), Protocol::Tcp, 8080))
        .collect::<Result<_>>()?;
    let (cluster_ips, node_ports) = open_shop(plane, &lab, endpoints)?;
    let mut daemon = follow_cluster(&lab, plane, NAME)?;

    let over = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let outside = scope.spawn(|| run(&lab.allowed, node_ports, &over));
        let inside = scope.spawn(|| run(client, cluster_ips, &over));
        let disturbed = (|| {
            thread::sleep(PAUSE);
            let rounds = [
                (Signal::SIGKILL, false),
                (Signal::SIGTERM, false),
                // As an upgrade to a version whose table has another layout.
                (Signal::SIGTERM, true),
            ];
            for (signal, another_layout) in rounds {
                for _ in 0..TIMES {
                    daemon.signal(signal)?;
                    daemon.wait(END)?;
                    if another_layout {
                        alter_layout(&lab.node)?;
                    }
                    thread::sleep(PAUSE);
                    daemon = follow_cluster(&lab, plane, NAME)?;
                    ensure!(!is_altered(&lab.node)?, "the table was not laid out anew");
                    thread::sleep(PAUSE);
                }
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        for (whom, thread) in [("node ports", outside), ("ClusterIPs", inside)] {
            let report = thread.join().expect("opening connections does not panic")?;
            println!("{whom}: {report}");
            ensure!(report.unable == 0, "the client could not do it: {report}");
            ensure!(report.failed == 0, "{whom}: {report}");
            ensure!(report.done > 0, "{whom}: no connection at all");
        }
        disturbed
    })
}

/// A rule in the table that this version does not have. The next daemon replaces the whole table.
fn alter_layout(node: &Host) -> Result<()> {
    node.nft(&format!("add rule inet portcullis services counter comment \"{ALTERED}\""))?;
    ensure!(is_altered(node)?, "the rule is not in the table");
    Ok(())
}

fn is_altered(node: &Host) -> Result<bool> {
    Ok(node.run(&["nft", "list", "chain", "inet", "portcullis", "services"])?.contains(ALTERED))
}

/// ClusterIPs and node ports of a Service with these endpoints.
fn open_shop(
    plane: &ControlPlane,
    lab: &Lab,
    endpoints: &[Host],
) -> Result<(Vec<SocketAddr>, Vec<SocketAddr>)> {
    plane.block_on(async |client| {
        objects::node(&client, NAME, &lab.node, &[]).await?;
        let namespace = objects::namespace(&client, NAME).await?;
        for pod in endpoints {
            let labels = [("app", "web")];
            objects::pod(&client, &namespace, pod.name(), &labels, NAME, pod).await?;
        }
        let spec = json!({
            "type": "NodePort",
            "selector": { "app": "web" },
            "ports": [{ "port": 80, "targetPort": 8080 }],
        });
        let made = objects::service(&client, &namespace, "web", spec).await?;
        objects::wait_for_endpoints(&client, &namespace, "web", endpoints.len()).await?;
        let spec = made.spec.context("no spec")?;
        let ips = spec.cluster_ips.context("no ClusterIPs")?;
        let ips = ips.iter().map(|ip| ip.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
        let node_port = spec.ports.context("no ports")?[0].node_port.context("no node port")?;
        let node_port = u16::try_from(node_port)?;
        let at = |family| SocketAddr::new(lab.node.address(family), node_port);
        Ok((
            ips.into_iter().map(|ip| SocketAddr::new(ip, 80)).collect(),
            FAMILIES.into_iter().map(at).collect(),
        ))
    })
}

fn run(from: &Host, targets: Vec<SocketAddr>, over: &AtomicBool) -> Result<Report> {
    let load = Load {
        targets,
        sources: Vec::new(),
        rate: RATE / 2,
        // The server greets whoever connects; this is the answer to a question.
        ask: b"1\n".to_vec(),
        expect: b"\n1 ".to_vec(),
        limit: Duration::from_secs(3),
    };
    Ok(from.enter(|| load.run(|| over.load(Ordering::Relaxed)))?)
}
