//! Which endpoints of a Service serve, and how one of them is chosen.

use std::num::NonZeroU32;

use k8s_openapi::api::core::v1 as core;

use super::super::{Findings, shown};
use super::annotation_field;
use crate::model::{Balancing, TrafficPolicy};

/// The annotation that says how an endpoint is chosen: `random`, `weighted` or `source-hash`.
pub const BALANCING_ANNOTATION: &str = "portcullis.dev/balancing";

/// For how long a client keeps its endpoint where nobody says, in seconds
/// (`DefaultClientIPServiceAffinitySeconds` of the API server).
const DEFAULT_AFFINITY: u32 = 10_800;
/// The longest time that the API server accepts (`MaxClientIPServiceAffinitySeconds`).
const MAX_AFFINITY: u32 = 86_400;

/// `Cluster`, `Local`, or nothing.
pub(super) fn policy(text: Option<&str>, field: &str, findings: &mut Findings) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            let message =
                format!("{} is none of Cluster and Local; treated as Cluster", shown(other));
            findings.error(field, message);
            TrafficPolicy::Cluster
        }
    }
}

pub(super) fn session_affinity(
    spec: &core::ServiceSpec,
    findings: &mut Findings,
) -> Option<NonZeroU32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            let message = format!("{} is none of None and ClientIP; treated as None", shown(other));
            findings.error("spec.sessionAffinity", message);
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let seconds = config.and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let default = NonZeroU32::new(DEFAULT_AFFINITY);
    let Some(seconds) = seconds else { return default };
    let valid = u32::try_from(seconds).ok().filter(|seconds| *seconds <= MAX_AFFINITY);
    let valid = valid.and_then(NonZeroU32::new);
    if valid.is_none() {
        findings.error(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!(
                "{seconds} is not between 1 and {MAX_AFFINITY}; clients are remembered for \
                 {DEFAULT_AFFINITY} seconds"
            ),
        );
    }
    valid.or(default)
}

pub(super) fn balancing(object: &core::Service, findings: &mut Findings) -> Balancing {
    let annotations = object.metadata.annotations.as_ref();
    match annotations.and_then(|all| all.get(BALANCING_ANNOTATION)).map(String::as_str) {
        None | Some("random") => Balancing::Random,
        Some("weighted") => Balancing::Weighted,
        Some("source-hash") => Balancing::SourceHash,
        Some(other) => {
            let message = format!(
                "{} is none of random, weighted and source-hash; treated as random",
                shown(other)
            );
            findings.error(annotation_field(BALANCING_ANNOTATION), message);
            Balancing::Random
        }
    }
}
