//! Answers for the proxy as a whole.
//!
//! Paths, status codes and fields are those of kube-proxy (`pkg/proxy/healthcheck`), so that probes
//! of `DaemonSet`s and cloud load balancers need not know which proxy answers.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use axum::routing::get;
use jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;

use super::{Connections, Health};

/// How long to wait before an address is tried again that cannot be listened at.
const AGAIN: Duration = Duration::from_secs(5);

/// `/healthz`, `/livez` and `/readyz`.
///
/// - `/healthz`: 200 if changes get into the kernel and the node stays, else 503.
/// - `/livez`: the same without a look at the node. Who restarts a daemon because of it does not
///   restart it because its node is about to go.
/// - `/readyz`: 200 once everything that there is has been programmed. kube-proxy has no such path.
pub fn routes(health: &Health) -> Router {
    let healthy = Arc::new(Mutex::new(Timestamp::now()));
    let of = |answer: fn(&Health, &Mutex<Timestamp>) -> Response<Body>| {
        let (health, healthy) = (health.clone(), Arc::clone(&healthy));
        get(async move || answer(&health, &healthy))
    };
    Router::new()
        .route(
            "/healthz",
            of(|health, last| status(health.is_alive(), Some(health.is_eligible()), last)),
        )
        .route("/livez", of(|health, last| status(health.is_alive(), None, last)))
        .route("/readyz", of(|health, last| status(health.is_ready(), None, last)))
}

fn status(works: bool, eligible: Option<bool>, last: &Mutex<Timestamp>) -> Response<Body> {
    let healthy = works && eligible != Some(false);
    let now = Timestamp::now();
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    if works {
        *last = now;
    }
    let of_family = json!({ "lastUpdated": *last, "healthy": works });
    let mut body = json!({
        "lastUpdated": *last,
        "currentTime": now,
        "healthy": healthy,
        "status": { "IPv4": of_family, "IPv6": of_family },
    });
    if let Some(eligible) = eligible {
        body["nodeEligible"] = eligible.into();
    }
    answer(healthy, body.to_string())
}

/// JSON, with 200 or 503.
pub(super) fn answer(well: bool, body: String) -> Response<Body> {
    let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .body(Body::from(body))
        .expect("these headers are valid")
}

/// Listens; at the unspecified address of one family for both, as kube-proxy does.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, address.port()));
    if address.ip().is_unspecified()
        && let Ok(listener) = TcpListener::bind(both).await
    {
        return Ok(listener);
    }
    TcpListener::bind(address).await
}

/// Serves `routes` at `address`, for ever. While somebody else listens there, it is said once and
/// tried again every five seconds: nothing else depends on it.
pub async fn serve(
    what: &'static str,
    address: SocketAddr,
    routes: Router,
    connections: Connections,
) -> Infallible {
    let mut said = false;
    let listener = loop {
        match listen(address).await {
            Ok(listener) => break listener,
            Err(error) if !said => {
                tracing::warn!(what, %address, %error, "cannot listen; tried again");
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    };
    tracing::info!(what, %address, "listening");
    connections.answer(&listener, &routes).await
}
