//! Listing our table without listing every endpoint.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::model::{Backend, Family};
use crate::netlink::{Data, ElementDump, Error, SetDump, Socket, TableDump, TableFlags, Verdict};
use crate::ruleset::{Balancer, ElementKey, KeyBytes, LOCAL_SLOTS, SetName, TABLE, layout_comment};

/// What a table holds, as the kernel lists it.
#[derive(Debug)]
pub(super) struct Listing {
    /// The table, without the elements that are in `endpoints`.
    pub table: TableDump,
    /// Endpoints that were read by their slots.
    pub endpoints: Endpoints,
}

/// The endpoints of each address in a map of endpoints, by slot: one list for each number that slots
/// begin with. The key of an endpoint is that of the address with the slot behind it.
pub(super) type Endpoints = HashMap<List, Vec<Option<Backend>>>;

/// The map, the key without the slot, and the first slot.
type List = (SetName, KeyBytes, u32);

/// Lists our table; `None` where there is none.
///
/// The maps of endpoints are too large to be listed ([`Socket::list_table`]), and what they
/// hold is known from elsewhere: the chain that an address leads to says how many slots it has. So
/// they are read slot by slot. If they hold something else besides, they are listed after all.
/// What clients have left in maps that rules fill is nobody's business.
///
/// # Errors
/// When the kernel does not list it.
pub(super) fn list(socket: &mut Socket) -> Result<Option<Listing>, Error> {
    socket.at_one_moment(try_list)
}

/// Maps of endpoints, each with the maps that say what it holds.
fn endpoint_maps() -> impl Iterator<Item = (Family, SetName, [SetName; 2])> {
    Family::ALL.into_iter().flat_map(|f| {
        [
            (f, SetName::Endpoints(f), [SetName::ServiceIps(f), SetName::ClusterPolicy(f)]),
            (
                f,
                SetName::NodePortEndpoints(f),
                [SetName::NodePorts(f), SetName::NodePortClusterPolicy(f)],
            ),
        ]
    })
}

fn try_list(socket: &mut Socket) -> Result<Option<Listing>, Error> {
    let maps: Vec<String> = endpoint_maps().map(|(_, map, _)| map.name().into_owned()).collect();
    let dynamic = SetName::fixed().into_iter().filter(SetName::is_dynamic);
    let dynamic: Vec<String> = dynamic.map(|set| set.name().into_owned()).collect();
    let left_out = |name: &str, set: &SetDump| {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        named(&dynamic) || (set.count.is_some() && named(&maps))
    };
    let Some(mut table) = socket.list_table(TABLE, left_out)? else { return Ok(None) };
    let mut endpoints = Endpoints::new();
    if !is_ours(&table) {
        return Ok(Some(Listing { table, endpoints }));
    }
    for (family, map, index) in endpoint_maps() {
        // Without a count it is listed already.
        let Some(count) = table.sets.get(&*map.name()).and_then(|set| set.count) else { continue };
        let index: Vec<&SetDump> =
            index.iter().filter_map(|index| table.sets.get(&*index.name())).collect();
        if let Some(read) = read_endpoints(socket, family, &map, &index, count as usize)? {
            endpoints.extend(read);
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
    index: &[&SetDump],
    count: usize,
) -> Result<Option<Endpoints>, Error> {
    let slots = |element: &ElementDump| match &element.data {
        Some(Data::Verdict(Verdict::Goto(chain))) => Balancer::parse(chain).map(Balancer::slots),
        _ => None,
    };
    let mut lists: BTreeMap<(&[u8], u32), u32> = BTreeMap::new();
    for element in index.iter().flat_map(|index| &index.elements) {
        let Some(slots) = slots(element) else { continue };
        let end = lists.entry((&element.key, slots.start)).or_insert(slots.end);
        if *end != slots.end {
            return Ok(None);
        }
    }
    let length = |((_, first), end): (&(&[u8], u32), &u32)| (end - first) as usize;
    if lists.iter().map(length).sum::<usize>() != count {
        return Ok(None);
    }
    let mut backends = Vec::with_capacity(count);
    let keys = lists.iter().flat_map(|(&(address, first), &end)| {
        (first..end).map(move |slot| [address, &slot.to_ne_bytes()].concat())
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
    let endpoints = lists.iter().map(|(&(address, first), &end)| {
        let list = (map.clone(), KeyBytes::new(address)?, first);
        Some((list, backends.by_ref().take((end - first) as usize).collect()))
    });
    Ok(endpoints.collect())
}

/// Whether code with the same idea of the table has laid it out, and it is at work: a table can be
/// put to sleep (`NFT_TABLE_F_DORMANT`).
pub(super) fn is_ours(dump: &TableDump) -> bool {
    let strange = dump.flags.0 & !TableFlags::OWNED.0 != 0;
    !strange && dump.comment.as_deref() == Some(&layout_comment())
}

/// The list that an endpoint stands in by its key, and its place there. `None` for keys of other
/// sets.
pub(super) fn without_slot(key: &ElementKey) -> Option<(List, usize)> {
    let (SetName::Endpoints(_) | SetName::NodePortEndpoints(_)) = key.set else { return None };
    let (address, slot) = key.bytes.as_slice().split_last_chunk()?;
    let slot = u32::from_ne_bytes(*slot);
    let first = slot & LOCAL_SLOTS;
    let place = usize::try_from(slot - first).ok()?;
    Some(((key.set.clone(), KeyBytes::new(address)?, first), place))
}

/// The key of the endpoint at `slot` of an address.
pub(super) fn with_slot(map: &SetName, address: &KeyBytes, slot: u32) -> ElementKey {
    let bytes = [address.as_slice(), &slot.to_ne_bytes()].concat();
    let bytes = KeyBytes::new(&bytes).expect("the longest of these keys is 28 bytes");
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
