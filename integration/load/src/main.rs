//! Opens new HTTP connections at a rate until it is told to stop, and prints what became of them.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use portcullis_load::Load;

/// Opens new HTTP connections at a rate, and counts those that fail.
///
/// Prints one line `DONE FAILED RATE SLOW SLOWEST`: how many were answered and how many were not, how many
/// were opened a second, and of those that were answered how many took longer than 0.9 s (a packet was lost
/// and sent again) and how many milliseconds the slowest took. The first failures are told on standard error.
///
/// The exit code is 0 also if connections failed, and 2 if this machine could not open some.
#[derive(Parser)]
struct Arguments {
    /// Where to, in turns
    #[arg(required = true, value_name = "ADDRESS:PORT")]
    targets: Vec<SocketAddr>,
    /// Where from, in turns
    #[arg(long, value_delimiter = ',', value_name = "ADDRESS,...")]
    from: Vec<IpAddr>,
    /// Connections a second
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// How long, in seconds
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Stops when this file is there
    #[arg(long, value_name = "FILE")]
    until: Option<PathBuf>,
    /// What is asked for; the answer is to be 200
    #[arg(long, default_value = "/hostname")]
    path: String,
    /// How long one connection may take, in seconds
    #[arg(long, default_value_t = 3)]
    limit: u64,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let load = Load {
        targets: arguments.targets,
        sources: arguments.from,
        rate: arguments.rate,
        ask: format!("GET {} HTTP/1.1\r\nHost: load\r\n\r\n", arguments.path).into_bytes(),
        expect: b"HTTP/1.1 200 ".to_vec(),
        limit: Duration::from_secs(arguments.limit),
    };
    let end = Instant::now() + Duration::from_secs(arguments.seconds);
    let report = load.run(|| {
        Instant::now() >= end || arguments.until.as_ref().is_some_and(|file| file.exists())
    })?;
    for failure in &report.failures {
        eprintln!("{failure}");
    }
    let (rate, slowest) = (report.per_second(), report.slowest.as_millis());
    let mut out = std::io::stdout();
    writeln!(out, "{} {} {rate} {} {slowest}", report.done, report.failed, report.slow)?;
    Ok(if report.unable > 0 { ExitCode::from(2) } else { ExitCode::SUCCESS })
}
