//! Measures how long the kernel takes to hold what a cluster wants, and what it costs.
//!
//! Every measurement is a child process in a network namespace of its own, so this needs root. It
//! begins with Services and EndpointSlices in memory and ends with the kernel's answer to the
//! transaction. Beside it, the same Services are programmed in the shape and by the means of
//! kube-proxy's nftables mode. docs/benchmarks.md says how to read the results.
//!
//! Operation counts are asserted; wall-clock time never is.

mod cluster;
mod isolation;
mod kube_proxy;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/markdown.rs"]
mod markdown;
mod measure;
#[path = "../common/objects.rs"]
mod objects;
mod portcullis;
mod report;
#[path = "../common/results.rs"]
mod results;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};

use cluster::Size;
use machine::Machine;
use measure::{Job, Measurement, Proxy, What};

/// Measures loading and changing the ruleset. Needs root and nft.
#[derive(Debug, Parser)]
#[command(name = "ruleset")]
struct Options {
    /// Small clusters only, for a check of the operation counts in less than a minute
    #[arg(long)]
    quick: bool,
    /// Write the raw data to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Replace the results in this Markdown file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Measure nothing: take raw data from this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "json"])]
    from: Option<PathBuf>,
    /// How often a cold load and a restart are repeated
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    repetitions: u8,
    /// How many changes of each kind are timed
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u16).range(1..))]
    changes: u16,
    /// Measure only what has this in its name, such as cold-load or mixed
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measure only clusters of this many Services
    #[arg(long, value_name = "N")]
    services: Option<usize>,
    /// Load the ruleset in kube-proxy's shape at 44,125 Services too, which takes many minutes
    #[arg(long)]
    kube_proxy_large: bool,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
    /// The job of a child process
    #[arg(long, hide = true, value_name = "JSON")]
    child_job: Option<String>,
    /// That the parent process is in a network namespace of its own already
    #[arg(long, hide = true, requires = "child_job")]
    stay: bool,
}

/// The raw data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Results {
    machine: Machine,
    measurements: Vec<Measurement>,
}

/// How long one child process may take.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// The same at 44,125 Services in kube-proxy's shape.
const LARGE_LIMIT: Duration = Duration::from_secs(60 * 60);
/// How many changes of each kind the ruleset in kube-proxy's shape gets. In a mixed cluster each is
/// of another kind of Service.
const KUBE_PROXY_CHANGES: usize = 10;

fn main() -> ExitCode {
    results::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    if let Some(job) = &options.child_job {
        return child(&serde_json::from_str(job)?, options.stay);
    }
    let results = match &options.from {
        Some(file) => results::read(file)?,
        None => measure(options)?,
    };
    if let Some(file) = &options.json {
        results::write(file, &report::raw(&results)?)?;
    }
    if let Some(file) = &options.markdown {
        markdown::replace(file, "bench", &report::markdown(&results))?;
    }
    print!("{}", report::markdown(&results));
    report::check_objects(&results.measurements)
}

/// Does one job and prints what came out.
fn child(job: &Job, stay: bool) -> Result<()> {
    if !stay {
        isolation::enter_new_namespace()?;
    }
    let measurements = match job.proxy {
        Proxy::Portcullis => portcullis::run(job)?,
        Proxy::KubeProxyShape => kube_proxy::run(job)?,
    };
    serde_json::to_writer(std::io::stdout().lock(), &measurements)?;
    Ok(())
}

fn measure(options: &Options) -> Result<Results> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root: run this as root");
    let jobs: Vec<(Job, usize)> =
        jobs(options).into_iter().filter(|(job, _)| is_wanted(options, job)).collect();
    ensure!(!jobs.is_empty(), "nothing to measure");
    let mut results = Results { machine: Machine::describe(), measurements: Vec::new() };
    for (job, repetitions) in jobs {
        for repetition in 1..=repetitions {
            eprintln!(
                "{:?} {:?} {} x {}{} ({repetition} of {repetitions})",
                job.proxy,
                job.what,
                job.size.services,
                job.size.endpoints,
                if job.size.mixed { ", mixed" } else { "" },
            );
            let large = job.proxy == Proxy::KubeProxyShape && job.size.services > 10_000;
            let limit = if large { LARGE_LIMIT } else { LIMIT };
            isolation::run(job, limit)?.into_iter().for_each(|new| keep(&mut results, new));
        }
    }
    Ok(results)
}

fn keep(results: &mut Results, new: Measurement) {
    match results.measurements.iter_mut().find(|old| old.is_like(&new)) {
        Some(old) => old.outcome.merge(new.outcome),
        None => results.measurements.push(new),
    }
}

fn is_wanted(options: &Options, job: &Job) -> bool {
    let mixed = if job.size.mixed { "mixed" } else { "plain" };
    let name = format!("{:?} {:?} {mixed}", job.proxy, job.what).to_lowercase();
    let only = options.only.as_ref().map(|only| only.replace('-', "").to_lowercase());
    only.is_none_or(|only| name.contains(&only))
        && options.services.is_none_or(|services| services == job.size.services)
}

/// What is to be measured, each with a number of repetitions.
fn jobs(options: &Options) -> Vec<(Job, usize)> {
    use Proxy::{KubeProxyShape, Portcullis};
    let repetitions = if options.quick { 1 } else { usize::from(options.repetitions) };
    let changes = if options.quick { 20 } else { usize::from(options.changes) };
    let loads: &[(usize, usize)] = if options.quick {
        &[(10, 10), (1_000, 10)]
    } else {
        &[(10, 10), (1_000, 10), (10_000, 10), (44_125, 3), (100_000, 10)]
    };
    let job = |proxy, what, (services, endpoints), cidrs, changes| Job {
        proxy,
        what,
        size: Size { services, endpoints, cidrs, mixed: false },
        changes,
    };
    let mixed = |job: Job| Job { size: Size { mixed: true, ..job.size }, ..job };

    let mut jobs = Vec::new();
    for &size in loads {
        jobs.push((job(Portcullis, What::ColdLoad, size, 0, 0), repetitions));
        jobs.push((job(Portcullis, What::Restart, size, 0, 0), repetitions));
        for what in [
            What::EndpointReplaced,
            What::EndpointCount,
            What::EndpointCountAlone,
            What::ServiceAdded,
            What::ServiceRemoved,
        ] {
            jobs.push((job(Portcullis, what, (size.0, 3), 0, changes), 1));
        }
        jobs.push((job(Portcullis, What::CidrAdded, (size.0, 3), 50, changes), 1));
    }
    let firewalls = if options.quick { (100, 3) } else { (cluster::NODE_PORTS, 3) };
    jobs.push((job(Portcullis, What::ColdLoad, firewalls, 50, 0), repetitions));

    for &size in loads.iter().filter(|(services, _)| *services <= 10_000) {
        jobs.push((job(KubeProxyShape, What::ColdLoad, size, 0, 0), repetitions.min(3)));
        let changes = if options.quick { 3 } else { KUBE_PROXY_CHANGES };
        jobs.push((job(KubeProxyShape, What::ColdLoad, (size.0, 3), 0, changes), 1));
    }
    let loads = if options.quick { &[(1_000, 10)][..] } else { &loads[2..] };
    // The smallest one says how many chains and rules there are.
    jobs.push((mixed(job(Portcullis, What::ColdLoad, (10, 10), 0, 0)), 1));
    for &size in loads {
        jobs.push((mixed(job(Portcullis, What::ColdLoad, size, 0, 0)), repetitions));
        jobs.push((mixed(job(Portcullis, What::Restart, size, 0, 0)), repetitions));
        for what in
            [What::EndpointReplaced, What::EndpointCount, What::ServiceAdded, What::ServiceRemoved]
        {
            jobs.push((mixed(job(Portcullis, what, (size.0, 3), 0, changes)), 1));
        }
    }
    for &size in loads.iter().filter(|(services, _)| *services <= 10_000) {
        jobs.push((mixed(job(KubeProxyShape, What::ColdLoad, size, 0, 0)), repetitions.min(3)));
        let changes = KUBE_PROXY_CHANGES;
        jobs.push((mixed(job(KubeProxyShape, What::ColdLoad, (size.0, 3), 0, changes)), 1));
    }
    if options.kube_proxy_large {
        jobs.push((job(KubeProxyShape, What::ColdLoad, (44_125, 3), 0, 3), 1));
    }
    jobs
}
