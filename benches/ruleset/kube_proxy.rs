//! The yardstick: the same Services as kube-proxy's nftables mode (Kubernetes 1.36) programs them.
//!
//! The shape is kube-proxy's: a verdict map from each Service address to a chain of that Service,
//! and in that chain one rule with an anonymous map of its endpoints; node ports by way of one more
//! chain each. Transactions are nft's language, one command a line, through `nft -f -`. Only IPv4
//! is programmed, where kube-proxy has a second table for IPv6. Making the text is not counted.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};

use crate::cluster::{Cluster, NODE_ADDRESS, PORT, PORT_NAME};
use crate::measure::{Job, Measurement, Outcome, Proxy, What};
use crate::objects;

const TABLE: &str = "kube-proxy";
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
        cluster.replace_endpoint(index);
        commit(&endpoints_changed(&cluster, index), &mut replaced)?;

        let gone = cluster.slices[index].endpoints.remove(0);
        commit(&endpoints_changed(&cluster, index), &mut counted)?;
        cluster.slices[index].endpoints.push(gone);
        commit(&endpoints_changed(&cluster, index), &mut counted)?;

        let index = cluster.push(index);
        commit(&service_added(&cluster, index), &mut added)?;
        commit(&service_removed(&cluster, index), &mut removed)?;
        // kube-proxy deletes the chain a second later, in a transaction of its own.
        let chain = chain_name("service", &cluster, index);
        commit(&format!("delete chain ip {TABLE} {chain}\n"), &mut Outcome::default())?;
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
        service(&mut text, cluster, index);
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

/// One Service that the table does not have.
fn service(out: &mut String, cluster: &Cluster, index: usize) {
    let chain = chain_name("service", cluster, index);
    make_chain(out, &chain);
    let address = cluster.services[index].cluster_ips[0];
    let _ = writeln!(out, "add element ip {TABLE} cluster-ips {{ {address} }}");
    let _ = writeln!(
        out,
        "add element ip {TABLE} service-ips {{ {address} . tcp . {PORT} : goto {chain} }}"
    );
    for endpoint in &cluster.slices[index].endpoints {
        if endpoint.node.as_ref() == Some(&cluster.node.name) {
            let (pod, port) = (endpoint.address, target_port(cluster, index));
            let _ = writeln!(
                out,
                "add element ip {TABLE} hairpin-connections {{ {pod} . {pod} . tcp . {port} }}"
            );
        }
    }
    if let Some(node_port) = cluster.services[index].ports[0].node_port {
        let external = chain_name("external", cluster, index);
        make_chain(out, &external);
        let _ = writeln!(
            out,
            "add element ip {TABLE} service-nodeports {{ tcp . {node_port} : goto {external} }}"
        );
        external_rules(out, &external, &chain);
    }
    balance(out, &chain, cluster, index);
}

fn external_rules(out: &mut String, external: &str, chain: &str) {
    let _ = writeln!(
        out,
        "add rule ip {TABLE} {external} mark set mark or 0x4000 comment \"masquerade\""
    );
    let _ = writeln!(out, "add rule ip {TABLE} {external} goto {chain}");
}

/// The rule that chooses an endpoint.
fn balance(out: &mut String, chain: &str, cluster: &Cluster, index: usize) {
    let endpoints = &cluster.slices[index].endpoints;
    let port = target_port(cluster, index);
    let _ = write!(
        out,
        "add rule ip {TABLE} {chain} meta l4proto tcp dnat ip addr . port to \
         numgen random mod {} map {{ ",
        endpoints.len()
    );
    for (slot, endpoint) in endpoints.iter().enumerate() {
        let comma = if slot > 0 { " , " } else { "" };
        let _ = write!(out, "{comma}{slot} : {} . {port}", endpoint.address);
    }
    out.push_str(" }\n");
}

/// The transaction when the endpoints of a Service have changed: its chains are written anew.
fn endpoints_changed(cluster: &Cluster, index: usize) -> String {
    let mut text = String::new();
    let chain = chain_name("service", cluster, index);
    make_chain(&mut text, &chain);
    if cluster.services[index].ports[0].node_port.is_some() {
        let external = chain_name("external", cluster, index);
        make_chain(&mut text, &external);
        external_rules(&mut text, &external, &chain);
    }
    balance(&mut text, &chain, cluster, index);
    text
}

fn service_added(cluster: &Cluster, index: usize) -> String {
    let mut text = String::new();
    service(&mut text, cluster, index);
    text
}

/// The transaction when a Service goes. Its chains are only emptied.
fn service_removed(cluster: &Cluster, index: usize) -> String {
    let mut text = String::new();
    let chain = chain_name("service", cluster, index);
    let service = &cluster.services[index];
    let address = service.cluster_ips[0];
    let _ = writeln!(text, "flush chain ip {TABLE} {chain}");
    let _ = writeln!(text, "delete element ip {TABLE} cluster-ips {{ {address} }}");
    let _ = writeln!(text, "delete element ip {TABLE} service-ips {{ {address} . tcp . {PORT} }}");
    if let Some(node_port) = service.ports[0].node_port {
        let external = chain_name("external", cluster, index);
        let _ = writeln!(text, "flush chain ip {TABLE} {external}");
        let _ =
            writeln!(text, "delete element ip {TABLE} service-nodeports {{ tcp . {node_port} }}");
    }
    text
}

fn make_chain(out: &mut String, chain: &str) {
    let _ = writeln!(out, "add chain ip {TABLE} {chain}");
    let _ = writeln!(out, "flush chain ip {TABLE} {chain}");
}

/// A name of the length that kube-proxy's have: eight characters of a hash, and the port's name.
fn chain_name(kind: &str, cluster: &Cluster, index: usize) -> String {
    let port = format!("{}/tcp/{PORT_NAME}", cluster.services[index].name);
    let hash = xxhash_rust::xxh64::xxh64(port.as_bytes(), 0) >> 32;
    format!("{kind}-{hash:08X}-{port}")
}

fn target_port(cluster: &Cluster, index: usize) -> u16 {
    cluster.slices[index].ports[0].port.get()
}
