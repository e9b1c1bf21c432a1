//! Verdicts, at the end of rules and in maps.

use portcullis::netlink::{
    Batch, Element, ElementData, Expression, MetaKey, Register, Set, SetData, Verdict,
};

use super::{
    Case, FIRST, Fate, INET_PROTO, INET_SERVICE, INPUT, IPV6_ADDR, OTHER_PORT, PORT, counted,
    daddr6, dport, eq, expect, ip6, look_up_in_map, meta, node, rule, set, tcp, to_port, udp,
};

const TCP: u8 = 6;
const UDP: u8 = 17;

pub fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "jump comes back, goto does not",
            sets: |_| {},
            chains: vec![("jumped", None), ("gone", None), ("c", Some(INPUT))],
            rules: vec![
                ("jumped", rule![protocol(TCP), counted(Verdict::Return)]),
                ("jumped", rule![protocol(UDP), counted(Verdict::Accept)]),
                ("gone", rule![to_port(OTHER_PORT), [Expression::Counter]]),
                ("c", rule![to_port(PORT), counted(Verdict::Jump("jumped".to_owned()))]),
                ("c", rule![to_port(OTHER_PORT), counted(Verdict::Goto("gone".to_owned()))]),
                ("c", rule![to_port(OTHER_PORT), counted(Verdict::Drop)]),
                ("c", rule![to_port(PORT), counted(Verdict::Drop)]),
            ],
            listed: "chain jumped {
                    meta l4proto tcp counter packets 0 bytes 0 return
                    meta l4proto udp counter packets 0 bytes 0 accept }
                chain gone { th dport 8081 counter packets 0 bytes 0 }
                chain c { type filter hook input priority filter; policy accept;
                    th dport 8080 counter packets 0 bytes 0 jump jumped
                    th dport 8081 counter packets 0 bytes 0 goto gone
                    th dport 8081 counter packets 0 bytes 0 drop
                    th dport 8080 counter packets 0 bytes 0 drop }",
            fate: |world| {
                let [v4, _] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (udp(v4, PORT), Fate::By("node")),
                        (tcp(v4, PORT), Fate::Silence),
                        (udp(v4, OTHER_PORT), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("meta l4proto tcp", 1)?;
                world.expect_packets("meta l4proto udp", 1)?;
                world.expect_packets("gone { th dport 8081", 1)?;
                world.expect_packets("jump jumped th dport 8081", 1)?;
                world.expect_packets("goto gone th dport 8081", 0)?;
                world.expect_packets("drop th dport 8080", 1)
            },
        },
        Case {
            name: "a verdict map of two fields",
            sets: |batch| {
                batch.add_set(&verdict_map("ports", &[INET_PROTO, INET_SERVICE]));
                let port = |protocol: u8, port: u16| {
                    [[protocol, 0, 0, 0], [port.to_be_bytes()[0], port.to_be_bytes()[1], 0, 0]]
                        .concat()
                };
                lead(batch, "ports", &port(TCP, PORT), "refuse", Some("shop/web:http"));
                lead(batch, "ports", &port(UDP, OTHER_PORT), "count", None);
            },
            chains: vec![("refuse", None), ("count", None), ("c", Some(INPUT))],
            rules: vec![
                ("refuse", rule![counted(Verdict::Drop)]),
                ("count", rule![[Expression::Counter]]),
                (
                    "c",
                    rule![
                        [meta(MetaKey::L4Proto, FIRST), dport(Register::word(1))],
                        [look_up_in_map("ports", Register::VERDICT)]
                    ],
                ),
            ],
            listed: "map ports { type inet_proto . inet_service : verdict
                    elements = { tcp . 8080 comment \"shop/web:http\" : goto refuse,
                        udp . 8081 : goto count } }
                chain refuse { counter packets 0 bytes 0 drop }
                chain count { counter packets 0 bytes 0 }
                chain c { type filter hook input priority filter; policy accept;
                    meta l4proto . th dport vmap @ports }",
            fate: |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (tcp(v4, PORT), Fate::Silence),
                        (tcp(v6, PORT), Fate::Silence),
                        (udp(v4, PORT), Fate::By("node")),
                        (udp(v4, OTHER_PORT), Fate::By("node")),
                        (tcp(v4, OTHER_PORT), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("chain refuse", 2)?;
                world.expect_packets("chain count", 1)
            },
        },
        Case {
            name: "a verdict map of IPv6 addresses",
            sets: |batch| {
                batch.add_set(&verdict_map("addresses", &[IPV6_ADDR, INET_PROTO, INET_SERVICE]));
                let address: std::net::Ipv6Addr = "fd00:77::1".parse().expect("an address");
                let key = [&address.octets()[..], &[UDP, 0, 0, 0], &[0x1f, 0x90, 0, 0]].concat();
                lead(batch, "addresses", &key, "refuse", None);
            },
            chains: vec![("refuse", None), ("c", Some(INPUT))],
            rules: vec![
                ("refuse", rule![counted(Verdict::Drop)]),
                (
                    "c",
                    rule![
                        ip6(),
                        [daddr6(FIRST), meta(MetaKey::L4Proto, Register::word(4))],
                        [dport(Register::word(5)), look_up_in_map("addresses", Register::VERDICT)]
                    ],
                ),
            ],
            listed: "map addresses { type ipv6_addr . inet_proto . inet_service : verdict
                    elements = { fd00:77::1 . udp . 8080 : goto refuse } }
                chain refuse { counter packets 0 bytes 0 drop }
                chain c { type filter hook input priority filter; policy accept;
                    ip6 daddr . meta l4proto . th dport vmap @addresses }",
            fate: |world| {
                let [v4, v6] = node(world);
                expect(
                    &world.lab.allowed,
                    &[
                        (udp(v6, PORT), Fate::Silence),
                        (udp(v4, PORT), Fate::By("node")),
                        (udp(v6, OTHER_PORT), Fate::By("node")),
                    ],
                )?;
                world.expect_packets("chain refuse", 1)
            },
        },
    ]
}

fn protocol(number: u8) -> [Expression; 2] {
    [meta(MetaKey::L4Proto, FIRST), eq(&[number])]
}

fn verdict_map<'a>(name: &'a str, types: &[u32]) -> Set<'a> {
    Set { data: Some(SetData::Verdict), ..set(name, types) }
}

fn lead(batch: &mut Batch, map: &str, key: &[u8], chain: &str, comment: Option<&str>) {
    let data = Some(ElementData::Goto(chain));
    batch.add_element(map, &Element { data, comment, ..Element::key(key) });
}
