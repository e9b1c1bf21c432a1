//! `portcullis cleanup`

use anyhow::{Context, bail};
use portcullis::netlink::{Batch, Error, Socket};
use portcullis::ruleset::{SetName, TABLE};
use portcullis::sysctl;
use portcullis::takeover::{self, Outcome};

use super::arguments::CleanupOptions;
use super::kernel::explain;
use super::logs::say;
use super::{Verdict, print};

/// Deletes the table with everything in it. Connections that are open through Service addresses end
/// with it, unless another table has chains of type nat: the kernel translates packets only while
/// there are any.
pub fn cleanup(options: &CleanupOptions) -> anyhow::Result<Verdict> {
    if options.kube_proxy { kube_proxys() } else { ours() }
}

fn ours() -> anyhow::Result<Verdict> {
    let mut socket = Socket::open().map_err(explain)?;
    if !is_there(&mut socket)? {
        print(&format!("table inet {TABLE}: not there, nothing to remove\n"))?;
        return Ok(Verdict::Fine);
    }
    let had_localhost = serves_localhost(&mut socket)?;
    let mut batch = Batch::new(TABLE);
    batch.delete_table();
    match socket.commit(batch) {
        Ok(()) => print(&format!("table inet {TABLE}: removed\n"))?,
        Err(Error::Refused(refusals))
            if refusals.iter().any(|r| r.error.raw_os_error() == Some(nix::libc::EPERM)) =>
        {
            bail!(
                "table inet {TABLE} belongs to a portcullis that is running, or this process is \
                 not root (CAP_NET_ADMIN): end the daemon first"
            );
        }
        Err(error) => return Err(explain(error)),
    }
    if had_localhost {
        sysctl::forbid_route_localnet().context("set net.ipv4.conf.all.route_localnet back")?;
        print("net.ipv4.conf.all.route_localnet: set back to 0\n")?;
    } else if sysctl::allows_route_localnet() {
        // Somebody else may need it, or it is from an earlier run of ours.
        say(
            "net.ipv4.conf.all.route_localnet is 1: unless other rules prevent it, neighbours on the \
             link reach what listens on loopback addresses of this node; 0 is the kernel's default",
        );
    }
    Ok(Verdict::Fine)
}

/// Whether node ports are served at loopback addresses, which takes a setting of the kernel that lets
/// others in where the table does not keep them out.
fn serves_localhost(socket: &mut Socket) -> anyhow::Result<bool> {
    let set = SetName::LocalhostIps.name();
    let listed = socket.at_one_moment(|socket| socket.list_table(TABLE, |name, _| name != set));
    let table = listed.map_err(explain)?;
    Ok(table.and_then(|table| table.sets.get(&*set).map(|set| !set.elements.is_empty()))
        == Some(true))
}

fn is_there(socket: &mut Socket) -> anyhow::Result<bool> {
    let listed = socket.at_one_moment(|socket| socket.list_table(TABLE, |_, _| true));
    Ok(listed.map_err(explain)?.is_some())
}

/// Removes what kube-proxy has left. Connections that it translated go on: connection tracking knows
/// their translation, and our chains of type nat keep it applied.
fn kube_proxys() -> anyhow::Result<Verdict> {
    if !is_there(&mut Socket::open().map_err(explain)?)? {
        bail!(
            "table inet {TABLE} is not in force: without kube-proxy's rules nobody would serve \
             Services on this node; start portcullis first"
        );
    }
    if let Some(pid) = running_kube_proxy() {
        bail!("kube-proxy runs (process {pid}) and would write its rules again: end it first");
    }
    let Outcome { removed, notes, errors } = takeover::remove_leftovers();
    if removed.is_empty() && notes.is_empty() && errors.is_empty() {
        print("nothing of kube-proxy is there\n")?;
    }
    for what in removed {
        print(&format!("{what}: removed\n"))?;
    }
    for note in notes {
        say(&note);
    }
    if !errors.is_empty() {
        let errors = errors.into_iter().map(|error| format!("{:#}", anyhow::Error::from(error)));
        bail!("{}", errors.collect::<Vec<_>>().join("; "));
    }
    Ok(Verdict::Fine)
}

/// A kube-proxy that works on the same network namespace, as far as this process may see.
fn running_kube_proxy() -> Option<i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = std::fs::read_link("/proc/self/ns/net").ok();
    let processes = procfs::process::all_processes().ok()?;
    processes.flatten().find_map(|process| {
        let is_kube_proxy = process.stat().is_ok_and(|stat| stat.comm == "kube-proxy");
        (is_kube_proxy && namespace(process.pid) == own).then_some(process.pid)
    })
}
