//! What upstream Kubernetes expects of a Service proxy, held against ours without a kernel: which
//! endpoints serve, and what becomes of packets.
//!
//! The tables are facts extracted from upstream's own tests; `integration/upstream/extract.sh`
//! makes them. A case is known by the line of upstream's file at which it stands. Where we differ
//! on purpose, the case stands in a list with the reason, and it is an error if it does not differ.

mod endpoints;
mod packets;
mod tracer;

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A file of facts.
#[derive(Deserialize)]
struct Facts<Case> {
    origin: Origin,
    cases: Vec<Case>,
}

/// Where facts come from.
#[derive(Deserialize)]
struct Origin {
    module: String,
    version: String,
    file: String,
}

/// Cases in which we differ on purpose: what they are called, and why.
type Differences = [(&'static str, &'static str)];

/// Cases held against what we do.
struct Comparison<'a> {
    intended: &'a Differences,
    met: BTreeSet<String>,
    wrong: Vec<String>,
    cases: usize,
}

impl<'a> Comparison<'a> {
    fn new(intended: &'a Differences) -> Comparison<'a> {
        Comparison { intended, met: BTreeSet::new(), wrong: Vec::new(), cases: 0 }
    }

    /// Takes note of a case; `difference` says in words how we differ, if we do.
    fn case(&mut self, name: &str, difference: Option<String>) {
        self.cases += 1;
        let intended = self.intended.iter().any(|(case, _)| *case == name);
        match difference {
            Some(_) if intended => drop(self.met.insert(name.to_owned())),
            Some(difference) => self.wrong.push(format!("{name}: {difference}")),
            None => {}
        }
    }

    /// Fails if there was a difference that is not intended, or none where one is.
    fn finish(mut self) {
        for (case, reason) in self.intended {
            if !self.met.contains(*case) {
                self.wrong.push(format!("{case}: no different from upstream, though {reason}"));
            }
        }
        println!("{} cases, {} different on purpose", self.cases, self.met.len());
        assert!(self.cases > 0, "the file has no cases");
        let (wrong, all) = (self.wrong.len(), self.cases);
        assert!(self.wrong.is_empty(), "{wrong} of {all} cases:\n{}", self.wrong.join("\n"));
    }
}

fn read<Case: DeserializeOwned>(text: &str) -> Result<Vec<Case>> {
    let facts: Facts<Case> = serde_json::from_str(text).context("a file of facts")?;
    let Origin { module, version, file } = facts.origin;
    println!("{module} {version}, {file}");
    Ok(facts.cases)
}
