//! HTTP for operators: `/healthz`, `/readyz`, `/metrics`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Says whether the gateway is ready, and if not, why.
pub trait Readiness: Send + Sync + 'static {
    /// One for each thing that it needs; ready when all are good.
    fn statuses(&self) -> Vec<Status>;
}

/// The state of one thing that the gateway needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Whether it is as it should be.
    pub is_good: bool,
    /// One line for a person.
    pub text: String,
}

impl Status {
    /// It is as it should be.
    pub fn good(text: impl Into<String>) -> Self {
        Self {
            is_good: true,
            text: text.into(),
        }
    }

    /// It is missing, and so the gateway is not ready.
    pub fn missing(text: impl Into<String>) -> Self {
        Self {
            is_good: false,
            text: text.into(),
        }
    }
}

#[derive(Clone)]
struct Admin {
    readiness: Arc<dyn Readiness>,
    metrics: PrometheusHandle,
}

/// Serves until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    readiness: Arc<dyn Readiness>,
    metrics: PrometheusHandle,
    stop: CancellationToken,
) {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(render))
        .with_state(Admin { readiness, metrics });
    let address: Option<SocketAddr> = listener.local_addr().ok();
    let server = axum::serve(listener, router);
    tokio::select! {
        () = stop.cancelled() => {}
        result = server => {
            if let Err(error) = result {
                tracing::error!(?address, %error, "the admin server ended");
            }
        }
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    let statuses = admin.readiness.statuses();
    let ready = statuses.iter().all(|status| status.is_good);
    let mut text = String::from(if ready { "ready\n" } else { "not ready\n" });
    for status in statuses {
        let mark = if status.is_good { "+" } else { "-" };
        text.push_str(&format!("{mark} {}\n", status.text));
    }
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, text).into_response()
}

async fn render(State(admin): State<Admin>) -> Response {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    (
        [(header::CONTENT_TYPE, content_type)],
        admin.metrics.render(),
    )
        .into_response()
}
