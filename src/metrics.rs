//! Metrics, as Prometheus reads them (the text of `OpenMetrics`).

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tracing_appender::non_blocking::ErrorCounter;

use crate::commit::Pulse;
use crate::model::Severity;
use crate::occupied;
use crate::report::Reporter;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// The committing thread.
    pub pulse: Pulse,
    /// What is wrong with objects.
    pub reporter: Reporter,
    /// Node ports, and processes that listen on them.
    pub occupied: occupied::Sender,
    /// Log lines for which there was no place; `None` where whoever logs waits.
    pub lost_lines: Option<ErrorCounter>,
}

impl Metrics {
    /// `/metrics`, and `/healthz` and `/proxyMode` as kube-proxy has them at its port 10249.
    pub fn routes(self) -> Router {
        let metrics = async move || match self.text() {
            Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        };
        Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(async || "ok"))
            .route("/proxyMode", get(async || "nftables"))
    }

    /// All metrics now. They are read where they are kept, so nobody counts twice.
    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("portcullis");
        let gauge = |value: usize| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let counter = |value: usize| ConstCounter::new(value as u64);
        let totals = self.pulse.totals();
        registry.register(
            "transactions",
            "Transactions that the kernel has carried out",
            counter(totals.transactions),
        );
        registry.register(
            "transactions_refused",
            "Transactions that the kernel has refused",
            counter(totals.refused),
        );
        registry.register(
            "operations",
            "Elements, chains, rules and sets written or deleted",
            counter(totals.operations),
        );
        registry.register_with_unit(
            "kernel_time",
            "Time from handing transactions over to the kernel's answers",
            Unit::Seconds,
            ConstCounter::new(totals.kernel_time.as_secs_f64()),
        );
        registry.register_with_unit(
            "commit_behind",
            "For how long the oldest change waits to get into the kernel",
            Unit::Seconds,
            ConstGauge::new(self.pulse.behind().as_secs_f64()),
        );
        registry.register(
            "programmed",
            "Whether everything has been programmed once",
            gauge(usize::from(self.reporter.adoption().is_some())),
        );
        let diagnostics = self.reporter.diagnostics();
        let of = |severity| diagnostics.iter().filter(|d| d.severity == severity).count();
        registry.register(
            "object_errors",
            "Findings on objects of which a part is not in force",
            gauge(of(Severity::Error)),
        );
        registry.register(
            "object_warnings",
            "Findings on objects that need a look",
            gauge(of(Severity::Warning)),
        );
        registry.register(
            "node_port_conflicts",
            "Node ports on which a process of this node listens",
            gauge(self.occupied.conflicts()),
        );
        registry.register(
            "log_lines_lost",
            "Log lines that were lost because nobody read standard error",
            counter(self.lost_lines.as_ref().map_or(0, ErrorCounter::dropped_lines)),
        );
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
