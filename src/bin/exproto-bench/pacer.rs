//! The thread that begins the messages of an open loop when they are due.
//!
//! A thread, because the timers of the runtime have a resolution of a millisecond, which
//! would be in every latency.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::lanes::Lanes;
use crate::schedule::Schedule;

/// Least pause. Above 10,000 messages a second several begin at once.
const TICK: Duration = Duration::from_micros(100);

/// Longest pause, so that the thread sees when it is to end.
const LONGEST: Duration = Duration::from_millis(100);

/// Runs until it is dropped.
pub struct Pacer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Begins `rate` messages a second from now on, the lanes in turn.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(lanes: Arc<Lanes>, rate: u64) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            let mut schedule = Schedule::new(lanes.now(), rate);
            let count = u64::from(lanes.count()).max(1);
            while !stopped.load(Ordering::Acquire) {
                while let Some((number, due)) = schedule.take(lanes.now()) {
                    lanes.begin(u32::try_from(number % count).unwrap_or_default(), due);
                }
                let wait = Duration::from_nanos(schedule.next_due().saturating_sub(lanes.now()));
                std::thread::sleep(wait.clamp(TICK, LONGEST));
            }
        };
        let thread = std::thread::Builder::new()
            .name("pacer".to_owned())
            .spawn(work)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
