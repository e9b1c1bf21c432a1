//! Connections that stay.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::Socket;

use super::probe::connect;
use super::{Answer, Outcome, Protocol};
use crate::lab::Namespace;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_millis(900);

/// A TCP connection, or a UDP socket that keeps its port, to a [`Server`](super::Server).
#[derive(Debug)]
pub struct Flow {
    socket: Socket,
    protocol: Protocol,
    /// Number of the last question.
    number: u64,
    first: Outcome,
    /// What has come of the next answer's line (TCP).
    pending: Vec<u8>,
}

impl Flow {
    /// Connects from `from` and asks once. Fails when nobody answers, and for SCTP, which has no
    /// sockets here.
    pub fn open(from: &Namespace, to: impl Into<SocketAddr>, protocol: Protocol) -> Result<Self> {
        let to = to.into();
        let open = || -> Result<Self> {
            if protocol == Protocol::Sctp {
                bail!("there are no SCTP flows");
            }
            let socket = connect_within(protocol, to)?;
            let (number, pending) = (0, Vec::new());
            let first = Outcome::TimedOut;
            let mut flow = Self { socket, protocol, number, first, pending };
            flow.first = flow.exchange()?;
            if flow.first.by().is_none() {
                bail!("nobody answered: {:?}", flow.first);
            }
            Ok(flow)
        };
        from.enter(open)
            .with_context(|| format!("open a {protocol:?} flow to {to} from {}", from.name()))
    }

    /// The outcome of the first question, always [`Outcome::Answered`].
    pub fn first(&self) -> &Outcome {
        &self.first
    }

    /// The server that answered first.
    pub fn by(&self) -> &str {
        self.first.by().expect("a flow is open only when it was answered")
    }

    /// The client's own address and port.
    pub fn local(&self) -> Result<SocketAddr> {
        let address = self.socket.local_addr().context("address of the flow's socket")?;
        address.as_socket().context("the flow's socket has no internet address")
    }

    /// Asks once more and gives what came back within 0.9 seconds. Late answers to earlier
    /// questions are skipped. UDP may be answered by another server than before.
    pub fn exchange(&mut self) -> Result<Outcome> {
        self.number += 1;
        match self.try_exchange() {
            Ok(outcome) => Ok(outcome),
            Err(error) => match error.downcast::<io::Error>() {
                Ok(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Outcome::TimedOut),
                Ok(error) => Ok(Outcome::from_error(error).context("exchange")?),
                Err(other) => Err(other),
            },
        }
    }

    /// Whether the server that answered first still answers, and still sees the same client.
    pub fn alive(&mut self) -> Result<bool> {
        Ok(self.exchange()? == self.first)
    }

    fn try_exchange(&mut self) -> Result<Outcome> {
        let deadline = Instant::now() + TIMEOUT;
        (&self.socket).write_all(format!("{}\n", self.number).as_bytes())?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Outcome::TimedOut);
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 2048];
            let length = (&self.socket).read(&mut buffer)?;
            if length == 0 && self.protocol == Protocol::Tcp {
                return Ok(Outcome::Refused); // closed by the server
            }
            self.pending.extend_from_slice(&buffer[..length]);
            while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let answer = Answer::parse(std::str::from_utf8(&line)?.trim_end())?;
                if answer.number == self.number {
                    return Ok(answer.into());
                }
            }
        }
    }
}

/// Connects within the timeout.
fn connect_within(protocol: Protocol, to: SocketAddr) -> Result<Socket> {
    let socket = connect(protocol, None, None, to, true)?;
    if protocol == Protocol::Tcp {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut polled, PollTimeout::try_from(TIMEOUT)?)? == 0 {
            bail!("connecting timed out");
        }
        if let Some(error) = socket.take_error()? {
            return Err(error).context("connect");
        }
        socket.set_tcp_nodelay(true)?;
    }
    socket.set_nonblocking(false)?;
    Ok(socket)
}
