//! The user's service, seen from a connection.
//!
//! What happens to a connection is an [`Event`]; how it travels to the handler is
//! an [`EventSink`]. Today there is one way, a call for each event
//! ([`client::Client`]) over a channel that a task keeps connected
//! ([`link::Link`]).

pub mod client;
pub mod link;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::proto;

/// Something that happened to a connection, as its handler is told.
#[derive(Debug)]
pub enum Event {
    /// Always the first.
    SocketCreated(proto::ConnInfo),
    /// Bytes from the device.
    ReceivedBytes(Bytes),
    /// Messages of the connection's subscriptions.
    ReceivedMessages(Vec<proto::Message>),
    /// The keepalive timer ran out.
    TimerTimeout,
    /// Always the last; the text is the reason.
    SocketClosed(String),
}

impl Event {
    /// Its callback's place in [`crate::metrics::METHODS`].
    pub fn method_index(&self) -> usize {
        match self {
            Self::SocketCreated(_) => 0,
            Self::ReceivedBytes(_) => 1,
            Self::ReceivedMessages(_) => 2,
            Self::TimerTimeout => 3,
            Self::SocketClosed(_) => 4,
        }
    }
}

/// Why a handler did not take an event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallFailure {
    /// It could not be reached for as long as that is borne.
    #[error("the handler is unavailable: {0}")]
    Unavailable(String),
    /// It answered with an error, or not in time.
    #[error("the handler answered {code}: {message}")]
    Failed {
        /// The gRPC status code's name.
        code: &'static str,
        /// The status message.
        message: String,
    },
}

/// The connection that an event is about.
#[derive(Debug)]
pub struct Caller {
    /// The `conn` of the interface.
    pub conn: String,
    /// Set while the device takes nothing of what was sent to it: a handler that
    /// waits in `Send` cannot answer, and must not be blamed for it.
    pub device_stalled: AtomicBool,
}

impl Caller {
    /// A caller whose device takes what it is sent.
    pub fn new(conn: String) -> Self {
        Self {
            conn,
            device_stalled: AtomicBool::new(false),
        }
    }

    fn is_stalled(&self) -> bool {
        self.device_stalled.load(Ordering::Relaxed)
    }
}

/// The way from one connection to its handler.
pub trait EventSink: Send + Sync {
    /// Hands over one event; resolves when the handler took it or will not.
    ///
    /// Events of one connection are handed over one at a time, which is what keeps
    /// them in order. Dropping the future abandons the event.
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>>;
}

/// Chooses the way for each new connection.
pub trait Handlers: Send + Sync {
    /// The sink that the connection keeps for life.
    fn assign(&self) -> Arc<dyn EventSink>;
}
