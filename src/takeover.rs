//! What kube-proxy leaves on a node: its rules stay when it ends, in all of its modes.
//!
//! Its nftables tables go over netlink. What iptables and IPVS hold goes by way of the programs that
//! made it, where they are installed, because each of them keeps its own form of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use nix::net::if_::if_nametoindex;
use thiserror::Error;

use crate::model::Family;
use crate::netlink::{self, Batch, Chain, Socket};

/// kube-proxy's nftables table, in both families.
const TABLE: &str = "kube-proxy";
/// The interface that holds the addresses of Services in IPVS mode.
const IPVS_INTERFACE: &str = "kube-ipvs0";
/// Chains that kube-proxy has in the modes iptables and IPVS, each behind its table.
const MAIN_CHAINS: [(&str, &str); 2] = [("nat", "KUBE-SERVICES"), ("filter", "KUBE-FORWARD")];

/// What came of removing everything.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Each thing that was removed.
    pub removed: Vec<String>,
    /// What was not looked at, and what stays on purpose.
    pub notes: Vec<String>,
    /// What could not be removed.
    pub errors: Vec<Error>,
}

/// Why something could not be removed.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel did not do it.
    #[error("cannot {action}")]
    Netlink {
        /// What was to be done.
        action: String,
        /// What became of it.
        #[source]
        source: netlink::Error,
    },
    /// A program failed.
    #[error("cannot {action}: {program}: {reason}")]
    Program {
        /// What was to be done.
        action: String,
        /// Which one.
        program: String,
        /// What it said.
        reason: String,
    },
    /// A program is not there.
    #[error("cannot {action}: not installed: {program}")]
    Missing {
        /// What was to be done.
        action: String,
        /// Which one.
        program: String,
    },
}

/// Removes everything. What cannot be removed holds nothing else up.
pub fn remove_leftovers() -> Outcome {
    let mut outcome = Outcome::default();
    match Socket::open() {
        Ok(mut socket) => {
            remove_tables(&mut socket, &mut outcome);
            remove_nft_chains(&mut socket, &mut outcome);
        }
        Err(source) => {
            let action = "look for kube-proxy's tables".to_owned();
            outcome.errors.push(Error::Netlink { action, source });
        }
    }
    remove_legacy_chains(&mut outcome);
    remove_ipvs(&mut outcome);
    outcome
}

fn remove_tables(socket: &mut Socket, outcome: &mut Outcome) {
    for (family, name) in [(Family::V4, "ip"), (Family::V6, "ip6")] {
        let table = format!("table {name} {TABLE}");
        let mut batch = Batch::of_family(family, TABLE);
        batch.delete_table();
        match socket.commit(batch) {
            Ok(()) => outcome.removed.push(table),
            Err(netlink::Error::Refused(refusals))
                if refusals.iter().all(|r| r.error.kind() == io::ErrorKind::NotFound) => {}
            Err(source) => {
                outcome.errors.push(Error::Netlink { action: format!("delete {table}"), source });
            }
        }
    }
}

/// Removes the chains that iptables keeps in nf_tables.
fn remove_nft_chains(socket: &mut Socket, outcome: &mut Outcome) {
    let missing: Vec<String> = { Family::ALL.into_iter() }
        .filter_map(|family| {
            let missing = remove_chains(&iptables(family, "nft"), outcome).err()?;
            let mut chains = MAIN_CHAINS.into_iter();
            chains.any(|(table, chain)| has_chain(socket, family, table, chain)).then_some(missing)
        })
        .collect();
    if !missing.is_empty() {
        let (action, program) = ("remove kube-proxy's chains".to_owned(), missing.join(", "));
        outcome.errors.push(Error::Missing { action, program });
    }
}

/// Removes the chains that iptables keeps in tables of its own; rules may stand there, too, from
/// before a change of the node's image.
fn remove_legacy_chains(outcome: &mut Outcome) {
    for family in Family::ALL {
        let Err(missing) = remove_chains(&iptables(family, "legacy"), outcome) else { continue };
        let file = match family {
            Family::V4 => "/proc/net/ip_tables_names",
            Family::V6 => "/proc/net/ip6_tables_names",
        };
        // Not there without the kernel's part of it.
        let tables = fs::read_to_string(file).unwrap_or_default();
        let tables: Vec<&str> = tables.lines().collect();
        if !tables.is_empty() {
            outcome.notes.push(format!(
                "not looked at: tables of {} ({}), because {missing} is not installed",
                iptables(family, "legacy"),
                tables.join(", ")
            ));
        }
    }
}

fn iptables(family: Family, variant: &str) -> String {
    match family {
        Family::V4 => format!("iptables-{variant}"),
        Family::V6 => format!("ip6tables-{variant}"),
    }
}

/// Removes the chains that `iptables` (`iptables-nft` ...) knows.
///
/// # Errors
/// Gives the program that it takes to know them, if that is not installed.
fn remove_chains(iptables: &str, outcome: &mut Outcome) -> Result<(), String> {
    let save = format!("{iptables}-save");
    let saved = match run(&format!("list chains of {iptables}"), &save, &[], None) {
        Ok(saved) => saved,
        Err(Error::Missing { program, .. }) => return Err(program),
        Err(error) => {
            outcome.errors.push(error);
            return Ok(());
        }
    };
    for (table, removal) in removals(&saved) {
        let action = format!("remove kube-proxy's chains from {iptables} table {table}");
        // A lock that another program holds is waited for.
        let arguments = ["--noflush", "--wait=5"];
        match run(&action, &format!("{iptables}-restore"), &arguments, Some(&removal.script)) {
            Ok(_) => {
                let Removal { chains, rules, .. } = removal;
                let what = format!("{iptables} table {table}: {chains} chains, {rules} rules");
                outcome.removed.push(what);
            }
            Err(error) => outcome.errors.push(error),
        }
    }
    Ok(())
}

/// Whether there is such a chain. To be told by a transaction that makes it twice: it never
/// happens, and its first half is refused only if the chain is there already.
fn has_chain(socket: &mut Socket, family: Family, table: &str, name: &str) -> bool {
    let mut batch = Batch::of_family(family, table);
    for half in 0..2 {
        batch.set_tag(half);
        batch.add_chain(&Chain { name, hooked: None, comment: None });
    }
    let Err(netlink::Error::Refused(refusals)) = socket.commit(batch) else { return false };
    let is_there = io::ErrorKind::AlreadyExists;
    refusals.iter().any(|refusal| refusal.tag == Some(0) && refusal.error.kind() == is_there)
}

fn remove_ipvs(outcome: &mut Outcome) {
    if if_nametoindex(IPVS_INTERFACE).is_err() {
        return;
    }
    let before = outcome.errors.len();
    // As kube-proxy's own cleanup: it takes all virtual servers for its own.
    match run("delete the virtual servers of IPVS", "ipvsadm", &["--clear"], None) {
        Ok(_) => outcome.removed.push("IPVS virtual servers".to_owned()),
        Err(error) => outcome.errors.push(error),
    }
    match run("list ipsets", "ipset", &["list", "-name"], None) {
        Ok(sets) => {
            for set in sets.lines().filter(|set| set.starts_with("KUBE-")) {
                let set_named = format!("ipset {set}");
                match run(&format!("delete {set_named}"), "ipset", &["destroy", set], None) {
                    Ok(_) => outcome.removed.push(set_named),
                    Err(error) => outcome.errors.push(error),
                }
            }
        }
        Err(error) => outcome.errors.push(error),
    }
    let interface = format!("interface {IPVS_INTERFACE}");
    // It goes last: by it the next attempt knows that there is something to do.
    if outcome.errors.len() > before {
        outcome.notes.push(format!("{interface} stays until the rest of IPVS is gone"));
        return;
    }
    let action = format!("delete {interface}");
    match run(&action, "ip", &["link", "delete", IPVS_INTERFACE], None) {
        Ok(_) => outcome.removed.push(interface),
        Err(error) => outcome.errors.push(error),
    }
}

/// The output of a program, which is run to do `action`.
fn run(
    action: &str,
    program: &str,
    arguments: &[&str],
    input: Option<&str>,
) -> Result<String, Error> {
    let (action, program) = (action.to_owned(), program.to_owned());
    let mut command = Command::new(&program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let output = command.spawn().and_then(|mut child| {
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            // If it does not read, it says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        child.wait_with_output()
    });
    let reason = match output {
        Ok(output) if output.status.success() => {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<&str> = said.split_whitespace().collect();
            format!("{}: {}", output.status, said.join(" "))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::Missing { action, program });
        }
        Err(error) => error.to_string(),
    };
    Err(Error::Program { action, program, reason })
}

/// What `iptables-restore --noflush` is to do with one table.
#[derive(Debug, PartialEq, Eq)]
struct Removal {
    script: String,
    chains: usize,
    rules: usize,
}

/// What is kube-proxy's in a listing by `iptables-save`, by table. A chain that somebody else's
/// chain leads to stays (old CNI plugins use `KUBE-MARK-MASQ`), with all that it leads to itself.
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
    let mut targets: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (chain, target) in lines.iter().filter_map(|line| rule(line)) {
        targets.entry(chain).or_default().extend(target);
    }
    let others = targets.iter().filter(|(chain, _)| !is_built_in(chain) && !is_kube_proxys(chain));
    let mut wanted: Vec<&str> = others.flat_map(|(_, targets)| targets).copied().collect();
    while let Some(chain) = wanted.pop() {
        // The kernel deletes no chain that a rule leads to.
        if chains.remove(chain) {
            wanted.extend(targets.get(chain).into_iter().flatten());
        }
    }
    if chains.is_empty() {
        return None;
    }
    // Only what leads there: the rules of its own chains go with them.
    let leading = |line: &str| {
        let leads = |(chain, target): (&str, Option<&str>)| {
            is_built_in(chain) && target.is_some_and(|target| chains.contains(target))
        };
        rule(line).is_some_and(leads)
    };
    let leading: Vec<&str> = lines.iter().copied().filter(|line| leading(line)).collect();
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

/// Whether a chain of iptables is one that kube-proxy makes (`pkg/proxy/iptables`, `pkg/proxy/ipvs`),
/// and not the kubelet.
pub fn is_kube_proxys(chain: &str) -> bool {
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

    #[test]
    fn what_somebody_else_leads_to_stays() {
        let saved = "\
*nat
:PREROUTING ACCEPT [0:0]
:CUSTOM - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SVC-B - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A PREROUTING -j CUSTOM
-A PREROUTING -j KUBE-SVC-A
-A CUSTOM -p tcp -g KUBE-SVC-A
-A KUBE-SERVICES -j KUBE-SVC-A
-A KUBE-SERVICES -j KUBE-SVC-B
-A KUBE-SERVICES -j KUBE-NODEPORTS
-A KUBE-SVC-A ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -j KUBE-SEP-A
-A KUBE-SVC-B -j KUBE-SEP-B
-A KUBE-SEP-A -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.244.0.5:80
-A KUBE-SEP-B -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
";
        assert_eq!(
            removals(saved)["nat"].script,
            "*nat\n:KUBE-NODEPORTS - [0:0]\n:KUBE-SEP-B - [0:0]\n:KUBE-SERVICES - [0:0]\n\
             :KUBE-SVC-B - [0:0]\n-D PREROUTING -j KUBE-SERVICES\n\
             -X KUBE-NODEPORTS\n-X KUBE-SEP-B\n-X KUBE-SERVICES\n-X KUBE-SVC-B\nCOMMIT\n"
        );
    }
}
