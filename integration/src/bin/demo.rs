//! `make demo`: a NodePort with a firewall in a minute, without a cluster.
//!
//! Network namespaces play a node, its pods and two clients; the real binary follows a copy of
//! `manifests/demo`, which the demo edits. Everything is gone when it ends.

use std::fmt::Display;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use portcullis_integration::daemon::{command, follow_manifests};
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab, eventually};
use portcullis_integration::traffic::{Flow, Outcome, Protocol, Server, Tally, probe, probe_many};

/// Connections for each distribution.
const CONNECTIONS: usize = 600;
/// How long a change of a manifest may take until clients notice.
const NOTICE: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let lab = Lab::new(3).context("build the network")?;
    let manifests = copy_manifests(lab.directory())?;
    let _servers = start_servers(&lab)?;

    title("The network");
    say("one node, three pods on it, two clients outside; each is a network namespace");
    for (host, role) in
        [(&lab.node, "node"), (&lab.allowed, "client A"), (&lab.refused, "client B")]
    {
        say(format!("  {role:9} {:15} {}", host.v4, host.v6));
    }
    for (number, pod) in lab.pods.iter().enumerate() {
        say(format!("  pod {}     {:15} {}", number + 1, pod.v4, pod.v6));
    }

    title("portcullis run --manifests demo/ --node-name node-1");
    let daemon = follow_manifests(&lab, &manifests)?;
    say("Service shop/web: TCP node port 30080, allowed for 192.0.2.0/24 and 2001:db8:1::/48");
    say("Service shop/dns: UDP node port 30053, no restriction");

    title("Client A is allowed: its connections are spread over the pods");
    for family in FAMILIES {
        distribution(&lab.allowed, node_port(&lab, family, 30080), Protocol::Tcp)?;
    }

    title("Client B is not");
    for family in FAMILIES {
        expect(&lab.refused, node_port(&lab, family, 30080), Protocol::Tcp, Reach::Dropped)?;
    }

    title("UDP, open to everyone");
    for (client, family) in [(&lab.allowed, Family::V4), (&lab.refused, Family::V6)] {
        distribution(client, node_port(&lab, family, 30053), Protocol::Udp)?;
    }

    title("Inside the cluster: pod 1 reaches the ClusterIP, even when it is balanced to itself");
    distribution(&lab.pods[0], SocketAddr::from(([10, 96, 0, 10], 80)), Protocol::Tcp)?;

    title("The annotation is edited: 192.0.2.0/24 goes, 198.51.100.0/24 comes");
    let web = manifests.join("web.yaml");
    let target = node_port(&lab, Family::V4, 30080);
    let mut open = Flow::open(&lab.allowed, target, Protocol::Tcp)?;
    say(format!("client A has a connection open to {}", open.by()));
    edit(&web, "192.0.2.0/24", "198.51.100.0/24")?;
    let swapped = eventually(NOTICE, || {
        probe(&lab.refused, target, Protocol::Tcp).is_ok_and(|outcome| outcome.by().is_some())
    });
    ensure!(swapped, "the edited annotation had no effect within {NOTICE:?}");
    expect(&lab.refused, target, Protocol::Tcp, Reach::Answered)?;
    expect(&lab.allowed, target, Protocol::Tcp, Reach::Dropped)?;
    let cut = eventually(NOTICE, || !open.alive().unwrap_or(false));
    ensure!(cut, "the connection of a revoked source lived on");
    say("client A: the connection that it had open is cut");

    title("Pod 3 leaves the EndpointSlice");
    edit(&web, "  - addresses: [\"10.244.0.12\"]\n    nodeName: node-1\n", "")?;
    let left = eventually(NOTICE, || {
        probe_many(&lab.refused, target, Protocol::Tcp, 60).is_ok_and(|t| t.by("pod 3") == 0)
    });
    ensure!(left, "the endpoint was still used after {NOTICE:?}");
    distribution(&lab.refused, target, Protocol::Tcp)?;

    title("What the daemon logged of the refused (sampled)");
    for line in daemon.stderr().lines().filter(|line| line.contains("refused a connection")).take(3)
    {
        say(line);
    }

    title("portcullis audit");
    let directory = manifests.to_str().context("a path in UTF-8")?;
    let audit = ["audit", "--manifests", directory, "--node-name", "node-1"];
    let output = lab.node.output(command(&audit)?)?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.status.success(), "audit: {}", String::from_utf8_lossy(&output.stderr));

    title("The ruleset behind it: nft list table inet portcullis");
    print!(
        "{}",
        without_empty_sets(&lab.node.run(&["nft", "list", "table", "inet", "portcullis"])?)
    );

    title("The end: the daemon stops, `portcullis cleanup` removes the table");
    daemon.signal(Signal::SIGTERM)?;
    daemon.terminate(Duration::from_secs(10))?;
    let output = lab.node.output(command(&["cleanup"])?)?;
    print!("{}", String::from_utf8_lossy(&output.stdout));
    let rest = lab.node.run(&["nft", "list", "ruleset"])?;
    ensure!(rest.trim().is_empty(), "cleanup left this behind:\n{rest}");
    say("nothing is left; the namespaces go with this process");
    Ok(())
}

fn title(text: &str) {
    println!("\n=== {text}");
}

fn say(text: impl Display) {
    println!("{text}");
}

/// A copy of the demo's manifests that can be edited.
fn copy_manifests(directory: &Path) -> Result<PathBuf> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/demo");
    let to = directory.join("demo");
    fs::create_dir(&to).context("make a directory for the manifests")?;
    for entry in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name())).context("copy a manifest")?;
    }
    Ok(to)
}

/// Replaces text in a manifest as an editor does: a new file takes the old one's place.
fn edit(file: &Path, from: &str, to: &str) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    ensure!(text.contains(from), "{} does not say {from:?}", file.display());
    let new = file.with_extension("new");
    fs::write(&new, text.replace(from, to)).context("write the edited manifest")?;
    fs::rename(&new, file).context("put the edited manifest in its place")
}

fn start_servers(lab: &Lab) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for (number, pod) in lab.pods.iter().enumerate() {
        let name = format!("pod {}", number + 1);
        servers.push(Server::start(pod, &name, Protocol::Tcp, 8080)?);
        servers.push(Server::start(pod, &name, Protocol::Udp, 5353)?);
    }
    Ok(servers)
}

fn node_port(lab: &Lab, family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(lab.node.address(family), port)
}

/// What a client is expected to get.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Answered,
    Dropped,
}

fn expect(from: &Host, to: SocketAddr, protocol: Protocol, reach: Reach) -> Result<()> {
    let outcome = probe(from, to, protocol)?;
    let (seen, ok) = match &outcome {
        Outcome::Answered { by, .. } => (format!("answered by {by}"), reach == Reach::Answered),
        Outcome::TimedOut => ("no answer, dropped".to_owned(), reach == Reach::Dropped),
        other => (format!("{other:?}"), false),
    };
    say(format!("{} -> {to}: {seen}", source(from, to.ip())));
    ensure!(ok, "that was not expected");
    Ok(())
}

fn distribution(from: &Host, to: SocketAddr, protocol: Protocol) -> Result<()> {
    let tally: Tally = probe_many(from, to, protocol, CONNECTIONS)?;
    let shares: Vec<String> =
        tally.answered.iter().map(|(name, count)| format!("{name}: {count}")).collect();
    say(format!("{} -> {to}, {CONNECTIONS} times: {}", source(from, to.ip()), shares.join(", ")));
    ensure!(tally.answers() == CONNECTIONS as u64, "not all were answered: {tally:?}");
    Ok(())
}

fn source(from: &Host, to: IpAddr) -> IpAddr {
    from.address(if to.is_ipv4() { Family::V4 } else { Family::V6 })
}

/// A listing without the sets and maps that hold nothing here.
fn without_empty_sets(listing: &str) -> String {
    let mut kept = String::new();
    for block in listing.split_inclusive("\n\t}\n") {
        let is_set =
            block.trim_start().starts_with("set ") || block.trim_start().starts_with("map ");
        if !is_set || block.contains("elements = ") {
            kept.push_str(block);
        }
    }
    kept
}
