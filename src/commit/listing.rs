//! Listing our table without listing every endpoint.

use std::collections::HashMap;
use std::net::IpAddr;

use super::adopt::balancer;
use crate::model::{Backend, Family};
use crate::netlink::{Data, ElementDump, Error, SetDump, Socket, TableDump, TableFlags, Verdict};
use crate::ruleset::{ElementKey, KeyBytes, SetName, TABLE, layout_comment};

/// What a table holds, as the kernel lists it.
#[derive(Debug)]
pub(super) struct Listing {
    /// The table, without the elements that are in `endpoints`.
    pub table: TableDump,
    /// Endpoints that were read by their slots.
    pub endpoints: Endpoints,
}

/// The endpoints of each address in a map of endpoints, by slot. The key of an endpoint is that of
/// the address with the slot behind it.
pub(super) type Endpoints = HashMap<(SetName, KeyBytes), Vec<Option<Backend>>>;

/// The endpoints of one address, by slot.
type Slots = (KeyBytes, Vec<Option<Backend>>);

/// Lists our table; `None` where there is none.
///
/// The maps of endpoints are too large to be listed ([`Socket::list_table`]), and what they
/// hold is known from elsewhere: the chain that an address leads to says how many slots it has. So
/// they are read slot by slot. If they hold something else besides, they are listed after all.
///
/// # Errors
/// When the kernel does not list it.
pub(super) fn list(socket: &mut Socket) -> Result<Option<Listing>, Error> {
    socket.at_one_moment(try_list)
}

fn try_list(socket: &mut Socket) -> Result<Option<Listing>, Error> {
    let maps = Family::ALL.map(|family| {
        [
            (family, SetName::ServiceIps(family), SetName::Endpoints(family)),
            (family, SetName::NodePorts(family), SetName::NodePortEndpoints(family)),
        ]
    });
    let left_out: Vec<_> = maps.iter().flatten().map(|(_, _, map)| map.name()).collect();
    let left_out: Vec<&str> = left_out.iter().map(|name| &**name).collect();
    let Some(mut table) = socket.list_table(TABLE, &left_out)? else { return Ok(None) };
    let mut endpoints = Endpoints::new();
    if !is_ours(&table) {
        return Ok(Some(Listing { table, endpoints }));
    }
    for (family, index, map) in maps.into_iter().flatten() {
        let Some(index) = table.sets.get(&*index.name()) else { continue };
        // Without a count it is listed already.
        let Some(count) = table.sets.get(&*map.name()).and_then(|set| set.count) else { continue };
        if let Some(read) = read_endpoints(socket, family, &map, index, count as usize)? {
            endpoints.extend(read.into_iter().map(|(key, slots)| ((map.clone(), key), slots)));
        } else if let Some(set) = table.sets.get_mut(&*map.name()) {
            socket.list_elements(TABLE, &map.name(), set)?;
        }
    }
    Ok(Some(Listing { table, endpoints }))
}

/// The endpoints of every address that `index` leads to a balancing chain; `None` if `map` holds
/// more than these, or less.
fn read_endpoints(
    socket: &mut Socket,
    family: Family,
    map: &SetName,
    index: &SetDump,
    count: usize,
) -> Result<Option<Vec<Slots>>, Error> {
    let slots = |element: &ElementDump| match &element.data {
        Some(Data::Verdict(Verdict::Goto(chain))) => balancer(chain).map(|b| b.endpoints),
        _ => None,
    };
    let addresses = index.elements.iter().filter_map(|e| Some((e.key.as_slice(), slots(e)?)));
    let addresses: Vec<(&[u8], u32)> = addresses.collect();
    if addresses.iter().map(|(_, slots)| *slots as usize).sum::<usize>() != count {
        return Ok(None);
    }
    let mut backends = Vec::with_capacity(count);
    let keys = addresses.iter().flat_map(|(address, slots)| {
        (0..*slots).map(move |slot| [*address, &slot.to_ne_bytes()].concat())
    });
    socket.read_elements(TABLE, &map.name(), keys, |element| match element {
        ElementDump { data: Some(Data::Value(value)), comment: None, .. } => {
            backends.push(backend(family, &value));
        }
        _ => backends.push(None),
    })?;
    if backends.len() != count || backends.contains(&None) {
        return Ok(None);
    }
    let mut backends = backends.into_iter();
    let endpoints = addresses.iter().map(|(address, slots)| {
        Some((KeyBytes::new(address)?, backends.by_ref().take(*slots as usize).collect()))
    });
    Ok(endpoints.collect())
}

/// Whether code with the same idea of the table has laid it out, and it is at work: a table can be
/// put to sleep (`NFT_TABLE_F_DORMANT`).
pub(super) fn is_ours(dump: &TableDump) -> bool {
    let strange = dump.flags.0 & !TableFlags::OWNED.0 != 0;
    !strange && dump.comment.as_deref() == Some(&layout_comment())
}

/// What stands before the slot in the key of an endpoint, and the slot. `None` for keys of other
/// sets.
pub(super) fn without_slot(key: &ElementKey) -> Option<((SetName, KeyBytes), usize)> {
    let (SetName::Endpoints(_) | SetName::NodePortEndpoints(_)) = key.set else { return None };
    let (address, slot) = key.bytes.as_slice().split_last_chunk()?;
    let slot = usize::try_from(u32::from_ne_bytes(*slot)).ok()?;
    Some(((key.set.clone(), KeyBytes::new(address)?), slot))
}

/// The key of the endpoint at `slot` of an address.
pub(super) fn with_slot(map: &SetName, address: &KeyBytes, slot: usize) -> ElementKey {
    let slot = u32::try_from(slot).expect("slots are numbered by u32");
    let bytes = [address.as_slice(), &slot.to_ne_bytes()].concat();
    let bytes = KeyBytes::new(&bytes).expect("the key was read with its slot");
    ElementKey { set: map.clone(), bytes, end: None }
}

/// The endpoint that an element of a map of endpoints leads to.
pub(super) fn backend(family: Family, value: &[u8]) -> Option<Backend> {
    let (address, port): (IpAddr, &[u8]) = match family {
        Family::V4 => ((*value.first_chunk::<4>()?).into(), value.get(4..6)?),
        Family::V6 => ((*value.first_chunk::<16>()?).into(), value.get(16..18)?),
    };
    Some(Backend { address, port: u16::from_be_bytes(port.try_into().ok()?) })
}
