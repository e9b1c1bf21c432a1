//! The yardstick: the same Services as kube-proxy's nftables mode (Kubernetes 1.36) programs them.
//!
//! The shape is kube-proxy's: a verdict map from each Service address to a chain of that Service,
//! and in that chain one rule with an anonymous map of its endpoints; node ports, load-balancer
//! addresses and external IPs by way of one more chain of the Service. With the policy `Local`
//! endpoints here have a chain, with session affinity each endpoint has a chain and a set, and
//! source ranges have a chain. Transactions are nft's language, one command a line, through
//! `nft -f -`. Only IPv4 is programmed, where kube-proxy has a second table for IPv6. Making the
//! text is not counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use portcullis::model::{Endpoint, Family, Service, SourceRestriction, TrafficPolicy};

use crate::cluster::{Cluster, NODE_ADDRESS, PORT, PORT_NAME, TARGET_PORT};
use crate::measure::{Job, Measurement, Outcome, Proxy, What};
use crate::objects;

const TABLE: &str = "kube-proxy";
/// The addresses of pods.
const PODS: &str = "10.128.0.0/9";
/// How often the table is listed.
const LISTINGS: usize = 3;

/// Loads the cluster, and then changes it in every way that is compared.
///
/// # Errors
/// When nft is missing or refuses something.
pub fn run(job: &Job) -> Result<Vec<Measurement>> {
    let mut cluster = Cluster::new(job.size);
    let mut measurements = Vec::new();
    let mut keep = |what, outcome| {
        let (proxy, size) = (Proxy::KubeProxyShape, job.size);
        measurements.push(Measurement { proxy, what, size, outcome });
    };

    let mut load = Outcome::default();
    commit(&everything(&cluster), &mut load)?;
    load.peak_kib.push(children_peak_kib()?);
    load.objects = Some(objects::count()?);
    keep(What::ColdLoad, load);
    if job.changes == 0 {
        return Ok(measurements);
    }

    let [mut replaced, mut counted, mut added, mut removed] = [(); 4].map(|()| Outcome::default());
    for turn in 0..job.changes {
        let index = cluster.chosen(turn, usize::MAX);
        change(&mut cluster, index, &mut replaced, |cluster| cluster.replace_endpoint(index))?;

        let gone = cluster.slices[index].endpoints[0].clone();
        change(&mut cluster, index, &mut counted, |cluster| {
            cluster.slices[index].endpoints.remove(0);
        })?;
        change(&mut cluster, index, &mut counted, |cluster| {
            cluster.slices[index].endpoints.push(gone);
        })?;

        let new = cluster.push(index);
        let (nothing, service) = (Programmed::default(), Programmed::new(&cluster, new));
        replace(&nothing, &service, &mut added)?;
        replace(&service, &nothing, &mut removed)?;
        cluster.pop();
    }
    let mut listing = Outcome::default();
    for _ in 0..LISTINGS {
        let begun = Instant::now();
        let text = list()?;
        listing.add(begun.elapsed());
        listing.bytes.push(text.len());
    }
    keep(What::EndpointReplaced, replaced);
    keep(What::EndpointCount, counted);
    keep(What::ServiceAdded, added);
    keep(What::ServiceRemoved, removed);
    keep(What::Listing, listing);
    Ok(measurements)
}

/// Changes one Service, and commits what that means.
fn change(
    cluster: &mut Cluster,
    index: usize,
    outcome: &mut Outcome,
    how: impl FnOnce(&mut Cluster),
) -> Result<()> {
    let before = Programmed::new(cluster, index);
    how(cluster);
    replace(&before, &Programmed::new(cluster, index), outcome)
}

fn list() -> Result<Vec<u8>> {
    let output = Command::new("nft")
        .args(["--json", "--terse", "list", "table", "ip", TABLE])
        .output()
        .context("cannot run nft")?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Hands a transaction to nft and waits for its end.
fn commit(text: &str, outcome: &mut Outcome) -> Result<()> {
    let begun = Instant::now();
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run nft")?;
    let mut stdin = nft.stdin.take().expect("it is piped");
    let written = stdin.write_all(text.as_bytes());
    drop(stdin);
    let status = nft.wait()?;
    outcome.add(begun.elapsed());
    if !status.success() {
        bail!("nft refused a transaction: {status}");
    }
    written.context("cannot write to nft")?;
    outcome.operations.push(text.lines().count());
    outcome.bytes.push(text.len());
    Ok(())
}

fn children_peak_kib() -> Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    Ok(usage.max_rss().unsigned_abs())
}

/// The first transaction.
fn everything(cluster: &Cluster) -> String {
    let mut text = String::new();
    base(&mut text);
    for index in 0..cluster.services.len() {
        text.push_str(&transaction(&Programmed::default(), &Programmed::new(cluster, index)));
    }
    text
}

/// All that does not depend on Services.
fn base(out: &mut String) {
    const BASE_CHAINS: [(&str, &str); 8] = [
        ("filter-prerouting-pre-dnat", "type filter hook prerouting priority -110 ;"),
        ("filter-output-pre-dnat", "type filter hook output priority -110 ;"),
        ("filter-input", "type filter hook input priority 0 ;"),
        ("filter-forward", "type filter hook forward priority 0 ;"),
        ("filter-output", "type filter hook output priority 0 ;"),
        ("nat-prerouting", "type nat hook prerouting priority -100 ;"),
        ("nat-output", "type nat hook output priority -100 ;"),
        ("nat-postrouting", "type nat hook postrouting priority 100 ;"),
    ];
    const CHAINS: [&str; 7] = [
        "nodeport-endpoints-check",
        "service-endpoints-check",
        "firewall-check",
        "services",
        "masquerading",
        "cluster-ips-check",
        "reject-chain",
    ];
    const SETS: [(&str, &str); 8] = [
        ("set hairpin-connections", "ipv4_addr . ipv4_addr . inet_proto . inet_service"),
        ("set cluster-ips", "ipv4_addr"),
        ("set nodeport-ips", "ipv4_addr"),
        ("map no-endpoint-services", "ipv4_addr . inet_proto . inet_service : verdict"),
        ("map no-endpoint-nodeports", "inet_proto . inet_service : verdict"),
        ("map firewall-ips", "ipv4_addr . inet_proto . inet_service : verdict"),
        ("map service-ips", "ipv4_addr . inet_proto . inet_service : verdict"),
        ("map service-nodeports", "inet_proto . inet_service : verdict"),
    ];
    const RULES: [(&str, &str); 22] = [
        ("filter-input", "ct state new jump nodeport-endpoints-check"),
        ("filter-input", "ct state new jump service-endpoints-check"),
        ("filter-forward", "ct state new jump service-endpoints-check"),
        ("filter-output", "ct state new jump service-endpoints-check"),
        ("filter-prerouting-pre-dnat", "ct state new jump firewall-check"),
        ("filter-output-pre-dnat", "ct state new jump firewall-check"),
        ("nat-output", "jump services"),
        ("nat-prerouting", "jump services"),
        ("nat-postrouting", "jump masquerading"),
        ("filter-forward", "ct state new jump cluster-ips-check"),
        ("filter-output", "ct state new jump cluster-ips-check"),
        ("masquerading", "mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random"),
        (
            "masquerading",
            "ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections \
             masquerade fully-random",
        ),
        ("cluster-ips-check", "ip daddr @cluster-ips reject"),
        ("cluster-ips-check", "ip daddr { 10.96.0.0/12 } drop"),
        ("reject-chain", "reject"),
        (
            "service-endpoints-check",
            "ip daddr . meta l4proto . th dport vmap @no-endpoint-services",
        ),
        (
            "nodeport-endpoints-check",
            "ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
        ),
        ("firewall-check", "ip daddr . meta l4proto . th dport vmap @firewall-ips"),
        ("services", "ip daddr @cluster-ips ip saddr != 10.128.0.0/9 mark set mark or 0x4000"),
        ("services", "ip daddr . meta l4proto . th dport vmap @service-ips"),
        ("services", "ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports"),
    ];
    let mut line = |text: std::fmt::Arguments<'_>| {
        let _ = writeln!(out, "{text}");
    };
    line(format_args!("add table ip {TABLE} {{ comment \"the yardstick\" ; }}"));
    for (chain, hook) in BASE_CHAINS {
        line(format_args!("add chain ip {TABLE} {chain} {{ {hook} }}"));
    }
    for chain in CHAINS {
        line(format_args!("add chain ip {TABLE} {chain}"));
    }
    for (set, kind) in SETS {
        let (word, name) = set.split_once(' ').expect("two words");
        line(format_args!("add {word} ip {TABLE} {name} {{ type {kind} ; }}"));
    }
    for (chain, rule) in RULES {
        line(format_args!("add rule ip {TABLE} {chain} {rule}"));
    }
    line(format_args!("add element ip {TABLE} nodeport-ips {{ {NODE_ADDRESS} }}"));
}

/// All that a Service has in the table.
#[derive(Default)]
struct Programmed {
    chains: Vec<String>,
    /// The clients that are remembered for each endpoint.
    affinity_sets: Vec<String>,
    affinity_seconds: u32,
    /// By set or map and key, what stands behind the key.
    elements: BTreeMap<(&'static str, String), String>,
    /// The commands that make the rules of all chains.
    rules: String,
}

impl Programmed {
    fn new(cluster: &Cluster, index: usize) -> Programmed {
        let (service, endpoints) = (&cluster.services[index], &cluster.slices[index].endpoints);
        let is_here = |e: &&Endpoint| e.node.as_ref() == Some(&cluster.node.name);
        let here: Vec<&Endpoint> = endpoints.iter().filter(is_here).collect();
        let all: Vec<&Endpoint> = endpoints.iter().collect();

        let mut programmed = Programmed::default();
        if let Some(seconds) = service.session_affinity {
            programmed.affinity_seconds = seconds.get();
            for endpoint in &all {
                programmed.chains.push(endpoint_name("endpoint", service, endpoint));
                programmed.affinity_sets.push(endpoint_name("affinity", service, endpoint));
            }
        }
        for endpoint in &here {
            let key = format!("{0} . {0} . tcp . {TARGET_PORT}", endpoint.address);
            programmed.element("hairpin-connections", key, String::new());
        }
        programmed.chains.push(chain_name("service", service));
        programmed.element("cluster-ips", service.cluster_ips[0].to_string(), String::new());
        let key = format!("{} . tcp . {PORT}", service.cluster_ips[0]);
        programmed.leads_to("service-ips", key, "service", service);
        programmed.balance("service", service, &all);
        let is_local = service.external_traffic == TrafficPolicy::Local;
        if is_local && !here.is_empty() {
            programmed.chains.push(chain_name("local", service));
            programmed.balance("local", service, &here);
        }
        programmed.external(service, is_local && here.is_empty());
        programmed.firewall(service);
        programmed.remember(service, &all);
        programmed
    }

    /// Node ports, load-balancer addresses and external IPs. `is_empty` says that nobody here serves
    /// them.
    fn external(&mut self, service: &Service, is_empty: bool) {
        let addresses = service.external_ips.iter().chain(&service.load_balancer_ips);
        let addresses = addresses.map(|address| {
            ("service-ips", "no-endpoint-services", format!("{address} . tcp . {PORT}"))
        });
        let node_port = service.ports[0]
            .node_port
            .map(|port| ("service-nodeports", "no-endpoint-nodeports", format!("tcp . {port}")));
        let frontends: Vec<_> = addresses.chain(node_port).collect();
        if frontends.is_empty() {
            return;
        }
        for (map, nobody, key) in frontends {
            if is_empty {
                let comment = format!(" comment \"{}:{PORT_NAME}\" : drop", service.name);
                self.element(nobody, key.clone(), comment);
            }
            self.leads_to(map, key, "external", service);
        }
        self.chains.push(chain_name("external", service));
        let cluster = chain_name("service", service);
        if service.external_traffic == TrafficPolicy::Cluster {
            self.rule("external", service, "mark set mark or 0x4000 comment \"masquerade\"");
            return self.rule("external", service, &format!("goto {cluster}"));
        }
        for rule in [
            format!("ip saddr {PODS} goto {cluster} comment \"short-circuit pod traffic\""),
            "fib saddr type local mark set mark or 0x4000 comment \"masquerade local traffic\""
                .to_owned(),
            format!("fib saddr type local goto {cluster} comment \"short-circuit local traffic\""),
        ] {
            self.rule("external", service, &rule);
        }
        if !is_empty {
            self.rule("external", service, &format!("goto {}", chain_name("local", service)));
        }
    }

    fn firewall(&mut self, service: &Service) {
        let SourceRestriction::Allow(ranges) = &service.load_balancer_sources else { return };
        self.chains.push(chain_name("firewall", service));
        for address in &service.load_balancer_ips {
            let key = format!("{address} . tcp . {PORT}");
            self.leads_to("firewall-ips", key, "firewall", service);
        }
        let ranges = ranges.of_family(Family::V4);
        let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        let rule = format!("ip saddr != {{ {} }} drop", ranges.join(" , "));
        self.rule("firewall", service, &rule);
    }

    /// The rules that choose an endpoint.
    fn balance(&mut self, kind: &str, service: &Service, endpoints: &[&Endpoint]) {
        let of = |kind: &str, endpoint: &Endpoint| endpoint_name(kind, service, endpoint);
        if service.session_affinity.is_some() {
            for endpoint in endpoints {
                let (set, chain) = (of("affinity", endpoint), of("endpoint", endpoint));
                self.rule(kind, service, &format!("ip saddr @{set} goto {chain}"));
            }
            let choices = choices(endpoints, |e| format!("goto {}", of("endpoint", e)));
            let rule = format!("numgen random mod {} vmap {{ {choices} }}", endpoints.len());
            return self.rule(kind, service, &rule);
        }
        let choices = choices(endpoints, |e| format!("{} . {TARGET_PORT}", e.address));
        let rule = format!(
            "meta l4proto tcp dnat ip addr . port to numgen random mod {} map {{ {choices} }}",
            endpoints.len(),
        );
        self.rule(kind, service, &rule);
    }

    /// The rules that remember which endpoint a client got.
    fn remember(&mut self, service: &Service, endpoints: &[&Endpoint]) {
        if service.session_affinity.is_none() {
            return;
        }
        for endpoint in endpoints {
            let chain = endpoint_name("endpoint", service, endpoint);
            let set = endpoint_name("affinity", service, endpoint);
            let dnat = format!("meta l4proto tcp dnat to {}:{TARGET_PORT}", endpoint.address);
            let rules = &mut self.rules;
            let _ = writeln!(rules, "add rule ip {TABLE} {chain} update @{set} {{ ip saddr }}");
            let _ = writeln!(rules, "add rule ip {TABLE} {chain} {dnat}");
        }
    }

    fn element(&mut self, set: &'static str, key: String, rest: String) {
        self.elements.insert((set, key), rest);
    }

    fn leads_to(&mut self, map: &'static str, key: String, kind: &str, service: &Service) {
        self.element(map, key, format!(" : goto {}", chain_name(kind, service)));
    }

    fn rule(&mut self, kind: &str, service: &Service, rule: &str) {
        let chain = chain_name(kind, service);
        let _ = writeln!(self.rules, "add rule ip {TABLE} {chain} {rule}");
    }
}

/// `0 : ... , 1 : ...`
fn choices(endpoints: &[&Endpoint], show: impl Fn(&Endpoint) -> String) -> String {
    let choices = endpoints.iter().enumerate();
    let choices: Vec<String> =
        choices.map(|(slot, endpoint)| format!("{slot} : {}", show(endpoint))).collect();
    choices.join(" , ")
}

/// Commits what leads from one state of a Service to another. Chains that nobody needs any more are
/// deleted in a transaction of its own, which kube-proxy does a second later; it is not counted.
fn replace(old: &Programmed, new: &Programmed, outcome: &mut Outcome) -> Result<()> {
    commit(&transaction(old, new), outcome)?;
    let mut text = String::new();
    for chain in stale(&old.chains, &new.chains) {
        let _ = writeln!(text, "delete chain ip {TABLE} {chain}");
    }
    if text.is_empty() { Ok(()) } else { commit(&text, &mut Outcome::default()) }
}

/// The transaction that leads from one state of a Service to another: all its chains are written
/// anew, and of its elements those that were not there.
fn transaction(old: &Programmed, new: &Programmed) -> String {
    let mut text = String::new();
    for chain in &new.chains {
        let _ = writeln!(text, "add chain ip {TABLE} {chain}");
        let _ = writeln!(text, "flush chain ip {TABLE} {chain}");
    }
    for (place @ (set, key), rest) in &new.elements {
        if !old.elements.contains_key(place) {
            let _ = writeln!(text, "add element ip {TABLE} {set} {{ {key}{rest} }}");
        }
    }
    for set in &new.affinity_sets {
        let flags = format!("flags dynamic,timeout ; timeout {}s ;", new.affinity_seconds);
        let _ = writeln!(text, "add set ip {TABLE} {set} {{ type ipv4_addr ; {flags} }}");
    }
    text.push_str(&new.rules);
    for chain in stale(&old.chains, &new.chains) {
        let _ = writeln!(text, "flush chain ip {TABLE} {chain}");
    }
    for set in stale(&old.affinity_sets, &new.affinity_sets) {
        let _ = writeln!(text, "delete set ip {TABLE} {set}");
    }
    for place @ (set, key) in old.elements.keys() {
        if !new.elements.contains_key(place) {
            let _ = writeln!(text, "delete element ip {TABLE} {set} {{ {key} }}");
        }
    }
    text
}

/// What was there and is not wanted any more.
fn stale<'a>(old: &'a [String], new: &'a [String]) -> impl Iterator<Item = &'a String> {
    old.iter().filter(|name| !new.contains(name))
}

/// The name of a chain of a Service.
fn chain_name(kind: &str, service: &Service) -> String {
    name(kind, &format!("{}/tcp/{PORT_NAME}", service.name))
}

/// The name of a chain or set of an endpoint.
fn endpoint_name(kind: &str, service: &Service, endpoint: &Endpoint) -> String {
    let address = endpoint.address;
    name(kind, &format!("{}/tcp/{PORT_NAME}__{address}/{TARGET_PORT}", service.name))
}

/// A name of the length that kube-proxy's have: eight characters of a hash, and what it is of.
fn name(kind: &str, of: &str) -> String {
    let hash = xxhash_rust::xxh64::xxh64(of.as_bytes(), 0) >> 32;
    format!("{kind}-{hash:08X}-{of}")
}
