//! Who may write, list and listen.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use portcullis::model::Family;
use portcullis::netlink::{Batch, Element, Error, Listener, Socket, TableFlags};
use portcullis_integration::lab::eventually;

use super::{LIMIT, TABLE, World, add_chain, add_numbers, commit, key, numbers};

/// A table of one owner: others may not even touch it, and it stays when the owner goes.
#[test]
fn an_owned_table_is_left_alone_by_others() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(|batch| {
        batch.add_table(TableFlags::OWNED, None);
        add_chain(batch, "chain");
    })?;
    let mut second =
        World { namespace: world.namespace.clone(), socket: world.namespace.enter(Socket::open)? };
    let adopt = |batch: &mut Batch| batch.add_table(TableFlags::OWNED, None);
    for write in [adopt as fn(&mut Batch), |batch| add_chain(batch, "new"), Batch::delete_table] {
        let refusals = second.refusals(write)?;
        ensure!(refusals.len() == 1, "{refusals:?}");
        ensure!(refusals[0].error.raw_os_error() == Some(Errno::EPERM as i32), "{refusals:?}");
    }
    ensure!(second.dump()?.flags == TableFlags::OWNED);
    let before = world.dump()?;
    world.namespace.run(&["nft", "flush", "ruleset"])?;
    ensure!(world.dump()? == before, "flushed");

    drop(world);
    // A process that another test is about to start may hold the socket for a moment.
    ensure!(eventually(LIMIT, || second.dump().is_ok_and(|d| d.flags == TableFlags::ORPHANED)));
    second.commit(adopt)?;
    ensure!(second.dump()? == before);
    Ok(())
}

/// Runs an ignored test of this file in a process with less rights.
fn run_with(launcher: &[&str], test: &str) -> Result<()> {
    let Some(world) = World::new()? else { return Ok(()) };
    let mut command = Command::new(launcher[0]);
    command.args(&launcher[1..]).arg(std::env::current_exe()?);
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(CHILD, "1");
    let output = world.namespace.output(command)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

const CHILD: &str = "PORTCULLIS_TEST_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn without_the_right_nothing_is_done_and_the_error_says_so() -> Result<()> {
    let launcher = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    run_with(&launcher, "rights::without_cap_net_admin")
}

#[test]
#[ignore = "run without CAP_NET_ADMIN by another test"]
fn without_cap_net_admin() -> Result<()> {
    if !is_child() {
        return Ok(());
    }
    let mut socket = Socket::open()?;
    let errors = [
        ("list", socket.dump_table(TABLE).map(drop)),
        ("flows", socket.delete_flows(Family::V4, |_| true).map(drop)),
        ("log", Listener::open(1).map(drop)),
    ];
    for (what, result) in errors {
        let Err(Error::List { source, .. }) = &result else { bail!("{what}: {result:?}") };
        ensure!(source.raw_os_error() == Some(Errno::EPERM as i32), "{what}: {source}");
    }
    let result = commit(&mut socket, |batch| batch.add_table(TableFlags::NONE, None));
    let Err(Error::Refused(refusals)) = &result else { bail!("commit: {result:?}") };
    ensure!(refusals.len() == 1, "{refusals:?}");
    ensure!(refusals[0].error.raw_os_error() == Some(Errno::EPERM as i32), "{refusals:?}");
    ensure!(refusals[0].tag.is_none(), "{refusals:?}");
    Ok(())
}

/// Root of a user namespace may write the ruleset but not exceed the limits on socket buffers.
#[test]
fn small_socket_buffers() -> Result<()> {
    run_with(&["unshare", "--user", "--map-root-user", "--net"], "rights::in_a_user_namespace")
}

#[test]
#[ignore = "run in a user namespace by another test"]
fn in_a_user_namespace() -> Result<()> {
    if !is_child() {
        return Ok(());
    }
    let mut socket = Socket::open()?;
    commit(&mut socket, |batch| {
        batch.add_table(TableFlags::NONE, None);
        batch.add_set(&numbers("a"));
        add_numbers(batch, "a", 0..1000);
    })?;
    let result = commit(&mut socket, |batch| {
        let comment = "x".repeat(127);
        for number in 1000..100_000 {
            let comment = Some(&*comment);
            batch.add_element("a", &Element { comment, ..Element::key(&key(number)) });
        }
    });
    ensure!(matches!(result, Err(Error::Send(_))), "{result:?}");
    let refused = commit(&mut socket, |batch| {
        for _ in 0..3000 {
            batch.add_set(&numbers("a"));
        }
    });
    ensure!(matches!(refused, Err(Error::Refused(_))), "{:?}", refused.map_err(|e| e.to_string()));
    commit(&mut socket, |batch| add_numbers(batch, "a", 1000..1001))?;
    let dump = socket.dump_table(TABLE)?.context("no table")?;
    let keys: BTreeSet<_> = dump.sets["a"].elements.iter().map(|e| e.key.clone()).collect();
    ensure!(keys == (0..1001).map(|number| key(number).to_vec()).collect());
    Ok(())
}
