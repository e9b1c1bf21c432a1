//! What comes out of the measurements.

use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::machine::Machine;
use crate::markdown::{as_f64, percentile};
use crate::objects::Objects;
use crate::proxy::Proxy;

/// The raw data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Where it was measured.
    pub machine: Machine,
    /// The version of Kubernetes, kube-proxy's too.
    pub kubernetes: String,
    /// One for each cluster and proxy.
    pub runs: Vec<Run>,
    /// What could not be measured.
    #[serde(skip)]
    pub failed: Vec<String>,
}

/// One proxy on one cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The cluster.
    pub cluster: Cluster,
    /// Who served it.
    pub proxy: Proxy,
    /// Starts on a kernel that holds nothing, each in a namespace of its own.
    pub starts: Vec<Start>,
    /// What the ruleset is like.
    pub listing: Listing,
    /// What clients see.
    pub connections: Connections,
    /// Changes of endpoints: one at a time, then at several rates.
    pub changes: Vec<Changes>,
    /// A start on a kernel that holds everything but one change.
    pub restart: Restart,
    /// The process that was changed all the time, at its end.
    pub usage: Usage,
}

/// From the start of the process until the kernel holds everything.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// How long it took.
    pub seconds: f64,
    /// What it cost, the three seconds after that included.
    pub usage: Usage,
}

/// What a process used so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time in seconds, that of its child processes included.
    pub cpu_seconds: f64,
    /// The most memory that it had resident at a time, in KiB.
    pub peak_kib: u64,
    /// The most that one of its child processes had, in KiB, as far as seen by looking often.
    pub child_peak_kib: u64,
}

/// The ruleset as `nft list ruleset` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listing {
    /// How long nft took.
    pub seconds: f64,
    /// Its length in bytes.
    pub bytes: usize,
    /// Its lines.
    pub lines: usize,
    /// What it consists of.
    pub objects: Objects,
}

/// TCP connections of a pod to the Service in the middle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Connections {
    /// How long `connect` takes, in seconds, one after the other.
    pub connect: Distribution,
    /// New connections per second, of several clients at once.
    pub per_second: f64,
}

/// Changes of endpoints at the API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Changes {
    /// How many a second were asked for; `None` where each waited for the one before.
    pub rate: Option<u32>,
    /// How many a second the API server did.
    pub per_second: f64,
    /// How many there were.
    pub count: usize,
    /// Seconds from sending the request to the kernel.
    pub from_sending: Distribution,
    /// Seconds from the API server's answer to the kernel. Negative where the kernel was first.
    pub from_answer: Distribution,
    /// CPU time of the proxy meanwhile.
    pub cpu_seconds: f64,
    /// Objects, rules and elements added or deleted in the kernel.
    pub operations: usize,
    /// Transactions.
    pub transactions: usize,
}

/// A start on a kernel that holds everything but one change.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Restart {
    /// From the start of the process until the change is in force.
    pub seconds: f64,
    /// Objects, rules and elements added or deleted in the kernel, until nothing happened anymore.
    pub operations: usize,
    /// Transactions.
    pub transactions: usize,
}

/// How values are distributed: all of them, sorted, or [`QUANTILES`] of them in equal steps from
/// the least to the largest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Distribution(Vec<f64>);

/// How many values are kept.
const QUANTILES: usize = 201;

impl Distribution {
    /// Of these values, to the microsecond.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let kept = if values.len() <= QUANTILES {
            values
        } else {
            let at = |step| percentile(&values, as_f64(step) / as_f64(QUANTILES - 1));
            (0..QUANTILES).filter_map(at).collect()
        };
        Self(kept.into_iter().map(|value| (value * 1e6).round() / 1e6).collect())
    }

    /// The value below which this share lies.
    pub fn at(&self, share: f64) -> Option<f64> {
        percentile(&self.0, share)
    }
}

impl Run {
    /// The median of the starts' seconds.
    pub fn start_seconds(&self) -> Option<f64> {
        self.start(|start| start.seconds)
    }

    /// The median of something about the starts.
    pub fn start(&self, of: impl Fn(&Start) -> f64) -> Option<f64> {
        percentile(&self.starts.iter().map(of).collect::<Vec<_>>(), 0.5)
    }

    /// The changes at a rate, if they were measured.
    pub fn changes_at(&self, rate: Option<u32>) -> Option<&Changes> {
        self.changes.iter().find(|changes| changes.rate == rate)
    }

    /// The most memory that the process ever had, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let starts = self.starts.iter().map(|start| start.usage.peak_kib);
        starts.fold(self.usage.peak_kib, u64::max)
    }

    /// The most memory that a child process ever had, in KiB.
    pub fn child_peak_kib(&self) -> u64 {
        let starts = self.starts.iter().map(|start| start.usage.child_peak_kib);
        starts.fold(self.usage.child_peak_kib, u64::max)
    }
}
