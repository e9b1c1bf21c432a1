//! Portcullis: a Kubernetes Service proxy for nftables with a firewall on every NodePort.
//!
//! The way of an object through the modules: [`watch`] gets it and lowers it into the [`model`],
//! [`plan`] says what the node should do for it, [`ruleset`] says that in terms of nftables,
//! [`commit`] brings it into the kernel by way of [`netlink`], and [`report`] tells what became
//! of it. ARCHITECTURE.md says who may use whom.

pub mod audit;
pub mod commit;
pub mod health;
pub mod host;
pub mod metrics;
pub mod model;
pub mod netlink;
pub mod occupied;
pub mod plan;
pub mod refused;
pub mod report;
pub mod ruleset;
pub mod sysctl;
pub mod takeover;
pub mod watch;
