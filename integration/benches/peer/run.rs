//! Everything that is measured of one proxy on one cluster.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use portcullis_integration::controlplane::ControlPlane;
use portcullis_integration::lab::{Host, Lab};

use crate::changes::{Changer, LIMIT, Pace};
use crate::cluster::{Cluster, MAX_ENDPOINTS};
use crate::connections::{self, Servers};
use crate::objects;
use crate::observe::{Fresh, Observer};
use crate::outcome::{Listing, Restart, Run, Start};
use crate::proxy::{self, Proxy, Running};

/// Pods on the node: all endpoints of a Service, and a client.
pub const PODS: usize = MAX_ENDPOINTS + 1;

/// How long nft may take to list a ruleset.
const LISTING_LIMIT: Duration = Duration::from_secs(15 * 60);
/// Nothing happens in the kernel anymore when nothing did for so long.
const QUIET: Duration = Duration::from_secs(3);
/// In larger clusters each proxy starts once.
const REPEATED: usize = 10_000;

/// What is to be measured.
pub struct Plan {
    proxy: Proxy,
    cluster: Cluster,
    starts: usize,
    paces: Vec<Pace>,
}

impl Plan {
    /// What is measured of a proxy on a cluster.
    pub fn of(proxy: Proxy, cluster: Cluster, quick: bool, repetitions: u8) -> Self {
        let starts = usize::from(repetitions);
        let starts = if quick || cluster.services > REPEATED { 1 } else { starts };
        let most = match (proxy, quick) {
            (_, true) => 5,
            (Proxy::KubeProxy, false) => 30,
            (Proxy::Portcullis, false) => 200,
        };
        // kube-proxy leaves at least a second between two updates, so a change that comes sooner
        // waits for nothing but that.
        let pause = Duration::from_millis(if proxy == Proxy::KubeProxy { 1_100 } else { 50 });
        let time = Duration::from_secs(if quick { 2 } else { 5 });
        let paces = vec![
            Pace::Single { most, budget: Duration::from_secs(90), pause },
            Pace::Rate(100, time),
            Pace::Rate(1_000, time),
        ];
        Self { proxy, cluster, starts, paces }
    }
}

/// Measures a proxy on a cluster that the API server holds.
///
/// # Errors
/// When the proxy does not do its work.
pub fn run(plan: &Plan, plane: &ControlPlane, driver: &Host, fresh: &mut Fresh) -> Result<Run> {
    let Plan { proxy, cluster, .. } = *plan;
    let mut starts = Vec::new();
    for _ in 1..plan.starts {
        let lab = laboratory(plane)?;
        let mut running = Running::start(proxy, plane, &lab)?;
        starts.push(programmed(&mut running, plan, &lab)?);
        running.stop()?;
    }
    let lab = laboratory(plane)?;
    let mut running = Running::start(proxy, plane, &lab)?;
    starts.push(programmed(&mut running, plan, &lab)?);

    let listing = list(&lab)?;
    say(plan, "listing", listing.seconds);
    let servers = Servers::start(&lab.pods[..MAX_ENDPOINTS])?;
    let connections = connections::measure(cluster, &lab)?;
    drop(servers);
    say(plan, "connections per second", connections.per_second);

    let pods = &lab.pods;
    let observer = Observer::start(&lab.node)?;
    let (changes, missed) = driver.block_on(async {
        let client = plane.client().await?;
        // Opens the connection that the first change would wait for.
        client.apiserver_version().await?;
        let mut changer = Changer { client, cluster, pods, fresh: &mut *fresh, turn: 0 };
        let mut all = Vec::new();
        for pace in &plan.paces {
            let changes = changer.measure(*pace, &observer, &running).await?;
            say(plan, &format!("{pace:?}: p50"), changes.from_sending.at(0.5).unwrap_or(f64::NAN));
            observer.settle(QUIET, LIMIT)?;
            all.push(changes);
        }
        let usage = running.usage()?;
        running.stop()?;
        anyhow::Ok((all, (usage, changer.change_one().await?)))
    })?;
    drop(observer);
    let (usage, missed) = missed;

    let observer = Observer::start(&lab.node)?;
    let running = Running::start(proxy, plane, &lab)?;
    let at = observer.wait_for(missed, running.started + proxy::LIMIT);
    let at = at.with_context(|| format!("after a restart\n{}", running.tail()))?;
    let seconds = at.duration_since(running.started).as_secs_f64();
    let heard = observer.settle(QUIET, LIMIT)?;
    running.stop()?;
    say(plan, "restart", seconds);
    let restart = Restart { seconds, operations: heard.changes, transactions: heard.transactions };
    Ok(Run { cluster, proxy, starts, listing, connections, changes, restart, usage })
}

/// A node that holds no rules, and is linked to the API server.
fn laboratory(plane: &ControlPlane) -> Result<Lab> {
    let lab = Lab::new(PODS)?;
    plane.attach(&lab.node)?;
    Ok(lab)
}

fn programmed(running: &mut Running, plan: &Plan, lab: &Lab) -> Result<Start> {
    let seconds = running.wait_until_programmed(plan.proxy, plan.cluster, lab)?;
    say(plan, "start", seconds);
    // What a proxy does besides, for the other family for instance, is not to disturb the rest.
    thread::sleep(QUIET);
    running.wait_for_children()?;
    Ok(Start { seconds, usage: running.usage()? })
}

fn list(lab: &Lab) -> Result<Listing> {
    let mut command = Command::new("nft");
    command.args(["list", "ruleset"]);
    let began = Instant::now();
    let mut nft = lab.spawn(&command, "listing")?;
    let status = nft.wait(LISTING_LIMIT)?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(status.success(), "nft list ruleset: {status}: {}", nft.stderr());
    let file = lab.directory().join("listing.stdout");
    let text = fs::read(&file).context("read what nft listed")?;
    fs::remove_file(&file).context("remove what nft listed")?;
    Ok(Listing {
        seconds,
        bytes: text.len(),
        lines: text.split(|byte| *byte == b'\n').count() - 1,
        objects: lab.node.enter(objects::count)?,
    })
}

fn say(plan: &Plan, what: &str, figure: f64) {
    eprintln!("  {} at {}: {what} {figure:.4}", plan.proxy.name(), plan.cluster);
}
