//! The two proxies: how they are started, what of theirs shows that they are done, and what they
//! use.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use portcullis::model::Family;
use portcullis::ruleset::{COMMON, SetName};
use portcullis_integration::controlplane::ControlPlane;
use portcullis_integration::daemon::{NODE_NAME, start_on_cluster};
use portcullis_integration::lab::{Lab, Process};
use procfs::process::Process as Stat;
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, PORT, cluster_ip};
use crate::kernel::{Expected, Kernel};
use crate::machine::peak_kib;
use crate::outcome::Usage;

/// How long a start may take.
pub const LIMIT: Duration = Duration::from_secs(20 * 60);
/// How long a proxy may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(120);
/// How often the kernel is asked whether it holds everything. It takes well below a millisecond.
const POLL: Duration = Duration::from_millis(5);
/// How often child processes are looked for.
const SAMPLE: Duration = Duration::from_millis(20);
/// How many Services are looked up one by one, spread evenly, the first and the last among them.
const LOOKED_UP: usize = 200;

const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Kubernetes' own, in its nftables mode, with its defaults.
    KubeProxy,
    /// This project, with its defaults.
    Portcullis,
}

/// Both, in the order in which they are measured.
pub const PROXIES: [Proxy; 2] = [Proxy::KubeProxy, Proxy::Portcullis];

impl Proxy {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Proxy::KubeProxy => "kube-proxy",
            Proxy::Portcullis => "Portcullis",
        }
    }

    /// Sets and maps that hold something of every Service when it is programmed. In kube-proxy's map
    /// of verdicts an element leads to the Service's chain, so the chain is there, too; ours lead to
    /// chains that are shared, so endpoints are asked for besides.
    fn expected(self, cluster: Cluster) -> Vec<Expected> {
        // default/kubernetes with its one endpoint is there in any case.
        let services = cluster.services + 1;
        let endpoints = cluster.services * cluster.endpoints + 1;
        let count = |number: usize| u32::try_from(number).expect("fewer than elements can be");
        let every = (cluster.services - 1) / LOOKED_UP.min(cluster.services - 1);
        let looked_up: Vec<usize> =
            (0..cluster.services).rev().step_by(every).take(LOOKED_UP).chain([0]).collect();
        let keys = |services: &[usize]| services.iter().map(|s| key(cluster_ip(*s))).collect();
        if self == Proxy::KubeProxy {
            return vec![Expected {
                family: NFPROTO_IPV4,
                table: "kube-proxy",
                map: "service-ips".to_owned(),
                count: count(services),
                keys: keys(&looked_up),
            }];
        }
        let expected = |map, count, keys| Expected {
            family: NFPROTO_INET,
            table: "portcullis",
            map,
            count,
            keys,
        };
        // Services stand in a set for each number of endpoints if it is low and they have no affinity.
        let index = |service: &usize| {
            let endpoints = u32::try_from(cluster.endpoints).expect("few endpoints");
            let is_common = endpoints <= COMMON && !cluster.is_sticky(*service);
            if is_common {
                SetName::ServiceIpsOver(Family::V4, endpoints)
            } else {
                SetName::ServiceIps(Family::V4)
            }
        };
        let (mut all, mut some) = (BTreeMap::<SetName, usize>::new(), BTreeMap::new());
        (0..cluster.services).for_each(|s| *all.entry(index(&s)).or_default() += 1);
        for service in &looked_up {
            some.entry(index(service)).or_insert_with(Vec::new).push(*service);
        }
        let indexes = all.into_iter().map(|(set, number)| {
            let looked_up = some.remove(&set).unwrap_or_default();
            expected(set.name().into_owned(), count(number), keys(&looked_up))
        });
        let slot = |service: &usize| [key(cluster_ip(*service)), vec![0; 4]].concat();
        let map = SetName::Endpoints(Family::V4).name().into_owned();
        let endpoints = expected(map, count(endpoints), looked_up.iter().map(slot).collect());
        indexes.chain([endpoints]).collect()
    }
}

/// `ip daddr . meta l4proto . th dport`, each part padded to four bytes.
fn key(ip: Ipv4Addr) -> Vec<u8> {
    const TCP: u8 = 6;
    let [high, low] = PORT.to_be_bytes();
    [ip.octets(), [TCP, 0, 0, 0], [high, low, 0, 0]].concat()
}

/// A proxy that runs.
pub struct Running {
    process: Process,
    /// When it was started.
    pub started: Instant,
    children: Children,
}

impl Running {
    /// Starts a proxy on the laboratory's node.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(proxy: Proxy, plane: &ControlPlane, lab: &Lab) -> Result<Self> {
        let started = Instant::now();
        let process = match proxy {
            Proxy::KubeProxy => plane.start_kube_proxy(&lab.node, NODE_NAME, "nftables")?,
            Proxy::Portcullis => start_on_cluster(lab, plane, NODE_NAME)?,
        };
        let children = Children::watch(process.pid().as_raw());
        Ok(Self { process, started, children })
    }

    /// Waits until the kernel holds all of the cluster. Gives the seconds since the start.
    ///
    /// # Errors
    /// When the proxy ends, or takes longer than 20 minutes.
    pub fn wait_until_programmed(
        &mut self,
        proxy: Proxy,
        cluster: Cluster,
        lab: &Lab,
    ) -> Result<f64> {
        let expected = proxy.expected(cluster);
        lab.node.enter(|| -> Result<f64> {
            let kernel = Kernel::open()?;
            let deadline = self.started + LIMIT;
            loop {
                let mut missing = false;
                for expected in &expected {
                    missing = missing || !kernel.holds(expected)?;
                }
                if !missing {
                    return Ok(self.started.elapsed().as_secs_f64());
                }
                ensure!(self.process.is_running(), "it ended\n{}", self.process.tail());
                if Instant::now() > deadline {
                    bail!("not programmed after {LIMIT:?}\n{}", self.process.tail());
                }
                thread::sleep(POLL);
            }
        })
    }

    /// Waits until it runs no program: before, that one's CPU time is not known.
    ///
    /// # Errors
    /// When one runs for two minutes.
    pub fn wait_for_children(&self) -> Result<()> {
        let deadline = Instant::now() + STOP_LIMIT;
        while !children_of(self.process.pid().as_raw()).is_some_and(|all| all.is_empty()) {
            ensure!(Instant::now() < deadline, "a child process runs for {STOP_LIMIT:?}");
            thread::sleep(SAMPLE);
        }
        Ok(())
    }

    /// What it used so far.
    ///
    /// # Errors
    /// When it ended.
    pub fn usage(&self) -> Result<Usage> {
        let pid = self.process.pid().as_raw();
        Ok(Usage {
            cpu_seconds: self.cpu_seconds()?,
            peak_kib: peak_kib(&pid.to_string())?,
            child_peak_kib: self.children.peak_kib.load(Ordering::Relaxed),
        })
    }

    /// The CPU time that it used so far, that of child processes that ended included.
    ///
    /// # Errors
    /// When it ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = Stat::new(self.process.pid().as_raw()).and_then(|process| process.stat());
        let stat = stat.with_context(|| format!("look at the proxy\n{}", self.process.tail()))?;
        let own = stat.utime + stat.stime;
        let children = u64::try_from(stat.cutime + stat.cstime).unwrap_or_default();
        #[expect(clippy::cast_precision_loss)]
        let ticks = (own + children) as f64;
        #[expect(clippy::cast_precision_loss)]
        Ok(ticks / procfs::ticks_per_second() as f64)
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(self) -> Result<()> {
        let Self { process, children, .. } = self;
        drop(children);
        process.terminate(STOP_LIMIT).map(drop)
    }

    /// The end of its output.
    pub fn tail(&self) -> String {
        self.process.tail()
    }
}

/// A thread that looks at a process's children, which live too short to be asked at the end.
struct Children {
    stop: Arc<AtomicBool>,
    peak_kib: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Children {
    fn watch(pid: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let peak_kib = Arc::new(AtomicU64::new(0));
        let thread = thread::spawn({
            let (stop, peak) = (Arc::clone(&stop), Arc::clone(&peak_kib));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    peak.fetch_max(largest_child(pid).unwrap_or_default(), Ordering::Relaxed);
                    thread::sleep(SAMPLE);
                }
            }
        });
        Self { stop, peak_kib, thread: Some(thread) }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The most memory that one of the process's present children ever had, in KiB.
fn largest_child(pid: i32) -> Option<u64> {
    let program = Stat::new(pid).ok()?.exe().ok()?;
    let peak = |child: u32| {
        // Until it runs a program of its own, a child has its parent's memory.
        let other = Stat::new(child.cast_signed()).ok()?.exe().ok()? != program;
        other.then(|| peak_kib(&child.to_string()).ok())?
    };
    children_of(pid)?.into_iter().filter_map(peak).max()
}

/// The present children of a process.
fn children_of(pid: i32) -> Option<Vec<u32>> {
    let tasks = Stat::new(pid).ok()?.tasks().ok()?;
    Some(tasks.filter_map(|task| task.ok()?.children().ok()).flatten().collect())
}
