//! `portcullis audit`

use anyhow::Context;
use portcullis::audit::{Nft, run};
use portcullis::model::Diagnostic;
use portcullis::watch::{Index, Options, cluster, manifests};

use super::arguments::{AuditOptions, Output};
use super::config::Config;
use super::plan::desired;
use super::source::{Source, config, open, options};
use super::{Verdict, print};

/// Compares the kernel with what the source asks for.
pub fn audit(arguments: &AuditOptions) -> anyhow::Result<Verdict> {
    let config = config(&arguments.node)?;
    let options = options(&arguments.node, &config)?;
    let (index, unread) = load(arguments, &config, &options)?;
    let mut audit = run(&desired(&index), index.context(), &Nft::default())?;
    audit.diagnostics.extend(unread);
    audit.diagnostics.sort();
    match arguments.output {
        Output::Text => print(&audit.to_string())?,
        Output::Json => print(&format!("{}\n", serde_json::to_string_pretty(&audit)?))?,
    }
    Ok(Verdict::found(!audit.in_sync))
}

/// What the source holds now, and what of its files could not be read.
fn load(
    arguments: &AuditOptions,
    config: &Config,
    options: &Options,
) -> anyhow::Result<(Index, Vec<Diagnostic>)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        match open(&arguments.source, config).await? {
            Source::Manifests(directory) => {
                let loaded = manifests::load(&directory, options)?;
                Ok((loaded.index, loaded.diagnostics))
            }
            Source::Cluster(client) => Ok((cluster::load(client, options).await?, Vec::new())),
        }
    })
}
