//! What is on long-lived streams and not known to be taken: no IO, no clock.
//!
//! A client stream is answered once, at its end. So streams are short: one is open
//! and written to, and is ended when it has been for a while or is full; what it
//! carried is taken when its answer comes. Meanwhile the next one is written to.
//!
//! ```text
//!   push --> waiting --> open stream --end--> ended stream --OK--> taken
//!              ^             |                     |
//!              |             +------- broken ------+
//!              +---------------------/  |
//!                                       +-- error, late, broken a second time --> tried alone
//! ```
//!
//! Two streams may be under way, and a handler may work on both at the same time. So
//! a connection has entries on one of them only: what comes for it while the other is
//! not answered waits. That is what keeps a connection's entries in order. What comes for one
//! whose entries are tried alone waits for those alone; everybody else's streams go on.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::CallFailure;
use crate::numbers::NumberMap;

/// Streams under way: one that is written to and one that waits for its answer. More
/// would take more of a handler's threads, of which each stream holds one.
const MAX_STREAMS: usize = 2;

/// Most messages on the first stream. Each that is answered in good time doubles the
/// number; see [`Limits::patience`].
const FIRST_MESSAGES: usize = 32;

/// Names a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct StreamId(pub u64);

/// Tells connections apart, for as long as one has an entry in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ConnKey(pub usize);

/// When a stream ends.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Most messages on one.
    pub max_messages: usize,
    /// Most bytes on one; a larger message has a stream of its own.
    pub max_bytes: usize,
    /// How long one is written to, if nothing else ends it.
    pub max_age: Duration,
    /// Messages of one connection that end a stream before its time: whose window is
    /// half used up should not have to wait.
    pub hurry: u32,
    /// How long an answer may take. Streams get shorter when half of it is used up, for a
    /// handler that is slow with each message must not seem dead because of many.
    pub patience: Duration,
    /// Whether what was on a stream that was not answered with OK is sent again. If not, its fate
    /// is unknown and its connections are told of a failure.
    pub at_least_once: bool,
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The handler answered OK.
    Taken,
    /// The channel broke, or the handler is unavailable; why.
    Broken(String),
    /// The channel broke before anything of it was sent; why.
    NotSent(String),
    /// The handler answered with an error.
    Refused(CallFailure),
    /// It did not answer in time.
    Late(CallFailure),
}

/// What the ledger wants done.
pub(super) trait Output<E> {
    /// Open a stream.
    fn open(&mut self, stream: StreamId);
    /// This one has to wait for a stream, until it is written or settled.
    fn hold(&mut self, entry: &mut E);
    /// Write to a stream; `again` is a message that was on another one before.
    fn write(&mut self, stream: StreamId, entry: &mut E, again: bool);
    /// Write nothing more to a stream and wait for its answer.
    fn end(&mut self, stream: StreamId);
    /// Hand over each of these entries of one connection by itself, one after another and
    /// none after one that failed; then [`Ledger::tried`].
    fn try_alone(&mut self, conn: ConnKey, entries: Vec<E>);
    /// An entry's fate.
    fn settle(&mut self, entry: E, result: Result<(), CallFailure>);
}

#[derive(Debug)]
struct Item<E> {
    conn: ConnKey,
    size: usize,
    again: bool,
    /// It was on a stream that broke. On a second one it may be the cause.
    suspect: bool,
    entry: E,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Since when, and when its answer is late.
    Ended(Instant, Instant),
}

#[derive(Debug)]
struct Stream<E> {
    id: StreamId,
    state: State,
    /// When its first message was written.
    begun: Instant,
    items: Vec<Item<E>>,
    bytes: usize,
    /// No more fits, or somebody should not have to wait.
    full: bool,
}

impl<E> Stream<E> {
    fn has_suspect(&self) -> bool {
        self.items.iter().any(|item| item.suspect)
    }
}

/// Where an entry may go.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// To the open stream.
    Here,
    /// Its connection has entries on another stream, or they are tried alone.
    Later,
    /// No stream has room, for nobody.
    Nowhere,
}

/// What the ledger has of one connection.
#[derive(Debug, Default)]
struct Conn {
    /// The one stream that carries entries of it.
    on: Option<StreamId>,
    /// How many of them.
    written: u32,
    /// Whether entries of it are tried alone; then no stream carries any.
    alone: bool,
    /// How many wait.
    waiting: u32,
}

impl Conn {
    fn is_nothing(&self) -> bool {
        self.written == 0 && !self.alone && self.waiting == 0
    }

    /// Whether it waits for a stream, and not for entries of its own that are tried alone.
    fn waits_for_stream(&self) -> bool {
        self.waiting > 0 && !self.alone
    }
}

/// See the module. `E` is what the entries are.
#[derive(Debug)]
pub(super) struct Ledger<E> {
    limits: Limits,
    next: u64,
    /// The oldest first; only the last can be open.
    streams: VecDeque<Stream<E>>,
    waiting: VecDeque<Item<E>>,
    /// Connections that wait for a stream.
    waiting_conns: usize,
    /// Connections whose entries are tried alone.
    alone: usize,
    conns: NumberMap<ConnKey, Conn>,
    /// Most messages on a stream for now.
    most: usize,
    /// The handler answers streams before their end, so each carries one message.
    cautious: bool,
    /// No stream is opened: the handler is away.
    suspended: bool,
    /// Since when nothing got through of what was to. While something waits for a handler that is
    /// away there is one; where nothing waits for a stream, nor is on one, there is none.
    outage: Option<Instant>,
}

/// Of a stream that was answered before its end.
fn early() -> CallFailure {
    CallFailure::Failed {
        code: "INTERNAL",
        message: "a stream was answered before its end".to_owned(),
    }
}

impl<E> Ledger<E> {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            most: FIRST_MESSAGES.min(limits.max_messages),
            limits,
            next: 0,
            streams: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_conns: 0,
            alone: 0,
            conns: NumberMap::default(),
            cautious: false,
            suspended: false,
            outage: None,
        }
    }

    /// Whether nothing is on its way and nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.streams.is_empty() && self.alone == 0
    }

    /// Whether connections wait for a stream.
    pub(super) fn has_waiting(&self) -> bool {
        self.waiting_conns > 0
    }

    /// Connections that wait for a handler that is away.
    pub(super) fn held(&self) -> usize {
        if self.suspended {
            self.waiting_conns
        } else {
            0
        }
    }

    /// Whether streams are not opened until [`Ledger::resume`].
    pub(super) fn is_suspended(&self) -> bool {
        self.suspended
    }

    /// Whether this stream is still written to: its answer would come too early.
    pub(super) fn is_open(&self, stream: StreamId) -> bool {
        let mut streams = self.streams.iter();
        streams.any(|s| s.id == stream && s.state == State::Open)
    }

    /// Whether something on this stream was on one that broke before.
    pub(super) fn has_suspect(&self, stream: StreamId) -> bool {
        let mut streams = self.streams.iter().filter(|s| s.id == stream);
        streams.any(|stream| stream.has_suspect())
    }

    /// Since when nothing has got through.
    pub(super) fn outage(&self) -> Option<Instant> {
        self.outage
    }

    /// When [`Ledger::elapsed`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let due = |stream: &Stream<E>| match stream.state {
            State::Open if self.streams.len() == 1 => Some(stream.begun + self.limits.max_age),
            State::Ended(_, due) => Some(due),
            State::Open => None,
        };
        self.streams.iter().filter_map(due).min()
    }

    /// Takes an entry of `size` bytes.
    pub(super) fn push(
        &mut self,
        conn: ConnKey,
        size: usize,
        entry: E,
        now: Instant,
        out: &mut impl Output<E>,
    ) {
        if self.suspended {
            self.outage.get_or_insert(now);
        }
        let mut item = Item {
            conn,
            size,
            again: false,
            suspect: false,
            entry,
        };
        let waits = self.conns.entry(conn).or_default().waiting > 0;
        if !waits && self.place(&item, now, out) == Place::Here {
            self.write(item, out);
        } else {
            self.waits(conn);
            out.hold(&mut item.entry);
            self.waiting.push_back(item);
        }
        // What waits already waits for an answer; nothing came that lets it go.
        if self.end_if_due(now, out) {
            self.pump(now, out);
        }
        self.end_outage();
    }

    /// A stream has ended.
    pub(super) fn ended(
        &mut self,
        stream: StreamId,
        end: End,
        now: Instant,
        out: &mut impl Output<E>,
    ) {
        let Some(index) = self.streams.iter().position(|s| s.id == stream) else {
            return;
        };
        let Some(stream) = self.streams.remove(index) else {
            return;
        };
        match end {
            End::Taken if stream.state != State::Open => {
                self.adapt(&stream, now);
                self.heard(now);
                for item in stream.items {
                    self.release(item.conn);
                    out.settle(item.entry, Ok(()));
                }
            }
            End::NotSent(_) => self.again(stream.items, false, now, out),
            End::Broken(trouble) => {
                let failure = CallFailure::Unavailable(trouble);
                if !self.limits.at_least_once {
                    self.suspend(now);
                    self.fail_all(stream.items, &failure, out);
                } else if stream.has_suspect() {
                    // It may be because of one of them: the others are not to wait for that.
                    self.each_alone(stream.items, &failure, out);
                } else {
                    self.again(stream.items, true, now, out);
                }
            }
            End::Refused(failure) => self.each_alone(stream.items, &failure, out),
            End::Late(failure) => {
                self.most = (self.most / 4).max(1);
                self.each_alone(stream.items, &failure, out);
            }
            // An answer before the end: nobody can know what the handler has read.
            End::Taken => {
                (self.cautious, self.most) = (true, 1);
                self.each_alone(stream.items, &early(), out);
            }
        }
        self.pump(now, out);
        self.end_outage();
    }

    /// The entries of a connection have been tried alone. Where one failed, what waits for
    /// the connection must not come after it, and fails too.
    pub(super) fn tried(
        &mut self,
        conn: ConnKey,
        failure: Option<CallFailure>,
        now: Instant,
        out: &mut impl Output<E>,
    ) {
        self.alone = self.alone.saturating_sub(1);
        self.change(conn, |conn| conn.alone = false);
        match failure {
            None => self.heard(now),
            Some(failure) if self.conns.contains_key(&conn) => {
                self.fail(&HashMap::from([(conn, failure)]), out);
            }
            Some(_) => {}
        }
        self.pump(now, out);
        self.end_outage();
    }

    /// Opens no stream until [`Ledger::resume`].
    pub(super) fn suspend(&mut self, now: Instant) {
        self.suspended = true;
        // It may be another one that comes back.
        self.cautious = false;
        self.outage.get_or_insert(now);
        self.end_outage();
    }

    /// Something got through.
    fn heard(&mut self, now: Instant) {
        let waits = self.suspended && self.has_waiting();
        self.outage = waits.then_some(now);
    }

    /// An outage that keeps nobody waiting is not the beginning of the next.
    fn end_outage(&mut self) {
        if !self.has_waiting() && self.streams.is_empty() {
            self.outage = None;
        }
    }

    /// The handler may be there again.
    pub(super) fn resume(&mut self, now: Instant, out: &mut impl Output<E>) {
        self.suspended = false;
        if !self.has_waiting() {
            // What was on streams meanwhile had nothing to wait for.
            self.outage = None;
        }
        self.pump(now, out);
    }

    /// The handler was away for too long: what waits for a stream fails. What waits for entries
    /// that are tried alone shares their fate.
    pub(super) fn give_up(&mut self, trouble: &str, out: &mut impl Output<E>) {
        self.outage = None;
        for item in std::mem::take(&mut self.waiting) {
            if self.conns.get(&item.conn).is_some_and(|conn| conn.alone) {
                self.waiting.push_back(item);
                continue;
            }
            self.no_longer_waits(item.conn);
            out.settle(
                item.entry,
                Err(CallFailure::Unavailable(trouble.to_owned())),
            );
        }
    }

    /// Time has passed: see [`Ledger::deadline`].
    pub(super) fn elapsed(&mut self, now: Instant, out: &mut impl Output<E>) {
        if self.end_if_due(now, out) {
            self.pump(now, out);
        }
    }

    /// A stream whose answer is late, since when it is ended, and the sum of what `time`
    /// says of its entries.
    pub(super) fn late(
        &self,
        now: Instant,
        time: impl Fn(&E) -> Duration,
    ) -> Option<(StreamId, Instant, Duration)> {
        self.streams.iter().find_map(|stream| match stream.state {
            State::Ended(since, due) if due <= now => {
                let times = stream.items.iter().map(|item| time(&item.entry));
                Some((stream.id, since, times.sum()))
            }
            _ => None,
        })
    }

    /// A stream's answer is late only then.
    pub(super) fn extend(&mut self, stream: StreamId, until: Instant) {
        let mut streams = self.streams.iter_mut();
        if let Some(stream) = streams.find(|s| s.id == stream)
            && let State::Ended(_, due) = &mut stream.state
        {
            *due = until;
        }
    }

    /// Finds out where an entry may go, and opens a stream for it where there is none.
    fn place(&mut self, item: &Item<E>, now: Instant, out: &mut impl Output<E>) -> Place {
        let conn = self.conns.get(&item.conn);
        let (on, alone) = conn.map_or((None, false), |conn| (conn.on, conn.alone));
        let under_way = self.streams.len();
        match self.streams.back_mut() {
            Some(stream) if stream.state == State::Open => {
                let large = stream.bytes + item.size > self.limits.max_bytes;
                if alone || on.is_some_and(|on| on != stream.id) {
                    Place::Later
                } else if stream.items.len() >= self.most || (large && !stream.items.is_empty()) {
                    stream.full = true;
                    Place::Nowhere
                } else {
                    Place::Here
                }
            }
            _ if self.suspended || under_way >= MAX_STREAMS => Place::Nowhere,
            _ if alone || on.is_some() => Place::Later,
            _ => {
                let id = StreamId(self.next);
                self.next += 1;
                self.streams.push_back(Stream {
                    id,
                    state: State::Open,
                    begun: now,
                    items: Vec::new(),
                    bytes: 0,
                    full: false,
                });
                out.open(id);
                Place::Here
            }
        }
    }

    /// Writes to the stream that [`Ledger::place`] has found.
    fn write(&mut self, mut item: Item<E>, out: &mut impl Output<E>) {
        let Some(stream) = self.streams.back_mut() else {
            return;
        };
        let conn = self.conns.entry(item.conn).or_default();
        conn.on = Some(stream.id);
        conn.written += 1;
        stream.bytes += item.size;
        stream.full |= conn.written >= self.limits.hurry;
        out.write(stream.id, &mut item.entry, item.again);
        stream.items.push(item);
    }

    /// Writes what may be written.
    fn pump(&mut self, now: Instant, out: &mut impl Output<E>) {
        loop {
            self.fill(now, out);
            if !self.end_if_due(now, out) || self.waiting.is_empty() {
                return;
            }
        }
    }

    fn fill(&mut self, now: Instant, out: &mut impl Output<E>) {
        if self.suspended {
            return;
        }
        let mut passed_over = VecDeque::new();
        while let Some(item) = self.waiting.pop_front() {
            match self.place(&item, now, out) {
                Place::Here => {
                    // Written before it is forgotten, for the connection is known.
                    let conn = item.conn;
                    self.write(item, out);
                    self.no_longer_waits(conn);
                }
                Place::Later => passed_over.push_back(item),
                Place::Nowhere => {
                    self.waiting.push_front(item);
                    break;
                }
            }
        }
        passed_over.append(&mut self.waiting);
        self.waiting = passed_over;
    }

    /// Ends the open stream if it is full or old and no other is under way. One that
    /// carries a single message need not wait for others.
    fn end_if_due(&mut self, now: Instant, out: &mut impl Output<E>) -> bool {
        if self.streams.len() != 1 && !self.cautious {
            return false;
        }
        let (limits, most) = (&self.limits, self.most);
        let due = |stream: &&mut Stream<E>| {
            stream.state == State::Open
                && (stream.full
                    || stream.items.len() >= most
                    || stream.bytes >= limits.max_bytes
                    || stream.begun + limits.max_age <= now)
        };
        let Some(stream) = self.streams.back_mut().filter(due) else {
            return false;
        };
        stream.state = State::Ended(now, now + limits.patience);
        out.end(stream.id);
        true
    }

    /// Long streams for a handler that is fast, short ones for one that is slow.
    fn adapt(&mut self, stream: &Stream<E>, now: Instant) {
        let State::Ended(since, _) = stream.state else {
            return;
        };
        if self.cautious {
            return;
        }
        let took = now.saturating_duration_since(since);
        if took * 2 > self.limits.patience {
            self.most = (self.most / 2).max(1);
        } else if took * 4 <= self.limits.patience && stream.items.len() * 2 >= self.most {
            self.most = (self.most * 2).min(self.limits.max_messages);
        }
    }

    /// What was on a stream goes before what waits.
    fn again(
        &mut self,
        items: Vec<Item<E>>,
        suspect: bool,
        now: Instant,
        out: &mut impl Output<E>,
    ) {
        for mut item in items.into_iter().rev() {
            item.again = true;
            item.suspect |= suspect;
            out.hold(&mut item.entry);
            self.waits(item.conn);
            self.release(item.conn);
            self.waiting.push_front(item);
        }
        self.suspend(now);
    }

    /// Fails what was on a stream, and what waits for its connections.
    fn fail_all(&mut self, items: Vec<Item<E>>, failure: &CallFailure, out: &mut impl Output<E>) {
        let mut failed = HashMap::new();
        for item in items {
            failed.insert(item.conn, failure.clone());
            self.release(item.conn);
            out.settle(item.entry, Err(failure.clone()));
        }
        self.fail(&failed, out);
    }

    /// Fails what waits for these connections.
    fn fail(&mut self, failed: &HashMap<ConnKey, CallFailure>, out: &mut impl Output<E>) {
        if failed.is_empty() {
            return;
        }
        for item in std::mem::take(&mut self.waiting) {
            match failed.get(&item.conn) {
                None => self.waiting.push_back(item),
                Some(failure) => {
                    self.no_longer_waits(item.conn);
                    out.settle(item.entry, Err(failure.clone()));
                }
            }
        }
    }

    /// Each connection's entries are handed over by themselves from now on, or fail where nothing is
    /// sent twice.
    fn each_alone(&mut self, items: Vec<Item<E>>, failure: &CallFailure, out: &mut impl Output<E>) {
        if !self.limits.at_least_once {
            return self.fail_all(items, failure, out);
        }
        let mut order = Vec::new();
        let mut by_conn: HashMap<ConnKey, Vec<E>> = HashMap::new();
        for item in items {
            let entries = by_conn.entry(item.conn).or_default();
            if entries.is_empty() {
                order.push(item.conn);
            }
            entries.push(item.entry);
        }
        for key in order {
            self.alone += 1;
            self.change(key, |conn| {
                (conn.on, conn.written, conn.alone) = (None, 0, true);
            });
            out.try_alone(key, by_conn.remove(&key).unwrap_or_default());
        }
    }

    /// One entry of a connection is no longer on a stream.
    fn release(&mut self, key: ConnKey) {
        self.change(key, |conn| {
            conn.written = conn.written.saturating_sub(1);
            if conn.written == 0 {
                conn.on = None;
            }
        });
    }

    /// One more entry of a connection waits.
    fn waits(&mut self, key: ConnKey) {
        self.change(key, |conn| conn.waiting += 1);
    }

    fn no_longer_waits(&mut self, key: ConnKey) {
        self.change(key, |conn| conn.waiting = conn.waiting.saturating_sub(1));
    }

    /// Changes what is kept of a connection, which is nothing of one that has nothing here.
    fn change(&mut self, key: ConnKey, change: impl FnOnce(&mut Conn)) {
        let conn = self.conns.entry(key).or_default();
        let waited = conn.waits_for_stream();
        change(conn);
        match (waited, conn.waits_for_stream()) {
            (false, true) => self.waiting_conns += 1,
            (true, false) => self.waiting_conns = self.waiting_conns.saturating_sub(1),
            _ => {}
        }
        if conn.is_nothing() {
            self.conns.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
