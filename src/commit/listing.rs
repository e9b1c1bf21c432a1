//! Listing our table without listing every endpoint.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::ops::Range;

use crate::model::{Backend, Family};
use crate::netlink::{Data, ElementDump, Error, SetDump, Socket, TableDump, TableFlags, Verdict};
use crate::ruleset::{
    Balancer, COMMON, ElementKey, KeyBytes, LOCAL_SLOTS, SetName, TABLE, layout_comment,
};

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

/// Maps of endpoints.
fn endpoint_maps() -> impl Iterator<Item = (Family, SetName)> {
    Family::ALL
        .into_iter()
        .flat_map(|f| [(f, SetName::Endpoints(f)), (f, SetName::NodePortEndpoints(f))])
}

/// The sets and maps that say which slots a map of endpoints has. Sets say it by themselves, maps by
/// the chains that their elements lead to.
fn indexes(family: Family, map: &SetName) -> Vec<(SetName, Option<Range<u32>>)> {
    let maps = match map {
        SetName::Endpoints(_) => [SetName::ServiceIps(family), SetName::ClusterPolicy(family)],
        _ => [SetName::NodePorts(family), SetName::NodePortClusterPolicy(family)],
    };
    let maps = maps.into_iter().map(|map| (map, None));
    let common = if matches!(map, SetName::Endpoints(_)) { COMMON } else { 0 };
    let sets = (1..=common).map(|slots| (SetName::ServiceIpsOver(family, slots), Some(0..slots)));
    maps.chain(sets).collect()
}

fn try_list(socket: &mut Socket) -> Result<Option<Listing>, Error> {
    let maps: Vec<String> = endpoint_maps().map(|(_, map)| map.name().into_owned()).collect();
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
    for (family, map) in endpoint_maps() {
        // Without a count it is listed already.
        let Some(count) = table.sets.get(&*map.name()).and_then(|set| set.count) else { continue };
        let index: Vec<Index<'_>> = indexes(family, &map)
            .into_iter()
            .filter_map(|(set, slots)| Some((table.sets.get(&*set.name())?, slots)))
            .collect();
        if let Some(read) = read_endpoints(socket, family, &map, &index, count as usize)? {
            endpoints.extend(read);
        } else if let Some(set) = table.sets.get_mut(&*map.name()) {
            socket.list_elements(TABLE, &map.name(), set)?;
        }
    }
    Ok(Some(Listing { table, endpoints }))
}

/// A set or map of addresses, and the slots that each of them has if they are the same for all.
type Index<'a> = (&'a SetDump, Option<Range<u32>>);

/// The endpoints of every address that `index` leads to a balancing chain; `None` if `map` holds
/// more than these, or less.
fn read_endpoints(
    socket: &mut Socket,
    family: Family,
    map: &SetName,
    index: &[Index<'_>],
    count: usize,
) -> Result<Option<Endpoints>, Error> {
    let slots = |element: &ElementDump| match &element.data {
        Some(Data::Verdict(Verdict::Goto(chain))) => Balancer::parse(chain).map(Balancer::slots),
        _ => None,
    };
    let mut lists: BTreeMap<(&[u8], u32), u32> = BTreeMap::new();
    let all = index.iter().flat_map(|(set, slots)| set.elements.iter().map(move |e| (e, slots)));
    for (element, of_set) in all {
        let Some(slots) = of_set.clone().or_else(|| slots(element)) else { continue };
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
