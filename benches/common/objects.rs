//! Counting what a table consists of, by a listing of its own.
//!
//! `nft --terse` leaves elements out of its output only: it reads them all, which takes longer than
//! everything that is measured here.

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use serde::{Deserialize, Serialize};

// include/uapi/linux/netfilter/nf_tables.h: what to ask for, and what comes
const CHAINS: (u8, u8) = (4, 3); // NFT_MSG_GETCHAIN, NFT_MSG_NEWCHAIN
const RULES: (u8, u8) = (7, 6); // NFT_MSG_GETRULE, NFT_MSG_NEWRULE
const SETS: (u8, u8) = (10, 9); // NFT_MSG_GETSET, NFT_MSG_NEWSET
const NFNL_SUBSYS_NFTABLES: u8 = 10;
// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: u8 = 20;

/// Objects in a table; elements are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Objects {
    /// Chains.
    pub chains: usize,
    /// Rules.
    pub rules: usize,
    /// Sets and maps, anonymous ones included.
    pub sets: usize,
}

/// Counts the chains, rules, sets and maps of all tables in this network namespace; anonymous sets
/// and maps are counted like others.
///
/// # Errors
/// When the kernel does not list them.
pub fn count() -> Result<Objects> {
    Ok(Objects { chains: count_kind(CHAINS)?, rules: count_kind(RULES)?, sets: count_kind(SETS)? })
}

fn count_kind((ask, answer): (u8, u8)) -> Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER).context("cannot open a netlink socket")?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = vec![0; usize::from(HEADERS)];
    request[0..4].copy_from_slice(&u32::from(HEADERS).to_ne_bytes());
    request[4..6].copy_from_slice(&kind(ask).to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    socket.send(&request, 0)?;

    let mut count = 0;
    let mut datagram = Vec::with_capacity(64 << 10);
    loop {
        datagram.clear();
        socket.recv(&mut datagram, 0)?;
        let mut rest = datagram.as_slice();
        ensure!(!rest.is_empty(), "the kernel listed nothing");
        while let [l0, l1, l2, l3, k0, k1, ..] = *rest {
            match u16::from_ne_bytes([k0, k1]) {
                NLMSG_DONE => return Ok(count),
                NLMSG_ERROR => bail!("the kernel does not list its tables"),
                other => count += usize::from(other == kind(answer)),
            }
            let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn kind(message: u8) -> u16 {
    u16::from(NFNL_SUBSYS_NFTABLES) << 8 | u16::from(message)
}
