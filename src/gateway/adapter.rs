//! The adapter's side of the gateway: who is let in, and on which shard.

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::adapter::Adapter;
use crate::adapter::tokens::Tokens;
use crate::config::Config;
use crate::options;
use crate::reload::{Current, Watch};
use crate::shard::Shard;
use crate::telemetry::Seldom;

/// Connections of handlers to the adapter. A handler needs one; a program that opens
/// them without end must not use up the descriptors that devices need.
const MAX_HANDLER_CONNECTIONS: usize = 1024;

/// The tokens of the adapter, if there are any; read again when a file changes.
pub(super) fn follow_tokens(
    config: &Config,
    stop: &CancellationToken,
) -> Result<Option<Arc<Current<Tokens>>>, options::Error> {
    let files = options::token_files(config);
    if files.is_empty() {
        return Ok(None);
    }
    let watch = Watch::new(files.iter().map(|file| file.path.clone()).collect());
    let current = Current::new(options::tokens(&files)?);
    let make = move || options::tokens(&files);
    let told = |result: Result<(), options::Error>| match result {
        Ok(()) => tracing::info!("the changed tokens of handlers are in use"),
        Err(error) => {
            tracing::error!(%error, "the changed tokens of handlers are of no use; the old ones stay");
        }
    };
    tokio::spawn(watch.run(current.clone(), make, told, stop.clone()));
    Ok(Some(current))
}

/// Accepts handlers and spreads their connections over the shards.
pub(super) async fn accept(
    listener: TcpListener,
    adapter: Adapter,
    refused: Counter,
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
            let stream = accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer)));
            match stream {
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
        if tasks.len() >= MAX_HANDLER_CONNECTIONS {
            refused.increment(1);
            if let Some(left_out) = complaints.tell(Instant::now().into_std()) {
                tracing::error!(%peer, left_out, "a handler's connection is refused: there are too many");
            }
            continue;
        }
        let connection = adapter.clone().serve(stream, peer, stop.clone());
        tasks.spawn_on(connection, shard.runtime());
    }
}
