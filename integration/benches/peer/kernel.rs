//! Asking the kernel whether maps hold what they should, without listing them.
//!
//! A listing of a large map takes long and disturbs who is writing it. Single elements are looked
//! up by their keys, and the kernel knows how many there are.

use std::io;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NetlinkBuffer, NlaBuffer, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

// include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_COUNT: u16 = 20;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_DATA_VALUE: u16 = 1;
// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST_ACK: u16 = 5;
const NLA_F_NESTED: u16 = 1 << 15;
/// `struct nlmsghdr`, and with `struct nfgenmsg`.
const HEADER: usize = 16;
const HEADERS: usize = 20;

/// What a map is to hold.
#[derive(Clone, Debug)]
pub struct Expected {
    /// `NFPROTO_IPV4` or `NFPROTO_INET`.
    pub family: u8,
    /// The table.
    pub table: &'static str,
    /// The set or map.
    pub map: String,
    /// How many elements it has at least.
    pub count: u32,
    /// Keys of some of them.
    pub keys: Vec<Vec<u8>>,
}

/// A socket in the namespace of the thread that opened it.
pub struct Kernel(Socket);

impl Kernel {
    /// Opens the socket.
    ///
    /// # Errors
    /// Where the kernel has no nfnetlink.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER).context("open a netlink socket")?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // An answer for each key is queued before the first is read.
        socket.set_rx_buf_sz(4_u32 << 20).context("raise the receive buffer")?;
        Ok(Self(socket))
    }

    /// Whether the map holds all the keys, and as many elements. Elements of a transaction that
    /// is not committed yet have no key that is found, but they are counted.
    ///
    /// # Errors
    /// When the kernel does not answer, or does not tell how many elements a map has (before
    /// Linux 6.16).
    pub fn holds(&self, expected: &Expected) -> Result<bool> {
        Ok(self.has_keys(expected)? && self.count(expected)? >= Some(expected.count))
    }

    /// How many elements a map has; `None` if there is no such map.
    fn count(&self, expected: &Expected) -> Result<Option<u32>> {
        let mut request = request(NFT_MSG_GETSET, expected.family);
        put_name(&mut request, NFTA_SET_TABLE, expected.table);
        put_name(&mut request, NFTA_SET_NAME, &expected.map);
        let mut count = None;
        let found = self.ask(request, |kind, attributes| {
            if kind == NFT_MSG_NEWSET {
                count = find(attributes, NFTA_SET_COUNT);
            }
        })?;
        if found && count.is_none() {
            bail!("the kernel does not tell how many elements a map has; this needs Linux 6.16");
        }
        Ok(count)
    }

    fn has_keys(&self, expected: &Expected) -> Result<bool> {
        let mut request = request(NFT_MSG_GETSETELEM, expected.family);
        put_name(&mut request, NFTA_SET_ELEM_LIST_TABLE, expected.table);
        put_name(&mut request, NFTA_SET_ELEM_LIST_SET, &expected.map);
        let mut elements = Vec::new();
        for key in &expected.keys {
            let value = nested(NFTA_SET_ELEM_KEY, &attribute(NFTA_DATA_VALUE, key));
            elements.extend(nested(NFTA_LIST_ELEM, &value));
        }
        request.extend(nested(NFTA_SET_ELEM_LIST_ELEMENTS, &elements));
        let mut found = 0;
        let all = self.ask(request, |kind, _| found += usize::from(kind == NFT_MSG_NEWSETELEM))?;
        Ok(all && found == expected.keys.len())
    }

    /// Sends a request and hands over the answers; gives whether what it names is there.
    fn ask(&self, mut request: Vec<u8>, mut each: impl FnMut(u16, &[u8])) -> Result<bool> {
        let length = u32::try_from(request.len())?;
        request[..4].copy_from_slice(&length.to_ne_bytes());
        self.0.send(&request, 0).context("ask the kernel")?;
        let mut datagram = Vec::with_capacity(64 << 10);
        loop {
            datagram.clear();
            self.0.recv(&mut datagram, 0).context("read the kernel's answer")?;
            let mut rest = datagram.as_slice();
            while rest.len() >= HEADER {
                let message = NetlinkBuffer::new_checked(rest)?;
                let payload = &rest[HEADER..message.length() as usize];
                if message.message_type() == NLMSG_ERROR {
                    let code = i32::from_ne_bytes(payload[..4].try_into()?);
                    let error = io::Error::from_raw_os_error(-code);
                    return match (code, error.kind()) {
                        (0, _) => Ok(true),
                        (_, io::ErrorKind::NotFound) => Ok(false),
                        _ => Err(error).context("the kernel refuses to tell"),
                    };
                }
                each(message.message_type() & 0xff, &payload[HEADERS - HEADER..]);
                rest = rest.get(message.length().next_multiple_of(4) as usize..).unwrap_or(&[]);
            }
        }
    }
}

fn request(kind: u16, family: u8) -> Vec<u8> {
    let mut request = vec![0; HEADERS];
    request[4..6].copy_from_slice(&(NFNL_SUBSYS_NFTABLES << 8 | kind).to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    request[HEADER] = family;
    request
}

fn put_name(request: &mut Vec<u8>, kind: u16, name: &str) {
    request.extend(attribute(kind, &[name.as_bytes(), b"\0"].concat()));
}

fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, value)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("a request is short");
    let mut out = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn find(attributes: &[u8], kind: u16) -> Option<u32> {
    let mut all = NlasIterator::new(attributes).filter_map(Result::ok);
    let found = all.find(|attribute: &NlaBuffer<_>| attribute.kind() == kind)?;
    Some(u32::from_be_bytes(found.value().try_into().ok()?))
}
