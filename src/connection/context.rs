//! What the connections of one listener on one shard have in common.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::machine::Timeouts;
use super::queue::Limits;
use super::registry::Registry;
use crate::handler::Handlers;
use crate::id::{HandlerName, ShardId};
use crate::metrics::ListenerMetrics;
use crate::telemetry::Seldom;

/// How connections behave.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Timers.
    pub timeouts: Arc<Timeouts>,
    /// Bytes that may wait to be sent before Send waits.
    pub high_watermark: u32,
    /// Received bytes a second.
    pub max_bytes_rate: Option<f64>,
    /// Reads a second.
    pub max_messages_rate: Option<f64>,
    /// Messages that wait for the handler.
    pub queue: Limits,
    /// Messages in one callback.
    pub max_batch: usize,
    /// Template of the prefix of all topics.
    pub mountpoint: String,
    /// Whether the mountpoint of an AuthenticateRequest counts.
    pub clientinfo_mountpoint: bool,
    /// Whether devices are authenticated, where there is any authentication.
    pub enable_authn: bool,
    /// Whether a device that does what it may not is closed.
    pub disconnect_denied: bool,
    /// For `Message.node`.
    pub node_name: String,
}

/// See the module. Built once for each shard and listener: nothing in it that is
/// used for each byte or message is shared between shards.
pub struct ListenerContext {
    /// `<kind>.<name>`.
    pub name: String,
    /// The shard.
    pub shard: ShardId,
    /// How connections behave.
    pub settings: Settings,
    /// The handler's name.
    pub handler: HandlerName,
    /// The way to the handler.
    pub handlers: Arc<dyn Handlers>,
    /// All connections.
    pub registry: Arc<Registry>,
    /// Counts what happens.
    pub metrics: ListenerMetrics,
    /// Cancelled when the gateway drains.
    pub draining: CancellationToken,
    /// For the lines above `debug` about a connection.
    pub complaints: Seldom,
}
