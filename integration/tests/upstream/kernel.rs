//! What becomes of packets, once more: those that upstream's tests follow through a ruleset, sent
//! between network namespaces, with the real program on the node.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Outcome, Probe, Protocol, Server};
use serde_json::{Value, json};

use crate::network::{Network, endpoint};
use crate::packets::{Case, Flow, Settings, cases};
use crate::tracer::Fate;
use crate::{Comparison, Differences};

/// What no real packet can show, and why.
const DIFFERENT: &Differences = &[];

/// How many cases are tried at a time. Most of the time they wait.
const WORKERS: usize = 4;
/// How many connections are made at a time: of two endpoints, one is missed in one of a million
/// times.
const DRAWS: usize = 20;
/// After so many times nobody expects another endpoint.
const ROUNDS: usize = 10;
/// How long a connection that is to be dropped is waited for.
const DROPPED: Duration = Duration::from_millis(700);
/// How long any other is. It takes a millisecond, and a second if a packet is lost.
const ANSWERED: Duration = Duration::from_secs(5);

type Fates = BTreeSet<Fate>;

#[test]
fn packets_meet_that_fate_in_the_kernel() -> Result<()> {
    if !available(&[Requirement::Root]) {
        return Ok(());
    }
    let cases = cases()?;
    let mut found: Vec<Option<Vec<Fates>>> = vec![None; cases.len()];
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Vec<Fates>)>> {
        let mut done = Vec::new();
        while let number = next.fetch_add(1, Ordering::Relaxed)
            && let Some(case) = cases.get(number)
        {
            done.push((number, send(case).with_context(|| case.name(number, 0))?));
        }
        Ok(done)
    };
    thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            for (number, fates) in worker.join().expect("no panic")? {
                found[number] = Some(fates);
            }
        }
        Ok(())
    })?;

    let mut comparison = Comparison::new(DIFFERENT);
    for (number, (case, found)) in cases.iter().zip(found).enumerate() {
        let found = found.with_context(|| format!("case {number} was not tried"))?;
        for (packet, (flow, found)) in case.flows.iter().zip(found).enumerate() {
            let expected = Fates::from_iter(flow.expected()?);
            let difference =
                (found != expected).then(|| format!("{flow}: {found:?}, not {expected:?}"));
            comparison.case(&case.name(number, packet), difference);
        }
    }
    comparison.finish();
    Ok(())
}

/// Sends all packets of a case, and gives what became of each.
fn send(case: &Case) -> Result<Vec<Fates>> {
    let network = Network::new(case)?;
    let servers = network.servers(case)?;
    let _daemon = network.daemon(case)?;
    let fates = |flow: &Flow| fates(&network, &servers, flow).with_context(|| flow.to_string());
    case.flows.iter().map(fates).collect()
}

/// Sends a packet until everything happened to it that is expected, or something else did.
fn fates(network: &Network, servers: &[Server], flow: &Flow) -> Result<Fates> {
    let expected = Fates::from_iter(flow.expected()?);
    let patience = if expected.contains(&Fate::Dropped) { DROPPED } else { ANSWERED };
    let to = SocketAddr::new(flow.destination, flow.port);
    let probe = Probe::new(to, transport(&flow.protocol)?).source(flow.source).timeout(patience);
    let served = || servers.iter().map(Server::served).sum::<u64>();
    let (before, mut found) = (served(), Fates::new());
    for _ in 0..ROUNDS {
        for outcome in network.ask(flow.source, &[probe; DRAWS])? {
            found.insert(fate(outcome, flow.source)?);
        }
        if found == expected || !found.is_subset(&expected) {
            break;
        }
    }
    let stopped = !found.iter().any(|fate| matches!(fate, Fate::Passed { .. }));
    ensure!(!stopped || served() == before, "{found:?}, but it reached a server");
    Ok(found)
}

fn fate(outcome: Outcome, source: IpAddr) -> Result<Fate> {
    Ok(match outcome {
        Outcome::Answered { by, seen_source } => {
            Fate::Passed { to: endpoint(&by)?, masqueraded: seen_source.ip() != source }
        }
        Outcome::Refused => Fate::Rejected,
        Outcome::TimedOut => Fate::Dropped,
        Outcome::Unreachable(errno) => bail!("there is no way: {errno}"),
    })
}

/// A protocol by the name that Kubernetes has for it.
pub fn transport(name: &str) -> Result<Protocol> {
    match name {
        "TCP" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        "SCTP" => Ok(Protocol::Sctp),
        other => bail!("{other:?} is no protocol"),
    }
}

/// A case as its network needs it.
impl Case {
    /// The addresses of endpoints on the node of the case, or of those that are not.
    pub fn endpoints(&self, here: bool) -> BTreeSet<IpAddr> {
        let all = self.endpoint_slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
        let wanted = all.filter(|endpoint| {
            (endpoint.node_name.as_deref() == Some(&*self.proxy.node_name)) == here
        });
        wanted.flat_map(|endpoint| &endpoint.addresses).filter_map(|one| one.parse().ok()).collect()
    }

    /// Every port of every endpoint, with its protocol.
    pub fn backends(&self) -> BTreeSet<(String, SocketAddr)> {
        let mut backends = BTreeSet::new();
        for slice in &self.endpoint_slices {
            let addresses =
                slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
            for address in addresses.filter_map(|address| address.parse::<IpAddr>().ok()) {
                for port in slice.ports.iter().flatten() {
                    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
                    let number = port.port.and_then(|port| u16::try_from(port).ok());
                    backends.extend(number.map(|port| (protocol, (address, port).into())));
                }
            }
        }
        backends
    }

    /// Everything that is sent to, with its protocol.
    pub fn frontends(&self) -> BTreeSet<(String, SocketAddr)> {
        let to = |flow: &Flow| (flow.protocol.clone(), (flow.destination, flow.port).into());
        self.flows.iter().map(to).collect()
    }

    /// The objects of the case, those of the cluster included, as a `List`.
    pub fn objects(&self) -> Result<Value> {
        let Settings { node_name, node_ip, service_cidrs, .. } = &self.proxy;
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": { "name": node_name },
            "status": { "addresses": [{ "type": "InternalIP", "address": node_ip }] },
        });
        let network = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": service_cidrs },
        });
        let mut items = vec![node, network];
        for service in &self.services {
            items.push(serde_json::to_value(service)?);
        }
        for slice in &self.endpoint_slices {
            items.push(serde_json::to_value(slice)?);
        }
        Ok(json!({ "apiVersion": "v1", "kind": "List", "items": items }))
    }
}
