//! The adapter's side of the gateway: who is let in, and on which shard.

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::time::Instant;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::adapter::Adapter;
use crate::adapter::socket::Listener;
use crate::adapter::tokens::Tokens;
use crate::config::Config;
use crate::metrics::AdapterMetrics;
use crate::options;
use crate::reload::{Current, Watch};
use crate::shard::Shard;
use crate::telemetry::Seldom;

/// How many connections of handlers there may be. A handler needs one; a program that opens
/// them without end must not use up the descriptors that devices need.
pub(super) struct Bound {
    pub max_connections: usize,
    /// Those that were too many.
    pub refused: Counter,
}

/// TLS of the adapter, if it is on; made again when a file changes.
pub(super) fn follow_tls(
    config: &Config,
    metrics: &AdapterMetrics,
    stop: &CancellationToken,
) -> Result<Option<Arc<Current<ServerConfig>>>, options::Error> {
    let watch = Watch::new(options::server_tls_files(config));
    let Some(first) = options::server_tls(config)? else {
        return Ok(None);
    };
    let current = Current::new(first);
    let config = config.clone();
    let make = move || {
        let made = options::server_tls(&config)?;
        made.ok_or_else(|| options::Error::new("server.ssl_options", "it is off"))
    };
    let told = telling("tls", metrics);
    tokio::spawn(watch.run(current.clone(), make, told, stop.clone()));
    Ok(Some(current))
}

/// The tokens of the adapter, if there are any; read again when a file changes.
pub(super) fn follow_tokens(
    config: &Config,
    metrics: &AdapterMetrics,
    stop: &CancellationToken,
) -> Result<Option<Arc<Current<Tokens>>>, options::Error> {
    let files = options::token_files(config);
    if files.is_empty() {
        return Ok(None);
    }
    let watch = Watch::new(files.iter().map(|file| file.path.clone()).collect());
    let current = Current::new(options::tokens(&files)?);
    let make = move || options::tokens(&files);
    let told = telling("tokens", metrics);
    tokio::spawn(watch.run(current.clone(), make, told, stop.clone()));
    Ok(Some(current))
}

/// Says what became of changed files.
fn telling(
    what: &'static str,
    metrics: &AdapterMetrics,
) -> impl Fn(Result<(), options::Error>) + use<> {
    let metrics = metrics.clone();
    move |result| match result {
        Ok(()) => {
            metrics.reloaded(what, "ok");
            tracing::info!(what, "the adapter's changed files are in use");
        }
        Err(error) => {
            metrics.reloaded(what, "failed");
            tracing::error!(what, %error, "the adapter's changed files are of no use; the old ones stay");
        }
    }
}

/// Accepts handlers and spreads their connections over the shards.
pub(super) async fn accept(
    listener: Listener,
    adapter: Adapter,
    bound: Bound,
    shards: Vec<Shard>,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let (complaints, trouble) = (Seldom::default(), Seldom::default());
    for shard in shards.iter().cycle() {
        let accepted = loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(accepted) => break accepted,
                Err(error) => {
                    if let Some(left_out) = trouble.tell(Instant::now().into_std()) {
                        tracing::error!(%error, left_out, "cannot accept a handler; trying on");
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        let (stream, peer) = accepted;
        if tasks.len() >= bound.max_connections {
            bound.refused.increment(1);
            if let Some(left_out) = complaints.tell(Instant::now().into_std()) {
                tracing::error!(%peer, left_out, "a handler's connection is refused: there are as many as server.max_connections allows");
            }
            continue;
        }
        let connection = adapter.clone().serve(stream, peer, stop.clone());
        tasks.spawn_on(connection, shard.runtime());
    }
}
