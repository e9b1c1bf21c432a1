//! Listing and deleting connection tracking entries (ctnetlink,
//! `include/uapi/linux/netfilter/nfnetlink_conntrack.h`).

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    ParseableParametrized,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use super::error::Error;
use super::socket::{ListError, Socket};
use crate::model::Family;

/// How often a listing is begun anew because entries moved under it.
const ATTEMPTS: usize = 5;
/// What is listed and deleted.
const WHAT: &str = "tracked connections";
/// `CTA_ID`: with it a new connection that has the tuple of one that is gone is left alone.
const CTA_ID: u16 = 12;
/// `CTA_ZONE`.
const CTA_ZONE: u16 = 18;

/// A tracked connection, as its first packet had it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The transport protocol's number.
    pub protocol: u8,
    /// Where the first packet came from.
    pub source: IpAddr,
    /// Where the first packet went to, before any translation.
    pub destination: IpAddr,
    /// The port that it went to, before any translation.
    pub destination_port: u16,
    /// Where answers come from: whom it was led to.
    pub answering: (IpAddr, u16),
    /// Whether its destination was translated (`IPS_DST_NAT`).
    pub translated: bool,
    /// What identifies it to the kernel.
    identity: Vec<ConntrackAttribute>,
}

impl Socket {
    /// Deletes the tracked connections of `family` that `doomed` chooses; returns how many. One
    /// that the kernel does not delete keeps nobody from deleting the others.
    ///
    /// # Errors
    /// [`Error::List`] with the kernel's first reason, for listing and deleting alike; entries that
    /// are gone already are no error.
    pub fn delete_flows(
        &mut self,
        family: Family,
        mut doomed: impl FnMut(&Flow) -> bool,
    ) -> Result<usize, Error> {
        let mut chosen = Vec::new();
        for attempt in 1.. {
            chosen.clear();
            let request = request(family, NLM_F_DUMP, ConntrackMessage::Get(Vec::new()));
            let listed = self.list(request, |kind, payload| {
                chosen.extend(flow(kind, payload).filter(|flow| doomed(flow)));
            });
            match listed {
                Ok(()) => break,
                // Connections come and go all the time; after some attempts what was seen must do.
                Err(ListError::Interrupted) if attempt == ATTEMPTS => break,
                Err(ListError::Interrupted) => {}
                Err(error) => return Err(error.listing(WHAT)),
            }
        }
        let (mut deleted, mut first_error) = (0, None);
        for flow in chosen {
            let message = ConntrackMessage::Delete(flow.identity);
            match self.list(request(family, NLM_F_ACK, message), |_, _| {}) {
                Ok(()) => deleted += 1,
                Err(ListError::Refused(error)) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(deleted), |error| Err(error.listing(WHAT)))
    }
}

fn request(family: Family, flags: u16, message: ConntrackMessage) -> Vec<u8> {
    let family = match family {
        Family::V4 => NetfilterProtoFamily::IPv4,
        Family::V6 => NetfilterProtoFamily::IPv6,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let inner = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(inner));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn flow(kind: u16, payload: &[u8]) -> Option<Flow> {
    let message = NetfilterMessage::parse_with_param(payload, kind).ok()?;
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner else {
        return None;
    };
    let mut flow = Flow {
        protocol: 0,
        source: IpAddr::from([0; 4]),
        destination: IpAddr::from([0; 4]),
        destination_port: 0,
        answering: (IpAddr::from([0; 4]), 0),
        translated: false,
        identity: Vec::new(),
    };
    for attribute in attributes {
        match &attribute {
            ConntrackAttribute::CtaTupleOrig(tuples) => {
                for tuple in tuples {
                    flow.read(tuple);
                }
                flow.identity.push(attribute);
            }
            ConntrackAttribute::CtaTupleReply(tuples) => {
                flow.answering = source(tuples);
            }
            ConntrackAttribute::CtaStatus(status) => {
                flow.translated = status.contains(Status::DstNat);
            }
            ConntrackAttribute::Other(nla) => {
                use netlink_packet_core::Nla;
                if [CTA_ID, CTA_ZONE].contains(&nla.kind()) {
                    flow.identity.push(attribute);
                }
            }
            _ => {}
        }
    }
    (!flow.identity.is_empty()).then_some(flow)
}

/// Where the packets of a direction come from.
fn source(tuples: &[Tuple]) -> (IpAddr, u16) {
    let mut source = (IpAddr::from([0; 4]), 0);
    for tuple in tuples {
        match tuple {
            Tuple::Ip(addresses) => {
                for address in addresses {
                    if let IPTuple::SourceAddress(address) = address {
                        source.0 = *address;
                    }
                }
            }
            Tuple::Proto(ports) => {
                for port in ports {
                    if let ProtoTuple::SourcePort(port) = port {
                        source.1 = *port;
                    }
                }
            }
            _ => {}
        }
    }
    source
}

impl Flow {
    fn read(&mut self, tuple: &Tuple) {
        match tuple {
            Tuple::Ip(addresses) => {
                for address in addresses {
                    match address {
                        IPTuple::SourceAddress(address) => self.source = *address,
                        IPTuple::DestinationAddress(address) => self.destination = *address,
                        _ => {}
                    }
                }
            }
            Tuple::Proto(ports) => {
                for port in ports {
                    match port {
                        ProtoTuple::Protocol(protocol) => self.protocol = (*protocol).into(),
                        ProtoTuple::DestinationPort(port) => self.destination_port = *port,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}
