//! Clients that ask once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use super::icmp::Watcher;
use super::sctp::{Handshake, Reply};
use super::{Answer, Outcome, Protocol};
use crate::lab::Namespace;

/// How long to wait for an answer: short, so that what is dropped costs little, and that TCP sends
/// one SYN (it repeats it after a second); long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_millis(900);
/// How many probes are under way at a time. The buffer of the socket by which the kernel sends
/// ICMP errors holds some 150 of them, should all be refused in one burst.
const WINDOW: usize = 100;
/// Where source ports come from: outside the default range of node ports.
const PORTS: std::ops::RangeInclusive<u16> = 33_000..=65_000;

/// Asks once from `from` and gives what came back. What was dropped takes 0.9 seconds: to ask
/// several such questions use [`probe_all`].
pub fn probe(from: &Namespace, to: impl Into<SocketAddr>, protocol: Protocol) -> Result<Outcome> {
    Probe::new(to, protocol).run(from)
}

/// Asks `count` times from `from`, each from a fresh source port, and counts what came back.
pub fn probe_many(
    from: &Namespace,
    to: impl Into<SocketAddr>,
    protocol: Protocol,
    count: usize,
) -> Result<Tally> {
    Probe::new(to, protocol).many(from, count)
}

/// Asks all `questions` from `from` at the same time and gives the outcomes in their order.
/// Fails as [`Probe::run`] does.
pub fn probe_all(from: &Namespace, questions: &[Probe]) -> Result<Vec<Outcome>> {
    from.enter(|| ask(questions)).with_context(|| format!("ask from {}", from.name()))
}

/// A question to an address, with more choices than [`probe`] has.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    to: SocketAddr,
    protocol: Protocol,
    timeout: Duration,
    source: Option<IpAddr>,
    source_port: Option<u16>,
}

/// What came back from many probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Answers by the server's name.
    pub answered: BTreeMap<String, u64>,
    /// The clients' addresses as the servers saw them.
    pub seen_sources: BTreeSet<IpAddr>,
    /// Refusals.
    pub refused: u64,
    /// What nothing came back for.
    pub timed_out: u64,
    /// What there was no way for.
    pub unreachable: u64,
}

impl Probe {
    /// A question to `to`.
    pub fn new(to: impl Into<SocketAddr>, protocol: Protocol) -> Self {
        let to = to.into();
        Self { to, protocol, timeout: TIMEOUT, source: None, source_port: None }
    }

    /// How long to wait for an answer, instead of 0.9 seconds. From a second on TCP repeats its
    /// SYN.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Asks from this address, which the namespace must have.
    #[must_use]
    pub fn source(self, source: impl Into<IpAddr>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// Asks from this port, for tests of what conntrack remembers.
    #[must_use]
    pub fn source_port(self, port: u16) -> Self {
        Self { source_port: Some(port), ..self }
    }

    /// Asks once from `from`. Fails when the question could not be asked (no such source
    /// address), or when something else than a [`Server`](super::Server) answered.
    pub fn run(&self, from: &Namespace) -> Result<Outcome> {
        probe_all(from, &[*self])?.pop().context("no outcome")
    }

    /// Asks `count` times from `from`, up to 100 at a time. Fails as [`Probe::run`] does.
    pub fn many(&self, from: &Namespace, count: usize) -> Result<Tally> {
        Ok(Tally::of(probe_all(from, &vec![*self; count])?))
    }
}

impl Tally {
    /// Counts outcomes.
    pub fn of(outcomes: impl IntoIterator<Item = Outcome>) -> Self {
        let mut tally = Self::default();
        for outcome in outcomes {
            match outcome {
                Outcome::Answered { by, seen_source } => {
                    *tally.answered.entry(by).or_default() += 1;
                    tally.seen_sources.insert(seen_source.ip());
                }
                Outcome::Refused => tally.refused += 1,
                Outcome::TimedOut => tally.timed_out += 1,
                Outcome::Unreachable(_) => tally.unreachable += 1,
            }
        }
        tally
    }

    /// How many were answered, by whomever.
    pub fn answers(&self) -> u64 {
        self.answered.values().sum()
    }

    /// How many the server called `name` answered.
    pub fn by(&self, name: &str) -> u64 {
        self.answered.get(name).copied().unwrap_or(0)
    }
}

/// A question that was asked.
struct Attempt {
    /// Its place among the questions.
    index: usize,
    socket: Socket,
    source_port: u16,
    to: SocketAddr,
    exchange: Exchange,
    deadline: Instant,
    /// Whether the socket has something for us.
    ready: bool,
    /// What an ICMP error for this question means.
    error: Option<Errno>,
}

enum Exchange {
    /// What has come of the answer's line.
    Tcp(Vec<u8>),
    Udp,
    Sctp(Handshake),
}

impl Attempt {
    /// Asks. The inner error is an outcome that is known at once.
    fn start(index: usize, probe: &Probe) -> Result<Result<Self, Outcome>> {
        let (socket, exchange) = match open(probe) {
            Ok(opened) => opened,
            Err(error) => return Ok(Err(Outcome::from_error(error).context("connect")?)),
        };
        let sent = match &exchange {
            Exchange::Tcp(_) => Ok(()),
            Exchange::Udp => socket.send(b"0\n").map(drop),
            Exchange::Sctp(handshake) => handshake.send(&socket),
        };
        if let Err(error) = sent {
            return Ok(Err(Outcome::from_error(error).context("send")?));
        }
        let source_port = match &exchange {
            Exchange::Sctp(handshake) => handshake.source_port(),
            _ => socket.local_addr()?.as_socket().context("no internet address")?.port(),
        };
        let deadline = Instant::now() + probe.timeout;
        let (to, ready, error) = (probe.to, false, None);
        Ok(Ok(Self { index, socket, source_port, to, exchange, deadline, ready, error }))
    }

    /// Takes what the socket has. `None` while there is no outcome.
    fn advance(&mut self) -> Result<Option<Outcome>> {
        let line = if self.ready { self.receive() } else { Ok(None) };
        match (line, self.error) {
            (Ok(Some(line)), _) if line.is_empty() => Ok(Some(Outcome::Refused)),
            (Ok(Some(line)), _) => Ok(Some(Answer::parse(line.trim_end())?.into())),
            (Err(error), _) if error.kind() != io::ErrorKind::WouldBlock => {
                Ok(Some(Outcome::from_error(error).context("receive")?))
            }
            (_, Some(errno)) => Ok(Some(Outcome::from_error(errno.into()).context("ICMP")?)),
            _ => Ok((Instant::now() >= self.deadline).then_some(Outcome::TimedOut)),
        }
    }

    fn protocol(&self) -> Protocol {
        match self.exchange {
            Exchange::Tcp(_) => Protocol::Tcp,
            Exchange::Udp => Protocol::Udp,
            Exchange::Sctp(_) => Protocol::Sctp,
        }
    }

    /// The answer's line when it is complete; an empty one if the server closed without a word.
    fn receive(&mut self) -> io::Result<Option<String>> {
        let mut buffer = [0; 2048];
        match &mut self.exchange {
            Exchange::Tcp(line) => {
                let length = (&self.socket).read(&mut buffer)?;
                line.extend_from_slice(&buffer[..length]);
                let complete = length == 0 || line.ends_with(b"\n");
                Ok(complete.then(|| String::from_utf8_lossy(line).into_owned()))
            }
            Exchange::Udp => {
                let length = (&self.socket).read(&mut buffer)?;
                Ok(Some(String::from_utf8_lossy(&buffer[..length]).into_owned()))
            }
            Exchange::Sctp(handshake) => {
                Ok(handshake.receive(&self.socket).map(|reply| match reply {
                    Reply::Answer(line) => line,
                    Reply::Abort => String::new(),
                }))
            }
        }
    }
}

/// Asks in the namespace of the calling thread.
fn ask(questions: &[Probe]) -> Result<Vec<Outcome>> {
    let mut outcomes = vec![Outcome::TimedOut; questions.len()];
    let mut unasked = questions.iter().enumerate().peekable();
    let mut open: Vec<Attempt> = Vec::with_capacity(WINDOW);
    let watcher = Watcher::open().context("watch ICMP")?;
    while unasked.peek().is_some() || !open.is_empty() {
        let free = WINDOW - open.len();
        for (index, probe) in unasked.by_ref().take(free) {
            let attempt = Attempt::start(index, probe)
                .with_context(|| format!("ask {:?} {}", probe.protocol, probe.to))?;
            match attempt {
                Ok(attempt) => open.push(attempt),
                Err(outcome) => outcomes[index] = outcome,
            }
        }
        wait(&mut open, &watcher)?;
        let mut waiting = Vec::with_capacity(WINDOW);
        for mut attempt in open.drain(..) {
            match attempt.advance().with_context(|| format!("ask {}", attempt.to))? {
                Some(outcome) => outcomes[attempt.index] = outcome,
                None => waiting.push(attempt),
            }
        }
        open = waiting;
    }
    Ok(outcomes)
}

/// Waits until a socket or the watcher has something or the first deadline is over, and notes
/// for each attempt what there is.
fn wait(attempts: &mut [Attempt], watcher: &Watcher) -> Result<()> {
    let Some(deadline) = attempts.iter().map(|attempt| attempt.deadline).min() else {
        return Ok(());
    };
    let left = deadline.saturating_duration_since(Instant::now());
    // Rounded up, or the last millisecond would be spent spinning.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1))?;
    let sockets = attempts.iter().map(|attempt| attempt.socket.as_fd());
    let mut polled: Vec<PollFd<'_>> =
        sockets.chain(watcher.fds()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => bail!("poll: {error}"),
    }
    let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
    for (attempt, ready) in attempts.iter_mut().zip(ready) {
        attempt.ready = ready;
    }
    for error in watcher.errors() {
        let about = |attempt: &&mut Attempt| {
            (attempt.protocol(), attempt.source_port, attempt.to)
                == (error.protocol, error.source_port, error.to)
        };
        if let Some(attempt) = attempts.iter_mut().find(about) {
            attempt.error = Some(error.errno);
        }
    }
    Ok(())
}

/// A connected or connecting socket for a probe.
fn open(probe: &Probe) -> io::Result<(Socket, Exchange)> {
    let (socket, exchange) = match probe.protocol {
        Protocol::Tcp | Protocol::Udp => {
            let socket = connect(probe.protocol, probe.source, probe.source_port, probe.to, true)?;
            let tcp = probe.protocol == Protocol::Tcp;
            (socket, if tcp { Exchange::Tcp(Vec::new()) } else { Exchange::Udp })
        }
        Protocol::Sctp => {
            let port = probe.source_port.unwrap_or_else(fresh_port);
            let (socket, handshake) = Handshake::open(probe.source, port, probe.to)?;
            (socket, Exchange::Sctp(handshake))
        }
    };
    Ok((socket, exchange))
}

/// A TCP or UDP socket that is connected to `to`, or connecting if `nonblocking`; from a fresh
/// port if none is given. A TCP socket is reset when it is closed: no `TIME_WAIT` keeps its port.
pub(super) fn connect(
    protocol: Protocol,
    source: Option<IpAddr>,
    source_port: Option<u16>,
    to: SocketAddr,
    nonblocking: bool,
) -> io::Result<Socket> {
    let unspecified = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let source = source.unwrap_or(unspecified);
    let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
    // A fresh port may be taken by a server or a flow of the same namespace.
    let mut tries = if source_port.is_some() { 1 } else { 100 };
    loop {
        tries -= 1;
        let socket = Socket::new(Domain::for_address(to), kind, None)?;
        if protocol == Protocol::Tcp {
            socket.set_reuse_address(true)?;
            socket.set_linger(Some(Duration::ZERO))?;
        }
        let port = source_port.unwrap_or_else(fresh_port);
        socket.set_nonblocking(nonblocking)?;
        let connected = socket
            .bind(&SocketAddr::new(source, port).into())
            .and_then(|()| socket.connect(&to.into()));
        let Err(error) = connected else { return Ok(socket) };
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINPROGRESS) => return Ok(socket),
            Some(Errno::EADDRINUSE | Errno::EADDRNOTAVAIL) if tries > 0 => {}
            _ => return Err(error),
        }
    }
}

/// The next source port.
fn fresh_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let size = PORTS.end() - PORTS.start() + 1;
    // 65,536 is no multiple of the size: near its wrap some ports come again a little early.
    PORTS.start() + NEXT.fetch_add(1, Ordering::Relaxed) % size
}
