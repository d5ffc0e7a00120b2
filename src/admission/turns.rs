//! Turns for handshakes: a bounded number at a time, fairly.
//!
//! A handshake takes memory and its deadline is long, for honest devices may be slow. So
//! peers that begin handshakes and never end them could keep everybody out. When all
//! turns are taken, the handshake that got on for the last time longest ago gives way to
//! a newcomer, if that was at least [`PATIENCE`] ago.
//!
//! Its clock begins with its first step on its thread (see `pace.rs`): nobody gives way for
//! having waited for us. Only whole messages of the handshake count as getting on, and no handshake has more
//! than some: bytes that come one at a time, or garbage, buy no time, and one handshake
//! that leads nowhere can hold its turn for a few times [`PATIENCE`] at most.
//!
//! Newcomers that find no turn may wait for one. The newest and the oldest of them are
//! served in turn: under a load that is too much for all, the newest is the one whose
//! device will wait long enough, and the oldest must not wait in vain behind peers that
//! come back as soon as they are sent away.
//!
//! Holds no task. Time passes when somebody comes, goes, or looks again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::sync::oneshot;

/// How long a handshake must not have got on before it gives way. Longer than a round
/// trip over a satellite or a bad mobile network with a packet lost, and sent again after
/// the second or two that DTLS waits for it; short enough that 1,000 turns, the default,
/// let 300 newcomers a second in while others fall silent at once, and 150 while those
/// are answered first.
pub const PATIENCE: Duration = Duration::from_secs(3);

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
    /// The same by when they last got on.
    stuck: BTreeSet<(Instant, u64)>,
    /// Who waits, by number: the newest last.
    waiting: BTreeMap<u64, oneshot::Sender<Turn>>,
    /// Whether the oldest of them is next.
    oldest_next: bool,
}

#[derive(Debug)]
struct Held {
    /// When it last got on; `None` before its first step.
    moved: Option<Instant>,
    fate: Arc<Fate>,
}

/// Whether the turn was taken away, for its owner.
#[derive(Debug, Default)]
struct Fate {
    lost: AtomicBool,
    owner: AtomicWaker,
}

/// The turn of one handshake; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    number: u64,
    fate: Arc<Fate>,
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
        take_away(gave_way);
        Some(turn)
    }

    /// Whether [`take`](Self::take) would give a turn, as far as can be said now.
    pub fn has_room(&self, now: Instant) -> bool {
        let state = self.lock();
        state.held.len() < self.most || state.who_gives_way(now).is_some()
    }

    /// Waits for a turn. Cancel safe.
    pub async fn wait(self: &Arc<Self>) -> Turn {
        let (number, mut given) = {
            let mut state = self.lock();
            if let Some((turn, gave_way)) = self.take_locked(&mut state, Instant::now()) {
                drop(state);
                take_away(gave_way);
                return turn;
            }
            let number = state.number();
            let (give, given) = oneshot::channel();
            state.waiting.insert(number, give);
            (number, given)
        };
        let _leaving = Leaving(self, number);
        loop {
            // Who gets on no more shows with time alone.
            match tokio::time::timeout(PATIENCE / 4, &mut given).await {
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
            let number = state.who_gives_way(now)?;
            gave_way = state.remove(number);
        }
        let number = state.number();
        let fate = Arc::<Fate>::default();
        let held = Held {
            moved: None,
            fate: fate.clone(),
        };
        state.held.insert(number, held);
        let turns = self.clone();
        let turn = Turn {
            turns,
            number,
            fate,
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
            let next = state.next_waiting();
            drop(state);
            take_away(gave_way);
            if let Some((_, give)) = next
                && let Err(mut unwanted) = give.send(turn)
            {
                // It has just left; the next in the loop has the turn, not its drop.
                unwanted.release();
            }
        }
    }
}

/// Tells the owner. Outside of the lock: it wakes somebody.
fn take_away(gave_way: Option<Held>) {
    if let Some(Held { fate, .. }) = gave_way {
        fate.lost.store(true, Ordering::SeqCst);
        fate.owner.wake();
    }
}

impl State {
    /// The handshake that would have to give way now.
    fn who_gives_way(&self, now: Instant) -> Option<u64> {
        let (moved, number) = *self.stuck.first()?;
        (now.saturating_duration_since(moved) >= PATIENCE).then_some(number)
    }

    fn next_waiting(&mut self) -> Option<(u64, oneshot::Sender<Turn>)> {
        self.oldest_next = !self.oldest_next;
        match self.oldest_next {
            true => self.waiting.pop_last(),
            false => self.waiting.pop_first(),
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn remove(&mut self, number: u64) -> Option<Held> {
        let held = self.held.remove(&number)?;
        if let Some(moved) = held.moved {
            self.stuck.remove(&(moved, number));
        }
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
    /// The handshake begins, or got on by a whole message: one came and was right, or was
    /// answered.
    pub fn moved(&self, now: Instant) {
        let mut state = self.turns.lock();
        let state = &mut *state;
        if let Some(held) = state.held.get_mut(&self.number) {
            if let Some(moved) = held.moved.replace(now) {
                state.stuck.remove(&(moved, self.number));
            }
            state.stuck.insert((now, self.number));
        }
    }

    /// Ready when the turn was taken away: the handshake is to be given up. To be asked
    /// before anything else is done, by one task.
    pub fn poll_lost(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.fate.owner.register(cx.waker());
        match self.fate.lost.load(Ordering::SeqCst) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
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
    use std::future::poll_fn;

    use futures_util::FutureExt;
    use futures_util::task::noop_waker_ref;

    use super::*;

    fn is_lost(turn: &Turn) -> bool {
        let mut cx = Context::from_waker(noop_waker_ref());
        turn.poll_lost(&mut cx).is_ready()
    }

    /// A turn whose handshake has begun.
    fn begun(turns: &Arc<Turns>, now: Instant) -> Option<Turn> {
        let turn = turns.take(now)?;
        turn.moved(now);
        Some(turn)
    }

    #[test]
    fn who_has_not_begun_gives_way_to_nobody() {
        let turns = Turns::new(1);
        let start = Instant::now();
        let turn = turns.take(start).unwrap();
        let later = start + 10 * PATIENCE;
        assert!(!turns.has_room(later) && turns.take(later).is_none());
        turn.moved(later);
        let later = later + PATIENCE;
        assert!(turns.has_room(later) && turns.take(later).is_some());
        assert!(is_lost(&turn));
    }

    #[test]
    fn who_has_been_stuck_for_longest_gives_way() {
        let turns = Turns::new(2);
        let start = Instant::now();
        let later = |millis| start + Duration::from_millis(millis);
        let first = begun(&turns, start).unwrap();
        let second = begun(&turns, later(100)).unwrap();
        let most = PATIENCE.as_millis() as u64;
        assert!(turns.take(later(most - 100)).is_none());
        let third = begun(&turns, later(most)).unwrap();
        assert!(is_lost(&first) && !is_lost(&second));
        assert!(turns.take(later(most + 50)).is_none());
        // A turn that was taken away is not given back once more.
        drop(first);
        assert!(turns.take(later(most + 50)).is_none());
        let _fourth = turns.take(later(most + 100)).unwrap();
        assert!(is_lost(&second) && !is_lost(&third));
        drop(third);
        assert!(turns.take(later(most + 100)).is_some());
    }

    #[test]
    fn who_gets_on_stays() {
        let turns = Turns::new(1);
        let start = Instant::now();
        let slow = begun(&turns, start).unwrap();
        for second in 1..5 {
            let now = start + Duration::from_secs(second);
            slow.moved(now);
            let nearly = now + PATIENCE - Duration::from_millis(1);
            assert!(!turns.has_room(nearly) && turns.take(nearly).is_none());
        }
        assert!(!is_lost(&slow));
        let now = start + Duration::from_secs(4) + PATIENCE;
        assert!(turns.has_room(now) && turns.take(now).is_some());
        assert!(is_lost(&slow));
    }

    /// It is woken, wherever it waits.
    #[tokio::test]
    async fn who_loses_the_turn_is_told() {
        let turns = Turns::new(1);
        let start = Instant::now();
        let turn = begun(&turns, start).unwrap();
        let told = tokio::spawn(async move { poll_fn(|cx| turn.poll_lost(cx)).await });
        tokio::task::yield_now().await;
        let _other = turns.take(start + PATIENCE).unwrap();
        told.await.unwrap();
    }

    #[tokio::test]
    async fn the_newest_and_the_oldest_of_those_who_wait_are_next() {
        let turns = Turns::new(1);
        let mut held = turns.take(Instant::now()).unwrap();
        let mut waiting: Vec<_> = (0..6).map(|_| Some(Box::pin(turns.wait()))).collect();
        for wait in waiting.iter_mut().flatten() {
            assert!(wait.now_or_never().is_none());
        }
        // Whoever has left is not waited for.
        waiting[5] = None;
        for next in [4, 0, 3, 1, 2] {
            drop(held);
            held = waiting[next].take().unwrap().now_or_never().unwrap();
            for wait in waiting.iter_mut().flatten() {
                assert!(wait.now_or_never().is_none());
            }
        }
        drop(held);
        assert!(turns.lock().held.is_empty() && turns.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn who_waits_is_served_when_somebody_is_stuck() {
        let turns = Turns::new(1);
        let nearly = PATIENCE - Duration::from_millis(100);
        let since = Instant::now().checked_sub(nearly).unwrap();
        let stuck = begun(&turns, since).unwrap();
        assert!(turns.take(Instant::now()).is_none());
        let _turn = turns.wait().await;
        assert!(is_lost(&stuck));
        assert_eq!(turns.lock().held.len(), 1);
    }
}
