//! Is the kernel as it should be? And who may reach what?
//!
//! An audit reads the ruleset with `nft`, an eye independent of the encoder that wrote it
//! ([`crate::netlink`]), and compares it with what the plans ask for. It changes nothing. It also
//! lists who may reach the node ports, what their firewalls have counted, and the base chains of
//! other tables that see the same packets.
//!
//! It looks at one moment. A Service that changes while it looks, and that a running daemon has not
//! committed yet, is a difference that another audit a moment later does not find.
//!
//! [`run`] does it all; [`Audit`] prints itself as text for people and serialises to JSON:
//!
//! ```no_run
//! # use portcullis::{audit, model::NodeContext, plan::Desired};
//! # fn f(desired: &Desired, node: &NodeContext) -> Result<(), audit::Error> {
//! let audit = audit::run(desired, node, &audit::Nft::default())?;
//! print!("{audit}");
//! let exit_code = i32::from(!audit.in_sync);
//! # Ok(()) }
//! ```
//!
//! The JSON of an [`Audit`] is an interface: fields are added, but not renamed or removed. All of
//! its lists are sorted, so equal states have equal JSON but for the counters.

mod compare;
mod exposure;
mod foreign;
mod nft;
mod plain;
mod print;
mod read;
mod report;
mod table;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde::Serialize;

pub use compare::{Change, Difference, Object, compare};
pub use exposure::{Access, ExposedPort, Exposure};
pub use foreign::{Foreign, Position};
pub use nft::{Error, Listing, Nft};
pub use read::Observed;
pub use table::{Chain, Count, Element, Rule, Set, Table};

use crate::model::{Diagnostic, NodeContext, ServiceName};
use crate::plan::{Desired, ServicePlan};
use crate::ruleset::Contribution;

/// What an audit found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Whether the kernel holds exactly what it should: there are no differences. Other tables and
    /// diagnostics have no part in it.
    pub in_sync: bool,
    /// Everything that is not as it should be.
    pub differences: Vec<Difference>,
    /// Who may reach which Service through the node's ports.
    pub exposures: Vec<Exposure>,
    /// Base chains of other tables on the hooks that packets of Services pass.
    pub foreign: Vec<Foreign>,
    /// Tables that look like kube-proxy's, as `FAMILY TABLE`. Two proxies on one node undo each
    /// other's work.
    pub kube_proxy: Vec<String>,
    /// What is wrong with the objects that all this comes from.
    pub diagnostics: Vec<Diagnostic>,
}

/// Audits the network namespace of this thread: is everything in force that `desired` and `node`
/// ask for, and nothing else?
///
/// # Errors
/// When the ruleset cannot be read; see [`Error`]. That the table is missing is no error but a
/// difference.
pub fn run(desired: &Desired, node: &NodeContext, nft: &Nft) -> Result<Audit, Error> {
    let observed = Observed::read(&nft.list()?)?;
    Ok(examine(desired, node, &observed))
}

/// The audit of a ruleset that was read before.
pub fn examine(desired: &Desired, node: &NodeContext, observed: &Observed) -> Audit {
    let mut services: Vec<&ServiceName> = desired.services().collect();
    services.sort();
    let plans: Vec<Arc<ServicePlan>> =
        services.into_iter().filter_map(|service| desired.effective(service)).collect();
    // Which slot an endpoint has is the kernel's to say; `compare` takes any.
    let contributions = plans.iter().map(|plan| Contribution::service(Arc::clone(plan), |_| None));
    let differences =
        compare(contributions.chain(std::iter::once(Contribution::node(node))), observed);
    let mut diagnostics = node.diagnostics().cloned().collect::<Vec<_>>();
    diagnostics.extend(plans.iter().flat_map(|plan| plan.diagnostics.iter().cloned()));
    diagnostics.sort();
    Audit {
        in_sync: differences.is_empty(),
        exposures: exposure::exposures(desired, observed.table.as_ref(), &differences),
        differences,
        foreign: observed.foreign.clone(),
        kube_proxy: observed.kube_proxy.clone(),
        diagnostics,
    }
}
