//! The embedded MQTT broker: mqtt5's, in memory, for anybody on this machine.

use std::net::SocketAddr;
use std::time::Duration;

use mqtt5::broker::config::{StorageBackend, StorageConfig};
use mqtt5::broker::{BrokerConfig, BrokerShutdownHandle, MqttBroker};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::handler::MAX_DEVICES;

/// Clients at a time, the gateway's own among them.
const MAX_CLIENTS: usize = 1000;

/// Retained messages.
const MAX_RETAINED: usize = 10_000;

/// Messages that wait for one client, and their bytes.
const MAX_QUEUED: usize = 10_000;
const MAX_QUEUED_BYTES: usize = 16 * 1024 * 1024;

/// How long a session outlives its connection.
const SESSION_EXPIRY: Duration = Duration::from_secs(3600);

/// Longest wait for clients to be told of the end.
const GRACE: Duration = Duration::from_secs(1);

/// A running broker.
pub(super) struct Broker {
    shutdown: BrokerShutdownHandle,
    task: JoinHandle<()>,
}

/// Starts it on `runtime`; it accepts when this returns. `max_packet_size` in bytes.
pub(super) async fn start(
    runtime: &Handle,
    address: SocketAddr,
    max_packet_size: usize,
) -> anyhow::Result<Broker> {
    let config = BrokerConfig {
        bind_addresses: vec![address],
        max_clients: MAX_CLIENTS,
        session_expiry_interval: SESSION_EXPIRY,
        max_packet_size,
        // One for each device: the gateway may have them all on one connection.
        max_subscriptions_per_client: MAX_DEVICES * 2,
        max_retained_messages: MAX_RETAINED,
        max_retained_message_size: max_packet_size,
        client_channel_capacity: MAX_QUEUED,
        // The default writes into the working directory.
        storage_config: StorageConfig::new()
            .with_backend(StorageBackend::Memory)
            .with_max_queued_messages_per_client(MAX_QUEUED)
            .with_max_queued_bytes_per_client(MAX_QUEUED_BYTES),
        sys_topics_enabled: false,
        ..BrokerConfig::default()
    };
    let mut broker = runtime
        .spawn(async move { MqttBroker::with_config(config).await })
        .await??;
    let shutdown = broker.shutdown_handle();
    let mut ready = broker.ready_receiver();
    let task = runtime.spawn(async move {
        if let Err(error) = broker.run().await {
            tracing::error!(%error, "the embedded broker ended");
        }
    });
    ready.wait_for(|ready| *ready).await?;
    Ok(Broker { shutdown, task })
}

impl Broker {
    /// Ends it; clients are told, if they listen.
    pub(super) async fn stop(self) {
        self.shutdown.shutdown();
        let _ = tokio::time::timeout(GRACE, self.task).await;
    }
}
