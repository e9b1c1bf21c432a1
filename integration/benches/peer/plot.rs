//! Results as figures: bars on a logarithmic scale, one group for each cluster.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::markdown::{as_f64, bytes, thousands, time};
use crate::outcome::{Results, Run};
use crate::proxy::Proxy;
use crate::report::{Pair, pairs};

/// A figure.
pub struct Figure {
    /// Its file's name.
    pub file: &'static str,
    /// What it shows.
    pub title: &'static str,
    show: fn(f64) -> String,
    bars: &'static [Bar],
}

/// One bar in every group.
struct Bar {
    label: &'static str,
    proxy: Proxy,
    colour: RGBColor,
    of: fn(&Run) -> Option<f64>,
}

/// All of them.
pub const FIGURES: &[Figure] = &[
    Figure {
        file: "peer-start.svg",
        title: "Start of the process to programmed",
        show: time,
        bars: &both(Run::start_seconds),
    },
    Figure {
        file: "peer-change.svg",
        title: "One endpoint changed, from sending it to the API server to the kernel",
        show: time,
        bars: &with_p99(
            |run| run.changes_at(None)?.from_sending.at(0.5),
            |run| run.changes_at(None)?.from_sending.at(0.99),
        ),
    },
    Figure {
        file: "peer-change-100.svg",
        title: "The same at 100 changes a second",
        show: time,
        bars: &with_p99(
            |run| run.changes_at(Some(100))?.from_sending.at(0.5),
            |run| run.changes_at(Some(100))?.from_sending.at(0.99),
        ),
    },
    Figure {
        file: "peer-change-1000.svg",
        title: "The same at 1,000 changes a second, or what the API server does of them",
        show: time,
        bars: &with_p99(
            |run| run.changes_at(Some(1_000))?.from_sending.at(0.5),
            |run| run.changes_at(Some(1_000))?.from_sending.at(0.99),
        ),
    },
    Figure {
        file: "peer-restart.svg",
        title: "Restart, until a missed change is in force",
        show: time,
        bars: &both(|run| Some(run.restart.seconds)),
    },
    Figure {
        file: "peer-cpu.svg",
        title: "CPU time of a start",
        show: time,
        bars: &both(|run| run.start(|start| start.usage.cpu_seconds)),
    },
    Figure {
        file: "peer-memory.svg",
        title: "Peak memory of the process",
        show: size,
        bars: &both(|run| Some(kibibytes(run.peak_kib()))),
    },
    Figure {
        file: "peer-connect.svg",
        title: "Opening a TCP connection to a Service",
        show: time,
        bars: &with_p99(
            |run| run.connections.connect.at(0.5),
            |run| run.connections.connect.at(0.99),
        ),
    },
    Figure {
        file: "peer-connections.svg",
        title: "New connections per second",
        show: count,
        bars: &both(|run| Some(run.connections.per_second)),
    },
    Figure {
        file: "peer-ruleset.svg",
        title: "The ruleset as text",
        show: size,
        bars: &both(|run| Some(as_f64(run.listing.bytes))),
    },
];

const THEIRS: RGBColor = RGBColor(0x32, 0x6c, 0xe5);
const THEIRS_LIGHT: RGBColor = RGBColor(0x98, 0xb5, 0xf2);
const OURS: RGBColor = RGBColor(0xd9, 0x6b, 0x0c);
const OURS_LIGHT: RGBColor = RGBColor(0xf0, 0xb9, 0x83);
const SIZE: (u32, u32) = (900, 440);
/// How high the title and the legend are.
const HEAD: u32 = 70;
const FONT: &str = "sans-serif";
/// What of a group's width its bars take.
const FILLED: f64 = 0.84;

const fn both(of: fn(&Run) -> Option<f64>) -> [Bar; 2] {
    [
        Bar { label: "kube-proxy", proxy: Proxy::KubeProxy, colour: THEIRS, of },
        Bar { label: "Portcullis", proxy: Proxy::Portcullis, colour: OURS, of },
    ]
}

const fn with_p99(p50: fn(&Run) -> Option<f64>, p99: fn(&Run) -> Option<f64>) -> [Bar; 4] {
    use Proxy::{KubeProxy, Portcullis};
    [
        Bar { label: "kube-proxy p50", proxy: KubeProxy, colour: THEIRS, of: p50 },
        Bar { label: "kube-proxy p99", proxy: KubeProxy, colour: THEIRS_LIGHT, of: p99 },
        Bar { label: "Portcullis p50", proxy: Portcullis, colour: OURS, of: p50 },
        Bar { label: "Portcullis p99", proxy: Portcullis, colour: OURS_LIGHT, of: p99 },
    ]
}

/// Draws all figures into a directory.
///
/// # Errors
/// When a file cannot be written.
pub fn draw_all(directory: &Path, results: &Results) -> Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let pairs = pairs(results);
    for figure in FIGURES {
        let file = directory.join(figure.file);
        draw(figure, &pairs, &file)
            .map_err(|error| anyhow!("cannot draw {}: {error}", file.display()))?;
    }
    Ok(())
}

fn draw(
    figure: &Figure,
    pairs: &[Pair<'_>],
    file: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let values: Vec<Vec<Option<f64>>> =
        pairs.iter().map(|pair| figure.bars.iter().map(|bar| value(bar, pair)).collect()).collect();
    let all = || values.iter().flatten().flatten().copied();
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    if most == 0.0 {
        return Ok(());
    }
    // The bar of the least value has a length, too, and there is room above for a label.
    let (low, high) = (least / 3.0, most * 2.0);
    let root = SVGBackend::new(file, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (top, rest) = root.split_vertically(HEAD);
    head(figure, &top)?;
    let mut chart = ChartBuilder::on(&rest)
        .margin(12)
        .margin_top(0)
        .x_label_area_size(30)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..as_f64(pairs.len()), (low..high).log_scale())?;
    let label = |value: &f64| (figure.show)(*value);
    let mut mesh = chart.configure_mesh();
    mesh.disable_x_mesh().x_labels(0).y_label_formatter(&label).light_line_style(TRANSPARENT);
    mesh.label_style((FONT, 15)).draw()?;
    let above = TextStyle::from((FONT, 13).into_font()).pos(Pos::new(HPos::Center, VPos::Bottom));
    let width = FILLED / as_f64(figure.bars.len());
    for (number, bar) in figure.bars.iter().enumerate() {
        let left = |group| as_f64(group) + (1.0 - FILLED) / 2.0 + as_f64(number) * width;
        let heights = values.iter().enumerate();
        let heights: Vec<(f64, f64)> =
            heights.filter_map(|(group, values)| Some((left(group), values[number]?))).collect();
        let rectangle = |&(left, height): &(f64, f64)| {
            Rectangle::new([(left, low), (left + width * 0.94, height)], bar.colour.filled())
        };
        chart.draw_series(heights.iter().map(rectangle))?;
        let text = |&(left, height): &(f64, f64)| {
            Text::new((figure.show)(height), (left + width / 2.0, height * 1.03), above.clone())
        };
        chart.draw_series(heights.iter().map(text))?;
    }
    let below = TextStyle::from((FONT, 15).into_font()).pos(Pos::new(HPos::Center, VPos::Top));
    for (group, pair) in pairs.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(as_f64(group) + 0.5, low));
        root.draw(&Text::new(pair.cluster.to_string(), (x, y + 8), below.clone()))?;
    }
    root.present()?;
    Ok(())
}

/// The title, and below it what the colours mean.
fn head(
    figure: &Figure,
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
) -> Result<(), Box<dyn std::error::Error>> {
    let title = TextStyle::from((FONT, 20).into_font());
    area.draw(&Text::new(figure.title, (82, 14), title))?;
    let label = TextStyle::from((FONT, 15).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
    for (x, bar) in (82..).step_by(150).zip(figure.bars) {
        area.draw(&Rectangle::new([(x, 44), (x + 12, 56)], bar.colour.filled()))?;
        area.draw(&Text::new(bar.label, (x + 18, 50), label.clone()))?;
    }
    Ok(())
}

fn value(bar: &Bar, pair: &Pair<'_>) -> Option<f64> {
    let run = match bar.proxy {
        Proxy::KubeProxy => pair.theirs,
        Proxy::Portcullis => pair.ours,
    };
    // There is no logarithm of others.
    run.and_then(bar.of).filter(|value| *value > 0.0)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn size(length: f64) -> String {
    bytes(length as usize)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn count(number: f64) -> String {
    thousands(number as usize)
}

#[expect(clippy::cast_precision_loss)]
fn kibibytes(number: u64) -> f64 {
    number as f64 * 1024.0
}
