//! Somebody changed the table while no daemon owned it.

use std::num::NonZeroU32;

use anyhow::{Context, Result, ensure};
use portcullis::model::{Balancing, CidrSet, SourceRestriction, TrafficPolicy};
use portcullis::netlink::{Batch, Socket, TableFlags};
use portcullis::ruleset::TABLE;
use portcullis_integration::services::Sketch;

use super::{Machine, web};

fn services() -> Vec<Sketch> {
    vec![
        web(1, &[1, 2]),
        web(2, &[3]).allow("192.0.2.0/24, 198.51.100.0/24"),
        web(3, &[]),
        web(4, &[1]).closed(),
        web(5, &[1, 2, 3]).to(&["10.244.9.1", "10.244.9.2"]).with(|service| {
            service.external_ips = vec!["198.51.100.5".parse().expect("an address")];
            service.load_balancer_ips = vec!["203.0.113.5".parse().expect("an address")];
            let ranges = CidrSet::parse("10.0.0.0/8").expect("a CIDR");
            service.load_balancer_sources = SourceRestriction::Allow(ranges);
            service.external_traffic = TrafficPolicy::Local;
            service.session_affinity = NonZeroU32::new(7200);
            service.balancing = Balancing::SourceHash;
        }),
    ]
}

/// Whether the table must be laid out anew, or a few elements put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    Elements(usize),
    Layout,
}

const ELEMENTS_OF: &str = "element inet portcullis";
const CHAIN: &str = "chain inet portcullis";

/// What was done to the table, and what it takes to repair that.
fn tamperings() -> Vec<(&'static str, String, Repair)> {
    use Repair::{Elements, Layout};
    vec![
        (
            "an element deleted",
            format!("delete {ELEMENTS_OF} cluster-ips4 {{ 10.96.0.1 }}"),
            Elements(1),
        ),
        (
            "an element added",
            format!("add {ELEMENTS_OF} cluster-ips4 {{ 10.96.7.7 }}"),
            Elements(1),
        ),
        (
            "a comment changed",
            format!(
                "delete {ELEMENTS_OF} cluster-ips4 {{ 10.96.0.1 }}
                add {ELEMENTS_OF} cluster-ips4 {{ 10.96.0.1 comment \"mine\" }}"
            ),
            Elements(2),
        ),
        (
            "a node port that leads to another chain",
            format!(
                "delete {ELEMENTS_OF} nodeports4 {{ tcp . 30001 }}
                add {ELEMENTS_OF} nodeports4 {{ tcp . 30001
                    comment \"shop/web-1:http\" : goto nodeport4-over-1 }}"
            ),
            Elements(2),
        ),
        (
            "an address that stands with those of another number of endpoints",
            format!(
                "delete {ELEMENTS_OF} service-ips4-over-2 {{ 10.96.0.1 . tcp . 80 }}
                add {ELEMENTS_OF} service-ips4-over-1 {{ 10.96.0.1 . tcp . 80
                    comment \"shop/web-1:http\" }}"
            ),
            Elements(2),
        ),
        (
            "an address that leads to another verdict",
            format!(
                "delete {ELEMENTS_OF} nodeport-firewall {{ tcp . 30002 }}
                add {ELEMENTS_OF} nodeport-firewall {{ tcp . 30002
                    comment \"shop/web-2:http\" : accept }}"
            ),
            Elements(2),
        ),
        (
            "a slot that leads to another endpoint",
            format!(
                "delete {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000001 }}
                add {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000001
                    : 10.9.9.9 . 9 }}"
            ),
            Elements(2),
        ),
        (
            "an endpoint gone",
            format!("delete {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000001 }}"),
            Elements(1),
        ),
        (
            "an endpoint too many",
            format!(
                "add {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000002
                    : 10.9.9.9 . 9 }}"
            ),
            Elements(1),
        ),
        (
            "an endpoint of a port that nobody has",
            format!(
                "add {ELEMENTS_OF} nodeport-endpoints4 {{ tcp . 39999 . 0x00000000
                    : 10.9.9.9 . 9 }}"
            ),
            Elements(1),
        ),
        (
            "an endpoint moved to another slot",
            format!(
                "delete {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000001 }}
                add {ELEMENTS_OF} endpoints4 {{ 10.96.0.1 . tcp . 80 . 0x00000007
                    : 10.244.0.2 . 80 }}"
            ),
            Elements(2),
        ),
        (
            "an endpoint with a comment",
            format!(
                "delete {ELEMENTS_OF} nodeport-endpoints4 {{ tcp . 30001 . 0x00000000 }}
                add {ELEMENTS_OF} nodeport-endpoints4 {{ tcp . 30001 . 0x00000000
                    comment \"mine\" : 10.244.0.1 . 80 }}"
            ),
            Elements(2),
        ),
        (
            "an endpoint of the node gone",
            format!("delete {ELEMENTS_OF} endpoints4 {{ 203.0.113.5 . tcp . 80 . 0x80000001 }}"),
            Elements(1),
        ),
        (
            "a node that may use no other endpoints",
            format!("delete {ELEMENTS_OF} cluster-policy4 {{ 198.51.100.5 . tcp . 80 }}"),
            Elements(1),
        ),
        (
            "a source range let in",
            format!(
                "add {ELEMENTS_OF} load-balancer-sources4 {{
                    203.0.113.5 . tcp . 80 . 198.51.100.0 . 24 }}"
            ),
            Elements(1),
        ),
        (
            "a Service that remembers nobody",
            format!("delete {ELEMENTS_OF} sticky4 {{ 10.96.0.5 . tcp . 80 }}"),
            Elements(1),
        ),
        ("another time to be remembered", format!("flush {CHAIN} remember4-7200s"), Layout),
        (
            "another way to choose",
            format!("flush {CHAIN} service4-over-5-sticky-by-source"),
            Layout,
        ),
        (
            "a source let in",
            format!("add {ELEMENTS_OF} allow4-shop/web-2 {{ 203.0.113.0/24 }}"),
            Elements(1),
        ),
        (
            "a source with another prefix",
            format!(
                "delete {ELEMENTS_OF} allow4-shop/web-2 {{ 192.0.2.0/24 }}
                add {ELEMENTS_OF} allow4-shop/web-2 {{ 192.0.2.0/23 }}"
            ),
            Elements(2),
        ),
        (
            "everybody let in",
            format!(
                "flush set inet portcullis allow4-shop/web-2
                add {ELEMENTS_OF} allow4-shop/web-2 {{ 0.0.0.0/0 }}"
            ),
            Elements(3),
        ),
        ("a rule added to a base chain", "add rule inet portcullis services accept".into(), Layout),
        (
            "a rule put before those of a base chain",
            "insert rule inet portcullis firewall-prerouting accept".into(),
            Layout,
        ),
        ("a base chain flushed", format!("flush {CHAIN} filter-input"), Layout),
        ("a firewall flushed", format!("flush {CHAIN} fw-shop/web-2"), Layout),
        (
            "a firewall without its sets",
            format!(
                "flush {CHAIN} fw-shop/web-2
                delete set inet portcullis allow4-shop/web-2
                delete set inet portcullis allow6-shop/web-2"
            ),
            Layout,
        ),
        (
            "a firewall that lets everybody in",
            format!(
                "flush {CHAIN} fw-shop/web-4
                add rule inet portcullis fw-shop/web-4 ip saddr @allow4-shop/web-4 counter accept
                    comment \"allowed\"
                add rule inet portcullis fw-shop/web-4 ip6 saddr @allow6-shop/web-4 counter accept
                    comment \"allowed\"
                add rule inet portcullis fw-shop/web-4 limit rate 1/second burst 10 packets
                    log prefix \"shop/web-4\" group 3210 snaplen 64
                    comment \"sample of the refused\"
                add rule inet portcullis fw-shop/web-4 counter accept comment \"refused\""
            ),
            Layout,
        ),
        (
            "a balancing chain of another number",
            format!(
                "flush {CHAIN} service4-over-2
                add rule inet portcullis service4-over-2 meta l4proto tcp dnat ip to 10.9.9.9:9"
            ),
            Layout,
        ),
        (
            "a base chain at another place",
            format!(
                "flush {CHAIN} firewall-prerouting
                delete {CHAIN} firewall-prerouting
                add {CHAIN} firewall-prerouting {{ type filter hook prerouting priority 300;
                    comment \"source firewalls, before DNAT\"; }}
                add rule inet portcullis firewall-prerouting ct state related,new iifname != \"lo\"
                    jump source-firewall"
            ),
            Layout,
        ),
        (
            "a base chain that drops the rest",
            format!("add {CHAIN} filter-forward {{ policy drop; }}"),
            Layout,
        ),
        (
            "a base chain that is jumped to by a foreign chain",
            format!(
                "add {CHAIN} mine {{ type filter hook input priority 5; }}
                add rule inet portcullis mine jump source-firewall"
            ),
            Layout,
        ),
        ("a foreign chain", format!("add {CHAIN} mine"), Layout),
        ("a foreign set", "add set inet portcullis mine { type ipv4_addr; }".into(), Layout),
        (
            "a set of another type",
            format!(
                "flush {CHAIN} without-endpoints
                delete set inet portcullis no-endpoint-nodeports6
                add set inet portcullis no-endpoint-nodeports6 {{ type inet_service; }}"
            ),
            Layout,
        ),
    ]
}

#[test]
fn what_others_changed_is_put_right() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (daemon, _) = machine.adopted(&services())?;
    let untouched = machine.state()?;
    machine.end(daemon)?;
    let mut failed = Vec::new();
    for (name, script, repair) in tamperings() {
        // nft takes a line for a command.
        let mut lines: Vec<String> = Vec::new();
        for line in script.lines().map(str::trim) {
            let begins =
                ["add ", "delete ", "flush ", "insert "].iter().any(|w| line.starts_with(w));
            match lines.last_mut() {
                Some(last) if !begins => *last = format!("{last} {line}"),
                _ => lines.push(line.to_owned()),
            }
        }
        machine.nft(&lines.join("\n")).context(name)?;
        ensure!(machine.state()? != untouched, "{name}: nothing was changed");
        let before = machine.generation()?;
        let (daemon, adoption) = machine.adopted(&services()).context(name)?;
        let operations = adoption.operations;
        let got = if adoption.replaced { Repair::Layout } else { Repair::Elements(operations) };
        if got != repair {
            failed.push(format!("{name}: {adoption:?}, not {repair:?}"));
        }
        if let Err(error) = machine.state()?.expect(&untouched) {
            failed.push(format!("{name}: {error}"));
        }
        let transactions = machine.generation()? - before;
        if transactions != 1 {
            failed.push(format!("{name}: {transactions} transactions"));
        }
        machine.end(daemon)?;
        if machine.state()? != untouched {
            // So that the next case starts from the same.
            machine.nft("delete table inet portcullis")?;
            let (daemon, _) = machine.adopted(&services())?;
            machine.end(daemon)?;
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// The chains of a dormant table (`NFT_TABLE_F_DORMANT`) see no packet. Only newer versions of nft
/// can do that to a table that persists.
#[test]
fn a_table_that_sleeps_is_laid_out_anew() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (daemon, _) = machine.adopted(&services())?;
    let untouched = machine.state()?;
    machine.end(daemon)?;
    let dormant = TableFlags(TableFlags::ORPHANED.0 | 1);
    let mut batch = Batch::new(TABLE);
    batch.add_table(dormant, None);
    machine.namespace.enter(Socket::open)?.commit(batch)?;
    ensure!(machine.dump()?.flags == dormant, "awake");
    let (_daemon, adoption) = machine.adopted(&services())?;
    ensure!(adoption.replaced, "{adoption:?}");
    ensure!(machine.dump()?.flags == TableFlags::OWNED);
    machine.state()?.expect(&untouched)
}
