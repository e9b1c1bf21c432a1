//! INIT and INIT ACK of SCTP (RFC 9260) over raw sockets.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::{
    BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET,
};
use socket2::{Domain, SockFilter, Socket, Type};

use super::{Answer, datagram};

/// Section 3.1: source port, destination port, verification tag, checksum.
const COMMON_HEADER: usize = 12;
/// Sections 3.3.2 and 3.3.3: chunk header, initiate tag, window, two stream counts, TSN.
const INIT_CHUNK: usize = 20;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
/// Section 3.3.3: the State Cookie parameter, mandatory in INIT ACK.
const STATE_COOKIE: u16 = 7;

/// The client's side of one association that is never finished.
pub(super) struct Handshake {
    to: SocketAddr,
    source_port: u16,
    tag: u32,
}

/// What a packet means to a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// An INIT ACK with the server's answer in its cookie.
    Answer(String),
    /// An ABORT.
    Abort,
}

impl Handshake {
    /// A raw socket connected to `to`, and the handshake to do on it.
    pub(super) fn open(
        source: Option<IpAddr>,
        source_port: u16,
        to: SocketAddr,
    ) -> io::Result<(Socket, Self)> {
        let socket = raw(Domain::for_address(to))?;
        if let Some(source) = source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        socket.connect(&SocketAddr::new(to.ip(), 0).into())?;
        socket.attach_filter(&only_to_port(to.ip(), source_port))?;
        socket.set_nonblocking(true)?;
        // Never 0 (section 3.3.2), and no other handshake on this socket's machine has it.
        let tag = 0x5043_0000 | u32::from(source_port);
        Ok((socket, Self { to, source_port, tag }))
    }

    /// The port that it is done from.
    pub(super) fn source_port(&self) -> u16 {
        self.source_port
    }

    /// Sends the INIT.
    pub(super) fn send(&self, socket: &Socket) -> io::Result<()> {
        let init = self.init();
        // An error may be an ICMP error for what another handshake sent to the same host, which
        // is over once it was told; not so if a rule on the own output hook drops it.
        for _ in 0..10 {
            match socket.send(&init) {
                Err(error) if error.raw_os_error() != Some(Errno::EPERM as i32) => {}
                result => return result.map(drop),
            }
        }
        socket.send(&init).map(drop)
    }

    /// Takes what the socket has; `None` if that is nothing for this handshake.
    pub(super) fn receive(&self, mut socket: &Socket) -> Option<Reply> {
        let mut buffer = [0; 2048];
        let length = socket.read(&mut buffer).ok()?;
        self.reply(&buffer[..length])
    }

    fn init(&self) -> Vec<u8> {
        // Section 8.5.1: a packet with an INIT has verification tag 0.
        packet(self.source_port, self.to.port(), 0, INIT, self.tag, &[])
    }

    /// What a packet means; `None` if it is for another handshake.
    fn reply(&self, bytes: &[u8]) -> Option<Reply> {
        let packet = Packet::parse(transport(self.to.ip(), bytes)?)?;
        let ours = packet.source_port == self.to.port()
            && packet.destination_port == self.source_port
            && packet.verification_tag == self.tag;
        match packet.chunk {
            INIT_ACK if ours => {
                let cookie = packet.cookie()?;
                Some(Reply::Answer(String::from_utf8_lossy(cookie).into_owned()))
            }
            ABORT if ours => Some(Reply::Abort),
            _ => None,
        }
    }
}

/// The server's side: raw sockets see every SCTP packet of the namespace.
pub(super) struct Responder {
    sockets: Vec<(IpAddr, Socket)>,
    port: u16,
}

impl Responder {
    /// Listens on an address; the unspecified one stands for both families.
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let addresses = if address.ip().is_unspecified() {
            vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
        } else {
            vec![address.ip()]
        };
        let open = |ip: IpAddr| {
            let socket = raw(Domain::for_address(SocketAddr::new(ip, 0)))?;
            let address = SocketAddr::new(ip, 0);
            socket.bind(&address.into())?;
            socket.set_nonblocking(true)?;
            datagram::tell_destination(&socket, address)?;
            Ok((ip, socket))
        };
        let sockets = addresses.into_iter().map(open).collect::<io::Result<_>>()?;
        Ok(Self { sockets, port: address.port() })
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|(_, socket)| socket.as_fd()).collect()
    }

    /// Answers the INITs that have come, calling `count` for each.
    pub(super) fn answer(&self, name: &str, count: impl Fn() -> u64) {
        let mut buffer = [0; 2048];
        for (family, socket) in &self.sockets {
            while let Ok(mut received) = datagram::receive(socket, &mut buffer) {
                let packet = transport(*family, &buffer[..received.length]).and_then(Packet::parse);
                let Some(packet) = packet else { continue };
                if packet.chunk != INIT || packet.destination_port != self.port {
                    continue;
                }
                count();
                let source = SocketAddr::new(received.from.ip(), packet.source_port);
                let cookie = Answer::new(0, name, source).to_string();
                // The port of a raw IPv6 socket's address would be taken for a protocol number.
                received.from.set_port(0);
                let _ = datagram::answer(socket, &init_ack(&packet, &cookie), &received);
            }
        }
    }
}

/// The packet that answers `init`.
fn init_ack(init: &Packet<'_>, cookie: &str) -> Vec<u8> {
    let length = u16::try_from(4 + cookie.len()).expect("a cookie is short");
    let mut parameter = Vec::with_capacity(usize::from(length) + 3);
    parameter.extend(STATE_COOKIE.to_be_bytes());
    parameter.extend(length.to_be_bytes());
    parameter.extend(cookie.as_bytes());
    let tag = init.initiate_tag.wrapping_add(1);
    packet(init.destination_port, init.source_port, init.initiate_tag, INIT_ACK, tag, &parameter)
}

/// A packet with one INIT or INIT ACK chunk.
fn packet(
    source_port: u16,
    destination_port: u16,
    verification_tag: u32,
    chunk: u8,
    initiate_tag: u32,
    parameter: &[u8],
) -> Vec<u8> {
    let length = u16::try_from(INIT_CHUNK + parameter.len()).expect("a chunk is short");
    let mut bytes = Vec::with_capacity(COMMON_HEADER + usize::from(length) + 3);
    bytes.extend(source_port.to_be_bytes());
    bytes.extend(destination_port.to_be_bytes());
    bytes.extend(verification_tag.to_be_bytes());
    bytes.extend([0; 4]); // the checksum is over the packet with zeros here
    bytes.extend([chunk, 0]);
    bytes.extend(length.to_be_bytes());
    bytes.extend(initiate_tag.to_be_bytes());
    bytes.extend(65_536_u32.to_be_bytes()); // receiver window
    bytes.extend(1_u16.to_be_bytes()); // outbound streams
    bytes.extend(1_u16.to_be_bytes()); // inbound streams
    bytes.extend(initiate_tag.to_be_bytes()); // initial TSN
    bytes.extend(parameter);
    // The padding is not in the chunk's length (section 3.2).
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let checksum = crc32c::crc32c(&bytes);
    bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A received packet; only its first chunk is looked at.
struct Packet<'a> {
    source_port: u16,
    destination_port: u16,
    verification_tag: u32,
    chunk: u8,
    /// Of an INIT or INIT ACK; otherwise 0.
    initiate_tag: u32,
    parameters: &'a [u8],
}

impl<'a> Packet<'a> {
    /// `None` for what is not SCTP or has a wrong checksum.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, chunk) = bytes.split_at_checked(COMMON_HEADER)?;
        let checksum = u32::from_le_bytes(header[8..12].try_into().ok()?);
        let mut zeroed = bytes.to_vec();
        zeroed[8..12].fill(0);
        if crc32c::crc32c(&zeroed) != checksum {
            return None;
        }
        let kind = *chunk.first()?;
        let length = usize::from(be16(chunk.get(2..4)?));
        let (initiate_tag, parameters) = if matches!(kind, INIT | INIT_ACK) {
            (be32(chunk.get(4..8)?), chunk.get(INIT_CHUNK..length)?)
        } else {
            (0, &[][..])
        };
        Some(Self {
            source_port: be16(&header[..2]),
            destination_port: be16(&header[2..4]),
            verification_tag: be32(&header[4..8]),
            chunk: kind,
            initiate_tag,
            parameters,
        })
    }

    /// The value of the State Cookie, which our servers put first.
    fn cookie(&self) -> Option<&'a [u8]> {
        let kind = be16(self.parameters.get(..2)?);
        let length = usize::from(be16(self.parameters.get(2..4)?));
        if kind == STATE_COOKIE { self.parameters.get(4..length) } else { None }
    }
}

/// A socket filter (`linux/filter.h`) that passes what goes to one port. Without it every handshake
/// of a hundred with the same peer would get the packets of all.
fn only_to_port(family: IpAddr, port: u16) -> Vec<SockFilter> {
    let instruction = |code: u32, jt, jf, k| {
        let code = u16::try_from(code).expect("BPF codes have 16 bits");
        SockFilter::new(code, jt, jf, k)
    };
    let mut filter = match family {
        // X = 4 * (packet[0] & 0xf), the length of the IP header; A = u16 at X + 2.
        IpAddr::V4(_) => vec![
            instruction(BPF_LDX | BPF_B | BPF_MSH, 0, 0, 0),
            instruction(BPF_LD | BPF_H | BPF_IND, 0, 0, 2),
        ],
        IpAddr::V6(_) => vec![instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, 2)],
    };
    filter.extend([
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, port.into()),
        instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
        instruction(BPF_RET | BPF_K, 0, 0, 0),
    ]);
    filter
}

fn raw(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::RAW, Some(socket2::Protocol::SCTP))
}

/// What follows the IP header: raw IPv4 sockets give it with the packet, IPv6 ones do not.
fn transport(family: IpAddr, bytes: &[u8]) -> Option<&[u8]> {
    match family {
        IpAddr::V4(_) => bytes.get(usize::from(bytes.first()? & 0x0f) * 4..),
        IpAddr::V6(_) => Some(bytes),
    }
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake(source_port: u16) -> Handshake {
        Handshake { to: (Ipv6Addr::LOCALHOST, 80).into(), source_port, tag: 42 }
    }

    fn acknowledge(handshake: &Handshake, cookie: &str) -> Vec<u8> {
        init_ack(&Packet::parse(&handshake.init()).unwrap(), cookie)
    }

    #[test]
    fn a_cookie_of_any_length_comes_back() {
        for cookie in ["", "a", "ab", "abc", "abcd", "0 pod-0 192.0.2.10:4711\n"] {
            let handshake = handshake(4711);
            let acknowledgement = acknowledge(&handshake, cookie);
            assert_eq!(acknowledgement.len() % 4, 0);
            assert_eq!(handshake.reply(&acknowledgement), Some(Reply::Answer(cookie.into())));
        }
    }

    #[test]
    fn what_is_damaged_or_for_another_is_ignored() {
        let handshake = handshake(4711);
        let acknowledgement = acknowledge(&handshake, "cookie");
        for byte in 0..acknowledgement.len() {
            let mut damaged = acknowledgement.clone();
            damaged[byte] ^= 1;
            assert_eq!(handshake.reply(&damaged), None, "byte {byte}");
        }
        for length in 0..acknowledgement.len() {
            assert_eq!(handshake.reply(&acknowledgement[..length]), None, "length {length}");
        }
        let other = Handshake { source_port: 4712, ..handshake };
        assert_eq!(other.reply(&acknowledgement), None);
        assert_eq!(other.reply(&other.init()), None);
    }

    #[test]
    fn the_checksum_is_the_one_of_the_rfc() {
        // RFC 3720 B.4 for the polynomial: 32 bytes of zeros.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
