//! Listing a table: all that the kernel holds of it, as far as a writer can compare it.

use std::collections::{BTreeMap, HashSet};
use std::io;

use super::attribute::{find, iter, nest, put, put_str, string, u32_of, u64_of};
use super::batch::{
    HEADERS, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE, SUBSYSTEM, begin_message, end_message,
};
use super::error::Error;
use super::expression::{Data, EXPR_DATA, EXPR_NAME, LIST_ELEM};
use super::object::TableFlags;
use super::socket::{ListError, Socket};

// enum nf_tables_msg_types
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_GETGEN: u16 = 16;
/// `NLM_F_ROOT | NLM_F_MATCH`.
const NLM_F_DUMP: u16 = 0x300;
/// `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// `NLM_F_ACK`.
const NLM_F_ACK: u16 = 0x4;
/// How often a listing is begun anew because the ruleset changed under it.
const ATTEMPTS: usize = 20;

/// How many elements one request asks for by their keys: each answer is a datagram of its own, about
/// 800 bytes of the receive buffer, of which there are at least 208 KiB (`net.core.rmem_default`).
const KEYS_PER_REQUEST: usize = 256;

/// A table with everything in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableDump {
    /// The table's flags.
    pub flags: TableFlags,
    /// The table's comment.
    pub comment: Option<String>,
    /// Its chains by name.
    pub chains: BTreeMap<String, ChainDump>,
    /// Its sets and maps by name.
    pub sets: BTreeMap<String, SetDump>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainDump {
    /// Its comment.
    pub comment: Option<String>,
    /// Where it is attached; `None` for a chain that others jump to.
    pub hooked: Option<HookDump>,
    /// Its rules, in their order.
    pub rules: Vec<RuleDump>,
}

/// Where a base chain is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HookDump {
    /// The kernel's name of the kind: `filter`, `nat`, `route`.
    pub kind: String,
    /// `enum nf_inet_hooks`.
    pub hook: u32,
    /// The place among the hook's chains.
    pub priority: i32,
    /// What happens to packets that no rule decided about: `NF_DROP` (0) or `NF_ACCEPT` (1).
    pub policy: u32,
}

/// A rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleDump {
    /// Its comment.
    pub comment: Option<String>,
    /// Its expressions, in their order.
    pub expressions: Vec<ExpressionDump>,
}

/// An expression, to be compared by [`super::Expression::is_listed_as`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpressionDump {
    /// The kernel's name of its type.
    pub name: String,
    /// Its attributes, as the kernel lists them.
    pub(super) data: Vec<u8>,
}

/// A set or a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetDump {
    /// `enum nft_set_flags`.
    pub flags: u32,
    /// nft's type of the key.
    pub key_type: u32,
    /// nft's type of the data; 0 for a set.
    pub data_type: u32,
    /// How many elements it has, where the kernel says so (`NFTA_SET_COUNT`, Linux 6.16).
    pub count: Option<u32>,
    /// Its comment.
    pub comment: Option<String>,
    /// Its elements; intervals as one element with both ends. In no particular order.
    pub elements: Vec<ElementDump>,
}

/// An element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElementDump {
    /// The key; the first address of an interval.
    pub key: Vec<u8>,
    /// The first key behind the interval.
    pub end: Option<Vec<u8>>,
    /// What a map's element leads to.
    pub data: Option<Data>,
    /// The comment.
    pub comment: Option<String>,
    /// Milliseconds that it lives in all, and that are left.
    pub timeout: Option<(u64, u64)>,
    /// Packets and bytes counted.
    pub counter: Option<(u64, u64)>,
}

impl Socket {
    /// Lists the `inet` table `table`; `None` where there is none. Starts over when the ruleset
    /// changes meanwhile, a bounded number of times.
    ///
    /// # Errors
    /// [`Error::List`] with the kernel's reason (`EPERM` without the right to list, `EOPNOTSUPP` or `EINVAL`
    /// without nf_tables), [`Error::Interrupted`] if the ruleset never stood still.
    pub fn dump_table(&mut self, table: &str) -> Result<Option<TableDump>, Error> {
        self.at_one_moment(|socket| socket.list_table(table, |_, _| false))
    }

    /// Does `list`, again if the ruleset changed meanwhile, a bounded number of times. Each listing
    /// is of one moment, or the kernel says that it is not; that several listings are of the same
    /// moment it does not say, but the ruleset's generation does.
    ///
    /// # Errors
    /// Those of `list`; [`Error::Interrupted`] if the ruleset never stood still.
    pub fn at_one_moment<T>(
        &mut self,
        mut list: impl FnMut(&mut Socket) -> Result<T, Error>,
    ) -> Result<T, Error> {
        for _ in 0..ATTEMPTS {
            let before = self.generation()?;
            match list(self) {
                Ok(listed) if self.generation()? == before => return Ok(listed),
                Ok(_) | Err(Error::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Interrupted)
    }

    /// Lists a table without the elements of the sets that `left_out` names, by name and
    /// description. For large sets: the kernel walks a hash set from its
    /// beginning for every 32 KiB of a listing, so listing n elements takes time in the order of n
    /// squared (a million: half a minute).
    ///
    /// # Errors
    /// As [`Socket::dump_table`], but [`Error::Interrupted`] at once; to be called in
    /// [`Socket::at_one_moment`].
    pub fn list_table(
        &mut self,
        table: &str,
        left_out: impl Fn(&str, &SetDump) -> bool,
    ) -> Result<Option<TableDump>, Error> {
        let mut dump = None;
        // Not a dump, so nothing but an acknowledgement tells where the answer ends.
        let request = request(NFT_MSG_GETTABLE, NLM_F_ACK, |out| put_str(out, 1, table));
        match self.list_kind(request, NFT_MSG_NEWTABLE, |attributes| {
            dump = Some(TableDump {
                flags: TableFlags(number(attributes, 2)),
                comment: comment(attributes, 6, 0),
                ..TableDump::default()
            });
        }) {
            Ok(()) => {}
            Err(ListError::Refused(error)) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error.listing("nf_tables tables")),
        }
        let Some(mut dump) = dump else { return Ok(None) };
        self.list_chains(table, &mut dump).map_err(|e| e.listing("nf_tables chains"))?;
        self.list_rules(table, &mut dump).map_err(|e| e.listing("nf_tables rules"))?;
        self.list_sets(table, &mut dump).map_err(|e| e.listing("nf_tables sets"))?;
        for (name, set) in &mut dump.sets {
            if !left_out(name, set) {
                self.list_elements(table, name, set)?;
            }
        }
        Ok(Some(dump))
    }

    /// The number that every transaction in this network namespace raises, whoever makes it.
    ///
    /// # Errors
    /// [`Error::List`] with the kernel's reason, as [`Socket::dump_table`].
    pub fn generation(&mut self) -> Result<u32, Error> {
        let mut generation = 0;
        let request = request(NFT_MSG_GETGEN, NLM_F_ACK, |_| {});
        self.list_kind(request, NFT_MSG_NEWGEN, |attributes| {
            generation = number(attributes, 1); // NFTA_GEN_ID
        })
        .map_err(|e| e.listing("the generation of nf_tables"))?;
        Ok(generation)
    }

    fn list_chains(&mut self, table: &str, dump: &mut TableDump) -> Result<(), ListError> {
        let request = request(NFT_MSG_GETCHAIN, NLM_F_DUMP, |_| {});
        self.list_kind(request, NFT_MSG_NEWCHAIN, |attributes| {
            // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_USERDATA
            if text(attributes, 1) == table {
                let comment = comment(attributes, 12, 0);
                let chain = ChainDump { comment, hooked: hooked(attributes), rules: Vec::new() };
                dump.chains.insert(text(attributes, 3), chain);
            }
        })
    }

    fn list_rules(&mut self, table: &str, dump: &mut TableDump) -> Result<(), ListError> {
        let request = request(NFT_MSG_GETRULE, NLM_F_DUMP, |out| put_str(out, 1, table));
        self.list_kind(request, NFT_MSG_NEWRULE, |attributes| {
            // NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA
            let Some(chain) = dump.chains.get_mut(&text(attributes, 2)) else { return };
            let expressions = find(attributes, 4).unwrap_or_default();
            chain.rules.push(RuleDump {
                comment: comment(attributes, 7, 0),
                expressions: iter(expressions).map(|(_, listed)| expression(listed)).collect(),
            });
        })
    }

    fn list_sets(&mut self, table: &str, dump: &mut TableDump) -> Result<(), ListError> {
        let request = request(NFT_MSG_GETSET, NLM_F_DUMP, |out| put_str(out, 1, table));
        self.list_kind(request, NFT_MSG_NEWSET, |attributes| {
            let set = SetDump {
                flags: number(attributes, 3),                 // NFTA_SET_FLAGS
                key_type: number(attributes, 4),              // NFTA_SET_KEY_TYPE
                data_type: number(attributes, 6),             // NFTA_SET_DATA_TYPE
                count: find(attributes, 20).and_then(u32_of), // NFTA_SET_COUNT
                comment: comment(attributes, 13, 7), // NFTA_SET_USERDATA, NFTNL_UDATA_SET_COMMENT
                elements: Vec::new(),
            };
            dump.sets.insert(text(attributes, 2), set);
        })
    }

    /// Lists the elements of a set into its description, again if the kernel moved them meanwhile:
    /// a hash table that has just been filled grows in the background, and a listing, which goes on
    /// after each message from the number of elements that it has seen, then gives some elements
    /// twice instead of others. The kernel does not say so, but as their number is right, there is
    /// none missing where there is none twice. Intervals are kept in a tree, which has no such
    /// trouble.
    ///
    /// # Errors
    /// As [`Socket::list_table`].
    pub fn list_elements(
        &mut self,
        table: &str,
        name: &str,
        set: &mut SetDump,
    ) -> Result<(), Error> {
        let interval = set.flags & 0x4 != 0; // NFT_SET_INTERVAL
        for _ in 0..ATTEMPTS {
            let (mut elements, ends) = self
                .try_list_elements(table, name, interval)
                .map_err(|e| e.listing("nf_tables set elements"))?;
            if interval {
                join_intervals(&mut elements, ends);
            } else if has_duplicates(&elements) {
                continue;
            }
            set.elements = elements;
            return Ok(());
        }
        Err(Error::Interrupted)
    }

    /// Lists the elements of a set, and the keys at which intervals end.
    fn try_list_elements(
        &mut self,
        table: &str,
        name: &str,
        interval: bool,
    ) -> Result<(Vec<ElementDump>, Vec<Vec<u8>>), ListError> {
        let (mut elements, mut ends) = (Vec::new(), Vec::new());
        let request = request(NFT_MSG_GETSETELEM, NLM_F_DUMP, |out| {
            put_str(out, 1, table); // NFTA_SET_ELEM_LIST_TABLE
            put_str(out, 2, name); // NFTA_SET_ELEM_LIST_SET
        });
        self.list_kind(request, NFT_MSG_NEWSETELEM, |attributes| {
            let list = find(attributes, 3).unwrap_or_default(); // NFTA_SET_ELEM_LIST_ELEMENTS
            for (_, attributes) in iter(list).filter(|(kind, _)| *kind == LIST_ELEM) {
                let element = element(attributes);
                // NFTA_SET_ELEM_FLAGS: NFT_SET_ELEM_INTERVAL_END
                if interval && number(attributes, 3) & 1 != 0 {
                    ends.push(element.key);
                } else {
                    elements.push(element);
                }
            }
        })?;
        Ok((elements, ends))
    }

    /// Reads the elements of a set that have these keys and hands them to `each` in that order; those
    /// that are not there are left out.
    ///
    /// # Errors
    /// As [`Socket::list_table`].
    pub fn read_elements(
        &mut self,
        table: &str,
        set: &str,
        keys: impl IntoIterator<Item = Vec<u8>>,
        mut each: impl FnMut(ElementDump),
    ) -> Result<(), Error> {
        let mut keys = keys.into_iter();
        loop {
            let chunk: Vec<Vec<u8>> = keys.by_ref().take(KEYS_PER_REQUEST).collect();
            if chunk.is_empty() {
                return Ok(());
            }
            let mut wanted = chunk.as_slice();
            while !wanted.is_empty() {
                let mut found = 0;
                let result = self.read_chunk(table, set, wanted, |element| {
                    found += 1;
                    each(element);
                });
                wanted = match result {
                    Ok(()) => &[],
                    // The kernel stops at the first key that it does not have.
                    Err(ListError::Refused(error)) if error.kind() == io::ErrorKind::NotFound => {
                        wanted.get(found + 1..).unwrap_or_default()
                    }
                    Err(error) => return Err(error.listing("nf_tables set elements by key")),
                };
            }
        }
    }

    fn read_chunk(
        &mut self,
        table: &str,
        set: &str,
        keys: &[Vec<u8>],
        mut each: impl FnMut(ElementDump),
    ) -> Result<(), ListError> {
        // Not a dump, so nothing but an acknowledgement tells where the answer ends.
        let request = request(NFT_MSG_GETSETELEM, NLM_F_ACK, |out| {
            put_str(out, 1, table); // NFTA_SET_ELEM_LIST_TABLE
            put_str(out, 2, set); // NFTA_SET_ELEM_LIST_SET
            nest(out, 3, |out| {
                for key in keys {
                    nest(out, LIST_ELEM, |out| nest(out, 1, |out| put(out, 1, key)));
                }
            }); // NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_KEY, NFTA_DATA_VALUE
        });
        self.list_kind(request, NFT_MSG_NEWSETELEM, |attributes| {
            let list = find(attributes, 3).unwrap_or_default();
            iter(list).for_each(|(_, attributes)| each(element(attributes)));
        })
    }

    /// Lists the answers of one kind, by their attributes.
    fn list_kind(
        &mut self,
        request: Vec<u8>,
        wanted: u16,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), ListError> {
        self.list(request, |kind, payload| {
            if kind == SUBSYSTEM << 8 | wanted {
                each(payload.get(NFGENMSG..).unwrap_or_default());
            }
        })
    }
}

/// Gives every interval its end. The kernel lists both halves as elements of their own; an
/// interval ends at the next end behind it, or never.
fn join_intervals(elements: &mut [ElementDump], mut ends: Vec<Vec<u8>>) {
    elements.sort_by(|a, b| a.key.cmp(&b.key));
    ends.sort();
    let mut ends = ends.into_iter().peekable();
    for element in elements {
        while ends.next_if(|end| *end <= element.key).is_some() {}
        element.end = ends.next();
    }
}

fn hooked(chain: &[u8]) -> Option<HookDump> {
    let hook = find(chain, 4)?; // NFTA_CHAIN_HOOK
    Some(HookDump {
        kind: text(chain, 7),                    // NFTA_CHAIN_TYPE
        hook: number(hook, 1),                   // NFTA_HOOK_HOOKNUM
        priority: number(hook, 2).cast_signed(), // NFTA_HOOK_PRIORITY
        policy: number(chain, 5),                // NFTA_CHAIN_POLICY
    })
}

fn expression(attributes: &[u8]) -> ExpressionDump {
    let data = find(attributes, EXPR_DATA).unwrap_or_default().to_vec();
    ExpressionDump { name: text(attributes, EXPR_NAME), data }
}

fn has_duplicates(elements: &[ElementDump]) -> bool {
    let mut seen = HashSet::with_capacity(elements.len());
    !elements.iter().all(|element| seen.insert(&*element.key))
}

fn element(attributes: &[u8]) -> ElementDump {
    let timeout = find(attributes, 4).and_then(u64_of); // NFTA_SET_ELEM_TIMEOUT
    let expiration = find(attributes, 5).and_then(u64_of); // NFTA_SET_ELEM_EXPIRATION
    ElementDump {
        key: find(attributes, 1).and_then(|key| find(key, 1)).unwrap_or_default().to_vec(),
        end: None,
        data: find(attributes, 2).and_then(Data::decode),
        comment: comment(attributes, 6, 0), // NFTA_SET_ELEM_USERDATA
        timeout: timeout.map(|timeout| (timeout, expiration.unwrap_or(timeout))),
        counter: find(attributes, 7).and_then(counter), // NFTA_SET_ELEM_EXPR
    }
}

fn counter(expression: &[u8]) -> Option<(u64, u64)> {
    let data = (text(expression, 1) == "counter").then(|| find(expression, 2))??;
    Some((u64_of(find(data, 2)?)?, u64_of(find(data, 1)?)?))
}

fn request(kind: u16, flags: u16, fill: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADERS + 64);
    let start = begin_message(&mut out, SUBSYSTEM << 8 | kind, flags, 0);
    fill(&mut out);
    end_message(&mut out, start);
    out
}

fn number(attributes: &[u8], kind: u16) -> u32 {
    find(attributes, kind).and_then(u32_of).unwrap_or_default()
}

fn text(attributes: &[u8], kind: u16) -> String {
    find(attributes, kind).map(string).unwrap_or_default()
}

/// The comment in an object's userdata: a list of type, length and value of a byte each.
fn comment(attributes: &[u8], kind: u16, comment_type: u8) -> Option<String> {
    let mut rest = find(attributes, kind)?;
    while let [kind, length, more @ ..] = rest {
        let value = more.get(..usize::from(*length))?;
        if *kind == comment_type {
            return Some(string(value));
        }
        rest = &more[value.len()..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_get_their_ends() {
        let start = |key: u8| ElementDump { key: vec![key], ..ElementDump::default() };
        // [10,20) [20,30) [40,..
        let mut elements = vec![start(40), start(10), start(20)];
        join_intervals(&mut elements, vec![vec![30], vec![20], vec![0]]);
        let joined: Vec<(u8, Option<u8>)> =
            elements.iter().map(|e| (e.key[0], e.end.as_ref().map(|end| end[0]))).collect();
        assert_eq!(joined, [(10, Some(20)), (20, Some(30)), (40, None)]);
    }
}
