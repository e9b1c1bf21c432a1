//! Whether this node should get traffic: for probes of the daemon and for load balancers.
//!
//! [`server`] answers for the proxy as a whole, as kube-proxy does at its port 10256. [`services`]
//! answers for each Service with a `healthCheckNodePort`.

mod connections;
pub mod server;
pub mod services;

use std::time::Duration;

use crate::commit::Pulse;
use crate::report::Reporter;

pub use connections::Connections;

/// For how long changes may wait to get into the kernel before the proxy does not count as healthy:
/// twice kube-proxy's default `syncPeriod`, as there.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether this proxy works, and whether its node stays. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Health {
    pulse: Pulse,
    reporter: Reporter,
}

impl Health {
    /// The health of a daemon.
    pub fn new(pulse: Pulse, reporter: Reporter) -> Health {
        Health { pulse, reporter }
    }

    /// Whether changes get into the kernel. A daemon that starts is healthy: what an earlier one
    /// left is in force.
    pub fn is_alive(&self) -> bool {
        self.pulse.behind() < PATIENCE
    }

    /// Whether the node stays: it is neither being deleted nor about to be removed (KEP-3458).
    pub fn is_eligible(&self) -> bool {
        !self.reporter.node_context().is_some_and(|context| context.node.leaving)
    }

    /// Whether everything that there is has been programmed once.
    pub fn is_ready(&self) -> bool {
        self.reporter.adoption().is_some() && self.is_alive()
    }
}
