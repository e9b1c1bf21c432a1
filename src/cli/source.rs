//! Where the objects come from, and which node is ours.

use std::path::PathBuf;

use anyhow::Context;
use kube::config::{KubeConfigOptions, Kubeconfig};
use portcullis::model::LocalTraffic;
use portcullis::watch::Options;

use super::arguments::{NodeOptions, SourceOptions};

/// Where the objects come from.
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// An API server.
    Cluster(kube::Client),
}

/// What the flags about the node mean.
pub fn options(arguments: &NodeOptions) -> anyhow::Result<Options> {
    let node_name = match &arguments.node_name {
        Some(name) => name.clone(),
        None => nix::unistd::gethostname()
            .context("cannot tell the host's name; give --node-name")?
            .to_string_lossy()
            .to_lowercase(),
    };
    Ok(Options {
        node_name: node_name.into(),
        nodeport_addresses: arguments.nodeport_addresses.clone(),
        local_traffic: local_traffic(arguments),
        masquerade_all: arguments.masquerade_all,
    })
}

/// How pods of this node are known. The flags exclude each other.
fn local_traffic(arguments: &NodeOptions) -> LocalTraffic {
    if !arguments.cluster_cidr.is_empty() {
        return LocalTraffic::Cidrs(arguments.cluster_cidr.clone());
    }
    let bridge = arguments.pod_bridge_interface.as_deref();
    let bridge = bridge.map(|name| LocalTraffic::Bridge(name.into()));
    let prefix = || {
        let prefix = arguments.pod_interface_name_prefix.as_deref();
        prefix.map(|prefix| LocalTraffic::InterfacePrefix(prefix.into()))
    };
    bridge.or_else(prefix).unwrap_or_default()
}

/// Opens the source that the flags name.
pub async fn open(arguments: &SourceOptions) -> anyhow::Result<Source> {
    if let Some(directory) = &arguments.manifests {
        return Ok(Source::Manifests(directory.clone()));
    }
    let choice = KubeConfigOptions { context: arguments.context.clone(), ..Default::default() };
    let config = if let Some(file) = &arguments.kubeconfig {
        let kubeconfig = Kubeconfig::read_from(file)
            .with_context(|| format!("cannot read kubeconfig {}", file.display()))?;
        kube::Config::from_custom_kubeconfig(kubeconfig, &choice).await?
    } else if arguments.context.is_some() {
        kube::Config::from_kubeconfig(&choice).await?
    } else {
        kube::Config::infer().await.context(
            "no source of Services: give --manifests DIR or --kubeconfig FILE, or run in a pod",
        )?
    };
    let client = kube::Client::try_from(config).context("cannot set up the API client")?;
    Ok(Source::Cluster(client))
}
