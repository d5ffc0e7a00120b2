//! Pub/sub through an outside MQTT broker.
//!
//! ```text
//! Broker -- publish(route) --> member = route mod n --> outbox --> session --> broker
//!        -- subscribe -------> member = hash(filter) mod n --> table, SUBSCRIBE
//! broker --> session --> table: who subscribed --> Subscriber::deliver
//! ```
//!
//! A pool of `Member`s, each one MQTT connection with a persistent session. A
//! connection's publishes all go through one member, which keeps their order; a
//! filter lives at one member, which makes its fan-out exact. This module knows
//! nothing of device connections: it delivers into the [`Subscriber`] that was
//! given at subscription.

mod inbound;
mod link;
mod member;
mod session;
mod table;
pub mod topic;
mod wire;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::id::MessageId;
use crate::metrics::BrokerMetrics;
use member::Member;
pub use member::{AckOnDrop, LinkState};
pub use table::SubscriptionKey;
use topic::{TopicFilter, TopicName};
use wire::OutboundPublish;

/// Quality of service (MQTT 5, 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QoS {
    /// 0
    AtMostOnce,
    /// 1
    AtLeastOnce,
    /// 2
    ExactlyOnce,
}

impl QoS {
    /// From the number on the wire.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }

    /// The number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// The broker's own "no" to a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Whether it is a question of permission.
    pub denied: bool,
    /// The reason code's name in words.
    pub reason: String,
}

/// Why a publish has no confirmation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker answered with a reason code of failure.
    #[error("the broker refused the message: {0}")]
    Refused(Refusal),
    /// More than the broker accepts; nothing was sent.
    #[error("the message is too large: {size} bytes on the wire, the broker's limit is {limit}")]
    TooLarge {
        /// Bytes.
        size: usize,
        /// Bytes.
        limit: usize,
    },
    /// The broker takes no publish of this QoS; nothing was sent.
    #[error("the broker takes no QoS above {}", .0.number())]
    QosNotSupported(QoS),
    /// The outbox has no room; nothing was sent.
    #[error("the outbox is full while the broker does not keep up ({0})")]
    OutboxFull(String),
    /// No confirmation in time.
    #[error("no confirmation from the broker within {0:?} ({1})")]
    TimedOut(Duration, String),
    /// The link broke before a QoS 0 message was written.
    #[error("the link to the broker broke before the message was written")]
    LinkLost,
    /// The broker lost the session between PUBREC and PUBCOMP.
    #[error("the broker lost the session before it confirmed the message")]
    SessionLost,
    /// The gateway is stopping.
    #[error("the gateway is stopping")]
    Stopped,
}

/// Why a subscription was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// The broker answered with a reason code of failure.
    #[error("the broker refused the subscription: {0}")]
    Refused(Refusal),
    /// No SUBACK in time.
    #[error("no answer from the broker within {0:?} ({1})")]
    TimedOut(Duration, String),
    /// The gateway is stopping.
    #[error("the gateway is stopping")]
    Stopped,
}

/// A message on its way to the broker.
#[derive(Debug)]
pub struct Publication {
    /// With the mountpoint.
    pub topic: TopicName,
    /// Quality of service.
    pub qos: QoS,
    /// The message itself.
    pub payload: Bytes,
    /// The device's client id, where it has one.
    pub from: Option<Arc<str>>,
}

/// A message that came from the broker.
#[derive(Debug)]
pub struct Message {
    /// Made here.
    pub id: MessageId,
    /// With the mountpoint.
    pub topic: String,
    /// The message itself.
    pub payload: Bytes,
    /// The publisher's client id; empty when unknown.
    pub from: String,
    /// Milliseconds since the Unix epoch.
    pub timestamp: u64,
}

/// A message for one subscriber. Dropping the last delivery of a message
/// acknowledges it to the broker.
#[derive(Debug)]
pub struct Delivery {
    /// Shared by all who get it.
    pub message: Arc<Message>,
    /// The lower of the publish's and the subscription's.
    pub qos: QoS,
    /// Held until the message was taken.
    pub(crate) _ack: Option<Arc<AckOnDrop>>,
}

/// Where a subscription's messages go.
pub trait Subscriber: Send + Sync {
    /// Takes a message without blocking, or gives it back when the subscriber has
    /// ended. Called without any lock of the broker's held.
    fn deliver(&self, delivery: Delivery) -> Result<(), Delivery>;
}

/// One of the addresses of the broker.
#[derive(Debug, Clone)]
pub struct Address {
    /// As the log and `/readyz` show it.
    pub url: Arc<str>,
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Encrypts the link.
    pub tls: Option<Arc<tokio_rustls::rustls::ClientConfig>>,
}

/// How the broker is reached and used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tried in turn, at least one; a link that was lost begins with its last one.
    pub addresses: Vec<Address>,
    /// One for each connection to the broker, at least one.
    pub client_ids: Vec<String>,
    /// User name and password.
    pub login: Option<Login>,
    /// Ping interval; whole seconds.
    pub keep_alive: Duration,
    /// Longest time for connecting and the CONNACK.
    pub connect_timeout: Duration,
    /// How long the broker keeps the session of a broken link.
    pub session_expiry: Duration,
    /// How long a publish or subscribe may take.
    pub publish_timeout: Duration,
    /// Publishes that may wait at one member.
    pub outbox_max_messages: usize,
    /// Bytes that may wait at one member.
    pub outbox_max_bytes: usize,
    /// Messages that the broker may have unacknowledged towards one member.
    pub receive_maximum: u16,
    /// Largest packet accepted from the broker, bytes.
    pub max_packet_size: u32,
    /// First and longest pause before connecting again.
    pub reconnect: (Duration, Duration),
    /// User property with the publisher's client id.
    pub from_property: Option<String>,
    /// User property with the time of publishing.
    pub timestamp_property: Option<String>,
}

/// A login at the broker; its Debug shows no password.
#[derive(Clone)]
pub struct Login {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// The pool. Cheap to clone.
#[derive(Clone)]
pub struct Broker {
    members: Arc<[Arc<Member>]>,
    options: Arc<Options>,
    hasher: RandomState,
}

/// The tasks behind a [`Broker`].
pub struct BrokerTasks {
    broker: Broker,
    tasks: Vec<JoinHandle<()>>,
}

impl Broker {
    /// Starts the pool; member `i` runs on runtime `i mod runtimes`.
    ///
    /// A broker that is down is waited for: [`Broker::states`] tells.
    ///
    /// # Errors
    /// Fails only where the system has no randomness for message ids.
    pub fn start(
        options: Options,
        runtimes: &[Handle],
        metrics: &BrokerMetrics,
    ) -> std::io::Result<(Self, BrokerTasks)> {
        let options = Arc::new(options);
        let mut members = Vec::new();
        let mut tasks = Vec::new();
        for (client_id, runtime) in options.client_ids.iter().zip(runtimes.iter().cycle()) {
            let member = Member::new(client_id.clone(), options.clone(), metrics.clone())?;
            tasks.push(runtime.spawn(link::run(member.clone())));
            members.push(member);
        }
        let broker = Self {
            members: members.into(),
            options,
            hasher: RandomState::new(),
        };
        let tasks = BrokerTasks {
            broker: broker.clone(),
            tasks,
        };
        Ok((broker, tasks))
    }

    fn member(&self, number: u64) -> &Arc<Member> {
        // The pool is never empty; the remainder is below its length.
        let index = usize::try_from(number % self.members.len() as u64).unwrap_or(0);
        #[allow(clippy::indexing_slicing)]
        &self.members[index]
    }

    /// Publishes a message and waits for its confirmation: QoS 0 until it is
    /// written towards the broker, QoS 1 until PUBACK, QoS 2 until PUBCOMP.
    /// Publishes of one `route` keep their order.
    ///
    /// Cancel safe: a message that was not sent yet is withdrawn, one that was
    /// sent goes its way.
    pub async fn publish(&self, route: u64, message: Publication) -> Result<(), PublishError> {
        let member = self.member(route);
        let mut properties = Vec::new();
        if let (Some(from), Some(name)) = (&message.from, &self.options.from_property) {
            properties.push((name.clone(), from.to_string()));
        }
        if let Some(name) = &self.options.timestamp_property {
            properties.push((name.clone(), now_ms().to_string()));
        }
        let publish = OutboundPublish::new(
            message.topic.as_str().to_owned(),
            message.qos,
            message.payload,
            properties,
        );
        let confirmed = member.publish(publish)?;
        let limit = self.options.publish_timeout;
        match tokio::time::timeout(limit, confirmed).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(PublishError::Stopped),
            Err(_) => {
                member.count_timeout();
                Err(PublishError::TimedOut(limit, member.state().to_string()))
            }
        }
    }

    /// Subscribes and waits for the SUBACK. The subscription ends when what is
    /// returned is dropped. It takes the place of `replaced`, one to the same filter,
    /// so that no message is missed or comes twice.
    ///
    /// Messages may be delivered before this returns (MQTT 5, 3.8.4). Cancel safe:
    /// nothing stays subscribed.
    pub async fn subscribe(
        &self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> Result<Subscription, SubscribeError> {
        let member = self.member(self.hasher.hash_one(filter.as_str()));
        let (answered, answer) = oneshot::channel();
        let key = member.subscribe(filter, qos, subscriber, replaced, answered);
        // From here on, leaving in any way takes the subscription back.
        let subscription = Subscription {
            member: member.clone(),
            filter: filter.clone(),
            key,
        };
        let limit = self.options.publish_timeout;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(Ok(_granted))) => Ok(subscription),
            Ok(Ok(Err(refusal))) => Err(SubscribeError::Refused(refusal)),
            Ok(Err(_)) => Err(SubscribeError::Stopped),
            Err(_) => Err(SubscribeError::TimedOut(limit, member.state().to_string())),
        }
    }

    /// The state of each member's link, in order.
    pub fn states(&self) -> Vec<LinkState> {
        self.members.iter().map(|member| member.state()).collect()
    }
}

impl BrokerTasks {
    /// Sends and confirms what was accepted, ends the sessions, and stops; at
    /// `deadline` what is left fails. Says how many publishes were left.
    pub async fn drain(self, deadline: Instant) -> usize {
        for member in self.broker.members.iter() {
            member.close();
        }
        let mut left = 0;
        for (mut task, member) in self.tasks.into_iter().zip(self.broker.members.iter()) {
            // A link that is down and owes nothing is not worth waiting for.
            let owes = member.state().is_up() || member.waiting() > 0;
            let limit = if owes { deadline } else { Instant::now() };
            if tokio::time::timeout_at(limit, &mut task).await.is_err() {
                task.abort();
                left += member.waiting();
            }
        }
        left
    }
}

/// A subscription; dropping it ends it.
pub struct Subscription {
    member: Arc<Member>,
    filter: TopicFilter,
    key: SubscriptionKey,
}

impl Subscription {
    /// Its name at its filter.
    pub fn key(&self) -> SubscriptionKey {
        self.key
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.member.unsubscribe(&self.filter, self.key);
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| {
            u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
        })
}
