//! Connections that have lost their handler, where that ends them
//! (`on_unavailable = "close"`): also those that have nothing to tell it.

use std::sync::Arc;

use super::reason::CloseReason;
use super::registry::Registry;
use crate::handler::client::Client;
use crate::id::{HandlerName, ShardId};

/// Closes the connections of a shard whose handler is away, each time that one of its addresses
/// is, for ever; returns where they are held. `client` is that handler's on the shard.
pub async fn close_forsaken(
    registry: Arc<Registry>,
    shard: ShardId,
    handler: HandlerName,
    client: Arc<Client>,
) {
    let close = || {
        for handle in registry.of_shard(shard) {
            let is_its = handle.context().handler == handler;
            if is_its && client.has_forsaken(handle.caller()) {
                // One that is closing already needs no telling.
                let _ = handle.close(CloseReason::HandlerUnavailable);
            }
        }
    };
    client.watch(close).await;
}
