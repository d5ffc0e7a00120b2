//! The life of a connection as a state machine: no IO, no clock.
//!
//! ```text
//!            start              Created taken
//!   (new) ----------> Opening ---------------> Open <--+
//!                        |                      |  |   | callback taken
//!                        |          bytes, batch, timer|
//!                        |                      |  +---+
//!                        +---- any close -------+
//!                                   |
//!                                   v      flushed or aborted,
//!                                Closing   callback in flight done
//!                                   |
//!                                   v  Closed taken or lost
//!                                Closed -------------------> Finished
//! ```
//!
//! At most one callback is in flight. While one is, nothing is read from the
//! device: its bytes stay in the kernel and push back on it.
//!
//! With a [`Machine::set_window`] larger than one several callbacks with bytes and
//! messages may be in flight, and nothing is read while there are so many. The others,
//! Created, Timer and Closed, still are in flight alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::reason::CloseReason;

/// How many times `send` a device has for taking what waits when the connection
/// closes. One that takes a little now and then would keep it open for ever.
pub(super) const MAX_FLUSH: u32 = 4;

/// Timers of a connection; `None` is never.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// Nothing either way while not authenticated.
    pub idle: Option<Duration>,
    /// Whether `idle` also ends a connection, authenticated or not, that has no
    /// keepalive and from which nothing came for so long: datagrams have no other end.
    pub reap: bool,
    /// Not authenticated since it opened.
    pub authenticate: Option<Duration>,
    /// Nothing taken by the device of what waits for it.
    pub send: Duration,
}

/// How a callback ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The handler took it.
    Taken,
    /// The handler was away for too long.
    Unavailable,
    /// The same, but it may have seen the call.
    Unknown,
    /// The handler answered with an error or not in time.
    Failed,
}

/// What happened.
#[derive(Debug)]
pub enum Input<B> {
    /// Bytes from the device. Only while [`Machine::is_reading`].
    Received(Bytes),
    /// Messages for the handler. Only while [`Machine::wants_messages`].
    Batch(B),
    /// The device sends nothing more.
    PeerClosed,
    /// The socket failed.
    SocketFailed(String),
    /// The callback in flight ended.
    CallEnded(Outcome),
    /// Somebody wants the connection closed now.
    CloseRequested(CloseReason),
    /// The gateway stops: closes after the callback in flight, which may still use
    /// the connection.
    DrainRequested,
    /// The device is a client now, until it expires.
    Authenticated(Option<Instant>),
    /// A keepalive interval was set.
    KeepaliveSet(Duration),
    /// The device took bytes.
    Sent,
    /// Bytes wait and the device takes none.
    SendBlocked,
    /// All that was to be sent before closing is sent.
    Flushed,
    /// [`Machine::deadline`] has passed.
    Elapsed,
}

/// What is to be done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<B> {
    /// Tell the handler.
    Call(Call<B>),
    /// Take no more requests; send what waits, then say so with [`Input::Flushed`].
    Flush,
    /// Take no more requests; throw away what waits.
    Abort,
    /// The connection is over.
    Finish,
}

/// A callback.
#[derive(Debug, PartialEq, Eq)]
pub enum Call<B> {
    /// OnSocketCreated.
    Created,
    /// OnReceivedBytes.
    Bytes(Bytes),
    /// OnReceivedMessages.
    Batch(B),
    /// OnTimerTimeout.
    Timer,
    /// OnSocketClosed.
    Closed(CloseReason),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Opening,
    Open,
    /// The keepalive ran out and the handler is being told.
    Expiring,
    Closing(CloseReason),
    Closed(CloseReason),
    Finished(CloseReason),
}

/// See the module. `B` is a batch of messages.
#[derive(Debug)]
pub struct Machine<B> {
    /// Those of all connections of the listener.
    timeouts: Arc<Timeouts>,
    phase: Phase,
    /// Callbacks in flight.
    calling: usize,
    /// Most of them.
    window: usize,
    /// The timer is to be told when no callback is in flight.
    owes_timer: bool,
    /// Whether the handler may know of the connection. One that was away all the
    /// time must not hear of its end only.
    announced: bool,
    /// Whether what was to be sent before closing is sent or given up.
    flushed: bool,
    paused: bool,
    /// Closes when the callback in flight has ended.
    draining: bool,
    authenticated: bool,
    /// When it stops being a client.
    expires: Option<Instant>,
    opened: Instant,
    /// When something last went either way.
    active: Instant,
    /// When something last came, or the keepalive was set.
    heard: Instant,
    blocked: Option<Instant>,
    /// When it began to close.
    closing: Option<Instant>,
    keepalive: Option<Duration>,
    actions: VecDeque<Action<B>>,
}

impl<B> Machine<B> {
    /// A connection that has just opened: the handler is to be told.
    pub fn start(timeouts: impl Into<Arc<Timeouts>>, now: Instant) -> Self {
        Self {
            timeouts: timeouts.into(),
            phase: Phase::Opening,
            calling: 1,
            window: 1,
            owes_timer: false,
            announced: false,
            flushed: false,
            paused: false,
            draining: false,
            authenticated: false,
            expires: None,
            opened: now,
            active: now,
            heard: now,
            blocked: None,
            closing: None,
            keepalive: None,
            actions: VecDeque::from([Action::Call(Call::Created)]),
        }
    }

    /// The next thing to do, until there is none.
    pub fn next_action(&mut self) -> Option<Action<B>> {
        let action = self.actions.pop_front();
        if self.actions.is_empty() {
            // An idle connection holds no memory for what it once had to do.
            self.actions = VecDeque::new();
        }
        action
    }

    /// Whether bytes may be read from the device.
    pub fn is_reading(&self) -> bool {
        self.wants_messages() && !self.paused
    }

    /// Whether the handler may be given messages.
    pub fn wants_messages(&self) -> bool {
        self.phase == Phase::Open && self.calling < self.window && !self.draining
    }

    /// How many callbacks with bytes or messages may be in flight from now on, at least
    /// one. Those that are stay.
    pub fn set_window(&mut self, window: usize) {
        self.window = window.max(1);
    }

    /// Stops reading, or goes on: for a rate limit.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// The reason, once the connection is closing.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        match &self.phase {
            Phase::Closing(reason) | Phase::Closed(reason) | Phase::Finished(reason) => {
                Some(reason)
            }
            Phase::Opening | Phase::Open | Phase::Expiring => None,
        }
    }

    /// Whether OnSocketClosed is still to be called.
    pub fn owes_closed(&self) -> bool {
        !matches!(self.phase, Phase::Closed(_) | Phase::Finished(_))
    }

    /// When [`Input::Elapsed`] is due. Reading, the only way to see whether the
    /// device is silent, is required for the timers that punish silence: while no more
    /// callbacks may be in flight they wait, and what has come meanwhile is read first.
    /// Who authenticates is the handler, so `idle` waits for every callback.
    pub fn deadline(&self) -> Option<Instant> {
        let open = self.close_reason().is_none();
        let send = self.blocked.map(|since| since + self.timeouts.send);
        let flush = self.closing.filter(|_| !self.flushed);
        let flush = flush.map(|since| since + self.timeouts.send * MAX_FLUSH);
        let authenticate = (open && !self.authenticated)
            .then_some(self.timeouts.authenticate)
            .flatten()
            .map(|limit| self.opened + limit);
        let idle = (self.is_reading() && self.calling == 0 && !self.authenticated)
            .then_some(self.timeouts.idle)
            .flatten()
            .map(|limit| self.active + limit);
        let keepalive = self
            .keepalive
            .filter(|_| self.is_reading())
            .map(|interval| self.heard + interval.mul_f64(1.5));
        let reap = self
            .reap()
            .filter(|_| self.is_reading())
            .map(|limit| self.heard + limit);
        let expires = self.expires.filter(|_| open);
        [send, flush, authenticate, expires, idle, keepalive, reap]
            .into_iter()
            .flatten()
            .min()
    }

    /// How long it may be silent without a keepalive.
    fn reap(&self) -> Option<Duration> {
        let reap = self.timeouts.reap && self.keepalive.is_none();
        self.timeouts.idle.filter(|_| reap)
    }

    /// Takes an input; what follows from it is in [`Machine::next_action`].
    pub fn handle(&mut self, input: Input<B>, now: Instant) {
        self.digest(input, now);
        if self.close_reason().is_some() {
            self.closing.get_or_insert(now);
        }
    }

    fn digest(&mut self, input: Input<B>, now: Instant) {
        match input {
            Input::Received(bytes) => {
                debug_assert!(self.wants_messages());
                self.active = now;
                self.heard = now;
                self.call(Call::Bytes(bytes));
            }
            Input::Batch(batch) => {
                debug_assert!(self.wants_messages());
                self.call(Call::Batch(batch));
            }
            Input::PeerClosed => self.close(CloseReason::Normal),
            Input::SocketFailed(detail) => self.abort(CloseReason::SocketError(detail)),
            Input::CallEnded(outcome) => self.on_call_ended(outcome),
            Input::CloseRequested(reason) => self.close(reason),
            Input::DrainRequested if self.calling > 0 => self.draining = true,
            Input::DrainRequested => self.close(CloseReason::Shutdown),
            Input::Authenticated(expires) => {
                self.authenticated = true;
                self.expires = expires;
            }
            Input::KeepaliveSet(interval) => {
                self.keepalive = Some(interval);
                self.heard = now;
            }
            Input::Sent => {
                self.active = now;
                self.blocked = None;
            }
            Input::SendBlocked => {
                self.blocked.get_or_insert(now);
            }
            Input::Flushed => {
                self.flushed = true;
                self.blocked = None;
                self.settle();
            }
            Input::Elapsed => self.on_elapsed(now),
        }
    }

    fn call(&mut self, call: Call<B>) {
        self.calling += 1;
        self.actions.push_back(Action::Call(call));
    }

    fn on_call_ended(&mut self, outcome: Outcome) {
        self.calling = self.calling.saturating_sub(1);
        self.announced |= outcome != Outcome::Unavailable;
        match (&self.phase, outcome) {
            (Phase::Closed(reason), _) => {
                self.phase = Phase::Finished(reason.clone());
                self.actions.push_back(Action::Finish);
                return;
            }
            (Phase::Opening, Outcome::Taken) => self.phase = Phase::Open,
            (Phase::Expiring, Outcome::Taken) if self.owes_timer => self.tell_timer(),
            (Phase::Expiring, Outcome::Taken) => self.close(CloseReason::KeepaliveTimeout),
            (_, Outcome::Taken) => {}
            // A gateway that stops does not wait for an absent handler.
            (_, Outcome::Unavailable | Outcome::Unknown) if self.draining => {
                self.close(CloseReason::Shutdown);
            }
            (_, Outcome::Unavailable | Outcome::Unknown) => {
                self.close(CloseReason::HandlerUnavailable);
            }
            (_, Outcome::Failed) => self.close(CloseReason::HandlerError),
        }
        if self.draining && self.calling == 0 {
            self.close(CloseReason::Shutdown);
        }
        self.settle();
    }

    fn on_elapsed(&mut self, now: Instant) {
        let passed = |since: Instant, limit: Option<Duration>| {
            limit.is_some_and(|limit| now >= since + limit)
        };
        let stalled =
            |since: Option<Instant>, limit| since.is_some_and(|since| passed(since, Some(limit)));
        if stalled(self.blocked, self.timeouts.send)
            || stalled(self.closing, self.timeouts.send * MAX_FLUSH)
        {
            self.abort(CloseReason::SendTimeout);
            return;
        }
        if self.close_reason().is_some() {
            return;
        }
        if !self.authenticated && passed(self.opened, self.timeouts.authenticate) {
            self.close(CloseReason::IdleTimeout);
        } else if self.expires.is_some_and(|expires| now >= expires) {
            self.close(CloseReason::Expired);
        } else if !self.is_reading() {
            // Whether the device is silent shows when it is read again.
        } else if (!self.authenticated
            && self.calling == 0
            && passed(self.active, self.timeouts.idle))
            || passed(self.heard, self.reap())
        {
            self.close(CloseReason::IdleTimeout);
        } else if passed(self.heard, self.keepalive.map(|i| i.mul_f64(1.5))) {
            self.phase = Phase::Expiring;
            self.owes_timer = true;
            self.tell_timer();
        }
    }

    /// Tells the timer, alone.
    fn tell_timer(&mut self) {
        if self.calling == 0 {
            self.owes_timer = false;
            self.call(Call::Timer);
        }
    }

    /// Closes after what waits for the device is sent. The first reason stays.
    fn close(&mut self, reason: CloseReason) {
        if self.close_reason().is_some() {
            return;
        }
        self.phase = match self.phase {
            // The device's silence is the cause, whatever the handler makes of it.
            Phase::Expiring => Phase::Closing(CloseReason::KeepaliveTimeout),
            _ => Phase::Closing(reason),
        };
        self.actions.push_back(Action::Flush);
    }

    /// Closes without sending what waits.
    fn abort(&mut self, reason: CloseReason) {
        if self.flushed {
            return;
        }
        if self.close_reason().is_none() {
            self.phase = Phase::Closing(reason);
        }
        self.flushed = true;
        self.blocked = None;
        self.actions.push_back(Action::Abort);
        self.settle();
    }

    /// Says goodbye once nothing else is to be done.
    fn settle(&mut self) {
        if let Phase::Closing(reason) = &self.phase
            && self.flushed
            && self.calling == 0
        {
            let reason = reason.clone();
            if self.announced {
                self.phase = Phase::Closed(reason.clone());
                self.call(Call::Closed(reason));
            } else {
                self.phase = Phase::Finished(reason);
                self.actions.push_back(Action::Finish);
            }
        }
    }
}
