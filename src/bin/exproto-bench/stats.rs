//! What has happened so far: counts and latencies.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hdrhistogram::Histogram;

use crate::tracker::Sent;

/// Latencies below it are the same, in nanoseconds.
const LEAST: u64 = 1_000;

/// Latencies above it count as it, in nanoseconds: ten minutes.
const MOST: u64 = 600_000_000_000;

/// Digits of a latency that are kept.
const DIGITS: u8 = 3;

/// An empty histogram of nanoseconds.
///
/// # Errors
/// None with the bounds above.
pub fn histogram() -> Result<Histogram<u64>, hdrhistogram::CreationError> {
    Histogram::new_with_bounds(LEAST, MOST, DIGITS)
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Latencies: of all that is measured, and of what came since the last look.
struct Latencies {
    all: Histogram<u64>,
    recent: Histogram<u64>,
    /// Fan-out: until the last device had it.
    to_all: Histogram<u64>,
}

/// See the module. Shared by all threads.
pub struct Stats {
    latencies: Mutex<Latencies>,
    /// Messages under way, warm-up included.
    outstanding: AtomicI64,
    /// Messages that count: sent, arrived, lost.
    pub sent: Counter,
    pub arrived: Counter,
    pub lost: Counter,
    /// Lost of what was sent to warm up.
    pub lost_before: Counter,
    /// Arrivals, warm-up included.
    pub all_arrived: Counter,
    pub duplicated: Counter,
    pub late: Counter,
    pub out_of_order: Counter,
    /// Frames of no message of ours, or no frames at all.
    pub unknown: Counter,
    /// Messages of an open loop that were not even sent: too many were under way.
    pub skipped: Counter,
    /// Fan-out: published, and at every device.
    pub published: Counter,
    pub complete: Counter,
    /// Connections: opened, failed, and those that the gateway has closed.
    pub connected: Counter,
    pub refused: Counter,
    pub closed: Counter,
    /// When the last message that counts arrived, in nanoseconds.
    last: AtomicU64,
}

impl Stats {
    /// Nothing has happened.
    ///
    /// # Errors
    /// See [`histogram`].
    pub fn new() -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            latencies: Mutex::new(Latencies {
                all: histogram()?,
                recent: histogram()?,
                to_all: histogram()?,
            }),
            outstanding: AtomicI64::default(),
            sent: Counter::default(),
            arrived: Counter::default(),
            lost: Counter::default(),
            lost_before: Counter::default(),
            all_arrived: Counter::default(),
            duplicated: Counter::default(),
            late: Counter::default(),
            out_of_order: Counter::default(),
            unknown: Counter::default(),
            skipped: Counter::default(),
            published: Counter::default(),
            complete: Counter::default(),
            connected: Counter::default(),
            refused: Counter::default(),
            closed: Counter::default(),
            last: AtomicU64::default(),
        })
    }

    /// A message is on its way.
    pub fn begun(&self, sent: Sent) {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        if sent.measured {
            self.sent.add(1);
        }
    }

    /// A message has arrived, for the first time.
    pub fn first(&self, sent: Sent, in_order: bool, now: u64) {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
        self.all_arrived.add(1);
        if !in_order {
            self.out_of_order.add(1);
        }
        let latency = now.saturating_sub(sent.intended);
        let mut latencies = self.latencies();
        latencies.recent.saturating_record(latency);
        if sent.measured {
            latencies.all.saturating_record(latency);
            drop(latencies);
            self.arrived.add(1);
            self.last.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// A message was given up.
    pub fn gave_up(&self, sent: Sent) {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
        if sent.measured {
            self.lost.add(1);
        } else {
            self.lost_before.add(1);
        }
    }

    /// A connection is ready for use.
    pub fn connected(&self, latency: u64) {
        self.connected.add(1);
        self.latencies().recent.saturating_record(latency);
        self.latencies().all.saturating_record(latency);
    }

    /// A message of a fan-out is at its last device.
    pub fn reached_all(&self, sent: Sent, now: u64) {
        if sent.measured {
            self.complete.add(1);
            let latency = now.saturating_sub(sent.intended);
            self.latencies().to_all.saturating_record(latency);
        }
    }

    /// Messages under way.
    pub fn outstanding(&self) -> u64 {
        let outstanding = self.outstanding.load(Ordering::Relaxed);
        u64::try_from(outstanding).unwrap_or_default()
    }

    /// When the last message that counts arrived, in nanoseconds.
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Relaxed)
    }

    /// Latencies since the last call.
    pub fn take_recent(&self) -> Histogram<u64> {
        let mut latencies = self.latencies();
        let recent = latencies.recent.clone();
        latencies.recent.reset();
        recent
    }

    /// Forgets the latencies: of connections, before messages are measured.
    pub fn forget_latencies(&self) {
        let mut latencies = self.latencies();
        latencies.recent.reset();
        latencies.all.reset();
    }

    /// Latencies of all that counts, and of fan-outs until the last device.
    pub fn all(&self) -> (Histogram<u64>, Histogram<u64>) {
        let latencies = self.latencies();
        (latencies.all.clone(), latencies.to_all.clone())
    }

    fn latencies(&self) -> std::sync::MutexGuard<'_, Latencies> {
        self.latencies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(intended: u64, measured: bool) -> Sent {
        Sent { intended, measured }
    }

    #[test]
    fn what_warms_up_does_not_count() {
        let stats = Stats::new().unwrap();
        for measured in [false, true] {
            stats.begun(sent(0, measured));
        }
        stats.first(sent(0, false), true, 9_000_000);
        stats.first(sent(1_000_000, true), false, 3_000_000);
        assert_eq!((stats.sent.get(), stats.arrived.get()), (1, 1));
        assert_eq!((stats.all_arrived.get(), stats.outstanding()), (2, 0));
        assert_eq!((stats.out_of_order.get(), stats.last()), (1, 3_000_000));
        let (all, _) = stats.all();
        assert_eq!(all.len(), 1);
        // Three digits.
        assert!(all.max().abs_diff(2_000_000) <= 2_000);
        assert_eq!(stats.take_recent().len(), 2);
        assert_eq!(stats.take_recent().len(), 0);
    }

    #[test]
    fn extreme_latencies_are_kept_within_the_bounds() {
        let stats = Stats::new().unwrap();
        stats.first(sent(5, true), true, 4);
        stats.first(sent(0, true), true, u64::MAX);
        let (all, _) = stats.all();
        assert_eq!(all.len(), 2);
        assert!(all.max() >= MOST);
    }
}
