//! Manifests: Services, `EndpointSlice`s and Nodes from files, for a node without an API server.
//!
//! A directory holds `*.yaml`, `*.yml` and `*.json` files (not hidden ones, no directories below
//! it; symbolic links are followed). A YAML file may hold several documents, a document a `List`.
//! Objects of other kinds are passed over. There is no `EndpointSlice` controller: what no slice
//! names has no endpoints.
//!
//! A document that cannot be read is reported with its file, number, line and field; everything
//! else goes on, and what was in force of its file stays so until the file can be read as a whole.
//! The first definition of an object wins, in the order of file names and then of documents.

mod directory;
mod document;
mod field;
mod file;
mod follow;
mod motion;
mod reader;
mod split;
mod value;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Index, Options};
use crate::commit::CommitError;
use crate::model::Diagnostic;
use directory::Directory;

pub use follow::{run, wait_for_writers};

/// The largest file that is read, in bytes. 10,000 Services with their slices have some 7 MiB.
pub const LARGEST_FILE: u64 = 64 << 20;

/// Everything that the manifests at a path say.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The objects.
    pub index: Index,
    /// What is wrong with the files, sorted. What is wrong with a Service or its slices is in the
    /// diagnostics of its plan, and what is wrong with the Node in the index' node context.
    pub diagnostics: Vec<Diagnostic>,
}

/// Why manifests could not be read or watched at all.
#[derive(Debug, Error)]
pub enum Error {
    /// The path given cannot be read.
    #[error("manifests at {} cannot be read", path.display())]
    Read {
        /// The path as it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel cannot be brought to hold anything at all.
    #[error("what the manifests ask for cannot be brought into the kernel")]
    Commit(#[source] CommitError),
}

/// Reads the manifests in a directory, or in a single file of whatever name, once.
///
/// # Errors
/// When the path itself cannot be read. A file in the directory that cannot be is a diagnostic.
pub fn load(path: &Path, options: &Options) -> Result<Loaded, Error> {
    let mut directory = Directory::new(path, options);
    directory.scan(|_| false)?;
    let diagnostics = directory.diagnostics();
    Ok(Loaded { index: directory.into_index(), diagnostics })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_says_how_large_a_file_may_be() {
        let document = include_str!("../../../docs/manifests.md");
        let sentence = format!("A file may be up to {} MiB.", LARGEST_FILE >> 20);
        assert!(document.contains(&sentence), "{sentence:?} is not there");
    }
}
