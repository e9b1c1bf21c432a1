//! What kube-proxy leaves on a node: its rules stay when it ends, in all of its modes.
//!
//! Its nftables tables go over netlink. What iptables and IPVS hold goes by way of the programs that
//! made it, where they are installed, because each of them keeps its own form of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use thiserror::Error;

use crate::model::Family;
use crate::netlink::{self, Batch, Socket};

/// kube-proxy's nftables table, in both families.
const TABLE: &str = "kube-proxy";
/// The interface that holds the addresses of Services in IPVS mode.
const IPVS_INTERFACE: &str = "kube-ipvs0";

/// Why something could not be removed.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel did not list or delete a table.
    #[error("kube-proxy's nftables tables")]
    Netlink(#[source] netlink::Error),
    /// A program failed.
    #[error("{program}: {reason}")]
    Program {
        /// Which one.
        program: String,
        /// What it said.
        reason: String,
    },
}

/// Removes everything. Gives a line for each thing that was removed; none if nothing was there.
///
/// # Errors
/// At the first thing that could not be removed; what came before stays removed.
pub fn remove_leftovers() -> Result<Vec<String>, Error> {
    let mut removed = Vec::new();
    remove_tables(&mut removed)?;
    for family in ["iptables", "ip6tables"] {
        // Rules may stand in both, from before and after a change of the node's image.
        for variant in ["nft", "legacy"] {
            remove_iptables(&format!("{family}-{variant}"), &mut removed)?;
        }
    }
    remove_ipvs(&mut removed)?;
    Ok(removed)
}

fn remove_tables(removed: &mut Vec<String>) -> Result<(), Error> {
    let mut socket = Socket::open().map_err(Error::Netlink)?;
    for (family, name) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
        let mut batch = Batch::of_family(family, TABLE);
        batch.delete_table();
        match socket.commit(batch) {
            Ok(()) => removed.push(format!("table {name} {TABLE}")),
            Err(netlink::Error::Refused(refusals))
                if refusals.iter().all(|r| r.error.kind() == io::ErrorKind::NotFound) => {}
            Err(error) => return Err(Error::Netlink(error)),
        }
    }
    Ok(())
}

/// Removes the chains that `program` (`iptables-nft` ...) knows, if it is installed.
fn remove_iptables(program: &str, removed: &mut Vec<String>) -> Result<(), Error> {
    let Some(saved) = run(&format!("{program}-save"), &[], None)? else { return Ok(()) };
    for (table, removal) in removals(&saved) {
        // A lock that another program holds is waited for.
        run(&format!("{program}-restore"), &["--noflush", "--wait=5"], Some(&removal.script))?;
        let Removal { chains, rules, .. } = removal;
        removed.push(format!("{program} table {table}: {chains} chains, {rules} rules"));
    }
    Ok(())
}

fn remove_ipvs(removed: &mut Vec<String>) -> Result<(), Error> {
    let is_there = std::path::Path::new("/sys/class/net").join(IPVS_INTERFACE).exists();
    if !is_there {
        return Ok(());
    }
    // As kube-proxy's own cleanup: it takes all virtual servers for its own.
    if run("ipvsadm", &["--clear"], None)?.is_some() {
        removed.push("IPVS virtual servers".to_owned());
    }
    if run("ip", &["link", "delete", IPVS_INTERFACE], None)?.is_some() {
        removed.push(format!("interface {IPVS_INTERFACE}"));
    }
    let sets = run("ipset", &["list", "-name"], None)?.unwrap_or_default();
    for set in sets.lines().filter(|set| set.starts_with("KUBE-")) {
        run("ipset", &["destroy", set], None)?;
        removed.push(format!("ipset {set}"));
    }
    Ok(())
}

/// The output of a program; `None` where it is not installed.
fn run(program: &str, arguments: &[&str], input: Option<&str>) -> Result<Option<String>, Error> {
    let failed = |reason: String| Error::Program { program: program.to_owned(), reason };
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error.to_string())),
    };
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // If it does not read, it says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, said.trim())));
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// What `iptables-restore --noflush` is to do with one table.
#[derive(Debug, PartialEq, Eq)]
struct Removal {
    script: String,
    chains: usize,
    rules: usize,
}

/// What is kube-proxy's in a listing by `iptables-save`, by table. A chain that somebody else's
/// chain leads to stays (old CNI plugins use `KUBE-MARK-MASQ`).
fn removals(saved: &str) -> BTreeMap<String, Removal> {
    let mut tables: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut current = None;
    for line in saved.lines() {
        if let Some(table) = line.strip_prefix('*') {
            current = Some(tables.entry(table.to_owned()).or_default());
        } else if let Some(table) = &mut current {
            table.push(line);
        }
    }
    { tables.into_iter() }
        .filter_map(|(table, lines)| {
            let removal = removal(&table, &lines)?;
            Some((table, removal))
        })
        .collect()
}

fn removal(table: &str, lines: &[&str]) -> Option<Removal> {
    let names = lines.iter().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    let mut chains: BTreeSet<&str> = names.filter(|name| is_kube_proxys(name)).collect();
    let rules = || lines.iter().filter_map(|line| Some((*line, rule(line)?)));
    let foreign: BTreeSet<&str> = rules()
        .filter(|(_, (chain, _))| !is_built_in(chain) && !is_kube_proxys(chain))
        .filter_map(|(_, (_, target))| target)
        .collect();
    chains.retain(|chain| !foreign.contains(chain));
    if chains.is_empty() {
        return None;
    }
    // Only what leads there: the rules of its own chains go with them.
    let leading: Vec<&str> = rules()
        .filter(|(_, (chain, _))| is_built_in(chain))
        .filter(|(_, (_, target))| target.is_some_and(|target| chains.contains(target)))
        .map(|(line, _)| line)
        .collect();
    let mut script = format!("*{table}\n");
    for chain in &chains {
        let _ = writeln!(script, ":{chain} - [0:0]"); // makes it empty
    }
    for line in &leading {
        let _ = writeln!(script, "-D{}", &line["-A".len()..]);
    }
    for chain in &chains {
        let _ = writeln!(script, "-X {chain}");
    }
    script.push_str("COMMIT\n");
    Some(Removal { script, chains: chains.len(), rules: leading.len() })
}

/// The chain of a rule, and where it leads.
fn rule(line: &str) -> Option<(&str, Option<&str>)> {
    let rule = line.strip_prefix("-A ")?;
    let chain = rule.split(' ').next()?;
    // The last one: a comment may have the same words, and stands before it.
    let words: Vec<&str> = rule.split(' ').collect();
    let leads = words.iter().rposition(|word| ["-j", "-g"].contains(word));
    let target = leads.and_then(|at| words.get(at + 1)).copied();
    Some((chain, target))
}

fn is_built_in(chain: &str) -> bool {
    ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"].contains(&chain)
}

/// Whether a chain is one that kube-proxy makes (`pkg/proxy/iptables`, `pkg/proxy/ipvs`), and not
/// the kubelet.
fn is_kube_proxys(chain: &str) -> bool {
    const NAMES: [&str; 13] = [
        "KUBE-EXTERNAL-SERVICES",
        "KUBE-FORWARD",
        "KUBE-IPVS-FILTER",
        "KUBE-IPVS-OUT-FILTER",
        "KUBE-LOAD-BALANCER",
        "KUBE-MARK-MASQ",
        "KUBE-NODE-PORT",
        "KUBE-NODEPORTS",
        "KUBE-POSTROUTING",
        "KUBE-PROXY-CANARY",
        "KUBE-PROXY-FIREWALL",
        "KUBE-SERVICES",
        "KUBE-SOURCE-RANGES-FIREWALL",
    ];
    const BEGINNINGS: [&str; 6] =
        ["KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-XLB-"];
    NAMES.contains(&chain) || BEGINNINGS.iter().any(|beginning| chain.starts_with(beginning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kube_proxys_chains_go() {
        let saved = "\
# Generated by iptables-save v1.8.9 on Sat Nov 21 07:00:00 2026
*filter
:INPUT ACCEPT [10:20]
:FORWARD DROP [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules -j DROP\" -j KUBE-FORWARD
-A FORWARD -j DOCKER-USER
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SEP-ABC - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XYZ - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m addrtype --dst-type LOCAL -g KUBE-SERVICES
-A CNI-HOSTPORT-SETMARK -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-XYZ
-A KUBE-SVC-XYZ -j KUBE-SEP-ABC
COMMIT
*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
";
        let removals = removals(saved);
        let scripts: Vec<(&str, usize, usize)> =
            removals.iter().map(|(table, r)| (table.as_str(), r.chains, r.rules)).collect();
        assert_eq!(scripts, [("filter", 1, 1), ("nat", 3, 2)]);
        assert_eq!(
            removals["filter"].script,
            "*filter\n:KUBE-FORWARD - [0:0]\n-D FORWARD -m comment --comment \"kubernetes \
             forwarding rules -j DROP\" -j KUBE-FORWARD\n-X KUBE-FORWARD\nCOMMIT\n"
        );
        assert_eq!(
            removals["nat"].script,
            "*nat\n:KUBE-SEP-ABC - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-XYZ - [0:0]\n\
             -D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -D OUTPUT -m addrtype --dst-type LOCAL -g KUBE-SERVICES\n\
             -X KUBE-SEP-ABC\n-X KUBE-SERVICES\n-X KUBE-SVC-XYZ\nCOMMIT\n"
        );
        assert!(super::removals("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n").is_empty());
        assert!(super::removals("").is_empty());
    }
}
