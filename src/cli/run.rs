//! `portcullis run`

use std::thread::JoinHandle;

use anyhow::Context;
use axum::Router;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use portcullis::commit::{Adoption, Committer, Worker};
use portcullis::health::{self, Connections, Health, server};
use portcullis::metrics::Metrics;
use portcullis::model::Severity;
use portcullis::report::Reporter;
use portcullis::watch::{Index, Options, cluster, manifests};
use portcullis::{occupied, refused, ruleset, sysctl};
use procfs::{CpuInfo, Current};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::arguments::{Bind, RunOptions, Timeout};
use super::config::Config;
use super::kernel::{explain_commit, open_worker};
use super::logs::Logs;
use super::source::{Source, config, open, options};
use super::{Verdict, print};

/// Programs this node. Of `logs`, the lines that are lost are counted.
pub fn run(arguments: &RunOptions, logs: &Logs) -> anyhow::Result<Verdict> {
    let config = config(&arguments.node)?;
    let options = options(&arguments.node, &config)?;
    let reporter = Reporter::new(options.node_name.clone());
    let (checks, asked) = health::services::channel();
    let (occupied, served) = occupied::channel();
    let (reports, seen) = (reporter.clone(), occupied.clone());
    let worker = open_worker(move |report| {
        reports.commit(&report);
        checks.commit(&report);
        seen.commit(&report);
    })?;
    if !arguments.once {
        tune(arguments, &config);
    }
    // The work is in the committing thread; this only waits for events.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let source = open(&arguments.source, &config).await?;
        if arguments.once {
            let verdict = once(source, &options, worker, &reporter).await?;
            if arguments.node.localhost_nodeports {
                sysctl::route_localnet();
            }
            Ok(verdict)
        } else {
            let (committer, thread) = Committer::start(worker);
            let health = Health::new(committer.pulse(), reporter.clone());
            let metrics = Metrics {
                pulse: committer.pulse(),
                reporter: reporter.clone(),
                occupied,
                lost_lines: logs.lost(),
            };
            let connections = Connections::default();
            let at = |flag: Option<Bind>, file: Option<Bind>, default: ([u8; 4], u16)| {
                flag.or(file).unwrap_or(Bind(Some(default.into())))
            };
            let file = config.healthz_bind_address;
            let address = at(arguments.healthz_bind_address, file, ([0; 4], 10256));
            listen("health checks", address, server::routes(&health), &connections);
            let file = config.metrics_bind_address;
            let address = at(arguments.metrics_bind_address, file, ([127, 0, 0, 1], 10249));
            listen("metrics", address, metrics.routes(), &connections);
            let reports = reporter.clone();
            tokio::spawn(health::services::serve(asked, connections, health, reports));
            tokio::spawn(occupied::watch(served, reporter.clone()));
            if arguments.node.localhost_nodeports {
                let reporter = reporter.clone();
                tokio::spawn(async move {
                    reporter.wait_for_adoption().await;
                    sysctl::route_localnet();
                });
            }
            if let Source::Cluster(client) = &source {
                let (client, name) = (client.clone(), options.node_name.clone());
                let reporter = reporter.clone();
                tokio::spawn(async move { cluster::publish(client, &name, &reporter).await });
            }
            follow(source, options, committer, thread, reporter).await
        }
    })
}

/// Makes the settings of the machine and of this process for as long as it runs. None is worth
/// ending for.
fn tune(arguments: &RunOptions, config: &Config) {
    let (flags, file) = (&arguments.conntrack, &config.conntrack);
    let default = sysctl::Conntrack::default();
    let time = |flag: Option<Timeout>, file: Option<_>, default| {
        flag.or(file).map_or(default, Timeout::duration)
    };
    let conntrack = sysctl::Conntrack {
        max_per_core: flags.max_per_core.or(file.max_per_core).unwrap_or(default.max_per_core),
        min: flags.min.or(file.min).unwrap_or(default.min),
        tcp_established: time(
            flags.tcp_timeout_established,
            file.tcp_established_timeout,
            default.tcp_established,
        ),
        tcp_close_wait: time(
            flags.tcp_timeout_close_wait,
            file.tcp_close_wait_timeout,
            default.tcp_close_wait,
        ),
        tcp_be_liberal: flags.tcp_be_liberal || file.tcp_be_liberal,
        udp: time(flags.udp_timeout, file.udp_timeout, default.udp),
        udp_stream: time(flags.udp_timeout_stream, file.udp_stream_timeout, default.udp_stream),
    };
    raise_descriptors();
    // Those of the machine, not those that this process may use.
    conntrack.apply(CpuInfo::current().map_or(1, |cpus| cpus.num_cores()));
    if let Some(score) = arguments.oom_score_adj.or(config.oom_score_adj)
        && let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        tracing::warn!(score, %error, "cannot set the process' place when memory runs out");
    }
}

/// Lets this process have as many descriptors as it may, as Go does for its programs: each
/// `healthCheckNodePort` takes one for each of the node's addresses. The daemon runs no programs,
/// which would inherit it.
fn raise_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the number of descriptors of the process");
    }
}

/// Answers at an address, if there is one, for as long as the process runs.
fn listen(what: &'static str, Bind(address): Bind, routes: Router, connections: &Connections) {
    if let Some(address) = address {
        tokio::spawn(server::serve(what, address, routes, connections.clone()));
    }
}

/// Programs the node and keeps it so until a signal ends the process. The rules stay in force.
async fn follow(
    source: Source,
    options: Options,
    committer: Committer,
    thread: JoinHandle<()>,
    reporter: Reporter,
) -> anyhow::Result<Verdict> {
    let shutdown = shutdown().context("cannot wait for signals")?;
    refused::log_in_background(ruleset::REFUSED_LOG_GROUP);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), node = &*options.node_name, "starting");
    match source {
        Source::Manifests(directory) => {
            manifests::run(&directory, &options, committer, reporter, shutdown).await.map_err(
                |error| match error {
                    manifests::Error::Commit(error) => explain_commit(error),
                    error @ manifests::Error::Read { .. } => error.into(),
                },
            )?;
        }
        Source::Cluster(client) => {
            cluster::run(client, &options, committer, reporter, shutdown).await.map_err(
                |error| match error {
                    cluster::Error::Commit(error) => explain_commit(error),
                    error @ cluster::Error::List { .. } => error.into(),
                },
            )?;
        }
    }
    // Every handle is gone, so the thread ends when it has done what was queued.
    tokio::task::spawn_blocking(move || thread.join())
        .await?
        .ok()
        .context("the committer failed")?;
    tracing::info!("ended; the rules stay in force");
    Ok(Verdict::Fine)
}

/// Programs what the source holds now.
async fn once(
    source: Source,
    options: &Options,
    mut worker: Worker,
    reporter: &Reporter,
) -> anyhow::Result<Verdict> {
    let index = match source {
        Source::Manifests(directory) => {
            // What is in force of a file must not go because somebody is writing it now.
            manifests::wait_for_writers(&directory).await;
            let loaded = manifests::load(&directory, options)?;
            reporter.manifests(loaded.diagnostics);
            loaded.index
        }
        Source::Cluster(client) => cluster::load(client, options).await?,
    };
    reporter.node(index.context());
    let adoption =
        worker.adopt(index.context(), index.plans().collect()).map_err(explain_commit)?;
    worker.finish_sweeps();
    print(&summary(&index, adoption))?;
    let errors = reporter.diagnostics().iter().any(|d| d.severity == Severity::Error);
    Ok(Verdict::found(errors || worker.has_refused()))
}

fn summary(index: &Index, adoption: Adoption) -> String {
    let services = index.services().count();
    let firewalled = index
        .services()
        .filter(|s| s.node_port_sources != portcullis::model::SourceRestriction::Unrestricted)
        .count();
    let table = match (adoption.found, adoption.replaced) {
        (false, _) => "made",
        (true, false) => "adopted",
        (true, true) => "replaced",
    };
    format!(
        "table inet {} {table}: {services} Services, {firewalled} of them with source restrictions; \
         {} kernel operations\n",
        ruleset::TABLE,
        adoption.operations,
    )
}

/// A token that is cancelled when the process is told to end.
fn shutdown() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let told = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to end");
        told.cancel();
    });
    Ok(token)
}
