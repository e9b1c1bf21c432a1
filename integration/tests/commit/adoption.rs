//! The first commit, and that of a daemon that comes after another.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use portcullis::netlink::{Batch, Chain, Socket, TableFlags};
use portcullis::ruleset::TABLE;
use portcullis_integration::services::Sketch;

use super::{Machine, errno, fresh, web};

fn services() -> Vec<Sketch> {
    vec![
        web(1, &[1, 2, 3]),
        web(2, &[]).allow("192.0.2.0/24, 2001:db8::/32"),
        web(3, &[3]).closed(),
    ]
}

#[test]
fn an_empty_kernel_is_laid_out_at_once() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let before = machine.generation()?;
    let (mut daemon, adoption) = machine.adopted(&services())?;
    assert!(!adoption.found && adoption.replaced && adoption.operations > 0, "{adoption:?}");
    assert_eq!(machine.generation()?, before + 1);
    assert_eq!(machine.dump()?.flags, TableFlags::OWNED);
    machine.namespace.run(&["nft", "-j", "list", "ruleset"])?;

    let adoption = daemon.adopt(&services())?;
    assert!(adoption.found && !adoption.replaced && adoption.operations == 0, "{adoption:?}");
    for service in services() {
        assert!(daemon.last_report(&service)?.refused.is_none());
    }
    Ok(())
}

#[test]
fn a_restart_changes_nothing() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (mut daemon, _) = machine.adopted(&services())?;
    // Slots are now in another order than the endpoints' own.
    for endpoints in [&[1, 2, 3, 4, 5][..], &[2, 3, 4, 5], &[5, 2, 3, 9], &[9, 3]] {
        assert!(daemon.commit(&[web(1, endpoints)]).is_empty());
    }
    machine.end(daemon)?;
    let mut last = services();
    last[0] = web(1, &[3, 9]);
    let before = machine.dump()?;
    let (_daemon, adoption) = machine.adopted(&last)?;
    assert!(adoption.found && !adoption.replaced && adoption.operations == 0, "{adoption:?}");
    let after = machine.dump()?;
    assert_eq!(after.flags, TableFlags::OWNED);
    assert!(after.chains == before.chains && after.sets == before.sets);
    Ok(())
}

#[test]
fn a_restart_changes_what_is_new() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (daemon, _) = machine.adopted(&services())?;
    machine.end(daemon)?;
    let others = [
        web(1, &[1, 3]),
        web(2, &[7]).allow("192.0.2.0/25"),
        web(4, &[3]).closed(),
        web(5, &[1, 2, 3, 4]).allow("::/0"),
    ];
    let before = machine.generation()?;
    let (_daemon, adoption) = machine.adopted(&others)?;
    assert!(adoption.found && !adoption.replaced && adoption.operations > 0, "{adoption:?}");
    assert_eq!(machine.generation()?, before + 1);
    machine.state()?.expect(&fresh(&others)?)
}

#[test]
fn a_second_daemon_is_refused_while_the_first_lives() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (first, _) = machine.adopted(&services())?;
    let before = machine.dump()?;
    // Whether it would change something or not.
    for plans in [services(), vec![web(1, &[1])], Vec::new()] {
        let mut second = machine.daemon()?;
        let error = second.adopt(&plans).err().context("the second daemon adopted the table")?;
        ensure!(errno(&error) == Some(Errno::EPERM as i32), "{error:?}");
        ensure!(machine.dump()? == before, "the second daemon changed something");
    }
    machine.end(first)?;
    let (_second, adoption) = machine.adopted(&[web(1, &[1])])?;
    assert!(adoption.found && !adoption.replaced, "{adoption:?}");
    assert_eq!(machine.dump()?.flags, TableFlags::OWNED);
    machine.state()?.expect(&fresh(&[web(1, &[1])])?)
}

#[test]
fn another_version_is_replaced_in_one_transaction() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    for flags in [TableFlags::NONE, TableFlags::OWNED] {
        for comment in [Some("portcullis: layout 0123456789abcdef"), Some("mine"), None] {
            let mut socket = machine.namespace.enter(Socket::open)?;
            let mut batch = Batch::new(TABLE);
            batch.add_table(flags, comment);
            for name in ["services", "old"] {
                batch.add_chain(&Chain { name, hooked: None, comment: None });
            }
            socket.commit(batch)?;
            drop(socket);
            ensure!(super::eventually(super::LIMIT, || {
                machine.dump().is_ok_and(|dump| !dump.flags.is_owned())
            }));
            let before = machine.generation()?;
            let (daemon, adoption) = machine.adopted(&services())?;
            assert!(adoption.found && adoption.replaced, "{adoption:?}");
            assert_eq!(machine.generation()?, before + 1);
            assert_eq!(machine.dump()?.flags, TableFlags::OWNED);
            machine.state()?.expect(&fresh(&services())?)?;
            machine.end(daemon)?;
            machine.nft("delete table inet portcullis")?;
        }
    }
    Ok(())
}

#[test]
fn a_flush_by_nft_does_not_touch_the_table() -> Result<()> {
    let Some(machine) = Machine::new()? else { return Ok(()) };
    let (mut daemon, _) = machine.adopted(&services())?;
    machine.nft("table inet other { chain one { counter; }; }")?;
    let before = machine.dump()?;
    machine.nft("flush ruleset")?;
    ensure!(!machine.namespace.run(&["nft", "list", "tables"])?.contains("other"), "not flushed");
    ensure!(machine.dump()? == before, "the table changed");
    assert!(daemon.commit(&[web(1, &[1])]).is_empty());
    Ok(())
}
