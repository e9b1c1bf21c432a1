//! Packets that rules log to an nflog group (`include/uapi/linux/netfilter/nfnetlink_log.h`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigMode, ConfigNla, PacketNla, ULogMessage, config_request,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::{Socket as RawSocket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::error::Error;

/// One read: a packet's headers with their attributes are far smaller.
const READ: usize = 64 << 10;

/// A logged packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedPacket {
    /// The rule's prefix.
    pub prefix: String,
    /// Where the packet came from.
    pub source: IpAddr,
    /// Where it went to.
    pub destination: IpAddr,
    /// The transport protocol's number.
    pub protocol: u8,
    /// The port that it came from; `None` if the packet is too short to have one.
    pub source_port: Option<u16>,
    /// The port that it went to; `None` if the packet is too short to have one.
    pub destination_port: Option<u16>,
}

/// Listens to one group.
#[derive(Debug)]
pub struct Listener {
    socket: RawSocket,
}

impl Listener {
    /// Takes the group over.
    ///
    /// # Errors
    /// [`Error::List`] with the kernel's reason: `EPERM` if another socket listens to the group, or
    /// without CAP_NET_ADMIN.
    pub fn open(group: u16) -> Result<Listener, Error> {
        let mut socket = RawSocket::new(NETLINK_NETFILTER).map_err(Error::Open)?;
        socket.bind_auto().map_err(Error::Open)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(Error::Open)?;
        // Losing samples is no error.
        socket.set_no_enobufs(true).map_err(Error::Open)?;
        let listener = Listener { socket };
        listener.configure(group, ConfigNla::Cmd(ConfigCmd::Bind))?;
        listener.configure(group, ConfigNla::Mode(ConfigMode::PACKET_MAX))?;
        Ok(listener)
    }

    fn configure(&self, group: u16, setting: ConfigNla) -> Result<(), Error> {
        let message = config_request(NetfilterProtoFamily::Unspec, group, vec![setting]);
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(Error::Send)?;
        // A packet may come before the answer.
        loop {
            for message in self.read()? {
                if let NetlinkPayload::Error(answer) = message.payload {
                    return match answer.code {
                        None => Ok(()),
                        Some(_) => {
                            Err(Error::List { what: "logged packets", source: answer.to_io() })
                        }
                    };
                }
            }
        }
    }

    /// Waits for logged packets. Those that are not IP are left out.
    ///
    /// # Errors
    /// [`Error::Receive`] when the socket fails.
    pub fn wait(&self) -> Result<Vec<LoggedPacket>, Error> {
        let messages = self.read()?.into_iter();
        Ok(messages.filter_map(|message| logged(message.payload)).collect())
    }

    fn read(&self) -> Result<Vec<NetlinkMessage<NetfilterMessage>>, Error> {
        let mut buffer = Vec::with_capacity(READ);
        loop {
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Receive(error)),
            }
        }
        let mut messages = Vec::new();
        let mut rest = buffer.as_slice();
        while let Ok(message) = NetlinkMessage::deserialize(rest) {
            let length = (message.header.length as usize).next_multiple_of(4);
            messages.push(message);
            match rest.get(length..) {
                Some(more) if length > 0 => rest = more,
                _ => break,
            }
        }
        Ok(messages)
    }
}

fn logged(payload: NetlinkPayload<NetfilterMessage>) -> Option<LoggedPacket> {
    let NetlinkPayload::InnerMessage(message) = payload else { return None };
    let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner else {
        return None;
    };
    let (mut prefix, mut packet) = (String::new(), None);
    for attribute in &attributes {
        match attribute {
            PacketNla::Prefix(text) => prefix = text.to_string_lossy().into_owned(),
            PacketNla::Payload(bytes) => packet = Some(bytes.as_slice()),
            _ => {}
        }
    }
    parse(prefix, packet?)
}

/// Reads the headers of a packet (RFC 791, RFC 8200). IPv6 extension headers are not walked: the
/// protocol is then the first of them and there are no ports.
fn parse(prefix: String, packet: &[u8]) -> Option<LoggedPacket> {
    let (source, destination, protocol, transport): (IpAddr, IpAddr, u8, usize) =
        match packet.first()? >> 4 {
            4 => (
                Ipv4Addr::from(*packet.get(12..)?.first_chunk::<4>()?).into(),
                Ipv4Addr::from(*packet.get(16..)?.first_chunk::<4>()?).into(),
                *packet.get(9)?,
                usize::from(packet.first()? & 0xf) * 4,
            ),
            6 => (
                Ipv6Addr::from(*packet.get(8..)?.first_chunk::<16>()?).into(),
                Ipv6Addr::from(*packet.get(24..)?.first_chunk::<16>()?).into(),
                *packet.get(6)?,
                40,
            ),
            _ => return None,
        };
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let port = |at: usize| {
        let bytes = has_ports.then(|| packet.get(transport + at..)?.first_chunk::<2>())??;
        Some(u16::from_be_bytes(*bytes))
    };
    let (source_port, destination_port) = (port(0), port(2));
    Some(LoggedPacket { prefix, source, destination, protocol, source_port, destination_port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_headers_and_survives_short_packets() {
        let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        packet.extend([192, 0, 2, 1, 10, 0, 0, 1, 0xc0, 0, 0x75, 0x30]);
        let parsed = parse("shop/web".to_owned(), &packet).unwrap();
        assert_eq!(parsed.source, "192.0.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(parsed.destination_port, Some(30000));
        assert_eq!(parse(String::new(), &packet[..22]).unwrap().destination_port, None);
        for length in 0..20 {
            assert_eq!(parse(String::new(), &packet[..length]), None, "{length}");
        }
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
        packet.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend([0, 53, 0, 54]);
        let parsed = parse(String::new(), &packet).unwrap();
        assert_eq!((parsed.protocol, parsed.source_port), (17, Some(53)));
    }
}
