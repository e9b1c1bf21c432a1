//! Results as text: raw data, and tables for docs/benchmarks.md.

use std::fmt::Write as _;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::markdown::{as_f64, bytes, header, row, thousands, time};
use crate::outcome::{Results, Run};
use crate::plot;
use crate::proxy::Proxy;

/// The raw data: JSON with one run a line.
///
/// # Errors
/// Never in practice: everything can be written as JSON.
pub fn raw(results: &Results) -> Result<String> {
    let mut text = String::from("{\n\"machine\": ");
    text.push_str(&serde_json::to_string_pretty(&results.machine)?);
    let _ = write!(text, ",\n\"kubernetes\": {:?},\n\"runs\": [\n", results.kubernetes);
    for (index, run) in results.runs.iter().enumerate() {
        text.push_str(if index > 0 { ",\n" } else { "" });
        text.push_str(&serde_json::to_string(run)?);
    }
    text.push_str("\n]\n}\n");
    Ok(text)
}

/// The tables.
pub fn markdown(results: &Results) -> String {
    let mut out = String::new();
    let besides = format!(", kube-proxy {},", results.kubernetes);
    let _ = writeln!(out, "{}", results.machine.sentence(&besides));
    bars(&mut out, results);
    for pair in pairs(results) {
        table(&mut out, &pair);
    }
    out.push_str(
        "\n### The same as figures\n\nEach step of the scale is ten times the one before.\n\n",
    );
    for figure in plot::FIGURES {
        let _ = writeln!(out, "![{}](benchmarks/{})\n", figure.title, figure.file);
    }
    out
}

/// Both runs on a cluster; one of them may be missing.
pub struct Pair<'a> {
    /// The cluster.
    pub cluster: Cluster,
    /// Of kube-proxy.
    pub theirs: Option<&'a Run>,
    /// Of Portcullis.
    pub ours: Option<&'a Run>,
}

/// The runs by cluster, in the order in which they were measured.
pub fn pairs(results: &Results) -> Vec<Pair<'_>> {
    let mut clusters: Vec<Cluster> = Vec::new();
    for run in &results.runs {
        if !clusters.contains(&run.cluster) {
            clusters.push(run.cluster);
        }
    }
    let find = |cluster, proxy| {
        results.runs.iter().find(|run| (run.cluster, run.proxy) == (cluster, proxy))
    };
    let pair = |cluster| Pair {
        cluster,
        theirs: find(cluster, Proxy::KubeProxy),
        ours: find(cluster, Proxy::Portcullis),
    };
    clusters.into_iter().map(pair).collect()
}

/// What we ask of ourselves, and whether it is reached.
fn bars(out: &mut String, results: &Results) {
    let pairs = pairs(results);
    let pair = |services, endpoints| {
        let cluster = Cluster { services, endpoints, sticky: 0 };
        pairs.iter().find(|pair| pair.cluster == cluster)
    };
    let start = pair(10_000, 10).and_then(|pair| {
        let ratio = pair.theirs?.start_seconds()? / pair.ours?.start_seconds()?;
        Some((
            "start with 10,000 Services x 10, against kube-proxy",
            "20 times faster".to_owned(),
            format!("{ratio:.0} times"),
            ratio >= 20.0,
        ))
    });
    let single = |from_sending: bool| {
        let changes = pair(10_000, 2)?.ours?.changes_at(None)?;
        let times = if from_sending { &changes.from_sending } else { &changes.from_answer };
        let p99 = times.at(0.99)?;
        let name = if from_sending {
            "endpoint changed with 10,000 Services, from sending it to the API server, p99"
        } else {
            "the same, from the API server's answer, p99"
        };
        Some((name, time(0.010), time(p99), p99 <= 0.010))
    };
    let memory = pair(10_000, 2).and_then(|pair| {
        let kib = pair.ours?.peak_kib();
        Some((
            "peak memory with 10,000 Services x 2",
            "60 MiB".to_owned(),
            mebibytes(kib),
            kib <= 60 << 10,
        ))
    });
    let all: Vec<_> = [start, single(true), single(false), memory].into_iter().flatten().collect();
    if all.is_empty() {
        return;
    }
    out.push_str("\n### What we ask of ourselves, beside kube-proxy\n\n");
    header(out, &["", "at most", "measured", ""]);
    for (name, most, got, reached) in all {
        let verdict = if reached { "reached" } else { "**missed**" };
        row(out, &[name.to_owned(), most, got, verdict.to_owned()]);
    }
}

/// How a figure is shown.
type Show = fn(f64) -> String;

fn table(out: &mut String, pair: &Pair<'_>) {
    let _ = writeln!(out, "\n### {} Services\n", heading(pair.cluster));
    header(out, &["", "kube-proxy", "Portcullis", "kube-proxy / Portcullis"]);
    let mut line = |name: &str, show: Show, of: &dyn Fn(&Run) -> Option<f64>| {
        let (theirs, ours) = (pair.theirs.and_then(of), pair.ours.and_then(of));
        let ratio = theirs.zip(ours).filter(|(theirs, ours)| *ours > 0.0 && *theirs > 0.0);
        let shown = |figure: Option<f64>| figure.map(show).unwrap_or_default();
        row(
            out,
            &[
                name.to_owned(),
                shown(theirs),
                shown(ours),
                ratio.map(|(theirs, ours)| factor(theirs / ours)).unwrap_or_default(),
            ],
        );
    };
    let plain: Show = |figure| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        thousands(figure.round() as usize)
    };
    let memory: Show = |kib| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        mebibytes(kib as u64)
    };
    let size: Show = |length| {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        bytes(length as usize)
    };
    line("start to programmed, median", time, &Run::start_seconds);
    line("CPU time of that", time, &|run| run.start(|start| start.usage.cpu_seconds));
    line("restart, until a missed change is in force", time, &|run| Some(run.restart.seconds));
    line("changes of the kernel at a restart", plain, &|run| Some(as_f64(run.restart.operations)));
    for (rate, name) in [
        (None, "one change at a time"),
        (Some(100), "100 changes a second"),
        (Some(1_000), "1,000 changes a second"),
    ] {
        if rate.is_some() {
            line(
                &format!("{name}: done by the API server"),
                |rate| format!("{rate:.0}/s"),
                &|run| Some(run.changes_at(rate)?.per_second),
            );
        }
        for (share, percentile) in [(0.5, "p50"), (0.99, "p99")] {
            line(&format!("{name}: from sending to the kernel, {percentile}"), time, &|run| {
                run.changes_at(rate)?.from_sending.at(share)
            });
        }
        for (share, percentile) in [(0.5, "p50"), (0.99, "p99")] {
            line(&format!("{name}: from the answer, {percentile}"), time, &|run| {
                run.changes_at(rate)?.from_answer.at(share)
            });
        }
        line(&format!("{name}: CPU time for each"), time, &|run| {
            let changes = run.changes_at(rate)?;
            Some(changes.cpu_seconds / as_f64(changes.count))
        });
    }
    line("peak memory", memory, &|run| Some(exact(run.peak_kib())));
    line("peak memory of its largest child process", memory, &|run| {
        Some(exact(run.child_peak_kib())).filter(|kib| *kib > 0.0)
    });
    line("connect, p50", time, &|run| run.connections.connect.at(0.5));
    line("connect, p99", time, &|run| run.connections.connect.at(0.99));
    line("new connections per second", plain, &|run| Some(run.connections.per_second));
    line("ruleset as text", size, &|run| Some(as_f64(run.listing.bytes)));
    line("lines of that", plain, &|run| Some(as_f64(run.listing.lines)));
    line("chains", plain, &|run| Some(as_f64(run.listing.objects.chains)));
    line("rules", plain, &|run| Some(as_f64(run.listing.objects.rules)));
    line("sets and maps", plain, &|run| Some(as_f64(run.listing.objects.sets)));
}

fn heading(cluster: Cluster) -> String {
    let Cluster { services, endpoints, sticky } = cluster;
    let sticky = if sticky > 0 {
        format!(" ({} of them with session affinity)", thousands(sticky))
    } else {
        String::new()
    };
    format!("{} x {endpoints}{sticky}", thousands(services))
}

/// How many times as much; two digits at least.
fn factor(ratio: f64) -> String {
    match ratio {
        r if r >= 9.95 => format!("{r:.0}"),
        r if r >= 0.095 => format!("{r:.1}"),
        r => format!("{r:.3}"),
    }
}

fn mebibytes(kib: u64) -> String {
    format!("{:.1} MiB", exact(kib) / 1024.0)
}

#[expect(clippy::cast_precision_loss)]
fn exact(number: u64) -> f64 {
    number as f64
}
