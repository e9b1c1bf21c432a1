//! Base chains of other tables: who else sees the packets.

use nftables::schema::Chain;
use nftables::types::NfChainPolicy;
use serde::Serialize;

use super::print::word;
use crate::ruleset::BASE_CHAINS;

/// A base chain of another table, on a path that packets of Services take.
///
/// An accept in our table does not override a drop in another one. What the older `iptables-legacy`
/// holds is not in nf_tables and not seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Foreign {
    /// The hook, such as `prerouting`.
    pub hook: String,
    /// Its place among the chains of the hook; smaller is earlier.
    pub priority: i32,
    /// Family of the table: `ip`, `ip6`, `inet`, `bridge` or `netdev`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// `filter`, `nat` or `route`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The device, for a chain on ingress or egress of one.
    pub device: Option<String>,
    /// What becomes of a packet that no rule decides on: `accept` or `drop`.
    pub policy: String,
    /// Whether the policy is to drop.
    pub drops: bool,
    /// The number of rules in the chain itself.
    pub rules: u64,
    /// Whether packets come to it before or after our chains.
    pub position: Position,
}

/// Whether packets come to a chain before or after ours on the same hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// Before all of ours.
    Before,
    /// After some of ours and before others.
    Between,
    /// At the priority of one of ours: the order is that in which the chains were made, which no
    /// listing tells.
    Beside,
    /// After all of ours.
    After,
}

/// The chain, if it is one that packets of Services come to.
pub(super) fn base_chain(family: &str, chain: &Chain) -> Option<Foreign> {
    let priority = chain.prio?;
    let hook = word(chain.hook?)?;
    let position = position(family, &hook, priority)?;
    let drops = chain.policy == Some(NfChainPolicy::Drop);
    Some(Foreign {
        priority,
        family: family.to_owned(),
        table: chain.table.to_string(),
        chain: chain.name.to_string(),
        kind: word(chain._type?)?,
        device: chain.dev.as_ref().map(ToString::to_string),
        policy: if drops { "drop" } else { "accept" }.to_owned(),
        drops,
        rules: 0,
        hook,
        position,
    })
}

/// Whether a table or chain has a name of kube-proxy's. The kubelet makes chains of its own
/// (`KUBE-FIREWALL`, `KUBE-KUBELET-CANARY`, `KUBE-IPTABLES-HINT`), and older ones the chains for
/// marks, without any kube-proxy.
pub(super) fn is_kube_proxys(table: &str, chain: &str) -> bool {
    const CHAINS: [&str; 3] = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-EXTERNAL-SERVICES"];
    const PREFIXES: [&str; 4] = ["KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-PROXY-"];
    table == "kube-proxy"
        || CHAINS.contains(&chain)
        || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

fn position(family: &str, hook: &str, priority: i32) -> Option<Position> {
    match (family, hook) {
        // Where a packet enters the host, and a bridge before it hands frames to the IP layer.
        ("netdev" | "inet", "ingress") | ("bridge", "prerouting" | "input" | "forward") => {
            return Some(Position::Before);
        }
        // Where it leaves the host, and a bridge after it got frames from the IP layer.
        ("netdev", "egress") | ("bridge", "output" | "postrouting") => {
            return Some(Position::After);
        }
        ("ip" | "ip6" | "inet", _) => {}
        _ => return None,
    }
    let ours = BASE_CHAINS.iter().filter_map(|chain| chain.hooked);
    let ours: Vec<i32> = ours.filter(|h| h.hook.name() == hook).map(|h| h.priority).collect();
    let (first, last) = (*ours.iter().min()?, *ours.iter().max()?);
    Some(if ours.contains(&priority) {
        Position::Beside
    } else if priority < first {
        Position::Before
    } else if priority > last {
        Position::After
    } else {
        Position::Between
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_as_packets_meet_them() {
        let table = [
            ("ip", "prerouting", -300, Some(Position::Before)),
            ("ip", "prerouting", -110, Some(Position::Beside)),
            ("ip6", "prerouting", -105, Some(Position::Between)),
            ("inet", "prerouting", -100, Some(Position::Beside)),
            ("inet", "prerouting", 300, Some(Position::After)),
            ("inet", "forward", -1, Some(Position::Before)),
            ("inet", "forward", 0, Some(Position::Beside)),
            ("inet", "postrouting", 101, Some(Position::After)),
            ("inet", "ingress", 0, Some(Position::Before)),
            ("netdev", "ingress", 0, Some(Position::Before)),
            ("netdev", "egress", 0, Some(Position::After)),
            ("bridge", "forward", 300, Some(Position::Before)),
            ("bridge", "postrouting", -300, Some(Position::After)),
            ("arp", "input", 0, None),
            ("inet", "unheard-of", 0, None),
        ];
        for (family, hook, priority, expected) in table {
            assert_eq!(position(family, hook, priority), expected, "{family} {hook} {priority}");
        }
    }

    #[test]
    fn kube_proxy_is_told_from_the_kubelet() {
        let table = [
            ("kube-proxy", "services", true),
            ("nat", "KUBE-SERVICES", true),
            ("nat", "KUBE-SVC-NPX46M4PTMTKRN6Y", true),
            ("mangle", "KUBE-PROXY-CANARY", true),
            ("mangle", "KUBE-KUBELET-CANARY", false),
            ("mangle", "KUBE-IPTABLES-HINT", false),
            ("filter", "KUBE-FIREWALL", false),
            ("nat", "KUBE-MARK-MASQ", false),
            ("nat", "PREROUTING", false),
        ];
        for (table, chain, expected) in table {
            assert_eq!(is_kube_proxys(table, chain), expected, "{table} {chain}");
        }
    }
}
