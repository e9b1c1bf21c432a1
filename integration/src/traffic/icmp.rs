//! ICMP errors, seen by a raw socket beside the one that caused them.
//!
//! The sockets themselves are not good at telling:
//! - TCP ignores an error that comes back while `connect` still holds the socket
//!   (`LockDroppedIcmps` of `nstat`). Between namespaces of one machine, where the whole way is
//!   gone before `connect` returns, that is the rule; it is told of the error for its next SYN,
//!   a second later.
//! - UDP does not report what RFC 1122 calls soft errors (host unreachable).
//! - A raw SCTP socket gets the errors for everything that was sent to its peer, whatever the
//!   ports.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

use super::Protocol;

/// Sees all ICMP errors that come into a namespace.
pub(super) struct Watcher {
    v4: Socket,
    v6: Socket,
}

/// An ICMP error, and the packet that it is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IcmpError {
    /// The packet's protocol.
    pub(super) protocol: Protocol,
    /// The packet's source port.
    pub(super) source_port: u16,
    /// The packet's destination.
    pub(super) to: SocketAddr,
    /// What the kernel makes of the error (`icmp_err_convert` of `net/ipv4/icmp.c`, `tab_unreach`
    /// of `net/ipv6/icmp.c`).
    pub(super) errno: Errno,
}

impl Watcher {
    /// Watches the namespace of the calling thread, from now on.
    pub(super) fn open() -> io::Result<Self> {
        let open = |domain, protocol| {
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            // Room for the errors for all that is under way, and for stray ones.
            socket.set_recv_buffer_size(1 << 20)?;
            Ok::<_, io::Error>(socket)
        };
        let v4 = open(Domain::IPV4, socket2::Protocol::ICMPV4)?;
        let v6 = open(Domain::IPV6, socket2::Protocol::ICMPV6)?;
        Ok(Self { v4, v6 })
    }

    /// What to poll for reading.
    pub(super) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.v4.as_fd(), self.v6.as_fd()]
    }

    /// The errors that have come.
    pub(super) fn errors(&self) -> Vec<IcmpError> {
        let mut errors = Vec::new();
        let mut buffer = [0; 2048];
        while let Ok(length) = (&self.v4).read(&mut buffer) {
            // Raw IPv4 sockets give the IP header with the packet, IPv6 ones do not.
            errors.extend(after_ipv4(&buffer[..length]).and_then(|(_, icmp)| parse_v4(icmp)));
        }
        while let Ok(length) = (&self.v6).read(&mut buffer) {
            errors.extend(parse_v6(&buffer[..length]));
        }
        errors
    }
}

/// RFC 792, with the codes of RFC 1812.
fn parse_v4(icmp: &[u8]) -> Option<IcmpError> {
    let errno = match (icmp.first()?, icmp.get(1)?) {
        (3, 0 | 6 | 9 | 11) => Errno::ENETUNREACH,
        (3, 2) => Errno::ENOPROTOOPT,
        (3, 3) => Errno::ECONNREFUSED,
        (3, 1 | 5 | 7 | 8 | 10 | 12..=15) | (11, 0) => Errno::EHOSTUNREACH,
        _ => return None,
    };
    let (header, transport) = after_ipv4(icmp.get(8..)?)?;
    let destination = <[u8; 4]>::try_from(header.get(16..20)?).ok()?;
    about(errno, *header.get(9)?, destination.into(), transport)
}

/// RFC 4443.
fn parse_v6(icmp: &[u8]) -> Option<IcmpError> {
    let errno = match (icmp.first()?, icmp.get(1)?) {
        (1, 0) => Errno::ENETUNREACH,
        (1, 1 | 5 | 6) => Errno::EACCES,
        (1, 2 | 3) | (3, 0) => Errno::EHOSTUNREACH,
        (1, 4) => Errno::ECONNREFUSED,
        (4, 1) => Errno::EPROTO, // no such protocol
        _ => return None,
    };
    let (header, transport) = icmp.get(8..)?.split_at_checked(40)?;
    let destination = <[u8; 16]>::try_from(&header[24..40]).ok()?;
    about(errno, header[6], destination.into(), transport)
}

/// The error for a packet whose transport header starts as `transport`: 8 bytes of it are quoted
/// at least, and all three protocols have their ports first.
fn about(errno: Errno, protocol: u8, to: IpAddr, transport: &[u8]) -> Option<IcmpError> {
    let protocol = match protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    let ports: [u8; 4] = transport.get(..4)?.try_into().ok()?;
    let source_port = u16::from_be_bytes([ports[0], ports[1]]);
    let to = SocketAddr::new(to, u16::from_be_bytes([ports[2], ports[3]]));
    Some(IcmpError { protocol, source_port, to, errno })
}

/// An IPv4 header and what follows it.
fn after_ipv4(packet: &[u8]) -> Option<(&[u8], &[u8])> {
    packet.split_at_checked(usize::from(packet.first()? & 0x0f) * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(kind: u8, code: u8, protocol: u8, options: usize) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0, 0, 0, 0, 0];
        let mut header = vec![0; 20 + options];
        header[0] = 0x40 | u8::try_from(header.len() / 4).unwrap();
        header[9] = protocol;
        header[16..20].copy_from_slice(&[10, 96, 0, 1]);
        bytes.extend(header);
        bytes.extend([0x12, 0x67, 0, 80, 0, 0, 0, 0]);
        bytes
    }

    fn v6(kind: u8, code: u8, protocol: u8) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0, 0, 0, 0, 0];
        let mut header = [0; 40];
        header[6] = protocol;
        header[39] = 1;
        bytes.extend(header);
        bytes.extend([0x12, 0x67, 0, 80]);
        bytes
    }

    #[test]
    fn errors_are_about_the_quoted_packet() {
        let error = |protocol, to: &str, errno| {
            Some(IcmpError { protocol, source_port: 4711, to: to.parse().unwrap(), errno })
        };
        let cases = [
            (v4(3, 3, 6, 0), Protocol::Tcp, "10.96.0.1:80", Errno::ECONNREFUSED),
            (v4(3, 3, 17, 12), Protocol::Udp, "10.96.0.1:80", Errno::ECONNREFUSED),
            (v4(3, 2, 132, 0), Protocol::Sctp, "10.96.0.1:80", Errno::ENOPROTOOPT),
            (v4(11, 0, 6, 0), Protocol::Tcp, "10.96.0.1:80", Errno::EHOSTUNREACH),
            (v6(1, 4, 6), Protocol::Tcp, "[::1]:80", Errno::ECONNREFUSED),
            (v6(1, 1, 17), Protocol::Udp, "[::1]:80", Errno::EACCES),
            (v6(4, 1, 132), Protocol::Sctp, "[::1]:80", Errno::EPROTO),
        ];
        for (bytes, protocol, to, errno) in cases {
            let parse = if to.starts_with('[') { parse_v6 } else { parse_v4 };
            assert_eq!(parse(&bytes), error(protocol, to, errno), "{bytes:?}");
            for length in 0..bytes.len() - 4 {
                assert_eq!(parse(&bytes[..length]), None, "{length} of {bytes:?}");
            }
        }
    }

    #[test]
    fn what_is_no_such_error_is_ignored() {
        for bytes in [v4(8, 0, 6, 0), v4(3, 4, 6, 0), v4(3, 3, 1, 0), v4(0, 0, 17, 0)] {
            assert_eq!(parse_v4(&bytes), None, "{bytes:?}");
        }
        for bytes in [v6(2, 0, 6), v6(135, 0, 6), v6(1, 4, 58), v6(4, 0, 6)] {
            assert_eq!(parse_v6(&bytes), None, "{bytes:?}");
        }
    }
}
