//! Heavy steps on a thread, one at a time, with everything else's turn in between.
//!
//! A handshake costs a thread a millisecond or more at once, for its signature. When a
//! thousand of them are ready together, whoever else lives on the thread would wait for
//! all of them; and with more of them a second than the thread can do, for ever longer.
//! So each asks for its [`Step`] first: one is done, then everything that is ready runs
//! and the sockets are looked at, then the next is done.
//!
//! When steps queue up, those that go on with something come first, in their order; of
//! those that begin, the newest and the oldest in turn: under a load that is too much,
//! the newest is the one whose device will wait long enough, and the oldest must not wait
//! in vain behind all that come later. Who waits holds its place alone, and ends by its
//! own deadline.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// See the module. One for each thread.
#[derive(Debug, Default)]
pub struct Pace {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether somebody has a step.
    taken: bool,
    next: u64,
    /// Who waits, by number: the newest last.
    beginning: BTreeMap<u64, oneshot::Sender<Step>>,
    going_on: BTreeMap<u64, oneshot::Sender<Step>>,
    /// Whether the oldest that begins is next.
    oldest_next: bool,
}

/// What somebody waits to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The first step of something.
    Beginning,
    /// Another step of it.
    GoingOn,
}

/// Leave to do one heavy step now. The next has it when this is dropped.
#[derive(Debug)]
pub struct Step(Option<Arc<Pace>>);

impl State {
    fn next_waiting(&mut self) -> Option<(u64, oneshot::Sender<Step>)> {
        if let Some(oldest) = self.going_on.pop_first() {
            return Some(oldest);
        }
        self.oldest_next = !self.oldest_next;
        match self.oldest_next {
            true => self.beginning.pop_last(),
            false => self.beginning.pop_first(),
        }
    }

    fn waiting(&mut self, stage: Stage) -> &mut BTreeMap<u64, oneshot::Sender<Step>> {
        match stage {
            Stage::Beginning => &mut self.beginning,
            Stage::GoingOn => &mut self.going_on,
        }
    }
}

impl Pace {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a step. What was ready on this thread has run then, and its sockets
    /// were looked at. Cancel safe.
    pub async fn step(self: &Arc<Self>, stage: Stage) -> Step {
        let step = self.next_step(stage).await;
        // The runtime wakes who yields only after it has looked at its sockets.
        tokio::task::yield_now().await;
        step
    }

    /// A step, if nobody has one. For whoever can try again later.
    pub fn try_step(self: &Arc<Self>) -> Option<Step> {
        let mut state = self.lock();
        (!std::mem::replace(&mut state.taken, true)).then(|| Step(Some(self.clone())))
    }

    async fn next_step(self: &Arc<Self>, stage: Stage) -> Step {
        if let Some(step) = self.try_step() {
            return step;
        }
        let (give, given) = oneshot::channel();
        let number = {
            let mut state = self.lock();
            // Given back in between, by another thread.
            if !std::mem::replace(&mut state.taken, true) {
                return Step(Some(self.clone()));
            }
            state.next += 1;
            let number = state.next;
            state.waiting(stage).insert(number, give);
            number
        };
        let _leaving = Leaving(self, stage, number);
        match given.await {
            Ok(step) => step,
            // The sender stays until it has sent, or `_leaving` is dropped.
            Err(_) => std::future::pending().await,
        }
    }
}

/// Takes somebody who waits out.
struct Leaving<'a>(&'a Arc<Pace>, Stage, u64);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let left = self.0.lock().waiting(self.1).remove(&self.2);
        drop(left);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let Some(pace) = self.0.take() else {
            return;
        };
        loop {
            let mut state = pace.lock();
            let Some((_, give)) = state.next_waiting() else {
                state.taken = false;
                return;
            };
            drop(state);
            let Err(mut unwanted) = give.send(Step(Some(pace.clone()))) else {
                return;
            };
            // It has just left; the next in the loop has the step.
            unwanted.0 = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::Stage::{Beginning, GoingOn};
    use super::*;

    #[tokio::test]
    async fn who_goes_on_is_first_then_the_newest_and_the_oldest() {
        let pace = Arc::<Pace>::default();
        let held = pace.step(Beginning).await;
        assert!(pace.try_step().is_none());
        let order = Arc::<Mutex<Vec<usize>>>::default();
        let stages = [Beginning, GoingOn, Beginning, GoingOn, Beginning];
        let tasks = stages.into_iter().enumerate().map(|(number, stage)| {
            let (pace, order) = (pace.clone(), order.clone());
            async move {
                let _step = pace.step(stage).await;
                order.lock().unwrap().push(number);
            }
        });
        let all = tokio::spawn(futures_util::future::join_all(tasks.collect::<Vec<_>>()));
        tokio::task::yield_now().await;
        assert!(order.lock().unwrap().is_empty());
        drop(held);
        all.await.unwrap();
        assert_eq!(*order.lock().unwrap(), [1, 3, 4, 0, 2]);
        assert!(pace.try_step().is_some());
    }

    #[tokio::test]
    async fn who_leaves_keeps_nobody_waiting() {
        let pace = Arc::<Pace>::default();
        let held = pace.step(Beginning).await;
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(pace.step(Beginning))).collect();
        for wait in &mut waiting {
            assert!(wait.now_or_never().is_none());
        }
        // One leaves before it is its turn, one with the step on its way to it.
        drop(waiting.remove(1));
        drop(held);
        drop(waiting.pop());
        drop(waiting.pop().unwrap().await);
        let state = pace.lock();
        assert!(!state.taken && state.beginning.is_empty() && state.going_on.is_empty());
    }

    /// However many heavy steps are ready, a socket is heard between two of them.
    #[tokio::test]
    async fn sockets_have_their_turn_between_two_steps() {
        let pace = Arc::<Pace>::default();
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let echo = tokio::spawn(async move {
            let mut byte = [0];
            while far.read_exact(&mut byte).await.is_ok() {
                far.write_all(&byte).await.unwrap();
            }
        });
        let done = Arc::new(AtomicBool::new(false));
        let steps = Arc::<Mutex<usize>>::default();
        let heavy = (0..50).map(|_| {
            let (pace, done, steps) = (pace.clone(), done.clone(), steps.clone());
            tokio::spawn(async move {
                while !done.load(Ordering::SeqCst) {
                    let step = pace.step(Beginning).await;
                    let end = Instant::now() + std::time::Duration::from_micros(500);
                    while Instant::now() < end {}
                    *steps.lock().unwrap() += 1;
                    drop(step);
                }
            })
        });
        let heavy: Vec<_> = heavy.collect();
        for _ in 0..20 {
            near.write_all(b"x").await.unwrap();
            near.read_exact(&mut [0]).await.unwrap();
        }
        done.store(true, Ordering::SeqCst);
        // Each way of an echo, and whoever is woken by it, waits for a step or two: without
        // the pace it was the driver's interval, 61 of them.
        let steps_by_then = *steps.lock().unwrap();
        assert!((1..200).contains(&steps_by_then), "{steps_by_then}");
        futures_util::future::join_all(heavy).await;
        drop(near);
        echo.await.unwrap();
    }
}
