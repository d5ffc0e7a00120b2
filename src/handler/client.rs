//! Events as gRPC calls, one for each: in order, and tried again while the handler
//! is away.
//!
//! A unary call and a client stream of one message are the same bytes on the wire,
//! so this speaks to `ConnectionUnaryHandler` and to `ConnectionHandler` alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic::{Code, Request, Status};
use tonic_prost::{ProstCodec, ProstDecoder};

use super::link::{Channel, Link};
use super::streaming::{self, Streaming};
use super::{CallFailure, Caller, Event, EventSink, Handlers};
use crate::metrics::{HandlerMetrics, METHODS};
use crate::proto;

/// First and longest pause before a callback that the handler answered with
/// UNAVAILABLE is sent again.
pub(super) const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Most time for which a handler that waits for us is not blamed, in one callback.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(120);

/// How events are delivered.
#[derive(Clone, Debug)]
pub struct Options {
    /// The gRPC service: `ConnectionUnaryHandler` or `ConnectionHandler`.
    pub service: &'static str,
    /// Most callbacks under way at each address at a time.
    pub max_in_flight: usize,
    /// Longest time for one callback.
    pub request_timeout: Duration,
    /// Longest time in which OnSocketClosed is tried.
    pub close_timeout: Duration,
    /// Longest outage that is borne; `None` without end, zero not at all.
    pub max_outage: Option<Duration>,
    /// Streams that carry many events, if they are wanted.
    pub streaming: Option<streaming::Options>,
}

pub(super) struct Shared {
    pub(super) options: Options,
    paths: [PathAndQuery; METHODS.len()],
    pub(super) metrics: HandlerMetrics,
    /// Cancelled when the gateway drains: nobody is waited for any more.
    pub(super) draining: CancellationToken,
}

/// The handler as one shard sees it: a link for each address, new connections in
/// turn over those that are up.
pub struct Pool {
    clients: Vec<(Arc<Client>, Arc<dyn EventSink>)>,
    next: AtomicUsize,
}

/// One address of the handler.
pub struct Client {
    pub(super) link: Arc<Link>,
    /// Room for callbacks, given in turn.
    room: Arc<Semaphore>,
    pub(super) shared: Arc<Shared>,
}

impl Pool {
    /// A pool over links that run already. `links` must not be empty.
    ///
    /// # Errors
    /// A service name that cannot stand in a path.
    pub fn new(
        links: Vec<Arc<Link>>,
        options: Options,
        metrics: HandlerMetrics,
        draining: CancellationToken,
    ) -> Result<Self, http::uri::InvalidUri> {
        let mut paths = [const { PathAndQuery::from_static("/") }; METHODS.len()];
        for (path, method) in paths.iter_mut().zip(METHODS) {
            *path = format!("/emqx.exproto.v1.{}/{method}", options.service).parse()?;
        }
        let shared = Arc::new(Shared {
            options,
            paths,
            metrics,
            draining,
        });
        let clients = links
            .into_iter()
            .map(|link| {
                let client = Arc::new(Client {
                    link,
                    room: Arc::new(Semaphore::new(shared.options.max_in_flight)),
                    shared: shared.clone(),
                });
                let sink: Arc<dyn EventSink> = match &shared.options.streaming {
                    Some(options) => Arc::new(Streaming::new(client.clone(), options.clone())),
                    None => client.clone(),
                };
                (client, sink)
            })
            .collect();
        Ok(Self {
            clients,
            next: AtomicUsize::new(0),
        })
    }
}

impl Handlers for Pool {
    fn assign(&self) -> Arc<dyn EventSink> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.clients.len().max(1);
        let in_turn = (0..count).filter_map(|i| self.clients.get((turn + i) % count));
        let mut in_turn = in_turn.peekable();
        let first = in_turn.peek().copied();
        let chosen = in_turn.find(|(client, _)| client.link.is_up()).or(first);
        match chosen {
            Some((_, sink)) => sink.clone(),
            None => Arc::new(Nowhere),
        }
    }
}

/// The handler of an empty list, which the configuration does not allow.
struct Nowhere;

impl EventSink for Nowhere {
    fn deliver(&self, _: Arc<Caller>, _: Event) -> BoxFuture<'static, Result<(), CallFailure>> {
        let failure = CallFailure::Unavailable("no address".to_owned());
        Box::pin(std::future::ready(Err(failure)))
    }
}

impl EventSink for Client {
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>> {
        let (link, room) = (self.link.clone(), self.room.clone());
        let shared = self.shared.clone();
        Box::pin(async move {
            let method = event.method_index();
            let started = Instant::now();
            shared.metrics.in_flight.increment(1.0);
            let in_flight = InFlight(&shared.metrics);
            // Waiting for its turn is not the handler's time: of thousands that end
            // together each is told, and those who are late would break the channel
            // (HTTP/2 servers hang up on who cancels many calls at once).
            let turn = room.acquire().await;
            let persisting = shared.persist(turn, &link, &room, &caller, &event);
            let result = if matches!(event, Event::SocketClosed(_)) {
                let limit = shared.options.close_timeout;
                timeout(limit, persisting)
                    .await
                    .unwrap_or_else(|_| Err(late(limit)))
            } else {
                persisting.await
            };
            drop(in_flight);
            match &result {
                Ok(()) => shared.metrics.succeeded(method, started.elapsed()),
                Err(failure) => {
                    shared.metrics.failed(method, failure.outcome());
                    if matches!(event, Event::SocketClosed(_)) {
                        shared.metrics.closed_lost.increment(1);
                    }
                }
            }
            result
        })
    }
}

impl Client {
    /// Makes one call for an event that others count.
    pub(super) async fn call_alone(
        &self,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), CallFailure> {
        let (link, room) = (&self.link, &self.room);
        let turn = room.acquire().await;
        self.shared.persist(turn, link, room, caller, event).await
    }

    /// Makes one call with many requests, encoded, which ends with their channel.
    pub(super) async fn stream(
        self: Arc<Self>,
        method: usize,
        mut requests: UnboundedReceiver<Bytes>,
    ) -> Result<(), Status> {
        let Some(channel) = self.link.channel() else {
            return Err(Status::unavailable(self.link.trouble()));
        };
        let Some(path) = self.shared.paths.get(method).cloned() else {
            return Err(Status::internal("no such callback"));
        };
        let mut grpc = Grpc::with_origin(channel, self.link.origin());
        grpc.ready().await?;
        let requests = futures_util::stream::poll_fn(move |cx| requests.poll_recv(cx));
        grpc.client_streaming(Request::new(requests), path, Encoded)
            .await
            .map(drop)
    }
}

/// Requests that are encoded already.
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = proto::EmptySuccess;
    type Encoder = Self;
    type Decoder = ProstDecoder<proto::EmptySuccess>;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::default()
    }
}

impl Encoder for Encoded {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

/// Takes a callback off the gauge also when it is abandoned.
struct InFlight<'a>(&'a HandlerMetrics);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.decrement(1.0);
    }
}

pub(super) fn late(limit: Duration) -> CallFailure {
    CallFailure::Failed {
        code: "DEADLINE_EXCEEDED",
        message: format!("no answer within {limit:?}"),
    }
}

impl Shared {
    /// Calls until the handler takes the event, refuses it, or has been away for
    /// longer than is borne. The first call is made in the turn that was waited for.
    async fn persist(
        &self,
        turn: Result<SemaphorePermit<'_>, AcquireError>,
        link: &Link,
        room: &Semaphore,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), CallFailure> {
        let mut pause = PAUSES.0;
        let mut give_up: Option<Option<Instant>> = None;
        let mut first_turn = Some(turn);
        loop {
            // Only a call takes room, not the wait for a handler that is away. The
            // semaphore is never closed.
            let turn = match first_turn.take() {
                Some(turn) => turn,
                None => room.acquire().await,
            };
            let trouble = match link.channel() {
                Some(channel) => match self.attempt(link, channel, caller, event).await {
                    Err(CallFailure::Unavailable(trouble)) => trouble,
                    done => return done,
                },
                None => link.trouble(),
            };
            drop(turn);
            let give_up = *give_up.get_or_insert_with(|| {
                let limit = self.options.max_outage?;
                Some(Instant::now() + limit)
            });
            let wait = async {
                if link.is_up() {
                    tokio::time::sleep(pause).await;
                } else {
                    link.up().await;
                }
            };
            let waited = async {
                match give_up {
                    Some(instant) => timeout_at(instant, wait).await.is_ok(),
                    None => {
                        wait.await;
                        true
                    }
                }
            };
            let again = tokio::select! {
                // A gateway that drains waits for nobody.
                biased;
                () = self.draining.cancelled() => false,
                again = waited => again,
            };
            if !again {
                return Err(CallFailure::Unavailable(trouble));
            }
            self.metrics.retried.increment(1);
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// One call. Time that the handler spends waiting for us is not the handler's.
    async fn attempt(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), CallFailure> {
        let limit = self.options.request_timeout;
        let (started, waited) = (Instant::now(), caller.waited());
        let mut deadline = started + limit;
        let mut call = std::pin::pin!(self.call(link, channel, caller, event));
        loop {
            match timeout_at(deadline, &mut call).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(status)) => return Err(failure(&status)),
                Err(_) => {
                    let wait = (caller.waited() - waited).min(MAX_WAIT);
                    let extended = started + limit + wait;
                    if extended <= Instant::now() {
                        return Err(late(limit));
                    }
                    deadline = extended;
                }
            }
        }
    }

    async fn call(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), Status> {
        let conn = caller.conn.text();
        let method = event.method_index();
        match event {
            Event::SocketCreated(conninfo) => {
                let conninfo = Some(conninfo.clone());
                let request = proto::SocketCreatedRequest { conn, conninfo };
                self.unary(link, channel, method, request).await
            }
            Event::ReceivedBytes(bytes) => {
                let bytes = bytes.clone();
                let request = proto::ReceivedBytesRequest { conn, bytes };
                self.unary(link, channel, method, request).await
            }
            Event::ReceivedMessages(messages) => {
                let messages = messages.clone();
                let request = proto::ReceivedMessagesRequest { conn, messages };
                self.unary(link, channel, method, request).await
            }
            Event::TimerTimeout => {
                let r#type = proto::TimerType::Keepalive.into();
                let request = proto::TimerTimeoutRequest { conn, r#type };
                self.unary(link, channel, method, request).await
            }
            Event::SocketClosed(reason) => {
                let reason = reason.clone();
                let request = proto::SocketClosedRequest { conn, reason };
                self.unary(link, channel, method, request).await
            }
        }
    }

    async fn unary<M: prost::Message + Default + 'static>(
        &self,
        link: &Link,
        channel: Channel,
        method: usize,
        message: M,
    ) -> Result<(), Status> {
        let Some(path) = self.paths.get(method) else {
            return Err(Status::internal("no such callback"));
        };
        let mut grpc = Grpc::with_origin(channel, link.origin());
        grpc.ready().await?;
        let codec = ProstCodec::<M, proto::EmptySuccess>::default();
        grpc.unary(Request::new(message), path.clone(), codec)
            .await
            .map(drop)
    }
}

pub(super) fn failure(status: &Status) -> CallFailure {
    // A status with a cause was made on this side: the channel broke in the middle
    // of an answer.
    let broke = std::error::Error::source(status).is_some();
    if broke || status.code() == Code::Unavailable {
        CallFailure::Unavailable(status.message().to_owned())
    } else {
        CallFailure::Failed {
            code: code_name(status.code()),
            message: status.message().to_owned(),
        }
    }
}

/// The name of a gRPC status code as the gRPC documents spell it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
