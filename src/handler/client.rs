//! Events as gRPC calls, one for each: in order, and tried again while the handler
//! is away.
//!
//! A unary call and a client stream of one message are the same bytes on the wire,
//! so this speaks to `ConnectionUnaryHandler` and to `ConnectionHandler` alike.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes};
use futures_util::future::BoxFuture;
use http::uri::PathAndQuery;
use http::{HeaderMap, Uri};
use metrics::Gauge;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic::{Request, Status};
use tonic_prost::ProstDecoder;

use super::link::{Channel, Link};
use super::pool::{self, Pool};
use super::resolve::Directory;
use super::seat::{Member, Standing};
use super::status::{Miss, miss};
use super::streaming::{self, Streaming};
use super::{CallFailure, Caller, Event, EventSink, Handlers, trace, unary};
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
    /// Longest time for one callback.
    pub request_timeout: Duration,
    /// Longest time in which OnSocketClosed is tried.
    pub close_timeout: Duration,
    /// Longest outage that is borne; `None` without end, zero not at all.
    pub max_outage: Option<Duration>,
    /// Whether a call is repeated when nobody knows whether the handler took it.
    pub at_least_once: bool,
    /// Whether `request_timeout` is sent along.
    pub grpc_timeout: bool,
    /// Whether calls carry a trace id.
    pub trace_context: bool,
    /// How the addresses are used.
    pub pool: pool::Options,
    /// Streams that carry many events, if they are wanted. Only where connections stay
    /// at their address.
    pub streaming: Option<streaming::Options>,
}

/// The handler as one shard sees it.
#[derive(Clone)]
pub struct Client(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) options: Options,
    paths: [PathAndQuery; METHODS.len()],
    pool: Arc<Pool>,
    pub(super) metrics: HandlerMetrics,
    /// Cancelled when the gateway drains: nobody is waited for any more.
    pub(super) draining: CancellationToken,
}

/// An address to call, and the room for it.
type Turn = (Arc<Member>, OwnedSemaphorePermit);

impl Client {
    /// A client that reaches nobody until [`Client::run`] runs. `shard` is the number
    /// of the shard that it is for.
    ///
    /// # Errors
    /// A service name that cannot stand in a path.
    pub fn new(
        options: Options,
        directory: Arc<Directory>,
        metrics: HandlerMetrics,
        draining: CancellationToken,
        shard: usize,
    ) -> Result<Self, http::uri::InvalidUri> {
        let mut paths = [const { PathAndQuery::from_static("/") }; METHODS.len()];
        for (path, method) in paths.iter_mut().zip(METHODS) {
            *path = format!("/emqx.exproto.v1.{}/{method}", options.service).parse()?;
        }
        let pool = Pool::new(options.pool.clone(), directory, metrics.clone(), shard);
        Ok(Self(Arc::new(Shared {
            options,
            paths,
            pool,
            metrics,
            draining,
        })))
    }

    /// Keeps the channels to the handler's addresses up, for ever, with tasks of the
    /// runtime that it runs on.
    pub async fn run(self: Arc<Self>) {
        self.0.pool.clone().run().await;
    }

    /// Its addresses.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }
}

/// The sink of every connection; which address it is at is the caller's.
impl Handlers for Arc<Client> {
    fn assign(&self) -> Arc<dyn EventSink> {
        match &self.0.options.streaming {
            Some(_) => Arc::new(Streaming::new(Client::clone(self))),
            None => self.clone(),
        }
    }
}

impl EventSink for Client {
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>> {
        let shared = self.0.clone();
        Box::pin(async move { shared.deliver(&caller, &event).await })
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

/// Waits for room at an address.
async fn turn(member: Arc<Member>) -> Option<Turn> {
    // The semaphore is never closed.
    let permit = member.room.clone().acquire_owned().await.ok()?;
    Some((member, permit))
}

/// One more on a gauge, also when its work is abandoned.
struct Counted<'a>(&'a Gauge);

impl<'a> Counted<'a> {
    fn one(gauge: &'a Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

pub(super) fn late(limit: Duration) -> CallFailure {
    CallFailure::Failed {
        code: "DEADLINE_EXCEEDED",
        message: format!("no answer within {limit:?}"),
    }
}

/// What one event has met with so far.
struct Outage {
    give_up: Option<Instant>,
    /// Since when calls have failed at the address that the connection is at.
    missed: Option<Instant>,
    pause: Duration,
}

impl Shared {
    async fn deliver(&self, caller: &Caller, event: &Event) -> Result<(), CallFailure> {
        let method = event.method_index();
        let started = Instant::now();
        let in_flight = Counted::one(&self.metrics.in_flight);
        // Waiting for its turn is not the handler's time: of thousands that end
        // together each is told, and those who are late would break the channel
        // (HTTP/2 servers hang up on who cancels many calls at once).
        let turn = self.first_turn(caller, event).await;
        let persisting = self.persist(turn, caller, event);
        let is_last = matches!(event, Event::SocketClosed(_));
        let result = if is_last {
            let limit = self.options.close_timeout;
            timeout(limit, persisting)
                .await
                .unwrap_or_else(|_| Err(late(limit)))
        } else {
            persisting.await
        };
        drop(in_flight);
        match &result {
            Ok(()) => self.metrics.succeeded(method, started.elapsed()),
            Err(failure) => {
                self.metrics.failed(method, failure.outcome());
                if is_last {
                    self.metrics.closed_lost.increment(1);
                }
            }
        }
        if is_last {
            caller.leave();
        }
        result
    }

    /// Makes one call for an event that others count.
    pub(super) async fn call_alone(
        &self,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), CallFailure> {
        let turn = self.first_turn(caller, event).await;
        self.persist(turn, caller, event).await
    }

    /// Makes one call with many requests, encoded, which ends with their channel.
    pub(super) async fn stream(
        &self,
        link: &Link,
        method: usize,
        mut requests: UnboundedReceiver<Bytes>,
    ) -> Result<(), Status> {
        let Some(channel) = link.channel() else {
            return Err(super::link::not_sent(link.trouble()));
        };
        let Some(path) = self.paths.get(method).cloned() else {
            return Err(Status::internal("no such callback"));
        };
        let heard = channel.clone();
        let mut grpc = Grpc::with_origin(channel, link.origin());
        grpc.ready().await?;
        let requests = futures_util::stream::poll_fn(move |cx| requests.poll_recv(cx));
        grpc.client_streaming(Request::new(requests), path, Encoded)
            .await?;
        heard.answered();
        Ok(())
    }

    /// The turn at the connection's address, if that is there.
    async fn first_turn(&self, caller: &Caller, event: &Event) -> Option<Turn> {
        match self.pool.place(caller, event, None) {
            Some(member) => turn(member).await,
            None => None,
        }
    }

    /// Calls until the handler takes the event, refuses it, or has been away for
    /// longer than is borne. The first call is made in the turn that was waited for.
    async fn persist(
        &self,
        mut turn: Option<Turn>,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), CallFailure> {
        let mut outage: Option<(Outage, Counted<'_>)> = None;
        loop {
            let called = turn.is_some();
            let trouble = match &turn {
                // Only a call takes room, not the wait for a handler that is away.
                Some((member, _room)) => match self.tell(member, caller, event).await {
                    Ok(()) => return Ok(()),
                    Err(Miss::Refused(failure)) => return Err(failure),
                    Err(Miss::Away { sent: true, why }) if !self.options.at_least_once => {
                        return Err(CallFailure::Unavailable(why));
                    }
                    Err(Miss::Away { why, .. }) => why,
                },
                None => caller.trouble(),
            };
            drop(turn.take());
            let (outage, _held) = outage.get_or_insert_with(|| {
                let now = Instant::now();
                let outage = Outage {
                    give_up: self.options.max_outage.map(|limit| now + limit),
                    missed: None,
                    pause: PAUSES.0,
                };
                (outage, Counted::one(&self.metrics.held))
            });
            if called {
                outage.missed.get_or_insert_with(Instant::now);
            }
            let give_up = outage.give_up;
            let chance = self.chance(called, caller, event, outage);
            let chance = async {
                match give_up {
                    Some(instant) => timeout_at(instant, chance).await.ok(),
                    None => Some(chance.await),
                }
            };
            let chance = tokio::select! {
                // A gateway that drains waits for nobody.
                biased;
                () = self.draining.cancelled() => None,
                chance = chance => chance,
            };
            let Some(member) = chance else {
                return Err(CallFailure::Unavailable(trouble));
            };
            self.metrics.retried.increment(1);
            turn = self::turn(member).await;
        }
    }

    /// Waits for an address that the event can be told to.
    async fn chance(
        &self,
        called: bool,
        caller: &Caller,
        event: &Event,
        outage: &mut Outage,
    ) -> Arc<Member> {
        let mut changes = self.pool.changes();
        if called && caller.member().is_some_and(|m| m.link.is_up()) {
            sleep(outage.pause).await;
            outage.pause = (outage.pause * 2).min(PAUSES.1);
        }
        loop {
            let before = caller.member();
            if let Some(member) = self.pool.place(caller, event, outage.missed) {
                if before.is_some_and(|before| !Arc::ptr_eq(&before, &member)) {
                    outage.missed = None;
                }
                return member;
            }
            let moves_at = before.and_then(|m| self.pool.moves_at(&m, outage.missed));
            let due = async {
                match moves_at.filter(|at| *at > Instant::now()) {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives in the pool, so this cannot fail.
                _ = changes.changed() => {}
                () = due => {}
            }
        }
    }

    /// Tells the handler at an address; of the connection first, where it may not know
    /// of it.
    async fn tell(&self, member: &Member, caller: &Caller, event: &Event) -> Result<(), Miss> {
        let link = &member.link;
        let Some(channel) = link.channel() else {
            return Err(Miss::Away {
                sent: false,
                why: link.trouble(),
            });
        };
        match event {
            Event::SocketCreated(conninfo) => {
                self.introduce(link, channel, caller, event).await?;
                if self.options.pool.failover_after.is_some() {
                    caller.seat().conninfo = Some(Box::new(conninfo.clone()));
                }
                return Ok(());
            }
            Event::SocketClosed(_) if caller.seat().standing == Standing::New => {
                // Those who knew of it are away for good: nobody waits for this word.
                return Err(Miss::Refused(CallFailure::Unavailable(
                    "the connection was moving to another address".to_owned(),
                )));
            }
            Event::SocketClosed(_) => {}
            _ if caller.seat().standing == Standing::Known => {}
            _ => {
                let conninfo = caller.seat().conninfo.as_deref().cloned();
                let created = Event::SocketCreated(conninfo.unwrap_or_default());
                let started = Instant::now();
                let introduced = self.introduce(link, channel.clone(), caller, &created);
                introduced.await?;
                let method = created.method_index();
                self.metrics.succeeded(method, started.elapsed());
            }
        }
        self.attempt(link, channel, caller, event).await
    }

    /// OnSocketCreated.
    async fn introduce(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        created: &Event,
    ) -> Result<(), Miss> {
        let result = self.attempt(link, channel, caller, created).await;
        caller.seat().standing = match &result {
            // Who refuses it knows of it: OnSocketClosed is to follow.
            Ok(()) | Err(Miss::Refused(_)) => Standing::Known,
            Err(Miss::Away { sent: true, .. }) => Standing::Sent,
            Err(Miss::Away { sent: false, .. }) => return result,
        };
        result
    }

    /// One call. Time that the handler spends waiting for us is not the handler's.
    async fn attempt(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        event: &Event,
    ) -> Result<(), Miss> {
        let limit = self.options.request_timeout;
        let (started, waited) = (Instant::now(), caller.waited());
        let (heard, answers) = (channel.clone(), channel.answers());
        let mut deadline = started + limit;
        let mut call = std::pin::pin!(self.call(link, channel, caller, event));
        loop {
            match timeout_at(deadline, &mut call).await {
                Ok(Ok(())) => {
                    heard.answered();
                    return Ok(());
                }
                Ok(Err(status)) => {
                    let miss = miss(&status);
                    if matches!(miss, Miss::Refused(_)) {
                        heard.answered();
                    }
                    return Err(miss);
                }
                Err(_) => {
                    let wait = (caller.waited() - waited).min(MAX_WAIT);
                    let extended = started + limit + wait;
                    if extended <= Instant::now() {
                        if heard.answers() == answers {
                            heard.doubt();
                        }
                        return Err(Miss::Refused(late(limit)));
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
        let encoded = match event {
            Event::SocketCreated(conninfo) => unary::request(&proto::SocketCreatedRequest {
                conn,
                conninfo: Some(conninfo.clone()),
            }),
            Event::ReceivedBytes(bytes) => unary::request(&proto::ReceivedBytesRequest {
                conn,
                bytes: bytes.clone(),
            }),
            Event::ReceivedMessages(messages) => unary::messages(&conn, messages),
            Event::TimerTimeout => unary::request(&proto::TimerTimeoutRequest {
                conn,
                r#type: proto::TimerType::Keepalive.into(),
            }),
            Event::SocketClosed(reason) => unary::request(&proto::SocketClosedRequest {
                conn,
                reason: reason.clone(),
            }),
        };
        let Some(path) = self.paths.get(method).cloned() else {
            return Err(Status::internal("no such callback"));
        };
        let mut parts = link.origin().into_parts();
        parts.path_and_query = Some(path);
        let uri = Uri::from_parts(parts).map_err(|error| Status::internal(error.to_string()))?;
        unary::call(channel, uri, self.headers(method), encoded).await
    }

    /// What a call has beside gRPC's own headers.
    fn headers(&self, method: usize) -> HeaderMap {
        let mut request = Request::new(());
        if self.options.grpc_timeout {
            request.set_timeout(self.options.request_timeout);
        }
        if self.options.trace_context
            && let Some(parent) = trace::parent()
        {
            tracing::debug!(callback = METHODS.get(method), traceparent = ?parent, "calling");
            request.metadata_mut().insert(trace::KEY, parent);
        }
        request.into_parts().0.into_headers()
    }
}
