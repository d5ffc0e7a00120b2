//! Received bytes and messages over long-lived client streams, for throughput: one
//! stream for each of the two callbacks and channel, shared by all connections.
//!
//! A message costs a tenth of a call (`cargo bench --bench streams`). What is paid for
//! it is in the table of `docs/handlers.md`: bytes and messages of one connection are no
//! longer in order with each other, and a slow handler slows down everybody on the
//! channel.
//!
//! OnSocketCreated, OnTimerTimeout and OnSocketClosed stay streams of one message
//! ([`super::client`]): the first is answered before bytes go out, the others go out
//! when everything before them is answered.
//!
//! One task for each kind and channel, begun with the first event, runs a
//! `Ledger`, which decides; it opens the streams, writes, and tells the connections
//! what became of their events.

mod lane;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use prost::Message;
use tokio::sync::{mpsc, oneshot};

use super::client::Client;
use super::{CallFailure, Caller, Event, EventSink};
use crate::metrics::HandlerMetrics;
use crate::proto;
use crate::trace::Traceparent;
use lane::Lane;

/// Events of one kind of one connection that may be under way. With a stream that
/// ends every five milliseconds it allows some ten thousand datagrams a second.
///
/// A connection whose bytes can be joined gets no further than to the first event that
/// has to wait for a stream: what comes then is better off in the kernel, for it makes one
/// event, and a connection that has much to say does not have all of it in pieces on
/// each stream.
pub const WINDOW: usize = 64;

/// Events under way on one channel from which on a connection may have only one: what
/// a slow handler has not taken takes memory.
const MAX_EVENTS: usize = 8 * 1024;

/// The same for their bytes.
const MAX_BYTES: usize = 8 * 1024 * 1024;

/// When a stream ends.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most messages on it.
    pub max_messages: usize,
    /// Most bytes on it; a larger message has a stream of its own.
    pub max_bytes: usize,
    /// How long it is written to.
    pub max_age: Duration,
    /// Whether what was on a stream that broke is sent again. If not, its connections
    /// are closed, for nobody knows what the handler took.
    pub at_least_once: bool,
}

/// A handler with streams.
pub struct Streaming {
    client: Client,
}

/// The streams to one address.
pub(super) struct Lanes {
    tasks: [Mutex<Option<mpsc::UnboundedSender<Entry>>>; 2],
    load: Arc<Load>,
}

/// What is under way on a channel.
struct Load {
    events: AtomicUsize,
    bytes: AtomicUsize,
    metrics: HandlerMetrics,
}

/// An event on its way.
struct Entry {
    caller: Arc<Caller>,
    /// The request as it is sent; kept until it is known to be taken.
    request: Bytes,
    /// What it is part of, where it is tried alone.
    trace: Option<Traceparent>,
    done: oneshot::Sender<Result<(), CallFailure>>,
    handed: Instant,
    /// How long calls about the connection had waited when it was written.
    waited: Duration,
    held: Held,
    /// While it waits for a stream.
    behind: Option<Behind>,
}

/// An event that waits for a stream, as its connection sees it.
struct Behind(Arc<Caller>);

impl Behind {
    fn new(caller: &Arc<Caller>) -> Self {
        caller.behind.fetch_add(1, Ordering::Relaxed);
        Self(caller.clone())
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.0.behind.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An entry's part of the load, until it is dropped.
struct Held {
    load: Arc<Load>,
    bytes: usize,
}

impl Held {
    fn new(load: &Arc<Load>, bytes: usize) -> Self {
        load.events.fetch_add(1, Ordering::Relaxed);
        load.bytes.fetch_add(bytes, Ordering::Relaxed);
        load.metrics.in_flight.increment(1.0);
        load.metrics.unacknowledged.increment(1.0);
        let load = load.clone();
        Self { load, bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.load.events.fetch_sub(1, Ordering::Relaxed);
        self.load.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.load.metrics.in_flight.decrement(1.0);
        self.load.metrics.unacknowledged.decrement(1.0);
    }
}

impl Lanes {
    pub(super) fn new(metrics: HandlerMetrics) -> Self {
        Self {
            tasks: Default::default(),
            load: Arc::new(Load {
                events: AtomicUsize::new(0),
                bytes: AtomicUsize::new(0),
                metrics,
            }),
        }
    }

    /// Hands an entry to the task of its kind, which is begun where there is none. The
    /// queue has no bound of its own: a connection may hand over [`WINDOW`] events, and
    /// one when all connections together have handed over too much.
    fn enqueue(&self, begin: impl FnOnce() -> Lane, kind: Kind, entry: Entry) {
        let [bytes, messages] = &self.tasks;
        let lane = match kind {
            Kind::Bytes => bytes,
            Kind::Messages => messages,
        };
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match &*lane {
            Some(sender) => match sender.send(entry) {
                Ok(()) => return,
                Err(unsent) => unsent.0,
            },
            None => entry,
        };
        let (sender, entries) = mpsc::unbounded_channel();
        // It is received by the task below, or its end is told by being dropped.
        let _ = sender.send(entry);
        *lane = Some(sender);
        tokio::spawn(begin().run(entries));
    }
}

impl Streaming {
    /// Over the channels of this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }
}

impl EventSink for Streaming {
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>> {
        // The streams are those to the address that took OnSocketCreated.
        let (Some(member), Some(options)) = (caller.member(), &self.client.0.options.streaming)
        else {
            return self.client.deliver(caller, event);
        };
        let conn = caller.conn;
        let trace = match &event {
            Event::ReceivedMessages(_, trace) => *trace,
            _ => None,
        };
        let (kind, request) = match event {
            Event::ReceivedBytes(bytes) => {
                let conn = conn.text();
                let request = proto::ReceivedBytesRequest { conn, bytes };
                (Kind::Bytes, request.encode_to_vec())
            }
            Event::ReceivedMessages(messages, _) => {
                let conn = conn.text();
                let request = proto::ReceivedMessagesRequest { conn, messages };
                (Kind::Messages, request.encode_to_vec())
            }
            event => return self.client.deliver(caller, event),
        };
        let (done, ended) = oneshot::channel();
        let held = Held::new(&member.lanes.load, request.len());
        let entry = Entry {
            caller,
            request: request.into(),
            trace,
            done,
            handed: Instant::now(),
            waited: Duration::ZERO,
            held,
            behind: None,
        };
        let begin = || Lane::new(self.client.clone(), member.link.clone(), kind, options);
        member.lanes.enqueue(begin, kind, entry);
        Box::pin(async move {
            let gone = || CallFailure::Unavailable("the streams have ended".to_owned());
            ended.await.unwrap_or_else(|_| Err(gone()))
        })
    }

    fn window(&self, caller: &Caller, joins: bool) -> usize {
        if joins && caller.behind.load(Ordering::Relaxed) > 0 {
            return 1;
        }
        let Some(member) = caller.member() else {
            return 1;
        };
        let load = &member.lanes.load;
        let events = load.events.load(Ordering::Relaxed);
        let bytes = load.bytes.load(Ordering::Relaxed);
        if events < MAX_EVENTS && bytes < MAX_BYTES {
            WINDOW
        } else {
            1
        }
    }
}

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bytes,
    Messages,
}

impl Kind {
    /// See [`crate::metrics::METHODS`].
    fn method(self) -> usize {
        match self {
            Self::Bytes => 1,
            Self::Messages => 2,
        }
    }

    /// The event of a request.
    fn event(
        self,
        request: Bytes,
        trace: Option<Traceparent>,
    ) -> Result<Event, prost::DecodeError> {
        Ok(match self {
            Self::Bytes => {
                Event::ReceivedBytes(proto::ReceivedBytesRequest::decode(request)?.bytes)
            }
            Self::Messages => {
                let request = proto::ReceivedMessagesRequest::decode(request)?;
                Event::ReceivedMessages(request.messages, trace)
            }
        })
    }
}
