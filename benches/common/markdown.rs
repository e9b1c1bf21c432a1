//! Figures as Markdown.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

/// Puts `results` between the markers of `target` (as in `make target`) in `file`.
///
/// # Errors
/// When the file or the markers are not there.
pub fn replace(file: &Path, target: &str, results: &str) -> Result<()> {
    let begin = format!("<!-- results of `make {target}`: begin -->");
    let end = format!("<!-- results of `make {target}`: end -->");
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let missing = || format!("{} has no line {begin} before a line {end}", file.display());
    let (before, rest) = text.split_once(&begin).with_context(missing)?;
    let (_, after) = rest.split_once(&end).with_context(missing)?;
    std::fs::write(file, format!("{before}{begin}\n\n{results}\n{end}{after}"))
        .with_context(|| format!("cannot write {}", file.display()))
}

/// The first lines of a table: its heads.
pub fn header(out: &mut String, cells: &[&str]) {
    let cells: Vec<String> = cells.iter().map(|cell| (*cell).to_owned()).collect();
    row(out, &cells);
    row(out, &cells.iter().map(|_| "---".to_owned()).collect::<Vec<_>>());
}

/// A line of a table.
pub fn row(out: &mut String, cells: &[String]) {
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

/// The value below which this share of `values` lies, by nearest rank; 0.5 is the median.
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Three digits and a unit.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 99.95 => format!("{s:.0} s"),
        s if s >= 9.995 => format!("{s:.1} s"),
        s if s >= 0.9995 => format!("{s:.2} s"),
        s if s >= 0.009_995 => format!("{:.0} ms", s * 1e3),
        s if s >= 0.000_999_5 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.2} ms", s * 1e3),
    }
}

/// Three digits and a unit; nothing for 0.
pub fn bytes(bytes: usize) -> String {
    match as_f64(bytes) {
        0.0 => String::new(),
        b if b < 1e3 => format!("{b:.0} B"),
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b => format!("{:.1} MB", b / 1e6),
    }
}

/// `44125` as `44,125`.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count, to calculate with.
#[expect(clippy::cast_precision_loss)]
pub fn as_f64(number: usize) -> f64 {
    number as f64
}
