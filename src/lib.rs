//! Portcullis: a Kubernetes Service proxy for nftables with a firewall on every NodePort.

pub mod commit;
pub mod model;
pub mod netlink;
pub mod plan;
pub mod ruleset;
pub mod watch;
