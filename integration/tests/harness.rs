//! The laboratory and its traffic, tested with plain nft rules.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use portcullis_integration::binary;
use portcullis_integration::lab::{FAMILIES, Family, Host, Lab, eventually};
use portcullis_integration::requirement::{Requirement, available};
use portcullis_integration::traffic::{
    Flow, Outcome, PROTOCOLS, Probe, Protocol, Server, Tally, distribution, http_get, probe,
    probe_all, probe_many,
};

const LIMIT: Duration = Duration::from_secs(10);
/// A Service address in both families.
const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:10:96::a"];

/// Who asks, whom the node translates to, what postrouting does, and as whom the answering pod
/// sees the client; nobody answers where that is `None`.
type Translation<'a> = (&'a Host, &'a Host, &'a str, Option<&'a Host>);
type Expectation<'a> = &'a dyn Fn(&Outcome) -> bool;

fn ready() -> bool {
    available(&[Requirement::Root, Requirement::Nft])
}

fn service(family: Family) -> std::net::IpAddr {
    SERVICE[usize::from(family == Family::V6)].parse().expect("an address")
}

/// Translates port 80 of [`SERVICE`] to port 8080 of `pod`, for all protocols.
fn translate_to(pod: &Host, postrouting: &str) -> String {
    let (v4, v6) = (pod.v4, pod.v6);
    format!(
        "table inet test {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                ip daddr {} meta l4proto {{ tcp, udp, sctp }} th dport 80 dnat ip to {v4}:8080
                ip6 daddr {} meta l4proto {{ tcp, udp, sctp }} th dport 80 dnat ip6 to [{v6}]:8080
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                {postrouting}
            }}
        }}",
        SERVICE[0], SERVICE[1]
    )
}

#[test]
fn everybody_reaches_whom_they_should() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    for protocol in PROTOCOLS {
        let hosts = [&lab.node, &lab.peer, &lab.pods[0], &lab.pods[1], &lab.remote_pod];
        let _servers = hosts
            .iter()
            .map(|host| Server::start(host, host.name(), protocol, 8080))
            .collect::<Result<Vec<_>>>()?;
        for (from, to) in [
            (&lab.allowed, &lab.node),
            (&lab.refused, &lab.node),
            (&lab.allowed, &lab.peer),
            (&lab.peer, &lab.node),
            (&lab.node, &lab.peer),
            (&lab.peer, &lab.pods[0]),
            (&lab.pods[0], &lab.pods[1]),
            (&lab.pods[0], &lab.node),
            (&lab.pods[1], &lab.remote_pod),
            (&lab.remote_pod, &lab.pods[0]),
        ] {
            for family in FAMILIES {
                let what = format!("{protocol:?} {family:?} {} -> {}", from.name(), to.name());
                let outcome = probe(from, (to.address(family), 8080), protocol)?;
                assert_eq!(outcome.by(), Some(to.name()), "{what}: {outcome:?}");
                let seen = outcome.seen_source().map(|source| source.ip());
                assert_eq!(seen, Some(from.address(family)), "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn outcomes_are_told_apart() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(1)?;
    let pod = &lab.pods[0];
    let dropped = |o: &Outcome| *o == Outcome::TimedOut;
    let refused = |o: &Outcome| *o == Outcome::Refused;
    let answered = |o: &Outcome| o.by() == Some("pod");
    let unreachable = |o: &Outcome| matches!(o, Outcome::Unreachable(_));
    let every: &[Protocol] = &PROTOCOLS;
    let cases: [(u16, &str, &[Protocol], Expectation); 6] = [
        (1001, "accept", every, &answered),
        (1002, "drop", every, &dropped),
        (1003, "reject", every, &refused),
        (1004, "reject with tcp reset", &[Protocol::Tcp], &refused),
        (1005, "reject with icmpx host-unreachable", every, &unreachable),
        (1006, "reject with icmpx admin-prohibited", every, &unreachable),
    ];
    let mut rules = String::new();
    let mut servers = Vec::new();
    let mut questions = Vec::new();
    for (port, rule, protocols, expected) in cases {
        for protocol in protocols {
            servers.push(Server::start(pod, "pod", *protocol, port)?);
            let name = format!("{protocol:?}").to_lowercase();
            writeln!(rules, "{name} dport {port} {rule}")?;
            for family in FAMILIES {
                let question = Probe::new((pod.address(family), port), *protocol);
                questions.push((rule, question, expected));
            }
        }
    }
    lab.node.nft(&format!(
        "table inet test {{ chain forward {{
            type filter hook forward priority filter
            {rules}
        }}\n}}"
    ))?;
    let asked: Vec<Probe> = questions.iter().map(|(_, question, _)| *question).collect();
    for ((rule, question, expected), outcome) in questions.iter().zip(probe_all(&lab.peer, &asked)?)
    {
        assert!(expected(&outcome), "{rule}: {question:?}: {outcome:?}");
    }
    // Nobody listens. A raw SCTP server keeps the kernel from saying so.
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for family in FAMILIES {
            let outcome = probe(&lab.peer, (pod.address(family), 9), protocol)?;
            assert_eq!(outcome, Outcome::Refused, "{protocol:?} {family:?}");
        }
    }
    for family in FAMILIES {
        let outcome = probe(&lab.allowed, (lab.node.address(family), 9), Protocol::Sctp)?;
        assert_eq!(outcome, Outcome::Refused, "no SCTP in the kernel");
    }
    // An address that the node does not translate goes nowhere, whoever asks.
    let services = FAMILIES.map(|family| Probe::new((service(family), 80), Protocol::Tcp));
    for from in [&lab.allowed, &lab.refused, pod] {
        let outcomes = probe_all(from, &services)?;
        assert_eq!(outcomes, [Outcome::TimedOut, Outcome::TimedOut], "{}", from.name());
    }
    Ok(())
}

#[test]
fn translation_and_masquerade_are_seen() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    let _servers = PROTOCOLS
        .iter()
        .flat_map(|protocol| {
            [(&lab.pods[0], "local"), (&lab.remote_pod, "remote")]
                .map(|(pod, name)| Server::start(pod, name, *protocol, 8080))
        })
        .collect::<Result<Vec<_>>>()?;
    let masquerade = "ct status dnat masquerade fully-random";
    let [local, other_local] = [&lab.pods[0], &lab.pods[1]];
    let cases: [Translation<'_>; 6] = [
        (&lab.allowed, local, "", Some(&lab.allowed)),
        (other_local, local, "", Some(other_local)),
        // A pod that reaches itself drops the packet that comes from its own address.
        (local, local, "", None),
        // Without masquerade the answer of a pod elsewhere does not pass the node.
        (&lab.allowed, &lab.remote_pod, "", None),
        (other_local, &lab.remote_pod, masquerade, Some(&lab.node)),
        (&lab.allowed, &lab.remote_pod, masquerade, Some(&lab.node)),
    ];
    for (from, to, postrouting, seen) in cases {
        lab.node.nft("table inet test\ndelete table inet test")?;
        lab.node.nft(&translate_to(to, postrouting))?;
        let questions = FAMILIES.map(|f| PROTOCOLS.map(|p| Probe::new((service(f), 80), p)));
        let outcomes = probe_all(from, &questions.concat())?;
        for (family, outcomes) in FAMILIES.iter().zip(outcomes.chunks(PROTOCOLS.len())) {
            for outcome in outcomes {
                let what = format!("{} -> {} {postrouting}: {outcome:?}", from.name(), to.name());
                let source = outcome.seen_source().map(|source| source.ip());
                assert_eq!(source, seen.map(|host| host.address(*family)), "{what}");
            }
        }
    }
    // A hairpin that is masqueraded comes from the node's side of the pod's link.
    lab.node.nft("table inet test\ndelete table inet test")?;
    lab.node.nft(&translate_to(local, masquerade))?;
    for (family, gateway) in FAMILIES.into_iter().zip(["10.244.0.1", "fd00:10:244::1"]) {
        let questions = PROTOCOLS.map(|protocol| Probe::new((service(family), 80), protocol));
        for outcome in probe_all(local, &questions)? {
            let source = outcome.seen_source().map(|source| source.ip());
            assert_eq!(source, Some(gateway.parse()?), "{outcome:?}");
        }
    }
    Ok(())
}

#[test]
fn a_firewall_keeps_the_refused_client_out() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    lab.node.nft(&format!(
        "table inet test {{
            chain prerouting {{
                type filter hook prerouting priority dstnat - 10;
                meta l4proto {{ tcp, udp, sctp }} th dport 30080 ct state new jump firewall
            }}
            chain firewall {{
                ip saddr {} accept
                ip6 saddr {} accept
                drop
            }}
        }}",
        lab.allowed.v4, lab.allowed.v6
    ))?;
    let servers = PROTOCOLS
        .iter()
        .map(|protocol| Server::start(&lab.node, "node", *protocol, 30080))
        .collect::<Result<Vec<_>>>()?;
    let questions = FAMILIES.map(|family| {
        PROTOCOLS.map(|protocol| Probe::new((lab.node.address(family), 30080), protocol))
    });
    let questions = questions.concat().repeat(10);
    let tally = Tally::of(probe_all(&lab.allowed, &questions)?);
    assert_eq!(tally.by("node"), 60, "{tally:?}");
    let tally = Tally::of(probe_all(&lab.refused, &questions)?);
    assert_eq!(tally, Tally { timed_out: 60, ..Tally::default() });
    let served: Vec<u64> = servers.iter().map(Server::served).collect();
    assert_eq!(served, [20, 20, 20]);
    Ok(())
}

#[test]
fn shares_are_counted() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(3)?;
    lab.node.nft(&format!(
        "table ip test {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                ip daddr {} th dport 80 dnat to numgen random mod 4 map {{
                    0 : 10.244.0.10, 1 : 10.244.0.10, 2 : 10.244.0.11, 3 : 10.244.0.12
                }}
            }}
        }}",
        SERVICE[0]
    ))?;
    for protocol in PROTOCOLS {
        let _servers = lab
            .pods
            .iter()
            .map(|pod| Server::start(pod, pod.name(), protocol, 80))
            .collect::<Result<Vec<_>>>()?;
        let tally = probe_many(&lab.allowed, (service(Family::V4), 80), protocol, 1000)?;
        assert_eq!(tally.answers(), 1000, "{tally:?}");
        assert_eq!(tally.seen_sources, [lab.allowed.v4.into()].into());
        distribution::assert_fits(&tally, &[("pod-0", 2), ("pod-1", 1), ("pod-2", 1)]);
        let even = [("pod-0", 1), ("pod-1", 1), ("pod-2", 1)];
        let wrong = catch_unwind(|| distribution::assert_fits(&tally, &even));
        assert!(wrong.is_err(), "an uneven distribution passed for an even one: {tally:?}");
    }
    Ok(())
}

#[test]
fn refusals_are_not_rate_limited() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    lab.node.nft(
        "table inet test {
            chain input { type filter hook input priority 0; th dport 30080 reject; }
        }",
    )?;
    let questions = FAMILIES.map(|family| {
        PROTOCOLS.map(|protocol| Probe::new((lab.node.address(family), 30080), protocol))
    });
    let tally = Tally::of(probe_all(&lab.refused, &questions.concat().repeat(50))?);
    assert_eq!(tally, Tally { refused: 300, ..Tally::default() });
    Ok(())
}

#[test]
fn probes_choose_their_source() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    lab.allowed.ip(&["addr add 192.0.2.77/24 dev eth0"])?;
    for protocol in PROTOCOLS {
        let _server = Server::start(&lab.node, "node", protocol, 8080)?;
        let ask = Probe::new((lab.node.v4, 8080), protocol);
        let outcome = ask.source([192, 0, 2, 77]).source_port(1234).run(&lab.allowed)?;
        assert_eq!(outcome.seen_source(), Some("192.0.2.77:1234".parse()?), "{protocol:?}");
        assert!(ask.source([192, 0, 2, 78]).run(&lab.allowed).is_err(), "not its address");
    }
    Ok(())
}

#[test]
fn flows_live_and_die() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(1)?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for family in FAMILIES {
            let what = format!("{protocol:?} {family:?}");
            lab.node.nft("table inet test\ndelete table inet test")?;
            let to = (lab.pods[0].address(family), 8080);
            assert!(Flow::open(&lab.peer, to, protocol).is_err(), "{what}: nobody listens");
            let server = Server::start(&lab.pods[0], "pod", protocol, 8080)?;
            let mut flow = Flow::open(&lab.peer, to, protocol)?;
            assert_eq!(flow.by(), "pod", "{what}");
            assert_eq!(flow.first().seen_source(), Some(flow.local()?), "{what}");
            assert!(flow.alive()? && flow.alive()?, "{what}");
            lab.node.nft(
                "table inet test {
                    chain forward { type filter hook forward priority 0; th dport 8080 drop; }
                }",
            )?;
            assert_eq!(flow.exchange()?, Outcome::TimedOut, "{what}: dropped");
            lab.node.nft("delete table inet test")?;
            assert!(eventually(LIMIT, || flow.alive().unwrap_or(false)), "{what}: comes back");
            drop(server);
            assert_eq!(flow.exchange()?, Outcome::Refused, "{what}: the server is gone");
        }
    }
    assert!(Flow::open(&lab.peer, (lab.pods[0].v4, 1), Protocol::Sctp).is_err());
    Ok(())
}

#[test]
fn laboratories_do_not_see_each_other() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let labs = [Lab::new(0)?, Lab::new(0)?];
    for (lab, name) in labs.iter().zip(["first", "second"]) {
        let _server = Server::start(&lab.node, name, Protocol::Tcp, 8080)?;
        for other in &labs {
            let outcome = probe(&other.allowed, (other.node.v4, 8080), Protocol::Tcp)?;
            let expected = std::ptr::eq(lab, other).then_some(name);
            assert_eq!(outcome.by(), expected);
        }
    }
    Ok(())
}

#[test]
fn commands_run_inside() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    assert!(lab.node.run(&["ip", "-o", "addr"])?.contains("192.168.77.1/24"));
    assert_eq!(lab.node.sysctl("net.ipv4.ip_forward")?, "1");
    assert_eq!(lab.allowed.sysctl("net.ipv4.ip_forward")?, "0");
    let error = format!("{:#}", lab.node.nft("nonsense").unwrap_err());
    assert!(error.contains("in node: `nft -f -` failed") && error.contains("syntax error"));
    assert!(lab.node.run(&["no-such-program"]).is_err());
    let mut command = Command::new("sh");
    command.args(["-c", "echo out; echo err >&2; exit 3"]);
    let output = lab.node.output(command)?;
    assert_eq!(
        (output.status.code(), &*output.stdout, &*output.stderr),
        (Some(3), &b"out\n"[..], &b"err\n"[..])
    );
    // More than a pipe holds, both ways.
    let long = "x".repeat(1 << 20);
    assert_eq!(lab.node.run_with_input(&["cat"], &long)?, long);
    let local = lab.node.block_on(async {
        let socket = tokio::net::UdpSocket::bind("192.168.77.1:0").await?;
        socket.local_addr()
    })?;
    assert_eq!(local.ip(), lab.node.v4);
    Ok(())
}

#[test]
fn processes_are_watched_and_ended() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let sh = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("WORD", "hello");
        lab.spawn(&command, "script")
    };
    let mut process =
        sh("echo $WORD; echo trouble >&2; trap 'exit 7' TERM; while :; do sleep 0.01; done")?;
    process.wait_for_output("trouble", LIMIT)?;
    assert_eq!(process.stdout(), "hello\n");
    assert!(process.is_running());
    assert_eq!(process.terminate(LIMIT)?.code(), Some(7));
    let mut process = sh("exit 0")?;
    // That is what the one before wrote.
    assert!(process.wait_for_output("trouble", LIMIT).is_err());
    assert_eq!(process.stdout(), "");
    assert!(process.wait(LIMIT)?.success());
    let process = sh("exec sleep 300")?;
    let pid = process.pid().as_raw();
    assert!(is_alive(pid));
    process.kill()?;
    assert!(!is_alive(pid));
    Ok(())
}

#[test]
fn the_program_under_test_runs_inside() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let output = lab.node.output(binary::command(["--help"])?)?;
    assert!(output.status.success(), "{output:?}");
    Ok(())
}

#[test]
fn http_is_asked_inside() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let lab = Lab::new(0)?;
    let listener = lab.node.enter(|| TcpListener::bind((lab.node.v4, 8080)))?;
    let server = thread::spawn(move || -> std::io::Result<String> {
        let (mut stream, _) = listener.accept()?;
        let mut request = [0; 1024];
        let length = stream.read(&mut request)?;
        stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nhello")?;
        Ok(String::from_utf8_lossy(&request[..length]).into_owned())
    });
    let response = http_get(&lab.allowed, (lab.node.v4, 8080), "/healthz")?;
    assert_eq!((response.status, &*response.body), (200, "hello"));
    assert_eq!(response.headers["content-type"], "text/plain");
    let request = server.join().expect("the server's thread")?;
    assert!(request.starts_with("GET /healthz HTTP/1.0\r\n"), "{request}");
    assert!(http_get(&lab.allowed, (lab.node.v4, 8081), "/").is_err());
    Ok(())
}

/// Runs a test of this file without the programs that it needs.
fn run_without_programs(ci: Option<&str>) -> Result<Output> {
    let mut test = Command::new(std::env::current_exe()?);
    test.args(["--exact", "commands_run_inside"]).env("PATH", "/nonexistent").env_remove("CI");
    test.envs(ci.map(|value| ("CI", value)));
    Ok(test.output()?)
}

#[test]
fn what_cannot_run_is_skipped_or_fails() -> Result<()> {
    for ci in [None, Some("false"), Some("")] {
        let output = run_without_programs(ci)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{output:?}");
        assert!(stderr.starts_with("SKIPPED commands_run_inside: "), "{stderr}");
    }
    let output = run_without_programs(Some("true"))?;
    assert!(!output.status.success(), "skipped with CI=true: {output:?}");
    Ok(())
}

#[test]
fn a_panic_leaves_nothing_behind() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut left = None;
    let result = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new(1).expect("a laboratory");
        let process = lab.spawn(Command::new("sleep").arg("300"), "sleep").expect("a process");
        left = Some((process.pid().as_raw(), lab.directory().to_owned()));
        panic!("on purpose");
    }));
    assert!(result.is_err());
    let (pid, directory) = left.context("the closure did not get far")?;
    assert!(!is_alive(pid));
    assert!(!directory.exists());
    Ok(())
}

#[test]
fn a_killed_run_leaves_nothing_behind() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut victim = Command::new(std::env::current_exe()?)
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(victim.stdout.take().context("no stdout")?).lines();
    let line = lines
        .find_map(|line| line.ok()?.split_once("left behind: ").map(|(_, rest)| rest.to_owned()))
        .context("the victim did not get far")?;
    let (pid, directory) = line.split_once(' ').context("not a pid and a directory")?;
    let (pid, directory) = (pid.parse()?, Path::new(directory));
    assert!(is_alive(pid) && directory.exists());
    victim.kill()?;
    victim.wait()?;
    assert!(eventually(LIMIT, || !is_alive(pid)), "process {pid} lives");
    assert!(eventually(LIMIT, || !directory.exists()), "{} is there", directory.display());
    Ok(())
}

const VICTIM: &str = "PORTCULLIS_TEST_VICTIM";

/// Is killed by the test above.
#[test]
#[ignore = "run by a_killed_run_leaves_nothing_behind"]
fn victim() -> Result<()> {
    if std::env::var_os(VICTIM).is_none() {
        return Ok(());
    }
    let lab = Lab::new(1)?;
    let process = lab.spawn(Command::new("sleep").arg("300"), "sleep")?;
    let base = lab.directory().parent().context("no parent")?;
    println!("left behind: {} {}", process.pid(), base.display());
    thread::sleep(Duration::from_secs(60));
    Ok(())
}

/// Whether a process exists and is no zombie.
fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
