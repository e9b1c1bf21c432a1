//! The flags, as they are typed. What they mean is said by the commands.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use jiff::SignedDuration;
use portcullis::model::NodePortAddresses;
use serde::Deserialize;

/// Kubernetes Service proxy for nftables with a firewall on every NodePort.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 fine; 1 something is not as it should be (drift, a refused Service, an object that is \
not understood); 2 the command could not do its work (usage, rights, no nf_tables, no source).

Logs go to standard error; RUST_LOG chooses them, for example RUST_LOG=debug or RUST_LOG=portcullis=trace."
)]
pub struct Arguments {
    /// How log lines look.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "PORTCULLIS_LOG_FORMAT")]
    pub log_format: LogFormat,
    #[command(subcommand)]
    pub command: Command,
}

/// What can be asked for.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Program this node for the Services of a cluster or a directory, and follow their changes.
    Run(RunOptions),
    /// Print the ruleset that manifests lead to; needs neither root nor a cluster.
    Plan(PlanOptions),
    /// Compare the kernel with what is desired, and list who may reach each node port.
    Audit(AuditOptions),
    /// Remove everything that portcullis has put into the kernel, or what kube-proxy has.
    Cleanup(CleanupOptions),
    /// Print the version.
    Version(VersionOptions),
    /// Print a completion script for a shell.
    #[command(
        after_help = "Example: portcullis completions bash > /etc/bash_completion.d/portcullis"
    )]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  portcullis run --manifests ./services --node-name node-1     a directory of YAML, no cluster
  portcullis run --manifests ./services --node-name node-1 --once
  portcullis run --node-name \"$NODE_NAME\"                      in a pod of a DaemonSet
  portcullis run --kubeconfig ~/.kube/config --node-name node-1 --nodeport-addresses 192.0.2.0/24")]
pub struct RunOptions {
    #[command(flatten)]
    pub source: SourceOptions,
    #[command(flatten)]
    pub node: NodeOptions,
    /// Program what the source holds now, print a summary and exit; the rules stay in force.
    #[arg(long)]
    pub once: bool,
    /// Where to answer /healthz, /livez and /readyz; empty for nowhere.
    /// [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", value_parser = bind)]
    pub healthz_bind_address: Option<Bind>,
    /// Where to answer /metrics; empty for nowhere [default: 127.0.0.1:10249].
    #[arg(long, value_name = "IP:PORT", value_parser = bind)]
    pub metrics_bind_address: Option<Bind>,
    #[command(flatten)]
    pub conntrack: ConntrackOptions,
    /// The process' place when memory runs out, from -1000 (last) to 1000 (first).
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true,
        value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: Option<i16>,
}

/// Limits of the kernel's connection tracking, with kube-proxy's flags and defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection tracking")]
pub struct ConntrackOptions {
    /// How many connections are tracked for each CPU; 0 leaves the kernel's limit [default: 32768].
    #[arg(long = "conntrack-max-per-core", value_name = "NUMBER")]
    pub max_per_core: Option<u32>,
    /// How many connections are tracked at least, whatever the number of CPUs [default: 131072].
    #[arg(long = "conntrack-min", value_name = "NUMBER")]
    pub min: Option<u32>,
    /// For how long an idle TCP connection is remembered; 0s leaves the kernel's time [default: 24h].
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "TIME")]
    pub tcp_timeout_established: Option<Timeout>,
    /// The same for a connection that one side has closed [default: 1h].
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "TIME")]
    pub tcp_timeout_close_wait: Option<Timeout>,
    /// Count packets outside of a connection's window as its own.
    #[arg(long = "conntrack-tcp-be-liberal")]
    pub tcp_be_liberal: bool,
    /// For how long a UDP flow without an answer is remembered [default: the kernel's].
    #[arg(long = "conntrack-udp-timeout", value_name = "TIME")]
    pub udp_timeout: Option<Timeout>,
    /// For how long a UDP flow with answers is remembered [default: the kernel's].
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "TIME")]
    pub udp_timeout_stream: Option<Timeout>,
}

/// A time as Kubernetes writes it (`1h30m`), a year at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Timeout(Duration);

impl Timeout {
    /// The longest one: who writes more has mistaken the unit.
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

    /// How long it is.
    pub fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Timeout {
    type Err = String;

    // Not `kube::core::Duration`, which panics on large numbers.
    fn from_str(text: &str) -> Result<Timeout, String> {
        // A number that needs no unit.
        let duration = if text == "0" {
            SignedDuration::ZERO
        } else {
            text.parse().map_err(|_| format!("{text:?} is not a time such as 1h30m or 90s"))?
        };
        let duration = Duration::try_from(duration).map_err(|_| format!("{text:?} is negative"))?;
        if duration > Timeout::LONGEST {
            return Err(format!("{text:?} is longer than a year"));
        }
        Ok(Timeout(duration))
    }
}

impl TryFrom<String> for Timeout {
    type Error = String;

    fn try_from(text: String) -> Result<Timeout, String> {
        text.parse()
    }
}

/// Where to listen, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bind(pub Option<SocketAddr>);

#[derive(Debug, Args)]
#[command(after_help = "\
Diagnostics go to standard error; the exit code is 1 if one of them is an error.

Examples:
  portcullis plan -f web.yaml --node-name node-1
  portcullis plan -f ./services -o json | jq .diagnostics")]
pub struct PlanOptions {
    /// A file of manifests, or a directory of such files.
    #[arg(short, long = "file", value_name = "FILE|DIR")]
    pub file: PathBuf,
    #[command(flatten)]
    pub node: NodeOptions,
    /// What to print.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The kernel is read with the nft program, so nftables must be installed; the exit code is 1 if the
kernel differs from what is desired.

Examples:
  portcullis audit --manifests ./services --node-name node-1
  portcullis audit --node-name \"$NODE_NAME\" -o json | jq '.exposures[] | select(.access == \"everyone\")'")]
pub struct AuditOptions {
    #[command(flatten)]
    pub source: SourceOptions,
    #[command(flatten)]
    pub node: NodeOptions,
    /// What to print.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
To take a node over from kube-proxy without a gap: start portcullis, end kube-proxy, then

  portcullis cleanup --kube-proxy

What iptables and IPVS hold is removed with the programs iptables, ipvsadm and ipset where they are
installed.")]
pub struct CleanupOptions {
    /// Remove what kube-proxy has left, in any of its modes, and nothing of portcullis. Refused
    /// while nothing of portcullis is in force, or kube-proxy runs.
    #[arg(long)]
    pub kube_proxy: bool,
}

#[derive(Debug, Args)]
pub struct VersionOptions {
    /// What to print.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Where Services come from. Without a flag: the API server that the environment names
/// (`KUBECONFIG`, `~/.kube/config`, or the pod that this runs in).
#[derive(Debug, Args)]
pub struct SourceOptions {
    /// Read Services, EndpointSlices and Nodes from the YAML files of a directory.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "context"], env = "PORTCULLIS_MANIFESTS")]
    pub manifests: Option<PathBuf>,
    /// Reach the API server with this file [default: KUBECONFIG, ~/.kube/config, or the pod's own].
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context to use [default: its current context].
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

/// The node that this runs on.
#[derive(Debug, Args)]
pub struct NodeOptions {
    /// A configuration file of kube-proxy (`KubeProxyConfiguration`). Flags come before it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The node's name in the cluster [default: the host's name, in lower case].
    #[arg(long, value_name = "NAME", env = "NODE_NAME", visible_alias = "hostname-override")]
    pub node_name: Option<String>,
    /// Where node ports are served: `primary` for the node's first address of each family, or a
    /// list of CIDRs for all of its addresses in them [default: primary].
    #[arg(long, value_name = "primary|CIDR,...", value_parser = nodeport_addresses)]
    pub nodeport_addresses: Option<NodePortAddresses>,
    /// Pods have addresses in these CIDRs. Whoever else connects to a ClusterIP is masqueraded.
    #[arg(long, value_name = "CIDR,...", value_delimiter = ',', group = "local")]
    pub cluster_cidr: Vec<IpNet>,
    /// Pods of this node have addresses in the Node's spec.podCIDRs. Whoever else connects to a
    /// ClusterIP is masqueraded.
    #[arg(long, group = "local")]
    pub node_cidr: bool,
    /// Connections that come from this bridge are those of the pods here.
    #[arg(long, value_name = "NAME", group = "local", value_parser = interface)]
    pub pod_bridge_interface: Option<String>,
    /// Connections that come from interfaces whose names begin so are those of the pods here.
    #[arg(long, value_name = "PREFIX", group = "local", value_parser = interface)]
    pub pod_interface_name_prefix: Option<String>,
    /// Masquerade every connection to a ClusterIP.
    #[arg(long)]
    pub masquerade_all: bool,
    /// Serve node ports to processes of this node at 127.0.0.0/8, too (IPv4 only). Sets the sysctl
    /// `net.ipv4.conf.all.route_localnet`, and drops what comes from elsewhere with such addresses.
    #[arg(long)]
    pub localhost_nodeports: bool,
    /// Serve no `externalIPs`: whoever may write a Service may claim any address there
    /// (CVE-2020-8554). The same as kube-proxy's feature gate `AllowServiceExternalIPs=false`.
    #[arg(long)]
    pub no_external_ips: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

fn bind(text: &str) -> Result<Bind, String> {
    if text.is_empty() {
        return Ok(Bind(None));
    }
    text.parse().map(|address| Bind(Some(address))).map_err(|_| "not an IP:PORT".to_owned())
}

/// The name of an interface, or how one begins (`IFNAMSIZ`, `dev_valid_name` of the kernel).
pub(super) fn interface(text: &str) -> Result<String, String> {
    let valid = (1..16).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if valid { Ok(text.to_owned()) } else { Err("not the name of an interface".to_owned()) }
}

pub(super) fn nodeport_addresses(text: &str) -> Result<NodePortAddresses, String> {
    if text == "primary" {
        return Ok(NodePortAddresses::Primary);
    }
    let cidrs: Result<Vec<IpNet>, String> = text
        .split(',')
        .map(|entry| {
            let entry = entry.trim();
            entry.parse().map_err(|_| format!("{entry:?} is neither `primary` nor a CIDR"))
        })
        .collect();
    cidrs.map(NodePortAddresses::Cidrs)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn timeouts_are_a_year_at_most() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("1h30m", 5_400_000),
            ("24h0m0s", 86_400_000),
            ("1.5h", 5_400_000),
            ("1m0.5s", 60_500),
            ("300ms", 300),
            ("8760h", 31_536_000_000),
        ] {
            let expected = Duration::from_millis(milliseconds);
            assert_eq!(text.parse(), Ok(Timeout(expected)), "{text}");
        }
        for (text, why) in [
            ("", "not a time"),
            ("5", "not a time"),
            ("5x", "not a time"),
            ("1h-2m", "not a time"),
            ("1e400h", "not a time"),
            ("99999999999999999999999h", "not a time"),
            ("-1h", "negative"),
            ("-0.001s", "negative"),
            ("8760h1s", "longer than a year"),
            ("9999999h", "longer than a year"),
        ] {
            let error = text.parse::<Timeout>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn nodeport_addresses_are_primary_or_cidrs() {
        assert_eq!(nodeport_addresses("primary"), Ok(NodePortAddresses::Primary));
        let cidrs = ["10.0.0.0/8", "2001:db8::/32"].map(|cidr| cidr.parse().unwrap()).to_vec();
        assert_eq!(
            nodeport_addresses("10.0.0.0/8, 2001:db8::/32"),
            Ok(NodePortAddresses::Cidrs(cidrs))
        );
        for wrong in ["", "10.0.0.0", "primary,10.0.0.0/8", "10.0.0.0/8,"] {
            assert!(nodeport_addresses(wrong).is_err(), "{wrong:?}");
        }
    }
}
