//! Which endpoints serve whom, as packets: every kind of address, policy, source and placement of
//! endpoints, against a statement of the rules of its own.

mod balancing;
mod endpoints;
mod flows;
mod localhost;
mod service_network;
mod sources;

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use portcullis_integration::daemon::follow;
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab};
use portcullis_integration::manifest::{Endpoint, Manifest, Port, write_node};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Outcome, Probe, Protocol, Server, probe_all};
use serde_json::{Value, json};

/// How long a changed file may take until packets notice; it takes milliseconds.
const NOTICE: Duration = Duration::from_secs(10);
/// How long a connection that is dropped is waited for.
const DROPPED: Duration = Duration::from_millis(700);
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

struct World {
    lab: Lab,
    manifests: PathBuf,
}

impl World {
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

    fn daemon(&self, arguments: &[&str]) -> Result<portcullis_integration::lab::Process> {
        let directory = self.manifests.to_str().context("a path in UTF-8")?;
        follow(&self.lab, &[&["--manifests", directory], arguments].concat())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    Cluster,
    Local,
}

const POLICIES: [Policy; 2] = [Policy::Cluster, Policy::Local];

/// Where the endpoints are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placement {
    Both,
    Here,
    Elsewhere,
    Nowhere,
}

const PLACEMENTS: [Placement; 4] =
    [Placement::Both, Placement::Here, Placement::Elsewhere, Placement::Nowhere];

impl Placement {
    fn here(self) -> bool {
        matches!(self, Placement::Both | Placement::Here)
    }

    fn elsewhere(self) -> bool {
        matches!(self, Placement::Both | Placement::Elsewhere)
    }
}

/// What a client connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
}

const TARGETS: [Target; 4] =
    [Target::ClusterIp, Target::NodePort, Target::ExternalIp, Target::LoadBalancer];

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    PodHere,
    Node,
    PodElsewhere,
    Client,
}

const SOURCES: [Source; 4] = [Source::PodHere, Source::Node, Source::PodElsewhere, Source::Client];

/// What a client gets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    /// One of these servers answers; whether it sees the client's own address, where that can be
    /// told.
    Served(BTreeSet<&'static str>, Option<bool>),
    Refused,
    Dropped,
}

const HERE: [&str; 2] = ["here-0", "here-1"];
const ELSEWHERE: &str = "elsewhere";

/// One Service of the matrix.
#[derive(Clone, Copy, Debug)]
struct Case {
    internal: Policy,
    external: Policy,
    placement: Placement,
    number: u8,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for internal in POLICIES {
        for external in POLICIES {
            for placement in PLACEMENTS {
                let number = 20 + u8::try_from(cases.len()).expect("few cases");
                cases.push(Case { internal, external, placement, number });
            }
        }
    }
    cases
}

/// The rules, said once more: what the documentation of Kubernetes promises, not how the ruleset
/// keeps it.
fn expected(case: Case, target: Target, source: Source) -> Expected {
    let all: BTreeSet<&'static str> = {
        let here = HERE.into_iter().filter(|_| case.placement.here());
        here.chain(case.placement.elsewhere().then_some(ELSEWHERE)).collect()
    };
    let here: BTreeSet<&'static str> = HERE.into_iter().filter(|_| case.placement.here()).collect();
    if all.is_empty() {
        return Expected::Refused;
    }
    let from_here = matches!(source, Source::PodHere | Source::Node);
    let local_only = match target {
        Target::ClusterIp => case.internal == Policy::Local,
        // Who is here did not choose the node, so the policy is not about it.
        _ => case.external == Policy::Local && !from_here,
    };
    let servers = if local_only { here } else { all };
    if servers.is_empty() {
        return Expected::Dropped;
    }
    let keeps_address = match (target, source) {
        // It has several addresses, and the routes choose one of them.
        (_, Source::Node) => None,
        // What is not a pod of this node cannot be answered past this node.
        (Target::ClusterIp, source) => Some(source == Source::PodHere),
        _ => Some(case.external == Policy::Local),
    };
    Expected::Served(servers, keeps_address)
}

fn node_port(case: Case) -> u16 {
    30100 + u16::from(case.number)
}

fn external_ip(number: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, number]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0x53, 0, 0, 0, 0, u16::from(number)]),
    }
}

fn address(
    lab: &Lab,
    manifest: &Manifest,
    case: Case,
    target: Target,
    family: Family,
) -> SocketAddr {
    let index = usize::from(family == Family::V6);
    match target {
        Target::ClusterIp => (manifest.cluster_ips[index], 80).into(),
        Target::NodePort => (lab.node.address(family), node_port(case)).into(),
        Target::ExternalIp => (external_ip(case.number, family), 80).into(),
        Target::LoadBalancer => (external_ip(case.number + 100, family), 80).into(),
    }
}

/// A Service that is reached in every way.
fn exposed(number: u8, lab: &Lab, extra: &Value) -> Manifest {
    let both = |number| FAMILIES.map(|family| external_ip(number, family));
    let ingress: Vec<Value> =
        both(number + 100).iter().map(|address| json!({ "ip": address })).collect();
    let mut manifest = Manifest::new(&format!("web-{number}"), number, lab);
    for protocol in PROTOCOLS {
        let name = format!("{protocol:?}").to_lowercase();
        manifest = manifest.port(Port::new(&name, protocol, 80, 8080, 30100 + u16::from(number)));
    }
    manifest.extra = json!({
        "spec": { "type": "LoadBalancer", "externalIPs": both(number) },
        "status": { "loadBalancer": { "ingress": ingress } },
    });
    for (field, value) in extra.as_object().into_iter().flatten() {
        manifest.extra["spec"][field] = value.clone();
    }
    manifest
}

fn servers(lab: &Lab) -> Result<Vec<Server>> {
    let mut servers = Vec::new();
    for protocol in PROTOCOLS {
        for (pod, name) in lab.pods.iter().zip(HERE) {
            servers.push(Server::start(pod, name, protocol, 8080)?);
        }
        servers.push(Server::start(&lab.remote_pod, ELSEWHERE, protocol, 8080)?);
    }
    Ok(servers)
}

fn host(lab: &Lab, source: Source) -> &Host {
    match source {
        Source::PodHere => &lab.pods[2],
        Source::Node => &lab.node,
        Source::PodElsewhere => &lab.remote_pod,
        Source::Client => &lab.allowed,
    }
}

fn differs(expected: &Expected, outcome: &Outcome, client: &Host, family: Family) -> bool {
    match (expected, outcome) {
        (Expected::Refused, Outcome::Refused) | (Expected::Dropped, Outcome::TimedOut) => false,
        (Expected::Served(servers, keeps), Outcome::Answered { by, seen_source }) => {
            let same = seen_source.ip() == client.address(family);
            !servers.contains(by.as_str()) || keeps.is_some_and(|keeps| keeps != same)
        }
        _ => true,
    }
}

#[test]
fn who_is_served_by_whom() -> Result<()> {
    let Some(world) = World::new(3)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let cases = cases();
    let mut manifests = Vec::new();
    for case in &cases {
        let mut manifest = exposed(
            case.number,
            lab,
            &json!({
                "internalTrafficPolicy": format!("{:?}", case.internal),
                "externalTrafficPolicy": format!("{:?}", case.external),
            }),
        );
        manifest.endpoints.clear();
        if case.placement.here() {
            manifest.endpoints.extend(lab.pods[..2].iter().flat_map(Endpoint::of));
        }
        if case.placement.elsewhere() {
            manifest.endpoints.extend(Endpoint::elsewhere(lab));
        }
        manifest.write(&world.manifests)?;
        manifests.push(manifest);
    }
    let _daemon = world.daemon(&["--node-cidr"])?;

    let mut wrong = Vec::new();
    let mut asked = 0;
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for source in SOURCES {
        let client = host(lab, source);
        let mut questions = Vec::new();
        for (case, manifest) in cases.iter().zip(&manifests) {
            // What pods of another node send to Service addresses is served by the proxy there.
            let is_asked =
                |target: &Target| source != Source::PodElsewhere || *target == Target::NodePort;
            for target in TARGETS.into_iter().filter(is_asked) {
                for family in FAMILIES {
                    for protocol in PROTOCOLS {
                        let to = address(lab, manifest, *case, target, family);
                        let expected = match expected(*case, target, source) {
                            // A rejected datagram of the node itself fails in send() with EPERM,
                            // as any that its own output hook drops.
                            Expected::Refused
                                if source == Source::Node && protocol == Protocol::Udp =>
                            {
                                Expected::Dropped
                            }
                            expected => expected,
                        };
                        let times = if matches!(expected, Expected::Served(..)) { 3 } else { 1 };
                        for _ in 0..times {
                            questions.push((*case, target, family, expected.clone(), to, protocol));
                        }
                    }
                }
            }
        }
        let probes: Vec<Probe> = questions
            .iter()
            .map(|(_, _, _, expected, to, protocol)| match expected {
                Expected::Dropped => Probe::new(*to, *protocol).timeout(DROPPED),
                _ => Probe::new(*to, *protocol),
            })
            .collect();
        let outcomes = probe_all(client, &probes)?;
        asked += outcomes.len();
        for ((case, target, family, expected, to, protocol), outcome) in
            questions.iter().zip(&outcomes)
        {
            seen.extend(outcome.by().map(ToOwned::to_owned));
            if differs(expected, outcome, client, *family) {
                wrong.push(format!(
                    "{source:?} -> {target:?} {to} {protocol:?}, {case:?}: {outcome:?}, not {expected:?}"
                ));
            }
        }
    }
    println!("{asked} connections");
    assert!(wrong.is_empty(), "{} of {asked}:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(seen.len(), 3, "somebody never served: {seen:?}");
    Ok(())
}

/// Who answers `count` connections.
fn answers(
    from: &Host,
    to: SocketAddr,
    protocol: Protocol,
    count: usize,
) -> Result<BTreeSet<String>> {
    let probes = vec![Probe::new(to, protocol); count];
    let outcomes = probe_all(from, &probes)?;
    outcomes
        .iter()
        .map(|outcome| Ok(outcome.by().with_context(|| format!("{to}: {outcome:?}"))?.to_owned()))
        .collect()
}

/// Every address of the Service.
fn targets(lab: &Lab, manifest: &Manifest, number: u8) -> Vec<SocketAddr> {
    let case = Case {
        internal: Policy::Cluster,
        external: Policy::Cluster,
        placement: Placement::Both,
        number,
    };
    let of = |target| FAMILIES.map(|family| address(lab, manifest, case, target, family));
    TARGETS.into_iter().flat_map(of).collect()
}
