use portcullis::commit::Worker;
use portcullis::model::*;
use portcullis::plan::plan_service;
use std::num::NonZeroU16;
fn main() {
    let n: u32 = std::env::args().nth(1).map_or(3, |s| s.parse().unwrap());
    let eps: u32 = std::env::args().nth(2).map_or(3, |s| s.parse().unwrap());
    let node = NodeContext {
        name: "n1".into(),
        node: Node {
            primary_addresses: vec!["192.168.77.1".parse().unwrap(), "fd00:77::1".parse().unwrap()],
            diagnostics: vec![],
        },
        nodeport_addresses: NodePortAddresses::Primary,
    };
    let mut plans = vec![];
    for i in 0..n {
        let name = ServiceName::new("shop", format!("web{i}"));
        let s = Service {
            name: name.clone(),
            created: 0,
            cluster_ips: vec![std::net::Ipv4Addr::from(0x0a60_0000 + i).into()],
            ports: vec![ServicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::new(80).unwrap(),
                node_port: (i < 2).then(|| NonZeroU16::new(30080 + i as u16).unwrap()),
            }],
            node_port_sources: if i == 0 {
                SourceRestriction::Allow(CidrSet::parse("192.0.2.0/24, 10.0.0.0/9, 10.128.0.0/10, 255.0.0.0/8, 0.0.0.0/30,2001:db8::/32").unwrap())
            } else {
                SourceRestriction::Unrestricted
            },
            diagnostics: vec![],
        };
        let slice = EndpointSlice {
            name: SliceName { namespace: "shop".into(), name: "x".into() },
            service: name,
            family: Family::V4,
            ports: vec![SlicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: NonZeroU16::new(8080).unwrap(),
            }],
            endpoints: (0..if i == 2 { 0 } else { eps })
                .map(|e| Endpoint {
                    address: std::net::Ipv4Addr::from(0x0af4_0000 + i * eps + e).into(),
                    readiness: Readiness::Ready,
                    node: if i == 0 && e == 0 { Some("n1".into()) } else { None },
                })
                .collect(),
            diagnostics: vec![],
        };
        plans.push(plan_service(&s, [&slice], &node));
    }
    let mut w = Worker::open(|r| {
        if r.refused.is_some() {
            println!("{r:?}")
        }
    })
    .unwrap();
    let t = std::time::Instant::now();
    let a = w.adopt(&node, plans.clone());
    println!("{:?} {:?}", t.elapsed(), a);
    if n < 10 {
        print!(
            "{}",
            portcullis::ruleset::render(&portcullis::ruleset::Listing::new(
                w.applied().contributions()
            ))
        );
    }
    let t = std::time::Instant::now();
    println!("{:?} {:?}", w.adopt(&node, plans), t.elapsed());
}
