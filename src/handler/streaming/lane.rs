//! The task that runs the streams of one kind on one channel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{AbortHandle, BoxFuture, abortable};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;

use super::{Behind, Entry, Kind, Options, WINDOW};
use crate::handler::call::{MAX_WAIT, late};
use crate::handler::client::{Client, OnUnavailable, PAUSES};
use crate::handler::ledger::{ConnKey, End, Ledger, Limits, Output, StreamId};
use crate::handler::link::Link;
use crate::handler::status::{Away, Miss, miss};
use crate::handler::{CallFailure, Caller};
use crate::metrics::{Share, StreamOutcome};
use crate::telemetry::Seldom;

/// Most events that are taken in before anything else is looked at.
const BATCH: usize = 256;

/// The streams of one kind: the task's own.
pub(super) struct Lane {
    ledger: Ledger<Entry>,
    hands: Hands,
    pause: Duration,
    /// Connections that the metric counts as held.
    held: Share,
    /// Why the last stream broke.
    trouble: String,
    /// For the lines about streams that failed.
    complaints: Seldom,
    /// Whether a handler that ends streams early was told of.
    warned: bool,
}

type Answers = FuturesUnordered<BoxFuture<'static, (StreamId, Option<Result<(), tonic::Status>>)>>;
/// A connection whose entries were tried, and why one failed. As long as the ledger knows it by its
/// address, no other may have that.
type Tried = (Arc<Caller>, Option<CallFailure>);

/// What does as the ledger says.
struct Hands {
    client: Client,
    link: Arc<Link>,
    kind: Kind,
    /// The streams under way: where to write, until they are ended, and how to cancel.
    streams: Vec<(StreamId, Option<mpsc::UnboundedSender<Bytes>>, AbortHandle)>,
    /// Their answers; none for a stream that was cancelled.
    answers: Answers,
    tries: FuturesUnordered<BoxFuture<'static, Tried>>,
}

impl Lane {
    pub(super) fn new(client: Client, link: Arc<Link>, kind: Kind, options: &Options) -> Self {
        let patience = client.0.options.request_timeout;
        let held = Share::new(client.0.metrics.held.clone());
        Self {
            ledger: Ledger::new(Limits {
                max_messages: options.max_messages,
                max_bytes: options.max_bytes,
                max_age: options.max_age,
                hurry: WINDOW as u32 / 2,
                patience,
                at_least_once: options.at_least_once,
            }),
            hands: Hands {
                client,
                link,
                kind,
                streams: Vec::new(),
                answers: Answers::new(),
                tries: FuturesUnordered::new(),
            },
            pause: PAUSES.0,
            held,
            trouble: String::new(),
            warned: false,
            complaints: Seldom::default(),
        }
    }

    /// Runs until the sink is gone and everything is settled.
    pub(super) async fn run(mut self, mut entries: mpsc::UnboundedReceiver<Entry>) {
        let mut arrived = Vec::new();
        let mut again: Option<BoxFuture<'static, ()>> = None;
        let mut timer = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let draining = self.hands.client.0.draining.clone();
        let mut gone = false;
        while !gone || !self.ledger.is_empty() {
            self.look_at_link();
            self.held.set(self.ledger.held());
            if self.ledger.is_suspended() && again.is_none() {
                again = Some(self.handler_back());
            }
            let due = self.due();
            let held = self.ledger.is_suspended() && self.ledger.has_waiting();
            if let Some(due) = due
                && timer.deadline().into_std() != due
            {
                timer.as_mut().reset(due.into());
            }
            tokio::select! {
                biased;
                // First, so that what was handed over is known here when a failure of its
                // connection is: it must not come after it.
                count = entries.recv_many(&mut arrived, BATCH), if !gone => {
                    gone = count == 0;
                    self.take(&mut arrived);
                }
                Some((stream, answer)) = self.hands.answers.next() => {
                    while let Ok(entry) = entries.try_recv() {
                        arrived.push(entry);
                    }
                    self.take(&mut arrived);
                    self.answered(stream, answer);
                }
                Some((tried, failure)) = self.hands.tries.next() => {
                    while let Ok(entry) = entries.try_recv() {
                        arrived.push(entry);
                    }
                    self.take(&mut arrived);
                    let conn = ConnKey::of(&tried);
                    self.ledger.tried(conn, failure, Instant::now(), &mut self.hands);
                }
                // A gateway that drains waits for nobody.
                () = draining.cancelled(), if held => {
                    self.ledger.give_up(&self.trouble, &mut self.hands);
                }
                () = resolved(&mut again) => {
                    again = None;
                    if self.hands.link.is_up() {
                        self.ledger.resume(Instant::now(), &mut self.hands);
                    }
                }
                () = timer.as_mut(), if due.is_some() => self.elapsed(),
            }
        }
    }

    fn take(&mut self, arrived: &mut Vec<Entry>) {
        // Those who left before their event was sent need not be told of.
        let now = Instant::now();
        for entry in arrived.drain(..).filter(|entry| !entry.done.is_closed()) {
            let (conn, size) = (ConnKey::of(&entry.caller), entry.request.len());
            self.ledger.push(conn, size, entry, now, &mut self.hands);
        }
    }

    /// Opens nothing on a channel that is down.
    fn look_at_link(&mut self) {
        let link = &self.hands.link;
        if !self.ledger.is_suspended() && !link.is_up() {
            self.trouble = link.trouble();
            self.ledger.suspend(Instant::now());
        }
    }

    /// Resolves when the handler may be there again, or is known not to be.
    fn handler_back(&mut self) -> BoxFuture<'static, ()> {
        let link = self.hands.link.clone();
        if !link.is_up() {
            return Box::pin(async move { link.back().await });
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSES.1);
        Box::pin(tokio::time::sleep(pause))
    }

    /// When the handler has been away for longer than is borne.
    fn end_of_patience(&self) -> Option<Instant> {
        let suspended = self.ledger.is_suspended() && self.ledger.has_waiting();
        let since = self.ledger.outage().filter(|_| suspended)?;
        match self.hands.client.0.options.on_unavailable {
            OnUnavailable::Hold(limit) => Some(since + limit?),
            OnUnavailable::Close(_) if self.hands.link.is_away() => Some(since),
            OnUnavailable::Close(limit) => Some(since + limit),
        }
    }

    fn due(&self) -> Option<Instant> {
        let times = [self.ledger.deadline(), self.end_of_patience()];
        times.into_iter().flatten().min()
    }

    fn answered(&mut self, stream: StreamId, answer: Option<Result<(), tonic::Status>>) {
        self.hands.streams.retain(|(id, ..)| *id != stream);
        let early = self.ledger.is_open(stream);
        let metrics = &self.hands.client.0.metrics;
        let count = |outcome| metrics.stream_ended(self.hands.kind.method(), outcome);
        let end = match answer {
            // Cancelled: the ledger knows.
            None => return,
            Some(Ok(())) if early => {
                count(StreamOutcome::Early);
                End::Taken
            }
            Some(Ok(())) => {
                count(StreamOutcome::Ok);
                self.pause = PAUSES.0;
                End::Taken
            }
            Some(Err(status)) => match miss(&status) {
                Miss::Away { how, why } => {
                    count(StreamOutcome::Broken);
                    self.trouble.clone_from(&why);
                    self.away(stream, how, why)
                }
                Miss::Refused(failed) => {
                    count(StreamOutcome::Error);
                    self.complain(&failed, "a handler failed a stream");
                    End::Refused(failed)
                }
            },
        };
        if early && end == End::Taken && !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                handler = self.hands.client.0.metrics.handler(),
                "a handler answered a stream before its end, and nobody knows which of its messages it has read; \
                 they are sent again, each by itself, and so is everything from now on. It must read a stream to its \
                 end, or be used without handler.streaming"
            );
        }
        self.ledger
            .ended(stream, end, Instant::now(), &mut self.hands);
    }

    /// A stream has shown that the handler is away.
    fn away(&self, stream: StreamId, how: Away, why: String) -> End {
        let options = &self.hands.client.0.options;
        let closes = options.on_unavailable.closes();
        match how {
            Away::NotSent => End::NotSent(why),
            // Only the device that it is said of is to be closed for it.
            Away::Declined if closes => {
                let failure = CallFailure::Unavailable(why);
                self.complain(&failure, "a handler is unavailable for a stream");
                End::Refused(failure)
            }
            Away::Declined | Away::Broke => {
                if options.at_least_once && self.ledger.has_suspect(stream) {
                    let failure = CallFailure::Unavailable(why.clone());
                    self.complain(&failure, "a handler is away for a stream once more");
                }
                End::Broken(why)
            }
        }
    }

    fn complain(&self, failure: &CallFailure, what: &str) {
        if let Some(left_out) = self.complaints.tell(Instant::now()) {
            let handler = self.hands.client.0.metrics.handler();
            let then = match self.hands.client.0.options.at_least_once {
                true => "each of its messages is sent again by itself",
                false => "its connections are closed",
            };
            tracing::warn!(handler, %failure, left_out, "{what}; {then}");
        }
    }

    fn elapsed(&mut self) {
        let now = Instant::now();
        if self.end_of_patience().is_some_and(|end| end <= now) {
            self.ledger.give_up(&self.trouble, &mut self.hands);
        }
        self.ledger.elapsed(now, &mut self.hands);
        let patience = self.hands.client.0.options.request_timeout;
        // Time that the handler spends waiting for us is not the handler's.
        let waited = |entry: &Entry| entry.caller.waited().saturating_sub(entry.waited);
        while let Some((stream, since, waited)) = self.ledger.late(now, waited) {
            let until = since + patience + waited.min(MAX_WAIT);
            if until > now {
                self.ledger.extend(stream, until);
                continue;
            }
            self.hands.cancel(stream);
            let metrics = &self.hands.client.0.metrics;
            metrics.stream_ended(self.hands.kind.method(), StreamOutcome::Late);
            let failure = late(patience);
            self.complain(&failure, "a handler did not answer a stream");
            self.ledger
                .ended(stream, End::Late(failure), now, &mut self.hands);
        }
    }
}

/// The result of a future, if it is there.
async fn resolved(future: &mut Option<BoxFuture<'static, ()>>) {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

impl Hands {
    fn cancel(&mut self, stream: StreamId) {
        for (_, _, abort) in self.streams.iter().filter(|(id, ..)| *id == stream) {
            abort.abort();
        }
        self.streams.retain(|(id, ..)| *id != stream);
    }
}

impl Output<Entry> for Hands {
    fn open(&mut self, stream: StreamId) {
        let (sender, requests) = mpsc::unbounded_channel();
        let (client, link, method) = (self.client.clone(), self.link.clone(), self.kind.method());
        let (answer, abort) =
            abortable(async move { client.0.calls.stream(&link, method, requests).await });
        let answer = async move { (stream, answer.await.ok()) };
        self.answers.push(Box::pin(answer));
        self.streams.push((stream, Some(sender), abort));
        self.client.0.metrics.stream_opened(method);
    }

    fn hold(&mut self, entry: &mut Entry) {
        let behind = || Behind::new(&entry.caller);
        entry.behind.get_or_insert_with(behind);
    }

    fn write(&mut self, stream: StreamId, entry: &mut Entry, again: bool) {
        entry.behind = None;
        entry.waited = entry.caller.waited();
        if again {
            self.client.0.metrics.resent.increment(1);
        }
        let mut streams = self.streams.iter();
        if let Some((_, Some(sender), _)) = streams.find(|(id, ..)| *id == stream) {
            // A stream that broke says so itself.
            let _ = sender.send(entry.request.clone());
        }
    }

    fn end(&mut self, stream: StreamId) {
        for (_, sender, _) in self.streams.iter_mut().filter(|(id, ..)| *id == stream) {
            *sender = None;
        }
    }

    fn try_alone(&mut self, _: ConnKey, entries: Vec<Entry>) {
        self.client.0.metrics.resent.increment(entries.len() as u64);
        let Some(caller) = entries.first().map(|entry| entry.caller.clone()) else {
            return;
        };
        let (client, kind) = (self.client.clone(), self.kind);
        self.tries.push(Box::pin(async move {
            let failure = try_each(&client, kind, entries).await;
            (caller, failure)
        }));
    }

    fn settle(&mut self, entry: Entry, result: Result<(), CallFailure>) {
        settle(&self.client, self.kind, entry, result);
    }
}

fn settle(client: &Client, kind: Kind, entry: Entry, result: Result<(), CallFailure>) {
    let metrics = &client.0.metrics;
    match &result {
        Ok(()) => metrics.succeeded(kind.method(), entry.handed.elapsed()),
        Err(failure) => metrics.failed(kind.method(), failure.outcome()),
    }
    drop(entry.held);
    // The connection may be gone.
    let _ = entry.done.send(result);
}

/// Calls with one entry of a connection after another. The first failure is that of
/// all that follow.
async fn try_each(client: &Client, kind: Kind, entries: Vec<Entry>) -> Option<CallFailure> {
    let mut failed = None;
    for entry in entries {
        let result = match &failed {
            Some(failure) => Err(CallFailure::clone(failure)),
            None => match kind.event(entry.request.clone(), entry.trace) {
                Ok(event) => client.0.call_alone(&entry.caller, &event).await,
                Err(error) => Err(CallFailure::Failed {
                    code: "INTERNAL",
                    message: error.to_string(),
                }),
            },
        };
        failed = result.as_ref().err().cloned();
        settle(client, kind, entry, result);
    }
    failed
}

impl ConnKey {
    /// By address: the entries that carry it, and those who try them, keep the caller alive.
    fn of(caller: &Arc<Caller>) -> Self {
        Self(Arc::as_ptr(caller) as usize)
    }
}
