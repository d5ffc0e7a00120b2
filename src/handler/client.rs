//! Events as gRPC calls, one for each: in order, and tried again while the handler
//! is away.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::call::{self, Calls, late};
use super::link::{Channel, Link};
use super::pool::{self, Pool};
use super::resolve::Directory;
use super::seat::{Member, Standing};
use super::status::{Away, Miss};
use super::streaming::{self, Streaming};
use super::{CallFailure, Caller, Event, EventSink, Handlers};
use crate::metrics::{Counted, HandlerMetrics};
use crate::numbers::jitter;
use crate::proto::code_name;

/// First and longest pause, half of it or more, before a callback that the handler answered with
/// UNAVAILABLE is sent again, or one that has broken its channel twice.
pub(super) const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How events are delivered.
#[derive(Clone, Debug)]
pub struct Options {
    /// The gRPC service: `ConnectionUnaryHandler` or `ConnectionHandler`.
    pub service: &'static str,
    /// What to set where a handler offers the other one, for the log.
    pub service_advice: String,
    /// Longest time for one callback.
    pub request_timeout: Duration,
    /// Longest time in which OnSocketClosed is tried.
    pub close_timeout: Duration,
    /// What is done while the handler is away.
    pub on_unavailable: OnUnavailable,
    /// Whether a call is repeated when nobody knows whether the handler took it.
    pub at_least_once: bool,
    /// Whether `request_timeout` is sent along.
    pub grpc_timeout: bool,
    /// Whether calls carry a `traceparent`.
    pub trace_context: bool,
    /// How the addresses are used.
    pub pool: pool::Options,
    /// Streams that carry many events, if they are wanted. Only where connections stay
    /// at their address.
    pub streaming: Option<streaming::Options>,
}

/// What is done with a connection whose handler is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnavailable {
    /// Its callbacks are tried again for so long, or without end.
    Hold(Option<Duration>),
    /// It is closed as soon as that shows: the handler says UNAVAILABLE, or its channel is gone
    /// and cannot be made anew, at once or within this time.
    Close(Duration),
}

impl OnUnavailable {
    /// For how long a callback is tried again, if that has an end.
    fn limit(self) -> Option<Duration> {
        match self {
            Self::Hold(limit) => limit,
            Self::Close(limit) => Some(limit),
        }
    }

    /// Whether nobody waits for a handler that is away.
    pub(super) fn closes(self) -> bool {
        matches!(self, Self::Close(_))
    }
}

/// The handler as one shard sees it.
#[derive(Clone)]
pub struct Client(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub(super) options: Options,
    pub(super) calls: Calls,
    pool: Arc<Pool>,
    pub(super) metrics: HandlerMetrics,
    /// Cancelled when the gateway drains: nobody is waited for any more.
    pub(super) draining: CancellationToken,
}

/// An address to call, and the room for it.
struct Turn {
    member: Arc<Member>,
    /// None where it is gone again.
    channel: Option<Channel>,
    _room: OwnedSemaphorePermit,
    /// Where the handler allows only so many calls.
    _call: Option<OwnedSemaphorePermit>,
}

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
        let calls = Calls::new(call::Options {
            service: options.service,
            request_timeout: options.request_timeout,
            grpc_timeout: options.grpc_timeout,
            trace_context: options.trace_context,
        })?;
        let pool = Pool::new(options.pool.clone(), directory, metrics.clone(), shard);
        Ok(Self(Arc::new(Shared {
            options,
            calls,
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

    /// Calls `forsaken` whenever connections may have lost their handler, for ever, where such
    /// connections are closed; [`Client::has_forsaken`] says of each whether it has.
    pub async fn watch(&self, mut forsaken: impl FnMut()) {
        if !self.0.options.on_unavailable.closes() {
            return;
        }
        let mut changes = self.0.pool.changes();
        // The sender lives in the pool, so this cannot fail.
        while changes.changed().await.is_ok() {
            forsaken();
        }
    }

    /// Whether there is nobody who could be told of a connection.
    pub fn has_forsaken(&self, caller: &Caller) -> bool {
        self.0.pool.is_hopeless(caller)
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

/// Waits for room at an address.
async fn turn(member: Arc<Member>) -> Option<Turn> {
    // The semaphore is never closed.
    let room = member.room.clone().acquire_owned().await.ok()?;
    loop {
        let channel = member.link.channel();
        let call = match &channel {
            Some(channel) => channel.turn().await,
            None => None,
        };
        // Who waited may have waited for one that was given up meanwhile.
        let waited = channel.as_ref().filter(|_| call.is_some());
        let is_old = |channel: &Channel| !member.link.channel().is_some_and(|now| now.is(channel));
        if !waited.is_some_and(is_old) {
            return Some(Turn {
                member,
                channel,
                _room: room,
                _call: call,
            });
        }
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
        let is_last = matches!(event, Event::SocketClosed(_));
        let result = if is_last {
            self.say_farewell(caller, event).await
        } else {
            self.call_alone(caller, event).await
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

    /// The last word to a handler about a connection.
    ///
    /// Waiting for its turn is not the handler's time: of thousands that end together each is
    /// told, and those who are late would break the channel (HTTP/2 servers hang up on who
    /// cancels many calls at once). But it waits only for as long as the handler answers anything.
    async fn say_farewell(&self, caller: &Caller, event: &Event) -> Result<(), CallFailure> {
        let limit = self.options.close_timeout;
        let is_late = || late(limit);
        let mut first_turn = pin!(self.first_turn(caller, event));
        let turn = loop {
            let answers = caller.answers();
            match timeout(limit, &mut first_turn).await {
                Ok(turn) => break turn,
                Err(_) if caller.answers() == answers => return Err(is_late()),
                Err(_) => {}
            }
        };
        let persisting = self.persist(turn, caller, event);
        timeout(limit, persisting)
            .await
            .unwrap_or_else(|_| Err(is_late()))
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
        let mut broke = false;
        loop {
            let mut met = None;
            let trouble = match &mut turn {
                // Only a call takes room, not the wait for a handler that is away.
                Some(turn) => match self.tell(turn, caller, event).await {
                    Ok(()) => return Ok(()),
                    Err(Miss::Refused(failure)) => return Err(failure),
                    Err(Miss::Away { how, why }) => {
                        let again = broke && how == Away::Broke;
                        if self.is_final(how, again) {
                            return Err(CallFailure::Unavailable(why));
                        }
                        broke |= how == Away::Broke;
                        met = Some(how);
                        why
                    }
                },
                None => caller.trouble(),
            };
            drop(turn.take());
            let (outage, _held) = outage.get_or_insert_with(|| {
                let now = Instant::now();
                let outage = Outage {
                    give_up: self.options.on_unavailable.limit().map(|limit| now + limit),
                    missed: None,
                    pause: Duration::ZERO,
                };
                (outage, Counted::one(&self.metrics.held))
            });
            if met.is_some() {
                outage.missed.get_or_insert_with(Instant::now);
            }
            let give_up = outage.give_up;
            let chance = self.chance(met, caller, event, outage);
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
                () = self.forsaken(caller) => None,
            };
            let Some(member) = chance else {
                return Err(CallFailure::Unavailable(trouble));
            };
            self.metrics.retried.increment(1);
            turn = self::turn(member).await;
        }
    }

    /// Whether a call that ended so is not made once more; `again` where it has been already.
    fn is_final(&self, how: Away, again: bool) -> bool {
        let closes = self.options.on_unavailable.closes();
        match how {
            Away::NotSent => false,
            Away::Broke => !self.options.at_least_once || (closes && again),
            Away::Declined => !self.options.at_least_once || closes,
        }
    }

    /// Resolves when a connection is to be closed because its handler is away.
    async fn forsaken(&self, caller: &Caller) {
        if !self.options.on_unavailable.closes() {
            return std::future::pending().await;
        }
        let mut changes = self.pool.changes();
        // The sender lives in the pool, so this cannot fail.
        while !self.pool.is_hopeless(caller) && changes.changed().await.is_ok() {}
    }

    /// Waits for an address that the event can be told to. After a call that `met` with something it
    /// waits a while longer each time: if it is this very callback that breaks the channel, or what
    /// is behind it, others have that time.
    async fn chance(
        &self,
        met: Option<Away>,
        caller: &Caller,
        event: &Event,
        outage: &mut Outage,
    ) -> Arc<Member> {
        let mut changes = self.pool.changes();
        let mut pause = match met {
            None => Duration::ZERO,
            Some(Away::Declined) => outage.pause.max(PAUSES.0),
            // The next one that breaks is the last.
            Some(Away::Broke) if self.options.on_unavailable.closes() => PAUSES.0,
            Some(Away::Broke | Away::NotSent) => outage.pause,
        };
        if met.is_some() {
            outage.pause = (pause * 2).clamp(PAUSES.0, PAUSES.1);
        }
        loop {
            let before = caller.member();
            if let Some(member) = self.pool.place(caller, event, outage.missed) {
                if before.is_some_and(|before| !Arc::ptr_eq(&before, &member)) {
                    outage.missed = None;
                } else if !pause.is_zero() {
                    // Not in step with those who met with the same: the one that is the cause
                    // would be in everybody's way again.
                    sleep(jitter(std::mem::take(&mut pause))).await;
                    continue;
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
    async fn tell(&self, turn: &mut Turn, caller: &Caller, event: &Event) -> Result<(), Miss> {
        let link = &turn.member.link;
        let Some(channel) = turn.channel.take() else {
            return Err(Miss::Away {
                how: Away::NotSent,
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
        self.calls.one(link, channel, caller, event).await
    }

    /// OnSocketCreated.
    async fn introduce(
        &self,
        link: &Link,
        channel: Channel,
        caller: &Caller,
        created: &Event,
    ) -> Result<(), Miss> {
        let mut result = self.calls.one(link, channel, caller, created).await;
        if let Err(Miss::Refused(CallFailure::Failed { code, message })) = &mut result
            && *code == code_name(Code::Unimplemented)
        {
            // The first callback of every connection: who offers the service at all has it.
            let Options {
                service,
                service_advice,
                ..
            } = &self.options;
            *message = format!(
                "{message} (asked for {service}; one that offers the other service needs {service_advice})"
            );
        }
        caller.seat().standing = match &result {
            // Who refuses it knows of it: OnSocketClosed is to follow.
            Ok(()) | Err(Miss::Refused(_)) => Standing::Known,
            Err(Miss::Away {
                how: Away::NotSent, ..
            }) => return result,
            Err(Miss::Away { .. }) => Standing::Sent,
        };
        result
    }
}
