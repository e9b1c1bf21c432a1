//! Datagrams whose answers leave with the address that the question was sent to.
//!
//! Without this, an answer from a host with several addresses gets the one that the route to the
//! client prefers, and the client, whose socket is connected, never sees it.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockaddrLike, SockaddrStorage,
    recvmsg, sendmsg, setsockopt, sockopt,
};

/// A datagram that came.
pub(super) struct Received {
    /// Its length.
    pub(super) length: usize,
    /// Who sent it; for raw sockets without a meaningful port.
    pub(super) from: SocketAddr,
    /// Which of our addresses it was sent to; mapped (`::ffff:a.b.c.d`) on a dual-stack socket.
    pub(super) to: IpAddr,
}

/// Makes the kernel tell [`receive`] the destination of each datagram.
pub(super) fn tell_destination<F: AsFd>(socket: &F, address: SocketAddr) -> Result<(), Errno> {
    match address {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true),
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true),
    }
}

/// Takes one datagram from a non-blocking socket.
pub(super) fn receive<F: AsFd>(socket: &F, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(in6_pktinfo);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let to = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes()))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(info.ipi6_addr.s6_addr.into()),
        _ => None,
    });
    let from = message.address.as_ref().and_then(socket_address);
    let (Some(to), Some(from)) = (to, from) else { return Err(Errno::EPROTO) };
    Ok(Received { length: message.bytes, from, to })
}

/// Answers a received datagram, from the address that it was sent to.
pub(super) fn answer<F: AsFd>(socket: &F, bytes: &[u8], question: &Received) -> Result<(), Errno> {
    let v4;
    let v6;
    let control = match question.to {
        IpAddr::V4(address) => {
            let source = in_addr { s_addr: u32::from_ne_bytes(address.octets()) };
            let any = in_addr { s_addr: 0 };
            v4 = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: any };
            ControlMessage::Ipv4PacketInfo(&v4)
        }
        IpAddr::V6(address) => {
            let source = in6_addr { s6_addr: address.octets() };
            v6 = in6_pktinfo { ipi6_addr: source, ipi6_ifindex: 0 };
            ControlMessage::Ipv6PacketInfo(&v6)
        }
    };
    let to = SockaddrStorage::from(question.from);
    let parts = [IoSlice::new(bytes)];
    let fd = socket.as_fd().as_raw_fd();
    sendmsg(fd, &parts, &[control], MsgFlags::empty(), Some(&to)).map(drop)
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    match address.family()? {
        AddressFamily::Inet => address.as_sockaddr_in().map(|address| (*address).into()),
        AddressFamily::Inet6 => {
            let address = address.as_sockaddr_in6()?;
            // Link-local clients are not a thing of these laboratories: no scope.
            Some((address.ip(), address.port()).into())
        }
        _ => None,
    }
}
