//! Which endpoints serve whom, as packets: every kind of address, policy, source and placement of
//! endpoints, against a statement of the rules of its own.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis_integration::daemon::follow;
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab, eventually};
use portcullis_integration::manifest::{Endpoint, Manifest, Port, write_node};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Outcome, Probe, Protocol, Server, probe, probe_all};
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
    let _daemon = world.daemon(&[])?;

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

#[test]
fn clients_keep_their_endpoint() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let sticky = json!({ "sessionAffinity": "ClientIP" });
    let mut manifest = exposed(20, lab, &sticky);
    manifest.endpoints = lab.pods.iter().flat_map(Endpoint::of).collect();
    manifest.endpoints.extend(Endpoint::elsewhere(lab));
    manifest.write(&world.manifests)?;
    let daemon = world.daemon(&[])?;

    let clients = [&lab.allowed, &lab.refused, &lab.node];
    let mut chosen = Vec::new();
    for client in clients {
        for to in targets(lab, &manifest, 20) {
            for protocol in PROTOCOLS {
                let by = answers(client, to, protocol, 12)?;
                ensure!(by.len() == 1, "{} -> {to} {protocol:?}: {by:?}", client.name());
                chosen.push((client, to, protocol, by));
            }
        }
    }
    let different: BTreeSet<_> = chosen.iter().flat_map(|(.., by)| by).collect();
    ensure!(different.len() > 1, "everybody got {different:?}");

    // Also after a restart of the daemon.
    daemon.kill()?;
    let _daemon = world.daemon(&[])?;
    for (client, to, protocol, before) in &chosen {
        let now = answers(client, *to, *protocol, 2)?;
        ensure!(now == *before, "{} -> {to}: {now:?} after {before:?}", client.name());
    }

    // An endpoint that leaves is forgotten, and the others are not.
    let (gone, stays) = (HERE[0], [HERE[1], ELSEWHERE]);
    let leaving = FAMILIES.map(|family| lab.pods[0].address(family));
    manifest.endpoints.retain(|endpoint| !leaving.contains(&endpoint.address));
    manifest.write(&world.manifests)?;
    for (client, to, protocol, before) in &chosen {
        let moved = before.contains(gone);
        let kept = |now: &BTreeSet<String>| if moved { !now.contains(gone) } else { now == before };
        let settled = || answers(client, *to, *protocol, 3).is_ok_and(|now| kept(&now));
        ensure!(
            eventually(NOTICE, settled),
            "{} -> {to} {protocol:?} after {before:?}",
            client.name()
        );
        let now = answers(client, *to, *protocol, 6)?;
        ensure!(now.len() == 1 && now.iter().all(|by| stays.contains(&by.as_str())), "{now:?}");
    }

    // And nobody is kept when the Service does not ask for it any more.
    manifest.extra["spec"]["sessionAffinity"] = json!("None");
    manifest.write(&world.manifests)?;
    let to = targets(lab, &manifest, 20)[0];
    let spread = || answers(&lab.allowed, to, Protocol::Tcp, 40).is_ok_and(|by| by.len() == 2);
    ensure!(eventually(NOTICE, spread), "still kept");
    Ok(())
}

#[test]
fn clients_are_forgotten_in_time() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let manifest = exposed(
        20,
        lab,
        &json!({
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 1 } },
        }),
    );
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    let to = targets(lab, &manifest, 20)[0];
    let mut seen = BTreeSet::new();
    // Each time by chance one of two: thirty times the same one in a billion tries.
    let both = eventually(Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_millis(1200));
        seen.extend(answers(&lab.allowed, to, Protocol::Tcp, 1).unwrap_or_default());
        seen.len() == 2
    });
    ensure!(both, "always {seen:?}");
    Ok(())
}

#[test]
fn the_hash_of_a_client_chooses() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let mut manifest = exposed(20, lab, &json!({}));
    manifest.extra["metadata"]["annotations"]["portcullis.dev/balancing"] = json!("source-hash");
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    for to in targets(lab, &manifest, 20) {
        for client in [&lab.allowed, &lab.refused, &lab.node] {
            let by = answers(client, to, Protocol::Tcp, 8)?;
            ensure!(by.len() == 1, "{} -> {to}: {by:?}", client.name());
        }
    }
    Ok(())
}

#[test]
fn hints_and_endpoints_that_leave() -> Result<()> {
    let Some(world) = World::new(2)? else { return Ok(()) };
    let lab = &world.lab;
    let _servers = servers(lab)?;
    let zones = |names: &[&str]| {
        let zones: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
        json!({ "hints": { "forZones": zones } })
    };
    let nodes = |name: &str| json!({ "hints": { "forNodes": [{ "name": name }] } });
    let leaving = |serving: bool| json!({ "conditions": { "ready": false, "serving": serving, "terminating": true } });
    let ready = || json!({});
    let node = portcullis_integration::daemon::NODE_NAME;
    let [first, second] = HERE;
    // What is said of each endpoint, and who serves.
    let table: Vec<(&str, [Value; 3], Vec<&str>)> = vec![
        ("a zone", [zones(&["here"]), zones(&["there"]), zones(&["there"])], vec![first]),
        (
            "two zones",
            [zones(&["here", "b"]), zones(&["b", "here"]), zones(&["b"])],
            vec![first, second],
        ),
        (
            "no hint of here",
            [zones(&["a"]), zones(&["b"]), zones(&["c"])],
            vec![first, second, ELSEWHERE],
        ),
        (
            "one without hints",
            [zones(&["here"]), ready(), zones(&["b"])],
            vec![first, second, ELSEWHERE],
        ),
        ("a node", [nodes(node), nodes("peer"), nodes("peer")], vec![first]),
        ("nodes before zones", [nodes("peer"), nodes("peer"), nodes(node)], vec![ELSEWHERE]),
        ("some leave", [ready(), leaving(true), leaving(true)], vec![first]),
        ("all leave", [leaving(true), leaving(true), leaving(false)], vec![first, second]),
        ("hints of those who leave", [zones(&["here"]), leaving(true), zones(&["b"])], vec![first]),
    ];
    let mut manifest = exposed(20, lab, &json!({}));
    let endpoints: Vec<[Endpoint; 2]> =
        [Endpoint::of(&lab.pods[0]), Endpoint::of(&lab.pods[1]), Endpoint::elsewhere(lab)].into();
    manifest.write(&world.manifests)?;
    let _daemon = world.daemon(&[])?;
    for (what, extras, expected) in table {
        manifest.endpoints = endpoints
            .iter()
            .zip(&extras)
            .flat_map(|(both, extra)| {
                both.clone().map(|endpoint| Endpoint { extra: extra.clone(), ..endpoint })
            })
            .collect();
        manifest.write(&world.manifests)?;
        let expected: BTreeSet<String> = expected.into_iter().map(ToOwned::to_owned).collect();
        for to in targets(lab, &manifest, 20) {
            let mut last = BTreeSet::new();
            let settled = eventually(NOTICE, || {
                last = answers(&lab.allowed, to, Protocol::Tcp, 40).unwrap_or_default();
                last == expected
            });
            ensure!(settled, "{what}, {to}: {last:?}, not {expected:?}");
        }
    }
    // The node moves to another zone.
    let node = fs::read_to_string(world.manifests.join("node.json"))?;
    manifest.endpoints = endpoints
        .iter()
        .zip([zones(&["here"]), zones(&["b"]), zones(&["there"])])
        .flat_map(|(both, extra)| both.clone().map(|e| Endpoint { extra: extra.clone(), ..e }))
        .collect();
    manifest.write(&world.manifests)?;
    portcullis_integration::manifest::replace(
        &world.manifests.join("node.json"),
        &node.replace("\"here\"", "\"there\""),
    )?;
    let to = targets(lab, &manifest, 20)[0];
    let moved = || {
        let by = answers(&lab.allowed, to, Protocol::Tcp, 20).unwrap_or_default();
        by == BTreeSet::from([ELSEWHERE.to_owned()])
    };
    ensure!(eventually(NOTICE, moved), "the zone of the node makes no difference");
    Ok(())
}

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
    let table: [(&[&str], [bool; 2]); 6] = [
        (&[], [true, false]),
        (&["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/56"], [true, false]),
        (&["--cluster-cidr", "192.0.2.0/24,2001:db8:1::/64"], [false, true]),
        (&["--pod-interface-name-prefix", prefix], [true, false]),
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
