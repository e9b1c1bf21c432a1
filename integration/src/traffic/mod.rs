//! Servers and clients on plain sockets, each in a namespace of its own.
//!
//! - A [`Server`] answers with its own name and with the client's address as it saw it.
//! - [`probe()`] asks once and gives an [`Outcome`]; [`Probe`] has more choices (timeout, source
//!   address, source port), [`probe_all`] asks many different questions at once, and
//!   [`probe_many`] asks one many times and counts who answered, for distributions.
//! - A [`Flow`] is a TCP connection or a UDP "connection" that stays, and can be asked whether it
//!   still gets through.
//! - [`http_get`] asks a health check or metrics.
//! - [`distribution`] says whether counts fit the expected weights.
//!
//! Every probe has a source port that none before it in this process had (they are reused after
//! some 32,000), so a connection that conntrack remembers never decides about a new one.
//!
//! SCTP: kernels are often built without SCTP sockets, but nearly always with its connection
//! tracking. Client and server therefore exchange INIT and INIT ACK by raw sockets, which is what
//! translation and filtering look at; there are no SCTP flows.

mod datagram;
pub mod distribution;
mod flow;
mod http;
mod icmp;
mod probe;
mod sctp;
mod server;

use std::fmt;
use std::io;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use nix::errno::Errno;

pub use flow::Flow;
pub use http::{Response, http_get};
pub use probe::{Probe, Tally, probe, probe_all, probe_many};
pub use server::Server;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// All protocols, for loops.
pub const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// What a client got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A server answered.
    Answered {
        /// The server's name.
        by: String,
        /// The client's address and port as the server saw them.
        seen_source: SocketAddr,
    },
    /// The port was refused: a TCP reset, or ICMP port or protocol unreachable.
    Refused,
    /// Nothing came back in time, or the client's own node dropped what it sent.
    TimedOut,
    /// There is no way: no route, or another ICMP unreachable (host, network, prohibited).
    Unreachable(Errno),
}

impl Outcome {
    /// The name of the server that answered.
    pub fn by(&self) -> Option<&str> {
        match self {
            Self::Answered { by, .. } => Some(by),
            _ => None,
        }
    }

    /// The client's address and port as the server that answered saw them.
    pub fn seen_source(&self) -> Option<SocketAddr> {
        match self {
            Self::Answered { seen_source, .. } => Some(*seen_source),
            _ => None,
        }
    }

    /// What an error of a socket says about the way to the server. An error that says nothing
    /// about it (no more file descriptors) is given back.
    fn from_error(error: io::Error) -> io::Result<Self> {
        match error.raw_os_error().map(Errno::from_raw) {
            // The last two: no such protocol, as ICMP and ICMPv6 say it.
            Some(
                Errno::ECONNREFUSED
                | Errno::ECONNRESET
                | Errno::EPIPE
                | Errno::ENOPROTOOPT
                | Errno::EPROTO,
            ) => Ok(Self::Refused),
            // A rule on the client's own output hook dropped the datagram: the kernel tells the
            // sender, but nobody on the way would.
            Some(Errno::ETIMEDOUT | Errno::EPERM) => Ok(Self::TimedOut),
            Some(errno @ (Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EACCES)) => {
                Ok(Self::Unreachable(errno))
            }
            _ => Err(error),
        }
    }
}

/// One answer: which question it answers, who answered, and whom it saw. On the wire it is a
/// line `NUMBER NAME SOURCE`; a name may have spaces in it.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    number: u64,
    by: String,
    seen_source: SocketAddr,
}

impl Answer {
    fn new(number: u64, by: &str, source: SocketAddr) -> Self {
        // A dual-stack socket sees IPv4 clients as ::ffff:a.b.c.d.
        let seen_source = SocketAddr::new(source.ip().to_canonical(), source.port());
        Self { number, by: by.to_owned(), seen_source }
    }

    fn parse(line: &str) -> Result<Self> {
        let parts = || {
            let (number, rest) = line.split_once(' ')?;
            let (by, source) = rest.rsplit_once(' ')?;
            Some(Self {
                number: number.parse().ok()?,
                by: by.to_owned(),
                seen_source: source.parse().ok()?,
            })
        };
        parts().with_context(|| format!("not an answer of a test server: {line:?}"))
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {} {}", self.number, self.by, self.seen_source)
    }
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answered { by: answer.by, seen_source: answer.seen_source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive_the_wire() {
        for (by, source, seen) in [
            ("pod-0", "192.0.2.10:4711", "192.0.2.10:4711"),
            ("two words", "[2001:db8::1]:1", "[2001:db8::1]:1"),
            ("mapped", "[::ffff:192.0.2.10]:80", "192.0.2.10:80"),
        ] {
            let answer = Answer::new(7, by, source.parse().unwrap());
            assert_eq!(answer.seen_source, seen.parse().unwrap());
            assert_eq!(Answer::parse(answer.to_string().trim_end()).unwrap(), answer);
        }
        assert!(Answer::parse("HTTP/1.1 400 Bad Request").is_err());
    }
}
