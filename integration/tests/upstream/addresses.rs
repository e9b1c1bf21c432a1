//! At which of a node's addresses node ports are served: what upstream selects by CIDRs, against what
//! a plan's node does. Whether the kernel keeps to it is tested with packets elsewhere.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Result, bail};
use ipnet::IpNet;
use portcullis::model::{Family, NodeContext, NodePortAddresses};
use serde::Deserialize;

use crate::{Comparison, Differences, read};

const FACTS: &str = include_str!("../../upstream/facts/node-port-addresses.json");

const DIFFERENT: &Differences = &[
    ("nodeport_addresses_test.go:65 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:88 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:112 IPv4", OTHER_FAMILY),
    ("nodeport_addresses_test.go:135 IPv4", OTHER_FAMILY),
    ("nodeport_addresses_test.go:159 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:182 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:201 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:224 IPv6", OTHER_FAMILY),
    ("nodeport_addresses_test.go:247 IPv4", NO_LIST),
    ("nodeport_addresses_test.go:247 IPv6", NO_LIST),
    ("nodeport_addresses_test.go:271 IPv4", NO_LIST),
    ("nodeport_addresses_test.go:271 IPv6", NO_LIST),
    ("nodeport_addresses_test.go:295 IPv6", OTHER_FAMILY),
];
const OTHER_FAMILY: &str =
    "who lists addresses of one family only has not asked for all of the other";
const NO_LIST: &str = "without a list it is the node's primary addresses, as kube-proxy's command has it with nftables";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    line: String,
    cidrs: Vec<IpNet>,
    /// All that the node has.
    addresses: BTreeSet<IpAddr>,
    ip_family: String,
    /// Those of the family at which node ports are served.
    selected: BTreeSet<IpAddr>,
    /// Whether they would be at any address of the family.
    all: bool,
}

#[test]
fn node_ports_are_served_where_upstream_serves_them() -> Result<()> {
    let mut comparison = Comparison::new(DIFFERENT);
    for case in read::<Case>(FACTS)? {
        let found = case.found()?;
        // Upstream's nftables proxy leaves loopback addresses out of what is selected, with an error.
        let selected = case.selected.iter().copied().filter(|address| !address.is_loopback());
        let expected = (selected.collect(), case.all);
        let difference = (found != expected).then(|| format!("{found:?}, not {expected:?}"));
        comparison.case(&format!("{} {}", case.line, case.ip_family), difference);
    }
    comparison.finish();
    Ok(())
}

impl Case {
    /// What is selected, and whether that is everything.
    fn found(&self) -> Result<(BTreeSet<IpAddr>, bool)> {
        let family = match self.ip_family.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => bail!("{other:?} is no family"),
        };
        let mut node = NodeContext::new("node".into());
        // There is no empty list to be written.
        if !self.cidrs.is_empty() {
            node.nodeport_addresses = NodePortAddresses::Cidrs(self.cidrs.clone());
        }
        let cidrs = node.nodeport_cidrs(family);
        let selected = |address: &IpAddr| cidrs.iter().any(|cidr| cidr.contains(address));
        let own = self.addresses.iter().copied();
        let selected = own.filter(|address| !address.is_loopback() && selected(address)).collect();
        Ok((selected, cidrs.iter().any(|cidr| cidr.prefix_len() == 0)))
    }
}
