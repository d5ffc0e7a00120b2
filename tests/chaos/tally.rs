//! What the handler was told, and how it compares with what the watcher saw.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::common::until;
use crate::watcher::Seen;

/// Sums over all devices.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    pub introduced: usize,
    pub acknowledged: usize,
    pub failed: usize,
    /// Devices whose own subscription works at the end.
    pub reached: usize,
    /// Devices that had a confirmation since the broker came back.
    pub heard_since: usize,
}

struct Inner {
    acknowledged: Vec<Vec<u32>>,
    heard: Vec<bool>,
    back: Instant,
    gap: Duration,
}

pub struct Tally {
    inner: Mutex<Inner>,
    counts: watch::Sender<Counts>,
}

/// The watcher's sight of it.
pub struct Verdict {
    pub delivered: usize,
    pub lost: usize,
    pub duplicated: usize,
    pub out_of_order: usize,
}

impl Tally {
    pub fn new(devices: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                acknowledged: vec![Vec::new(); devices],
                heard: vec![true; devices],
                back: Instant::now(),
                gap: Duration::ZERO,
            }),
            counts: watch::Sender::default(),
        }
    }

    pub fn introduced(&self) {
        self.counts.send_modify(|counts| counts.introduced += 1);
    }

    pub fn reached(&self) {
        self.counts.send_modify(|counts| counts.reached += 1);
    }

    pub fn answered(&self, device: usize, number: u32, success: bool) {
        if !success {
            self.counts.send_modify(|counts| counts.failed += 1);
            return;
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.acknowledged[device].push(number);
        let first = !std::mem::replace(&mut inner.heard[device], true);
        if first {
            inner.gap = inner.gap.max(inner.back.elapsed());
        }
        self.counts.send_modify(|counts| {
            counts.acknowledged += 1;
            counts.heard_since += usize::from(first);
        });
    }

    /// The clock of the gap starts, for every device.
    pub fn broker_is_back(&self) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.heard.fill(false);
        inner.back = Instant::now();
        inner.gap = Duration::ZERO;
        self.counts.send_modify(|counts| counts.heard_since = 0);
    }

    /// From the broker's return to the first confirmation of the last device.
    pub fn gap(&self) -> Duration {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.gap
    }

    pub fn counts(&self) -> Counts {
        self.counts.borrow().clone()
    }

    pub async fn until(&self, what: &str, wanted: impl Fn(&Counts) -> bool) {
        let mut counts = self.counts.subscribe();
        // The rest of a large run takes longer to come in than any other wait.
        let waited = tokio::time::timeout(Duration::from_secs(120), counts.wait_for(wanted));
        let in_time = waited.await.is_ok();
        assert!(in_time, "waited in vain for {what}: {:?}", self.counts());
    }

    /// Compares, as soon as the watcher has what it can have.
    pub async fn judge(&self, seen: &Mutex<Seen>) -> Verdict {
        let confirmed: Vec<HashSet<u32>> = {
            let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let numbers = inner.acknowledged.iter();
            numbers.map(|all| all.iter().copied().collect()).collect()
        };
        let missing = || {
            let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            let devices = confirmed.iter().zip(seen.iter());
            let of = |(confirmed, seen): (&HashSet<u32>, &Vec<u32>)| {
                let seen: HashSet<u32> = seen.iter().copied().collect();
                confirmed.difference(&seen).count()
            };
            devices.map(of).sum::<usize>()
        };
        // What is confirmed was handed to the watcher's socket before, so it takes no
        // time but the reading; what is missing after that is lost.
        let patience = Instant::now() + Duration::from_secs(5);
        until("the watcher", || async {
            (missing() == 0 || Instant::now() > patience).then_some(())
        })
        .await;
        let lost = missing();
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut verdict = Verdict {
            delivered: 0,
            lost,
            duplicated: 0,
            out_of_order: 0,
        };
        for numbers in seen.iter() {
            let mut known = HashSet::new();
            let mut highest = None;
            for number in numbers {
                if !known.insert(*number) {
                    verdict.duplicated += 1;
                    continue;
                }
                verdict.delivered += 1;
                verdict.out_of_order += usize::from(highest > Some(*number));
                highest = highest.max(Some(*number));
            }
        }
        verdict
    }
}
