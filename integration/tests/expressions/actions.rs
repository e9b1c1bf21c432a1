//! Expressions that do something to a packet.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::model::Family;
use portcullis::netlink::{
    Batch, CmpOp, Element, ElementData, Expression, LimitUnit, Listener, LoggedPacket, MetaKey,
    NatKind, Register, Set, SetData, Verdict,
};
use portcullis_integration::traffic::{Protocol, distribution, probe_many};

use super::{
    Case, FIRST, FORWARD, Fate, INET_PROTO, INET_SERVICE, INPUT, IPV4_ADDR, IPV6_ADDR, MARK,
    NAT_OUTPUT, NAT_POSTROUTING, NAT_PREROUTING, OTHER_PORT, PORT, PREROUTING, SILENCE, World,
    concatenation, counted, daddr4, daddr6, dport, eq, expect, ip4, ip6, load, load_at,
    look_up_in_map, meta, nat, node, rule, set, tcp, to_port, udp,
};

/// A Service address, which the laboratory routes to the node.
const SERVICE4: [u8; 4] = [10, 96, 0, 10];
const SERVICE6: &str = "fd00:10:96::a";
/// The offset at which a map's second list of endpoints begins.
const SECOND_LIST: u32 = 0x8000_0000;
const LOG_GROUP: u16 = 4711;

pub fn cases() -> Vec<Case> {
    [translations(), sources(), numbers(), refusals()].into_iter().flatten().collect()
}

fn translations() -> Vec<Case> {
    vec![
        Case {
            name: "IPv4 endpoints by chance",
            sets: |batch| {
                let types = [IPV4_ADDR, INET_PROTO, INET_SERVICE, MARK];
                batch.add_set(&endpoint_map("endpoints", &types, IPV4_ADDR));
                for (slot, last) in [(0, 10), (1, 11), (SECOND_LIST, 11)] {
                    let key = [&SERVICE4, &udp_80()[..], &u32::to_ne_bytes(slot)].concat();
                    let value = [[10, 244, 0, last], port(PORT)].concat();
                    add_value(batch, "endpoints", &key, &value);
                }
            },
            chains: vec![("c", Some(NAT_PREROUTING)), ("o", Some(NAT_OUTPUT))],
            rules: vec![
                ("c", rule![ip4(), service_key(Family::V4, 2, 0), to_endpoint(Family::V4)]),
                (
                    "o",
                    rule![ip4(), service_key(Family::V4, 1, SECOND_LIST), to_endpoint(Family::V4)],
                ),
            ],
            listed: "map endpoints {
                    type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service
                    elements = { 10.96.0.10 . udp . 80 . 0x00000000 : 10.244.0.10 . 8080,
                        10.96.0.10 . udp . 80 . 0x00000001 : 10.244.0.11 . 8080,
                        10.96.0.10 . udp . 80 . 0x80000000 : 10.244.0.11 . 8080 } }
                chain c { type nat hook prerouting priority dstnat; policy accept;
                    dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 2
                        map @endpoints }
                chain o { type nat hook output priority -100; policy accept;
                    dnat ip to ip daddr . meta l4proto . th dport
                        . numgen random mod 1 offset 2147483648 map @endpoints }",
            fate: |world| balanced(world, IpAddr::from(SERVICE4)),
        },
        Case {
            name: "IPv6 endpoints by chance",
            sets: |batch| {
                let types = [IPV6_ADDR, INET_PROTO, INET_SERVICE, MARK];
                batch.add_set(&endpoint_map("endpoints", &types, IPV6_ADDR));
                for (slot, pod) in [(0, "a"), (1, "b"), (SECOND_LIST, "b")] {
                    let key = [&v6(SERVICE6), &udp_80()[..], &u32::to_ne_bytes(slot)].concat();
                    let value = [&v6(&format!("fd00:10:244::{pod}"))[..], &port(PORT)].concat();
                    add_value(batch, "endpoints", &key, &value);
                }
            },
            chains: vec![("c", Some(NAT_PREROUTING)), ("o", Some(NAT_OUTPUT))],
            rules: vec![
                ("c", rule![ip6(), service_key(Family::V6, 2, 0), to_endpoint(Family::V6)]),
                (
                    "o",
                    rule![ip6(), service_key(Family::V6, 1, SECOND_LIST), to_endpoint(Family::V6)],
                ),
            ],
            listed: "map endpoints {
                    type ipv6_addr . inet_proto . inet_service . mark : ipv6_addr . inet_service
                    elements = { fd00:10:96::a . udp . 80 . 0x00000000 : fd00:10:244::a . 8080,
                        fd00:10:96::a . udp . 80 . 0x00000001 : fd00:10:244::b . 8080,
                        fd00:10:96::a . udp . 80 . 0x80000000 : fd00:10:244::b . 8080 } }
                chain c { type nat hook prerouting priority dstnat; policy accept;
                    dnat ip6 to ip6 daddr . meta l4proto . th dport . numgen random mod 2
                        map @endpoints }
                chain o { type nat hook output priority -100; policy accept;
                    dnat ip6 to ip6 daddr . meta l4proto . th dport
                        . numgen random mod 1 offset 2147483648 map @endpoints }",
            fate: |world| balanced(world, SERVICE6.parse()?),
        },
        Case::rule(
            "an IPv6 address that is a constant",
            NAT_PREROUTING,
            rule![
                ip6(),
                to_port(OTHER_PORT),
                [load(&v6("fd00:10:244::b")), load_at(4, &PORT.to_be_bytes())],
                [nat(NatKind::Destination, Family::V6)],
            ],
            "chain c { type nat hook prerouting priority dstnat; policy accept;
                meta nfproto ipv6 th dport 8081 dnat ip6 to [fd00:10:244::b]:8080 }",
            |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (udp(v4, OTHER_PORT), Fate::By("node")),
                        (udp(v6, OTHER_PORT), Fate::By("pod-1")),
                        (tcp(v6, OTHER_PORT), Fate::By("pod-1")),
                    ],
                )
            },
        ),
    ]
}

fn sources() -> Vec<Case> {
    vec![
        Case::rule(
            "masquerade",
            NAT_POSTROUTING,
            rule![to_port(PORT), [Expression::MasqueradeFullyRandom]],
            "chain c { type nat hook postrouting priority srcnat; policy accept;
                th dport 8080 masquerade fully-random }",
            |world| {
                let pod = &world.lab.pods[0];
                for (to, gateway) in
                    [(IpAddr::from(pod.v4), "10.244.0.1"), (pod.v6.into(), "fd00:10:244::1")]
                {
                    let mut kept = 0;
                    for source_port in [20_000, 20_001, 20_002] {
                        let probe = udp(to, PORT).source_port(source_port);
                        let outcome = probe.run(&world.lab.peer)?;
                        let seen = outcome.seen_source().context("no answer")?;
                        ensure!(seen.ip() == gateway.parse::<IpAddr>()?, "{to} saw {seen}");
                        kept += u32::from(seen.port() == source_port);
                    }
                    // Without the flag all three would be kept.
                    ensure!(kept < 3, "the ports are not random");
                }
                Ok(())
            },
        ),
        Case::rule(
            "another source",
            NAT_POSTROUTING,
            rule![
                ip4(),
                to_port(PORT),
                [load(&[192, 168, 77, 1]), load_at(1, &5000_u16.to_be_bytes())],
                [nat(NatKind::Source, Family::V4)],
            ],
            "chain c { type nat hook postrouting priority srcnat; policy accept;
                meta nfproto ipv4 th dport 8080 snat ip to 192.168.77.1:5000 }",
            |world| {
                let outcome = udp(world.lab.pods[0].v4, PORT).run(&world.lab.peer)?;
                let seen = outcome.seen_source().context("no answer")?;
                ensure!(seen == "192.168.77.1:5000".parse()?, "the pod saw {seen}");
                Ok(())
            },
        ),
    ]
}

fn numbers() -> Vec<Case> {
    let marked = |value: u32| {
        let mark = [meta(MetaKey::Mark, FIRST), eq(&value.to_ne_bytes()), Expression::Counter];
        ("c", rule![to_port(PORT), mark])
    };
    let limited = |unit, rate, burst| {
        let limit = [Expression::Limit { rate, unit, burst }];
        rule![to_port(PORT), limit, counted(Verdict::Accept)]
    };
    vec![
        Case {
            name: "numbers by chance from an offset on",
            sets: |_| {},
            chains: vec![("p", Some(PREROUTING)), ("c", Some(INPUT))],
            rules: vec![
                (
                    "p",
                    rule![
                        to_port(PORT),
                        [
                            Expression::NumgenRandom { modulus: 3, offset: 7, into: FIRST },
                            Expression::MetaSet { key: MetaKey::Mark, from: FIRST },
                        ]
                    ],
                ),
                marked(6),
                marked(7),
                marked(8),
                marked(9),
                marked(10),
            ],
            listed: "chain p { type filter hook prerouting priority dstnat - 10; policy accept;
                    th dport 8080 meta mark set numgen random mod 3 offset 7 }
                chain c { type filter hook input priority filter; policy accept;
                    th dport 8080 meta mark 0x00000006 counter packets 0 bytes 0
                    th dport 8080 meta mark 0x00000007 counter packets 0 bytes 0
                    th dport 8080 meta mark 0x00000008 counter packets 0 bytes 0
                    th dport 8080 meta mark 0x00000009 counter packets 0 bytes 0
                    th dport 8080 meta mark 0x0000000a counter packets 0 bytes 0 }",
            fate: |world| {
                let to = (node(world)[0], PORT);
                ensure!(probe_many(&world.lab.allowed, to, Protocol::Udp, 300)?.answers() == 300);
                let counts = ["6", "7", "8", "9", "a"]
                    .map(|digit| world.packets(&format!("meta mark 0x0000000{digit}")));
                let [below, a, b, c, above] = counts;
                ensure!((below?, above?) == (0, 0), "numbers outside");
                let p = distribution::p_value(&[a?, b?, c?], &[1, 1, 1]);
                ensure!(p > distribution::SIGNIFICANCE, "not even: p = {p}");
                Ok(())
            },
        },
        Case {
            name: "limits",
            sets: |_| {},
            chains: vec![("c", Some(INPUT)), ("f", Some(FORWARD))],
            rules: vec![
                ("c", limited(LimitUnit::Minute, 1, 7)),
                ("c", rule![to_port(PORT), counted(Verdict::Drop)]),
                ("f", limited(LimitUnit::Second, 2, 3)),
                ("f", rule![to_port(PORT), counted(Verdict::Drop)]),
            ],
            listed: "chain c { type filter hook input priority filter; policy accept;
                    th dport 8080 limit rate 1/minute burst 7 packets
                        counter packets 0 bytes 0 accept
                    th dport 8080 counter packets 0 bytes 0 drop }
                chain f { type filter hook forward priority filter; policy accept;
                    th dport 8080 limit rate 2/second burst 3 packets
                        counter packets 0 bytes 0 accept
                    th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let probes = udp(node(world)[0], PORT).timeout(SILENCE);
                let tally = probes.many(&world.lab.allowed, 40)?;
                ensure!((tally.answers(), tally.timed_out) == (7, 33), "{tally:?}");
                let probes = udp(world.lab.pods[0].v4, PORT).timeout(SILENCE);
                let tally = probes.many(&world.lab.peer, 40)?;
                // A busy machine may be slow enough for some more.
                ensure!((3..20).contains(&tally.answers()), "{tally:?}");
                Ok(())
            },
        },
    ]
}

fn refusals() -> Vec<Case> {
    vec![
        Case::rule(
            "reject",
            INPUT,
            rule![to_port(PORT), [Expression::Counter, Expression::RejectPortUnreachable]],
            "chain c { type filter hook input priority filter; policy accept;
                th dport 8080 counter packets 0 bytes 0 reject }",
            |world| {
                let [v4, v6] = node(world);
                let refused = [udp(v4, PORT), udp(v6, PORT), tcp(v4, PORT), tcp(v6, PORT)];
                let mut packets = refused.map(|probe| (probe, Fate::Refusal)).to_vec();
                packets.push((udp(v6, OTHER_PORT), Fate::By("node")));
                expect(&world.lab.allowed, &packets)
            },
        ),
        Case::rule(
            "reject with a reset",
            INPUT,
            rule![
                [
                    Expression::Meta { key: MetaKey::L4Proto, into: Register::word(0) },
                    Expression::Cmp { register: Register::word(0), op: CmpOp::Eq, with: vec![6] },
                ],
                to_port(PORT),
                [Expression::Counter, Expression::RejectTcpReset]
            ],
            "chain c { type filter hook input priority filter; policy accept;
                tcp dport 8080 counter packets 0 bytes 0 reject with tcp reset }",
            |world| {
                let [v4, v6] = node(world);
                let mut packets =
                    vec![(tcp(v4, PORT), Fate::Refusal), (tcp(v6, PORT), Fate::Refusal)];
                packets.push((udp(v4, PORT), Fate::By("node")));
                expect(&world.lab.allowed, &packets)
            },
        ),
        Case::rule(
            "log to a group",
            INPUT,
            rule![
                to_port(PORT),
                [Expression::LogGroup {
                    prefix: "shop/web".to_owned(),
                    group: LOG_GROUP,
                    snaplen: 64
                }],
                counted(Verdict::Drop)
            ],
            "chain c { type filter hook input priority filter; policy accept;
                th dport 8080 log prefix \"shop/web\" group 4711 snaplen 64
                    counter packets 0 bytes 0 drop }",
            |world| {
                let logged = log_of(world, LOG_GROUP)?;
                let [v4, v6] = node(world);
                let packets = [
                    (udp(v4, PORT).source_port(20_003), Fate::Silence),
                    (tcp(v6, PORT).source_port(20_004), Fate::Silence),
                    (udp(v4, OTHER_PORT), Fate::By("node")),
                ];
                expect(&world.lab.allowed, &packets)?;
                let client = &world.lab.allowed;
                let expected = |source: IpAddr, source_port, destination, protocol| LoggedPacket {
                    prefix: "shop/web".to_owned(),
                    source,
                    destination,
                    protocol,
                    source_port: Some(source_port),
                    destination_port: Some(PORT),
                };
                let mut expected = BTreeMap::from([
                    (20_003, expected(client.v4.into(), 20_003, v4, 17)),
                    (20_004, expected(client.v6.into(), 20_004, v6, 6)),
                ]);
                while !expected.is_empty() {
                    let packet = logged.recv_timeout(Duration::from_secs(5))?;
                    let port = packet.source_port.context("no source port")?;
                    ensure!(expected.remove(&port).as_ref() == Some(&packet), "logged: {packet:?}");
                }
                Ok(())
            },
        ),
    ]
}

/// What the group gets from now on. The thread ends when the receiver is gone and something comes,
/// or with the process.
fn log_of(world: &World, group: u16) -> Result<mpsc::Receiver<LoggedPacket>> {
    let listener = world.lab.node.enter(|| Listener::open(group))?;
    let again = world.lab.node.enter(|| Listener::open(group));
    let error = again.err().context("two listeners to one group")?;
    let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    ensure!(reason.contains("not permitted"), "the second listener: {error}: {reason}");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        while let Ok(packets) = listener.wait() {
            if packets.into_iter().any(|packet| sender.send(packet).is_err()) {
                return;
            }
        }
    });
    Ok(receiver)
}

/// From elsewhere both endpoints answer, from the node the second list's only one does.
fn balanced(world: &World, service: IpAddr) -> Result<()> {
    let tally = probe_many(&world.lab.allowed, (service, 80), Protocol::Udp, 100)?;
    distribution::assert_fits(&tally, &[("pod-0", 1), ("pod-1", 1)]);
    let tally = probe_many(&world.lab.node, (service, 80), Protocol::Udp, 20)?;
    ensure!(tally.by("pod-1") == 20, "from the node: {tally:?}");
    Ok(())
}

/// Address, protocol, port and a number by chance, one behind the other.
fn service_key(family: Family, modulus: u32, offset: u32) -> Vec<Expression> {
    let (address, words) = match family {
        Family::V4 => (daddr4(FIRST), 1),
        Family::V6 => (daddr6(FIRST), 4),
    };
    vec![
        address,
        meta(MetaKey::L4Proto, Register::word(words)),
        dport(Register::word(words + 1)),
        Expression::NumgenRandom { modulus, offset, into: Register::word(words + 2) },
    ]
}

fn to_endpoint(family: Family) -> [Expression; 2] {
    [look_up_in_map("endpoints", FIRST), nat(NatKind::Destination, family)]
}

/// A map to addresses and ports.
fn endpoint_map<'a>(name: &'a str, types: &[u32], address: u32) -> Set<'a> {
    let length = if address == IPV6_ADDR { 20 } else { 8 };
    let kind = concatenation(&[address, INET_SERVICE]);
    Set { data: Some(SetData::Value { kind, length }), ..set(name, types) }
}

fn add_value(batch: &mut Batch, map: &str, key: &[u8], value: &[u8]) {
    let data = Some(ElementData::Value(value));
    batch.add_element(map, &Element { data, ..Element::key(key) });
}

/// UDP port 80 in a key.
fn udp_80() -> [u8; 8] {
    [17, 0, 0, 0, 0, 80, 0, 0]
}

fn port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn v6(address: &str) -> [u8; 16] {
    address.parse::<std::net::Ipv6Addr>().expect("an address").octets()
}
