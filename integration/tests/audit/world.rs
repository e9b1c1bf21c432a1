//! Services of every kind, planned and programmed.

use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use portcullis::audit::{self, Audit, Nft};
use portcullis::commit::Worker;
use portcullis::model::{
    Balancing, CidrSet, Endpoint, EndpointSlice, Family, LocalTraffic, Node, NodeContext, Protocol,
    Service, ServiceName, ServicePort, SliceName, SlicePort, SourceRestriction, TrafficPolicy,
};
use portcullis::plan::{Desired, ServicePlan, plan_service};

use super::kernel::nft_program;

/// What is asked for.
pub struct World {
    pub node: NodeContext,
    pub plans: Vec<ServicePlan>,
    pub desired: Desired,
}

#[derive(Clone, Copy)]
pub struct Exposed {
    pub name: &'static str,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

impl Exposed {
    pub const HTTP: Exposed =
        Exposed { name: "http", protocol: Protocol::Tcp, port: 80, node_port: None };
}

pub fn cidrs(texts: &[&str]) -> Vec<ipnet::IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

impl World {
    pub fn new() -> World {
        let node = NodeContext {
            node: Node {
                primary_addresses: vec![address("192.168.77.1"), address("fd00:77::1")],
                pod_cidrs: cidrs(&["10.244.0.0/24", "fd00:244::/64"]),
                ..Node::default()
            },
            local_traffic: LocalTraffic::NodeCidrs,
            localhost_nodeports: true,
            service_cidrs: cidrs(&["10.96.0.0/16", "fd00:96::/112"]),
            ..NodeContext::new("here".into())
        };
        World { node, plans: Vec::new(), desired: Desired::default() }
    }

    /// A Service of every kind that makes a difference in the ruleset.
    pub fn varied() -> World {
        let http = |node_port| [Exposed { node_port, ..Exposed::HTTP }];
        let dns = |name, protocol, node_port| Exposed { name, protocol, port: 53, node_port };
        let allow = |list| SourceRestriction::Allow(CidrSet::parse(list).unwrap());
        let open = || SourceRestriction::Unrestricted;
        let some = "192.0.2.0/24, 10.0.0.0/9, 10.128.0.0/10, 255.0.0.0/8, 0.0.0.0/30, \
                    198.51.100.7, 2001:db8::/32, ::/127, ::102:304, ffff::/16";
        let mut world = World::new();
        world.add("web", 1, &http(Some(30080)), 3, allow(some));
        world.add("world", 2, &http(Some(30081)), 1, allow("0.0.0.0/0, ::/0"));
        world.add("nobody", 3, &http(Some(30082)), 2, allow(""));
        world.add("closed", 4, &http(Some(30083)), 2, SourceRestriction::Closed);
        world.add("open", 5, &http(Some(30084)), 2, open());
        world.add("empty", 6, &http(Some(30085)), 0, open());
        world.add("inside", 7, &http(None), 7, open());
        let dns = [
            dns("dns", Protocol::Udp, Some(30053)),
            dns("dns-tcp", Protocol::Tcp, Some(30053)),
            dns("dns-sctp", Protocol::Sctp, None),
        ];
        world.add("dns", 8, &dns, 2, allow("10.0.0.0/8"));
        // Younger than `web`, whose node port it asks for.
        world.add("late", 9, &http(Some(30080)), 2, open());
        world.add(
            "unnamed",
            10,
            &[Exposed { name: "", node_port: Some(30086), ..Exposed::HTTP }],
            1,
            open(),
        );
        let address = |text: &str| text.parse().unwrap();
        world.add_with("outside", 11, &http(Some(30090)), 3, open(), |service| {
            service.external_ips = vec![address("198.51.100.11"), address("2001:db8:1::11")];
            service.load_balancer_ips = vec![address("203.0.113.11"), address("2001:db8:2::11")];
            service.load_balancer_sources = allow("10.0.0.0/8, 2001:db8::/32");
            service.internal_traffic = TrafficPolicy::Local;
            service.external_traffic = TrafficPolicy::Local;
            service.session_affinity = std::num::NonZeroU32::new(10_800);
            service.balancing = Balancing::SourceHash;
        });
        world.add_with("elsewhere", 12, &http(Some(30091)), 3, open(), |service| {
            service.load_balancer_ips = vec![address("203.0.113.12")];
            service.external_traffic = TrafficPolicy::Local;
            service.created = 99;
        });
        world
    }

    /// A dual-stack Service with that many endpoints in each family, the first of them here.
    pub fn add(
        &mut self,
        name: &str,
        number: u16,
        ports: &[Exposed],
        endpoints: u16,
        node_port_sources: SourceRestriction,
    ) {
        self.add_with(name, number, ports, endpoints, node_port_sources, |_| {});
    }

    pub fn add_with(
        &mut self,
        name: &str,
        number: u16,
        ports: &[Exposed],
        endpoints: u16,
        node_port_sources: SourceRestriction,
        change: impl FnOnce(&mut Service),
    ) {
        let name = ServiceName::new("shop", name);
        let port = |number| NonZeroU16::new(number).unwrap();
        let mut service = Service {
            created: number.into(),
            cluster_ips: vec![
                address(&format!("10.96.0.{number}")),
                address(&format!("fd00:96::{number}")),
            ],
            ports: ports
                .iter()
                .map(|p| ServicePort {
                    name: p.name.into(),
                    protocol: p.protocol,
                    port: port(p.port),
                    node_port: p.node_port.map(port),
                })
                .collect(),
            node_port_sources,
            ..Service::new(name.clone())
        };
        change(&mut service);
        // `elsewhere` has no endpoint on this node.
        let here = service.created != 99;
        let slices = Family::ALL.map(|family| EndpointSlice {
            name: SliceName { namespace: "shop".into(), name: "slice".into() },
            service: name.clone(),
            family,
            ports: ports
                .iter()
                .map(|p| SlicePort {
                    name: p.name.into(),
                    protocol: p.protocol,
                    port: port(8000 + p.port),
                })
                .collect(),
            endpoints: (1..=endpoints)
                .map(|endpoint| Endpoint {
                    node: (endpoint == 1 && here).then(|| Arc::from("here")),
                    ..Endpoint::new(match family {
                        Family::V4 => address(&format!("10.244.{number}.{endpoint}")),
                        Family::V6 => address(&format!("fd00:244:{number}::{endpoint}")),
                    })
                })
                .collect(),
            diagnostics: vec![],
        });
        let plan = plan_service(&service, &slices, &self.node);
        self.desired.set(&name, Some(plan.clone()));
        self.plans.push(plan);
    }

    /// Makes the kernel hold the world. The worker owns the table while it lives.
    pub fn program(&self) -> Worker {
        let report =
            |report: portcullis::commit::Report| assert!(report.refused.is_none(), "{report:?}");
        let mut worker = Worker::open(report).unwrap();
        worker.adopt(&self.node, self.plans.clone()).unwrap();
        worker
    }

    pub fn audit(&self) -> Audit {
        let nft = Nft { program: nft_program(), ..Nft::default() };
        audit::run(&self.desired, &self.node, &nft).unwrap()
    }
}

pub fn address(text: &str) -> IpAddr {
    text.parse().expect(text)
}
