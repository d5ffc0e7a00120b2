//! Devices that go ahead of those that are measured, to see that the gateway reaches the
//! handler.
//!
//! A gateway whose handler was away tries it again after a pause, longer and longer ones.
//! The built-in handler was away until now, so that the first devices would be made to
//! wait, and the pause would be measured.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::device::{self, Device, Dialer, Error};
use crate::failure::Failure;
use crate::frame::{Kind, RunId, Wishes};
use crate::lanes::{Lanes, Plan, Senders};
use crate::options::Options;
use crate::peer::Topics;
use crate::stats::Stats;
use crate::threads::Threads;

/// Probes at a time. A gateway may have a way to the handler for each of its threads, over
/// which it spreads what connects at once.
const PROBES: u32 = 8;

/// Pause before one that was turned away comes again: EMQX hangs up on devices where it has
/// no handler.
const PAUSE: Duration = Duration::from_millis(100);

/// What an attempt may take beyond the limit, so that its own error comes first.
const GRACE: Duration = Duration::from_millis(200);

/// See the module.
pub struct Probes<'a> {
    options: &'a Options,
    threads: &'a Threads,
    topics: &'a Topics,
    dialer: Arc<Dialer>,
    /// Their own: they are no part of what is counted.
    lanes: Arc<Lanes>,
    /// Whether one was answered.
    found: AtomicBool,
    /// The last one that was turned away.
    turned_away: Mutex<Option<Error>>,
    leaving: CancellationToken,
}

impl<'a> Probes<'a> {
    /// Nothing has been sent.
    ///
    /// # Errors
    /// As [`device::dialer`].
    pub async fn new(
        options: &'a Options,
        threads: &'a Threads,
        topics: &'a Topics,
        run: RunId,
    ) -> Result<Self, Failure> {
        let lanes = Lanes::new(Plan {
            devices: PROBES.min(options.devices),
            senders: Senders::Devices,
            kind: Kind::Echo,
            run,
            closed_loop: true,
            messages: None,
            clock: Instant::now(),
            stats: Stats::new().map_err(|error| Failure::own("no histogram", error))?,
        });
        Ok(Self {
            options,
            threads,
            topics,
            dialer: Arc::new(device::dialer(options, options.ready_timeout).await?),
            lanes: Arc::new(lanes),
            found: AtomicBool::default(),
            turned_away: Mutex::default(),
            leaving: CancellationToken::new(),
        })
    }

    /// Waits until all of them are answered that the gateway has room for; then they leave. Cancel safe: they leave when
    /// it is dropped.
    ///
    /// # Errors
    /// What one has met, or all of them until the limit.
    pub async fn run(&self) -> Result<(), Error> {
        let _leaving = self.leaving.clone().drop_guard();
        let limit = self.options.ready_timeout;
        let all = try_join_all((0..self.lanes.count()).map(|number| self.answered(number)));
        match tokio::time::timeout(limit + GRACE, all).await {
            Ok(result) => result.map(|_| ()),
            Err(_) => {
                let mut last = self
                    .turned_away
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                Err(last.take().unwrap_or(Error::NoWelcome(limit)))
            }
        }
    }

    async fn answered(&self, number: u32) -> Result<(), Error> {
        loop {
            match self.attempt(number).await {
                // Not for want of a handler: the listener has a limit.
                Err(error) if error.is_turned_away() && self.found.load(Ordering::Acquire) => {
                    return Ok(());
                }
                Err(error) if error.is_turned_away() => {
                    *self
                        .turned_away
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner) = Some(error);
                    tokio::time::sleep(PAUSE).await;
                }
                Ok(()) => {
                    self.found.store(true, Ordering::Release);
                    return Ok(());
                }
                failed => return failed,
            }
        }
    }

    /// Connects, and waits for the answer to the first frame.
    async fn attempt(&self, number: u32) -> Result<(), Error> {
        let (ready, answer) = oneshot::channel();
        let client = (!self.options.bare).then(|| self.topics.probe(number));
        let device = Device {
            number,
            wishes: Wishes {
                client,
                ..Wishes::default()
            },
            lanes: self.lanes.clone(),
            ready,
        };
        let (dialer, leaving) = (self.dialer.clone(), self.leaving.clone());
        if let Some(runtime) = self.threads.of(number) {
            runtime.spawn(async move {
                tokio::select! {
                    () = dialer.run(device) => {}
                    () = leaving.cancelled() => {}
                }
            });
        }
        answer.await.unwrap_or(Err(Error::Closed))
    }
}
