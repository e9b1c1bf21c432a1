//! What the kernel refuses changes nothing, and the error says what it was and whose.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use portcullis::netlink::{
    Batch, Element, Expression, Register, Rule, Set, SetData, TableFlags, Tag, Verdict,
};

use super::{World, add_chain, add_numbers, key, leading, numbers, range};

/// What a transaction does wrong, and the refusals that are expected of it.
struct Wrong {
    name: &'static str,
    write: fn(&mut Batch),
    refusals: &'static [(&'static str, Option<Tag>, Errno)],
}

#[test]
fn a_refused_transaction_changes_nothing_and_names_what_is_at_fault() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    world.commit(lay_out)?;
    let before = world.dump()?;
    let mut failed = Vec::new();
    for wrong in WRONG {
        // Others want something good in the same transaction, before and behind it.
        let refusals = world.refusals(|batch| {
            batch.set_tag(1);
            add_chain(batch, "good");
            add_numbers(batch, "numbers", 0..10);
            (wrong.write)(batch);
            batch.set_tag(3);
            add_chain(batch, "good too");
            add_numbers(batch, "numbers", 10..20);
        });
        let refusals = refusals.context(wrong.name)?;
        let got: Vec<_> = refusals
            .iter()
            .map(|refusal| {
                let code = refusal.error.raw_os_error().unwrap_or_default();
                let subject = refusal.subject.to_string().replace(&"x".repeat(256), "XXX");
                (subject, refusal.tag, Errno::from_raw(code))
            })
            .collect();
        let expected: Vec<_> =
            wrong.refusals.iter().map(|(s, tag, errno)| ((*s).to_owned(), *tag, *errno)).collect();
        if got != expected {
            failed.push(format!("{}: {got:?}, not {expected:?}", wrong.name));
        }
        ensure!(world.dump()? == before, "{}: the table has changed", wrong.name);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    // And the socket still works.
    world.commit(|batch| add_chain(batch, "good"))?;
    ensure!(world.dump()?.chains.contains_key("good"));
    Ok(())
}

/// A table with a chain, sets, a map and elements.
fn lay_out(batch: &mut Batch) {
    batch.add_table(TableFlags::NONE, None);
    add_chain(batch, "there");
    add_chain(batch, "led to");
    batch.add_set(&numbers("numbers"));
    batch.add_set(&Set { interval: true, ..numbers("ranges") });
    batch.add_set(&Set { data: Some(SetData::Verdict), ..numbers("leads") });
    add_numbers(batch, "numbers", 1_000_000..1_000_001);
    batch.add_element("leads", &leading(&key(1), "led to"));
    batch.add_element("ranges", &range(&key(1000), &key(2000)));
}

#[rustfmt::skip]
const WRONG: &[Wrong] = &[
    Wrong {
        name: "a chain that is there",
        write: |batch| tagged(batch, |batch| add_chain(batch, "there")),
        refusals: &[("chain there", Some(2), Errno::EEXIST)],
    },
    Wrong {
        name: "a chain whose name is too long",
        write: |batch| tagged(batch, |batch| add_chain(batch, &"x".repeat(256))),
        refusals: &[("chain XXX", Some(2), Errno::ERANGE)],
    },
    Wrong {
        name: "a set that is there",
        write: |batch| tagged(batch, |batch| batch.add_set(&numbers("numbers"))),
        refusals: &[("set numbers", Some(2), Errno::EEXIST)],
    },
    Wrong {
        name: "a set of nothing",
        write: |batch| tagged(batch, |batch| batch.add_set(&Set { key_length: 0, ..numbers("new") })),
        refusals: &[("set new", Some(2), Errno::EINVAL)],
    },
    Wrong {
        name: "a rule that goes to no chain",
        write: |batch| tagged(batch, |batch| {
            let rule = [Expression::verdict(Verdict::Goto("nowhere".to_owned()))];
            batch.add_rule(&Rule { chain: "there", expressions: &rule, comment: None });
        }),
        refusals: &[("a rule of chain there", Some(2), Errno::ENOENT)],
    },
    Wrong {
        name: "a rule of no chain",
        write: |batch| tagged(batch, |batch| {
            batch.add_rule(&Rule { chain: "nowhere", expressions: &[], comment: None });
        }),
        refusals: &[("a rule of chain nowhere", Some(2), Errno::ENOENT)],
    },
    Wrong {
        name: "a rule that looks into no set",
        write: |batch| tagged(batch, |batch| {
            let lookup = Expression::Lookup { set: "none".to_owned(), key: Register::word(0) };
            batch.add_rule(&Rule { chain: "there", expressions: &[lookup], comment: None });
        }),
        refusals: &[("a rule of chain there", Some(2), Errno::ENOENT)],
    },
    Wrong {
        name: "one of 5,000 elements that is there",
        write: |batch| among_thousands(batch, |batch| {
            add_numbers(batch, "numbers", 1_000_000..1_000_001);
        }),
        refusals: &[("an element of numbers", Some(2000), Errno::EEXIST)],
    },
    Wrong {
        name: "one of 5,000 elements with a key of another length",
        write: |batch| among_thousands(batch, |batch| {
            batch.add_element("numbers", &Element::key(&[1, 2, 3]));
        }),
        refusals: &[("an element of numbers", Some(2000), Errno::EINVAL)],
    },
    Wrong {
        name: "one of many elements that leads to no chain",
        write: |batch| {
            for tag in 10..500 {
                batch.set_tag(tag);
                let chain = if tag == 321 { "nowhere" } else { "led to" };
                batch.add_element("leads", &leading(&key(tag), chain));
            }
        },
        refusals: &[("an element of leads", Some(321), Errno::ENOENT)],
    },
    Wrong {
        name: "an interval that overlaps another",
        write: |batch| {
            for tag in 10..100 {
                batch.set_tag(tag);
                let (start, end) = if tag == 77 { (1500, 1600) } else { (tag * 100, tag * 100 + 50) };
                if !(20..=70).contains(&tag) {
                    batch.add_element("ranges", &range(&key(start * 100), &key(end * 100)));
                }
                if tag == 77 {
                    batch.add_element("ranges", &range(&key(1500), &key(1600)));
                }
            }
        },
        refusals: &[("an element of ranges", Some(77), Errno::EEXIST)],
    },
    Wrong {
        name: "an element that goes and is not there",
        write: |batch| {
            for tag in 10..100 {
                batch.set_tag(tag);
                let key = if tag == 42 { key(7) } else { key(1_000_000) };
                if tag == 10 || tag == 42 {
                    batch.delete_element("numbers", &Element::key(&key));
                }
            }
        },
        refusals: &[("an element of numbers", Some(42), Errno::ENOENT)],
    },
    Wrong {
        name: "a chain that goes and is not there",
        write: |batch| tagged(batch, |batch| batch.delete_chain("nowhere")),
        refusals: &[("chain nowhere", Some(2), Errno::ENOENT)],
    },
    Wrong {
        name: "a chain that goes and is led to",
        write: |batch| tagged(batch, |batch| batch.delete_chain("led to")),
        refusals: &[("chain led to", Some(2), Errno::EBUSY)],
    },
    Wrong {
        name: "a set that goes and is not there",
        write: |batch| tagged(batch, |batch| batch.delete_set("none")),
        refusals: &[("set none", Some(2), Errno::ENOENT)],
    },
    Wrong {
        name: "several of several",
        write: |batch| {
            batch.set_tag(5);
            add_chain(batch, "there");
            batch.set_tag(6);
            batch.delete_set("none");
            batch.set_tag(7);
            batch.add_element("leads", &leading(&key(2), "nowhere"));
        },
        refusals: &[
            ("chain there", Some(5), Errno::EEXIST),
            ("an element of leads", Some(7), Errno::ENOENT),
            ("set none", Some(6), Errno::ENOENT),
        ],
    },
];

fn tagged(batch: &mut Batch, write: impl FnOnce(&mut Batch)) {
    batch.set_tag(2);
    write(batch);
}

/// Elements of 5,000 tags around one of `write`, which is there on behalf of tag 2000.
fn among_thousands(batch: &mut Batch, write: impl FnOnce(&mut Batch)) {
    let mut write = Some(write);
    for tag in 10..5010 {
        batch.set_tag(tag);
        if tag == 2000
            && let Some(write) = write.take()
        {
            write(batch);
        } else {
            add_numbers(batch, "numbers", tag * 100..tag * 100 + 1);
        }
    }
}

/// The kernel drops refusals that find no place in the socket's buffer.
#[test]
fn more_refusals_than_the_socket_holds() -> Result<()> {
    let Some(mut world) = World::new()? else { return Ok(()) };
    let names: Vec<String> = (0..30_000).map(|number| format!("chain-{number}")).collect();
    world.commit(|batch| {
        batch.add_table(TableFlags::NONE, None);
        for name in &names {
            add_chain(batch, name);
        }
    })?;
    let refusals = world.refusals(|batch| {
        batch.set_tag(7);
        for name in &names {
            add_chain(batch, name);
        }
    })?;
    ensure!(refusals.len() < names.len(), "the buffer holds everything: the test says nothing");
    for (refusal, name) in refusals.iter().zip(&names) {
        ensure!(refusal.subject.to_string() == format!("chain {name}"), "{refusal}");
        ensure!(refusal.tag == Some(7), "{refusal}");
    }
    // Nothing of that is left for those who come next.
    world.commit(|batch| add_chain(batch, "another"))?;
    ensure!(world.dump()?.chains.len() == names.len() + 1);
    let refusals = world.refusals(|batch| add_chain(batch, "another"))?;
    ensure!(refusals.len() == 1, "{refusals:?}");
    Ok(())
}
