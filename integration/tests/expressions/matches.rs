//! Expressions that say which packets a rule is about: those that match are counted and dropped.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::ensure;
use portcullis::model::Family;
use portcullis::netlink::{CtKey, Expression, MetaKey, NatKind, Register, Verdict};
use portcullis_integration::traffic::{Flow, Protocol};

use super::{
    Case, FIRST, Fate, INET_PROTO, INET_SERVICE, INPUT, IPV4_ADDR, IPV6_ADDR, NAT_PREROUTING,
    OTHER_PORT, OUTPUT, PORT, PREROUTING, add_keys, counted, daddr4, dport, eq, expect, ip4, ip6,
    load, load_at, look_up, mask, meta, nat, neq, network, node, rule, saddr4, saddr6, set, tcp,
    to_port, udp,
};

const DROP: Verdict = Verdict::Drop;
const TCP: u8 = 6;
const UDP: u8 = 17;

pub fn cases() -> Vec<Case> {
    [packet_fields(), metadata(), lookups()].into_iter().flatten().collect()
}

fn packet_fields() -> Vec<Case> {
    vec![
        Case::rule(
            "an IPv4 source",
            INPUT,
            rule![ip4(), [saddr4(FIRST), eq(&[192, 0, 2, 10])], counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                ip saddr 192.0.2.10 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[(udp(v4, PORT), Fate::Silence), (udp(v6, PORT), Fate::By("node"))],
                )?;
                expect(&world.lab.refused, &[(udp(v4, PORT), Fate::By("node"))])?;
                world.expect_packets("ip saddr", 1)
            },
        ),
        Case::rule(
            "an IPv6 source",
            INPUT,
            rule![ip6(), [saddr6(FIRST), eq(&allowed6().octets())], counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                ip6 saddr 2001:db8:1::10 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[(udp(v4, PORT), Fate::By("node")), (udp(v6, PORT), Fate::Silence)],
                )?;
                expect(&world.lab.refused, &[(udp(v6, PORT), Fate::By("node"))])?;
                world.expect_packets("ip6 saddr", 1)
            },
        ),
        Case::rule(
            "a prefix of whole bytes, negated",
            PREROUTING,
            rule![ip4(), [network(16, 1, FIRST), neq(&[192])], counted(DROP)],
            "chain c { type filter hook prerouting priority dstnat - 10; policy accept;
                ip daddr != 192.0.0.0/8 counter packets 0 bytes 0 drop }",
            |world| {
                let (pod, [v4, v6]) = (&world.lab.pods[0], node(world));
                expect(
                    &world.lab.peer,
                    &[
                        (udp(pod.v4, PORT), Fate::Silence),
                        (udp(pod.v6, PORT), Fate::By("pod-0")),
                        (udp(v4, PORT), Fate::By("node")),
                        (udp(v6, PORT), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("ip daddr", 1)
            },
        ),
        Case::rule(
            "a mask with holes",
            INPUT,
            rule![
                ip4(),
                [saddr4(FIRST), mask(u32::from_ne_bytes([255, 0, 255, 254]), 0)],
                [eq(&[192, 0, 2, 10])],
                counted(DROP)
            ],
            "chain c { type filter hook input priority filter; policy accept;
                ip saddr & 255.0.255.254 == 192.0.2.10 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, _] = node(world);
                let from = |last: u8| udp(v4, PORT).source([192, 0, 2, last]);
                expect(
                    &world.lab.allowed,
                    &[
                        (from(9), Fate::By("node")),
                        (from(10), Fate::Silence),
                        (from(11), Fate::Silence),
                        (from(12), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("ip saddr", 2)
            },
        ),
        Case::rule(
            "a destination port of any protocol",
            INPUT,
            rule![to_port(PORT), counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let packets: Vec<_> = node(world)
                    .into_iter()
                    .flat_map(|to| {
                        [
                            (udp(to, PORT), Fate::Silence),
                            (tcp(to, PORT), Fate::Silence),
                            (udp(to, OTHER_PORT), Fate::By("node")),
                            (tcp(to, OTHER_PORT), Fate::By("node")),
                        ]
                    })
                    .collect();
                expect(&world.lab.allowed, &packets)?;
                world.expect_packets("th dport", 4)
            },
        ),
    ]
}

fn metadata() -> Vec<Case> {
    let new = 1_u32 << 3; // NF_CT_STATE_BIT(IP_CT_NEW)
    let destination_translated = 1_u32 << 5; // IPS_DST_NAT
    let interface = |name: &str| {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(16, 0);
        bytes
    };
    vec![
        Case::rule(
            "a family",
            INPUT,
            rule![ip6(), to_port(PORT), counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                meta nfproto ipv6 th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[(udp(v4, PORT), Fate::By("node")), (udp(v6, PORT), Fate::Silence)],
                )?;
                world.expect_packets("nfproto ipv6", 1)
            },
        ),
        Case::rule(
            "another protocol",
            INPUT,
            rule![[meta(MetaKey::L4Proto, FIRST), neq(&[UDP])], to_port(PORT), counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                meta l4proto != udp th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, _] = node(world);
                expect(
                    &world.lab.allowed,
                    &[(udp(v4, PORT), Fate::By("node")), (tcp(v4, PORT), Fate::Silence)],
                )?;
                world.expect_packets("!= udp", 1)
            },
        ),
        Case::rule(
            "another input interface",
            INPUT,
            rule![[meta(MetaKey::IifName, FIRST), neq(&interface("lo"))], counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                iifname != \"lo\" counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.node,
                    &[(udp(v4, PORT), Fate::By("node")), (udp(v6, PORT), Fate::By("node"))],
                )?;
                world.expect_packets("iifname", 0)?;
                expect(&world.lab.allowed, &[(udp(v4, PORT), Fate::Silence)])?;
                ensure!(world.packets("iifname")? > 0, "nothing was counted");
                Ok(())
            },
        ),
        Case::rule(
            "an input interface",
            INPUT,
            rule![[meta(MetaKey::IifName, FIRST), eq(&interface("pod-0"))], counted(DROP)],
            "chain c { type filter hook input priority filter; policy accept;
                iifname \"pod-0\" counter packets 0 bytes 0 drop }",
            |world| {
                let [v4, _] = node(world);
                let [first, second] = &world.lab.pods[..] else { unreachable!("two pods") };
                expect(first, &[(udp(v4, PORT), Fate::Silence)])?;
                expect(second, &[(udp(v4, PORT), Fate::By("node"))])
            },
        ),
        Case {
            name: "connections that are new",
            sets: |_| {},
            // Connections are only tracked where something asks for it.
            chains: vec![("c", Some(INPUT)), ("n", Some(NAT_PREROUTING))],
            rules: vec![(
                "c",
                rule![
                    to_port(OTHER_PORT),
                    [Expression::Ct { key: CtKey::State, into: FIRST }],
                    [mask(new, 0), neq(&0_u32.to_ne_bytes())],
                    [Expression::Counter],
                ],
            )],
            listed: "chain c { type filter hook input priority filter; policy accept;
                    th dport 8081 ct state new counter packets 0 bytes 0 }
                chain n { type nat hook prerouting priority dstnat; policy accept; }",
            fate: |world| {
                for to in node(world) {
                    let mut flow = Flow::open(&world.lab.allowed, (to, OTHER_PORT), Protocol::Tcp)?;
                    ensure!(flow.alive()? && flow.alive()?, "the flow died");
                }
                // Two SYNs, and none of the packets behind them.
                world.expect_packets("ct state new", 2)
            },
        },
        Case {
            name: "connections that were translated",
            sets: |_| {},
            chains: vec![("c", Some(INPUT)), ("n", Some(NAT_PREROUTING))],
            rules: vec![
                (
                    "c",
                    rule![
                        [Expression::Ct { key: CtKey::Status, into: FIRST }],
                        [mask(destination_translated, 0), neq(&0_u32.to_ne_bytes())],
                        counted(DROP),
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
            listed: "chain c { type filter hook input priority filter; policy accept;
                    ct status dnat counter packets 0 bytes 0 drop }
                chain n { type nat hook prerouting priority dstnat; policy accept;
                    meta nfproto ipv4 th dport 8081 dnat ip to 192.168.77.1:8080 }",
            fate: |world| {
                let [v4, _] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (udp(v4, PORT), Fate::By("node")),
                        (udp(v4, OTHER_PORT), Fate::Silence),
                        (tcp(v4, OTHER_PORT), Fate::Silence),
                    ],
                )?;
                world.expect_packets("ct status dnat", 2)
            },
        },
        Case::rule(
            "local addresses",
            PREROUTING,
            rule![
                [Expression::FibDaddrType { into: FIRST }, eq(&2_u32.to_ne_bytes())], // RTN_LOCAL
                to_port(PORT),
                counted(DROP)
            ],
            "chain c { type filter hook prerouting priority dstnat - 10; policy accept;
                fib daddr type local th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let (pod, [v4, v6]) = (&world.lab.pods[0], node(world));
                expect(
                    &world.lab.peer,
                    &[
                        (udp(v4, PORT), Fate::Silence),
                        (udp(v6, PORT), Fate::Silence),
                        (udp(pod.v4, PORT), Fate::By("pod-0")),
                        (udp(pod.v6, PORT), Fate::By("pod-0")),
                    ],
                )?;
                world.expect_packets("type local", 2)
            },
        ),
        marks(),
    ]
}

/// Bits are added and flipped, and all others stay.
fn marks() -> Case {
    let set_mark = |keep: u32, flip: u32| {
        [
            meta(MetaKey::Mark, FIRST),
            mask(keep, flip),
            Expression::MetaSet { key: MetaKey::Mark, from: FIRST },
        ]
    };
    let marked = |bits: u32, value: u32| {
        rule![
            to_port(PORT),
            [meta(MetaKey::Mark, FIRST), mask(bits, 0), eq(&value.to_ne_bytes())],
            [Expression::Counter]
        ]
    };
    Case {
        name: "marks",
        sets: |_| {},
        chains: vec![("p", Some(PREROUTING)), ("c", Some(INPUT))],
        rules: vec![
            ("p", rule![to_port(PORT), set_mark(!0x1, 0x1)]),
            ("p", rule![to_port(PORT), set_mark(!0x4000, 0x4000)]),
            ("c", marked(u32::MAX, 0x4001)), // nft does not print a mask of ones
            ("c", marked(0x4000, 0x4000)),
            ("c", rule![to_port(PORT), set_mark(u32::MAX, 0x4000)]),
            ("c", marked(0x4000, 0x4000)),
            (
                "c",
                rule![
                    to_port(PORT),
                    [meta(MetaKey::Mark, FIRST), eq(&1_u32.to_ne_bytes()), Expression::Counter]
                ],
            ),
        ],
        listed: "chain p { type filter hook prerouting priority dstnat - 10; policy accept;
                th dport 8080 meta mark set meta mark | 0x00000001
                th dport 8080 meta mark set meta mark | 0x00004000 }
            chain c { type filter hook input priority filter; policy accept;
                th dport 8080 meta mark 0x00004001 counter packets 0 bytes 0
                th dport 8080 meta mark & 0x00004000 == 0x00004000 counter packets 0 bytes 0
                th dport 8080 meta mark set meta mark ^ 0x00004000
                th dport 8080 meta mark & 0x00004000 == 0x00004000 counter packets 0 bytes 0
                th dport 8080 meta mark 0x00000001 counter packets 0 bytes 0 }",
        fate: |world| {
            let [v4, v6] = node(world);
            let packets = [(udp(v4, PORT), Fate::By("node")), (udp(v6, PORT), Fate::By("node"))];
            expect(&world.lab.allowed, &packets)?;
            world.expect_packets("meta mark 0x00004001", 2)?;
            world.expect_packets("== 0x00004000", 2)?;
            world.expect_packets("^ 0x00004000", 0)?;
            world.expect_packets("meta mark 0x00000001", 2)
        },
    }
}

fn lookups() -> Vec<Case> {
    vec![
        Case {
            name: "a set",
            sets: |batch| {
                batch.add_set(&set("sources", &[IPV6_ADDR]));
                add_keys(batch, "sources", &[&allowed6().octets()]);
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![("c", rule![ip6(), [saddr6(FIRST), look_up("sources")], counted(DROP)])],
            listed: "set sources { type ipv6_addr elements = { 2001:db8:1::10 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip6 saddr @sources counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [_, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (udp(v6, PORT), Fate::Silence),
                        (
                            udp(v6, PORT).source("2001:db8:1::11".parse::<IpAddr>()?),
                            Fate::By("node"),
                        ),
                    ],
                )?;
                world.expect_packets("@sources", 1)
            },
        },
        Case {
            name: "a set of concatenations",
            sets: |batch| {
                batch.add_set(&set("services", &[IPV4_ADDR, INET_PROTO, INET_SERVICE]));
                let tcp = [&[192, 168, 77, 1], &[TCP, 0, 0, 0][..], &[0x1f, 0x90, 0, 0]].concat();
                let udp = [&[192, 168, 77, 1], &[UDP, 0, 0, 0][..], &[0x1f, 0x91, 0, 0]].concat();
                add_keys(batch, "services", &[&tcp, &udp]);
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![(
                "c",
                rule![
                    ip4(),
                    [daddr4(FIRST), meta(MetaKey::L4Proto, Register::word(1))],
                    [dport(Register::word(2)), look_up("services")],
                    counted(DROP)
                ],
            )],
            listed: "set services { type ipv4_addr . inet_proto . inet_service
                    elements = { 192.168.77.1 . tcp . 8080, 192.168.77.1 . udp . 8081 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip daddr . meta l4proto . th dport @services counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (tcp(v4, PORT), Fate::Silence),
                        (tcp(v4, OTHER_PORT), Fate::By("node")),
                        (udp(v4, PORT), Fate::By("node")),
                        (udp(v4, OTHER_PORT), Fate::Silence),
                        (tcp(v6, PORT), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("@services", 2)
            },
        },
        Case {
            name: "a set of pairs of IPv6 addresses",
            sets: |batch| {
                batch.add_set(&set("pairs", &[IPV6_ADDR, IPV6_ADDR]));
                let node: Ipv6Addr = "fd00:77::1".parse().expect("an address");
                add_keys(batch, "pairs", &[&[allowed6().octets(), node.octets()].concat()]);
            },
            chains: vec![("c", Some(INPUT))],
            rules: vec![(
                "c",
                rule![
                    ip6(),
                    [saddr6(FIRST), network(24, 16, Register::word(4)), look_up("pairs")],
                    counted(DROP)
                ],
            )],
            listed: "set pairs { type ipv6_addr . ipv6_addr
                    elements = { 2001:db8:1::10 . fd00:77::1 } }
                chain c { type filter hook input priority filter; policy accept;
                    ip6 saddr . ip6 daddr @pairs counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [_, v6] = node(world);
                expect(&world.lab.allowed, &[(udp(v6, PORT), Fate::Silence)])?;
                expect(&world.lab.refused, &[(udp(v6, PORT), Fate::By("node"))])?;
                world.expect_packets("@pairs", 1)
            },
        },
        Case::rule(
            "packets that leave",
            OUTPUT,
            rule![ip4(), [daddr4(FIRST), eq(&[10, 244, 0, 10])], to_port(PORT), counted(DROP)],
            "chain c { type filter hook output priority filter; policy accept;
                ip daddr 10.244.0.10 th dport 8080 counter packets 0 bytes 0 drop }",
            |world| {
                let pods = &world.lab.pods;
                expect(
                    &world.lab.node,
                    &[
                        (udp(pods[0].v4, PORT), Fate::Silence),
                        (udp(pods[1].v4, PORT), Fate::By("pod-1")),
                    ],
                )?;
                expect(&world.lab.peer, &[(udp(pods[0].v4, PORT), Fate::By("pod-0"))])?;
                world.expect_packets("ip daddr", 1)
            },
        ),
    ]
}

fn allowed6() -> Ipv6Addr {
    "2001:db8:1::10".parse().expect("an address")
}
