//! The test harness of Portcullis: real network namespaces, real packets and a real API server.
//!
//! A test is short: it asks whether the machine can run it, builds a laboratory, puts servers
//! into the pods, programs the node and looks at what the clients see.
//!
//! ```no_run
//! use portcullis_integration::lab::Lab;
//! use portcullis_integration::requirement::{Requirement, available};
//! use portcullis_integration::traffic::{Protocol, Server, probe};
//!
//! # fn main() -> anyhow::Result<()> {
//! if !available(&[Requirement::Root, Requirement::Nft]) {
//!     return Ok(()); // it said so on stderr; with CI=true it would have failed
//! }
//! let lab = Lab::new(2)?;
//! let _server = Server::start(&lab.pods[0], "pod-0", Protocol::Tcp, 8080)?;
//! lab.node.nft("table ip t { chain c { type nat hook prerouting priority dstnat; \
//!     ip daddr 10.96.0.1 tcp dport 80 dnat to 10.244.0.10:8080; }; }")?;
//! let outcome = probe(&lab.allowed, ([10, 96, 0, 1], 80), Protocol::Tcp)?;
//! assert_eq!(outcome.by(), Some("pod-0"));
//! # Ok(())
//! # }
//! ```
//!
//! - [`requirement`]: whether this machine can run a privileged test. Without it such a test is
//!   skipped with a line on stderr; with `CI=true` it fails.
//! - [`lab`]: namespaces, the standard topology, commands and long-living processes in them.
//! - [`binary`]: the portcullis program.
//! - [`controlplane`]: etcd, kube-apiserver and kube-controller-manager, and objects in them.
//! - [`services`]: Services in a few words, for tests that drive the library itself.
//! - [`traffic`]: servers, probes, flows and distributions over TCP, UDP and SCTP.
//!
//! Nothing outlives a test process, however it ends: see [`lab`].

pub mod binary;
pub mod controlplane;
pub mod daemon;
pub mod lab;
pub mod manifest;
pub mod requirement;
pub mod services;
pub mod traffic;
