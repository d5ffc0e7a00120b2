//! What a device's messages have come to: each one sent arrives once, or is lost, or
//! arrives again.

use std::collections::{HashSet, VecDeque};

/// Sequence numbers of lost messages that are remembered for each device, so that one
/// that comes after all counts as late. Beyond it it counts as a duplicate.
const REMEMBERED: usize = 4096;

/// A message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// When it was meant to be sent, in nanoseconds.
    pub intended: u64,
    /// Whether it counts: what is sent to warm up does not.
    pub measured: bool,
}

/// What an arrival is.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The first of this message; `in_order` unless a later one was here before.
    First { sent: Sent, in_order: bool },
    /// This message was here already.
    Again,
    /// This message had been given up.
    Late,
    /// No such message was sent.
    Unknown,
}

/// Follows the messages of one device.
#[derive(Debug, Default)]
pub struct Tracker {
    /// Sequence number of the first entry.
    first: u32,
    /// `None` once it has arrived or was given up.
    entries: VecDeque<Option<Sent>>,
    /// One more than the highest that has arrived.
    highest: u32,
    lost: HashSet<u32>,
}

impl Tracker {
    /// Counts a message as sent and gives its sequence number.
    pub fn begin(&mut self, sent: Sent) -> u32 {
        let sequence = self.next();
        self.entries.push_back(Some(sent));
        sequence
    }

    /// The sequence number of the next message.
    fn next(&self) -> u32 {
        let count = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        self.first.wrapping_add(count)
    }

    /// Counts an arrival.
    pub fn arrive(&mut self, sequence: u32) -> Arrival {
        if sequence >= self.next() {
            return Arrival::Unknown;
        }
        let place = sequence.checked_sub(self.first);
        let place = place.and_then(|place| usize::try_from(place).ok());
        let entry = place.and_then(|place| self.entries.get_mut(place));
        if let Some(sent) = entry.and_then(Option::take) {
            let in_order = sequence >= self.highest;
            self.highest = self.highest.max(sequence.saturating_add(1));
            self.trim();
            return Arrival::First { sent, in_order };
        }
        if self.lost.remove(&sequence) {
            return Arrival::Late;
        }
        Arrival::Again
    }

    /// Gives up what was meant to be sent before `before` and has not arrived.
    pub fn give_up(&mut self, before: u64, mut lost: impl FnMut(u32, Sent)) {
        let mut sequence = self.first;
        for entry in &mut self.entries {
            // Later ones were sent later.
            if entry.is_some_and(|sent| sent.intended >= before) {
                break;
            }
            if let Some(sent) = entry.take() {
                if self.lost.len() < REMEMBERED {
                    self.lost.insert(sequence);
                }
                lost(sequence, sent);
            }
            sequence = sequence.wrapping_add(1);
        }
        self.trim();
    }

    fn trim(&mut self) {
        while let Some(None) = self.entries.front() {
            self.entries.pop_front();
            self.first = self.first.wrapping_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(intended: u64) -> Sent {
        Sent {
            intended,
            measured: true,
        }
    }

    fn first(intended: u64, in_order: bool) -> Arrival {
        Arrival::First {
            sent: sent(intended),
            in_order,
        }
    }

    #[test]
    fn each_message_arrives_once() {
        let mut tracker = Tracker::default();
        for time in 0..3 {
            assert_eq!(u64::from(tracker.begin(sent(time))), time);
        }
        assert_eq!(tracker.arrive(0), first(0, true));
        assert_eq!(tracker.arrive(2), first(2, true));
        assert_eq!(tracker.arrive(1), first(1, false));
        for sequence in 0..3 {
            assert_eq!(tracker.arrive(sequence), Arrival::Again);
        }
        assert_eq!(tracker.arrive(3), Arrival::Unknown);
        assert!(tracker.entries.is_empty());
    }

    #[test]
    fn what_does_not_come_is_lost_and_may_be_late() {
        let mut tracker = Tracker::default();
        for time in [10, 20, 30] {
            tracker.begin(sent(time));
        }
        assert_eq!(tracker.arrive(1), first(20, true));
        let mut lost = Vec::new();
        tracker.give_up(30, |sequence, sent| lost.push((sequence, sent.intended)));
        assert_eq!(lost, [(0, 10)]);
        tracker.give_up(30, |_, _| panic!("given up twice"));
        assert_eq!(tracker.arrive(0), Arrival::Late);
        assert_eq!(tracker.arrive(0), Arrival::Again);
        assert_eq!(tracker.arrive(2), first(30, true));
    }

    #[test]
    fn a_lost_message_holds_no_memory() {
        let mut tracker = Tracker::default();
        for time in 0..100_000 {
            let sequence = tracker.begin(sent(time));
            if sequence % 2 == 0 {
                tracker.arrive(sequence);
            }
            tracker.give_up(time, |_, _| {});
        }
        assert!(tracker.entries.len() < 10);
        assert_eq!(tracker.lost.len(), REMEMBERED);
    }
}
