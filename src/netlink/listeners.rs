//! Listing the sockets of this network namespace that wait for clients (`sock_diag`,
//! `include/uapi/linux/inet_diag.h`).

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, ParseableParametrized,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::error::Error;
use super::socket::{ListError, Socket};

const UDP: u8 = 17;

/// The local addresses of all sockets of a transport protocol, by its number, that wait for
/// clients: those that listen, or of UDP those that are not connected. The kernel looks through no
/// others, however many connections there are. None where it cannot list those of the protocol
/// (of SCTP, without the module `sctp_diag`).
///
/// # Errors
/// [`Error::Open`] where the kernel has no `sock_diag`, and those of a listing.
pub fn listeners(protocol: u8) -> Result<BTreeSet<SocketAddr>, Error> {
    let mut socket = Socket::open_protocol(NETLINK_SOCK_DIAG)?;
    let mut found = BTreeSet::new();
    for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let states = if protocol == UDP { StateFlags::CLOSE } else { StateFlags::LISTEN };
        let extensions = ExtensionFlags::empty();
        let request = InetRequest { family, protocol, extensions, states, socket_id };
        let listed = socket.list(encode(request), |kind, payload| {
            let answer = SockDiagMessage::parse_with_param(payload, kind);
            if let Ok(SockDiagMessage::InetResponse(answer)) = answer {
                let id = answer.header.socket_id;
                found.insert((id.source_address, id.source_port).into());
            }
        });
        match listed {
            // Sockets come and go all the time; what was seen must do.
            Ok(()) | Err(ListError::Interrupted) => {}
            Err(ListError::Refused(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.listing("sockets")),
        }
    }
    Ok(found)
}

fn encode(request: InetRequest) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let message = SockDiagMessage::InetRequest(request);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    #[test]
    fn sockets_of_this_machine_are_seen() {
        const TCP: u8 = 6;
        const SCTP: u8 = 132;
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let v6 = TcpListener::bind("[::1]:0").unwrap();
        let open = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect("127.0.0.1:9").unwrap();

        let seen = listeners(TCP).unwrap();
        assert!(seen.contains(&tcp.local_addr().unwrap()));
        assert!(seen.contains(&v6.local_addr().unwrap()));
        assert!(!seen.contains(&open.local_addr().unwrap()));
        let seen = listeners(UDP).unwrap();
        assert!(seen.contains(&udp.local_addr().unwrap()));
        assert!(!seen.contains(&connected.local_addr().unwrap()));
        // Whether or not the kernel can tell.
        assert!(!listeners(SCTP).unwrap().contains(&tcp.local_addr().unwrap()));
    }
}
