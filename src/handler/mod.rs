//! The user's service, seen from a connection.
//!
//! What happens to a connection is an [`Event`]; how it travels to the handler is
//! an [`EventSink`]. There are two ways: a call for each event ([`client::Client`]), and
//! streams that carry the events of many connections ([`streaming::Streaming`]).
//!
//! ```text
//! streaming  many events on one call, and what is not known to be taken (ledger)
//! client     retries, deadlines, OnSocketCreated before anything else
//! call       one gRPC call, of either service
//! pool       the addresses of a handler, and which of them a connection is at (seat)
//! unary      one call with one message each way
//! link       a channel to one of them: up, down, or not serving (dial, health)
//! resolve    from the configuration's addresses to those that can be dialled
//! ```

mod call;
pub mod client;
mod dial;
mod health;
pub(crate) mod hot;
mod ledger;
pub mod link;
pub mod pool;
pub mod resolve;
mod seat;
mod status;
pub mod streaming;
mod unary;

pub use dial::Pings;

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use self::seat::{Member, Seat, Standing};
use crate::id::ConnId;
use crate::metrics::METHODS;
use crate::proto;
use crate::trace::Traceparent;

/// Something that happened to a connection, as its handler is told.
#[derive(Debug)]
pub enum Event {
    /// Always the first.
    SocketCreated(proto::ConnInfo),
    /// Bytes from the device.
    ReceivedBytes(Bytes),
    /// Messages of the connection's subscriptions, and the trace that they are part of.
    ReceivedMessages(Vec<proto::Message>, Option<Traceparent>),
    /// The keepalive timer ran out.
    TimerTimeout,
    /// Always the last; the text is the reason.
    SocketClosed(String),
}

impl Event {
    /// The name of its callback.
    pub fn method(&self) -> &'static str {
        METHODS
            .get(self.method_index())
            .copied()
            .unwrap_or_default()
    }

    /// About how many bytes it carries.
    pub fn size(&self) -> usize {
        let message = |m: &proto::Message| m.payload.len() + m.topic.len();
        match self {
            Self::ReceivedBytes(bytes) => bytes.len(),
            Self::ReceivedMessages(messages, _) => messages.iter().map(message).sum(),
            Self::SocketCreated(_) | Self::TimerTimeout | Self::SocketClosed(_) => 0,
        }
    }

    /// Its callback's place in [`crate::metrics::METHODS`].
    pub fn method_index(&self) -> usize {
        match self {
            Self::SocketCreated(_) => 0,
            Self::ReceivedBytes(_) => 1,
            Self::ReceivedMessages(..) => 2,
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

impl CallFailure {
    /// A metric's label.
    fn outcome(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "unavailable",
            Self::Failed { code, .. } => code,
        }
    }
}

/// The connection that an event is about.
///
/// It also keeps the time that the handler spends waiting in calls about this very
/// connection: for the broker's word, or for a device that takes nothing. That time
/// is not the handler's, who must not be blamed for it. And it knows which of its
/// handler's addresses the connection is at.
#[derive(Debug)]
pub struct Caller {
    /// The `conn` of the interface; written as text for each call.
    pub conn: ConnId,
    waits: Mutex<Waits>,
    seat: Mutex<Seat>,
    /// Events that wait for a stream.
    behind: AtomicUsize,
}

#[derive(Debug, Default)]
struct Waits {
    /// Calls that have not been answered.
    pending: usize,
    /// Since when there has been one.
    since: Option<Instant>,
    /// Time with at least one, those that go on not counted.
    total: Duration,
}

/// A call that waits, until it is dropped.
pub struct Waiting<'a>(&'a Caller);

impl Caller {
    /// A caller that waits for nothing.
    pub fn new(conn: ConnId) -> Self {
        Self {
            conn,
            waits: Mutex::default(),
            seat: Mutex::default(),
            behind: AtomicUsize::new(0),
        }
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        // No code under the lock can leave it half changed.
        self.seat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address that the connection is at, if it is at one.
    fn member(&self) -> Option<Arc<Member>> {
        self.seat().at.clone()
    }

    /// Whether the handler may know of it: OnSocketCreated was sent, and perhaps it came.
    pub fn may_be_known(&self) -> bool {
        self.seat().standing != Standing::New
    }

    /// Whether the handler was told of it at one address and then at another, where nothing of
    /// what it did before need be known.
    pub fn has_moved(&self) -> bool {
        self.seat().moved
    }

    /// Why there is nobody to tell.
    fn trouble(&self) -> String {
        let away = || "no address takes new connections".to_owned();
        self.member()
            .map_or_else(away, |member| member.link.trouble())
    }

    /// How many calls were answered at the address that it is at, for as long as its channel is
    /// the same.
    fn answers(&self) -> Option<u64> {
        Some(self.member()?.link.channel()?.answers())
    }

    /// Gives its place at an address up: there is nothing more to be told.
    fn leave(&self) {
        let left = std::mem::take(&mut *self.seat());
        drop(left);
    }

    /// The address that the handler was told of this connection at, as it is configured,
    /// and as it was dialled.
    pub fn address(&self) -> Option<(String, String)> {
        let member = self.member()?;
        let link = &member.link;
        Some((link.target().name.clone(), link.endpoint().to_string()))
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        // No code under the lock can leave it half changed.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks that a call of the handler about this connection waits.
    pub fn waiting(&self) -> Waiting<'_> {
        let mut waits = self.waits();
        waits.pending += 1;
        if waits.pending == 1 {
            waits.since = Some(Instant::now());
        }
        Waiting(self)
    }

    /// How long calls about this connection have waited, all in all.
    fn waited(&self) -> Duration {
        let waits = self.waits();
        waits.total + waits.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waits = self.0.waits();
        waits.pending -= 1;
        if waits.pending == 0
            && let Some(since) = waits.since.take()
        {
            waits.total += since.elapsed();
        }
    }
}

/// The way from one connection to its handler.
pub trait EventSink: Send + Sync {
    /// Hands over one event; resolves when the handler took it or will not.
    ///
    /// Events of one connection are handed over one at a time, which is what keeps
    /// them in order; where [`EventSink::window`] says so, several events with bytes and
    /// with messages. Those of one kind keep their order and end in it; all others are
    /// handed over when none is under way. Dropping the future abandons the event, if
    /// it is not on its way.
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>>;

    /// How many events with bytes or messages of one connection may be under way at this
    /// moment. Whoever finds more of its own under way waits until one ends. `joins` says
    /// that what waits meanwhile becomes one event, as bytes of a stream do.
    fn window(&self, caller: &Caller, joins: bool) -> usize {
        let _ = (caller, joins);
        1
    }
}

/// Chooses the way for each new connection.
pub trait Handlers: Send + Sync {
    /// The sink that the connection keeps for life.
    fn assign(&self) -> Arc<dyn EventSink>;
}
