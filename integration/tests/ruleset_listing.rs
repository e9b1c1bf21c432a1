//! The ruleset as the library prints it is what nft lists of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use portcullis::commit::Worker;
use portcullis::model::Protocol::{self, Sctp, Tcp, Udp};
use portcullis::model::{
    Balancing, CidrSet, LocalTraffic, NodeContext, Service, SourceRestriction, TrafficPolicy,
};
use portcullis::ruleset::{Listing, render};
use portcullis_integration::lab::Namespace;
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::services::{Sketch, node, service};

#[test]
fn what_is_printed_is_what_nft_lists() {
    if !available(&[Requirement::Root, Requirement::Nft]) {
        return;
    }
    let mut failed = Vec::new();
    for (name, cidrs, services) in worlds() {
        let compared = node(cidrs).and_then(|node| compare(&node, &services));
        if let Err(error) = compared {
            failed.push(format!("{name}: {error:#}"));
        }
    }
    for (name, node) in nodes() {
        if let Err(error) = compare(&node, &several()) {
            failed.push(format!("{name}: {error:#}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

const ALL: &[&str] = &["0.0.0.0/0", "::/0"];
const LONG: &str = "abcdefghijklmnopqrstuvwxyz-abcdefghijklmnopqrstuvwxyz-012345678";

/// What the world is called, where node ports are served, and the Services.
type World = (String, &'static [&'static str], Vec<Sketch>);

fn worlds() -> Vec<World> {
    let protocols = |sketch: Sketch| {
        sketch
            .port("http", Tcp, 80, 30080)
            .port("dns", Udp, 53, 30053)
            .port("sig", Sctp, 2905, 32767)
            .port("inner", Tcp, 65535, 0)
    };
    let web = || service("shop/web");
    let dual = || protocols(web().at("10.96.0.1").at("fd00:10:96::1"));
    let endpoints = &["10.244.0.10", "10.244.1.10", "fd00:10:244::a", "fd00:10:244:1::a"];
    let mut worlds: Vec<World> = vec![
        ("nothing".into(), &[], vec![]),
        ("a node".into(), &["192.168.77.1/32", "10.0.0.0/8", "fd00:77::1/128"], vec![]),
        ("all addresses of a node".into(), ALL, vec![]),
        ("IPv4".into(), ALL, vec![protocols(web().at("10.96.0.1")).to(&endpoints[..2])]),
        ("IPv6".into(), ALL, vec![protocols(web().at("fd00:10:96::1")).to(&endpoints[2..])]),
        ("both families".into(), ALL, vec![dual().to(endpoints)]),
        ("endpoints here".into(), ALL, vec![dual().to(&endpoints[..1]).local(&endpoints[1..])]),
        ("no endpoints".into(), ALL, vec![dual()]),
        ("endpoints of one family".into(), ALL, vec![dual().to(&endpoints[2..])]),
        ("a port without a name".into(), ALL, vec![web().at("10.96.0.1").port("", Tcp, 80, 30080)]),
        ("a closed firewall".into(), ALL, vec![dual().to(endpoints).closed()]),
        ("long names".into(), ALL, vec![long_names()]),
        ("several Services".into(), ALL, several()),
    ];
    for sources in [
        "",
        "192.0.2.0/24",
        "192.0.2.7",
        "2001:db8::/32",
        "2001:db8::7",
        "0.0.0.0/0, ::/0",
        "255.0.0.0/8, ff00::/8, 0.0.0.0/8, ::/8",
        "255.255.255.255, ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "128.0.0.0/1, 8000::/1",
        // Adjacent, and no CIDR together.
        "10.0.1.0/24, 10.0.2.0/24, 10.0.3.0/24, 2001:db8:1::/48, 2001:db8:2::/48",
        "10.0.0.1, 10.0.0.2, 10.0.0.3, 10.0.0.4",
        // Addresses that are written in several ways.
        "::1, ::1.2.3.4, ::ffff:10.0.0.0/104, 64:ff9b::192.0.2.33, 1:0:0:2::3, 1:0:2:0:3:0:4:0",
    ] {
        worlds.push((
            format!("allowed: {sources}"),
            ALL,
            vec![dual().to(endpoints).allow(sources)],
        ));
    }
    worlds.extend(policies().map(|(name, change)| {
        let everything = dual().to(&endpoints[..1]).local(&endpoints[1..]);
        (format!("policies: {name}"), ALL, vec![everything.with(change)])
    }));
    for count in (1..=8).chain([100]) {
        worlds.push((format!("{count} endpoints"), ALL, vec![spread(count)]));
    }
    worlds
}

type Change = fn(&mut Service);

/// Everything that a Service can say about its traffic.
fn policies() -> impl Iterator<Item = (&'static str, Change)> {
    fn external(service: &mut Service) {
        let address = |text: &str| text.parse().expect("an address");
        service.external_ips = vec![address("198.51.100.1"), address("2001:db8::1")];
        service.load_balancer_ips = vec![address("203.0.113.1"), address("2001:db8:1::1")];
    }
    let changes: [(&'static str, Change); 9] = [
        ("external addresses", external),
        ("internal Local", |s| s.internal_traffic = TrafficPolicy::Local),
        ("external Local", |s| {
            external(s);
            s.external_traffic = TrafficPolicy::Local;
        }),
        ("affinity", |s| {
            external(s);
            s.session_affinity = NonZeroU32::new(10_800);
        }),
        ("affinity for an odd time", |s| s.session_affinity = NonZeroU32::new(86_399)),
        ("affinity for a second", |s| s.session_affinity = NonZeroU32::new(1)),
        ("by source", |s| {
            external(s);
            s.balancing = Balancing::SourceHash;
        }),
        ("everything Local and sticky and by source", |s| {
            external(s);
            s.internal_traffic = TrafficPolicy::Local;
            s.external_traffic = TrafficPolicy::Local;
            s.session_affinity = NonZeroU32::new(3600);
            s.balancing = Balancing::SourceHash;
        }),
        ("source ranges", |s| {
            external(s);
            let ranges = CidrSet::parse("10.0.0.0/8, 2001:db8:2::/48").expect("CIDRs");
            s.load_balancer_sources = SourceRestriction::Allow(ranges);
        }),
    ];
    changes.into_iter()
}

/// Everything that a node can be known by.
fn nodes() -> Vec<(&'static str, NodeContext)> {
    let with = |change: fn(&mut NodeContext)| {
        let mut node = NodeContext::new("node".into());
        change(&mut node);
        node
    };
    vec![
        (
            "pods by the node's CIDRs",
            with(|node| {
                node.node.pod_cidrs = cidrs(&["10.244.1.0/24", "fd00:10:244:1::/64"]);
                node.service_cidrs = cidrs(&["10.96.0.0/16", "fd00:10:96::/112"]);
            }),
        ),
        (
            "pods by the cluster's CIDRs",
            with(|node| node.local_traffic = LocalTraffic::Cidrs(cidrs(&["10.244.0.0/16"]))),
        ),
        (
            "pods by their bridge",
            with(|node| node.local_traffic = LocalTraffic::Bridge("cni0".into())),
        ),
        (
            "pods by the longest name there is",
            with(|node| node.local_traffic = LocalTraffic::Bridge("abcdefghijklmno".into())),
        ),
        (
            "pods by the prefix of their interfaces",
            with(|node| node.local_traffic = LocalTraffic::InterfacePrefix("cali".into())),
        ),
        (
            "everything masqueraded",
            with(|node| {
                node.local_traffic = LocalTraffic::InterfacePrefix("v".into());
                node.masquerade_all = true;
            }),
        ),
    ]
}

fn cidrs(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a CIDR")).collect()
}

/// A Service with this many endpoints in each family.
fn spread(count: usize) -> Sketch {
    let addresses: Vec<String> = (0..count)
        .flat_map(|n| [format!("10.244.0.{}", n + 1), format!("fd00:10:244::{:x}", n + 1)])
        .collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let sketch = service("shop/web").at("10.96.0.1").at("fd00:10:96::1");
    sketch.port("http", Tcp, 80, 30080).local(&addresses)
}

/// The longest names that Kubernetes has: 63 bytes for a namespace and a Service, 15 for a port.
fn long_names() -> Sketch {
    assert_eq!(LONG.len(), 63);
    let sketch = service(&format!("{LONG}/{LONG}")).at("10.96.0.1").at("fd00:10:96::1");
    let sketch = sketch.port("fifteen-letters", Tcp, 80, 30080).port("sixteen", Udp, 80, 30080);
    sketch.to(&["10.244.0.10", "fd00:10:244::a"]).allow("192.0.2.0/24")
}

/// Services that share chains and endpoints.
fn several() -> Vec<Sketch> {
    let endpoints = ["10.244.0.10", "10.244.0.11", "10.244.1.10"];
    let web = |name: &str, last: u8, protocol: Protocol| {
        let port = 30000 + u16::from(last);
        let sketch = service(name).at(&format!("10.96.0.{last}")).at(&format!("fd00:96::{last}"));
        sketch.port("", protocol, 80, port).local(&endpoints[..usize::from(last % 4)])
    };
    vec![
        web("shop/web", 1, Tcp),
        web("shop/db", 2, Udp).allow("10.0.0.0/8"),
        web("shop/web-2", 3, Sctp).allow(""),
        web("default/web", 4, Tcp).closed(),
        web("a/b", 5, Tcp).allow("::/0"),
        web("z/0", 6, Tcp),
    ]
}

/// Writes a world into a fresh namespace and compares both texts.
fn compare(node: &NodeContext, services: &[Sketch]) -> Result<()> {
    let namespace = Namespace::new("listing")?;
    // The worker lives until nft has listed its table.
    let worker = namespace.enter(|| -> Result<Worker> {
        let mut worker = Worker::open(|_| {})?;
        worker.adopt(node, services.iter().map(Sketch::plan).collect())?;
        ensure!(!worker.has_refused(), "refused: {worker:?}");
        Ok(worker)
    })?;
    let listed = namespace.run(&["nft", "list", "table", "inet", "portcullis"])?;
    let printed = render(&Listing::new(worker.applied().contributions()));
    let json = namespace.run(&["nft", "-j", "list", "ruleset"])?;
    serde_json::from_str::<serde_json::Value>(&json).context("nft -j")?;

    let (listed, printed) = (Text::parse(&listed)?, Text::parse(&printed)?);
    for name in listed.blocks.keys().chain(printed.blocks.keys()) {
        let (listed, printed) = (listed.blocks.get(name), printed.blocks.get(name));
        ensure!(listed == printed, "{name}: nft lists\n{listed:#?}\nprinted is\n{printed:#?}");
    }
    ensure!(listed == printed, "{:?} is listed, {:?} printed", listed.head, printed.head);
    Ok(())
}

/// A listing of one table, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Text {
    /// Lines of the table itself, without its flags.
    head: Vec<String>,
    /// Sets, maps and chains by their first line.
    blocks: BTreeMap<String, Block>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Block {
    /// Its lines but for elements, in their order.
    lines: Vec<String>,
    elements: BTreeSet<String>,
}

impl Text {
    fn parse(text: &str) -> Result<Text> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let first = lines.next().context("an empty listing")?;
        // nft names the owner behind a hash.
        ensure!(first.starts_with("table inet portcullis {"), "begins with {first:?}");
        let mut text = Text { head: Vec::new(), blocks: BTreeMap::new() };
        while let Some(line) = lines.next() {
            if let Some(name) = line.strip_suffix(" {") {
                let block = Block::parse(&mut lines)?;
                let twice = text.blocks.insert(name.to_owned(), block);
                ensure!(twice.is_none(), "{name} is there twice");
            } else if line == "}" {
                ensure!(lines.next().is_none(), "something behind the table");
                return Ok(text);
            } else if !line.starts_with("flags ") {
                text.head.push(line.to_owned());
            }
        }
        anyhow::bail!("the table does not end")
    }
}

impl Block {
    fn parse<'a>(lines: &mut impl Iterator<Item = &'a str>) -> Result<Block> {
        let mut block = Block::default();
        while let Some(line) = lines.next() {
            if line == "}" {
                return Ok(block);
            }
            let Some(first) = line.strip_prefix("elements = { ") else {
                block.lines.push(line.to_owned());
                continue;
            };
            let mut elements = first.to_owned();
            while !elements.ends_with(" }") {
                elements.push(' ');
                elements.push_str(lines.next().context("the elements do not end")?);
            }
            for element in elements.trim_end_matches(" }").split(", ") {
                let new = block.elements.insert(element.to_owned());
                ensure!(new, "element {element} is there twice");
            }
        }
        anyhow::bail!("a block does not end")
    }
}
