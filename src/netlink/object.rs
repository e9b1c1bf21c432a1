//! Chains, rules, sets and elements, as they are written.

/// Flags of a table (`enum nft_table_flags`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableFlags(pub u32);

impl TableFlags {
    /// A plain table that any privileged process may change.
    pub const NONE: TableFlags = TableFlags(0);
    /// Only the socket that made or adopted the table may change it (`NFT_TABLE_F_OWNER`), and it
    /// stays when that socket is closed (`NFT_TABLE_F_PERSIST`, Linux 6.9). `nft flush ruleset` passes
    /// such a table over.
    pub const OWNED: TableFlags = TableFlags(0x2 | 0x4);

    /// A table whose owner has closed its socket: anybody may change or adopt it.
    pub const ORPHANED: TableFlags = TableFlags(0x4);

    /// Whether the table belongs to one socket.
    pub fn is_owned(self) -> bool {
        self.0 & 0x2 != 0
    }
}

/// The kind of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    /// `type filter`
    Filter,
    /// `type nat`: sees the first packet of each connection only.
    Nat,
}

impl ChainKind {
    /// The kernel's name, which is nft's too.
    pub fn name(self) -> &'static str {
        match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        }
    }
}

/// `enum nf_inet_hooks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// Every packet that arrives, before routing.
    Prerouting = 0,
    /// Packets to the node itself.
    Input = 1,
    /// Packets through the node.
    Forward = 2,
    /// Packets of the node itself, before routing.
    Output = 3,
    /// Every packet that leaves, after routing.
    Postrouting = 4,
}

impl Hook {
    /// nft's name of the hook.
    pub fn name(self) -> &'static str {
        match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        }
    }
}

/// Where a base chain is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hooked {
    /// Its kind.
    pub kind: ChainKind,
    /// The hook.
    pub hook: Hook,
    /// The place among the hook's chains; smaller is earlier.
    pub priority: i32,
}

/// A chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain<'a> {
    /// Its name, at most 255 bytes.
    pub name: &'a str,
    /// Where it is attached; `None` for a chain that others jump to.
    pub hooked: Option<Hooked>,
    /// A comment for readers, at most 127 bytes.
    pub comment: Option<&'a str>,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule<'a> {
    /// The chain it is appended to.
    pub chain: &'a str,
    /// What it does.
    pub expressions: &'a [super::Expression],
    /// A comment for readers, at most 127 bytes.
    pub comment: Option<&'a str>,
}

/// A set or a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set<'a> {
    /// Its name, at most 255 bytes.
    pub name: &'a str,
    /// nft's type of the key; the types of a concatenation's fields six bits each.
    pub key_type: u32,
    /// The key's length in bytes, each field padded to four.
    pub key_length: u32,
    /// What a map leads to; `None` for a set.
    pub data: Option<SetData>,
    /// Whether elements are intervals.
    pub interval: bool,
    /// Whether elements have a timeout of their own.
    pub timeout: bool,
    /// Whether rules add elements.
    pub dynamic: bool,
    /// How many elements there may be; `None` for any number, but where rules add them the kernel
    /// makes it 65,535.
    pub size: Option<u32>,
    /// A comment for readers, at most 127 bytes.
    pub comment: Option<&'a str>,
}

/// What a map leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetData {
    /// Bytes.
    Value {
        /// nft's type.
        kind: u32,
        /// The length in bytes.
        length: u32,
    },
    /// A verdict.
    Verdict,
}

impl Set<'_> {
    /// `enum nft_set_flags`.
    pub fn flags(&self) -> u32 {
        let mut flags = 0;
        flags |= if self.interval { 0x4 } else { 0 }; // NFT_SET_INTERVAL
        flags |= if self.data.is_some() { 0x8 } else { 0 }; // NFT_SET_MAP
        flags |= if self.timeout { 0x10 } else { 0 }; // NFT_SET_TIMEOUT
        flags |= if self.dynamic { 0x20 } else { 0 }; // NFT_SET_EVAL
        flags
    }
}

impl SetData {
    /// nft's type of the data; of a verdict it is `NFT_DATA_VERDICT`.
    pub fn kind(self) -> u32 {
        match self {
            SetData::Value { kind, .. } => kind,
            SetData::Verdict => 0xffff_ff00,
        }
    }
}

/// An element to add or to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element<'a> {
    /// The key; the first address of an interval.
    pub key: &'a [u8],
    /// For elements of interval sets: the first key behind the interval; `None` where the interval
    /// reaches to the last key there is, or where the set has no intervals.
    pub end: Option<&'a [u8]>,
    /// What a map's element leads to.
    pub data: Option<ElementData<'a>>,
    /// Milliseconds until the kernel removes it; `None` for never.
    pub timeout: Option<u64>,
    /// Whether packets that match are counted.
    pub counter: bool,
    /// A comment for readers, at most 127 bytes.
    pub comment: Option<&'a str>,
}

/// What a map's element leads to, borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementData<'a> {
    /// Bytes.
    Value(&'a [u8]),
    /// `goto CHAIN`
    Goto(&'a str),
    /// `drop`
    Drop,
}

impl<'a> Element<'a> {
    /// An element that is nothing but a key.
    pub fn key(key: &'a [u8]) -> Element<'a> {
        Element { key, end: None, data: None, timeout: None, counter: false, comment: None }
    }
}
