//! What is measured, and what comes out.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cluster::Size;
use crate::objects::Objects;

/// What one child process does, in a network namespace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Who programs the kernel.
    pub proxy: Proxy,
    /// What is timed.
    pub what: What,
    /// In a cluster of which size.
    pub size: Size,
    /// How often, for things that can be repeated in one namespace.
    pub changes: usize,
}

/// Who programs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// This project.
    Portcullis,
    /// A ruleset of the shape that kube-proxy's nftables mode has, loaded with `nft -f -`.
    KubeProxyShape,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// An empty kernel gets everything.
    ColdLoad,
    /// One endpoint gives way to another.
    EndpointReplaced,
    /// One endpoint goes, and comes back; other Services have either number of endpoints.
    EndpointCount,
    /// The same, where no other Service has as many: the balancing chain comes and goes too.
    EndpointCountAlone,
    /// One Service comes.
    ServiceAdded,
    /// One Service goes.
    ServiceRemoved,
    /// A firewall lets in one more network.
    CidrAdded,
    /// The process starts anew, and the kernel holds everything already.
    Restart,
    /// `nft --json --terse list table`, which kube-proxy does before every change.
    Listing,
}

/// What came out of one job. Lists have one entry for each time that the thing was done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// From the model's change to the end of the transaction.
    pub seconds: Vec<f64>,
    /// Of these: planning.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plan_seconds: Vec<f64>,
    /// Of these: inside the kernel, from handing over the transaction to its answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernel_seconds: Vec<f64>,
    /// Objects and elements written or deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<usize>,
    /// Bytes handed to the kernel, or to nft.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bytes: Vec<usize>,
    /// The most memory that the process which programs the kernel ever had, in KiB.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peak_kib: Vec<u64>,
    /// What the table consists of afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<Objects>,
}

/// One row of the raw data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Who programmed the kernel.
    pub proxy: Proxy,
    /// What was timed.
    pub what: What,
    /// In a cluster of which size.
    pub size: Size,
    /// The figures.
    pub outcome: Outcome,
}

impl Measurement {
    /// Whether this is about the same thing.
    pub fn is_like(&self, other: &Measurement) -> bool {
        (self.proxy, self.what, self.size) == (other.proxy, other.what, other.size)
    }
}

impl Outcome {
    /// Notes that the thing was done once more.
    pub fn add(&mut self, elapsed: Duration) {
        self.seconds.push(elapsed.as_secs_f64());
    }

    /// Takes in the figures of a repetition.
    pub fn merge(&mut self, other: Outcome) {
        self.seconds.extend(other.seconds);
        self.plan_seconds.extend(other.plan_seconds);
        self.kernel_seconds.extend(other.kernel_seconds);
        self.operations.extend(other.operations);
        self.bytes.extend(other.bytes);
        self.peak_kib.extend(other.peak_kib);
        self.objects = self.objects.or(other.objects);
    }
}
