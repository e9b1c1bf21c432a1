//! Servers that say who they are and whom they see.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use super::{Answer, Protocol, datagram, sctp};
use crate::lab::Namespace;

/// A server in a namespace; it ends when it is dropped, with all its connections.
///
/// TCP: it writes an answer as soon as a client connected, and another for each line. UDP: one
/// for each datagram. SCTP: it answers INIT with an INIT ACK; the answer is in the cookie.
#[derive(Debug)]
pub struct Server {
    name: String,
    served: Arc<AtomicU64>,
    /// Closing it ends the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts a server called `name` on `port` of every address of `namespace`, both families.
    pub fn start(namespace: &Namespace, name: &str, protocol: Protocol, port: u16) -> Result<Self> {
        Self::bind(namespace, name, protocol, (Ipv6Addr::UNSPECIFIED, port))
    }

    /// Starts a server called `name` on one address and port of `namespace`.
    pub fn bind(
        namespace: &Namespace,
        name: &str,
        protocol: Protocol,
        address: impl Into<SocketAddr>,
    ) -> Result<Self> {
        let address = address.into();
        let open = || Listener::open(protocol, address);
        let mut listener = namespace
            .enter(open)
            .with_context(|| format!("listen on {protocol:?} {address} in {}", namespace.name()))?;
        let (stop, stopped) = UnixStream::pair().context("make a socket pair")?;
        let served = Arc::new(AtomicU64::new(0));
        let thread = thread::spawn({
            let (name, served) = (name.to_owned(), Arc::clone(&served));
            move || listener.serve(&name, &served, stopped.as_fd())
        });
        Ok(Self { name: name.to_owned(), served, stop: Some(stop), thread: Some(thread) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many connections (TCP), datagrams (UDP) or INITs (SCTP) reached it so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // It panicked only if polling failed, and said so.
            let _ = thread.join();
        }
    }
}

/// The sockets of a server.
enum Listener {
    Tcp(TcpListener, Vec<Connection>),
    Udp(UdpSocket),
    Sctp(sctp::Responder),
}

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    /// The part of a line that has come so far.
    pending: Vec<u8>,
}

impl Listener {
    fn open(protocol: Protocol, address: SocketAddr) -> io::Result<Self> {
        match protocol {
            Protocol::Tcp => {
                // The backlog of the standard library is less than what clients may have
                // under way, and a SYN that does not fit comes again a second later.
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
                socket.set_reuse_address(true)?;
                socket.bind(&address.into())?;
                socket.listen(4096)?;
                socket.set_nonblocking(true)?;
                Ok(Self::Tcp(socket.into(), Vec::new()))
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                datagram::tell_destination(&socket, address)?;
                Ok(Self::Udp(socket))
            }
            Protocol::Sctp => sctp::Responder::bind(address).map(Self::Sctp),
        }
    }

    fn serve(&mut self, name: &str, served: &AtomicU64, stopped: BorrowedFd<'_>) {
        loop {
            let fds = self.fds().into_iter();
            let mut polled: Vec<PollFd<'_>> = std::iter::once(stopped)
                .chain(fds)
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            match poll(&mut polled, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result.expect("poll the sockets of a server"),
            };
            let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            if ready[0] {
                return;
            }
            self.answer(&ready[1..], name, served);
        }
    }

    /// What to poll; [`Listener::answer`] gets what is ready in the same order.
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Tcp(listener, connections) => std::iter::once(listener.as_fd())
                .chain(connections.iter().map(|connection| connection.stream.as_fd()))
                .collect(),
            Self::Udp(socket) => vec![socket.as_fd()],
            Self::Sctp(responder) => responder.fds(),
        }
    }

    fn answer(&mut self, ready: &[bool], name: &str, served: &AtomicU64) {
        let count = || served.fetch_add(1, Ordering::SeqCst);
        match self {
            Self::Tcp(listener, connections) => {
                let mut ready = ready.iter();
                let accepting = ready.next().is_some_and(|ready| *ready);
                // A client that is gone is none of the server's business.
                connections.retain_mut(|connection| {
                    !ready.next().is_some_and(|ready| *ready) || connection.answer(name).is_ok()
                });
                while accepting && let Ok((stream, peer)) = listener.accept() {
                    count();
                    let connection = Connection { stream, peer, pending: Vec::new() };
                    if connection.greet(name).is_ok() {
                        connections.push(connection);
                    }
                }
            }
            Self::Udp(socket) => {
                let mut buffer = [0; 64];
                while let Ok(received) = datagram::receive(socket, &mut buffer) {
                    count();
                    let number = question(&buffer[..received.length]);
                    let answer = Answer::new(number, name, received.from).to_string();
                    let _ = datagram::answer(socket, answer.as_bytes(), &received);
                }
            }
            Self::Sctp(responder) => responder.answer(name, count),
        }
    }
}

impl Connection {
    /// The first answer, number 0, which nobody asked for.
    fn greet(&self, name: &str) -> io::Result<()> {
        self.stream.set_nonblocking(true)?;
        self.stream.set_nodelay(true)?;
        (&self.stream).write_all(Answer::new(0, name, self.peer).to_string().as_bytes())
    }

    /// Answers the lines that have come. An error means that the connection is over.
    fn answer(&mut self, name: &str) -> io::Result<()> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => self.pending.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
        while let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let answer = Answer::new(question(&line), name, self.peer).to_string();
            self.stream.write_all(answer.as_bytes())?;
        }
        Ok(())
    }
}

/// The number of a question; 0 for what is not one.
fn question(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
