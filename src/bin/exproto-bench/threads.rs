//! The threads of the bench, each with a runtime of its own: what a message does on one
//! thread costs half of what it costs on a runtime that moves tasks about.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

/// See the module. Dropping it ends the threads and every task on them.
pub struct Threads {
    runtimes: Vec<Handle>,
    threads: Vec<JoinHandle<()>>,
    stop: CancellationToken,
}

impl Threads {
    /// Starts so many.
    ///
    /// # Errors
    /// The system has no thread or no descriptor left.
    pub fn start(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let (mut runtimes, mut threads) = (Vec::new(), Vec::new());
        for number in 0..count.max(1) {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtimes.push(runtime.handle().clone());
            let stopped = stop.clone();
            let thread = std::thread::Builder::new().name(format!("bench-{number}"));
            threads.push(thread.spawn(move || {
                runtime.block_on(stopped.cancelled());
                // A look-up of a host name that hangs must not hold up the end.
                runtime.shutdown_background();
            })?);
        }
        Ok(Self {
            runtimes,
            threads,
            stop,
        })
    }

    /// All of them.
    pub fn runtimes(&self) -> &[Handle] {
        &self.runtimes
    }

    /// The one whose turn it is.
    pub fn of(&self, number: u32) -> Option<&Handle> {
        let number = usize::try_from(number).ok()?;
        self.runtimes.get(number.checked_rem(self.runtimes.len())?)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // A panic was reported by its thread.
            let _ = thread.join();
        }
    }
}
