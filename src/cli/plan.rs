//! `portcullis plan`

use portcullis::model::Severity;
use portcullis::plan::Desired;
use portcullis::ruleset::{Contribution, Listing, render};
use portcullis::watch::{Index, manifests};
use serde_json::json;

use super::arguments::{Output, PlanOptions};
use super::logs::say;
use super::source::{config, options};
use super::{Verdict, print};

/// Prints the ruleset for a file or directory of manifests, and what is wrong with them.
pub fn plan(arguments: &PlanOptions) -> anyhow::Result<Verdict> {
    let loaded =
        manifests::load(&arguments.file, &options(&arguments.node, &config(&arguments.node)?)?)?;
    let (desired, mut diagnostics) = (desired(&loaded.index), loaded.diagnostics);
    let mut contributions = vec![Contribution::node(loaded.index.context())];
    let mut services: Vec<_> = desired.services().cloned().collect();
    services.sort();
    for service in &services {
        let Some(plan) = desired.effective(service) else { continue };
        diagnostics.extend(plan.diagnostics.iter().cloned());
        contributions.push(Contribution::service(plan, |_| None));
    }
    diagnostics.sort();
    diagnostics.dedup();

    let text = render(&Listing::new(&contributions));
    match arguments.output {
        Output::Text => {
            print(&text)?;
            for diagnostic in &diagnostics {
                say(&diagnostic.to_string());
            }
        }
        Output::Json => {
            let both = json!({ "ruleset": text, "diagnostics": diagnostics });
            print(&format!("{both:#}\n"))?;
        }
    }
    Ok(Verdict::found(diagnostics.iter().any(|d| d.severity == Severity::Error)))
}

/// The plans of everything in an index, with conflicts settled.
pub fn desired(index: &Index) -> Desired {
    let mut desired = Desired::default();
    for plan in index.plans() {
        let service = plan.service().clone();
        desired.set(&service, Some(plan));
    }
    desired
}
