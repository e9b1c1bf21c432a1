//! Results as text: raw data, and tables for docs/benchmarks.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Result, ensure};

use crate::Results;
use crate::cluster::Size;
use crate::markdown::{as_f64, bytes, header, percentile, row, thousands, time};
use crate::measure::{Measurement, Proxy, What};
use crate::objects::Objects;

/// The raw data: JSON with one measurement a line, so that a change of it can be read.
///
/// # Errors
/// Never in practice: everything can be written as JSON.
pub fn raw(results: &Results) -> Result<String> {
    let mut text = String::from("{\n\"machine\": ");
    text.push_str(&serde_json::to_string_pretty(&results.machine)?);
    text.push_str(",\n\"measurements\": [\n");
    for (index, measurement) in results.measurements.iter().enumerate() {
        text.push_str(if index > 0 { ",\n" } else { "" });
        text.push_str(&serde_json::to_string(measurement)?);
    }
    text.push_str("\n]\n}\n");
    Ok(text)
}

/// That the number of chains and rules does not depend on the number of Services.
///
/// # Errors
/// When it does.
pub fn check_objects(measurements: &[Measurement]) -> Result<()> {
    // Which balancing chains there are depends on the numbers of endpoints.
    let mut like: BTreeMap<(bool, usize), BTreeSet<_>> = BTreeMap::new();
    for measurement in measurements {
        if let Some(objects) = objects_of(measurement) {
            let Size { mixed, endpoints, .. } = measurement.size;
            like.entry((mixed, endpoints)).or_default().insert(objects);
        }
    }
    for objects in like.values() {
        ensure!(
            objects.len() <= 1,
            "tables of different sizes have different objects: {objects:?}"
        );
    }
    Ok(())
}

/// What our table consists of. `None` where it has firewalls of node ports, which have chains and sets
/// of their own.
fn objects_of(measurement: &Measurement) -> Option<Objects> {
    let Measurement { proxy, size, outcome, .. } = measurement;
    outcome.objects.filter(|_| *proxy == Proxy::Portcullis && size.cidrs == 0)
}

/// The tables.
pub fn markdown(results: &Results) -> String {
    let Results { machine, measurements } = results;
    let mut out = String::new();
    let _ = writeln!(out, "{}", machine.sentence(""));
    bars(&mut out, measurements);
    cold_loads(&mut out, measurements);
    changes(&mut out, measurements);
    restarts(&mut out, measurements);
    objects(&mut out, measurements);
    out
}

/// What we ask of ourselves, and whether it is reached.
fn bars(out: &mut String, all: &[Measurement]) {
    let rows: Vec<Bar> = [false, true].into_iter().flat_map(|mixed| bars_of(all, mixed)).collect();
    if rows.is_empty() {
        return;
    }
    out.push_str("\n### What we ask of ourselves\n\n");
    header(out, &["", "at most", "measured", ""]);
    for (name, most, got, reached) in rows {
        row(out, &[name, most, got, if reached { "reached" } else { "**missed**" }.to_owned()]);
    }
}

/// What is asked, the limit, what was measured, and whether that is within the limit.
type Bar = (String, String, String, bool);

/// The same is asked of plain and of mixed clusters.
fn bars_of(all: &[Measurement], mixed: bool) -> Vec<Bar> {
    let suffix = if mixed { ", mixed" } else { "" };
    let load = |services, endpoints, cidrs| {
        find(all, Proxy::Portcullis, What::ColdLoad, Size { services, endpoints, cidrs, mixed })
    };
    let seconds = |m: Option<&Measurement>, share| percentile(&m?.outcome.seconds, share);
    let limit = |name: String, got: Option<f64>, most: f64, show: &dyn Fn(f64) -> String| {
        got.map(|got| (name, show(most), show(got), got <= most))
    };
    let change = |what| {
        let size = Size { services: 10_000, endpoints: 3, cidrs: 0, mixed };
        seconds(find(all, Proxy::Portcullis, what, size), 0.99)
    };
    let peak = load(100_000, 10, 0)
        .and_then(|m| m.outcome.peak_kib.iter().max())
        .map(|kib| as_f64(usize::try_from(*kib).unwrap_or(usize::MAX)) / 1024.0);
    let writes = all
        .iter()
        .filter(|m| m.what == What::Restart && m.size.mixed == mixed)
        .flat_map(|m| m.outcome.operations.iter().copied())
        .max();
    let size = Size { services: 10_000, endpoints: 10, cidrs: 0, mixed };
    let yardstick = seconds(find(all, Proxy::KubeProxyShape, What::ColdLoad, size), 0.5);
    let ratio =
        yardstick.zip(seconds(load(10_000, 10, 0), 0.5)).map(|(theirs, ours)| theirs / ours);

    let mut rows = Vec::new();
    let mib = |mib: f64| format!("{mib:.0} MiB");
    let load_of = |services, endpoints, most| {
        let name = format!("load {} Services x {endpoints}{suffix}", thousands(services));
        limit(name, seconds(load(services, endpoints, 0), 0.5), most, &time)
    };
    rows.extend(load_of(10_000, 10, 0.4));
    rows.extend(ratio.map(|ratio| {
        let name = "the same, against kube-proxy's shape".to_owned();
        (name, "50 times faster".to_owned(), format!("{ratio:.0} times"), ratio >= 50.0)
    }));
    rows.extend(load_of(44_125, 3, 1.0));
    rows.extend(load_of(100_000, 10, 5.0));
    rows.extend(limit("peak memory of that".to_owned(), peak, 1024.0, &mib));
    for (name, what) in [
        ("endpoint replaced", What::EndpointReplaced),
        ("endpoint count changed", What::EndpointCount),
    ] {
        let name = format!("{name} at 10,000 Services{suffix}, p99");
        rows.extend(limit(name, change(what), 0.002, &time));
    }
    rows.extend(limit(
        "100,000 CIDRs over 2,000 Services".to_owned(),
        seconds(load(2_000, 3, 50), 0.5),
        1.0,
        &time,
    ));
    rows.extend(writes.map(|writes| {
        let name = format!("elements written on restart{suffix}");
        (name, "0".to_owned(), writes.to_string(), writes == 0)
    }));
    rows.extend(same_objects(all, mixed));
    rows
}

/// Chains and rules of the smallest and of the largest table without firewalls.
fn same_objects(all: &[Measurement], mixed: bool) -> Option<Bar> {
    let mut loads: Vec<(usize, usize)> = all
        .iter()
        .filter(|m| m.what == What::ColdLoad && m.size.mixed == mixed)
        .filter_map(|m| Some((m.size.services, objects_of(m)?)))
        .map(|(services, objects)| (services, objects.chains + objects.rules))
        .collect();
    loads.sort_unstable();
    let (&(few, least), &(many, most)) = loads.first().zip(loads.last())?;
    let suffix = if mixed { ", mixed" } else { "" };
    let (few, many) = (thousands(few), thousands(many));
    let name = format!("chains and rules at {few} and {many} Services{suffix}");
    let got = format!("{} and {}", thousands(least), thousands(most));
    Some((name, "the same".to_owned(), got, least == most))
}

fn cold_loads(out: &mut String, all: &[Measurement]) {
    let loads: Vec<_> = all.iter().filter(|m| m.what == What::ColdLoad).collect();
    if loads.is_empty() {
        return;
    }
    out.push_str("\n### Loading everything into an empty kernel\n\n");
    header(
        out,
        &[
            "Services x endpoints",
            "",
            "median",
            "fastest - slowest",
            "of it planning",
            "of it kernel",
            "operations",
            "bytes",
            "peak memory",
            "ratio",
        ],
    );
    for load in loads {
        let outcome = &load.outcome;
        let ours = find(all, Proxy::Portcullis, What::ColdLoad, load.size);
        row(
            out,
            &[
                size(load.size),
                proxy(load.proxy).to_owned(),
                median(&outcome.seconds),
                spread(&outcome.seconds),
                median(&outcome.plan_seconds),
                median(&outcome.kernel_seconds),
                thousands(outcome.operations.first().copied().unwrap_or_default()),
                bytes(outcome.bytes.first().copied().unwrap_or_default()),
                bytes(
                    outcome
                        .peak_kib
                        .iter()
                        .max()
                        .map_or(0, |kib| usize::try_from(kib * 1024).unwrap_or(usize::MAX)),
                ),
                ratio(load, ours),
            ],
        );
    }
}

fn changes(out: &mut String, all: &[Measurement]) {
    const KINDS: [(What, &str); 7] = [
        (What::EndpointReplaced, "an endpoint is replaced"),
        (What::EndpointCount, "an endpoint goes or comes"),
        (What::EndpointCountAlone, "the same, and nobody else has as many"),
        (What::ServiceAdded, "a Service comes"),
        (What::ServiceRemoved, "a Service goes"),
        (What::CidrAdded, "a firewall lets in one more CIDR"),
        (What::Listing, "kube-proxy's listing before each change"),
    ];
    let changes =
        KINDS.map(|(what, name)| (name, all.iter().filter(|m| m.what == what).collect::<Vec<_>>()));
    if changes.iter().all(|(_, rows)| rows.is_empty()) {
        return;
    }
    out.push_str("\n### Changing one thing\n\n");
    header(
        out,
        &[
            "change",
            "Services x endpoints",
            "",
            "p50",
            "p99",
            "max",
            "of it kernel, p50",
            "operations",
            "ratio of p50",
        ],
    );
    for (name, rows) in changes {
        for measurement in rows {
            let outcome = &measurement.outcome;
            let ours = find(all, Proxy::Portcullis, measurement.what, measurement.size);
            let at = |share| percentile(&outcome.seconds, share).map(time).unwrap_or_default();
            row(
                out,
                &[
                    name.to_owned(),
                    size(measurement.size),
                    proxy(measurement.proxy).to_owned(),
                    at(0.5),
                    // Of a few values the 99th percentile is the largest.
                    if outcome.seconds.len() < 100 { String::new() } else { at(0.99) },
                    at(1.0),
                    median(&outcome.kernel_seconds),
                    range(&outcome.operations),
                    ratio(measurement, ours),
                ],
            );
        }
    }
}

fn restarts(out: &mut String, all: &[Measurement]) {
    let restarts: Vec<_> = all.iter().filter(|m| m.what == What::Restart).collect();
    if restarts.is_empty() {
        return;
    }
    out.push_str("\n### Restarting on a kernel that holds everything\n\n");
    header(
        out,
        &["Services x endpoints", "median", "fastest - slowest", "elements written", "peak memory"],
    );
    for restart in restarts {
        let outcome = &restart.outcome;
        row(
            out,
            &[
                size(restart.size),
                median(&outcome.seconds),
                spread(&outcome.seconds),
                range(&outcome.operations),
                bytes(
                    outcome
                        .peak_kib
                        .iter()
                        .max()
                        .map_or(0, |kib| usize::try_from(kib * 1024).unwrap_or(usize::MAX)),
                ),
            ],
        );
    }
}

fn objects(out: &mut String, all: &[Measurement]) {
    let counted: Vec<_> =
        all.iter().filter_map(|m| m.outcome.objects.map(|objects| (m, objects))).collect();
    if counted.is_empty() {
        return;
    }
    out.push_str("\n### Objects in the table\n\n");
    header(out, &["Services x endpoints", "", "chains", "rules", "sets and maps"]);
    for (measurement, Objects { chains, rules, sets }) in counted {
        row(
            out,
            &[
                size(measurement.size),
                proxy(measurement.proxy).to_owned(),
                thousands(chains),
                thousands(rules),
                thousands(sets),
            ],
        );
    }
}

fn find(all: &[Measurement], proxy: Proxy, what: What, size: Size) -> Option<&Measurement> {
    all.iter().find(|m| (m.proxy, m.what, m.size) == (proxy, what, size))
}

/// How many times as long as ours this takes.
fn ratio(this: &Measurement, ours: Option<&Measurement>) -> String {
    let half = |m: &Measurement| percentile(&m.outcome.seconds, 0.5);
    match (this.proxy, half(this), ours.and_then(half)) {
        (Proxy::KubeProxyShape, Some(theirs), Some(ours)) => format!("{:.0}", theirs / ours),
        _ => String::new(),
    }
}

fn proxy(proxy: Proxy) -> &'static str {
    match proxy {
        Proxy::Portcullis => "portcullis",
        Proxy::KubeProxyShape => "kube-proxy's shape",
    }
}

fn size(size: Size) -> String {
    let mut text = format!("{} x {}", thousands(size.services), size.endpoints);
    if size.mixed {
        text.push_str(", mixed");
    }
    if size.cidrs > 0 {
        let restricted = size.services.min(crate::cluster::NODE_PORTS);
        let _ = write!(text, ", {} CIDRs", thousands(restricted * size.cidrs));
    }
    text
}

fn median(seconds: &[f64]) -> String {
    percentile(seconds, 0.5).map(time).unwrap_or_default()
}

fn spread(seconds: &[f64]) -> String {
    let ends = percentile(seconds, 0.0).zip(percentile(seconds, 1.0));
    ends.map(|(least, most)| format!("{} - {}", time(least), time(most))).unwrap_or_default()
}

fn range(operations: &[usize]) -> String {
    match (operations.iter().min(), operations.iter().max()) {
        (Some(least), Some(most)) if least == most => thousands(*least),
        (Some(least), Some(most)) => format!("{} - {}", thousands(*least), thousands(*most)),
        _ => String::new(),
    }
}
