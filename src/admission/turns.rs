//! Turns for handshakes: a bounded number at a time, fairly.
//!
//! A handshake takes memory and its deadline is long, for honest devices may be slow. So
//! peers that begin handshakes and say nothing more could keep everybody out. When all
//! turns are taken, the handshake that has been silent for longest gives way to a
//! newcomer, if it has been silent for at least [`SILENCE`]: one that makes progress is
//! never ended.
//!
//! Newcomers that find no turn may wait for one, and the newest of them is served first:
//! under a load that is too much for all, the others have waited for so long that their
//! devices are about to give up.
//!
//! Holds no task. Time passes when somebody comes, goes, or looks again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// How long a handshake must be silent before it gives way. Longer than a round trip
/// over a satellite or a bad mobile network, with a packet lost and sent again; short
/// enough that 1,000 turns, the default, let 500 newcomers a second in whatever others
/// do.
pub const SILENCE: Duration = Duration::from_secs(2);

/// Bytes that count as progress. Whoever sends one byte now and then is as good as
/// silent; the shortest flight of a handshake that goes on, or its answer, is longer.
const PROGRESS: usize = 64;

/// See the module.
#[derive(Debug)]
pub struct Turns {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Handshakes under way, by their number.
    held: HashMap<u64, Held>,
    /// The same by when they were last heard.
    silent: BTreeSet<(Instant, u64)>,
    /// Who waits, by number: the newest last.
    waiting: BTreeMap<u64, oneshot::Sender<Turn>>,
}

#[derive(Debug)]
struct Held {
    heard: Instant,
    /// Bytes since then.
    bytes: usize,
    /// Dropped when the turn is taken away.
    _mine: oneshot::Sender<()>,
}

/// The turn of one handshake; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    number: u64,
    lost: oneshot::Receiver<()>,
}

impl Turns {
    /// So many at a time, at least one.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most: most.max(1),
            state: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn, if one is free or somebody gives way.
    pub fn take(self: &Arc<Self>, now: Instant) -> Option<Turn> {
        let (turn, gave_way) = self.take_locked(&mut self.lock(), now)?;
        // Outside of the lock: it wakes somebody.
        drop(gave_way);
        Some(turn)
    }

    /// Waits for a turn. Cancel safe.
    pub async fn wait(self: &Arc<Self>) -> Turn {
        let (number, mut given) = {
            let mut state = self.lock();
            if let Some((turn, gave_way)) = self.take_locked(&mut state, Instant::now()) {
                drop(state);
                drop(gave_way);
                return turn;
            }
            let number = state.number();
            let (give, given) = oneshot::channel();
            state.waiting.insert(number, give);
            (number, given)
        };
        let _leaving = Leaving(self, number);
        loop {
            // Who is silent shows with time alone.
            match tokio::time::timeout(SILENCE / 4, &mut given).await {
                Ok(Ok(turn)) => return turn,
                Ok(Err(_)) => std::future::pending().await,
                Err(_) => self.serve(Instant::now()),
            }
        }
    }

    /// The turn, and whoever has given way for it.
    fn take_locked(
        self: &Arc<Self>,
        state: &mut State,
        now: Instant,
    ) -> Option<(Turn, Option<Held>)> {
        let mut gave_way = None;
        if state.held.len() >= self.most {
            let (heard, number) = *state.silent.first()?;
            if now.saturating_duration_since(heard) < SILENCE {
                return None;
            }
            gave_way = state.remove(number);
        }
        let number = state.number();
        let (mine, lost) = oneshot::channel();
        let held = Held {
            heard: now,
            bytes: 0,
            _mine: mine,
        };
        state.held.insert(number, held);
        state.silent.insert((now, number));
        let turns = self.clone();
        let turn = Turn {
            turns,
            number,
            lost,
        };
        Some((turn, gave_way))
    }

    /// Gives turns to those who wait, as far as there are any.
    fn serve(self: &Arc<Self>, now: Instant) {
        loop {
            let mut state = self.lock();
            if state.waiting.is_empty() {
                return;
            }
            let Some((turn, gave_way)) = self.take_locked(&mut state, now) else {
                return;
            };
            let newest = state.waiting.pop_last();
            drop(state);
            drop(gave_way);
            if let Some((_, give)) = newest
                && let Err(mut unwanted) = give.send(turn)
            {
                // It has just left; the next in the loop has the turn, not its drop.
                unwanted.release();
            }
        }
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn remove(&mut self, number: u64) -> Option<Held> {
        let held = self.held.remove(&number)?;
        self.silent.remove(&(held.heard, number));
        Some(held)
    }
}

/// Takes somebody who waits out.
struct Leaving<'a>(&'a Arc<Turns>, u64);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let left = self.0.lock().waiting.remove(&self.1);
        drop(left);
    }
}

impl Turn {
    /// Bytes came from the peer, or an answer went there.
    pub fn heard(&self, bytes: usize, now: Instant) {
        let mut state = self.turns.lock();
        let state = &mut *state;
        let Some(held) = state.held.get_mut(&self.number) else {
            return;
        };
        held.bytes = held.bytes.saturating_add(bytes);
        if held.bytes >= PROGRESS {
            state.silent.remove(&(held.heard, self.number));
            (held.heard, held.bytes) = (now, 0);
            state.silent.insert((now, self.number));
        }
    }

    /// Ready when the turn was taken away: the handshake is to be given up. To be asked
    /// before anything else is done.
    pub fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.lost).poll(cx).map(|_| ())
    }

    /// Gives the turn back, unless it was taken away.
    fn release(&mut self) -> bool {
        let held = self.turns.lock().remove(self.number);
        held.is_some()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.release() {
            self.turns.serve(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::task::noop_waker_ref;

    use super::*;

    fn is_lost(turn: &mut Turn) -> bool {
        let mut cx = Context::from_waker(noop_waker_ref());
        turn.poll_lost(&mut cx).is_ready()
    }

    #[test]
    fn who_is_silent_for_longest_gives_way() {
        let turns = Turns::new(2);
        let start = Instant::now();
        let later = |millis| start + Duration::from_millis(millis);
        let mut first = turns.take(start).unwrap();
        let mut second = turns.take(later(100)).unwrap();
        assert!(turns.take(later(1900)).is_none());
        let mut third = turns.take(later(2000)).unwrap();
        assert!(is_lost(&mut first) && !is_lost(&mut second));
        assert!(turns.take(later(2050)).is_none());
        // A turn that was taken away is not given back once more.
        drop(first);
        assert!(turns.take(later(2050)).is_none());
        let _fourth = turns.take(later(2100)).unwrap();
        assert!(is_lost(&mut second) && !is_lost(&mut third));
        drop(third);
        assert!(turns.take(later(2100)).is_some());
    }

    #[test]
    fn who_makes_progress_stays() {
        let turns = Turns::new(1);
        let start = Instant::now();
        let mut slow = turns.take(start).unwrap();
        for second in 1..100 {
            let now = start + Duration::from_secs(second);
            slow.heard(PROGRESS, now);
            assert!(turns.take(now + Duration::from_millis(1999)).is_none());
        }
        assert!(!is_lost(&mut slow));
        // Less than that is none.
        for tenth in 0..20 {
            let now = start + Duration::from_secs(99) + Duration::from_millis(100 * tenth);
            slow.heard(1, now);
        }
        assert!(turns.take(start + Duration::from_secs(101)).is_some());
        assert!(is_lost(&mut slow));
    }

    #[tokio::test]
    async fn the_newest_of_those_who_wait_is_next() {
        let turns = Turns::new(1);
        let held = turns.take(Instant::now()).unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(turns.wait())).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never().is_none());
        }
        // Whoever has left is not waited for.
        drop(waiting.pop());
        drop(held);
        let newest = waiting.pop().unwrap().now_or_never();
        assert!(waiting.pop().unwrap().now_or_never().is_none());
        drop(newest.unwrap());
        assert!(turns.lock().held.is_empty() && turns.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn who_waits_is_served_when_somebody_falls_silent() {
        let turns = Turns::new(1);
        let nearly = SILENCE - Duration::from_millis(100);
        let since = Instant::now().checked_sub(nearly).unwrap();
        let mut silent = turns.take(since).unwrap();
        assert!(turns.take(Instant::now()).is_none());
        let _turn = turns.wait().await;
        assert!(is_lost(&mut silent));
        assert_eq!(turns.lock().silent.len(), 1);
    }
}
