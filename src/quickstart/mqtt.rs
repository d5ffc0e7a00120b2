//! An MQTT client at the embedded broker, of another make than the broker: it sees
//! what devices and people publish, and publishes the message of the show.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use rumqttc::Outgoing;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet, Publish};
use rumqttc::v5::{AsyncClient, Event, EventLoop, MqttOptions};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::handler::Lines;
use super::terminal::{Terminal, shown};
use super::topics::{self, Direction};

const CLIENT_ID: &str = "quickstart";

/// Requests and messages that may wait. The show needs one at a time.
const QUEUE: usize = 16;

/// Pause before connecting again.
const PAUSE: Duration = Duration::from_millis(200);

/// Longest wait for the DISCONNECT to be written.
const GRACE: Duration = Duration::from_millis(500);

/// A message that the broker has handed out.
pub(super) struct Seen {
    pub(super) topic: String,
    pub(super) payload: Bytes,
}

/// The client as the show uses it.
pub(super) struct Mqtt {
    client: AsyncClient,
    subscribed: watch::Receiver<bool>,
    seen: mpsc::Receiver<Seen>,
    task: JoinHandle<()>,
}

/// Starts it on `runtime`; it is connected and subscribed when [`Mqtt::subscribed`]
/// resolves. `max_packet_size` in bytes.
pub(super) fn start(
    runtime: &Handle,
    broker: SocketAddr,
    max_packet_size: usize,
    filters: Vec<String>,
    handler: Lines,
    terminal: Terminal,
) -> Mqtt {
    let host = match broker {
        SocketAddr::V4(broker) => broker.ip().to_string(),
        SocketAddr::V6(broker) => format!("[{}]", broker.ip()),
    };
    let mut options = MqttOptions::new(CLIENT_ID, host, broker.port());
    options.set_max_packet_size(u32::try_from(max_packet_size).ok());
    let (client, events) = AsyncClient::new(options, QUEUE);
    let (is_subscribed, subscribed) = watch::channel(false);
    let (found, seen) = mpsc::channel(QUEUE);
    let watcher = Watcher {
        client: client.clone(),
        filters,
        handler,
        terminal,
        is_subscribed,
        found,
    };
    let task = runtime.spawn(watcher.run(events));
    Mqtt {
        client,
        subscribed,
        seen,
        task,
    }
}

impl Mqtt {
    /// Waits until everything published from here on is seen. Cancel safe.
    pub(super) async fn subscribed(&mut self) -> anyhow::Result<()> {
        self.subscribed.wait_for(|subscribed| *subscribed).await?;
        Ok(())
    }

    pub(super) async fn publish(&self, topic: String, payload: &'static str) -> anyhow::Result<()> {
        let payload = Bytes::from_static(payload.as_bytes());
        self.client
            .publish(topic, QoS::AtLeastOnce, false, payload)
            .await?;
        Ok(())
    }

    /// Waits for this message. Others are passed over. Cancel safe.
    pub(super) async fn sees(&mut self, topic: &str, payload: &str) -> anyhow::Result<()> {
        while let Some(seen) = self.seen.recv().await {
            if seen.topic == topic && seen.payload == payload {
                return Ok(());
            }
        }
        anyhow::bail!("the MQTT client has ended")
    }

    /// Says good-bye to the broker.
    pub(super) async fn stop(mut self) {
        if self.client.try_disconnect().is_ok() {
            let _ = tokio::time::timeout(GRACE, &mut self.task).await;
        }
        self.task.abort();
    }
}

struct Watcher {
    client: AsyncClient,
    filters: Vec<String>,
    handler: Lines,
    terminal: Terminal,
    is_subscribed: watch::Sender<bool>,
    found: mpsc::Sender<Seen>,
}

impl Watcher {
    async fn run(self, mut events: EventLoop) {
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => self.subscribe(),
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    self.is_subscribed.send_replace(true);
                }
                Ok(Event::Incoming(Packet::Publish(publish))) => self.tell(publish),
                Ok(Event::Outgoing(Outgoing::Disconnect)) => return,
                Ok(_) => {}
                Err(error) => {
                    self.is_subscribed.send_replace(false);
                    tracing::warn!(%error, "the MQTT client lost the embedded broker");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn subscribe(&self) {
        let filter = |text: &String| Filter::new(text.clone(), QoS::AtLeastOnce);
        let filters = self.filters.iter().map(filter);
        if let Err(error) = self.client.try_subscribe_many(filters) {
            tracing::warn!(%error, "the MQTT client cannot subscribe");
        }
    }

    fn tell(&self, publish: Publish) {
        let topic = String::from_utf8_lossy(&publish.topic).into_owned();
        let Some((direction, clientid)) = topics::read(&topic) else {
            return;
        };
        let (name, payload) = (shown(topic.as_bytes()), shown(&publish.payload));
        self.terminal.say(&match direction {
            Direction::Up => format!("  up    {name}: {payload}"),
            Direction::Down if self.handler.is_connected(clientid) => {
                format!("  down  {name}: {payload}")
            }
            Direction::Down => format!("  down  {name}: {payload}  (no such device is connected)"),
        });
        let payload = publish.payload;
        // After the show nobody takes them, and that is well.
        let _ = self.found.try_send(Seen { topic, payload });
    }
}
