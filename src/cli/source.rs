//! Where the objects come from, and which node is ours.

use std::path::PathBuf;

use anyhow::Context;
use kube::config::{KubeConfigOptions, Kubeconfig};
use portcullis::model::{LocalTraffic, NodePortAddresses};
use portcullis::watch::Options;

use super::arguments::{NodeOptions, SourceOptions};
use super::config::{self, Config};

/// Where the objects come from.
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// An API server.
    Cluster(kube::Client),
}

/// What the configuration file says that the flags name, if they name one.
pub fn config(arguments: &NodeOptions) -> anyhow::Result<Config> {
    arguments.config.as_deref().map_or_else(|| Ok(Config::default()), config::read)
}

/// What the flags about the node mean, and a configuration file.
pub fn options(arguments: &NodeOptions, config: &Config) -> anyhow::Result<Options> {
    let node_name = match arguments.node_name.as_ref().or(config.node_name.as_ref()) {
        Some(name) => name.clone(),
        None => nix::unistd::gethostname()
            .context("cannot tell the host's name; give --node-name")?
            .to_string_lossy()
            .to_lowercase(),
    };
    Ok(Options {
        node_name: node_name.into(),
        nodeport_addresses: { arguments.nodeport_addresses.as_ref() }
            .or(config.nodeport_addresses.as_ref())
            .cloned()
            .unwrap_or(NodePortAddresses::Primary),
        local_traffic: local_traffic(arguments)
            .or_else(|| config.local_traffic.clone())
            .unwrap_or_default(),
        masquerade_all: arguments.masquerade_all || config.masquerade_all,
        localhost_nodeports: arguments.localhost_nodeports,
        external_ips: !(arguments.no_external_ips || config.no_external_ips),
    })
}

/// How pods of this node are known. The flags exclude each other.
fn local_traffic(arguments: &NodeOptions) -> Option<LocalTraffic> {
    if !arguments.cluster_cidr.is_empty() {
        return Some(LocalTraffic::Cidrs(arguments.cluster_cidr.clone()));
    }
    if arguments.node_cidr {
        return Some(LocalTraffic::NodeCidrs);
    }
    let bridge = arguments.pod_bridge_interface.as_deref();
    let bridge = bridge.map(|name| LocalTraffic::Bridge(name.into()));
    let prefix = || {
        let prefix = arguments.pod_interface_name_prefix.as_deref();
        prefix.map(|prefix| LocalTraffic::InterfacePrefix(prefix.into()))
    };
    bridge.or_else(prefix)
}

/// Opens the source that the flags name.
pub async fn open(arguments: &SourceOptions, config: &Config) -> anyhow::Result<Source> {
    if let Some(directory) = &arguments.manifests {
        return Ok(Source::Manifests(directory.clone()));
    }
    let choice = KubeConfigOptions { context: arguments.context.clone(), ..Default::default() };
    let file = arguments.kubeconfig.as_ref().or(config.kubeconfig.as_ref());
    let config = if let Some(file) = file {
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
