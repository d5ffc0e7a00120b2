//! A shard: one thread with a runtime of its own and everything that serves its
//! connections.
//!
//! A connection lives on one shard from its hand-over to its end: its socket, its
//! timers, its channel to the handler. A call on a current-thread runtime costs
//! little more than half of one on a work-stealing runtime, and nothing that a
//! connection uses for each byte is shared with another thread.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::id::ShardId;
use crate::pace::Pace;

/// A shard as others see it. Cheap to clone.
#[derive(Clone)]
pub struct Shard {
    id: ShardId,
    runtime: Handle,
    load: Arc<AtomicUsize>,
    connections: TaskTracker,
    pace: Arc<Pace>,
}

/// The thread behind a [`Shard`]; dropping it stops the thread.
pub struct ShardThread {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Shard {
    /// Starts the thread. What its connections are is tracked in `connections`.
    pub fn start(id: ShardId, connections: TaskTracker) -> io::Result<(Self, ShardThread)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let shard = Self {
            id,
            runtime: runtime.handle().clone(),
            load: Arc::new(AtomicUsize::new(0)),
            connections,
            pace: Arc::default(),
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("shard-{}", id.0))
            .spawn(move || {
                runtime.block_on(stopped.cancelled());
                // A look-up of a host name that hangs must not hold up the end.
                runtime.shutdown_background();
            })?;
        let thread = ShardThread {
            stop,
            thread: Some(thread),
        };
        Ok((shard, thread))
    }

    /// Its number.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// Its runtime.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The pace of heavy steps here.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// Number of connections.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Runs a connection's task here, which keeps what it is given until its end.
    ///
    /// It comes on the heap: a future around another would hold it twice, and the
    /// runtime's own part of a task doubles above 24 bytes.
    pub fn spawn_connection(&self, task: impl FnOnce(Counted) -> Task) {
        self.load.fetch_add(1, Ordering::Relaxed);
        let task = task(Counted(self.load.clone()));
        self.connections.spawn_on(task, &self.runtime);
    }
}

/// A connection's task.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A connection that counts while this is kept.
pub struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // A panic of the runtime itself was reported by its thread.
            let _ = thread.join();
        }
    }
}
