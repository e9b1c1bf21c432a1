//! `portcullis version`

use serde_json::json;

use super::arguments::{Output, VersionOptions};
use super::{Verdict, print};

pub fn version(options: &VersionOptions) -> anyhow::Result<Verdict> {
    let version = env!("CARGO_PKG_VERSION");
    match options.output {
        Output::Text => print(&format!("portcullis {version}\n"))?,
        Output::Json => print(&format!("{}\n", json!({ "version": version })))?,
    }
    Ok(Verdict::Fine)
}
