//! The built-in handler: as little work as a handler can do.
//!
//! It serves both services of the interface, also with one long stream for all
//! connections. The frames of a connection are worked off one after another, each with
//! one call to the adapter, as most handlers do.

mod adapter;
mod calls;
mod connection;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;

pub use adapter::Adapter;

use crate::failure::Failure;
use crate::frame::RunId;
use crate::stats::Counter;
use connection::Connection;

/// Flow-control windows in bytes, and calls of one gateway connection: the handler must
/// not be what is measured.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
const MAX_STREAMS: u32 = 65_536;

/// Pause after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(50);

/// What the handler knows, shared by its threads.
pub struct Shared {
    /// Frames of other runs are not for us.
    run: RunId,
    connections: Mutex<HashMap<String, Arc<Connection>>>,
    pub created: Counter,
    pub callbacks: Counter,
    failures: Mutex<Failures>,
}

/// Calls that failed.
#[derive(Default)]
struct Failures {
    count: u64,
    /// The first one, for a person.
    first: Option<String>,
}

impl Shared {
    /// Nothing has happened.
    pub fn new(run: RunId) -> Self {
        Self {
            run,
            connections: Mutex::default(),
            created: Counter::default(),
            callbacks: Counter::default(),
            failures: Mutex::default(),
        }
    }

    /// Connections that have not ended.
    pub fn open(&self) -> usize {
        self.connections().len()
    }

    /// Has the gateway close what is left: over UDP it does not see that a device has
    /// gone.
    pub async fn close_all(&self, adapter: &Adapter) {
        let left: Vec<String> = self.connections().keys().cloned().collect();
        for conn in left {
            if adapter.close(&conn).await.is_err() {
                // Most likely it was closed meanwhile.
                self.forget(&conn);
            }
        }
    }

    /// The connection of this name, new ones too: on long streams bytes may come first.
    fn connection(&self, conn: &str) -> Arc<Connection> {
        let mut connections = self.connections();
        if let Some(found) = connections.get(conn) {
            return found.clone();
        }
        let made = Arc::new(Connection::new(conn));
        connections.insert(conn.to_owned(), made.clone());
        made
    }

    fn forget(&self, conn: &str) {
        self.connections().remove(conn);
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<String, Arc<Connection>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call that failed.
    fn failed(&self, what: &str) {
        let mut failures = self.failures();
        failures.count += 1;
        failures.first.get_or_insert_with(|| what.to_owned());
    }

    /// How many calls failed.
    pub fn failed_calls(&self) -> u64 {
        self.failures().count
    }

    /// The first failure.
    pub fn trouble(&self) -> Option<String> {
        self.failures().first.clone()
    }

    /// Forgets the calls that failed: of devices that went ahead, before it is measured.
    pub fn forget_failures(&self) {
        *self.failures() = Failures::default();
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread of the handler, with its own connection to the adapter.
#[derive(Clone)]
pub struct Worker {
    pub runtime: Handle,
    pub adapter: Adapter,
}

/// Takes the address.
///
/// # Errors
/// It is taken, or none of ours.
pub async fn bind(address: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(address).await.map_err(|error| {
        Failure::HandlerAddress(format!(
            "the handler cannot listen on {address}: {error}; \
             another handler may run there (--handler sets the address, --handler none uses yours)"
        ))
    })
}

/// Serves gateways for ever, their connections in turn on the workers.
pub async fn serve(listener: TcpListener, workers: Vec<Worker>, shared: Arc<Shared>) {
    for turn in workers.iter().cycle() {
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                // Of a connection that has gone already, or a limit that passes.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        };
        let handler = calls::Handler {
            shared: shared.clone(),
            adapter: turn.adapter.clone(),
        };
        // A socket belongs to the runtime in which it was made.
        let Ok(stream) = stream.into_std() else {
            continue;
        };
        turn.runtime.spawn(serve_gateway(stream, handler));
    }
}

async fn serve_gateway(stream: std::net::TcpStream, handler: calls::Handler) {
    let Ok(stream) = TcpStream::from_std(stream) else {
        return;
    };
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(handler.into_service());
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    // It ends when the gateway goes; what that means for the run is seen elsewhere.
    let _ = builder
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
