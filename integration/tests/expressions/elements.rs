//! What elements can have: intervals, comments, counters and timeouts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use portcullis::netlink::{Batch, Element, Expression, Set, Socket, Verdict};
use portcullis_integration::lab::eventually;

use super::{
    Case, FIRST, Fate, INPUT, IPV4_ADDR, IPV6_ADDR, OUTPUT, PORT, TABLE, World, counted, daddr4,
    daddr6, expect, ip4, ip6, look_up, node, rule, saddr4, saddr6, set, to_port, udp,
};

pub fn cases() -> Vec<Case> {
    let drop_ports = |family: [Expression; 2], address| {
        rule![family, [address, look_up("s")], to_port(PORT), counted(Verdict::Drop)]
    };
    vec![
        Case {
            name: "adjacent and lonely CIDRs",
            sets: |batch| {
                batch.add_set(&Set { interval: true, ..set("s", &[IPV4_ADDR]) });
                // 192.0.2.8/31 and 192.0.2.10/31 could be one, 192.0.2.12/32 adjoins.
                for cidr in ["192.0.2.10/31", "10.0.0.0/8", "192.0.2.12/32", "11.0.0.0/8"] {
                    add_cidr(batch, cidr);
                }
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", drop_ports(ip4(), saddr4(FIRST)))],
            listed: "set s { type ipv4_addr flags interval
                    elements = { 10.0.0.0/8, 11.0.0.0/8, 192.0.2.10/31, 192.0.2.12 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip saddr @s th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, v6] = node(world);
                let from = |last: u8| udp(v4, PORT).source([192, 0, 2, last]);
                let packets = [
                    (from(9), Fate::By("node")),
                    (from(10), Fate::Silence),
                    (from(11), Fate::Silence),
                    (from(12), Fate::Silence),
                    (udp(v6, PORT), Fate::By("node")),
                ];
                expect(&world.lab.allowed, &packets)?;
                // The end of the one in the middle and nothing else goes.
                world.commit(|batch| delete_cidr(batch, "192.0.2.10/31"))?;
                let packets = [(from(11), Fate::By("node")), (from(12), Fate::Silence)];
                expect(&world.lab.allowed, &packets)
            },
        },
        Case {
            name: "every IPv4 address",
            sets: |batch| {
                batch.add_set(&Set { interval: true, ..set("s", &[IPV4_ADDR]) });
                add_cidr(batch, "0.0.0.0/0");
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", drop_ports(ip4(), saddr4(FIRST)))],
            listed: "set s { type ipv4_addr flags interval elements = { 0.0.0.0/0 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip saddr @s th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| everybody(world, true),
        },
        Case {
            name: "every IPv6 address",
            sets: |batch| {
                batch.add_set(&Set { interval: true, ..set("s", &[IPV6_ADDR]) });
                add_cidr(batch, "::/0");
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", drop_ports(ip6(), saddr6(FIRST)))],
            listed: "set s { type ipv6_addr flags interval elements = { ::/0 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip6 saddr @s th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| everybody(world, false),
        },
        Case {
            name: "the last IPv4 addresses there are",
            sets: |batch| {
                batch.add_set(&Set { interval: true, ..set("s", &[IPV4_ADDR]) });
                add_cidr(batch, "255.0.0.0/8");
                add_cidr(batch, "192.0.2.0/24");
            },
            chains: vec![("c", Some(OUTPUT))],
            rules: vec![("c", rule![ip4(), [daddr4(FIRST), look_up("s"), Expression::Counter]])],
            listed: "set s { type ipv4_addr flags interval
                    elements = { 192.0.2.0/24, 255.0.0.0/8 } }
                chain c { type filter hook output priority filter; policy accept;
                    ip daddr @s counter packets 0 bytes 0 }",
            fate: |world| {
                send(world, "255.255.255.255:9".parse()?)?;
                world.expect_packets("@s", 1)?;
                send(world, "192.168.77.2:9".parse()?)?;
                world.expect_packets("@s", 1)?;
                // More comes and goes beside an interval without an end.
                world.commit(|batch| add_cidr(batch, "192.168.77.0/24"))?;
                send(world, "192.168.77.2:9".parse()?)?;
                world.expect_packets("@s", 2)?;
                world.commit(|batch| delete_cidr(batch, "255.0.0.0/8"))?;
                send(world, "255.255.255.255:9".parse()?)?;
                world.expect_packets("@s", 2)?;
                world.commit(|batch| add_cidr(batch, "254.0.0.0/7"))?;
                send(world, "255.255.255.255:9".parse()?)?;
                world.expect_packets("@s", 3)
            },
        },
        Case {
            name: "the last IPv6 addresses there are",
            sets: |batch| {
                batch.add_set(&Set { interval: true, ..set("s", &[IPV6_ADDR]) });
                add_cidr(batch, "ff00::/8");
                add_cidr(batch, "2001:db8::/64");
            },
            chains: vec![("c", Some(OUTPUT))],
            rules: vec![(
                "c",
                rule![ip6(), [daddr6(FIRST), look_up("s")], to_port(9), [Expression::Counter]],
            )],
            listed: "set s { type ipv6_addr flags interval
                    elements = { 2001:db8::/64, ff00::/8 } }
                chain c { type filter hook output priority filter; policy accept;
                    ip6 daddr @s th dport 9 counter packets 0 bytes 0 }",
            fate: |world| {
                send(world, "[ff0e::1]:9".parse()?)?;
                world.expect_packets("@s", 1)?;
                send(world, "[fd00:77::2]:9".parse()?)?;
                world.expect_packets("@s", 1)
            },
        },
        Case {
            name: "elements that count and explain themselves",
            sets: |batch| {
                batch.add_set(&Set { comment: Some("who knocks"), ..set("s", &[IPV4_ADDR]) });
                let counted = |key| Element { counter: true, ..Element::key(key) };
                let comment = Some("the client\u{2019}s own");
                batch.add_element("s", &Element { comment, ..counted(&[192, 0, 2, 10]) });
                batch.add_element("s", &counted(&[192, 0, 2, 11]));
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", drop_ports(ip4(), saddr4(FIRST)))],
            listed: "set s { type ipv4_addr comment \"who knocks\"
                    elements = {
                        192.0.2.10 counter packets 0 bytes 0 comment \"the client\u{2019}s own\",
                        192.0.2.11 counter packets 0 bytes 0 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip saddr @s th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, _] = node(world);
                let from = |last: u8| udp(v4, PORT).source([192, 0, 2, last]);
                let packets = [
                    (from(10), Fate::Silence),
                    (from(10), Fate::Silence),
                    (from(11), Fate::Silence),
                    (from(12), Fate::By("node")),
                ];
                expect(&world.lab.allowed, &packets)?;
                world.expect_packets("{ 192.0.2.10", 2)?;
                world.expect_packets(", 192.0.2.11", 1)
            },
        },
        Case {
            name: "elements that go by themselves",
            sets: |batch| {
                batch.add_set(&Set { timeout: true, ..set("s", &[IPV4_ADDR]) });
                let timed = |key, timeout| Element { timeout, ..Element::key(key) };
                batch.add_element("s", &timed(&[192, 0, 2, 10], Some(2 * 3600 * 1000)));
                batch.add_element("s", &timed(&[192, 0, 2, 12], None));
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", drop_ports(ip4(), saddr4(FIRST)))],
            listed: "set s { type ipv4_addr flags timeout
                    elements = { 192.0.2.10 timeout 2h expires SOON, 192.0.2.12 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip saddr @s th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, _] = node(world);
                world.commit(|batch| {
                    let timeout = Some(400);
                    batch.add_element("s", &Element { timeout, ..Element::key(&[192, 0, 2, 11]) });
                })?;
                let left = || world.lab.node.enter(|| Socket::open()?.dump_table(TABLE));
                let elements = left()?.context("no table")?.sets["s"].elements.clone();
                let (_, soon) = elements
                    .iter()
                    .find(|element| element.key == [192, 0, 2, 10])
                    .and_then(|element| element.timeout)
                    .context("no timeout")?;
                ensure!((7_000_000..=7_200_000).contains(&soon), "expires in {soon} ms");
                let two = || left().is_ok_and(|table| table.unwrap().sets["s"].elements.len() == 2);
                ensure!(eventually(Duration::from_secs(10), two), "the element is still there");
                let from = |last: u8| udp(v4, PORT).source([192, 0, 2, last]);
                let packets = [
                    (from(10), Fate::Silence),
                    (from(11), Fate::By("node")),
                    (from(12), Fate::Silence),
                ];
                expect(&world.lab.allowed, &packets)
            },
        },
    ]
}

/// One family is dropped, the other is not.
fn everybody(world: &World, v4_dropped: bool) -> Result<()> {
    let [v4, v6] = node(world);
    let (dropped, other) = if v4_dropped { (v4, v6) } else { (v6, v4) };
    let packets = [(udp(dropped, PORT), Fate::Silence), (udp(other, PORT), Fate::By("node"))];
    expect(&world.lab.allowed, &packets)?;
    expect(&world.lab.refused, &packets)?;
    world.expect_packets("@s", 2)
}

/// Sends a datagram from the node.
fn send(world: &World, to: std::net::SocketAddr) -> Result<()> {
    world.lab.node.enter(|| {
        let from: IpAddr = match to {
            std::net::SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            std::net::SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((from, 0))?;
        socket.set_broadcast(true)?;
        socket.send_to(b"hello", to)?;
        Ok(())
    })
}

fn add_cidr(batch: &mut Batch, cidr: &str) {
    interval(cidr, |element| batch.add_element("s", element));
}

fn delete_cidr(batch: &mut Batch, cidr: &str) {
    interval(cidr, |element| batch.delete_element("s", element));
}

/// A CIDR as an element.
fn interval(cidr: &str, with: impl FnOnce(&Element<'_>)) {
    let cidr: IpNet = cidr.parse().expect("a CIDR");
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let behind = match cidr.broadcast() {
        IpAddr::V4(last) => last.to_bits().checked_add(1).map(|a| Ipv4Addr::from(a).into()),
        IpAddr::V6(last) => last.to_bits().checked_add(1).map(|a| Ipv6Addr::from(a).into()),
    };
    let (key, end) = (bytes(cidr.network()), behind.map(bytes));
    with(&Element { end: end.as_deref(), ..Element::key(&key) });
}
