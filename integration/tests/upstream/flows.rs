//! Which tracked connections must not go on: those that upstream's cleanup deletes of a table,
//! against those that the real program deletes of the kernel's table when it starts.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use portcullis_integration::daemon::{self, wait_until_programmed};
use portcullis_integration::lab::{Namespace, eventually, scratch};
use portcullis_integration::requirement::{Requirement, available};
use serde::Deserialize;
use serde_json::json;

use crate::{Comparison, Differences, read};

const FACTS: &str = include_str!("../../upstream/facts/stale-flows.json");

const DIFFERENT: &Differences = &[
    ("cleanup_test.go:89 udp 172.30.1.1:8000 by 10.240.1.5:9090", READY),
    ("cleanup_test.go:89 udp 1.2.3.4:8000 by 10.240.1.5:9090", READY),
    ("cleanup_test.go:89 udp 192.168.99.100:8000 by 10.240.1.5:9090", READY),
    ("cleanup_test.go:89 udp node:32000 by 10.240.1.5:9090", READY),
    ("cleanup_test.go:89 sctp 172.30.1.1:8000 by 10.240.2.6:9090", SCTP),
    ("cleanup_test.go:89 sctp 1.2.3.4:8000 by 10.240.2.6:9090", SCTP),
    ("cleanup_test.go:89 sctp 192.168.99.100:8000 by 10.240.2.6:9090", SCTP),
    ("cleanup_test.go:89 sctp node:32000 by 10.240.2.6:9090", SCTP),
    ("cleanup_test.go:447 udp 192.168.99.100:8000 by 10.240.0.4:9090", NOBODY),
    ("cleanup_test.go:447 udp 192.168.99.100:8000 by 10.240.2.6:9090", NOBODY),
];
const READY: &str = "it is ready without serving, as with publishNotReadyAddresses: who gets new flows keeps old ones";
const SCTP: &str = "SCTP clients that start anew are led nowhere as those of UDP are";
const NOBODY: &str = "nobody serves the Service any more, so clients are to be told";

/// The node's address, and where all connections come from.
const NODE: &str = "192.0.2.1";
const CLIENT: &str = "203.0.113.1";
/// The source port of the first connection.
const FIRST_PORT: u16 = 10_000;
/// How long the program may take until it has deleted what it deletes; it takes milliseconds.
const NOTICE: Duration = Duration::from_secs(5);
/// What is looked for once more, is looked for within this time.
const SETTLED: Duration = Duration::from_millis(300);

/// A table of connections, and who serves.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    line: String,
    service: core::Service,
    endpoint_slice: discovery::EndpointSlice,
    flows: Vec<Flow>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Flow {
    /// Its number.
    protocol: u8,
    /// Where its first packet went to; `None` for an address of the node.
    destination: Option<IpAddr>,
    port: u16,
    /// Who answers: the destination where nothing was translated.
    answering: IpAddr,
    answering_port: u16,
    deleted: bool,
}

#[test]
fn flows_are_deleted_that_upstream_deletes() -> Result<()> {
    if !available(&[Requirement::Root, Requirement::Conntrack]) {
        return Ok(());
    }
    let mut comparison = Comparison::new(DIFFERENT);
    for case in read::<Case>(FACTS)? {
        let left = case.left().with_context(|| case.line.clone())?;
        for (flow, port) in case.flows.iter().zip(FIRST_PORT..) {
            let deleted = !left.contains(&port);
            let difference = (deleted != flow.deleted).then(|| format!("deleted: {deleted}"));
            comparison.case(&case.name(flow), difference);
        }
    }
    comparison.finish();
    Ok(())
}

impl Case {
    fn name(&self, flow: &Flow) -> String {
        let protocol = flow.protocol().unwrap_or("?");
        let to = flow.destination.map_or("node".to_owned(), |address| address.to_string());
        let answering = SocketAddr::new(flow.answering, flow.answering_port);
        format!("{} {protocol} {to}:{} by {answering}", self.line, flow.port)
    }

    /// The source ports of the connections that the program leaves alone.
    fn left(&self) -> Result<BTreeSet<u16>> {
        let node = Namespace::new("node")?;
        node.ip(&[format!("addr add {NODE}/32 dev lo")])?;
        let directory = scratch("flows")?;
        let table = directory.path().join("table");
        let entries = self.flows.iter().zip(FIRST_PORT..).map(|(flow, port)| flow.entry(port));
        fs::write(&table, entries.collect::<Result<String>>()?)?;
        node.run(&["conntrack", "-R", table.to_str().context("a path in UTF-8")?])?;
        let all: BTreeSet<u16> = (FIRST_PORT..).take(self.flows.len()).collect();
        if tracked(&node)? != all {
            bail!("the kernel took {:?}", tracked(&node)?);
        }

        let manifests = directory.path().join("manifests");
        fs::create_dir(&manifests)?;
        // Upstream's Service says no type, but has what only this one has at an API server.
        let mut service = self.service.clone();
        service.spec.get_or_insert_default().type_ = Some("LoadBalancer".to_owned());
        let items = [serde_json::to_value(service)?, serde_json::to_value(&self.endpoint_slice)?];
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        fs::write(manifests.join("objects.json"), list.to_string())?;
        let mut command = daemon::command(&["run", "--node-name", "test-worker"])?;
        command.arg("--manifests").arg(&manifests);
        command.args(["--nodeport-addresses", &format!("{NODE}/32")]);
        let mut daemon = node.spawn(&command, "portcullis", directory.path())?;
        wait_until_programmed(&mut daemon)?;

        let intended = |flow: &Flow| DIFFERENT.iter().any(|(name, _)| *name == self.name(flow));
        let stay = |(flow, _): &(&Flow, u16)| flow.deleted == intended(flow);
        let stay: BTreeSet<u16> =
            self.flows.iter().zip(FIRST_PORT..).filter(stay).map(|(_, port)| port).collect();
        eventually(NOTICE, || tracked(&node).is_ok_and(|tracked| tracked == stay));
        thread::sleep(SETTLED);
        tracked(&node)
    }
}

impl Flow {
    fn protocol(&self) -> Result<&'static str> {
        match self.protocol {
            6 => Ok("tcp"),
            17 => Ok("udp"),
            132 => Ok("sctp"),
            other => bail!("no word for protocol {other}"),
        }
    }

    /// A line for `conntrack -R`.
    fn entry(&self, source_port: u16) -> Result<String> {
        let Flow { port, answering, answering_port, .. } = self;
        let destination = self.destination.map_or(NODE.to_owned(), |address| address.to_string());
        let protocol = self.protocol()?;
        let state = match protocol {
            "tcp" => "--state ESTABLISHED -u SEEN_REPLY",
            "sctp" => "--state ESTABLISHED --orig-vtag 1 --reply-vtag 2",
            _ => "-u SEEN_REPLY",
        };
        let translated = self.destination != Some(*answering);
        let answer = match protocol {
            "tcp" | "udp" if translated => format!("--dst-nat {answering}:{answering_port}"),
            // The program cannot say that the port of SCTP is translated, but what becomes of it.
            _ => {
                let from = if translated { answering_port } else { port };
                format!(
                    "-r {answering} -q {CLIENT} --reply-port-src {from} \
                     --reply-port-dst {source_port}"
                )
            }
        };
        Ok(format!(
            "-I -p {protocol} -s {CLIENT} -d {destination} --sport {source_port} --dport {port} \
             -t 600 {state} {answer}\n"
        ))
    }
}

/// The source ports of all connections of the client.
fn tracked(node: &Namespace) -> Result<BTreeSet<u16>> {
    let listed = node.run(&["conntrack", "-L", "-s", CLIENT])?;
    let port = |line: &str| {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix("sport="));
        text.and_then(|text| text.parse().ok()).with_context(|| line.to_owned())
    };
    listed.lines().map(port).collect()
}
