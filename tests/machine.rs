//! The connection's state machine under random orders of events.
//!
//! The driver plays the connection's task: it does what the machine says, hands it
//! only inputs that the task could, and checks after each step what must always hold.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use exproto_sidecar::connection::CloseReason;
use exproto_sidecar::connection::machine::{Action, Call, Input, Machine, Outcome, Timeouts};
use proptest::prelude::*;

/// What may happen, before it is known whether it can.
#[derive(Debug, Clone)]
enum Step {
    Received(u8),
    Batch(u8),
    PeerClosed,
    SocketFailed,
    CallEnded(Outcome),
    CloseRequested(CloseReason),
    /// With the milliseconds until it expires.
    Authenticated(Option<u64>),
    KeepaliveSet(u64),
    Sent,
    SendBlocked,
    Flushed,
    Elapsed,
    /// Time goes by, milliseconds, without anybody looking.
    Wait(u64),
    Pause(bool),
    Window(usize),
}

fn outcomes() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        8 => Just(Outcome::Taken),
        1 => Just(Outcome::Unavailable),
        1 => Just(Outcome::Unknown),
        1 => Just(Outcome::Failed),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<u8>().prop_map(Step::Received),
        4 => any::<u8>().prop_map(Step::Batch),
        1 => Just(Step::PeerClosed),
        1 => Just(Step::SocketFailed),
        12 => outcomes().prop_map(Step::CallEnded),
        1 => prop_oneof![
            Just(CloseReason::ClosedByHandler),
            Just(CloseReason::Discarded),
            Just(CloseReason::Shutdown),
            Just(CloseReason::RateLimited),
        ]
        .prop_map(Step::CloseRequested),
        1 => proptest::option::of(0..5000_u64).prop_map(Step::Authenticated),
        1 => (1..5_u64).prop_map(Step::KeepaliveSet),
        3 => Just(Step::Sent),
        2 => Just(Step::SendBlocked),
        3 => Just(Step::Flushed),
        4 => Just(Step::Elapsed),
        4 => (0..3000_u64).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Pause),
        1 => (1..4_usize).prop_map(Step::Window),
    ]
}

fn timeouts() -> impl Strategy<Value = Timeouts> {
    let limit = || proptest::option::of((1..5000_u64).prop_map(Duration::from_millis));
    (limit(), any::<bool>(), limit(), 1..5000_u64).prop_map(|(idle, reap, authenticate, send)| {
        Timeouts {
            reap,
            idle,
            authenticate,
            send: Duration::from_millis(send),
        }
    })
}

/// Whether a callback may be in flight beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Many,
    Alone,
}

impl Kind {
    fn of(call: &Call<u8>) -> Self {
        match call {
            Call::Bytes(_) | Call::Batch(_) => Self::Many,
            Call::Created | Call::Timer | Call::Closed(_) => Self::Alone,
        }
    }
}

/// What the connection's task is, to the machine.
struct Task {
    machine: Machine<u8>,
    now: Instant,
    calls: Vec<Call<u8>>,
    in_flight: Vec<Kind>,
    window: usize,
    flushing: bool,
    /// Flush or Abort was asked for: the connection takes no requests.
    ended: bool,
    aborts: usize,
    flushes: usize,
    finishes: usize,
    /// The device's side has ended: no more inputs from it.
    peer_ended: bool,
    given: Vec<u8>,
}

impl Task {
    fn new(timeouts: Timeouts) -> Self {
        let now = Instant::now();
        let mut task = Self {
            machine: Machine::start(timeouts, now),
            now,
            calls: Vec::new(),
            in_flight: Vec::new(),
            window: 1,
            flushing: false,
            ended: false,
            aborts: 0,
            flushes: 0,
            finishes: 0,
            peer_ended: false,
            given: Vec::new(),
        };
        task.act();
        task
    }

    fn act(&mut self) {
        while let Some(action) = self.machine.next_action() {
            assert_eq!(self.finishes, 0, "{action:?} after Finish");
            match action {
                Action::Call(call) => {
                    let kind = Kind::of(&call);
                    let together = |other: &Kind| kind == Kind::Many && *other == Kind::Many;
                    assert!(self.in_flight.iter().all(together), "together: {call:?}");
                    assert!(self.in_flight.len() < self.window, "too many at a time");
                    self.in_flight.push(kind);
                    self.calls.push(call);
                }
                Action::Flush => {
                    self.flushes += 1;
                    self.ended = true;
                    self.flushing = true;
                }
                Action::Abort => {
                    self.aborts += 1;
                    self.ended = true;
                    self.flushing = false;
                }
                Action::Finish => self.finishes += 1,
            }
        }
        self.check();
    }

    fn check(&self) {
        assert!(self.flushes <= 1 && self.aborts <= 1 && self.finishes <= 1);
        let created = |call: &Call<u8>| matches!(call, Call::Created);
        assert!(self.calls.first().is_some_and(created), "Created is first");
        assert_eq!(self.calls.iter().filter(|call| created(call)).count(), 1);
        let closed = self
            .calls
            .iter()
            .position(|call| matches!(call, Call::Closed(_)));
        if let Some(at) = closed {
            assert_eq!(at + 1, self.calls.len(), "nothing after Closed");
            assert!(!self.machine.owes_closed());
            // What was to be sent is sent or given up by then.
            assert!(!self.flushing, "Closed before the device has everything");
        }
        if self.machine.is_reading() {
            let in_flight = self.in_flight.len();
            assert!(in_flight < self.window, "read ahead of the handler");
            assert!(!self.ended, "read after the end began");
        }
        assert_eq!(self.ended, self.machine.close_reason().is_some());
    }

    fn input(&mut self, input: Input<u8>) {
        self.machine.handle(input, self.now);
        self.act();
    }

    /// Does a step if the task could; says whether it did.
    fn step(&mut self, step: Step) -> bool {
        if self.finishes > 0 {
            return false;
        }
        match step {
            Step::Received(byte) if self.machine.is_reading() && !self.peer_ended => {
                self.given.push(byte);
                self.input(Input::Received(Bytes::copy_from_slice(&[byte])));
            }
            Step::Batch(number) if self.machine.wants_messages() => {
                self.input(Input::Batch(number));
            }
            Step::PeerClosed if self.machine.is_reading() && !self.peer_ended => {
                self.peer_ended = true;
                self.input(Input::PeerClosed);
            }
            // Reading or writing may fail; writing goes on while it flushes.
            Step::SocketFailed if self.machine.is_reading() || self.flushing => {
                self.peer_ended = true;
                self.input(Input::SocketFailed("reset".to_owned()));
            }
            Step::CallEnded(outcome) if !self.in_flight.is_empty() => {
                self.in_flight.remove(0);
                self.input(Input::CallEnded(outcome));
            }
            // A wish that was left before the end may be found after it began.
            Step::CloseRequested(reason) => self.input(Input::CloseRequested(reason)),
            Step::Authenticated(left) => {
                let expires = left.map(|left| self.now + Duration::from_millis(left));
                self.input(Input::Authenticated(expires));
            }
            Step::KeepaliveSet(seconds) => {
                self.input(Input::KeepaliveSet(Duration::from_secs(seconds)));
            }
            Step::Sent if self.flushing || !self.ended => self.input(Input::Sent),
            Step::SendBlocked if self.flushing || !self.ended => self.input(Input::SendBlocked),
            Step::Flushed if self.flushing => {
                self.flushing = false;
                self.input(Input::Flushed);
            }
            Step::Elapsed => match self.machine.deadline() {
                Some(deadline) => {
                    self.now = self.now.max(deadline);
                    self.input(Input::Elapsed);
                }
                None => return false,
            },
            Step::Wait(milliseconds) => self.now += Duration::from_millis(milliseconds),
            Step::Pause(paused) => self.machine.set_paused(paused),
            Step::Window(window) => {
                self.window = window;
                self.machine.set_window(window);
            }
            _ => return false,
        }
        true
    }

    /// Bytes as the handler got them.
    fn delivered(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for call in &self.calls {
            if let Call::Bytes(bytes) = call {
                all.extend_from_slice(bytes);
            }
        }
        all
    }

    /// Lets everything that was asked for come to its end.
    fn settle(&mut self) {
        for _ in 0..10 {
            self.step(Step::CallEnded(Outcome::Taken));
            self.step(Step::Flushed);
        }
    }

    fn reason(&self) -> Option<&CloseReason> {
        self.machine.close_reason()
    }
}

fn never() -> Timeouts {
    Timeouts {
        reap: false,
        idle: None,
        authenticate: None,
        send: Duration::from_secs(1),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Created first, Closed last and once, at most so many callbacks at a time, nothing
    /// after Closed or Finish, in whatever order things happen; and from every state
    /// there is a way to Finish.
    #[test]
    fn every_order_of_events_keeps_the_rules_and_ends(
        timeouts in timeouts(),
        steps in prop::collection::vec(steps(), 0..80),
    ) {
        let mut task = Task::new(timeouts);
        for step in steps {
            task.step(step);
        }
        prop_assert_eq!(task.delivered(), task.given.clone(), "bytes in the order given");
        let told = task.reason().cloned();
        task.step(Step::CloseRequested(CloseReason::Shutdown));
        task.settle();
        prop_assert_eq!(task.finishes, 1, "stuck: {:?}", task.machine);
        prop_assert_eq!(task.delivered(), task.given.clone());
        // The first reason stays. Only a keepalive that ran out is known before.
        if let Some(told) = told {
            prop_assert_eq!(task.reason(), Some(&told));
        }
        if let Some(Call::Closed(reason)) = task.calls.last() {
            prop_assert_eq!(Some(reason), task.reason());
        }
    }

    /// A handler that took OnSocketCreated is told of the end exactly once.
    #[test]
    fn who_took_created_is_told_of_the_end(steps in prop::collection::vec(steps(), 0..80)) {
        let mut task = Task::new(never());
        task.step(Step::CallEnded(Outcome::Taken));
        for step in steps {
            task.step(step);
        }
        task.step(Step::CloseRequested(CloseReason::Shutdown));
        task.settle();
        let closed = task.calls.iter().filter(|call| matches!(call, Call::Closed(_))).count();
        prop_assert_eq!(closed, 1);
        prop_assert_eq!(task.finishes, 1);
    }

    /// A handler that was away all the time hears nothing of a connection that ended
    /// meanwhile.
    #[test]
    fn who_never_heard_of_it_is_not_told_of_its_end(
        steps in prop::collection::vec(steps(), 0..20),
    ) {
        let mut task = Task::new(never());
        for step in steps {
            // All but an answer.
            if !matches!(step, Step::CallEnded(_)) {
                task.step(step);
            }
        }
        task.step(Step::CallEnded(Outcome::Unavailable));
        task.settle();
        prop_assert_eq!(task.calls, vec![Call::Created]);
        prop_assert_eq!(task.finishes, 1);
    }

    /// A handler that may have heard of it is told of its end.
    #[test]
    fn who_may_have_heard_of_it_is_told_of_its_end(
        steps in prop::collection::vec(steps(), 0..20),
    ) {
        let mut task = Task::new(never());
        for step in steps {
            if !matches!(step, Step::CallEnded(_)) {
                task.step(step);
            }
        }
        task.step(Step::CallEnded(Outcome::Unknown));
        task.settle();
        prop_assert_eq!(task.calls.len(), 2);
        prop_assert!(matches!(task.calls.last(), Some(Call::Closed(_))));
    }

    /// Whoever waits until the deadline and says so gets on: no timer fires for ever
    /// without effect.
    #[test]
    fn an_elapsed_deadline_moves_on(
        timeouts in timeouts(),
        steps in prop::collection::vec(steps(), 0..60),
    ) {
        let mut task = Task::new(timeouts);
        for step in steps {
            task.step(step);
        }
        // Each deadline either ends something or is put off; none comes again at once.
        for _ in 0..8 {
            let Some(before) = task.machine.deadline() else {
                return Ok(());
            };
            task.step(Step::Elapsed);
            let after = task.machine.deadline();
            prop_assert_ne!(after, Some(before), "{:?}", task.machine);
        }
    }
}

/// The keepalive: OnTimerTimeout after one and a half intervals, then the end.
#[test]
fn a_keepalive_calls_the_timer_and_closes() {
    let mut task = Task::new(never());
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::KeepaliveSet(2));
    let due = task.now + Duration::from_secs(3);
    assert_eq!(task.machine.deadline(), Some(due));
    task.step(Step::Wait(2000));
    task.step(Step::Received(1));
    task.step(Step::CallEnded(Outcome::Taken));
    let due = task.now + Duration::from_secs(3);
    assert_eq!(task.machine.deadline(), Some(due), "put off by what came");
    task.step(Step::Elapsed);
    assert_eq!(task.calls.last(), Some(&Call::Timer));
    task.step(Step::CallEnded(Outcome::Taken));
    assert_eq!(task.reason(), Some(&CloseReason::KeepaliveTimeout));
    task.settle();
    assert_eq!(
        task.calls.last(),
        Some(&Call::Closed(CloseReason::KeepaliveTimeout))
    );
}

/// A handler that closes in OnTimerTimeout does not change the reason.
#[test]
fn a_close_while_the_timer_is_told_keeps_its_reason() {
    let mut task = Task::new(never());
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::KeepaliveSet(1));
    task.step(Step::Elapsed);
    task.step(Step::CloseRequested(CloseReason::ClosedByHandler));
    task.settle();
    assert_eq!(task.reason(), Some(&CloseReason::KeepaliveTimeout));
    assert_eq!(task.finishes, 1);
}

/// While a callback is in flight the timers that punish silence wait: the device's
/// bytes are in the kernel, unread.
#[test]
fn a_busy_handler_is_not_the_devices_silence() {
    let timeouts = Timeouts {
        reap: false,
        idle: Some(Duration::from_secs(1)),
        ..never()
    };
    let mut task = Task::new(timeouts);
    assert_eq!(task.machine.deadline(), None);
    task.step(Step::CallEnded(Outcome::Taken));
    assert!(task.machine.deadline().is_some());
    task.step(Step::Received(1));
    assert_eq!(task.machine.deadline(), None);
}

/// With a window: reading goes on while callbacks are in flight, the keepalive counts,
/// and the timer is told when all of them have ended.
#[test]
fn with_a_window_the_timer_waits_for_what_is_in_flight() {
    let mut task = Task::new(never());
    task.step(Step::Window(3));
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::KeepaliveSet(2));
    task.step(Step::Received(1));
    task.step(Step::Batch(2));
    assert!(task.machine.is_reading());
    task.step(Step::Elapsed);
    assert_eq!(task.calls.last(), Some(&Call::Batch(2)), "told too early");
    assert!(!task.machine.is_reading());
    task.step(Step::CallEnded(Outcome::Taken));
    assert_eq!(task.calls.last(), Some(&Call::Batch(2)));
    task.step(Step::CallEnded(Outcome::Taken));
    assert_eq!(task.calls.last(), Some(&Call::Timer));
    assert_eq!(task.reason(), None);
    task.step(Step::CallEnded(Outcome::Taken));
    task.settle();
    let reason = CloseReason::KeepaliveTimeout;
    assert_eq!(task.calls.last(), Some(&Call::Closed(reason)));
}

/// With a window: a gateway that stops reads nothing more and closes when all that is
/// in flight has ended.
#[test]
fn with_a_window_a_drain_waits_for_all_that_is_in_flight() {
    let mut task = Task::new(never());
    task.step(Step::Window(3));
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::Received(1));
    task.step(Step::Received(2));
    task.input(Input::DrainRequested);
    assert!(!task.machine.is_reading() && task.reason().is_none());
    task.step(Step::CallEnded(Outcome::Taken));
    assert_eq!(task.reason(), None);
    task.step(Step::CallEnded(Outcome::Taken));
    assert_eq!(task.reason(), Some(&CloseReason::Shutdown));
}

/// Only bytes that wait untaken for `send` end a connection, and they do so also
/// while it closes.
#[test]
fn a_device_that_takes_nothing_is_given_up() {
    let mut task = Task::new(never());
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::SendBlocked);
    task.step(Step::Wait(500));
    task.step(Step::Sent);
    assert_eq!(task.machine.deadline(), None);
    task.step(Step::SendBlocked);
    task.step(Step::CloseRequested(CloseReason::ClosedByHandler));
    task.step(Step::Elapsed);
    assert_eq!(task.aborts, 1);
    task.settle();
    assert_eq!(
        task.reason(),
        Some(&CloseReason::ClosedByHandler),
        "the first stays"
    );
    assert_eq!(task.finishes, 1);
}

/// A client that expires goes in time, whatever it and its handler are busy with.
#[test]
fn a_client_that_expires_is_closed() {
    let mut task = Task::new(never());
    task.step(Step::CallEnded(Outcome::Taken));
    task.step(Step::Authenticated(Some(2000)));
    task.step(Step::Received(1));
    let expires = task.now + Duration::from_secs(2);
    assert_eq!(task.machine.deadline(), Some(expires));
    task.step(Step::Wait(1999));
    task.input(Input::Elapsed);
    assert_eq!(task.reason(), None);
    task.step(Step::Elapsed);
    assert_eq!(task.reason(), Some(&CloseReason::Expired));
    task.settle();
    assert_eq!(task.calls.last(), Some(&Call::Closed(CloseReason::Expired)));
}
