//! The life of a connection around its task: entered, driven, told as over, left.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use tracing::{Instrument, Span};

use super::context::ListenerContext;
use super::handle::Handle;
use super::registry::Entry;
use super::task::Driver;
use crate::id::ConnId;
use crate::transport::{PeerInfo, Socket};

/// A connection that is served when it is awaited.
pub type Connection = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Serves a connection from OnSocketCreated to OnSocketClosed.
///
/// The future ends after the socket is closed and the last callback ended; `room`, such
/// as permits, is kept until then. A panic within ends this connection alone.
///
/// It is made here and not where it is awaited, and lies on the heap, once: futures that
/// are moved into each other hold what they are given several times, and most
/// connections are idle.
pub fn serve<S: Socket>(
    socket: S,
    peer: &PeerInfo,
    context: Arc<ListenerContext>,
    room: impl Send + 'static,
) -> Connection {
    let id = match context.registry.new_id(context.shard) {
        Ok(id) => id,
        Err(error) => {
            context.metrics.refused("setup");
            if let Some(left_out) = context.complaints.tell(Instant::now()) {
                tracing::error!(%error, left_out, "no randomness for a connection id");
            }
            return Box::pin(std::future::ready(()));
        }
    };
    // At debug every line tells whose it is. Above, the few that are about a connection
    // name it themselves: a span takes half a kilobyte for as long as it lives.
    let span =
        tracing::debug_span!("connection", conn = %id, peer = %peer.peer, listener = %context.name);
    let (driver, entry) = span.in_scope(|| begin(socket, peer, id, context));
    match span.is_disabled() {
        true => Box::pin(run(driver, entry, room)),
        false => Box::pin(within(span, driver, entry, room)),
    }
}

/// A connection that handlers can name from now on.
fn begin<S: Socket>(
    socket: S,
    peer: &PeerInfo,
    id: ConnId,
    context: Arc<ListenerContext>,
) -> (Box<Driver<S>>, Entry) {
    let handle = Handle::new(id, peer, S::STREAM, context.clone());
    let entry = context.registry.enter(handle.clone());
    // A gateway that began to drain before this line has not seen the entry.
    if context.draining.is_cancelled() {
        let _ = handle.drain();
    }
    context.metrics.opened.increment(1);
    context.metrics.open.increment(1.0);
    (Box::new(Driver::new(socket, peer, handle, context)), entry)
}

async fn within<S: Socket>(
    span: Span,
    driver: Box<Driver<S>>,
    entry: Entry,
    room: impl Send + 'static,
) {
    run(driver, entry, room).instrument(span).await;
}

async fn run<S: Socket>(mut driver: Box<Driver<S>>, entry: Entry, room: impl Send + 'static) {
    tracing::debug!("connection opened");
    let outcome = AssertUnwindSafe(driver.drive()).catch_unwind().await;
    if outcome.is_err() {
        Box::pin(driver.after_panic()).await;
    }
    let reason = driver.reason();
    drop(entry);
    let metrics = &driver.context().metrics;
    metrics.open.decrement(1.0);
    metrics.closed(reason.word());
    tracing::debug!(%reason, "connection closed");
    if outcome.is_ok() {
        Box::pin(driver.linger(&reason)).await;
    }
    drop(room);
}
