//! Errors of the netlink module.

use std::fmt;
use std::io;

use thiserror::Error;

use super::Tag;

/// Why something could not be done over netlink, by what the caller can do about it.
#[derive(Debug, Error)]
pub enum Error {
    /// No netlink socket could be had: no nf_tables in the kernel, or no right to it.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel did not take the request at all; nothing of it happened.
    #[error("cannot send a request to the kernel over netlink")]
    Send(#[source] io::Error),
    /// The kernel's answer could not be read; whether the request happened is not known.
    #[error("cannot read the kernel's answer over netlink")]
    Receive(#[source] io::Error),
    /// The kernel refused the transaction; nothing of it happened.
    #[error("the kernel refused the transaction: {}", Refusals(.0))]
    Refused(Vec<Refusal>),
    /// The kernel kept changing while it was listed.
    #[error("the kernel's ruleset kept changing while it was being listed")]
    Interrupted,
    /// The kernel refused to list something.
    #[error("cannot list {what}")]
    List {
        /// What was listed.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

/// One object that the kernel refused, and why.
#[derive(Debug)]
pub struct Refusal {
    /// The object.
    pub subject: Subject,
    /// On whose behalf it was in the transaction; `None` where the kernel did not say which of
    /// several objects was at fault.
    pub tag: Option<Tag>,
    /// The kernel's reason.
    pub error: io::Error,
    /// The kernel's own words, where it has any.
    pub detail: Option<String>,
}

/// What a message of a transaction is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The transaction as a whole.
    Transaction,
    /// A table.
    Table(String),
    /// A chain.
    Chain(String),
    /// A rule of this chain.
    Rule(String),
    /// A set or a map.
    Set(String),
    /// Elements of this set or map.
    Elements(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Transaction => f.write_str("the transaction as a whole"),
            Subject::Table(name) => write!(f, "table {name}"),
            Subject::Chain(name) => write!(f, "chain {name}"),
            Subject::Rule(chain) => write!(f, "a rule of chain {chain}"),
            Subject::Set(name) => write!(f, "set {name}"),
            Subject::Elements(set) => write!(f, "an element of {set}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.error)?;
        match &self.detail {
            Some(detail) => write!(f, " ({detail})"),
            None => Ok(()),
        }
    }
}

/// The first refusal, and how many there are besides.
struct Refusals<'a>(&'a [Refusal]);

impl fmt::Display for Refusals<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("for no stated reason"),
            [one] => write!(f, "{one}"),
            [first, rest @ ..] => write!(f, "{first}, and {} more", rest.len()),
        }
    }
}
