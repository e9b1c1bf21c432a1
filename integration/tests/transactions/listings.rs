//! What was written is listed, all of it and of one moment.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use portcullis::netlink::{
    Batch, Chain, Data, Element, ElementData, ElementDump, Error, Expression, Rule, Set, SetData,
    Socket, TableFlags, Verdict,
};

use super::{IPV4_ADDR, TABLE, World, add_numbers, commit, key, leading, numbers, range};

/// A comment of more bytes than nft takes (127), with a character across the border.
fn long_comment() -> (String, String) {
    let kept = "x".repeat(126);
    (format!("{kept}\u{e9}{}", "y".repeat(400)), kept)
}

#[test]
fn comments_are_cut_to_what_nft_takes() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    let (long, kept) = long_comment();
    let comment = Some(&*long);
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, comment);
        batch.add_chain(&Chain { name: "chain", hooked: None, comment });
        batch.add_rule(&Rule { chain: "chain", expressions: &[Expression::Counter], comment });
        batch.add_set(&Set { comment, ..numbers("set") });
        batch.add_element("set", &Element { comment, ..Element::key(&key(1)) });
    })?;
    let dump = world.dump()?;
    let comments = [
        &dump.comment,
        &dump.chains["chain"].comment,
        &dump.chains["chain"].rules[0].comment,
        &dump.sets["set"].comment,
        &dump.sets["set"].elements[0].comment,
    ];
    for comment in comments {
        assert_eq!(comment.as_ref(), Some(&kept));
    }
    let listing = world.namespace.run(&["nft", "list", "table", "inet", TABLE])?;
    assert_eq!(listing.matches(&format!("comment \"{kept}\"")).count(), 5, "{listing}");
    Ok(())
}

#[test]
fn what_was_written_is_dumped() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    ensure!(world.socket.dump_table(TABLE)?.is_none(), "a table in a new namespace");
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, Some("a table"));
        batch.add_chain(&Chain { name: "one", hooked: None, comment: Some("a chain") });
        batch.add_rule(&Rule { chain: "one", expressions: &[Expression::Counter], comment: None });
        let expressions = [Expression::Counter, Expression::verdict(Verdict::Drop)];
        let comment = Some("a rule");
        batch.add_rule(&Rule { chain: "one", expressions: &expressions, comment });
        batch.add_set(&Set { timeout: true, comment: Some("a set"), ..numbers("plain") });
        batch.add_set(&Set { interval: true, ..numbers("ranges") });
        batch.add_set(&Set { data: Some(SetData::Verdict), ..numbers("leads") });
        let data = Some(SetData::Value { kind: IPV4_ADDR, length: 4 });
        batch.add_set(&Set { data, ..numbers("values") });
        let comment = Some("an element");
        batch.add_element("plain", &Element { comment, counter: true, ..Element::key(&key(1)) });
        batch.add_element("plain", &Element { timeout: Some(3_600_000), ..Element::key(&key(2)) });
        // Adjacent, alone, and up to the last number there is.
        batch.add_element("ranges", &range(&key(0), &key(10)));
        batch.add_element("ranges", &range(&key(10), &key(20)));
        batch.add_element("ranges", &range(&key(30), &key(31)));
        batch.add_element("ranges", &Element { comment, ..Element::key(&key(u32::MAX - 7)) });
        batch.add_element("leads", &Element { comment, ..leading(&key(1), "one") });
        let data = Some(ElementData::Value(&[1, 2, 3, 4]));
        batch.add_element("values", &Element { data, ..Element::key(&key(1)) });
    })?;
    // Another table must not show.
    world
        .namespace
        .nft("table inet other { chain one { counter; }; set plain { type mark; }; }")?;

    let dump = world.dump()?;
    assert_eq!(dump.comment.as_deref(), Some("a table"));
    let chains: Vec<&String> = dump.chains.keys().collect();
    assert_eq!(chains, ["one"]);
    let chain = &dump.chains["one"];
    assert_eq!(chain.comment.as_deref(), Some("a chain"));
    let rules: Vec<_> = chain
        .rules
        .iter()
        .map(|rule| {
            let names: Vec<&str> = rule.expressions.iter().map(|e| &*e.name).collect();
            (names.join(" "), rule.comment.as_deref())
        })
        .collect();
    assert_eq!(rules, [("counter".into(), None), ("counter immediate".into(), Some("a rule"))]);

    let plain = ElementDump { key: key(1).to_vec(), ..ElementDump::default() };
    let comment = || Some("an element".to_owned());
    let mut elements = dump.sets["plain"].elements.clone();
    elements.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(
        elements[0],
        ElementDump { comment: comment(), counter: Some((0, 0)), ..plain.clone() }
    );
    let (all, left) = elements[1].timeout.context("no timeout")?;
    assert!(all == 3_600_000 && left <= all && left > all - 600_000, "{all} {left}");
    assert_eq!(elements.len(), 2);
    let range = |start: u32, end: Option<u32>| ElementDump {
        key: key(start).to_vec(),
        end: end.map(|end| key(end).to_vec()),
        ..ElementDump::default()
    };
    let last = ElementDump { comment: comment(), ..range(u32::MAX - 7, None) };
    let ranges = [range(0, Some(10)), range(10, Some(20)), range(30, Some(31)), last];
    assert_eq!(dump.sets["ranges"].elements, ranges);
    let goto = Some(Data::Verdict(Verdict::Goto("one".to_owned())));
    let leads = [ElementDump { data: goto, comment: comment(), ..plain.clone() }];
    assert_eq!(dump.sets["leads"].elements, leads);
    let value = Some(Data::Value(vec![1, 2, 3, 4]));
    assert_eq!(dump.sets["values"].elements, [ElementDump { data: value, ..plain }]);
    assert_eq!(dump.sets["plain"].comment.as_deref(), Some("a set"));
    Ok(())
}

#[test]
fn elements_are_read_by_their_keys() -> Result<()> {
    const ELEMENTS: u32 = 2000;
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, None);
        batch.add_set(&numbers("a"));
        add_numbers(batch, "a", 0..ELEMENTS);
    })?;
    let absent = ELEMENTS;
    let table: &[(&str, Vec<u32>)] = &[
        ("none", vec![]),
        ("all", (0..ELEMENTS).collect()),
        ("in another order", (0..ELEMENTS).rev().collect()),
        ("some are not there", vec![absent, 2, absent + 1, absent + 2, 0, absent]),
        ("nobody is there", (absent..absent + 600).collect()),
        ("every other", (0..ELEMENTS).flat_map(|number| [absent + number, number]).collect()),
    ];
    for (name, wanted) in table {
        let (keys, mut got) = (wanted.iter().map(|number| key(*number).to_vec()), Vec::new());
        world.socket.read_elements(TABLE, "a", keys, |element| got.push(element.key))?;
        let there = wanted.iter().filter(|number| **number < ELEMENTS);
        let there: Vec<Vec<u8>> = there.map(|number| key(*number).to_vec()).collect();
        ensure!(got == there, "{name}: {} elements, not {}", got.len(), there.len());
    }
    Ok(())
}

/// A listing is of one moment, although it takes many messages.
#[test]
fn a_listing_is_of_one_moment() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, None);
        for name in ["a", "b"] {
            batch.add_set(&numbers(name));
        }
        add_numbers(batch, "a", 0..200);
    })?;
    let ended = AtomicBool::new(false);
    let mut writer = world.namespace.enter(Socket::open)?;
    let dumps = thread::scope(|scope| -> Result<(usize, usize)> {
        let writing = scope.spawn(|| -> Result<()> {
            let (mut from, mut to) = ("a", "b");
            while !ended.load(Ordering::SeqCst) {
                commit(&mut writer, |batch| {
                    batch.delete_element(from, &Element::key(&key(7)));
                    add_numbers(batch, to, 7..8);
                })?;
                std::mem::swap(&mut from, &mut to);
                // So that some listings find a quiet moment.
                thread::sleep(Duration::from_micros(700));
            }
            Ok(())
        });
        let mut counts = (0, 0);
        let mut strange = None;
        for _ in 0..200 {
            match world.socket.dump_table(TABLE) {
                Ok(dump) => {
                    let dump = dump.context("no table")?;
                    let elements: Vec<usize> =
                        dump.sets.values().map(|set| set.elements.len()).collect();
                    if elements.iter().sum::<usize>() != 200 {
                        strange = Some(elements);
                        break;
                    }
                    counts.0 += 1;
                }
                Err(Error::Interrupted) => counts.1 += 1,
                Err(error) => return Err(error.into()),
            }
        }
        ended.store(true, Ordering::SeqCst);
        writing.join().expect("the writer does not panic")?;
        ensure!(strange.is_none(), "listed of two moments: {strange:?}");
        Ok(counts)
    })?;
    println!("{} listings, {} given up", dumps.0, dumps.1);
    ensure!(dumps.0 > 0, "no listing succeeded");
    Ok(())
}

/// A hash table that has just been filled grows in the background, and its listing is confused.
#[test]
fn a_set_that_grows_is_listed_whole() -> Result<()> {
    // Just enough for the table to begin to grow (`rht_grow_above_75`) with the last of them.
    const ELEMENTS: u32 = (1 << 17) * 3 / 4 + 8;
    let Some(mut world) = World::new()? else { return Ok(()) };
    let mut filled = Batch::new(TABLE);
    filled.add_table(TableFlags::NONE, None);
    filled.add_set(&numbers("a"));
    add_numbers(&mut filled, "a", 0..ELEMENTS);
    let filled = filled.finish();
    for round in 0..3 {
        world.socket.commit_encoded(&filled)?;
        let elements = world.dump()?.sets.remove("a").context("no set")?.elements;
        ensure!(elements.len() == ELEMENTS as usize, "round {round}: {} elements", elements.len());
        let keys: BTreeSet<&[u8]> = elements.iter().map(|element| &*element.key).collect();
        ensure!(keys.len() == elements.len(), "round {round}: {} different ones", keys.len());
        world.commit(Batch::delete_table)?;
    }
    Ok(())
}
