//! The task of a connection: turns what happens into inputs of the state machine
//! and does what it says.
//!
//! One poll looks, in this order, at
//! 1. the callbacks in flight: their end frees everything else,
//! 2. the inbox: a request to close must not wait behind traffic,
//! 3. the device's side of sending: makes room for handlers that wait in Send,
//! 4. bytes from the device and messages for it, in turn, so that neither starves,
//! 5. the clock, last, so that what has come counts before a time-out.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use tokio::time::Sleep;

use super::calls::Calls;
use super::context::ListenerContext;
use super::handle::{Client, Handle, weight};
use super::linger::linger;
use super::machine::{Action, Call, Input, Machine, Outcome};
use super::rates::Rates;
use super::reason::CloseReason;
use crate::broker::Delivery;
use crate::handler::{CallFailure, Caller, Event, EventSink};
use crate::proto;
use crate::trace;
use crate::transport::scratch::{READ_CHUNK, with_scratch};
use crate::transport::{PeerInfo, Received, Socket};

/// Most bytes in one OnReceivedBytes. Well below the 4 MiB that gRPC servers take
/// by default.
const MAX_READ: usize = 4 * READ_CHUNK;

/// Most bytes in one OnReceivedMessages, for the same reason. A message that is larger
/// goes alone.
const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// Bytes in callbacks in flight from which on a connection reads nothing, where it may
/// have several: as many as one callback may carry.
const MAX_AHEAD: usize = MAX_READ;

/// Chunks given to the socket in one call; the kernel takes 1,024.
const MAX_SLICES: usize = 64;

/// See the module.
pub(super) struct Driver<S> {
    /// Gone once the connection was cut off.
    socket: Option<S>,
    handle: Handle,
    context: Arc<ListenerContext>,
    sink: Arc<dyn EventSink>,
    caller: Arc<Caller>,
    /// Until the handler is told.
    conninfo: Option<Box<proto::ConnInfo>>,
    machine: Machine<Vec<Delivery>>,
    /// Inputs that were found together with the last one.
    inputs: VecDeque<Input<Vec<Delivery>>>,
    /// The callbacks in flight.
    calls: Calls,
    outgoing: VecDeque<Bytes>,
    /// Whether the socket is to be finished once `outgoing` is sent.
    flushing: bool,
    blocked: bool,
    peer_ended: bool,
    /// The end that was found behind bytes.
    late_end: Option<Box<Input<Vec<Delivery>>>>,
    messages_next: bool,
    client: Option<Arc<Client>>,
    rates: Option<Box<Rates>>,
    timer: Option<Pin<Box<Sleep>>>,
    done: bool,
}

impl<S: Socket> Driver<S> {
    pub(super) fn new(
        socket: S,
        peer: &PeerInfo,
        handle: Handle,
        context: Arc<ListenerContext>,
    ) -> Self {
        let now = Instant::now();
        Self {
            socket: Some(socket),
            sink: context.handlers.assign(),
            caller: handle.caller().clone(),
            conninfo: Some(Box::new(peer.to_proto())),
            machine: Machine::start(context.settings.timeouts.clone(), now),
            inputs: VecDeque::new(),
            calls: Calls::default(),
            outgoing: VecDeque::new(),
            flushing: false,
            blocked: false,
            peer_ended: false,
            late_end: None,
            messages_next: false,
            client: None,
            rates: Rates::new(&context, now),
            timer: None,
            done: false,
            handle,
            context,
        }
    }

    pub(super) async fn drive(&mut self) {
        loop {
            while let Some(action) = self.machine.next_action() {
                self.act(action);
            }
            if self.done {
                return;
            }
            let input = poll_fn(|cx| self.poll_input(cx)).await;
            self.note(&input);
            self.machine.handle(input, Instant::now());
        }
    }

    pub(super) fn context(&self) -> &ListenerContext {
        &self.context
    }

    pub(super) fn reason(&self) -> CloseReason {
        let fault = || CloseReason::SocketError("internal error".to_owned());
        self.machine.close_reason().cloned().unwrap_or_else(fault)
    }

    /// Keeps what the machine does not.
    fn note(&mut self, input: &Input<Vec<Delivery>>) {
        match input {
            Input::Authenticated(_) => self.client = self.handle.client().ok(),
            Input::SendBlocked => self.blocked = true,
            Input::Sent | Input::Flushed => self.blocked = false,
            _ => {}
        }
    }

    fn act(&mut self, action: Action<Vec<Delivery>>) {
        match action {
            Action::Call(call) => self.start_call(call),
            Action::Flush => {
                self.end();
                self.flushing = true;
            }
            Action::Abort => {
                self.end();
                self.cut_off();
            }
            Action::Finish => self.done = true,
        }
    }

    /// Closes the socket and throws away what waits for the device.
    fn cut_off(&mut self) {
        self.handle.abandon();
        self.outgoing = VecDeque::new();
        self.flushing = false;
        self.blocked = false;
        if let Some(mut socket) = self.socket.take() {
            socket.abort();
        }
    }

    fn start_call(&mut self, call: Call<Vec<Delivery>>) {
        // Acknowledged when the callback ends.
        let mut deliveries = Vec::new();
        let event = match call {
            Call::Created => Event::SocketCreated(*self.conninfo.take().unwrap_or_default()),
            Call::Bytes(bytes) => Event::ReceivedBytes(bytes),
            Call::Batch(batch) => {
                let messages = batch.iter().map(|delivery| self.message(delivery));
                let traces = batch.iter().map(|delivery| delivery.message.trace);
                let event = Event::ReceivedMessages(messages.collect(), trace::of_all(traces));
                deliveries = batch;
                event
            }
            Call::Timer => Event::TimerTimeout,
            Call::Closed(reason) => Event::SocketClosed(reason.to_string()),
        };
        tracing::debug!(callback = event.method(), "calling the handler");
        let of_messages = !deliveries.is_empty();
        let size = event.size();
        let future = self.sink.deliver(self.caller.clone(), event);
        self.calls.begin(of_messages, size, deliveries, future);
    }

    fn message(&self, delivery: &Delivery) -> proto::Message {
        let message = &delivery.message;
        let topic = match &self.client {
            Some(client) => client.mountpoint.unmount(&message.topic),
            None => &message.topic,
        };
        proto::Message {
            node: self.context.settings.node_name.clone(),
            id: message.id.text(),
            qos: delivery.qos.number(),
            from: message.from.clone(),
            topic: topic.to_owned(),
            payload: message.payload.clone(),
            timestamp: message.timestamp,
        }
    }

    /// From here on the connection takes no requests and is no client any more.
    fn end(&mut self) {
        if let Some(client) = self.handle.end() {
            let id = self.handle.id();
            self.context.registry.release(&client.clientid, id);
            if let Some(own) = &client.own {
                own.end(!self.reason().is_farewell());
            }
        }
    }

    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Input<Vec<Delivery>>> {
        if let Some(input) = self.next_input() {
            return Poll::Ready(input);
        }
        if let Poll::Ready((result, deliveries)) = self.calls.poll_ended(cx) {
            return Poll::Ready(Input::CallEnded(self.call_ended(result, deliveries)));
        }
        let room = self.calls.size() < MAX_AHEAD;
        self.machine.set_window(if room {
            self.sink.window(&self.caller, S::STREAM)
        } else {
            1
        });
        let wishes = self.handle.look(cx, &mut self.outgoing);
        let messages_wait = wishes.messages_wait;
        // Most often there is none.
        if wishes.are_some() {
            let authenticated = wishes.authenticated.map(Input::Authenticated);
            let keepalive = wishes.keepalive.map(Input::KeepaliveSet);
            let close = wishes.close.map(Input::CloseRequested);
            let drain = wishes.drain.then_some(Input::DrainRequested);
            let in_order = [authenticated, keepalive, close, drain];
            self.inputs.extend(in_order.into_iter().flatten());
            if let Some(input) = self.next_input() {
                return Poll::Ready(input);
            }
        }
        if let Poll::Ready(input) = self.poll_send(cx) {
            return Poll::Ready(input);
        }
        // A paused device goes on when its time has come.
        if let Some(rates) = &mut self.rates
            && rates.resume.is_some_and(|at| at <= Instant::now())
        {
            rates.resume = None;
            self.machine.set_paused(false);
        }
        let messages = messages_wait && self.machine.wants_messages();
        if messages && self.messages_next {
            return self.take_batch();
        }
        if self.machine.is_reading()
            && let Poll::Ready(input) = self.poll_receive(cx)
        {
            // Who is second in turn is first the next time.
            self.messages_next = true;
            return Poll::Ready(input);
        }
        if messages {
            return self.take_batch();
        }
        self.poll_timer(cx)
    }

    /// The next of what was found together.
    fn next_input(&mut self) -> Option<Input<Vec<Delivery>>> {
        let input = self.inputs.pop_front()?;
        if self.inputs.is_empty() {
            // An idle connection holds no memory for what once came together.
            self.inputs = VecDeque::new();
        }
        Some(input)
    }

    fn take_batch(&mut self) -> Poll<Input<Vec<Delivery>>> {
        self.messages_next = false;
        let count = self.context.settings.max_batch;
        let batch = self.handle.take_messages(count, MAX_BATCH_BYTES);
        Poll::Ready(Input::Batch(batch))
    }

    fn call_ended(
        &mut self,
        result: Result<(), CallFailure>,
        deliveries: Vec<Delivery>,
    ) -> Outcome {
        let count = deliveries.len() as u64;
        // Taken, or never to be: either way they are acknowledged now.
        drop(deliveries);
        match result {
            Ok(()) => {
                self.context.metrics.delivered.increment(count);
                Outcome::Taken
            }
            Err(failure) => {
                self.context.metrics.dropped_closed.increment(count);
                // A gateway that drains waits for no handler, which is no news.
                let told = match self.context.draining.is_cancelled() {
                    true => None,
                    false => self.context.complaints.tell(Instant::now()),
                };
                if let Some(left_out) = told {
                    let (conn, listener) = (self.handle.id(), &*self.context.name);
                    tracing::warn!(%conn, listener, %failure, left_out, "a callback failed");
                } else {
                    tracing::debug!(%failure, "a callback failed");
                }
                match failure {
                    CallFailure::Unavailable(_) if self.caller.may_be_known() => Outcome::Unknown,
                    CallFailure::Unavailable(_) => Outcome::Unavailable,
                    CallFailure::Failed { .. } => Outcome::Failed,
                }
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Input<Vec<Delivery>>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Pending;
        };
        if !self.outgoing.is_empty() {
            let empty = IoSlice::new(&[]);
            let mut slices = [empty; MAX_SLICES];
            let mut count = 0;
            let most = if S::STREAM { MAX_SLICES } else { 1 };
            for (slice, chunk) in slices.iter_mut().zip(&self.outgoing).take(most) {
                *slice = IoSlice::new(chunk);
                count += 1;
            }
            let slices = slices.get(..count).unwrap_or_default();
            return match socket.poll_send(cx, slices) {
                Poll::Ready(Ok(sent)) => {
                    self.consume(sent);
                    Poll::Ready(Input::Sent)
                }
                Poll::Ready(Err(error)) => Poll::Ready(Input::SocketFailed(describe(&error))),
                Poll::Pending if self.blocked => Poll::Pending,
                Poll::Pending => Poll::Ready(Input::SendBlocked),
            };
        }
        if self.flushing
            && let Poll::Ready(result) = socket.poll_finish(cx)
        {
            self.flushing = false;
            if !S::STREAM {
                // Forgotten as soon as it is closed, not once the handler knows: what the
                // peer sends next is a new connection's.
                self.socket = None;
            }
            return Poll::Ready(match result {
                Ok(()) => Input::Flushed,
                // The device has gone already: there is nobody to tell.
                Err(error) if error.kind() == std::io::ErrorKind::NotConnected => Input::Flushed,
                Err(error) => Input::SocketFailed(describe(&error)),
            });
        }
        Poll::Pending
    }

    /// Takes sent bytes off the front and tells those who wait for it.
    fn consume(&mut self, sent: usize) {
        self.context.metrics.sent_bytes.increment(sent as u64);
        if !S::STREAM {
            // A chunk is a datagram, which is sent whole; it may be empty.
            if let Some(datagram) = self.outgoing.pop_front() {
                self.handle.sent(weight(&datagram));
            }
            if self.outgoing.is_empty() {
                self.outgoing = VecDeque::new();
            }
            return;
        }
        self.handle.sent(sent);
        let mut left = sent;
        while let Some(chunk) = self.outgoing.front_mut() {
            let count = left.min(chunk.len());
            chunk.advance(count);
            left -= count;
            if !chunk.is_empty() {
                return;
            }
            self.outgoing.pop_front();
        }
        // An idle connection holds no memory for what it once sent.
        self.outgoing = VecDeque::new();
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Input<Vec<Delivery>>> {
        if let Some(end) = self.late_end.take() {
            return Poll::Ready(*end);
        }
        let bytes = loop {
            let bytes = match with_scratch(|scratch| self.read(cx, scratch)) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Ready(Ok(bytes)) => bytes,
            };
            let metrics = &self.context.metrics;
            metrics.received_bytes.increment(bytes.len() as u64);
            let Some(rates) = &mut self.rates else {
                break bytes;
            };
            let now = Instant::now();
            if S::STREAM {
                let rest = rates.debit(bytes.len(), now);
                if !rest.is_zero() {
                    rates.resume = Some(now + rest);
                    self.machine.set_paused(true);
                    metrics.reads_paused.increment(1);
                }
                break bytes;
            }
            // Datagrams do not wait: no more than the queue holds are dropped here.
            if rates.admits(bytes.len(), now) {
                break bytes;
            }
            metrics.dropped_rate.increment(1);
        };
        Poll::Ready(Input::Received(bytes))
    }

    /// Reads what has come: on a stream everything, up to [`MAX_READ`].
    fn read(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
    ) -> Poll<Result<Bytes, Input<Vec<Delivery>>>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Pending;
        };
        let room = self
            .rates
            .as_ref()
            .map_or(usize::MAX, |rates| rates.burst());
        let scratch = match scratch.get_mut(..room) {
            Some(part) if S::STREAM => part,
            _ => scratch,
        };
        let max_read = MAX_READ.min(room);
        let mut long = Vec::new();
        loop {
            let end = match socket.poll_receive(cx, scratch) {
                Poll::Ready(Ok(Received::Bytes(count))) => {
                    let bytes = scratch.get(..count).unwrap_or_default();
                    let whole = count < scratch.len() || !S::STREAM;
                    if whole && long.is_empty() {
                        return Poll::Ready(Ok(Bytes::copy_from_slice(bytes)));
                    }
                    long.extend_from_slice(bytes);
                    if whole || long.len() >= max_read {
                        return Poll::Ready(Ok(long.into()));
                    }
                    continue;
                }
                Poll::Pending if long.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(Ok(long.into())),
                Poll::Ready(Ok(Received::End)) => {
                    self.peer_ended = true;
                    Input::PeerClosed
                }
                Poll::Ready(Err(error)) => Input::SocketFailed(describe(&error)),
            };
            if long.is_empty() {
                return Poll::Ready(Err(end));
            }
            // It comes after the bytes before it.
            self.late_end = Some(Box::new(end));
            return Poll::Ready(Ok(long.into()));
        }
    }

    /// Ready when a deadline of the machine has passed, or reading may go on.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Input<Vec<Delivery>>> {
        loop {
            let resume = self.rates.as_ref().and_then(|rates| rates.resume);
            let due = [self.machine.deadline(), resume]
                .into_iter()
                .flatten()
                .min();
            let Some(due) = due else {
                return Poll::Pending;
            };
            // A timer that is set too early is left alone: activity moves deadlines
            // on, and looking once more is cheaper than setting it each time.
            let timer = match &mut self.timer {
                Some(timer) if timer.deadline().into_std() <= due => timer,
                Some(timer) => {
                    timer.as_mut().reset(due.into());
                    timer
                }
                none => none.insert(Box::pin(tokio::time::sleep_until(due.into()))),
            };
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            if due > now {
                timer.as_mut().reset(due.into());
                continue;
            }
            if resume.is_some_and(|at| at <= now) {
                // Look at everything again, reading included.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            return Poll::Ready(Input::Elapsed);
        }
    }

    /// The task panicked: tells the handler that the connection is over, if it may
    /// know of it and has not been told.
    pub(super) async fn after_panic(&mut self) {
        self.context.metrics.panics.increment(1);
        let (conn, listener) = (self.handle.id(), &*self.context.name);
        if let Some(left_out) = self.context.complaints.tell(Instant::now()) {
            tracing::error!(%conn, listener, left_out, "a fault of the gateway's ended this connection");
        }
        self.end();
        self.cut_off();
        // Callbacks that are on their way come before the last. One of them may be where
        // the fault is.
        let ended = AssertUnwindSafe(self.calls.all_ended());
        let _ = ended.catch_unwind().await;
        if self.machine.owes_closed() {
            let event = Event::SocketClosed(self.reason().to_string());
            // A handler that does not take it is counted by the sink.
            let _ = self.sink.deliver(self.caller.clone(), event).await;
        }
    }

    /// See [`linger`].
    pub(super) async fn linger(&mut self, reason: &CloseReason) {
        let failed = matches!(reason, CloseReason::SocketError(_));
        let Some(socket) = self.socket.take() else {
            return;
        };
        if S::STREAM && !failed && !self.peer_ended {
            linger(socket, &self.context).await;
        }
    }
}

/// A socket error in few and stable words.
fn describe(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::Other => error.to_string(),
        kind => kind.to_string(),
    }
}
