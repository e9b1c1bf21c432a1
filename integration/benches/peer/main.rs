//! Measures kube-proxy and Portcullis side by side, on a real API server.
//!
//! etcd and an API server are filled with Services and EndpointSlices. Then each proxy runs on a node
//! of its own, one after the other, with the same objects, the same changes and the same clients.
//! What is measured is seen from outside the proxies: in the kernel, at the API, in /proc.
//! docs/benchmarks.md says how to read the results. Needs root, nft, and Go or the binaries of a
//! control plane.

mod changes;
mod cluster;
mod connections;
mod fill;
mod kernel;
#[path = "../../../benches/common/machine.rs"]
mod machine;
#[path = "../../../benches/common/markdown.rs"]
mod markdown;
#[path = "../../../benches/common/objects.rs"]
mod objects;
mod observe;
mod outcome;
mod plot;
mod proxy;
mod report;
#[path = "../../../benches/common/results.rs"]
mod results;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use portcullis_integration::binary;
use portcullis_integration::controlplane::ControlPlane;
use portcullis_integration::lab::{Host, Lab, Namespace};
use portcullis_integration::requirement::{Requirement, available};

use cluster::Cluster;
use machine::Machine;
use outcome::Results;
use proxy::PROXIES;

/// Measures kube-proxy and Portcullis side by side. Needs root, nft and a control plane.
#[derive(Debug, Parser)]
#[command(name = "peer")]
struct Options {
    /// 1,000 Services only, and few repetitions
    #[arg(long)]
    quick: bool,
    /// Write the raw data to this file, after each run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Replace the results in this Markdown file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the figures into this directory
    #[arg(long, value_name = "DIRECTORY")]
    plots: Option<PathBuf>,
    /// Measure nothing: take raw data from this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "json"])]
    from: Option<PathBuf>,
    /// How often each proxy starts on an empty kernel, in clusters of at most 10,000 Services
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..))]
    repetitions: u8,
    /// Measure only clusters of this many Services
    #[arg(long, value_name = "N")]
    services: Option<usize>,
    /// Measure only this proxy
    #[arg(long, value_name = "NAME", value_parser = ["kube-proxy", "portcullis"])]
    only: Option<String>,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// Each is made of the one before.
const CLUSTERS: [Cluster; 5] = [
    Cluster { services: 1_000, endpoints: 2, sticky: 0 },
    Cluster { services: 10_000, endpoints: 2, sticky: 0 },
    Cluster { services: 10_000, endpoints: 10, sticky: 0 },
    Cluster { services: 10_000, endpoints: 2, sticky: 5_000 },
    Cluster { services: 44_125, endpoints: 2, sticky: 0 },
];

fn main() -> ExitCode {
    results::exit_code(go(&Options::parse()))
}

fn go(options: &Options) -> Result<()> {
    let results = match &options.from {
        Some(file) => results::read(file)?,
        None => measure(options)?,
    };
    if let Some(directory) = &options.plots {
        plot::draw_all(directory, &results)?;
    }
    let text = report::markdown(&results);
    if let Some(file) = &options.markdown {
        markdown::replace(file, "bench-peer", &text)?;
    }
    print!("{text}");
    ensure!(results.failed.is_empty(), "not measured: {}", results.failed.join("; "));
    Ok(())
}

fn measure(options: &Options) -> Result<Results> {
    let needed = [Requirement::Root, Requirement::Nft, Requirement::ControlPlane];
    ensure!(available(&needed), "this machine cannot run the benchmark");
    // Built now, so that no build runs while something is measured.
    binary::path()?;
    let wanted = |cluster: &Cluster| {
        (!options.quick || cluster.services == CLUSTERS[0].services)
            && options.services.is_none_or(|services| services == cluster.services)
    };
    let clusters: Vec<Cluster> = CLUSTERS.into_iter().filter(wanted).collect();
    ensure!(!clusters.is_empty(), "there is no such cluster");
    let machine = Machine::describe();
    let plane = ControlPlane::start()?;
    let driver = driver(&plane)?;
    let pods = Lab::new(run::PODS)?.pods;
    let kubernetes = driver.block_on(async {
        let client = plane.client().await?;
        // All laboratories have the same addresses.
        let node = Lab::new(0)?.node;
        fill::begin(&client, &node, portcullis_integration::daemon::NODE_NAME).await?;
        anyhow::Ok(client.apiserver_version().await?.git_version)
    })?;
    let mut results = Results { machine, kubernetes, runs: Vec::new(), failed: Vec::new() };
    let mut fresh = observe::Fresh::default();
    let (mut before, mut failed) = (None, Vec::new());
    for cluster in clusters {
        eprintln!("filling: {cluster}");
        let began = Instant::now();
        driver
            .block_on(async { fill::fill(&plane.client().await?, before, cluster, &pods).await })?;
        eprintln!("  took {:.0} s", began.elapsed().as_secs_f64());
        before = Some(cluster);
        for proxy in PROXIES {
            if options.only.as_ref().is_some_and(|only| *only != proxy.name().to_lowercase()) {
                continue;
            }
            let plan = run::Plan::of(proxy, cluster, options.quick, options.repetitions);
            match run::run(&plan, &plane, &driver, &mut fresh) {
                Ok(run) => results.runs.push(run),
                // The others are worth having.
                Err(error) => {
                    eprintln!("error: {} at {cluster}: {error:#}", proxy.name());
                    failed.push(format!("{} at {cluster}", proxy.name()));
                    continue;
                }
            }
            if let Some(file) = &options.json {
                results::write(file, &report::raw(&results)?)?;
            }
        }
    }
    results.failed = failed;
    Ok(results)
}

/// A machine that fills the API server and changes objects in it.
fn driver(plane: &ControlPlane) -> Result<Host> {
    let namespace = Namespace::new("driver")?;
    let driver = Host { namespace, v4: [192, 0, 2, 1].into(), v6: "2001:db8::1".parse()? };
    plane.attach(&driver)?;
    Ok(driver)
}
