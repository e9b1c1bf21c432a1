//! Expressions that know a client again: by what its connection carried at first, by a hash of
//! its address, and by a map that rules write.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::model::Family;
use portcullis::netlink::{
    Batch, CtOriginalKey, Data, Element, ElementData, Expression, MetaKey, NatKind, Register, Set,
    SetData, Socket, Verdict,
};
use portcullis_integration::lab::eventually;

use super::{
    Case, FIRST, Fate, INET_PROTO, INET_SERVICE, INPUT, IPV4_ADDR, IPV6_ADDR, MARK, NAT_PREROUTING,
    OTHER_PORT, PORT, TABLE, World, add_keys, concatenation, counted, daddr4, daddr6, dport, eq,
    expect, ip4, ip6, load, load_at, look_up, look_up_in_map, meta, nat, node, rule, saddr4,
    saddr6, set, tcp, to_port, udp,
};

/// Writes sets and elements.
type Write = fn(&mut Batch);
/// Sends packets.
type Cross = fn(&World) -> Result<()>;
/// Key, value, and how many milliseconds it has left.
type Remembered = (Vec<u8>, Vec<u8>, u64);

pub fn cases() -> Vec<Case> {
    vec![
        first_packet4(),
        first_packet6(),
        Case::rule(
            "local sources",
            INPUT,
            rule![
                [Expression::FibSaddrType { into: FIRST }, eq(&2_u32.to_ne_bytes())], // RTN_LOCAL
                to_port(PORT),
                counted(Verdict::Drop)
            ],
            "chain c { type filter hook input priority filter; policy accept;
                fib saddr type local th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, v6] = node(world);
                let packets = [(udp(v4, PORT), Fate::Silence), (udp(v6, PORT), Fate::Silence)];
                expect(&world.lab.node, &packets)?;
                let packets =
                    [(udp(v4, PORT), Fate::By("node")), (udp(v6, PORT), Fate::By("node"))];
                expect(&world.lab.allowed, &packets)?;
                world.expect_packets("type local", 2)
            },
        ),
        Case {
            name: "everybody but a set",
            sets: |batch| {
                batch.add_set(&set("sources", &[IPV4_ADDR]));
                add_keys(batch, "sources", &[&[192, 0, 2, 10], &[192, 0, 2, 12]]);
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![(
                "c",
                rule![
                    ip4(),
                    [
                        saddr4(FIRST),
                        Expression::LookupInverted { set: "sources".into(), key: FIRST }
                    ],
                    to_port(PORT),
                    counted(Verdict::Drop)
                ],
            )],
            listed: "set sources { type ipv4_addr elements = { 192.0.2.10, 192.0.2.12 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip saddr != @sources th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, v6] = node(world);
                let from = |last: u8| udp(v4, PORT).source([192, 0, 2, last]);
                let packets = [
                    (from(10), Fate::By("node")),
                    (from(11), Fate::Silence),
                    (from(12), Fate::By("node")),
                    (udp(v6, PORT), Fate::By("node")),
                ];
                expect(&world.lab.allowed, &packets)?;
                world.expect_packets("!= @sources", 1)
            },
        },
        hashed(Family::V4),
        hashed(Family::V6),
        remembered4(),
        remembered6(),
        forgotten(),
    ]
}

/// What the connection was about before it was translated.
fn first_packet4() -> Case {
    let original = |key, into| Expression::CtOriginal { key, into };
    Case {
        name: "what the first packet of an IPv4 connection carried",
        sets: |batch| {
            batch.add_set(&set("services", &[IPV4_ADDR, INET_PROTO, INET_SERVICE]));
            for protocol in [6, 17] {
                let key = [[192, 168, 77, 1], [protocol, 0, 0, 0], [0x1f, 0x91, 0, 0]].concat();
                add_keys(batch, "services", &[&key]);
            }
        },
        chains: vec![("c", Some(INPUT)), ("n", Some(NAT_PREROUTING))],
        rules: vec![
            (
                "c",
                rule![
                    ip4(),
                    [original(CtOriginalKey::SourceIp4, FIRST), eq(&[192, 0, 2, 10])],
                    [
                        original(CtOriginalKey::DestinationIp4, FIRST),
                        meta(MetaKey::L4Proto, Register::word(1)),
                        original(CtOriginalKey::DestinationPort, Register::word(2)),
                        look_up("services"),
                    ],
                    counted(Verdict::Drop),
                ],
            ),
            (
                "n",
                rule![
                    ip4(),
                    to_port(OTHER_PORT),
                    [load(&[192, 168, 77, 1]), load_at(1, &PORT.to_be_bytes())],
                    [nat(NatKind::Destination, Family::V4)],
                ],
            ),
        ],
        listed: "set services { type ipv4_addr . inet_proto . inet_service
                elements = { 192.168.77.1 . tcp . 8081, 192.168.77.1 . udp . 8081 } }
            chain c { type filter hook input priority filter; policy accept;
                meta nfproto ipv4 ct original ip saddr 192.0.2.10
                ct original ip daddr . meta l4proto . ct original proto-dst @services
                counter packets 0 bytes 0 drop }
            chain n { type nat hook prerouting priority dstnat; policy accept;
                meta nfproto ipv4 th dport 8081 dnat ip to 192.168.77.1:8080 }",
        fate: |world| {
            let [v4, v6] = node(world);
            expect(
                &world.lab.allowed,
                &[
                    (udp(v4, PORT), Fate::By("node")),
                    (udp(v4, OTHER_PORT), Fate::Silence),
                    (tcp(v4, OTHER_PORT), Fate::Silence),
                    (udp(v4, OTHER_PORT).source([192, 0, 2, 11]), Fate::By("node")),
                    (udp(v6, OTHER_PORT), Fate::By("node")),
                ],
            )?;
            world.expect_packets("proto-dst @services", 2)
        },
    }
}

fn first_packet6() -> Case {
    let original = |key| Expression::CtOriginal { key, into: FIRST };
    let octets = |address: &str| address.parse::<std::net::Ipv6Addr>().expect("valid").octets();
    Case {
        name: "what the first packet of an IPv6 connection carried",
        sets: |_| {},
        chains: vec![("c", Some(INPUT)), ("n", Some(NAT_PREROUTING))],
        rules: vec![
            (
                "c",
                rule![
                    ip6(),
                    [original(CtOriginalKey::SourceIp6), eq(&octets("2001:db8:1::10"))],
                    [original(CtOriginalKey::DestinationIp6), eq(&octets("fd00:77::1"))],
                    counted(Verdict::Drop),
                ],
            ),
            ("n", Vec::new()),
        ],
        listed: "chain c { type filter hook input priority filter; policy accept;
                meta nfproto ipv6 ct original ip6 saddr 2001:db8:1::10
                ct original ip6 daddr fd00:77::1 counter packets 0 bytes 0 drop }
            chain n { type nat hook prerouting priority dstnat; policy accept; }",
        fate: |world| {
            let [v4, v6] = node(world);
            expect(
                &world.lab.allowed,
                &[
                    (udp(v4, PORT), Fate::By("node")),
                    (udp(v6, PORT), Fate::Silence),
                    (udp(v6, PORT).source("2001:db8:1::11".parse::<IpAddr>()?), Fate::By("node")),
                ],
            )?;
            world.expect_packets("ct original ip6 daddr", 1)
        },
    }
}

/// A client gets the same endpoint each time, whatever its port.
fn hashed(family: Family) -> Case {
    let (name, sets, listed, fate): (_, Write, _, Cross) = match family {
        Family::V4 => (
            "IPv4 endpoints by a hash of the client",
            |batch| {
                batch.add_set(&numbered_endpoints(IPV4_ADDR));
                for (slot, last) in [(4_u32, 10), (5, 11)] {
                    let key = [[192, 168, 77, 1], slot.to_ne_bytes()].concat();
                    let value = [[10, 244, 0, last], [0x1f, 0x90, 0, 0]].concat();
                    add_value(batch, "endpoints", &key, &value, None);
                }
            },
            "map endpoints { type ipv4_addr . mark : ipv4_addr . inet_service
                    elements = { 192.168.77.1 . 0x00000004 : 10.244.0.10 . 8080,
                        192.168.77.1 . 0x00000005 : 10.244.0.11 . 8080 } }
                chain c { type nat hook prerouting priority dstnat; policy accept;
                    th dport 8081 dnat ip to ip daddr . jhash ip saddr mod 2 seed 0x2a offset 4
                        map @endpoints }",
            |world| {
                let [v4, v6] = node(world);
                let sources = [9, 10, 11, 12].map(|last| IpAddr::from([192, 0, 2, last]));
                by_hash(world, v4, &sources)?;
                expect(&world.lab.allowed, &[(udp(v6, OTHER_PORT), Fate::By("node"))])
            },
        ),
        Family::V6 => (
            "IPv6 endpoints by a hash of the client",
            |batch| {
                batch.add_set(&numbered_endpoints(IPV6_ADDR));
                for (slot, last) in [(4_u32, 0xa), (5, 0xb)] {
                    let node = "fd00:77::1".parse::<std::net::Ipv6Addr>().expect("valid").octets();
                    let key = [&node[..], &slot.to_ne_bytes()].concat();
                    let value = [&endpoint6(last)[..], &[0x1f, 0x90, 0, 0]].concat();
                    add_value(batch, "endpoints", &key, &value, None);
                }
            },
            "map endpoints { type ipv6_addr . mark : ipv6_addr . inet_service
                    elements = { fd00:77::1 . 0x00000004 : fd00:10:244::a . 8080,
                        fd00:77::1 . 0x00000005 : fd00:10:244::b . 8080 } }
                chain c { type nat hook prerouting priority dstnat; policy accept;
                    th dport 8081 dnat ip6 to ip6 daddr . jhash ip6 saddr mod 2 seed 0x2a offset 4
                        map @endpoints }",
            |world| {
                let [v4, v6] = node(world);
                by_hash(world, v6, &["2001:db8:1::10".parse()?, "2001:db8:1::11".parse()?])?;
                expect(&world.lab.allowed, &[(udp(v4, OTHER_PORT), Fate::By("node"))])
            },
        ),
    };
    // What is hashed stands behind the key.
    let (family_is, source, destination, length, key, slot) = match family {
        Family::V4 => (ip4(), saddr4 as fn(_) -> _, daddr4 as fn(_) -> _, 4, 4, 1),
        Family::V6 => (ip6(), saddr6 as _, daddr6 as _, 16, 8, 4),
    };
    let (key, into) = (Register::word(key), Register::word(slot));
    let hash = Expression::JenkinsHash { key, length, modulus: 2, seed: 42, offset: 4, into };
    Case {
        name,
        sets,
        chains: vec![("c", Some(NAT_PREROUTING))],
        rules: vec![(
            "c",
            rule![
                family_is,
                to_port(OTHER_PORT),
                [destination(FIRST), source(key), hash, look_up_in_map("endpoints", FIRST)],
                [nat(NatKind::Destination, family)]
            ],
        )],
        listed,
        fate,
    }
}

/// Each source always meets the same of two pods.
fn by_hash(world: &World, to: IpAddr, sources: &[IpAddr]) -> Result<()> {
    let mut all = BTreeSet::new();
    for source in sources {
        let mut met: BTreeMap<String, u32> = BTreeMap::new();
        for source_port in 21_000..21_010 {
            let probe = udp(to, OTHER_PORT).source(*source).source_port(source_port);
            let outcome = probe.run(&world.lab.allowed)?;
            *met.entry(outcome.by().context("no answer")?.to_owned()).or_default() += 1;
        }
        ensure!(met.len() == 1 && !met.contains_key("node"), "{source} met {met:?}");
        all.extend(met.into_keys());
    }
    // These addresses have hashes of both kinds.
    ensure!(all.len() == 2, "all met {all:?}");
    Ok(())
}

/// Which address and port a client connected to, with the client: to where it was last.
fn memory(address: u32) -> Set<'static> {
    let length = if address == IPV6_ADDR { 20 } else { 8 };
    let kind = concatenation(&[address, INET_SERVICE]);
    Set {
        data: Some(SetData::Value { kind, length }),
        timeout: true,
        dynamic: true,
        size: Some(2),
        ..set("memory", &[address])
    }
}

/// What happens to the client of a packet to this port, and where the packet goes.
fn of_client4(port: u16, what: Expression) -> Vec<Expression> {
    rule![
        ip4(),
        to_port(port),
        [saddr4(FIRST), daddr4(Register::word(1)), dport(Register::word(2))],
        [what],
    ]
}

fn remembered4() -> Case {
    Case {
        name: "a map of IPv4 clients that rules write",
        sets: |batch| batch.add_set(&memory(IPV4_ADDR)),
        chains: vec![("c", Some(INPUT))],
        rules: vec![("c", of_client4(PORT, remember(Register::word(1))))],
        listed: "map memory { type ipv4_addr : ipv4_addr . inet_service
                size 2 flags dynamic,timeout }
            chain c { type filter hook input priority filter; policy accept;
                th dport 8080
                update @memory { ip saddr timeout 1h : ip daddr . th dport } }",
        fate: |world| {
            let [v4, v6] = node(world);
            let from = |last: u8| (udp(v4, PORT).source([192, 0, 2, last]), Fate::By("node"));
            expect(&world.lab.allowed, &[from(10), from(11), (udp(v6, PORT), Fate::By("node"))])?;
            let endpoint = [[192, 168, 77, 1], [0x1f, 0x90, 0, 0]].concat();
            expect_memory(world, &[(&[192, 0, 2, 10], &endpoint), (&[192, 0, 2, 11], &endpoint)])?;
            // A map that is full takes nobody else, and the packet goes its way.
            expect(&world.lab.allowed, &[from(12)])?;
            expect_memory(world, &[(&[192, 0, 2, 10], &endpoint), (&[192, 0, 2, 11], &endpoint)])
        },
    }
}

fn remembered6() -> Case {
    Case {
        name: "a map of IPv6 clients that rules write",
        sets: |batch| {
            batch.add_set(&memory(IPV6_ADDR));
            // Somebody who was elsewhere before, and whose time is almost up.
            let value = [&endpoint6(0xa)[..], &[0x1f, 0x90, 0, 0]].concat();
            let client = "2001:db8:1::10".parse::<std::net::Ipv6Addr>().expect("valid").octets();
            add_value(batch, "memory", &client, &value, Some(60_000));
        },
        chains: vec![("c", Some(INPUT))],
        rules: vec![(
            "c",
            rule![
                ip6(),
                to_port(PORT),
                [saddr6(FIRST), daddr6(Register::word(4)), dport(Register::word(8))],
                [remember(Register::word(4))],
            ],
        )],
        listed: "map memory { type ipv6_addr : ipv6_addr . inet_service
                size 2 flags dynamic,timeout elements = {
                    2001:db8:1::10 timeout 1m expires SOON : fd00:10:244::a . 8080 } }
            chain c { type filter hook input priority filter; policy accept;
                th dport 8080
                update @memory { ip6 saddr timeout 1h : ip6 daddr . th dport } }",
        fate: |world| {
            let [_, v6] = node(world);
            expect(&world.lab.allowed, &[(udp(v6, PORT), Fate::By("node"))])?;
            // It lives longer now and keeps what it leads to.
            let longer = || {
                let memory = memory_of(world);
                memory.is_ok_and(|memory| memory.iter().any(|(.., left)| *left > 3_000_000))
            };
            ensure!(eventually(Duration::from_secs(5), longer), "its time is almost up");
            let client = "2001:db8:1::10".parse::<std::net::Ipv6Addr>()?.octets();
            let value = [&endpoint6(0xa)[..], &[0x1f, 0x90, 0, 0]].concat();
            expect_memory(world, &[(&client, &value)])
        },
    }
}

fn forgotten() -> Case {
    Case {
        name: "a map of clients that rules write and clear",
        sets: |batch| batch.add_set(&memory(IPV4_ADDR)),
        chains: vec![("c", Some(INPUT))],
        rules: vec![
            ("c", of_client4(PORT, remember(Register::word(1)))),
            (
                "c",
                of_client4(
                    OTHER_PORT,
                    Expression::DeleteFromMap {
                        map: "memory".into(),
                        key: FIRST,
                        data: Register::word(1),
                    },
                ),
            ),
        ],
        listed: "map memory { type ipv4_addr : ipv4_addr . inet_service
                size 2 flags dynamic,timeout }
            chain c { type filter hook input priority filter; policy accept;
                th dport 8080
                update @memory { ip saddr timeout 1h : ip daddr . th dport }
                th dport 8081
                delete @memory { ip saddr : ip daddr . th dport } }",
        fate: |world| {
            let [v4, _] = node(world);
            let from = |last: u8, port| (udp(v4, port).source([192, 0, 2, last]), Fate::By("node"));
            expect(&world.lab.allowed, &[from(10, PORT), from(11, PORT)])?;
            // Who is not remembered cannot be forgotten, and the data do not matter.
            expect(&world.lab.allowed, &[from(10, OTHER_PORT), from(12, OTHER_PORT)])?;
            let endpoint = [[192, 168, 77, 1], [0x1f, 0x90, 0, 0]].concat();
            expect_memory(world, &[(&[192, 0, 2, 11], &endpoint)])
        },
    }
}

fn remember(data: Register) -> Expression {
    Expression::UpdateMap { map: "memory".into(), key: FIRST, data, timeout: 3_600_000 }
}

/// What the map holds, by key.
fn memory_of(world: &World) -> Result<Vec<Remembered>> {
    let table = world.lab.node.enter(|| Socket::open()?.dump_table(TABLE))?.context("no table")?;
    let elements = table.sets.get("memory").context("no map")?.elements.iter();
    let mut memory: Vec<_> = elements
        .map(|element| {
            let Some(Data::Value(value)) = &element.data else { anyhow::bail!("no value") };
            let (_, left) = element.timeout.context("no timeout")?;
            Ok((element.key.clone(), value.clone(), left))
        })
        .collect::<Result<_>>()?;
    memory.sort();
    Ok(memory)
}

fn expect_memory(world: &World, expected: &[(&[u8], &[u8])]) -> Result<()> {
    let memory = memory_of(world)?;
    let memory: Vec<(&[u8], &[u8])> =
        memory.iter().map(|(key, value, _)| (&key[..], &value[..])).collect();
    ensure!(memory == expected, "remembered: {memory:?}, not {expected:?}");
    Ok(())
}

/// A map from an address and a number to an endpoint.
fn numbered_endpoints(address: u32) -> Set<'static> {
    let length = if address == IPV6_ADDR { 20 } else { 8 };
    let kind = concatenation(&[address, INET_SERVICE]);
    Set { data: Some(SetData::Value { kind, length }), ..set("endpoints", &[address, MARK]) }
}

fn add_value(batch: &mut Batch, map: &str, key: &[u8], value: &[u8], timeout: Option<u64>) {
    let data = Some(ElementData::Value(value));
    batch.add_element(map, &Element { data, timeout, ..Element::key(key) });
}

fn endpoint6(last: u16) -> [u8; 16] {
    std::net::Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, last).octets()
}
