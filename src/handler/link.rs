//! A channel to one handler address, kept connected by a task of its own.
//!
//! One HTTP/2 connection, no balancing: the calls of a connection stay on it, and
//! whether the handler is there is known without calling it.

use std::future::pending;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic::body::Body;
use tonic::codegen::Service;

use super::dial::{Pings, causes, dial};
use super::health::{self, Health};
use super::resolve::{Directory, Endpoint, Target};
use crate::metrics::{ChannelMetrics, ChannelState};

/// First and longest pause before connecting again. Short, for devices wait.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long a new channel waits for the handler's first word about its health. One that
/// does not speak in time is taken for healthy.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// Longest time for which a channel that was replaced goes on with its calls: more
/// than any call may take.
const LAST_CALLS: Duration = Duration::from_secs(600);

/// A handler that allows so many calls at a time, or more, has no limit that could be reached.
const UNLIMITED: u32 = 100_000;

/// Calls that the limit leaves for health checks and streams.
const SPARE: u32 = 4;

/// Why a channel is replaced that is still open.
const NO_ANSWERS: &str = "callbacks got no answer over it";

/// How a link behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How often the handler is asked for its health, if it is.
    pub health: Option<Duration>,
    /// HTTP/2 pings while calls are under way.
    pub pings: Option<Pings>,
}

/// An open channel. Cheap to clone.
#[derive(Clone)]
pub struct Channel {
    sender: SendRequest<Body>,
    heard: Arc<Heard>,
    /// Turns, where the handler, or a proxy before it, allows only so many calls at a time.
    turns: Option<Arc<Semaphore>>,
}

#[derive(Default)]
struct Heard {
    /// Calls that the handler answered, in whatever way.
    answers: AtomicU64,
    doubted: Notify,
}

impl Channel {
    /// `limit` is how many calls the handler allows at a time.
    fn new(sender: SendRequest<Body>, limit: Option<u32>) -> Self {
        let limit = limit.filter(|limit| *limit < UNLIMITED);
        let turns = |limit: u32| Semaphore::new(limit.saturating_sub(SPARE).max(1) as usize);
        Self {
            sender,
            heard: Arc::default(),
            turns: limit.map(turns).map(Arc::new),
        }
    }

    /// Waits for a turn, where there are only so many: HTTP/2 would have the call wait too, but
    /// on the time that the handler has for its answer.
    pub(super) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        let turns = self.turns.clone()?;
        // Never closed.
        turns.acquire_owned().await.ok()
    }

    /// Sends a request; what is returned resolves with the head of its answer.
    pub(super) fn send(
        &mut self,
        request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Incoming>, tonic::Status>> + Send + use<> {
        let answer = self.sender.try_send_request(request);
        async move {
            answer.await.map_err(|mut error| {
                let sent = error.take_message().is_none() && !refused(error.error());
                unavailable(error.error(), sent)
            })
        }
    }

    /// Whether this is that.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.heard, &other.heard)
    }

    /// How many calls were answered over it.
    pub(super) fn answers(&self) -> u64 {
        self.heard.answers.load(Ordering::Relaxed)
    }

    /// Notes that a call was answered.
    pub(super) fn answered(&self) {
        self.heard.answers.fetch_add(1, Ordering::Relaxed);
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = tonic::Status;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender
            .poll_ready(cx)
            .map_err(|error| unavailable(&error, false))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.send(request))
    }
}

/// Whether the handler hung up and said that it has not looked at this call: its GOAWAY
/// names the last one that it has (RFC 9113, 6.8). A stream reset with REFUSED_STREAM
/// says as much by the standard, but C++ and Python servers that stop reset calls so that
/// they work on.
fn refused(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let cause = source.and_then(|source| source.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| cause.is_go_away() && cause.is_remote())
}

/// Marks a status of a call that the handler cannot have seen.
#[derive(Debug, thiserror::Error)]
#[error("the call was not sent")]
pub(super) struct NotSent;

/// Marks a status of a call whose channel broke after it was sent.
#[derive(Debug, thiserror::Error)]
#[error("the channel broke")]
struct Broke;

/// Marks a status of a call that the handler broke off, and not its channel.
#[derive(Debug, thiserror::Error)]
#[error("the handler broke off the call")]
struct BrokeOff;

/// Whether a call was broken off by the handler alone: a stream reset (RFC 9113, 5.4.2), as servers
/// do whose code panics.
pub(super) fn is_broken_off(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<BrokeOff>() {
            return true;
        }
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.is_reset() && error.is_remote();
        }
        cause = error.source();
    }
    false
}

/// The status of a call that was not sent.
pub(super) fn not_sent(trouble: String) -> tonic::Status {
    let mut status = tonic::Status::unavailable(trouble);
    status.set_source(Arc::new(NotSent));
    status
}

/// Whatever breaks below gRPC says nothing about the call, unless it never was sent.
fn unavailable(error: &hyper::Error, sent: bool) -> tonic::Status {
    let text = causes(error);
    if !sent {
        return not_sent(text);
    }
    let mut status = tonic::Status::unavailable(text);
    if is_broken_off(error) {
        status.set_source(Arc::new(BrokeOff));
    } else {
        status.set_source(Arc::new(Broke));
    }
    status
}

/// See the module.
pub struct Link {
    target: Arc<Target>,
    endpoint: Endpoint,
    options: Options,
    directory: Arc<Directory>,
    /// Told whenever the state has changed.
    changes: Arc<watch::Sender<()>>,
    metrics: ChannelMetrics,
    state: Mutex<State>,
}

struct State {
    channel: Option<Channel>,
    /// The handler asks for no new connections.
    declines: bool,
    /// Connecting has failed since there was a channel, or there was one for a moment only and
    /// nothing was answered over it.
    away: bool,
    /// Connecting has failed since it was lost: told once more, for who was just being told of when
    /// the channel was lost is known there by now.
    failed: bool,
    /// When the channel was lost; when it began, as long as there has been none.
    lost: Instant,
    trouble: String,
}

impl Link {
    /// A link that is down until [`Link::run`] has connected it.
    pub(super) fn new(
        target: Arc<Target>,
        endpoint: Endpoint,
        options: Options,
        directory: Arc<Directory>,
        changes: Arc<watch::Sender<()>>,
        metrics: ChannelMetrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            target,
            endpoint,
            options,
            directory,
            changes,
            metrics,
            state: Mutex::new(State {
                channel: None,
                declines: false,
                away: false,
                failed: false,
                lost: Instant::now(),
                trouble: "not connected yet".to_owned(),
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address that it connects to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The address of the configuration that it is of.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// The origin of the requests' URIs.
    pub(super) fn origin(&self) -> Uri {
        self.target.origin.clone()
    }

    /// The channel, if it is up.
    pub(super) fn channel(&self) -> Option<Channel> {
        self.state().channel.clone()
    }

    /// Whether the channel is up.
    pub fn is_up(&self) -> bool {
        self.state().channel.is_some()
    }

    /// Whether the channel is down and could not be made anew. One that a handler has closed,
    /// as those do that let their connections live only so long, is made anew at once.
    pub(super) fn is_away(&self) -> bool {
        let state = self.state();
        state.channel.is_none() && state.away
    }

    /// Whether no new connection can be told to it, nor in a moment.
    pub(super) fn takes_nobody(&self) -> bool {
        let state = self.state();
        match state.channel {
            Some(_) => state.declines,
            None => state.away,
        }
    }

    /// Resolves when the channel is up, or away where it was not.
    pub(super) async fn back(&self) {
        let mut changes = self.changes.subscribe();
        let away = self.is_away();
        // The sender lives in the link, so this cannot fail.
        while !self.is_up() && self.is_away() == away && changes.changed().await.is_ok() {}
    }

    /// Whether new connections may be told to it.
    pub fn is_open(&self) -> bool {
        let state = self.state();
        state.channel.is_some() && !state.declines
    }

    /// Since when the channel has been down, if it is.
    pub(super) fn down_since(&self) -> Option<Instant> {
        let state = self.state();
        state.channel.is_none().then_some(state.lost)
    }

    /// Why the channel is down, or takes no new connections.
    pub fn trouble(&self) -> String {
        let state = self.state();
        match state.channel {
            Some(_) if state.declines => "it says NOT_SERVING".to_owned(),
            _ => state.trouble.clone(),
        }
    }

    /// Says that a call over this channel found no answer in time, nor did any other
    /// meanwhile: nothing may come through any more. From now on calls go over a new
    /// channel; those under way stay, for the handler may as well be slow.
    pub(super) fn doubt(&self, channel: &Channel) {
        let now = self.channel();
        if now.is_some_and(|now| now.is(channel)) {
            self.lost(NO_ANSWERS, true);
        }
        channel.heard.doubted.notify_one();
    }

    /// Keeps the channel connected, for ever.
    pub(super) async fn run(self: Arc<Self>) {
        let mut pause = PAUSES.0;
        let mut pings = self.options.pings;
        let mut presence = self.metrics.presence();
        loop {
            let (sender, mut connection, limit) =
                match dial(&self.target, &self.endpoint, pings).await {
                    Ok(dialled) => dialled,
                    Err(error) => {
                        self.note(&error);
                        self.failed();
                        self.directory.doubt();
                        sleep(pause).await;
                        pause = (pause * 2).min(PAUSES.1);
                        continue;
                    }
                };
            let begun = Instant::now();
            let channel = Channel::new(sender, limit);
            let serve = async {
                let first = self.ask(&channel, FIRST_WORD).await;
                presence.set(self.up(&channel, first == Health::NotServing));
                self.watch_health(&channel, first, &mut presence).await;
            };
            let ended = tokio::select! {
                biased;
                result = &mut connection => Some(result),
                () = channel.heard.doubted.notified() => None,
                () = serve => None,
            };
            presence.set(ChannelState::Down);
            // One that greets and hangs up is not there either.
            let old = begun.elapsed() >= PAUSES.1;
            let lasted = old || channel.answers() > 0;
            if old {
                pause = PAUSES.0;
            }
            let Some(result) = ended else {
                self.lost(NO_ANSWERS, true);
                // Its calls may yet be answered.
                tokio::spawn(timeout(LAST_CALLS, connection));
                continue;
            };
            match result {
                Ok(()) => self.lost("the handler closed the connection", lasted),
                Err(error) => {
                    if pings.is_some() && offended(&error) {
                        tracing::warn!(handler = self.names().0, url = %self.target.name, "the handler forbids pings: it gets no more");
                        pings = None;
                    }
                    self.lost(&causes(&error), lasted);
                }
            }
            self.directory.doubt();
            if !old {
                sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }

    /// Asks for the handler's health, if that is wished.
    async fn ask(&self, channel: &Channel, limit: Duration) -> Health {
        match self.options.health {
            Some(_) => health::check(channel.clone(), self.origin(), limit).await,
            None => Health::NotOffered,
        }
    }

    /// Asks for the handler's health again and again, for ever.
    async fn watch_health(
        &self,
        channel: &Channel,
        first: Health,
        presence: &mut crate::metrics::Presence,
    ) {
        let mut last = first;
        loop {
            let Some(interval) = self.options.health.filter(|_| last != Health::NotOffered) else {
                return pending().await;
            };
            sleep(interval).await;
            last = self.ask(channel, interval).await;
            let declines = match last {
                Health::Serving | Health::NotOffered => false,
                Health::NotServing => true,
                Health::NoWord => continue,
            };
            if self.state().declines != declines {
                presence.set(self.up(channel, declines));
            }
        }
    }

    /// The channel is there, or the handler has changed its mind.
    fn up(&self, channel: &Channel, declines: bool) -> ChannelState {
        let mut state = self.state();
        let (handler, url, address) = self.names();
        if state.channel.is_none() {
            tracing::info!(handler, url, %address, "handler channel is up");
        }
        if declines {
            tracing::warn!(handler, url, %address, "the handler says NOT_SERVING: it gets no new connections");
        } else if state.declines {
            tracing::info!(handler, url, %address, "the handler says SERVING");
        }
        state.channel = Some(channel.clone());
        state.declines = declines;
        state.away = false;
        drop(state);
        self.changes.send_replace(());
        if declines {
            ChannelState::NotServing
        } else {
            ChannelState::Up
        }
    }

    /// For the log: the handler's name, its address as configured, and as dialled.
    fn names(&self) -> (&str, &str, &Endpoint) {
        (self.metrics.handler(), &self.target.name, &self.endpoint)
    }

    /// The channel is gone. One that has not `lasted` was none, for nobody could use it.
    fn lost(&self, error: &str, lasted: bool) {
        self.note(error);
        let mut state = self.state();
        // One that accepts and hangs up at once has not been there.
        if state.channel.take().is_some() {
            state.lost = Instant::now();
        }
        state.declines = false;
        state.away |= !lasted;
        state.failed = false;
        drop(state);
        self.changes.send_replace(());
    }

    /// Connecting has failed.
    fn failed(&self) {
        let mut state = self.state();
        state.away = true;
        let known = std::mem::replace(&mut state.failed, true);
        drop(state);
        if !known {
            self.changes.send_replace(());
        }
    }

    /// Logs a trouble once, however often it comes back.
    fn note(&self, error: &str) {
        let mut state = self.state();
        if state.channel.is_some() || state.trouble != error {
            let (handler, url, address) = self.names();
            tracing::warn!(handler, url, %address, error, "handler channel is down");
        }
        error.clone_into(&mut state.trouble);
    }
}

/// Whether the handler hung up because of too many pings.
fn offended(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let cause = source.and_then(|source| source.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| cause.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM))
}
