//! Settings of the kernel: those of connection tracking as kube-proxy makes them
//! (`KubeProxyConntrackConfiguration`), and what node ports at loopback addresses need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What to set. A number of 0, and a time of zero, leave the kernel's value alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conntrack {
    /// How many connections are tracked for each CPU at most (`nf_conntrack_max`).
    pub max_per_core: u32,
    /// How many are tracked in all, whatever the number of CPUs.
    pub min: u32,
    /// For how long an idle TCP connection is remembered.
    pub tcp_established: Duration,
    /// For how long one is remembered that one side has closed.
    pub tcp_close_wait: Duration,
    /// Whether packets outside of a connection's window count as its own.
    pub tcp_be_liberal: bool,
    /// For how long a UDP flow without an answer is remembered.
    pub udp: Duration,
    /// For how long one with answers is remembered.
    pub udp_stream: Duration,
}

impl Default for Conntrack {
    /// kube-proxy's defaults.
    fn default() -> Conntrack {
        Conntrack {
            max_per_core: 32 << 10,
            min: 128 << 10,
            tcp_established: Duration::from_secs(24 * 3600),
            tcp_close_wait: Duration::from_secs(3600),
            tcp_be_liberal: false,
            udp: Duration::ZERO,
            udp_stream: Duration::ZERO,
        }
    }
}

/// More than this is not asked for because of many CPUs (`maxLimit`).
const MOST: u32 = 1 << 20;

/// How a setting is brought to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// A larger value stays: somebody has chosen it.
    AtLeast,
    /// Exactly.
    Exactly,
}

/// A file of the kernel, and the number that it is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    file: &'static str,
    value: u64,
    how: How,
}

impl Conntrack {
    /// Makes the settings in the network namespace of this thread. What cannot be set is said and
    /// left: the table of connections belongs to the first namespace, and a container may see
    /// `/proc/sys` read-only.
    pub fn apply(&self, cpus: usize) {
        for setting in self.settings(cpus) {
            match setting.apply(Path::new("/")) {
                Ok(Some(before)) => {
                    let Setting { file, value, .. } = setting;
                    tracing::info!(file, before, value, "set a limit of connection tracking");
                }
                Ok(None) => {}
                Err(error) => {
                    let Setting { file, value, .. } = setting;
                    tracing::info!(file, value, %error, "cannot set a limit of connection tracking");
                }
            }
        }
    }

    fn settings(&self, cpus: usize) -> Vec<Setting> {
        use How::{AtLeast, Exactly};

        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        let scaled = self.max_per_core.saturating_mul(cpus);
        // As `getConntrackMax` (pkg/proxy/conntrack/sysctls.go of Kubernetes v1.36.3): where the bound
        // is passed, nobody looks at the minimum.
        let max = match scaled {
            0 => 0,
            _ if scaled > MOST => MOST,
            _ => scaled.max(self.min),
        };
        let seconds = |time: Duration| time.as_secs();
        let all = [
            ("proc/sys/net/netfilter/nf_conntrack_max", max.into(), AtLeast),
            // The kernel's own proportion at boot is 1 to 1 or 1 to 4, depending on its version.
            ("sys/module/nf_conntrack/parameters/hashsize", (max / 4).into(), AtLeast),
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established",
                seconds(self.tcp_established),
                Exactly,
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait",
                seconds(self.tcp_close_wait),
                Exactly,
            ),
            (
                "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal",
                self.tcp_be_liberal.into(),
                Exactly,
            ),
            ("proc/sys/net/netfilter/nf_conntrack_udp_timeout", seconds(self.udp), Exactly),
            (
                "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream",
                seconds(self.udp_stream),
                Exactly,
            ),
        ];
        let wanted = all.into_iter().filter(|(_, value, _)| *value > 0);
        wanted.map(|(file, value, how)| Setting { file, value, how }).collect()
    }
}

/// Lets packets with loopback addresses leave, which node ports at such addresses need. It lets them
/// come, too, from whoever is on the same link, so the ruleset that drops those must be in force.
pub fn route_localnet() {
    let setting = Setting { file: ROUTE_LOCALNET, value: 1, how: How::Exactly };
    if let Err(error) = setting.apply(Path::new("/")) {
        let file = ROUTE_LOCALNET;
        tracing::warn!(file, %error, "node ports are not served at loopback addresses");
    }
}

/// Sets back what [`route_localnet`] set.
///
/// # Errors
/// When the kernel does not let this process.
pub fn forbid_route_localnet() -> io::Result<()> {
    let setting = Setting { file: ROUTE_LOCALNET, value: 0, how: How::Exactly };
    setting.apply(Path::new("/")).map(drop)
}

/// Whether packets with loopback addresses may come and leave.
pub fn allows_route_localnet() -> bool {
    let file = Path::new("/").join(ROUTE_LOCALNET);
    fs::read_to_string(file).is_ok_and(|value| value.trim() == "1")
}

const ROUTE_LOCALNET: &str = "proc/sys/net/ipv4/conf/all/route_localnet";

impl Setting {
    /// Gives what the file held before, if that had to change.
    fn apply(&self, root: &Path) -> io::Result<Option<u64>> {
        let file: PathBuf = root.join(self.file);
        let text = fs::read_to_string(&file)?;
        let now: u64 = text
            .trim()
            .parse()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "does not hold a number"))?;
        let enough = match self.how {
            How::AtLeast => now >= self.value,
            How::Exactly => now == self.value,
        };
        if enough {
            return Ok(None);
        }
        fs::write(&file, self.value.to_string())?;
        Ok(Some(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn max(conntrack: Conntrack, cpus: usize) -> Option<u64> {
        conntrack.settings(cpus).into_iter().find(|s| s.file.ends_with("_max")).map(|s| s.value)
    }

    #[test]
    fn kube_proxys_defaults() {
        let default = Conntrack::default();
        let files: Vec<_> = default
            .settings(8)
            .into_iter()
            .map(|s| (s.file.rsplit('/').next().unwrap(), s.value))
            .collect();
        let expected = [
            ("nf_conntrack_max", 262_144),
            ("hashsize", 65_536),
            ("nf_conntrack_tcp_timeout_established", 86_400),
            ("nf_conntrack_tcp_timeout_close_wait", 3_600),
        ];
        assert_eq!(files, expected);
        for (cpus, expected) in [(1, 131_072), (4, 131_072), (5, 163_840), (64, 1 << 20)] {
            assert_eq!(max(default, cpus), Some(expected));
        }
        assert_eq!(max(Conntrack { max_per_core: 0, ..default }, 8), None);
        // As with kube-proxy, a minimum above the bound counts only where CPUs are few.
        for (cpus, expected) in [(1, 2 << 20), (32, 2 << 20), (33, 1 << 20)] {
            assert_eq!(max(Conntrack { min: 2 << 20, ..default }, cpus), Some(expected));
        }
        let huge = Conntrack { max_per_core: u32::MAX, ..default };
        assert_eq!(max(huge, 64), Some(1 << 20));
        let liberal = Conntrack { tcp_be_liberal: true, udp: Duration::from_secs(9), ..default };
        let more: Vec<_> =
            liberal.settings(1).into_iter().skip(4).map(|s| (s.value, s.how)).collect();
        assert_eq!(more, [(1, How::Exactly), (9, How::Exactly)]);
    }

    #[test]
    fn files_are_written_where_needed() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("limit");
        let setting = |value, how| Setting { file: "limit", value, how };
        assert!(setting(1, How::Exactly).apply(root.path()).is_err());
        fs::write(&file, "100\n").unwrap();
        for (value, how, before, after) in [
            (100, How::Exactly, None, "100\n"),
            (99, How::AtLeast, None, "100\n"),
            (101, How::AtLeast, Some(100), "101"),
            (7, How::Exactly, Some(101), "7"),
        ] {
            assert_eq!(setting(value, how).apply(root.path()).unwrap(), before);
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
        fs::write(&file, "many").unwrap();
        assert!(setting(1, How::Exactly).apply(root.path()).is_err());
    }
}
