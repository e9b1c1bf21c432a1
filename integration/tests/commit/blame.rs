//! Services that the kernel refuses, and all others; Services that claim the same.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use portcullis::commit::{Report, Worker};
use portcullis::model::Diagnostic;
use portcullis_integration::services::Sketch;

use super::{Machine, NODE_PORTS_AT, State, errno, fresh, node, too_long, web};

/// A firewall whose chain's name the kernel does not take.
fn guilty(number: u8) -> Sketch {
    too_long(number).allow("192.0.2.0/24")
}

#[test]
fn the_guilty_is_refused_and_all_others_are_served() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (mut daemon, _) = machine.adopted(&[])?;
    let mut services: Vec<Sketch> = (1..=20).map(|number| web(number, &[number])).collect();
    let good = services.clone();
    services.insert(7, guilty(1));

    let refused = daemon.commit(&services);
    let name = format!("Service {}", guilty(1).name());
    assert_eq!(refused.keys().collect::<Vec<_>>(), [&name]);
    let error = &refused[&name];
    assert_eq!(errno(error), Some(Errno::ERANGE as i32));
    let chain = format!("chain fw-{}", guilty(1).name());
    assert!(error.to_string().contains(&chain), "{error}");
    machine.state()?.expect(&fresh(&good)?)?;
    assert!(daemon.last_report(&guilty(1))?.refused.is_some());
    assert!(daemon.last_report(&good[0])?.refused.is_none());
    assert!(daemon.worker.has_refused());

    // Still guilty when tried again, and no reason to refuse another.
    daemon.worker.retry_refused();
    assert!(daemon.worker.has_refused());
    machine.state()?.expect(&fresh(&good)?)?;
    assert!(daemon.commit(&[web(21, &[1])]).is_empty());

    // A good version of the same Service works.
    assert!(daemon.commit(&[too_long(1)]).is_empty());
    assert!(!daemon.worker.has_refused());
    assert!(daemon.last_report(&guilty(1))?.refused.is_none());
    let all = [good, vec![web(21, &[1]), too_long(1)]].concat();
    machine.state()?.expect(&fresh(&all)?)
}

#[test]
fn what_was_in_force_of_the_guilty_stays_so() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (mut daemon, _) = machine.adopted(&[too_long(1), web(1, &[1])])?;
    let refused = daemon.commit(&[guilty(1).to(&["10.244.9.9"]), web(1, &[1, 2])]);
    assert_eq!(refused.len(), 1, "{refused:?}");
    machine.state()?.expect(&fresh(&[too_long(1), web(1, &[1, 2])])?)?;
    // It goes like any other.
    assert!(daemon.delete(&guilty(1)).is_empty());
    assert!(!daemon.worker.has_refused());
    machine.state()?.expect(&fresh(&[web(1, &[1, 2])])?)
}

#[test]
fn several_guilty_among_many() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let good: Vec<Sketch> = (1..=60).map(|n| web(n, &[n % 5]).allow("10.0.0.0/8")).collect();
    let mut services = good.clone();
    for number in 1..=7 {
        services.insert(usize::from(number) * 8, guilty(number));
    }
    let check = |refused: Vec<String>| {
        assert_eq!(refused.len(), 7, "{refused:?}");
        assert!(refused.iter().all(|name| name.contains("xxxxxxxx")), "{refused:?}");
    };
    let (mut daemon, _) = machine.adopted(&[])?;
    let before = machine.generation()?;
    check(daemon.commit(&services).into_keys().collect());
    // The kernel names all of them at once.
    assert_eq!(machine.generation()?, before + 1);
    machine.state()?.expect(&fresh(&good)?)?;
    machine.end(daemon)?;

    // The same when a daemon starts, with a table and without one.
    for fresh_start in [false, true] {
        if fresh_start {
            machine.nft("delete table inet portcullis")?;
        }
        let (daemon, adoption) = machine.adopted(&services)?;
        assert_eq!((adoption.found, adoption.replaced), (!fresh_start, fresh_start));
        let names: Vec<String> = services
            .iter()
            .filter(|service| daemon.last_report(service).is_ok_and(|r| r.refused.is_some()))
            .map(|service| service.name().to_string())
            .collect();
        check(names);
        machine.state()?.expect(&fresh(&good)?)?;
        machine.end(daemon)?;
    }
    Ok(())
}

#[test]
fn the_guilty_that_holds_what_another_gets() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    // The older Service would give up its node port, but its new version is refused.
    let (mut daemon, _) = machine.adopted(&[too_long(1).created(1)])?;
    let younger = web(1, &[1]).created(2).port("taken", super::Tcp, 81, 31001);
    assert!(daemon.commit(std::slice::from_ref(&younger)).is_empty());
    let without = service_without_port(&guilty(1).created(1));
    let refused = daemon.commit(std::slice::from_ref(&without));
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused.keys().all(|name| name.contains("xxxxxxxx")), "{refused:?}");
    assert!(daemon.last_report(&younger)?.refused.is_none());
    // Whatever is in force, it is consistent and ends well.
    assert!(daemon.delete(&without).is_empty());
    machine.state()?.expect(&fresh(&[younger])?)
}

/// The same Service with another node port.
fn service_without_port(sketch: &Sketch) -> Sketch {
    let name = sketch.name().to_string();
    super::service(&name)
        .created(1)
        .at("10.96.1.1")
        .port("http", super::Tcp, 80, 31099)
        .to(&["10.244.1.1"])
        .allow("192.0.2.0/24")
}

#[test]
fn a_node_port_belongs_to_the_older() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let older = |allowed: &str| web(1, &[1]).created(1).allow(allowed);
    // The younger wants the same node port with another firewall.
    let younger = web(2, &[2]).created(2).port("same", super::Tcp, 81, 30001).allow("0.0.0.0/0");
    let (mut daemon, _) = machine.adopted(&[])?;
    assert!(daemon.commit(std::slice::from_ref(&younger)).is_empty());
    assert!(diagnostics(&daemon.last_report(&younger)?).is_empty());

    // It loses it at once when the older comes.
    assert!(daemon.commit(&[older("192.0.2.0/24")]).is_empty());
    machine.state()?.expect(&fresh(&[older("192.0.2.0/24"), younger.clone()])?)?;
    let told = diagnostics(&daemon.last_report(&younger)?);
    assert!(told.iter().any(|d| d.to_string().contains("shop/web-1")), "{told:?}");
    let owner = |machine: &Machine| -> Result<String> {
        let listing = machine.namespace.run(&["nft", "list", "table", "inet", "portcullis"])?;
        let firewall = listing.split("tcp . 30001 comment \"").nth(1).context("no such port")?;
        Ok(firewall.split('"').next().unwrap_or_default().to_owned())
    };
    assert_eq!(owner(&machine)?, "shop/web-1:http");

    // And has it again when the older goes.
    assert!(daemon.delete(&older("")).is_empty());
    assert_eq!(owner(&machine)?, "shop/web-2:same");
    assert!(diagnostics(&daemon.last_report(&younger)?).is_empty());
    machine.state()?.expect(&fresh(&[younger])?)
}

/// A kernel that does not take the chains which everybody shares refuses nobody in particular.
#[test]
fn no_service_is_blamed_for_the_layout() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    // As many as one hook has place for (MAX_HOOK_COUNT).
    let hook = "type filter hook prerouting priority 0;";
    let chains: Vec<String> = (0..1024).map(|n| format!("chain c{n} {{ {hook} }};")).collect();
    machine.nft(&format!("table inet full {{ {} }}", chains.join(" ")))?;
    let services: Vec<Sketch> = (1..=50).map(|number| web(number, &[number])).collect();
    let mut daemon = machine.daemon()?;
    let error = daemon.adopt(&services).err().context("the kernel took it")?;
    ensure!(errno(&error) == Some(Errno::E2BIG as i32), "{error:?}");
    ensure!(error.to_string().contains("chain firewall-prerouting"), "{error}");
    ensure!(daemon.worker.totals().refused == 1, "{:?}", daemon.worker.totals());
    // The same daemon succeeds as soon as there is place.
    machine.nft("delete table inet full")?;
    daemon.adopt(&services)?;
    machine.state()?.expect(&fresh(&services)?)
}

const CHILD: &str = "PORTCULLIS_TEST_CHILD";

/// Root of a user namespace cannot send a batch of more bytes than the limit on socket buffers, and
/// the kernel names nobody for it: the batch is sent in parts.
#[test]
fn a_batch_that_is_too_large_is_sent_in_parts() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net"]).arg(std::env::current_exe()?);
    command.args(["--exact", "blame::in_a_user_namespace", "--ignored", "--nocapture"]);
    let output = machine.namespace.output({
        command.env(CHILD, "1");
        command
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
    Ok(())
}

#[test]
#[ignore = "run in a user namespace by another test"]
fn in_a_user_namespace() -> Result<()> {
    if std::env::var_os(CHILD).is_none() {
        return Ok(());
    }
    let addresses: Vec<String> =
        (0..200).flat_map(|a| (0..125).map(move |b| format!("10.244.{a}.{b}"))).collect();
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    // 20 x 5,000 endpoints at a ClusterIP and a node port: 13 MB.
    let services: Vec<Sketch> =
        (0..20).map(|n| web(n, &[]).to(&addresses[usize::from(n % 5) * 5000..][..5000])).collect();
    let mut worker = Worker::open(|_| {})?;
    let node = node(NODE_PORTS_AT)?;
    let adoption = worker.adopt(&node, services.iter().map(Sketch::plan).collect())?;
    ensure!(adoption.replaced && !worker.has_refused(), "{adoption:?} {worker:?}");
    let mut socket = portcullis::netlink::Socket::open()?;
    let state = State::of(socket.dump_table(super::TABLE)?.context("no table")?);
    for set in ["endpoints4", "nodeport-endpoints4"] {
        ensure!(state.sets[set].len() == 100_000, "{} elements in {set}", state.sets[set].len());
    }
    ensure!(worker.totals().transactions > 2, "{:?}", worker.totals());
    // Adopted once more there is nothing to do.
    let adoption = worker.adopt(&node, services.iter().map(Sketch::plan).collect())?;
    ensure!(adoption.operations == 0, "{adoption:?}");
    Ok(())
}

/// What is wrong with a Service, whatever the kernel says.
fn diagnostics(report: &Report) -> Vec<Diagnostic> {
    report.plan.iter().flat_map(|plan| plan.diagnostics.clone()).collect()
}
