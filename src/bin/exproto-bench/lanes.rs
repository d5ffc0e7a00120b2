//! The messages of each device: who may send the next one, and what has arrived.
//!
//! A lane is a device's messages. In a closed loop an arrival begins the next message
//! of its lane; in an open loop a thread begins them when they are due. Whoever writes
//! a lane's messages, the device or an MQTT client, is woken and takes what is due.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, mpsc};

use crate::frame::{EVERY_DEVICE, Head, Kind, RunId};
use crate::stats::Stats;
use crate::tracker::{Arrival, Sent, Tracker};

/// Most messages of an open loop under way at a time; beyond it they are not sent and
/// counted. A message under way takes some 50 bytes here.
const MAX_OUTSTANDING: u64 = 1_000_000;

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Nothing is sent yet.
    SettingUp,
    /// Messages are sent and do not count.
    WarmingUp,
    /// Messages count.
    Measuring,
    /// Nothing is sent any more.
    Over,
}

/// Who writes the messages of the lanes.
pub enum Senders {
    /// Each device its own.
    Devices,
    /// MQTT clients, which share the lanes.
    Peers(Vec<mpsc::UnboundedSender<u32>>),
    /// The first MQTT client, one message for all lanes.
    Everyone(mpsc::UnboundedSender<u32>),
}

/// A message to be written.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    pub sequence: u32,
    /// Nanoseconds since the bench began.
    pub time: u64,
}

#[derive(Default)]
struct Lane {
    state: Mutex<LaneState>,
    /// Something is due.
    ready: Notify,
}

#[derive(Default)]
struct LaneState {
    tracker: Tracker,
    due: VecDeque<Due>,
}

/// Messages of a fan-out that have not reached everybody.
#[derive(Default)]
struct FanOut {
    waiting: HashMap<u32, Spread>,
    due: VecDeque<Due>,
}

struct Spread {
    sent: Sent,
    /// Devices at which it is not yet.
    missing: usize,
    /// Whether it was lost for none.
    whole: bool,
}

/// See the module. Shared by all threads.
pub struct Lanes {
    lanes: Vec<Lane>,
    fan_out: Mutex<FanOut>,
    senders: Senders,
    kind: Kind,
    run: RunId,
    /// An arrival begins the next message.
    closed_loop: bool,
    clock: Instant,
    phase: AtomicU8,
    /// Messages that may still begin, if their number is given.
    budget: Option<AtomicI64>,
    pub stats: Stats,
}

/// What a run of lanes is made of.
pub struct Plan {
    pub devices: u32,
    pub senders: Senders,
    pub kind: Kind,
    pub run: RunId,
    pub closed_loop: bool,
    pub messages: Option<u64>,
    pub clock: Instant,
    pub stats: Stats,
}

impl Lanes {
    /// Nothing has been sent.
    pub fn new(plan: Plan) -> Self {
        let lanes = (0..plan.devices).map(|_| Lane::default()).collect();
        Self {
            lanes,
            fan_out: Mutex::default(),
            senders: plan.senders,
            kind: plan.kind,
            run: plan.run,
            closed_loop: plan.closed_loop,
            clock: plan.clock,
            phase: AtomicU8::new(Phase::SettingUp as u8),
            budget: plan
                .messages
                .map(|count| AtomicI64::new(i64::try_from(count).unwrap_or(i64::MAX))),
            stats: plan.stats,
        }
    }

    /// Nanoseconds since the bench began.
    pub fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The number of devices.
    pub fn count(&self) -> u32 {
        u32::try_from(self.lanes.len()).unwrap_or(u32::MAX)
    }

    /// The run that frames belong to.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Goes on to the next phase.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// Whether messages count.
    fn measuring(&self) -> bool {
        self.phase.load(Ordering::Acquire) == Phase::Measuring as u8
    }

    /// Whether all messages that may begin have begun.
    pub fn is_spent(&self) -> bool {
        self.budget
            .as_ref()
            .is_some_and(|budget| budget.load(Ordering::Acquire) <= 0)
    }

    /// Leave for a message that begins now: how it counts.
    fn admit(&self, intended: u64) -> Option<Sent> {
        let phase = self.phase.load(Ordering::Acquire);
        if phase == Phase::WarmingUp as u8 {
            let measured = false;
            return Some(Sent { intended, measured });
        }
        if phase != Phase::Measuring as u8 {
            return None;
        }
        let within = match &self.budget {
            None => true,
            Some(budget) => budget.fetch_sub(1, Ordering::AcqRel) > 0,
        };
        let measured = true;
        within.then_some(Sent { intended, measured })
    }

    /// Fills the windows of a closed loop.
    pub fn fill(&self, window: u32) {
        for _ in 0..window {
            if matches!(self.senders, Senders::Everyone(_)) {
                self.begin(0, self.now());
                continue;
            }
            for lane in 0..self.count() {
                self.begin(lane, self.now());
            }
        }
    }

    /// Begins a message of a lane, if the run is not over.
    pub fn begin(&self, lane: u32, intended: u64) {
        if !self.closed_loop && self.stats.outstanding() >= MAX_OUTSTANDING {
            if self.measuring() {
                self.stats.skipped.add(1);
            }
            return;
        }
        let Some(sent) = self.admit(intended) else {
            return;
        };
        if let Senders::Everyone(sender) = &self.senders {
            self.begin_for_all(sent, sender);
            return;
        }
        let Some(found) = self.lane(lane) else { return };
        self.stats.begun(sent);
        let mut state = lock(&found.state);
        let sequence = state.tracker.begin(sent);
        state.due.push_back(Due {
            sequence,
            time: intended,
        });
        drop(state);
        match &self.senders {
            Senders::Peers(peers) => {
                let number = usize::try_from(lane).unwrap_or_default();
                if let Some(peer) = number.checked_rem(peers.len()).and_then(|n| peers.get(n)) {
                    // A client that has ended was reported, and the run ends.
                    let _ = peer.send(lane);
                }
            }
            Senders::Devices | Senders::Everyone(_) => found.ready.notify_one(),
        }
    }

    fn begin_for_all(&self, sent: Sent, sender: &mpsc::UnboundedSender<u32>) {
        // Held for all lanes, so that they number alike.
        let mut fan_out = lock(&self.fan_out);
        let mut number = 0;
        for lane in &self.lanes {
            number = lock(&lane.state).tracker.begin(sent);
            self.stats.begun(sent);
        }
        let spread = Spread {
            sent,
            missing: self.lanes.len(),
            whole: true,
        };
        fan_out.waiting.insert(number, spread);
        fan_out.due.push_back(Due {
            sequence: number,
            time: sent.intended,
        });
        if sent.measured {
            self.stats.published.add(1);
        }
        let _ = sender.send(EVERY_DEVICE);
    }

    /// Waits until something of this lane is due. Cancel safe.
    pub async fn ready(&self, lane: u32) {
        match self.lane(lane) {
            Some(lane) => lane.ready.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Takes what is due of a lane if its device is to write it.
    pub fn take_own(&self, lane: u32) -> Option<Due> {
        match self.senders {
            Senders::Devices => self.take(lane),
            Senders::Peers(_) | Senders::Everyone(_) => None,
        }
    }

    /// Takes what is due of a lane, or of the one for all.
    pub fn take(&self, lane: u32) -> Option<Due> {
        if lane == EVERY_DEVICE {
            return lock(&self.fan_out).due.pop_front();
        }
        lock(&self.lane(lane)?.state).due.pop_front()
    }

    /// The head of a message's frame.
    pub fn head(&self, lane: u32, due: Due) -> Head {
        Head {
            kind: self.kind,
            run: self.run,
            device: lane,
            sequence: due.sequence,
            time: due.time,
        }
    }

    /// A frame is at its end: at the MQTT client, or at device `at`.
    pub fn arrived(&self, head: Head, at: Option<u32>) {
        let now = self.now();
        let for_all = head.device == EVERY_DEVICE;
        let lane = if for_all { at } else { Some(head.device) };
        let ours = head.run == self.run && head.kind == self.kind;
        // A device must get its own messages only.
        let astray = at.is_some() && lane != at;
        let found = lane.filter(|_| ours && !astray);
        let Some((number, lane)) = found.and_then(|n| Some((n, self.lane(n)?))) else {
            self.stats.unknown.add(1);
            return;
        };
        let arrival = lock(&lane.state).tracker.arrive(head.sequence);
        match arrival {
            Arrival::First { sent, in_order } => {
                self.stats.first(sent, in_order, now);
                if for_all {
                    self.at_one_more(head.sequence, true, now);
                } else if self.closed_loop {
                    self.begin(number, now);
                }
            }
            Arrival::Again => self.stats.duplicated.add(1),
            Arrival::Late => self.stats.late.add(1),
            Arrival::Unknown => self.stats.unknown.add(1),
        }
    }

    /// A message of a fan-out is at one device more, or will never be.
    fn at_one_more(&self, sequence: u32, arrived: bool, now: u64) {
        let mut fan_out = lock(&self.fan_out);
        let Some(spread) = fan_out.waiting.get_mut(&sequence) else {
            return;
        };
        spread.missing = spread.missing.saturating_sub(1);
        spread.whole &= arrived;
        if spread.missing > 0 {
            return;
        }
        let (sent, whole) = (spread.sent, spread.whole);
        fan_out.waiting.remove(&sequence);
        drop(fan_out);
        if whole {
            self.stats.reached_all(sent, now);
        }
        if self.closed_loop {
            self.begin(0, now);
        }
    }

    /// Gives up what was meant to be sent before `before`, in nanoseconds.
    pub fn give_up(&self, before: u64) {
        for (number, lane) in (0..).zip(&self.lanes) {
            let mut lost = Vec::new();
            lock(&lane.state)
                .tracker
                .give_up(before, |sequence, sent| lost.push((sequence, sent)));
            for (sequence, sent) in lost {
                self.stats.gave_up(sent);
                if matches!(self.senders, Senders::Everyone(_)) {
                    self.at_one_more(sequence, false, self.now());
                } else if self.closed_loop {
                    self.begin(number, self.now());
                }
            }
        }
    }

    fn lane(&self, lane: u32) -> Option<&Lane> {
        self.lanes.get(usize::try_from(lane).ok()?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(devices: u32, senders: Senders, messages: Option<u64>) -> Lanes {
        Lanes::new(Plan {
            devices,
            senders,
            kind: Kind::Echo,
            run: RunId::new([1, 2, 3]),
            closed_loop: true,
            messages,
            clock: Instant::now(),
            stats: Stats::new().unwrap(),
        })
    }

    #[test]
    fn an_arrival_begins_the_next_message_until_the_budget_is_spent() {
        let lanes = lanes(2, Senders::Devices, Some(5));
        lanes.fill(2);
        assert!(lanes.take(0).is_none(), "nothing is sent while setting up");
        lanes.enter(Phase::Measuring);
        lanes.fill(2);
        assert_eq!(lanes.stats.outstanding(), 4);
        let mut arrived = 0;
        while let Some((lane, due)) = (0..2).find_map(|lane| Some((lane, lanes.take(lane)?))) {
            lanes.arrived(lanes.head(lane, due), Some(lane));
            arrived += 1;
        }
        assert_eq!(arrived, 5);
        assert!(lanes.is_spent());
        assert_eq!((lanes.stats.sent.get(), lanes.stats.arrived.get()), (5, 5));
    }

    #[test]
    fn frames_of_others_are_counted_and_change_nothing() {
        let lanes = lanes(2, Senders::Devices, None);
        lanes.enter(Phase::Measuring);
        lanes.fill(1);
        let due = lanes.take(0).unwrap();
        let head = lanes.head(0, due);
        lanes.arrived(head, Some(1));
        let run = RunId::new([9; 3]);
        lanes.arrived(Head { run, ..head }, Some(0));
        lanes.arrived(Head { device: 7, ..head }, None);
        assert_eq!(
            (lanes.stats.unknown.get(), lanes.stats.arrived.get()),
            (3, 0)
        );
        lanes.arrived(head, Some(0));
        lanes.arrived(head, Some(0));
        assert_eq!(
            (lanes.stats.arrived.get(), lanes.stats.duplicated.get()),
            (1, 1)
        );
    }

    #[test]
    fn a_lost_message_makes_room_for_the_next() {
        let lanes = lanes(1, Senders::Devices, None);
        lanes.enter(Phase::Measuring);
        lanes.fill(1);
        let first = lanes.take(0).unwrap();
        lanes.give_up(u64::MAX);
        assert_eq!(lanes.stats.lost.get(), 1);
        assert_eq!(lanes.take(0).unwrap().sequence, first.sequence + 1);
        lanes.arrived(lanes.head(0, first), Some(0));
        assert_eq!((lanes.stats.late.get(), lanes.stats.outstanding()), (1, 1));
    }

    #[test]
    fn a_fan_out_is_complete_with_its_last_device() {
        let (sender, mut wakes) = mpsc::unbounded_channel();
        let lanes = lanes(3, Senders::Everyone(sender), Some(2));
        lanes.enter(Phase::Measuring);
        lanes.fill(1);
        assert_eq!(wakes.try_recv(), Ok(EVERY_DEVICE));
        let head = lanes.head(EVERY_DEVICE, lanes.take(EVERY_DEVICE).unwrap());
        for device in 0..3 {
            assert!(lanes.take(EVERY_DEVICE).is_none());
            lanes.arrived(head, Some(device));
        }
        assert_eq!(
            (lanes.stats.complete.get(), lanes.stats.arrived.get()),
            (1, 3)
        );
        assert!(lanes.take(EVERY_DEVICE).is_some(), "the next one follows");
        lanes.give_up(u64::MAX);
        assert_eq!((lanes.stats.complete.get(), lanes.stats.lost.get()), (1, 3));
    }

    #[test]
    fn peers_share_the_lanes() {
        let (senders, mut wakes): (Vec<_>, Vec<_>) =
            (0..2).map(|_| mpsc::unbounded_channel()).unzip();
        let lanes = lanes(3, Senders::Peers(senders), None);
        lanes.enter(Phase::WarmingUp);
        lanes.fill(1);
        let woken = wakes
            .iter_mut()
            .map(|wakes| std::iter::from_fn(|| wakes.try_recv().ok()).collect::<Vec<u32>>());
        assert_eq!(woken.collect::<Vec<_>>(), [vec![0, 2], vec![1]]);
        assert_eq!(lanes.stats.sent.get(), 0);
        assert!(lanes.take_own(0).is_none(), "the device does not write it");
        assert!(lanes.take(0).is_some());
    }
}
