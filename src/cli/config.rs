//! The configuration file of kube-proxy (`KubeProxyConfiguration`, `kubeproxy.config.k8s.io/v1alpha1`):
//! what of it makes sense here is read, and whatever else it sets is named in a warning.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
use portcullis::model::{LocalTraffic, NodePortAddresses};
use serde::Deserialize;
use serde_json::Value;

use super::arguments::{self, Bind, Timeout};

/// The `apiVersion` and `kind` of such a file.
const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
/// The feature gate that closes `externalIPs` (KEP-5707).
const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";
/// Fields that are true where they are not set (`SetDefaults_KubeProxyConfiguration`): these say
/// something by being false.
const DEFAULT_TRUE: [&str; 1] = ["iptables.localhostNodePorts"];

/// What a file says; nothing where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    pub node_name: Option<String>,
    pub kubeconfig: Option<PathBuf>,
    pub healthz_bind_address: Option<Bind>,
    pub metrics_bind_address: Option<Bind>,
    pub nodeport_addresses: Option<NodePortAddresses>,
    pub local_traffic: Option<LocalTraffic>,
    pub masquerade_all: bool,
    pub no_external_ips: bool,
    pub oom_score_adj: Option<i16>,
    pub conntrack: Conntrack,
}

/// `conntrack`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    pub tcp_established_timeout: Option<Timeout>,
    pub tcp_close_wait_timeout: Option<Timeout>,
    pub tcp_be_liberal: bool,
    pub udp_timeout: Option<Timeout>,
    pub udp_stream_timeout: Option<Timeout>,
}

/// The fields that are read. Each may be missing, null or empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    api_version: String,
    kind: String,
    hostname_override: Option<String>,
    client_connection: Option<ClientConnection>,
    healthz_bind_address: Option<String>,
    metrics_bind_address: Option<String>,
    mode: Option<String>,
    nftables: Option<Nftables>,
    conntrack: Option<Conntrack>,
    detect_local_mode: Option<String>,
    detect_local: Option<DetectLocal>,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: Option<String>,
    node_port_addresses: Option<Vec<String>>,
    oom_score_adj: Option<i16>,
    feature_gates: Option<BTreeMap<String, bool>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClientConnection {
    kubeconfig: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Nftables {
    masquerade_all: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DetectLocal {
    bridge_interface: Option<String>,
    interface_name_prefix: Option<String>,
}

/// Reads the file at `path`.
///
/// # Errors
/// Names the file and the field that is not understood.
pub fn read(path: &Path) -> anyhow::Result<Config> {
    let in_file = || format!("configuration {}", path.display());
    let text = std::fs::read_to_string(path).with_context(in_file)?;
    let (config, unused) = parse(&text).with_context(in_file)?;
    for field in unused {
        tracing::warn!(file = %path.display(), field, "a field of the configuration has no meaning here");
    }
    Ok(config)
}

/// Gives the fields, too, that say something and are not used.
fn parse(text: &str) -> anyhow::Result<(Config, Vec<String>)> {
    let value: Value = serde_saphyr::from_str(text).context("is not YAML")?;
    let mut unused = Vec::new();
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&value, &mut track);
    let read = serde_ignored::deserialize(tracked, |path| {
        let path = path.to_string();
        // Options of the file's own stand in the path as question marks.
        let path = path.replace(".?", "");
        if let Some(value) = at(&value, &path) {
            name_what_is_said(path, value, &mut unused);
        }
    });
    let file: File =
        read.map_err(|error: serde_json::Error| anyhow!("{}: {error}", track.path()))?;
    if file.api_version != API_VERSION || file.kind != KIND {
        bail!(
            "apiVersion {:?}, kind {:?}: expected {API_VERSION}, {KIND}",
            file.api_version,
            file.kind
        );
    }
    if file.mode.as_deref().is_some_and(|mode| !["", "nftables"].contains(&mode)) {
        unused.push("mode".to_owned());
    }
    // Whatever they are set to, somebody has chosen it.
    let gates = file.feature_gates.iter().flatten().map(|(gate, _)| gate);
    unused.extend(gates.filter(|gate| *gate != EXTERNAL_IPS).map(|g| format!("featureGates.{g}")));
    lower(file).map(|config| (config, unused))
}

fn lower(file: File) -> anyhow::Result<Config> {
    let gates = file.feature_gates.unwrap_or_default();
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let bind = |field: &str, text: Option<String>, port| {
        given(text).map(|text| address(&text, port).with_context(|| field.to_owned())).transpose()
    };
    let nodeport_addresses = match file.node_port_addresses.filter(|list| !list.is_empty()) {
        Some(list) => Some(
            arguments::nodeport_addresses(&list.join(","))
                .map_err(|error| anyhow!("nodePortAddresses: {error}"))?,
        ),
        None => None,
    };
    let local_traffic = local_traffic(
        file.detect_local_mode.as_deref().unwrap_or_default(),
        file.detect_local.unwrap_or_default(),
        file.cluster_cidr.as_deref().unwrap_or_default(),
    )?;
    Ok(Config {
        node_name: given(file.hostname_override).map(|name| name.trim().to_lowercase()),
        kubeconfig: given(file.client_connection.unwrap_or_default().kubeconfig).map(Into::into),
        healthz_bind_address: bind("healthzBindAddress", file.healthz_bind_address, 10256)?,
        metrics_bind_address: bind("metricsBindAddress", file.metrics_bind_address, 10249)?,
        nodeport_addresses,
        local_traffic: Some(local_traffic),
        masquerade_all: file.nftables.unwrap_or_default().masquerade_all,
        no_external_ips: gates.get(EXTERNAL_IPS) == Some(&false),
        oom_score_adj: file.oom_score_adj,
        conntrack: file.conntrack.unwrap_or_default(),
    })
}

/// An address with a port, or without one: then with kube-proxy's.
fn address(text: &str, port: u16) -> anyhow::Result<Bind> {
    let with_port = text.parse::<SocketAddr>();
    let alone = || text.parse::<IpAddr>().map(|address| (address, port).into());
    let address = with_port.or_else(|_| alone());
    address.map(|address| Bind(Some(address))).map_err(|_| anyhow!("{text:?} is not IP or IP:PORT"))
}

/// `detectLocalMode` and what it refers to. kube-proxy's default is `ClusterCIDR`, and without such a
/// CIDR nothing is known of pods.
fn local_traffic(mode: &str, detect: DetectLocal, cidr: &str) -> anyhow::Result<LocalTraffic> {
    let interface = |field: &str, name: Option<String>| {
        let name = name.unwrap_or_default();
        arguments::interface(&name).map_err(|error| anyhow!("detectLocal.{field}: {error}"))
    };
    Ok(match mode {
        "" | "ClusterCIDR" => {
            let cidrs = cidr.split(',').map(str::trim).filter(|cidr| !cidr.is_empty());
            let cidrs = cidrs.map(|cidr| {
                cidr.parse::<IpNet>().map_err(|_| anyhow!("clusterCIDR: {cidr:?} is not a CIDR"))
            });
            let cidrs: Vec<IpNet> = cidrs.collect::<Result<_, _>>()?;
            if cidrs.is_empty() { LocalTraffic::Unknown } else { LocalTraffic::Cidrs(cidrs) }
        }
        "NodeCIDR" => LocalTraffic::NodeCidrs,
        "BridgeInterface" => {
            LocalTraffic::Bridge(interface("bridgeInterface", detect.bridge_interface)?.into())
        }
        "InterfaceNamePrefix" => LocalTraffic::InterfacePrefix(
            interface("interfaceNamePrefix", detect.interface_name_prefix)?.into(),
        ),
        other => bail!(
            "detectLocalMode: {other:?} is none of ClusterCIDR, NodeCIDR, BridgeInterface and \
             InterfaceNamePrefix"
        ),
    })
}

/// The field at a path such as `iptables.syncPeriod`.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, key| value.get(key))
}

/// Adds the fields in `value`, the field at `path`, that are set to something: tools write every
/// field that there is.
fn name_what_is_said(path: String, value: &Value, said: &mut Vec<String>) {
    let says_something = match value {
        Value::Null => false,
        Value::Bool(false) => DEFAULT_TRUE.contains(&path.as_str()),
        Value::Bool(true) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !["", "0s", "0"].contains(&text.as_str()),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => {
            for (key, value) in fields {
                name_what_is_said(format!("{path}.{key}"), value, said);
            }
            false
        }
    };
    if says_something {
        said.push(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    /// What kubeadm writes, shortened.
    #[test]
    fn a_file_as_tools_write_it() {
        let text = format!(
            "{HEAD}bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: \"\"
  burst: 0
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: true
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: 1h30m0s
detectLocal:
  bridgeInterface: \"\"
detectLocalMode: \"\"
enableProfiling: false
healthzBindAddress: \"\"
hostnameOverride: \"Node-1\"
featureGates:
  AllowServiceExternalIPs: true
iptables:
  localhostNodePorts: null
  masqueradeBit: null
  syncPeriod: 30s
metricsBindAddress: 0.0.0.0
mode: iptables
nftables:
  masqueradeAll: true
  minSyncPeriod: 0s
nodePortAddresses: [192.0.2.0/24]
oomScoreAdj: -999
"
        );
        let (config, unused) = parse(&text).unwrap();
        let cidrs = ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().unwrap());
        let expected = Config {
            node_name: Some("node-1".into()),
            kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
            healthz_bind_address: None,
            metrics_bind_address: Some(Bind(Some("0.0.0.0:10249".parse().unwrap()))),
            nodeport_addresses: Some(NodePortAddresses::Cidrs(vec![
                "192.0.2.0/24".parse().unwrap(),
            ])),
            local_traffic: Some(LocalTraffic::Cidrs(cidrs.to_vec())),
            masquerade_all: true,
            no_external_ips: false,
            oom_score_adj: Some(-999),
            conntrack: Conntrack {
                tcp_be_liberal: true,
                tcp_established_timeout: Some("1h30m".parse().unwrap()),
                ..Conntrack::default()
            },
        };
        assert_eq!(config, expected);
        assert_eq!(unused, ["bindAddress", "iptables.syncPeriod", "mode"]);
    }

    #[test]
    fn what_is_turned_off() {
        let text = format!(
            "{HEAD}featureGates: {{AllowServiceExternalIPs: false, AllAlpha: false, Other: true}}
iptables: {{localhostNodePorts: false, masqueradeAll: false}}
nftables: {{syncPeriod: 10s}}
"
        );
        let (config, unused) = parse(&text).unwrap();
        assert!(config.no_external_ips);
        let expected = [
            "iptables.localhostNodePorts",
            "nftables.syncPeriod",
            "featureGates.AllAlpha",
            "featureGates.Other",
        ];
        assert_eq!(unused, expected);
        let (config, unused) = parse(&format!("{HEAD}featureGates: null")).unwrap();
        assert!(!config.no_external_ips && unused.is_empty());
    }

    #[test]
    fn local_modes() {
        for (text, expected) in [
            ("", LocalTraffic::Unknown),
            ("detectLocalMode: NodeCIDR", LocalTraffic::NodeCidrs),
            (
                "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
                LocalTraffic::Bridge("cni0".into()),
            ),
            (
                "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}",
                LocalTraffic::InterfacePrefix("cali".into()),
            ),
        ] {
            let (config, unused) = parse(&format!("{HEAD}{text}")).unwrap();
            assert_eq!((config.local_traffic, unused), (Some(expected), vec![]), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("a: [", "is not YAML"),
            ("kind: Deployment", "expected kubeproxy.config.k8s.io/v1alpha1"),
            (&*format!("{HEAD}clusterCIDR: everywhere"), "clusterCIDR: \"everywhere\""),
            (&*format!("{HEAD}nodePortAddresses: [x]"), "nodePortAddresses: \"x\""),
            (&*format!("{HEAD}detectLocalMode: BridgeInterface"), "detectLocal.bridgeInterface"),
            (&*format!("{HEAD}detectLocalMode: Guess"), "detectLocalMode: \"Guess\""),
            (&*format!("{HEAD}healthzBindAddress: here"), "healthzBindAddress: \"here\""),
            (&*format!("{HEAD}oomScoreAdj: high"), "oomScoreAdj: invalid type: string \"high\""),
            (&*format!("{HEAD}conntrack: {{min: -1}}"), "conntrack.min: invalid value"),
            (
                &*format!("{HEAD}conntrack: {{udpTimeout: -1h}}"),
                "conntrack.udpTimeout: \"-1h\" is negative",
            ),
            (
                &*format!("{HEAD}conntrack: {{udpStreamTimeout: 999999h}}"),
                "conntrack.udpStreamTimeout: \"999999h\" is longer than a year",
            ),
            (
                &*format!("{HEAD}featureGates: {{AllowServiceExternalIPs: maybe}}"),
                "featureGates.AllowServiceExternalIPs: invalid type",
            ),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
