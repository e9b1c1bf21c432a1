//! Kernels without owners of tables: somebody changes the table while a daemon lives.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::netlink::{Batch, Element, Socket, TableFlags};
use portcullis::ruleset::TABLE;
use portcullis_integration::services::Sketch;

use super::{Daemon, Machine, fresh, too_long, web};

fn services() -> Vec<Sketch> {
    vec![web(1, &[1, 2]), web(2, &[3]).allow("192.0.2.0/24"), web(3, &[])]
}

/// A daemon with a plain table.
fn plain(machine: &Machine) -> Result<Daemon> {
    let mut daemon = machine.daemon_without_owner()?;
    daemon.adopt(&services())?;
    Ok(daemon)
}

#[test]
fn a_plain_table_works_like_any_other() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let mut daemon = plain(&machine)?;
    ensure!(machine.dump()?.flags == TableFlags::NONE);
    machine.state()?.expect(&fresh(&services())?)?;
    assert!(daemon.commit(&[web(1, &[2]), web(4, &[4])]).is_empty());
    let now = [&[web(1, &[2]), web(4, &[4])], &services()[1..]].concat();
    machine.state()?.expect(&fresh(&now)?)?;

    // The next daemon of such a kernel has nothing to do.
    drop(daemon);
    let mut daemon = machine.daemon_without_owner()?;
    let adoption = daemon.adopt(&now)?;
    assert!(adoption.found && !adoption.replaced && adoption.operations == 0, "{adoption:?}");
    ensure!(machine.dump()?.flags == TableFlags::NONE);
    Ok(())
}

#[test]
fn a_kernel_that_learned_about_owners_gets_an_owned_table() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    drop(plain(&machine)?);
    let before = machine.generation()?;
    let (_daemon, adoption) = machine.adopted(&services())?;
    ensure!(adoption.found, "{adoption:?}");
    // One asks the kernel, the other replaces the table.
    ensure!(machine.generation()? == before + 2, "a moment without rules");
    ensure!(machine.dump()?.flags == TableFlags::OWNED, "anybody may change the table");
    machine.state()?.expect(&fresh(&services())?)
}

#[test]
fn a_daemon_without_owners_adopts_an_orphan() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (daemon, _) = machine.adopted(&services())?;
    machine.end(daemon)?;
    let mut daemon = plain(&machine)?;
    assert!(daemon.commit(&[web(1, &[2])]).is_empty());
    machine.state()?.expect(&fresh(&[&[web(1, &[2])], &services()[1..]].concat())?)
}

#[test]
fn a_change_that_meets_a_surprise_puts_everything_right() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let surprises = [
        ("the table is gone", "delete table inet portcullis", vec![web(4, &[1])]),
        ("everything is gone", "flush ruleset", vec![web(1, &[1])]),
        (
            "an element to be deleted is gone",
            "delete element inet portcullis service-ips4-over-2 { 10.96.0.1 . tcp . 80 }",
            vec![web(1, &[1])],
        ),
        (
            "an element to be added is there",
            "add element inet portcullis cluster-ips4 { 10.96.0.4 }",
            vec![web(4, &[1])],
        ),
        (
            "a chain to be added is there",
            "add chain inet portcullis nodeport4-over-4",
            vec![web(1, &[1, 2, 3, 4])],
        ),
        (
            "a chain to be deleted is gone",
            "flush chain inet portcullis fw-shop/web-2
            delete element inet portcullis nodeport-firewall { tcp . 30002 }
            delete chain inet portcullis fw-shop/web-2",
            vec![web(2, &[3])],
        ),
        (
            "a chain to be deleted is jumped to",
            "insert rule inet portcullis services ip daddr 10.96.9.9 jump nodeport4-over-2",
            vec![web(1, &[1])],
        ),
        (
            "a set to be deleted is used",
            "insert rule inet portcullis services ip saddr @allow4-shop/web-2 accept",
            vec![web(2, &[3])],
        ),
    ];
    for (name, script, change) in surprises {
        let mut daemon = plain(&machine)?;
        machine.nft(&script.replace("\n            ", "\n")).context(name)?;
        let refused = daemon.commit(&change);
        ensure!(refused.is_empty(), "{name}: {refused:?}");
        let changed = |service: &Sketch| change.iter().find(|c| c.name() == service.name());
        let mut now: Vec<Sketch> =
            services().iter().map(|s| changed(s).unwrap_or(s).clone()).collect();
        now.extend(
            change.iter().filter(|c| services().iter().all(|s| s.name() != c.name())).cloned(),
        );
        machine.state()?.expect(&fresh(&now)?).context(name)?;
        // The daemon knows what the kernel holds now.
        assert!(daemon.commit(&services()).is_empty(), "{name}");
        assert!(daemon.delete(&web(4, &[])).is_empty(), "{name}");
        machine.state()?.expect(&fresh(&services())?).context(name)?;
        machine.nft("delete table inet portcullis")?;
    }
    Ok(())
}

/// Without a change that meets it, too, as soon as the daemon looks.
#[test]
fn what_others_changed_is_found_by_looking() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let mut daemon = plain(&machine)?;
    let whole = machine.state()?;
    let mut daemon_looks = |name: &str, transactions: usize| -> Result<()> {
        let before = daemon.worker.totals().transactions;
        daemon.worker.look_after();
        let made = daemon.worker.totals().transactions - before;
        ensure!(made == transactions, "{name}: {made} transactions");
        machine.state()?.expect(&whole).context(name.to_owned())
    };
    daemon_looks("nothing happened", 0)?;
    for (name, script, transactions) in [
        ("everything is gone", "flush ruleset", 1),
        ("the table is gone", "delete table inet portcullis", 1),
        ("a base chain is empty", "flush chain inet portcullis firewall-prerouting", 1),
        ("a source was let in", "add element inet portcullis allow4-shop/web-2 { 203.0.113.1 }", 1),
        ("another table came", "add table inet other", 0),
    ] {
        machine.nft(script)?;
        daemon_looks(name, transactions)?;
        daemon_looks("nothing happened since", 0)?;
    }
    // Its own transactions are no news, and what others do between them is.
    for change in [web(1, &[7]), web(1, &[1, 2])] {
        assert!(daemon.commit(&[change]).is_empty());
    }
    machine.nft("flush chain inet portcullis nat-prerouting")?;
    assert!(daemon.commit(&[web(3, &[])]).is_empty());
    daemon.worker.look_after();
    machine.state()?.expect(&whole)
}

/// A takeover that fails leaves a daemon that does not know what the kernel holds.
#[test]
fn what_was_not_taken_over_is_taken_over_later() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let mut daemon = plain(&machine)?;
    // Somebody puts a table of his own in its place, which nobody else may change.
    let mut rival = machine.namespace.enter(Socket::open)?;
    let mut batch = Batch::new(TABLE);
    batch.delete_table();
    batch.add_table(TableFlags(TableFlags::OWNED.0 & !TableFlags::ORPHANED.0), None);
    rival.commit(batch)?;
    let new = web(4, &[4]);
    assert_eq!(daemon.commit(std::slice::from_ref(&new)).len(), 1);
    ensure!(daemon.last_report(&new)?.refused.is_some());

    // The table comes back without something that no change of the daemon's touches.
    let mut batch = Batch::new(TABLE);
    batch.delete_table();
    rival.commit(batch)?;
    drop(plain(&machine)?);
    machine.nft("delete element inet portcullis service-ips4-over-2 { 10.96.0.1 . tcp . 80 }")?;
    assert!(daemon.commit(std::slice::from_ref(&new)).is_empty());
    machine.state()?.expect(&fresh(&[services(), vec![new]].concat())?)
}

/// Taking the table over anew concerns Services that the change did not name.
#[test]
fn whoever_gains_or_loses_by_a_surprise_is_told() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let mut daemon = machine.daemon_without_owner()?;
    daemon.adopt(&[web(1, &[1]), too_long(1)])?;
    // A set with a name that one of ours will have, in the way of a Service.
    machine.nft("add set inet portcullis allow4-shop/web-2 { type ipv4_addr; }")?;
    let guilty = too_long(1).allow("10.0.0.0/8");
    assert_eq!(daemon.commit(std::slice::from_ref(&guilty)).len(), 1);
    ensure!(daemon.last_report(&guilty)?.refused.is_some());
    machine.nft("delete table inet portcullis")?;
    // Still refused after the surprise, and it is said of it and of nobody else.
    assert!(daemon.commit(&[web(3, &[1])]).is_empty());
    ensure!(daemon.worker.has_refused());
    ensure!(daemon.last_report(&guilty)?.refused.is_some());
    ensure!(daemon.last_report(&web(1, &[]))?.refused.is_none());
    machine.state()?.expect(&fresh(&[web(1, &[1]), web(3, &[1])])?)?;
    // What it asked for in the end is possible.
    assert!(daemon.commit(&[too_long(1)]).is_empty());
    machine.state()?.expect(&fresh(&[web(1, &[1]), web(3, &[1]), too_long(1)])?)
}

/// The table may change between its listing and the transaction that follows.
#[test]
fn nobody_is_blamed_for_what_somebody_else_does_meanwhile() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    drop(plain(&machine)?);
    let mut socket = machine.namespace.enter(Socket::open)?;
    let mut write = |add: bool| {
        let element = Element::key(&[10, 96, 0, 99]);
        let mut batch = Batch::new(TABLE);
        if add {
            batch.add_element("cluster-ips4", &element);
        } else {
            batch.delete_element("cluster-ips4", &element);
        }
        // The daemon may have been faster.
        let _ = socket.commit(batch);
    };
    for round in 0..60 {
        let mut daemon = machine.daemon_without_owner()?;
        thread::scope(|scope| {
            // Fewer changes than the daemon is patient, at another moment in each round.
            scope.spawn(|| {
                for add in [true, false, true, false] {
                    write(add);
                    thread::sleep(Duration::from_micros(200 + 40 * round));
                }
            });
            daemon.adopt(&services())
        })?;
        ensure!(!daemon.worker.has_refused(), "{:?}", daemon.worker);
    }
    Ok(())
}
