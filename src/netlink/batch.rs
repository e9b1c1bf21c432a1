//! One transaction: everything that is to happen at once, as the bytes that are sent.
//!
//! Callers add objects in any order; the batch sends what is made first, then the elements that
//! go, the elements that come, and at last what is removed, so that an element can move between
//! values and a chain can lose its last reference within one transaction.

use std::collections::HashMap;
use std::ops::Range;

use super::attribute::{close, nest, open, put, put_str, put_u32, put_u64};
use super::error::Subject;
use crate::model::Family;

use super::expression::{Data, LIST_ELEM, Verdict, encode_goto};
use super::object::{Chain, Element, ElementData, Rule, Set, SetData, TableFlags};

/// On whose behalf something is in a transaction; the caller's number.
pub type Tag = u32;

/// `NFNL_SUBSYS_NFTABLES`.
pub(super) const SUBSYSTEM: u16 = 10;
// include/uapi/linux/netfilter.h
/// `NFPROTO_UNSPEC`.
const NFPROTO_UNSPEC: u8 = 0;
/// `NFPROTO_INET`.
pub(super) const NFPROTO_INET: u8 = 1;
/// `NFPROTO_IPV4`.
const NFPROTO_IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
const NFPROTO_IPV6: u8 = 10;
/// `struct nlmsghdr` and `struct nfgenmsg`.
pub(super) const HEADERS: usize = 16 + 4;
/// The most bytes of elements in one message: their list is an attribute, which holds 64 KiB.
const MAX_LIST: usize = 65_000;

// enum nf_tables_msg_types
pub(super) const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
pub(super) const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
pub(super) const NFT_MSG_NEWRULE: u16 = 6;
pub(super) const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_DELSET: u16 = 11;
pub(super) const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
// include/uapi/linux/netfilter/nfnetlink.h
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
// include/uapi/linux/netlink.h
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

/// The longest comment that nft takes and prints (`NFTNL_UDATA_COMMENT_MAXLEN` less the NUL).
const MAX_COMMENT: usize = 127;

/// A transaction on one table, in the making.
#[derive(Debug)]
pub struct Batch {
    table: String,
    tag: Tag,
    making: Messages,
    deleting: Streams,
    adding: Streams,
    removing: Messages,
    next_set_id: u32,
    operations: usize,
}

/// A finished transaction.
#[derive(Debug)]
pub struct Encoded {
    /// The bytes of all messages, sequence numbers from 0 on.
    pub(super) bytes: Vec<u8>,
    /// What each message is about; the index is the sequence number.
    pub(super) messages: Vec<Message>,
}

/// What a message is about, to understand the kernel's complaints about it.
#[derive(Debug)]
pub(super) struct Message {
    pub range: Range<usize>,
    pub subject: Subject,
    /// On whose behalf what begins at this offset in the message is there, up to the next offset.
    tags: Vec<(usize, Tag)>,
}

impl Message {
    /// On whose behalf the byte at `offset` is there. Without an offset: known only if the whole
    /// message is there on behalf of one.
    pub fn tag_at(&self, offset: Option<usize>) -> Option<Tag> {
        match (offset, self.tags.as_slice()) {
            (_, [(_, only)]) => Some(*only),
            (Some(offset), tags) => {
                let behind = tags.partition_point(|(start, _)| *start <= offset);
                tags[..behind].last().map(|(_, tag)| *tag)
            }
            (None, _) => None,
        }
    }
}

impl Batch {
    /// An empty transaction on the `inet` table `table`.
    pub fn new(table: &str) -> Batch {
        Batch::of(NFPROTO_INET, table)
    }

    /// An empty transaction on the table `table` of one family: not ours, which has both.
    pub fn of_family(family: Family, table: &str) -> Batch {
        let nfproto = match family {
            Family::V4 => NFPROTO_IPV4,
            Family::V6 => NFPROTO_IPV6,
        };
        Batch::of(nfproto, table)
    }

    fn of(nfproto: u8, table: &str) -> Batch {
        Batch {
            table: table.to_owned(),
            tag: 0,
            making: Messages::of(nfproto),
            deleting: Streams::of(nfproto),
            adding: Streams::of(nfproto),
            removing: Messages::of(nfproto),
            next_set_id: 1,
            operations: 0,
        }
    }

    /// From here on everything is added on behalf of `tag`.
    pub fn set_tag(&mut self, tag: Tag) {
        self.tag = tag;
    }

    /// How many objects and elements the transaction adds or deletes.
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Makes the table, or adopts it if it is there. A comment is only kept of a new table.
    pub fn add_table(&mut self, flags: TableFlags, comment: Option<&str>) {
        let table = self.table.clone();
        let subject = Subject::Table(table.clone());
        self.make(NFT_MSG_NEWTABLE, NLM_F_CREATE, subject, |out| {
            put_str(out, 1, &table); // NFTA_TABLE_NAME
            put_u32(out, 2, flags.0); // NFTA_TABLE_FLAGS
            if let Some(comment) = comment {
                put(out, 6, &userdata_comment(0, comment)); // NFTA_TABLE_USERDATA
            }
        });
    }

    /// Deletes the table with all that is in it.
    pub fn delete_table(&mut self) {
        let table = self.table.clone();
        let subject = Subject::Table(table.clone());
        self.make(NFT_MSG_DELTABLE, 0, subject, |out| put_str(out, 1, &table));
    }

    /// Makes a chain.
    pub fn add_chain(&mut self, chain: &Chain<'_>) {
        let table = self.table.clone();
        let subject = Subject::Chain(chain.name.to_owned());
        self.make(NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, subject, |out| {
            put_str(out, 1, &table); // NFTA_CHAIN_TABLE
            put_str(out, 3, chain.name); // NFTA_CHAIN_NAME
            if let Some(hooked) = chain.hooked {
                nest(out, 4, |out| {
                    put_u32(out, 1, hooked.hook as u32); // NFTA_HOOK_HOOKNUM
                    put_u32(out, 2, hooked.priority.cast_unsigned()); // NFTA_HOOK_PRIORITY
                }); // NFTA_CHAIN_HOOK
                put_u32(out, 5, 1); // NFTA_CHAIN_POLICY: NF_ACCEPT
                put_str(out, 7, hooked.kind.name()); // NFTA_CHAIN_TYPE
            }
            if let Some(comment) = chain.comment {
                put(out, 12, &userdata_comment(0, comment)); // NFTA_CHAIN_USERDATA
            }
        });
    }

    /// Appends a rule to its chain.
    pub fn add_rule(&mut self, rule: &Rule<'_>) {
        let table = self.table.clone();
        let subject = Subject::Rule(rule.chain.to_owned());
        self.make(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, subject, |out| {
            put_str(out, 1, &table); // NFTA_RULE_TABLE
            put_str(out, 2, rule.chain); // NFTA_RULE_CHAIN
            nest(out, 4, |out| {
                for expression in rule.expressions {
                    expression.encode(out);
                }
            }); // NFTA_RULE_EXPRESSIONS
            if let Some(comment) = rule.comment {
                put(out, 7, &userdata_comment(0, comment)); // NFTA_RULE_USERDATA
            }
        });
    }

    /// Makes a set or a map.
    pub fn add_set(&mut self, set: &Set<'_>) {
        let table = self.table.clone();
        let id = self.next_set_id;
        self.next_set_id += 1;
        let subject = Subject::Set(set.name.to_owned());
        self.make(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, subject, |out| {
            put_str(out, 1, &table); // NFTA_SET_TABLE
            put_str(out, 2, set.name); // NFTA_SET_NAME
            put_u32(out, 3, set.flags()); // NFTA_SET_FLAGS
            put_u32(out, 4, set.key_type); // NFTA_SET_KEY_TYPE
            put_u32(out, 5, set.key_length); // NFTA_SET_KEY_LEN
            if let Some(data) = set.data {
                put_u32(out, 6, data.kind()); // NFTA_SET_DATA_TYPE
            }
            if let Some(SetData::Value { length, .. }) = set.data {
                put_u32(out, 7, length); // NFTA_SET_DATA_LEN
            }
            if let Some(size) = set.size {
                nest(out, 9, |out| put_u32(out, 1, size)); // NFTA_SET_DESC, NFTA_SET_DESC_SIZE
            }
            put_u32(out, 10, id); // NFTA_SET_ID
            if let Some(comment) = set.comment {
                put(out, 13, &userdata_comment(7, comment)); // NFTNL_UDATA_SET_COMMENT
            }
        });
    }

    /// Adds an element; the kernel refuses it if its key is there already.
    pub fn add_element(&mut self, set: &str, element: &Element<'_>) {
        self.operations += 1;
        let stream =
            self.adding.stream(&self.table, set, NFT_MSG_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL);
        stream.push(self.tag, |out| encode_element(out, element, element.key, 0));
        if let Some(end) = element.end {
            // NFT_SET_ELEM_INTERVAL_END
            stream.push(self.tag, |out| encode_element(out, &Element::key(end), end, 1));
        }
    }

    /// Deletes an element, by its key; the kernel refuses if it is not there.
    pub fn delete_element(&mut self, set: &str, element: &Element<'_>) {
        self.operations += 1;
        let stream = self.deleting.stream(&self.table, set, NFT_MSG_DELSETELEM, 0);
        stream
            .push(self.tag, |out| encode_element(out, &Element::key(element.key), element.key, 0));
        if let Some(end) = element.end {
            stream.push(self.tag, |out| encode_element(out, &Element::key(end), end, 1));
        }
    }

    /// Deletes a chain with its rules, behind everything else.
    pub fn delete_chain(&mut self, chain: &str) {
        let table = self.table.clone();
        let subject = Subject::Chain(chain.to_owned());
        self.remove(NFT_MSG_DELCHAIN, subject, |out| {
            put_str(out, 1, &table); // NFTA_CHAIN_TABLE
            put_str(out, 3, chain); // NFTA_CHAIN_NAME
        });
    }

    /// Deletes a set with its elements, behind everything else.
    pub fn delete_set(&mut self, set: &str) {
        let table = self.table.clone();
        let subject = Subject::Set(set.to_owned());
        self.remove(NFT_MSG_DELSET, subject, |out| {
            put_str(out, 1, &table); // NFTA_SET_TABLE
            put_str(out, 2, set); // NFTA_SET_NAME
        });
    }

    /// The transaction as bytes, with an answer asked for on its last message: the kernel reports
    /// every refusal anyway, and says success once.
    pub fn finish(self) -> Encoded {
        let Batch { making, deleting, adding, removing, .. } = self;
        let parts: Vec<Messages> = std::iter::once(making)
            .chain(deleting.into_messages())
            .chain(adding.into_messages())
            .chain(std::iter::once(removing))
            .collect();

        let size = parts.iter().map(|part| part.bytes.len()).sum::<usize>() + 2 * HEADERS;
        let mut whole = Messages::of(NFPROTO_UNSPEC);
        whole.bytes.reserve_exact(size);
        whole.marker(NFNL_MSG_BATCH_BEGIN);
        for part in parts {
            whole.append(part);
        }
        if let Some(last) = whole.index.last() {
            let flags = last.range.start + 6;
            let asked =
                u16::from_ne_bytes([whole.bytes[flags], whole.bytes[flags + 1]]) | NLM_F_ACK;
            whole.bytes[flags..flags + 2].copy_from_slice(&asked.to_ne_bytes());
        }
        whole.marker(NFNL_MSG_BATCH_END);

        let Messages { mut bytes, index: messages, .. } = whole;
        for (sequence, message) in messages.iter().enumerate() {
            let sequence = u32::try_from(sequence).expect("fewer messages than sequence numbers");
            let at = message.range.start + 8;
            bytes[at..at + 4].copy_from_slice(&sequence.to_ne_bytes());
        }
        Encoded { bytes, messages }
    }

    fn make(&mut self, kind: u16, flags: u16, subject: Subject, fill: impl FnOnce(&mut Vec<u8>)) {
        self.operations += 1;
        self.making.push(kind, flags, subject, self.tag, fill);
    }

    fn remove(&mut self, kind: u16, subject: Subject, fill: impl FnOnce(&mut Vec<u8>)) {
        self.operations += 1;
        self.removing.push(kind, 0, subject, self.tag, fill);
    }
}

impl Encoded {
    /// How many bytes are sent.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// Messages one behind the other.
#[derive(Debug)]
struct Messages {
    /// The family of the tables that they are about.
    nfproto: u8,
    bytes: Vec<u8>,
    index: Vec<Message>,
}

impl Messages {
    fn of(nfproto: u8) -> Messages {
        Messages { nfproto, bytes: Vec::new(), index: Vec::new() }
    }

    fn push(
        &mut self,
        kind: u16,
        flags: u16,
        subject: Subject,
        tag: Tag,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = begin(&mut self.bytes, self.nfproto, SUBSYSTEM << 8 | kind, flags, 0);
        fill(&mut self.bytes);
        end_message(&mut self.bytes, start);
        self.index.push(Message { range: start..self.bytes.len(), subject, tags: vec![(0, tag)] });
    }

    /// The message that begins or ends a batch.
    fn marker(&mut self, kind: u16) {
        let start = begin(&mut self.bytes, NFPROTO_UNSPEC, kind, 0, SUBSYSTEM);
        end_message(&mut self.bytes, start);
        let range = start..self.bytes.len();
        self.index.push(Message { range, subject: Subject::Transaction, tags: Vec::new() });
    }

    fn append(&mut self, part: Messages) {
        let moved = self.bytes.len();
        self.bytes.extend_from_slice(&part.bytes);
        self.index.extend(part.index.into_iter().map(|message| Message {
            range: message.range.start + moved..message.range.end + moved,
            ..message
        }));
    }
}

/// Element messages of one kind, one stream for each set.
#[derive(Debug)]
struct Streams {
    /// The family of their table.
    nfproto: u8,
    /// In the order in which they began.
    all: Vec<Stream>,
    by_set: HashMap<String, usize>,
    /// The stream that was used last: elements of one set come in runs.
    last: usize,
}

impl Streams {
    fn of(nfproto: u8) -> Streams {
        Streams { nfproto, all: Vec::new(), by_set: HashMap::new(), last: 0 }
    }

    fn stream(&mut self, table: &str, set: &str, kind: u16, flags: u16) -> &mut Stream {
        if self.all.get(self.last).is_none_or(|stream| stream.set != set) {
            self.last = self.by_set.get(set).copied().unwrap_or_else(|| {
                self.by_set.insert(set.to_owned(), self.all.len());
                self.all.push(Stream {
                    table: table.to_owned(),
                    set: set.to_owned(),
                    kind,
                    flags,
                    messages: Messages::of(self.nfproto),
                    current: None,
                });
                self.all.len() - 1
            });
        }
        &mut self.all[self.last]
    }

    fn into_messages(self) -> impl Iterator<Item = Messages> {
        self.all.into_iter().map(|mut stream| {
            stream.end_current();
            stream.messages
        })
    }
}

/// Element messages of one set.
#[derive(Debug)]
struct Stream {
    table: String,
    set: String,
    kind: u16,
    flags: u16,
    messages: Messages,
    /// The message that takes the next element.
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    /// Where the message begins.
    start: usize,
    /// Where its list of elements begins.
    list: usize,
    tags: Vec<(usize, Tag)>,
}

impl Stream {
    fn push(&mut self, tag: Tag, encode: impl Fn(&mut Vec<u8>)) {
        let place = self.messages.bytes.len();
        let full =
            self.current.as_ref().is_some_and(|current| place - current.list > MAX_LIST - 1024);
        if full {
            self.end_current();
        }
        let current = match &mut self.current {
            Some(current) => current,
            None => self.current.insert(begin_elements(
                &mut self.messages,
                self.kind,
                self.flags,
                &self.table,
                &self.set,
            )),
        };
        if current.tags.last().is_none_or(|(_, last)| *last != tag) {
            current.tags.push((self.messages.bytes.len() - current.start, tag));
        }
        encode(&mut self.messages.bytes);
    }

    fn end_current(&mut self) {
        let Some(current) = self.current.take() else { return };
        close(&mut self.messages.bytes, current.list);
        end_message(&mut self.messages.bytes, current.start);
        self.messages.index.push(Message {
            range: current.start..self.messages.bytes.len(),
            subject: Subject::Elements(self.set.clone()),
            tags: current.tags,
        });
    }
}

fn begin_elements(
    messages: &mut Messages,
    kind: u16,
    flags: u16,
    table: &str,
    set: &str,
) -> Current {
    let out = &mut messages.bytes;
    let start = begin(out, messages.nfproto, SUBSYSTEM << 8 | kind, flags, 0);
    put_str(out, 1, table); // NFTA_SET_ELEM_LIST_TABLE
    put_str(out, 2, set); // NFTA_SET_ELEM_LIST_SET
    let list = open(out, 3); // NFTA_SET_ELEM_LIST_ELEMENTS
    Current { start, list, tags: Vec::new() }
}

/// Appends one element; an element with names and comment stays far below 1 KiB.
fn encode_element(out: &mut Vec<u8>, element: &Element<'_>, key: &[u8], flags: u32) {
    nest(out, LIST_ELEM, |out| {
        nest(out, 1, |out| put(out, 1, key)); // NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE
        match element.data {
            Some(ElementData::Value(value)) => nest(out, 2, |out| put(out, 1, value)),
            Some(ElementData::Goto(chain)) => nest(out, 2, |out| encode_goto(out, chain)),
            Some(ElementData::Drop) => nest(out, 2, |out| Data::Verdict(Verdict::Drop).encode(out)),
            None => {}
        } // NFTA_SET_ELEM_DATA
        if flags != 0 {
            put_u32(out, 3, flags); // NFTA_SET_ELEM_FLAGS
        }
        if let Some(milliseconds) = element.timeout {
            put_u64(out, 4, milliseconds); // NFTA_SET_ELEM_TIMEOUT
        }
        if let Some(comment) = element.comment {
            put(out, 6, &userdata_comment(0, comment)); // NFTA_SET_ELEM_USERDATA
        }
        if element.counter {
            nest(out, 7, |out| {
                put_str(out, 1, "counter"); // NFTA_EXPR_NAME
                nest(out, 2, |out| {
                    put_u64(out, 1, 0); // NFTA_COUNTER_BYTES
                    put_u64(out, 2, 0); // NFTA_COUNTER_PACKETS
                }); // NFTA_EXPR_DATA
            }); // NFTA_SET_ELEM_EXPR
        }
    });
}

/// A comment as nft stores it: type, length with the NUL, text, NUL.
fn userdata_comment(kind: u8, comment: &str) -> Vec<u8> {
    let comment = shorten(comment);
    let length = u8::try_from(comment.len() + 1).expect("shortened to fit");
    [&[kind, length], comment.as_bytes(), &[0]].concat()
}

/// The part of a comment that nft takes and prints.
pub fn shorten(comment: &str) -> &str {
    &comment[..comment.floor_char_boundary(MAX_COMMENT)]
}

/// Begins a message about an `inet` table with `struct nlmsghdr` and `struct nfgenmsg`;
/// [`end_message`] sets its length.
pub(super) fn begin_message(out: &mut Vec<u8>, kind: u16, flags: u16, resource: u16) -> usize {
    begin(out, NFPROTO_INET, kind, flags, resource)
}

/// As [`begin_message`], for a table of any family.
fn begin(out: &mut Vec<u8>, nfproto: u8, kind: u16, flags: u16, resource: u16) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend_from_slice(&[0; 8]); // sequence number, port
    out.extend_from_slice(&[nfproto, 0]); // nfgen_family, NFNETLINK_V0
    out.extend_from_slice(&resource.to_be_bytes());
    start
}

/// Sets the length of the message that begins at `start` and ends where `out` ends.
pub(super) fn end_message(out: &mut [u8], start: usize) {
    let length = u32::try_from(out.len() - start).expect("a message is shorter than 4 GiB");
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_has_the_family_of_its_table() {
        for (mut batch, nfproto) in [
            (Batch::new("t"), NFPROTO_INET),
            (Batch::of_family(Family::V4, "t"), NFPROTO_IPV4),
            (Batch::of_family(Family::V6, "t"), NFPROTO_IPV6),
        ] {
            batch.delete_table();
            batch.add_element("s", &Element::key(&[1]));
            batch.delete_element("s", &Element::key(&[2]));
            batch.delete_chain("c");
            let Encoded { bytes, messages } = batch.finish();
            // Behind `struct nlmsghdr`.
            let families: Vec<u8> =
                messages.iter().map(|message| bytes[message.range.start + 16]).collect();
            let mut expected = [nfproto; 6];
            (expected[0], expected[5]) = (NFPROTO_UNSPEC, NFPROTO_UNSPEC);
            assert_eq!(families, expected);
        }
    }
}
