//! The nfnetlink socket: transactions out, answers and listings in.

use std::io;

use netlink_sys::{Socket as RawSocket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::sys::socket::{setsockopt, sockopt};

use super::attribute;
use super::batch::{Batch, Encoded, Message};
use super::error::{Error, Refusal, Subject};

// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// What the kernel may queue for us: thousands of refusals of one transaction, and listings.
const RECEIVE_BUFFER: usize = 8 << 20;
/// One read: listings come in datagrams of at most 32 KiB (`NLMSG_GOODSIZE` and
/// `max_recvmsg_len`), refusals are smaller.
const READ: usize = 64 << 10;
/// How many datagrams a failed exchange can have left: a whole listing of a million elements.
const UNREAD: usize = 10_000;

/// A netlink socket of the netfilter family, in the network namespace of the thread that opened
/// it.
#[derive(Debug)]
pub struct Socket {
    inner: RawSocket,
    /// What the send buffer was last raised to.
    send_buffer: usize,
    sequence: u32,
    /// Whether an exchange ended before its last answer was read.
    unread: bool,
}

impl Socket {
    /// Opens and binds a socket.
    ///
    /// # Errors
    /// [`Error::Open`] where the kernel has no nfnetlink.
    pub fn open() -> Result<Socket, Error> {
        Socket::open_protocol(NETLINK_NETFILTER)
    }

    /// A socket of another netlink family, for listings.
    pub(super) fn open_protocol(protocol: isize) -> Result<Socket, Error> {
        Socket::open_inner(protocol).map_err(Error::Open)
    }

    fn open_inner(protocol: isize) -> io::Result<Socket> {
        let mut inner = RawSocket::new(protocol)?;
        inner.bind_auto()?;
        // So that writes and reads need no address and nobody but the kernel can answer.
        inner.connect(&SocketAddr::new(0, 0))?;
        inner.set_cap_ack(true)?;
        inner.set_ext_ack(true)?;
        // Both need CAP_NET_ADMIN in the first user namespace; without it the defaults stay.
        if setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            let _ = setsockopt(&inner, sockopt::RcvBuf, &RECEIVE_BUFFER);
        }
        Ok(Socket { inner, send_buffer: 0, sequence: 1, unread: false })
    }

    /// Commits a transaction: all of it happens, or nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] names what the kernel refused and on whose behalf it was there;
    /// [`Error::Send`] means that the kernel never looked at it. After [`Error::Receive`] nobody
    /// knows whether it happened: list the table.
    pub fn commit(&mut self, batch: Batch) -> Result<(), Error> {
        self.commit_encoded(&batch.finish())
    }

    /// [`Socket::commit`] for a transaction that is encoded already.
    pub fn commit_encoded(&mut self, batch: &Encoded) -> Result<(), Error> {
        self.forget_unread();
        self.raise_send_buffer(batch.bytes.len());
        self.inner.send(&batch.bytes, 0).map_err(Error::Send)?;

        // The kernel works within send(): every answer is queued by now, and none may stay for the
        // next transaction to read.
        let (mut acknowledged, mut overrun) = (false, None);
        let mut refusals = Vec::new();
        let mut buffer = Vec::with_capacity(READ);
        loop {
            buffer.clear();
            match self.inner.recv(&mut buffer, nix::libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // There were more answers than found a place. This is said once, before the others.
                Err(error) if is_overrun(&error) && overrun.is_none() => overrun = Some(error),
                Err(error) => {
                    self.unread = true;
                    return Err(Error::Receive(error));
                }
            }
            for answer in messages(&buffer).filter(|answer| answer.kind == NLMSG_ERROR) {
                match answer.refusal(&batch.messages) {
                    Some(refusal) => refusals.push(refusal),
                    None => acknowledged = true,
                }
            }
        }
        match overrun {
            _ if !refusals.is_empty() => Err(Error::Refused(refusals)),
            None if acknowledged => Ok(()),
            // Of a transaction that succeeds there is one answer, so this one did not; but nobody
            // knows why.
            Some(error) => Err(Error::Receive(error)),
            None => Err(Error::Receive(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Sends one request that lists something and hands every answer's payload to `each`.
    pub(super) fn list(
        &mut self,
        mut request: Vec<u8>,
        mut each: impl FnMut(u16, &[u8]),
    ) -> Result<(), ListError> {
        self.forget_unread();
        self.sequence = self.sequence.wrapping_add(1);
        request[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        self.inner.send(&request, 0).map_err(|e| ListError::Failed(Error::Send(e)))?;
        let mut interrupted = false;
        let mut buffer = Vec::with_capacity(READ);
        loop {
            buffer.clear();
            match self.inner.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.unread = true;
                    return Err(ListError::Failed(Error::Receive(error)));
                }
            }
            for answer in messages(&buffer).filter(|m| m.sequence == self.sequence) {
                interrupted |= answer.flags & NLM_F_DUMP_INTR != 0;
                match answer.kind {
                    NLMSG_DONE if interrupted => return Err(ListError::Interrupted),
                    // What went wrong after the first answers is told at the end.
                    NLMSG_DONE | NLMSG_ERROR => match answer.errno() {
                        0 => return Ok(()),
                        code => {
                            return Err(ListError::Refused(io::Error::from_raw_os_error(code)));
                        }
                    },
                    kind => each(kind, answer.payload),
                }
            }
        }
    }

    /// Reads what an exchange that failed has left, so that nobody takes it for an answer to
    /// something else; the kernel begins no second listing on a socket before the first has ended.
    fn forget_unread(&mut self) {
        if !std::mem::take(&mut self.unread) {
            return;
        }
        let mut buffer = Vec::with_capacity(READ);
        for _ in 0..UNREAD {
            buffer.clear();
            match self.inner.recv(&mut buffer, nix::libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Each read takes a datagram, or an error that was waiting.
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// A batch is one datagram, so the send buffer must hold all of it.
    fn raise_send_buffer(&mut self, bytes: usize) {
        let needed = (bytes + (64 << 10)).min(i32::MAX as usize / 2);
        if needed > self.send_buffer {
            if setsockopt(&self.inner, sockopt::SndBufForce, &needed).is_err() {
                // Within the limit of net.core.wmem_max; send() tells when it does not do.
                let _ = setsockopt(&self.inner, sockopt::SndBuf, &needed);
            }
            self.send_buffer = needed;
        }
    }
}

/// Why a listing failed.
pub(super) enum ListError {
    /// The kernel said no: most often, that there is no such thing.
    Refused(io::Error),
    /// The ruleset changed meanwhile; what came may not fit together.
    Interrupted,
    /// The socket failed.
    Failed(Error),
}

impl ListError {
    /// The error of listing `what`.
    pub(super) fn listing(self, what: &'static str) -> Error {
        match self {
            ListError::Refused(source) => Error::List { what, source },
            ListError::Interrupted => Error::Interrupted,
            ListError::Failed(error) => error,
        }
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ENOBUFS)
}

/// An answer of the kernel.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// `struct nlmsgerr`, or what follows the header where a listing ends: 0 if all is well.
    fn errno(&self) -> i32 {
        self.payload.first_chunk().map_or(nix::libc::EPROTO, |code| i32::from_ne_bytes(*code)).abs()
    }

    /// What was refused; `None` if this is an acknowledgement.
    fn refusal(&self, sent: &[Message]) -> Option<Refusal> {
        let code = self.errno();
        if code == 0 {
            return None;
        }
        let (mut detail, mut offset) = (None, None);
        if self.flags & NLM_F_ACK_TLVS != 0 {
            // The refused message's header, or all of it, and then the attributes.
            let original = self.payload.get(4..8).and_then(|b| b.first_chunk());
            let original = original.map_or(0, |length| u32::from_ne_bytes(*length) as usize);
            let skip = if self.flags & NLM_F_CAPPED != 0 { HEADER } else { original };
            let attributes = self.payload.get(4 + skip..).unwrap_or_default();
            for (kind, value) in attribute::iter(attributes) {
                match kind {
                    NLMSGERR_ATTR_MSG => detail = Some(attribute::string(value)),
                    NLMSGERR_ATTR_OFFS => {
                        offset = value.first_chunk().map(|o| u32::from_ne_bytes(*o) as usize);
                    }
                    _ => {}
                }
            }
        }
        let message = sent.get(self.sequence as usize);
        Some(Refusal {
            subject: message.map_or(Subject::Transaction, |message| message.subject.clone()),
            tag: message.and_then(|message| message.tag_at(offset)),
            error: io::Error::from_raw_os_error(code),
            detail,
        })
    }
}

/// The messages of one datagram.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let number = |at: usize| Some(u32::from_ne_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let short = |at: usize| Some(u16::from_ne_bytes(rest.get(at..at + 2)?.try_into().ok()?));
        let length = number(0)? as usize;
        let (kind, flags, sequence) = (short(4)?, short(6)?, number(8)?);
        let payload = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer { kind, flags, sequence, payload })
    })
}
