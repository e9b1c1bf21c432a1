//! What the daemon takes of a node: the measurement behind the requests of the `DaemonSet`. It is no
//! test, takes minutes and asserts nothing:
//!
//! ```sh
//! PORTCULLIS_BIN=$(image/compile.sh) cargo test --package portcullis-integration --test resources \
//!     -- --ignored --nocapture
//! ```

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use portcullis_integration::controlplane::{ControlPlane, objects};
use portcullis_integration::daemon::follow_cluster;
use portcullis_integration::lab::Lab;
use portcullis_integration::requirement::{Requirement, available};
use serde_json::json;
use tokio::task::JoinSet;

/// How many Services there are, each with two endpoints, one measurement after the other.
const SIZES: [usize; 3] = [100, 1_000, 10_000];
/// How many are made at a time.
const AT_ONCE: usize = 8;
/// For how long endpoints change, and how many a second.
const CHANGING: Duration = Duration::from_secs(30);
const CHANGES: u32 = 10;

#[test]
#[ignore = "a measurement"]
fn memory_and_cpu() -> Result<()> {
    if !available(&[Requirement::Root, Requirement::Nft, Requirement::ControlPlane]) {
        return Ok(());
    }
    let plane = ControlPlane::start()?;
    let namespace = plane.block_on(async |client| objects::namespace(&client, "many").await)?;
    println!(
        "| Services x 2 | memory, most | memory, then | CPU to start | CPU at rest | CPU at 10 changes/s |"
    );
    println!("|---|---|---|---|---|---|");
    let mut made = 0;
    for (run, size) in (0..).zip(SIZES) {
        while made < size {
            let until = size.min(made + 1_000);
            plane.block_on(async |client| make(&client, &namespace, made..until).await)?;
            made = until;
        }
        let lab = Lab::new(0)?;
        plane.attach(&lab.node)?;
        let node = format!("node-{size}");
        plane.block_on(async |client| objects::node(&client, &node, &lab.node, &[]).await)?;
        let daemon = follow_cluster(&lab, &plane, &node)?;
        let process = format!("/proc/{}", daemon.pid());
        let start = cpu(&process)?;
        let share = |before: Duration, after: Duration, during: Duration| {
            after.saturating_sub(before).as_secs_f64() / during.as_secs_f64() * 1000.0
        };
        let (before, began) = (cpu(&process)?, Instant::now());
        std::thread::sleep(CHANGING);
        let rest = share(before, cpu(&process)?, began.elapsed());
        let (before, began) = (cpu(&process)?, Instant::now());
        plane.block_on(async |client| change(&client, &namespace, size, run).await)?;
        let changing = share(before, cpu(&process)?, began.elapsed());
        println!(
            "| {size} | {} MB | {} MB | {:.2} s | {rest:.1} m | {changing:.1} m |",
            memory(&process, "VmHWM")?,
            memory(&process, "VmRSS")?,
            start.as_secs_f64(),
        );
        daemon.kill()?;
    }
    Ok(())
}

async fn make(client: &Client, namespace: &str, numbers: std::ops::Range<usize>) -> Result<()> {
    let mut tasks = JoinSet::new();
    for number in numbers {
        while tasks.len() >= AT_ONCE {
            tasks.join_next().await.context("no task")???;
        }
        let (client, namespace) = (client.clone(), namespace.to_owned());
        tasks.spawn(async move {
            let name = format!("web-{number}");
            let services = Api::<Service>::namespaced(client.clone(), &namespace);
            let ports = json!([{ "name": "http", "port": 80 }]);
            let service = json!({
                "metadata": { "name": name },
                "spec": { "ports": ports, "ipFamilyPolicy": "SingleStack" },
            });
            objects::create(&services, service).await?;
            let slices = Api::<EndpointSlice>::namespaced(client, &namespace);
            objects::create(&slices, slice(&name, number, None)).await?;
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

/// A slice of two endpoints. The second has another address after each change.
fn slice(name: &str, number: usize, change: Option<u32>) -> serde_json::Value {
    let (high, low) = (number / 250, number % 250);
    let network = change.map_or(129, |change| 130 + change % 100);
    let endpoint = |network: u32| {
        json!({
            "addresses": [format!("10.{network}.{high}.{low}")],
            "conditions": { "ready": true },
        })
    };
    json!({
        "metadata": { "name": name, "labels": { "kubernetes.io/service-name": name } },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": 8080 }],
        "endpoints": [endpoint(128), endpoint(network)],
    })
}

/// Changes one Service after the other. `run` makes that no change is one of an earlier run.
async fn change(client: &Client, namespace: &str, services: usize, run: u32) -> Result<()> {
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), namespace);
    let began = Instant::now();
    let mut round = 0;
    while began.elapsed() < CHANGING {
        round += 1;
        let number = round as usize % services;
        let name = format!("web-{number}");
        let endpoints =
            json!({ "endpoints": slice(&name, number, Some(round + run))["endpoints"] });
        slices.patch(&name, &PatchParams::default(), &Patch::Merge(endpoints)).await?;
        let next = Duration::from_secs(1) * round / CHANGES;
        tokio::time::sleep(next.saturating_sub(began.elapsed())).await;
    }
    Ok(())
}

/// The time that the threads of a process have run, to the nanosecond: what `stat` has is counted in
/// ticks, and who works for less than one is not seen.
fn cpu(process: &str) -> Result<Duration> {
    let mut time = Duration::ZERO;
    for thread in fs::read_dir(format!("{process}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let ran = text.split(' ').next().context("no field")?;
        time += Duration::from_nanos(ran.parse()?);
    }
    Ok(time)
}

/// A line of its status, in megabytes.
fn memory(process: &str, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("{process}/status"))?;
    let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
    let kilobytes = line.split_whitespace().nth(1).context("no number")?;
    Ok(kilobytes.parse::<u64>()? / 1024)
}
