//! Opens new TCP connections at a rate, whatever becomes of those before, and counts the ones that fail.
//!
//! Each connection asks, waits for the answer and is closed. What is counted as failed failed on its way or at
//! the server; what this machine itself could not do (no port, no descriptor left) is counted apart.
//!
//! A connection is closed by a reset. No port then waits two minutes on the client, and connection tracking on
//! the way forgets it after ten seconds: that is some 20,000 ports and entries at 2,000 connections a second,
//! of 28,000 ports for each pair of addresses and of 262,144 entries.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// How often it is looked how many connections are due.
const TICK: Duration = Duration::from_millis(1);
/// What was not opened in this time, because this process did not run, is not made up for.
const CATCH_UP: Duration = Duration::from_millis(250);
/// More are not open at once; the rate falls instead.
const MOST_OPEN: usize = 10_000;
/// How many failures are told one by one.
const TOLD: usize = 10;
/// A connection of which a packet was lost takes longer: the kernel repeats a SYN after a second.
pub const SLOW: Duration = Duration::from_millis(900);

/// What is to be opened.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where to, in turns.
    pub targets: Vec<SocketAddr>,
    /// Where from, in turns, for targets of the same family; what the kernel chooses if there is none.
    pub sources: Vec<IpAddr>,
    /// Connections a second.
    pub rate: u32,
    /// What each says.
    pub ask: Vec<u8>,
    /// What is in the answer. A connection that ends without it failed.
    pub expect: Vec<u8>,
    /// How long a connection may take, from its first packet to the answer.
    pub limit: Duration,
}

/// What became of the connections.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Answered.
    pub done: u64,
    /// Not answered, or not as expected.
    pub failed: u64,
    /// Not opened, because this machine could not.
    pub unable: u64,
    /// Of those answered: took longer than [`SLOW`].
    pub slow: u64,
    /// The longest that an answered one took.
    pub slowest: Duration,
    /// How long connections were opened.
    pub elapsed: Duration,
    /// The first that failed, or that could not be opened.
    pub failures: Vec<String>,
}

impl Report {
    /// How many connections were opened a second.
    pub fn per_second(&self) -> u64 {
        let millis = u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
        (self.done + self.failed) * 1000 / millis
    }

    fn count(&mut self, ended: &Ended) {
        match ended.result {
            Ok(()) => {
                self.done += 1;
                self.slow += u64::from(ended.took > SLOW);
                self.slowest = self.slowest.max(ended.took);
                return;
            }
            Err(Failure::Own(_)) => self.unable += 1,
            Err(_) => self.failed += 1,
        }
        if self.failures.len() < TOLD {
            self.failures.push(ended.to_string());
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, rate) = (self.done + self.failed, self.per_second());
        write!(f, "{all} connections at {rate}/s, {} failed", self.failed)?;
        write!(f, "; slowest {} ms", self.slowest.as_millis())?;
        if self.unable > 0 {
            write!(f, "; {} not opened by the client's own fault", self.unable)?;
        }
        for failure in &self.failures {
            write!(f, "\n  {failure}")?;
        }
        Ok(())
    }
}

impl Load {
    /// Opens connections until `stop` says so, which is asked often, and waits for the last of them.
    ///
    /// # Errors
    /// When there is no target, or no runtime.
    pub fn run(&self, stop: impl FnMut() -> bool) -> io::Result<Report> {
        if self.targets.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no target"));
        }
        allow_descriptors();
        // One thread, so that all sockets are in the network namespace of the caller.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(self.open_all(stop)))
    }

    async fn open_all(&self, mut stop: impl FnMut() -> bool) -> Report {
        let mut report = Report::default();
        let mut open = JoinSet::new();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let began = Instant::now();
        // Connections that are due by then are opened, or given up.
        let (mut number, mut due) = (0, 0);
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if stop() {
                        break;
                    }
                    let now = self.due(began.elapsed());
                    due = due.max(now.saturating_sub(self.due(CATCH_UP)));
                    while due < now && open.len() < MOST_OPEN {
                        let (source, target) = self.ends(number);
                        open.spawn(self.one(source, target, began));
                        number += 1;
                        due += 1;
                    }
                }
                Some(ended) = open.join_next() => {
                    report.count(&ended.expect("a connection does not panic"));
                }
            }
        }
        report.elapsed = began.elapsed();
        while let Some(ended) = open.join_next().await {
            report.count(&ended.expect("a connection does not panic"));
        }
        report
    }

    /// How many connections are due after a time.
    fn due(&self, time: Duration) -> u64 {
        u64::try_from(time.as_micros()).unwrap_or(u64::MAX).saturating_mul(self.rate.into())
            / 1_000_000
    }

    /// Source and target of a connection.
    fn ends(&self, number: usize) -> (Option<IpAddr>, SocketAddr) {
        let target = self.targets[number % self.targets.len()];
        let same = |source: &&IpAddr| source.is_ipv4() == target.is_ipv4();
        let sources: Vec<&IpAddr> = self.sources.iter().filter(same).collect();
        let turn = number / self.targets.len();
        (sources.get(turn % sources.len().max(1)).map(|source| **source), target)
    }

    fn one(
        &self,
        source: Option<IpAddr>,
        target: SocketAddr,
        began: Instant,
    ) -> impl Future<Output = Ended> + Send + 'static {
        let (ask, expect, limit) = (self.ask.clone(), self.expect.clone(), self.limit);
        async move {
            let (at, opened) = (began.elapsed(), Instant::now());
            let result = match timeout(limit, connection(source, target, &ask, &expect)).await {
                Ok(result) => result,
                Err(_) => Err(Failure::Late(limit)),
            };
            Ended { at, took: opened.elapsed(), source, target, result }
        }
    }
}

/// A connection that is over.
struct Ended {
    /// When it was opened, after the first.
    at: Duration,
    took: Duration,
    source: Option<IpAddr>,
    target: SocketAddr,
    result: Result<(), Failure>,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after {:.3} s: to {}", self.at.as_secs_f64(), self.target)?;
        if let Some(source) = self.source {
            write!(f, " from {source}")?;
        }
        match &self.result {
            Ok(()) => write!(f, ": answered"),
            Err(failure) => write!(f, ": {failure}"),
        }?;
        write!(f, " ({:.3} s)", self.took.as_secs_f64())
    }
}

enum Failure {
    /// This machine could not open it.
    Own(io::Error),
    /// While opening.
    Connect(io::Error),
    /// Afterwards.
    Exchange(io::Error),
    /// It took too long.
    Late(Duration),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |error: &io::Error| match error.raw_os_error() {
            Some(code) => format!("{:?}", Errno::from_raw(code)),
            None => error.to_string(),
        };
        match self {
            Self::Own(error) => write!(f, "cannot open it: {}", name(error)),
            Self::Connect(error) => write!(f, "connecting: {}", name(error)),
            Self::Exchange(error) => write!(f, "connected, then {}", name(error)),
            Self::Late(limit) => write!(f, "ETIMEDOUT, no answer within {limit:?}"),
        }
    }
}

async fn connection(
    source: Option<IpAddr>,
    target: SocketAddr,
    ask: &[u8],
    expect: &[u8],
) -> Result<(), Failure> {
    let socket = if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let socket = socket.map_err(Failure::Own)?;
    socket.set_zero_linger().map_err(Failure::Own)?;
    if let Some(source) = source {
        socket.bind((source, 0).into()).map_err(Failure::Own)?;
    }
    let mut stream = socket.connect(target).await.map_err(|error| {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EADDRNOTAVAIL | Errno::ENOBUFS | Errno::ENOMEM) => Failure::Own(error),
            _ => Failure::Connect(error),
        }
    })?;
    stream.write_all(ask).await.map_err(Failure::Exchange)?;
    let mut answer = Vec::with_capacity(512);
    loop {
        match stream.read_buf(&mut answer).await.map_err(Failure::Exchange)? {
            0 => return Err(Failure::Exchange(io::ErrorKind::UnexpectedEof.into())),
            _ if answer.windows(expect.len()).any(|bytes| bytes == expect) => return Ok(()),
            _ => {}
        }
    }
}

/// Each connection takes a descriptor.
fn allow_descriptors() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // What cannot be raised is seen later, as a connection that could not be opened.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn load(target: SocketAddr) -> Load {
        Load {
            targets: vec![target],
            sources: Vec::new(),
            rate: 500,
            ask: b"who?".to_vec(),
            expect: b"me".to_vec(),
            limit: Duration::from_secs(2),
        }
    }

    /// Runs it until so many ticks have passed.
    fn run(load: &Load, ticks: u32) -> Report {
        let mut left = ticks;
        let stop = || {
            left -= 1;
            left == 0
        };
        load.run(stop).unwrap()
    }

    #[test]
    fn what_is_answered_is_done() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = server.local_addr().unwrap();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = server.accept() {
                let mut asked = [0; 4];
                let _ = stream.read_exact(&mut asked).and_then(|()| stream.write_all(b"it is me"));
            }
        });
        let report = run(&load(target), 200);
        assert!(report.done > 0 && report.failed == 0 && report.unable == 0, "{report}");
        let from = Load { sources: vec!["127.0.0.9".parse().unwrap()], ..load(target) };
        let report = run(&from, 50);
        assert!(report.done > 0 && report.failed == 0 && report.unable == 0, "{report}");
        let other = Load { expect: b"nobody".to_vec(), ..load(target) };
        let report = run(&other, 50);
        assert!(report.done == 0 && report.failed > 0, "{report}");
    }

    #[test]
    fn a_failure_says_what_and_when() {
        let target = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let report = run(&load(target), 50);
        assert!(report.done == 0 && report.failed > 0, "{report}");
        let first = &report.failures[0];
        assert!(first.contains(&target.to_string()) && first.contains("ECONNREFUSED"), "{first}");
        // Not an address of this machine: nobody else's fault.
        let from = Load { sources: vec!["192.0.2.1".parse().unwrap()], ..load(target) };
        let report = run(&from, 50);
        assert!(report.failed == 0 && report.unable > 0, "{report}");
        assert!(report.failures[0].contains("EADDRNOTAVAIL"), "{report}");
    }

    #[test]
    fn sources_and_targets_take_turns() {
        let targets = ["192.0.2.1:1", "192.0.2.2:1", "[2001:db8::1]:1"];
        let sources = ["198.51.100.1", "198.51.100.2", "2001:db8::2"];
        let load = Load {
            targets: targets.map(|target| target.parse().unwrap()).to_vec(),
            sources: sources.map(|source| source.parse().unwrap()).to_vec(),
            ..load("192.0.2.1:1".parse().unwrap())
        };
        let ends = |number| {
            let (source, target) = load.ends(number);
            (source.unwrap().to_string(), target.to_string())
        };
        for (number, source, target) in
            [(0, 0, 0), (1, 0, 1), (2, 2, 2), (3, 1, 0), (4, 1, 1), (5, 2, 2), (6, 0, 0)]
        {
            assert_eq!(ends(number), (sources[source].into(), targets[target].into()), "{number}");
        }
    }
}
