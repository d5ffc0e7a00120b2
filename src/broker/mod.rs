//! Pub/sub through an outside MQTT broker.
//!
//! ```text
//! Broker -- publish(route) --> member = route mod n --> outbox --> session --> broker
//!        -- subscribe, MQTT 5: member = hash(filter) mod n --> table, SUBSCRIBE
//!                      3.1.1:  planner: a member where it overlaps nothing --> topics,
//!                              SUBSCRIBE unless covered; fetcher: what is retained
//! broker --> session --> table | topics: who subscribed --> Subscriber::deliver
//! ```
//!
//! A pool of `Member`s, each one MQTT connection with a persistent session. A
//! connection's publishes all go through one member, which keeps their order; a
//! filter lives at one member, which makes its fan-out exact. This module knows
//! nothing of device connections: it delivers into the [`Subscriber`] that was
//! given at subscription.

mod dial;
mod fetch;
mod filters;
mod group;
pub(crate) mod hot;
mod link;
mod login;
mod member;
mod own;
pub mod plan;
mod pool;
mod session;
mod table;
pub mod topic;
mod topics;
pub mod trie;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::id::MessageId;
use crate::tls::Renewed;
use crate::trace::Traceparent;
pub use group::SubscriptionKey;
pub use login::{LoginError, try_login};
pub use member::{AckOnDrop, LinkState};
pub use own::{Claim, CutOff, Ended, Identity, OpenError, OwnSession, OwnSessions};
pub use pool::{Broker, BrokerTasks, Subscription};
use topic::TopicName;
pub use wire::Protocol;
pub(crate) use wire::fuzzing;

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
    /// With MQTT 3.1.1: every connection to the broker has a filter that overlaps.
    #[error(
        "the filter overlaps with others on each of the {0} connections that MQTT 3.1.1 allows; fewer overlapping filters, or MQTT 5, are needed"
    )]
    Overlaps(usize),
    /// With MQTT 3.1.1: too many subscribers wait for retained messages.
    #[error("no room to fetch retained messages within {0:?} ({1})")]
    NotFetched(Duration, String),
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
    /// The trace that it is part of. With MQTT 5 it goes along.
    pub trace: Option<Traceparent>,
}

/// A message that came from the broker.
#[derive(Debug)]
pub struct Message {
    /// Made by the publisher's gateway, else here.
    pub id: MessageId,
    /// With the mountpoint.
    pub topic: String,
    /// The message itself.
    pub payload: Bytes,
    /// The publisher's client id; empty when unknown.
    pub from: String,
    /// Milliseconds since the Unix epoch.
    pub timestamp: u64,
    /// The trace that it is part of, where that is looked at.
    pub trace: Option<Traceparent>,
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
    pub tls: Option<Arc<Renewed>>,
}

/// What the broker publishes when a device's connection ends without a farewell.
#[derive(Debug, Clone)]
pub struct Will {
    /// As the broker sees it.
    pub topic: TopicName,
    /// The message.
    pub payload: Bytes,
    /// Quality of service.
    pub qos: QoS,
    /// Whether it stays for those who subscribe later.
    pub retain: bool,
}

/// How the broker is reached and used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tried in turn, at least one; a link that was lost begins with its last one.
    pub addresses: Vec<Address>,
    /// The version of MQTT.
    pub protocol: Protocol,
    /// What the client ids of the connections begin with.
    pub client_id: String,
    /// Connections, at least one; with MQTT 3.1.1 more may be opened.
    pub pool_size: usize,
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
    /// Bytes that may wait at one member, to be sent or to be acknowledged.
    pub outbox_max_bytes: usize,
    /// Messages that the broker may have unacknowledged towards one member.
    pub receive_maximum: u16,
    /// Largest packet accepted from the broker, bytes.
    pub max_packet_size: u32,
    /// First and longest pause before connecting again.
    pub reconnect: (Duration, Duration),
    /// User property with the publisher's client id.
    pub from_property: Option<String>,
    /// User property with the message's id.
    pub id_property: Option<String>,
    /// User property with the time of publishing.
    pub timestamp_property: Option<String>,
    /// Whether the trace that a message is part of is looked at.
    pub trace: bool,
    /// Said at each connection.
    pub will: Option<Will>,
    /// Whether the connection is one device's own: one of thousands, so that it holds no
    /// memory while it is idle, and writes no line above `debug`.
    pub own: bool,
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

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| {
            u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
        })
}
