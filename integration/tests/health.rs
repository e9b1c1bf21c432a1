//! What the daemon answers over HTTP: to load balancers, to probes, and to whoever collects metrics.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::health::Connections;
use portcullis_integration::binary;
use portcullis_integration::daemon::{NODE_NAME, follow_manifests, wait_until_programmed};
use portcullis_integration::lab::{FAMILIES, Lab, Process, eventually};
use portcullis_integration::manifest::{Endpoint, Manifest, Port, replace, write_node};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{Protocol, Response, Server, http_get, probe};
use serde_json::{Value, json};

const NOTICE: Duration = Duration::from_secs(15);
const NODE_PORT: u16 = 30080;
const CHECK_PORT: u16 = 32000;

struct World {
    lab: Lab,
    manifests: PathBuf,
    web: Manifest,
}

impl World {
    fn new() -> Result<Option<World>> {
        if !available(&[Requirement::Root, Requirement::Nft]) {
            return Ok(None);
        }
        let lab = Lab::new(2)?;
        let manifests = lab.directory().join("manifests");
        fs::create_dir(&manifests)?;
        write_node(&lab, &manifests)?;
        let mut web = Manifest::new("web", 10, &lab).port(Port::new(
            "http",
            Protocol::Tcp,
            80,
            8080,
            NODE_PORT,
        ));
        web.extra = json!({ "spec": {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": CHECK_PORT,
        }});
        Ok(Some(World { lab, manifests, web }))
    }

    fn daemon(&self) -> Result<Process> {
        follow_manifests(&self.lab, &self.manifests)
    }

    /// What a load balancer is told at both addresses of the node.
    fn check(&self, port: u16, path: &str) -> [Result<Response>; 2] {
        FAMILIES
            .map(|family| http_get(&self.lab.allowed, (self.lab.node.address(family), port), path))
    }

    /// Waits until both say that so many endpoints are here.
    fn becomes(&self, count: usize) -> Result<()> {
        self.becomes_of("web", count)
    }

    /// Waits until both say that so many endpoints of a Service are here.
    fn becomes_of(&self, name: &str, count: usize) -> Result<()> {
        let mut last = Vec::new();
        let settled = eventually(NOTICE, || {
            last = self.check(CHECK_PORT, "/").into_iter().collect();
            last.iter()
                .all(|answer| answer.as_ref().is_ok_and(|answer| says_of(answer, name, count)))
        });
        ensure!(settled, "not {count} of {name}: {last:?}");
        Ok(())
    }

    fn give(&mut self, endpoints: impl IntoIterator<Item = [Endpoint; 2]>) -> Result<()> {
        self.web.endpoints = endpoints.into_iter().flatten().collect();
        self.web.write(&self.manifests)
    }

    fn metric(&self, name: &str) -> Result<String> {
        let answer = http_get(&self.lab.node, local(10249), "/metrics")?;
        ensure!(answer.status == 200, "{answer:?}");
        let kind = answer.headers.get("content-type").context("no content type")?;
        ensure!(kind.starts_with("application/openmetrics-text"), "{kind}");
        ensure!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
        let line = answer.body.lines().find_map(|line| line.strip_prefix(name));
        let line = line.with_context(|| format!("no {name} in {}", answer.body))?;
        Ok(line.trim().to_owned())
    }
}

fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Whether an answer is that of kube-proxy for so many endpoints.
fn says(answer: &Response, count: usize) -> bool {
    says_of(answer, "web", count)
}

fn says_of(answer: &Response, name: &str, count: usize) -> bool {
    let header = |name: &str| answer.headers.get(name).map(String::as_str);
    let expected = json!({
        "service": { "namespace": "shop", "name": name },
        "localEndpoints": count,
        "serviceProxyHealthy": true,
    });
    answer.status == if count > 0 { 200 } else { 503 }
        && header("content-type") == Some("application/json")
        && header("x-content-type-options") == Some("nosniff")
        && header("x-load-balancing-endpoint-weight") == Some(&count.to_string())
        && serde_json::from_str::<Value>(&answer.body).is_ok_and(|body| body == expected)
}

#[test]
fn load_balancers_are_told_of_endpoints_here() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    let pods = { world.lab.pods.iter() }.map(Endpoint::of).collect::<Vec<_>>();
    let elsewhere = Endpoint::elsewhere(&world.lab);
    let _servers: Vec<Server> = { world.lab.pods.iter() }
        .map(|pod| Server::start(pod, pod.name(), Protocol::Tcp, 8080))
        .collect::<Result<_>>()?;
    world.give([pods[0].clone(), pods[1].clone(), elsewhere.clone()])?;
    let _daemon = world.daemon()?;
    world.becomes(2)?;
    for path in ["/healthz", "/any/path?at=all"] {
        for answer in world.check(CHECK_PORT, path) {
            ensure!(says(&answer?, 2), "{path}");
        }
    }
    world.give([pods[1].clone(), elsewhere.clone()])?;
    world.becomes(1)?;
    // One that terminates still serves whom it can, and nobody new is to be sent here.
    let leaving = pods[1].clone().map(|endpoint| Endpoint {
        extra: json!({ "conditions": { "ready": false, "serving": true, "terminating": true } }),
        ..endpoint
    });
    world.give([leaving, elsewhere.clone()])?;
    world.becomes(0)?;
    for family in FAMILIES {
        let to = (world.lab.node.address(family), NODE_PORT);
        let outcome = probe(&world.lab.allowed, to, Protocol::Tcp)?;
        ensure!(outcome.by() == Some("pod-1"), "{to:?}: {outcome:?}");
    }
    world.give([elsewhere])?;
    world.becomes(0)?;

    // Another port; then no such port, by another policy.
    world.web.extra["spec"]["healthCheckNodePort"] = json!(CHECK_PORT + 1);
    world.give(pods)?;
    let other = || {
        let answers = world.check(CHECK_PORT + 1, "/");
        answers.iter().all(|answer| answer.as_ref().is_ok_and(|answer| says(answer, 2)))
    };
    ensure!(eventually(NOTICE, other), "{:?}", world.check(CHECK_PORT + 1, "/"));
    ensure!(world.check(CHECK_PORT, "/").iter().all(Result::is_err), "the old port still answers");
    world.web.extra["spec"]["externalTrafficPolicy"] = json!("Cluster");
    world.web.write(&world.manifests)?;
    let closed = || world.check(CHECK_PORT + 1, "/").iter().all(Result::is_err);
    ensure!(eventually(NOTICE, closed), "the port of a Service that has none still answers");
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_said_and_tried_again() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    let server = Server::start(&world.lab.node, "other", Protocol::Tcp, CHECK_PORT)?;
    world.web.write(&world.manifests)?;
    let mut daemon = world.daemon()?;
    daemon.wait_for_output("spec.healthCheckNodePort", NOTICE)?;
    ensure!(daemon.tail().contains("cannot listen at"), "{}", daemon.tail());
    drop(server);
    world.becomes(2)
}

#[test]
fn a_port_changes_hands_without_an_error() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    let file = world.manifests.join("web.json");
    world.web.write(&world.manifests)?;
    let daemon = world.daemon()?;
    world.becomes(2)?;
    // Names that sort before and after the one that goes.
    for name in ["api", "web", "zoo", "web"] {
        let next = Manifest { name: name.to_owned(), ..world.web.clone() };
        replace(&file, &next.list().to_string())?;
        world.becomes_of(name, 2)?;
    }
    ensure!(!daemon.stderr().contains("cannot listen"), "{}", daemon.tail());
    Ok(())
}

#[test]
fn probes_are_told_whether_the_proxy_works() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    let _daemon = world.daemon()?;
    let ask = |path: &str| http_get(&world.lab.node, local(10256), path);
    let status = |path: &str| ask(path).map(|answer| answer.status).ok();
    let fine = || ["/healthz", "/livez", "/readyz"].iter().all(|path| status(path) == Some(200));
    ensure!(eventually(NOTICE, fine), "{:?}", ask("/healthz"));
    for answer in world.check(10256, "/healthz") {
        let answer = answer?;
        let header = |name: &str| answer.headers.get(name).map(String::as_str);
        ensure!(header("content-type") == Some("application/json"), "{answer:?}");
        ensure!(header("x-content-type-options") == Some("nosniff"), "{answer:?}");
        let body: Value = serde_json::from_str(&answer.body)?;
        ensure!(body["nodeEligible"] == true && body["healthy"] == true, "{body}");
        for field in ["lastUpdated", "currentTime"] {
            let time = body[field].as_str().context("no time")?;
            ensure!(time.ends_with('Z') && time.contains('T'), "{time}");
        }
    }
    ensure!(status("/other") == Some(404));

    // The autoscaler is about to take the node away: it gets no more traffic, and is not restarted.
    let file = world.manifests.join("node.json");
    let node = fs::read_to_string(&file)?;
    let mut tainted: Value = serde_json::from_str(&node)?;
    tainted["spec"]["taints"] =
        json!([{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }]);
    replace(&file, &tainted.to_string())?;
    ensure!(eventually(NOTICE, || status("/healthz") == Some(503)), "{:?}", ask("/healthz"));
    let body: Value = serde_json::from_str(&ask("/healthz")?.body)?;
    ensure!(body["nodeEligible"] == false && body["healthy"] == true, "{body}");
    ensure!(status("/livez") == Some(200) && status("/readyz") == Some(200));
    replace(&file, &node)?;
    ensure!(eventually(NOTICE, || status("/healthz") == Some(200)), "{:?}", ask("/healthz"));
    ensure!(http_get(&world.lab.node, local(10249), "/proxyMode")?.body == "nftables");
    Ok(())
}

#[test]
fn idle_connections_keep_nobody_from_an_answer() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    world.web.write(&world.manifests)?;
    let daemon = world.daemon()?;
    world.becomes(2)?;
    let descriptors = || Ok::<_, std::io::Error>(fs::read_dir(descriptors_of(&daemon))?.count());
    let before = descriptors()?;
    let mut idle = Vec::new();
    for port in [CHECK_PORT, 10256] {
        let to = SocketAddr::new(world.lab.node.v4.into(), port);
        let connect = || TcpStream::connect_timeout(&to, NOTICE);
        world.lab.refused.enter(|| {
            for _ in 0..2 * Connections::MOST {
                idle.push(connect().with_context(|| format!("connection {}", idle.len()))?);
            }
            anyhow::Ok(())
        })?;
        let now = descriptors()?;
        // Of what is about to be closed, each listener has one in hand.
        ensure!(now <= before + Connections::MOST + 10, "{before} descriptors, then {now}");
        world.becomes(2)?;
        for answer in world.check(10256, "/healthz") {
            ensure!(answer?.status == 200);
        }
    }
    // Threads that were asked for the first time meanwhile have a netlink socket each.
    let closed = || descriptors().is_ok_and(|now| now <= before + 2);
    ensure!(eventually(NOTICE, closed), "{before} descriptors, now {:?}", descriptors());
    Ok(())
}

/// `nc -N` and others end their side of a connection with the question.
#[test]
fn clients_that_only_listen_get_an_answer() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    world.web.write(&world.manifests)?;
    let _daemon = world.daemon()?;
    world.becomes(2)?;
    let ask = |port: u16, version: &str| -> Result<String> {
        let to = SocketAddr::new(world.lab.node.v4.into(), port);
        let mut stream = TcpStream::connect_timeout(&to, NOTICE)?;
        stream.set_read_timeout(Some(NOTICE))?;
        let question = format!("GET /healthz HTTP/{version}\r\nHost: {to}\r\n\r\n");
        stream.write_all(question.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    for port in [CHECK_PORT, 10256] {
        for version in ["1.0", "1.1"] {
            for number in 0..100 {
                let answer = world.lab.allowed.enter(|| ask(port, version))?;
                let well = answer.starts_with(&format!("HTTP/{version} 200 OK\r\n"));
                ensure!(well, "port {port}, HTTP/{version}, question {number}: {answer:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn many_ports_need_many_descriptors() -> Result<()> {
    const PORTS: u8 = 40;
    let Some(world) = World::new()? else { return Ok(()) };
    for number in 0..PORTS {
        let node_port = NODE_PORT + 1 + u16::from(number);
        let port = Port::new("http", Protocol::Tcp, 80, 8080, node_port);
        let mut more = Manifest::new(&format!("many-{number}"), 20 + number, &world.lab).port(port);
        more.extra = world.web.extra.clone();
        more.extra["spec"]["healthCheckNodePort"] = json!(CHECK_PORT + u16::from(number));
        more.write(&world.manifests)?;
    }
    let directory = world.manifests.to_str().context("a path in UTF-8")?;
    let mut counts = Vec::new();
    for at in ["primary", "0.0.0.0/0,::/0"] {
        let arguments =
            ["run", "--node-name", NODE_NAME, "--manifests", directory, "--nodeport-addresses", at];
        let mut daemon = Command::new("sh");
        // Fewer than there are ports and families.
        daemon.args(["-c", r#"ulimit -S -n 64; exec "$@""#, "sh"]);
        daemon.arg(binary::path()?).args(arguments);
        let mut daemon = world.lab.spawn(&daemon, "portcullis")?;
        wait_until_programmed(&mut daemon)?;
        let answered = || {
            (0..PORTS).all(|number| {
                let answers = world.check(CHECK_PORT + u16::from(number), "/");
                let name = format!("many-{number}");
                answers.iter().all(|answer| answer.as_ref().is_ok_and(|a| says_of(a, &name, 2)))
            })
        };
        ensure!(eventually(NOTICE, answered), "{at}: {}", daemon.tail());
        counts.push(fs::read_dir(descriptors_of(&daemon))?.count());
        ensure!(daemon.terminate(NOTICE)?.success());
    }
    // All addresses of the node have one listener.
    ensure!(counts[1] <= counts[0] + 10, "{counts:?} descriptors");
    Ok(())
}

/// The directory that lists them.
fn descriptors_of(process: &Process) -> String {
    format!("/proc/{}/fd", process.pid())
}

#[test]
fn processes_on_node_ports_are_found() -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    world.web.write(&world.manifests)?;
    // One is there before the Service is served, the other comes later.
    let first = Server::start(&world.lab.node, "first", Protocol::Tcp, NODE_PORT)?;
    let mut daemon = world.daemon()?;
    let metric = || world.metric("portcullis_node_port_conflicts");
    ensure!(eventually(NOTICE, || metric().is_ok_and(|count| count == "1")), "{:?}", metric());
    daemon.wait_for_output("a process of this node listens on tcp port 30080", NOTICE)?;
    drop(first);
    ensure!(eventually(NOTICE, || metric().is_ok_and(|count| count == "0")), "{:?}", metric());
    let _second = Server::start(&world.lab.node, "second", Protocol::Tcp, NODE_PORT)?;
    ensure!(eventually(NOTICE, || metric().is_ok_and(|count| count == "1")), "{:?}", metric());
    ensure!(world.metric("portcullis_programmed")? == "1");
    ensure!(world.metric("portcullis_transactions_total")?.parse::<f64>()? >= 1.0);
    ensure!(world.metric("portcullis_operations_total")?.parse::<f64>()? > 10.0);
    ensure!(world.metric("portcullis_kernel_time_seconds_total")?.parse::<f64>()? > 0.0);
    ensure!(world.metric("portcullis_object_warnings")?.parse::<f64>()? >= 1.0);
    Ok(())
}
