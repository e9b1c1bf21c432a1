//! Hearing of every change of the ruleset at the moment when it is in force.
//!
//! The kernel tells listeners of the group `NFNLGRP_NFTABLES` what a transaction changed, right
//! after it is committed; `nft monitor` shows the same. An endpoint is in force when its address
//! stands in an element or a rule that was added: both proxies have it in the data of an element,
//! kube-proxy in a rule where there is session affinity.

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc::MSG_DONTWAIT;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use portcullis_integration::lab::Namespace;

use crate::cluster::offset;

// include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_NEWGEN: u16 = 15;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// The network for benchmarks (RFC 2544), 198.18.0.0/15. Its bytes are no text, so nothing else in
/// a notification looks like one of its addresses.
const FIRST_FRESH: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
const FRESH: u32 = 1 << 17;
/// What may wait to be read: everything that a whole ruleset consists of.
const RECEIVE_BUFFER: usize = 512 << 20;
/// A datagram is at most this long (`NLMSG_GOODSIZE`, with room).
const READ: usize = 256 << 10;
/// How often the thread looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// Addresses that no endpoint has had.
#[derive(Debug, Default)]
pub struct Fresh(usize);

impl Fresh {
    /// One more.
    ///
    /// # Errors
    /// When there are no more.
    pub fn address(&mut self) -> Result<Ipv4Addr> {
        self.0 += 1;
        if self.0 >= FRESH as usize {
            bail!("all {FRESH} addresses for changed endpoints are used up");
        }
        Ok(offset(FIRST_FRESH, self.0))
    }
}

/// What was heard so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heard {
    /// Objects, rules and elements that were added or deleted.
    pub changes: usize,
    /// Transactions.
    pub transactions: usize,
}

/// A listener in a namespace. Dropping it ends it.
pub struct Observer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    state: Mutex<State>,
    heard_more: Condvar,
}

#[derive(Default)]
struct State {
    heard: Heard,
    last: Option<Instant>,
    seen: HashMap<Ipv4Addr, Instant>,
    failed: Option<io::Error>,
}

impl Observer {
    /// Begins to listen.
    ///
    /// # Errors
    /// Without `CAP_NET_ADMIN`.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        let open = || -> Result<Socket> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.add_membership(NFNLGRP_NFTABLES)?;
            Ok(socket)
        };
        let socket = namespace.enter(open).context("listen to changes of the ruleset")?;
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.listen(&socket)
        });
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits until an address is in force, and gives since when.
    ///
    /// # Errors
    /// When it is not by `deadline`, or when notifications were lost.
    pub fn wait_for(&self, address: Ipv4Addr, deadline: Instant) -> Result<Instant> {
        let mut state = self.shared.lock();
        loop {
            if let Some(at) = state.seen.get(&address) {
                return Ok(*at);
            }
            if let Some(error) = &state.failed {
                bail!("notifications were lost: {error}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the kernel never got the endpoint {address}");
            }
            let waited = self.shared.heard_more.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Since when an address is in force, if it is.
    pub fn since(&self, address: Ipv4Addr) -> Option<Instant> {
        self.shared.lock().seen.get(&address).copied()
    }

    /// What was heard so far.
    pub fn heard(&self) -> Heard {
        self.shared.lock().heard
    }

    /// Waits until nothing was heard for `quiet`, at most for `limit`.
    ///
    /// # Errors
    /// When notifications were lost.
    pub fn settle(&self, quiet: Duration, limit: Duration) -> Result<Heard> {
        let began = Instant::now();
        loop {
            let state = self.shared.lock();
            if let Some(error) = &state.failed {
                bail!("notifications were lost: {error}");
            }
            let last = state.last.unwrap_or(began).max(began);
            if last.elapsed() >= quiet || began.elapsed() >= limit {
                return Ok(state.heard);
            }
            drop(state);
            thread::sleep(TICK);
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, socket: &Socket) {
        let mut datagram = Vec::with_capacity(READ);
        while !self.stop.load(Ordering::Relaxed) {
            let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            let tick = PollTimeout::try_from(TICK).expect("a tick is short");
            if poll(&mut polled, tick).unwrap_or(0) == 0 {
                continue;
            }
            datagram.clear();
            match socket.recv(&mut datagram, MSG_DONTWAIT) {
                Ok(_) => self.note(&datagram),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.lock().failed = Some(error);
                    self.heard_more.notify_all();
                    return;
                }
            }
        }
    }

    fn note(&self, datagram: &[u8]) {
        let now = Instant::now();
        let mut state = self.lock();
        state.last = Some(now);
        let mut rest = datagram;
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            let length = message.length() as usize;
            let kind = message.message_type();
            if kind >> 8 == NFNL_SUBSYS_NFTABLES {
                match kind & 0xff {
                    NFT_MSG_NEWGEN => state.heard.transactions += 1,
                    _ => state.heard.changes += 1,
                }
                if matches!(kind & 0xff, NFT_MSG_NEWRULE | NFT_MSG_NEWSETELEM) {
                    for address in fresh_addresses(&rest[HEADER..length]) {
                        state.seen.entry(address).or_insert(now);
                    }
                }
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        self.heard_more.notify_all();
    }
}

/// The addresses of [`Fresh`] in a message. Values are aligned to four bytes, as all of netlink is.
fn fresh_addresses(message: &[u8]) -> impl Iterator<Item = Ipv4Addr> {
    let words = message.as_chunks::<4>().0;
    let is_fresh = |address: &Ipv4Addr| address.to_bits() & !(FRESH - 1) == FIRST_FRESH.to_bits();
    words.iter().map(|word| Ipv4Addr::from_octets(*word)).filter(is_fresh)
}
