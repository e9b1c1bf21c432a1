//! Where log lines go: standard error, for as long as somebody reads it.
//!
//! Nobody needs to read what the daemon logs for it to do its work. So it neither ends because a
//! line cannot be written nor waits for whoever reads: lines that find no place are lost, and
//! counted. Other commands wait for their reader, as commands do.

use std::io::{self, IsTerminal, Write};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::arguments::LogFormat;

/// What is logged where nobody chooses. The watchers of the API server tell of each failed attempt to
/// reach it; that it is away and that it is back is said once, by us.
const DEFAULT: &str = "info,kube_client=off,kube_runtime=error";
/// How many lines of the daemon wait for a slow reader: a finding on each of many Services, in some
/// 10 MB.
const WAITING: usize = 32 << 10;

/// The way to standard error. What is still on it is written when this is dropped, or lost where
/// nobody reads for a second.
#[derive(Debug, Default)]
pub struct Logs {
    /// A thread that writes, where nobody waits.
    behind: Option<(NonBlocking, WorkerGuard)>,
}

impl Logs {
    /// Sends log lines on their way.
    ///
    /// # Errors
    /// When `RUST_LOG` is not understood.
    pub fn start(&mut self, format: LogFormat, is_daemon: bool) -> anyhow::Result<()> {
        let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
            Ok(directives) if !directives.is_empty() => directives.parse().map_err(|error| {
                let name = EnvFilter::DEFAULT_ENV;
                anyhow::anyhow!("{name}={directives:?} is not understood: {error}")
            })?,
            // Neither set nor readable.
            _ => EnvFilter::new(DEFAULT),
        };
        let writer = if is_daemon {
            let builder = NonBlockingBuilder::default().lossy(true).thread_name("logs");
            let behind = builder.buffered_lines_limit(WAITING).finish(io::stderr());
            BoxMakeWriter::new(self.behind.insert(behind).0.clone())
        } else {
            BoxMakeWriter::new(io::stderr)
        };
        let logs = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(writer)
            // They would be told on standard error, and panic if that cannot be written.
            .log_internal_errors(false);
        match format {
            LogFormat::Text => logs.with_ansi(io::stderr().is_terminal()).init(),
            LogFormat::Json => logs.json().flatten_event(true).init(),
        }
        Ok(())
    }

    /// How many lines are lost, where lines can be.
    pub fn lost(&self) -> Option<ErrorCounter> {
        self.behind.as_ref().map(|(writer, _)| writer.error_counter())
    }

    /// Writes a line that is no log line, behind those that are.
    pub fn say(&self, line: &str) {
        match &self.behind {
            // It never fails.
            Some((writer, _)) => {
                let _ = writer.clone().write_all(format!("{line}\n").as_bytes());
            }
            None => say(line),
        }
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        let Some((mut writer, guard)) = self.behind.take() else { return };
        let lost = writer.error_counter();
        let before = lost.dropped_lines();
        // A guard that finds no place for its own message complains on standard output, whose
        // reader may be the same.
        let _ = writer.write_all(b"");
        if lost.dropped_lines() == before {
            drop(guard);
        } else {
            std::mem::forget(guard);
        }
    }
}

/// Writes a line to standard error, or nothing where nobody reads: `eprintln` would panic.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}
