//! Transactions on the real kernel: all or nothing, errors that name what is at fault, sizes, and
//! listings of what was written.

mod listings;
mod refusals;
mod rights;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use portcullis::netlink::{
    Batch, Chain, Element, ElementData, Error, Refusal, Set, Socket, TableDump, TableFlags,
};
use portcullis_integration::lab::Namespace;
use portcullis_integration::requirement::{Requirement, available};

const TABLE: &str = "test";
const IPV4_ADDR: u32 = 7;
const LIMIT: Duration = Duration::from_secs(10);

/// A namespace, and a socket in it.
struct World {
    namespace: Namespace,
    socket: Socket,
}

impl World {
    /// `None` where the machine cannot run the test.
    fn new() -> Result<Option<World>> {
        if !available(&[Requirement::Root, Requirement::Nft]) {
            return Ok(None);
        }
        let namespace = Namespace::new("transactions")?;
        let socket = namespace.enter(Socket::open)?;
        Ok(Some(World { namespace, socket }))
    }

    fn commit(&mut self, fill: impl FnOnce(&mut Batch)) -> Result<(), Error> {
        commit(&mut self.socket, fill)
    }

    fn dump(&mut self) -> Result<TableDump> {
        self.socket.dump_table(TABLE)?.context("no table")
    }

    /// What the kernel has against a transaction.
    fn refusals(&mut self, fill: impl FnOnce(&mut Batch)) -> Result<Vec<Refusal>> {
        match self.commit(fill) {
            Err(Error::Refused(refusals)) => Ok(refusals),
            Err(error) => Err(error.into()),
            Ok(()) => bail!("the kernel took it"),
        }
    }
}

fn commit(socket: &mut Socket, fill: impl FnOnce(&mut Batch)) -> Result<(), Error> {
    let mut batch = Batch::new(TABLE);
    fill(&mut batch);
    socket.commit(batch)
}

#[test]
fn huge_transactions() -> Result<()> {
    const ELEMENTS: u32 = 100_000;
    let Some(mut world) = World::new()? else { return Ok(()) };
    // Three sets in turns, the first with far more than one message holds, and long comments.
    let place = |number: u32| match number % 10 {
        0 => "b",
        1 => "c",
        _ => "a",
    };
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, None);
        for name in ["a", "b", "c"] {
            batch.add_set(&numbers(name));
        }
        for number in 0..ELEMENTS {
            let comment = format!("{number:0>100}");
            let comment = (number % 3 == 0).then_some(&*comment);
            batch.add_element(place(number), &Element { comment, ..Element::key(&key(number)) });
        }
    })?;
    let dump = world.dump()?;
    let mut found = BTreeMap::new();
    for (name, set) in &dump.sets {
        for element in &set.elements {
            let number = u32::from_be_bytes(element.key[..].try_into()?);
            let comment = element.comment.as_ref().map(|comment| comment.parse::<u32>());
            found.insert(number, (name.as_str(), comment.transpose()?));
        }
    }
    let expected: BTreeMap<_, _> = (0..ELEMENTS)
        .map(|number| (number, (place(number), (number % 3 == 0).then_some(number))))
        .collect();
    assert!(found == expected, "{} elements are not what was written", found.len());

    // All that goes and as much that comes, at once.
    world.commit(|batch| {
        for number in 0..ELEMENTS {
            batch.delete_element(place(number), &Element::key(&key(number)));
            batch.add_element("b", &Element::key(&key(ELEMENTS + number)));
        }
    })?;
    let lengths: Vec<usize> = world.dump()?.sets.values().map(|set| set.elements.len()).collect();
    assert_eq!(lengths, [0, ELEMENTS as usize, 0]);
    Ok(())
}

fn add_chain(batch: &mut Batch, name: &str) {
    batch.add_chain(&Chain { name, hooked: None, comment: None });
}

fn numbers(name: &str) -> Set<'_> {
    Set {
        name,
        key_type: IPV4_ADDR,
        key_length: 4,
        data: None,
        interval: false,
        timeout: false,
        dynamic: false,
        size: None,
        comment: None,
    }
}

fn key(number: u32) -> [u8; 4] {
    Ipv4Addr::from_bits(number).octets()
}

fn add_numbers(batch: &mut Batch, set: &str, numbers: std::ops::Range<u32>) {
    for number in numbers {
        batch.add_element(set, &Element::key(&key(number)));
    }
}

fn range<'a>(key: &'a [u8], end: &'a [u8]) -> Element<'a> {
    Element { end: Some(end), ..Element::key(key) }
}

fn leading<'a>(key: &'a [u8], chain: &'a str) -> Element<'a> {
    Element { data: Some(ElementData::Goto(chain)), ..Element::key(key) }
}
