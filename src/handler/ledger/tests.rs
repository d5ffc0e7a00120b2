//! The ledger against a handler and a channel that do everything at random.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

/// An entry: its connection and its number there.
type Name = (usize, usize);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    Taken,
    Failed,
}

/// Plays the task, the channel and the handler, and watches over the rules.
struct World {
    now: Instant,
    limits: Limits,
    out: Recorder,
    ledger: Ledger<Name>,
    pushed: HashMap<usize, usize>,
}

#[derive(Default)]
struct Recorder {
    /// What each stream under way carries, and whether it is ended.
    streams: BTreeMap<StreamId, (Vec<Name>, bool)>,
    /// Entries that are tried alone, by connection.
    trying: BTreeMap<usize, Vec<Name>>,
    /// Each entry's first time on a stream, in order, for each connection.
    first: HashMap<usize, Vec<usize>>,
    fates: HashMap<Name, Fate>,
    /// Entries that wait for a stream.
    held: HashSet<Name>,
    again: usize,
    broken: usize,
    /// Entries on streams that were not sent.
    unsent: usize,
    /// Connections of which an entry failed.
    failed: Vec<usize>,
    longest: usize,
}

impl Output<Name> for Recorder {
    fn open(&mut self, stream: StreamId) {
        self.streams.insert(stream, (Vec::new(), false));
        let under_way = self.streams.len();
        assert!(under_way <= MAX_STREAMS, "{under_way} streams");
        let open = self.streams.values().filter(|(_, ended)| !ended).count();
        assert_eq!(open, 1, "one is written to");
    }

    fn hold(&mut self, entry: &mut Name) {
        assert!(self.held.insert(*entry), "held twice: {entry:?}");
    }

    fn write(&mut self, stream: StreamId, entry: &mut Name, again: bool) {
        self.held.remove(entry);
        let (conn, number) = *entry;
        for (other, (entries, _)) in &self.streams {
            let also = entries.iter().any(|(c, _)| *c == conn);
            assert!(*other == stream || !also, "on two streams: {conn}");
        }
        assert!(!self.trying.contains_key(&conn), "overtakes");
        let failed = self.failed.contains(&conn);
        assert!(again || !failed, "after a failure: {entry:?}");
        let (entries, ended) = self.streams.get_mut(&stream).unwrap();
        assert!(!*ended, "written to after its end");
        if let Some((_, last)) = entries.iter().rev().find(|(c, _)| *c == conn) {
            assert!(*last < number, "{last} before {number} of {conn}");
        }
        entries.push(*entry);
        self.longest = self.longest.max(entries.len());
        let first = self.first.entry(conn).or_default();
        if again {
            self.again += 1;
            assert!(first.contains(&number));
        } else {
            assert!(first.last().is_none_or(|last| *last < number));
            first.push(number);
        }
    }

    fn end(&mut self, stream: StreamId) {
        let (entries, ended) = self.streams.get_mut(&stream).unwrap();
        assert!(!entries.is_empty() && !*ended);
        *ended = true;
    }

    fn try_alone(&mut self, key: ConnKey, entries: Vec<Name>) {
        assert!(entries.iter().all(|(conn, _)| key.0 == *conn));
        assert!(entries.is_sorted() && !entries.is_empty());
        let before = self.trying.insert(key.0, entries);
        assert_eq!(before, None, "tried twice at a time");
    }

    fn settle(&mut self, entry: Name, result: Result<(), CallFailure>) {
        let fate = if result.is_ok() {
            Fate::Taken
        } else {
            self.failed.push(entry.0);
            Fate::Failed
        };
        self.held.remove(&entry);
        let before = self.fates.insert(entry, fate);
        assert_eq!(before, None, "settled twice: {entry:?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push {
        conn: usize,
        size: usize,
    },
    /// The answer of the stream in this place.
    Ended(usize, End),
    /// Which connection of those tried alone has ended, and which entry failed first, if any.
    Tried(usize, Option<usize>),
    Wait(u64),
    Suspend,
    Resume,
    GiveUp,
}

fn failure() -> CallFailure {
    CallFailure::Unavailable("no".to_owned())
}

fn steps() -> impl Strategy<Value = Step> {
    let end = prop_oneof![
        6 => Just(End::Taken),
        2 => Just(End::Broken("gone".to_owned())),
        1 => Just(End::NotSent("down".to_owned())),
        1 => Just(End::Refused(failure())),
        1 => Just(End::Late(failure())),
    ];
    prop_oneof![
        20 => (0..6_usize, 1..40_usize).prop_map(|(conn, size)| Step::Push { conn, size }),
        6 => (0..2_usize, end).prop_map(|(place, end)| Step::Ended(place, end)),
        6 => (0..6_usize, proptest::option::of(0..8_usize))
            .prop_map(|(place, fails)| Step::Tried(place, fails)),
        4 => (0..20_u64).prop_map(Step::Wait),
        1 => Just(Step::Suspend),
        3 => Just(Step::Resume),
        1 => Just(Step::GiveUp),
    ]
}

fn limits(at_least_once: bool) -> Limits {
    Limits {
        max_messages: 6,
        max_bytes: 60,
        max_age: Duration::from_millis(5),
        hurry: 3,
        patience: Duration::from_millis(40),
        at_least_once,
    }
}

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            now: Instant::now(),
            ledger: Ledger::new(limits.clone()),
            limits,
            out: Recorder::default(),
            pushed: HashMap::new(),
        }
    }

    fn push(&mut self, conn: usize, size: usize) {
        // A connection that was told of a failure hands over nothing more.
        if self.out.failed.contains(&conn) {
            return;
        }
        let number = self.pushed.entry(conn).or_default();
        let entry = (conn, *number);
        *number += 1;
        let key = ConnKey(conn);
        self.ledger.push(key, size, entry, self.now, &mut self.out);
    }

    fn ended(&mut self, stream: StreamId, end: End) {
        let (entries, ended) = self.out.streams.remove(&stream).unwrap();
        assert_eq!(self.ledger.is_open(stream), !ended);
        if matches!(end, End::Broken(_) | End::NotSent(_)) {
            self.out.broken += entries.len();
        }
        if matches!(end, End::NotSent(_)) {
            self.out.unsent += entries.len();
        }
        let count = self.out.fates.len();
        let taken = end == End::Taken && ended;
        self.ledger.ended(stream, end, self.now, &mut self.out);
        if taken {
            assert_eq!(self.out.fates.len(), count + entries.len());
            let all = entries
                .iter()
                .all(|entry| self.out.fates[entry] == Fate::Taken);
            assert!(all, "taken is taken");
        }
    }

    /// The entries of a connection were tried; the one in this place failed, and with it those
    /// that come after.
    fn tried(&mut self, place: usize, fails: Option<usize>) {
        let count = self.out.trying.len().max(1);
        let Some(conn) = self.out.trying.keys().nth(place % count).copied() else {
            return;
        };
        let entries = self.out.trying.remove(&conn).unwrap();
        let fails = fails.filter(|fails| *fails < entries.len());
        for (place, entry) in entries.into_iter().enumerate() {
            let fails = fails.is_some_and(|fails| place >= fails);
            let result = if fails { Err(failure()) } else { Ok(()) };
            self.out.settle(entry, result);
        }
        let failed = fails.map(|_| failure());
        let key = ConnKey(conn);
        self.ledger.tried(key, failed, self.now, &mut self.out);
        let waits = self.ledger.waiting.iter().any(|item| item.conn == key);
        assert!(fails.is_none() || !waits, "waits after a failure");
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Push { conn, size } => self.push(conn, size),
            Step::Ended(place, end) => {
                if let Some(stream) = self.out.streams.keys().nth(place).copied() {
                    self.ended(stream, end);
                }
            }
            Step::Tried(place, fails) => self.tried(place, fails),
            Step::Wait(time) => self.wait(Duration::from_millis(time)),
            Step::Suspend => self.ledger.suspend(self.now),
            Step::Resume => self.ledger.resume(self.now, &mut self.out),
            Step::GiveUp if self.ledger.is_suspended() => {
                self.ledger.give_up("away", &mut self.out);
                assert!(!self.ledger.has_waiting());
            }
            Step::GiveUp => {}
        }
        assert_eq!(self.out.again.min(self.out.broken), self.out.again);
        assert!(self.out.longest <= self.limits.max_messages);
        let alone = |conn: &usize| self.out.trying.contains_key(conn);
        let waiting = self.ledger.waiting.iter().map(|item| item.conn.0);
        let waiting = waiting.filter(|conn| !alone(conn));
        let waiting = waiting.collect::<HashSet<_>>().len();
        let held = if self.ledger.is_suspended() {
            waiting
        } else {
            0
        };
        assert_eq!(self.ledger.held(), held, "connections that are held");
        if held > 0 {
            assert!(self.ledger.outage().is_some(), "held without end");
        }
        if !self.ledger.has_waiting() && self.ledger.streams.is_empty() {
            assert_eq!(self.ledger.outage(), None, "of nobody");
        }
        let waiting = self.ledger.waiting.iter();
        let waiting: HashSet<Name> = waiting.map(|item| item.entry).collect();
        assert_eq!(self.out.held, waiting, "who waits is told so");
        let known = self.ledger.conns.len();
        assert!(known <= self.pushed.len());
        if self.ledger.is_empty() {
            assert_eq!(known, 0, "remembers who is gone");
        }
    }

    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(due) = self.ledger.deadline().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.ledger.elapsed(self.now, &mut self.out);
            // Two may be late at the same time.
            while let Some((stream, ..)) = self.ledger.late(self.now, |_| Duration::ZERO) {
                self.ended(stream, End::Late(failure()));
            }
            assert_ne!(self.ledger.deadline(), Some(due), "a timer without effect");
        }
        self.now = until;
    }

    /// Everything works from here on.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.ledger.is_empty() {
                return;
            }
            self.step(Step::Resume);
            while !self.out.trying.is_empty() {
                self.tried(0, None);
            }
            self.wait(self.limits.max_age);
            let ended = self.out.streams.iter().find(|(_, (_, ended))| *ended);
            if let Some(stream) = ended.map(|(stream, _)| *stream) {
                self.ended(stream, End::Taken);
            }
        }
        panic!("stuck: {:?}", self.ledger);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever breaks: every entry has one fate in the end, a connection's entries go
    /// out in order and on one stream at a time, and nothing goes out after a failure.
    #[test]
    fn whatever_breaks_nothing_is_lost_or_overtaken(
        at_least_once in any::<bool>(),
        steps in prop::collection::vec(steps(), 0..120),
    ) {
        let mut world = World::new(limits(at_least_once));
        for step in steps {
            world.step(step);
        }
        world.settle();
        let pushed: usize = world.pushed.values().sum();
        prop_assert_eq!(world.out.fates.len(), pushed);
        if !at_least_once {
            prop_assert!(world.out.again <= world.out.unsent);
        }
    }

    /// Where nothing fails everything goes out once, in order, and is taken.
    #[test]
    fn without_faults_everything_goes_out_once(
        pushes in prop::collection::vec((0..6_usize, 1..80_usize, 0..4_u64), 1..200),
    ) {
        let mut world = World::new(limits(true));
        for (conn, size, wait) in pushes {
            world.step(Step::Push { conn, size });
            // A handler that answers after five milliseconds is not late.
            world.wait(Duration::from_millis(wait));
            let ended = world.out.streams.iter().find(|(_, (_, ended))| *ended);
            if let Some(stream) = ended.map(|(stream, _)| *stream) {
                world.ended(stream, End::Taken);
            }
        }
        world.settle();
        let pushed: usize = world.pushed.values().sum();
        prop_assert_eq!(world.out.fates.len(), pushed);
        prop_assert!(world.out.fates.values().all(|fate| *fate == Fate::Taken));
        prop_assert_eq!(world.out.again, 0);
        for (conn, numbers) in &world.out.first {
            let expected: Vec<usize> = (0..world.pushed[conn]).collect();
            prop_assert_eq!(numbers, &expected);
        }
    }
}

/// A stream ends by its age, and the next one is opened for others meanwhile.
#[test]
fn a_stream_ends_by_age_and_others_go_on() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.wait(Duration::from_millis(4));
    assert!(!world.out.streams[&StreamId(0)].1);
    world.wait(Duration::from_millis(1));
    assert!(world.out.streams[&StreamId(0)].1);
    world.push(1, 1);
    world.push(2, 1);
    assert_eq!(world.out.streams[&StreamId(1)].0, [(2, 0)]);
    world.ended(StreamId(0), End::Taken);
    assert_eq!(world.out.streams[&StreamId(1)].0, [(2, 0), (1, 1)]);
}

/// A connection that has used half of its window does not wait for the age.
#[test]
fn a_busy_connection_ends_its_stream() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.push(1, 1);
    assert!(!world.out.streams[&StreamId(0)].1);
    world.push(1, 1);
    assert!(world.out.streams[&StreamId(0)].1);
}

/// What was on a stream that broke goes out first, in order, once the handler is back.
#[test]
fn what_was_on_a_broken_stream_goes_first() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.push(2, 1);
    world.ended(StreamId(0), End::Broken("gone".to_owned()));
    world.push(1, 1);
    assert!(world.out.streams.is_empty(), "opened while away");
    assert_eq!(world.ledger.outage(), Some(world.now));
    world.step(Step::Resume);
    assert_eq!(world.out.streams[&StreamId(1)].0, [(1, 0), (2, 0), (1, 1)]);
    assert_eq!(world.out.again, 2);
}

/// Without `at_least_once` the connections on a broken stream fail; what was not sent
/// of others goes out.
#[test]
fn without_at_least_once_an_unknown_fate_is_a_failure() {
    let mut world = World::new(limits(false));
    world.push(1, 1);
    world.ended(StreamId(0), End::Broken("gone".to_owned()));
    assert_eq!(world.out.fates[&(1, 0)], Fate::Failed);
    world.push(2, 1);
    world.step(Step::Resume);
    assert_eq!(world.out.streams[&StreamId(1)].0, [(2, 0)]);
}

/// What was never sent has a known fate: it goes out, whatever `at_least_once` says.
#[test]
fn what_was_not_sent_goes_out_without_at_least_once() {
    let mut world = World::new(limits(false));
    world.push(1, 1);
    world.ended(StreamId(0), End::NotSent("down".to_owned()));
    world.push(1, 1);
    world.step(Step::Resume);
    assert_eq!(world.out.streams[&StreamId(1)].0, [(1, 0), (1, 1)]);
    assert!(world.out.fates.is_empty());
}

/// Answers in good time make streams longer, slow ones shorter.
#[test]
fn the_length_of_streams_follows_the_handler() {
    let mut world = World::new(Limits {
        max_messages: 1000,
        max_bytes: 1_000_000,
        hurry: u32::MAX,
        ..limits(true)
    });
    assert_eq!(world.ledger.most, FIRST_MESSAGES);
    let mut round = |takes: u64, most: usize| {
        let count = world.ledger.most;
        for conn in 0..count {
            world.push(conn, 1);
        }
        world.now += Duration::from_millis(takes);
        let stream = *world.out.streams.keys().next().unwrap();
        world.ended(stream, End::Taken);
        assert_eq!(world.ledger.most, most);
    };
    round(10, 64);
    round(10, 128);
    round(15, 128);
    round(30, 64);
    round(30, 32);
}

/// An answer before the end says nothing about what was read.
#[test]
fn an_early_answer_is_no_answer() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.ended(StreamId(0), End::Taken);
    assert!(world.out.fates.is_empty());
    world.push(1, 1);
    world.tried(0, Some(0));
    assert_eq!(world.out.fates[&(1, 1)], Fate::Failed, "after a failure");
    assert!(world.ledger.is_empty());
}

/// A handler that answers too early gets streams of one message, which are over before
/// it can, until it has been away.
#[test]
fn who_answers_early_gets_one_message_a_stream() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.ended(StreamId(0), End::Taken);
    world.tried(0, None);
    world.push(1, 1);
    world.push(2, 1);
    assert_eq!(world.out.streams[&StreamId(1)], (vec![(1, 1)], true));
    assert_eq!(world.out.streams[&StreamId(2)], (vec![(2, 0)], true));
    world.ended(StreamId(1), End::Broken("gone".to_owned()));
    world.ended(StreamId(2), End::Taken);
    world.step(Step::Resume);
    assert!(!world.out.streams[&StreamId(3)].1);
}

/// Who is tried alone keeps nobody waiting: the streams of others go on, are ended and answered.
#[test]
fn who_is_tried_alone_holds_up_nobody_else() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.push(2, 1);
    world.wait(world.limits.max_age);
    world.ended(StreamId(0), End::Refused(failure()));
    assert_eq!(world.out.trying.len(), 2);
    world.tried(1, None);
    world.push(1, 1);
    for _ in 0..3 {
        world.push(2, 1);
        world.push(3, 1);
        world.wait(world.limits.max_age);
        let (stream, (entries, ended)) = world.out.streams.first_key_value().unwrap();
        assert!(*ended && entries.iter().all(|(conn, _)| *conn != 1));
        world.ended(*stream, End::Taken);
    }
    assert_eq!(world.out.held, HashSet::from([(1, 1)]));
    world.tried(0, None);
    assert!(world.out.held.is_empty());
}

/// An outage begins with those that are kept waiting by it: one that passed while nobody waited
/// is not the beginning of the next.
#[test]
fn an_outage_that_kept_nobody_waiting_is_over() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.ended(StreamId(0), End::Broken("gone".to_owned()));
    world.ledger.give_up("gone", &mut world.out);
    world.step(Step::Resume);
    assert_eq!(world.ledger.outage(), None);
    world.step(Step::Suspend);
    world.wait(Duration::from_secs(60));
    world.push(2, 1);
    assert_eq!(world.ledger.outage(), Some(world.now));
}

/// Where nothing is sent twice, whatever a stream's end leaves open is a failure of all that were
/// on it, and of nobody else.
#[test]
fn without_at_least_once_nothing_is_tried_alone() {
    for end in [End::Refused(failure()), End::Late(failure()), End::Taken] {
        let mut world = World::new(limits(false));
        world.push(1, 1);
        world.push(2, 1);
        if end != End::Taken {
            world.wait(world.limits.max_age);
        }
        world.push(3, 1);
        world.ended(StreamId(0), end.clone());
        assert!(world.out.trying.is_empty());
        let failed = |conn: usize| world.out.fates.get(&(conn, 0)) == Some(&Fate::Failed);
        // An answer before the end is one to all that were written.
        assert!(failed(1) && failed(2), "{end:?}");
        assert_eq!(failed(3), end == End::Taken, "{end:?}");
    }
}

/// What is large and waits for its connection's own entries that are tried alone ends nobody's stream.
#[test]
fn what_is_large_and_waits_ends_no_stream() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.wait(world.limits.max_age);
    world.ended(StreamId(0), End::Refused(failure()));
    world.push(1, 60);
    world.push(2, 1);
    assert!(!world.out.streams[&StreamId(1)].1);
    world.push(3, 1);
    assert!(!world.out.streams[&StreamId(1)].1);
    world.tried(0, None);
    assert!(world.out.streams[&StreamId(1)].1);
}

/// An outage lasts while something waits for a handler that is away: a word of it in between begins
/// it anew, and one that ended with nobody waiting is not the beginning of the next.
#[test]
fn an_outage_is_of_those_that_wait() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.ended(StreamId(0), End::Broken("gone".to_owned()));
    let begun = world.now;
    world.step(Step::Resume);
    assert_eq!(world.ledger.outage(), Some(begun));
    world.wait(Duration::from_millis(1));
    world.ended(StreamId(1), End::Broken("again".to_owned()));
    assert_eq!(world.ledger.outage(), None, "it is tried alone");
    world.step(Step::Suspend);
    world.wait(Duration::from_millis(1));
    world.push(2, 1);
    let begun = world.now;
    assert_eq!(world.ledger.outage(), Some(begun));
    world.wait(Duration::from_millis(1));
    world.tried(0, Some(0));
    assert_eq!(world.ledger.outage(), Some(begun), "a failure is no word");
    world.push(3, 1);
    world.step(Step::Resume);
    world.wait(world.limits.max_age);
    world.ended(StreamId(2), End::Taken);
    assert_eq!(world.ledger.outage(), None);
}

/// What breaks its stream a second time is tried alone, whatever streams beside it are answered: one
/// of them may be the cause, and the others do not wait for it.
#[test]
fn what_breaks_a_second_stream_is_tried_alone() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    world.push(2, 1);
    world.wait(world.limits.max_age);
    world.push(3, 1);
    world.ended(StreamId(0), End::Broken("declined".to_owned()));
    world.wait(world.limits.max_age);
    world.step(Step::Resume);
    world.ended(StreamId(1), End::Taken);
    world.wait(world.limits.max_age);
    assert_eq!(world.out.streams[&StreamId(2)].0, [(1, 0), (2, 0)]);
    world.ended(StreamId(2), End::Broken("declined".to_owned()));
    assert_eq!(world.out.trying.len(), 2);
    assert!(!world.ledger.is_suspended());
}

/// What was never sent is no suspect.
#[test]
fn what_was_not_sent_is_no_suspect() {
    let mut world = World::new(limits(true));
    world.push(1, 1);
    for stream in 0..3 {
        world.ended(StreamId(stream), End::NotSent("down".to_owned()));
        world.step(Step::Resume);
    }
    world.ended(StreamId(3), End::Broken("gone".to_owned()));
    assert!(world.out.trying.is_empty());
}
