//! How a socket is closed so that the device gets everything.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::context::ListenerContext;
use super::machine::MAX_FLUSH;
use crate::transport::scratch::with_scratch;
use crate::transport::{Received, Socket};

/// How long a closed socket is read after the device has acknowledged everything: its
/// own bytes may still be on their way.
const LINGER: Duration = Duration::from_secs(2);

/// How often it is looked whether the device acknowledges.
const LINGER_LOOK: Duration = Duration::from_millis(100);

/// The same when the gateway stops, and how long it waits at most for a device that
/// acknowledges nothing: one that has vanished must not use up the time to drain.
const LINGER_AT_SHUTDOWN: Duration = Duration::from_millis(200);
const MAX_LINGER_AT_SHUTDOWN: Duration = Duration::from_secs(1);

/// Reads on after the socket was finished, until the device has closed, or for a
/// while after it has acknowledged everything. Closing a socket with unread bytes
/// resets it, and the device would lose what it has not fetched.
pub(super) async fn linger(mut socket: impl Socket, context: &ListenerContext) {
    let begun = Instant::now();
    let send_timeout = context.settings.timeouts.send;
    let mut left = socket.unacknowledged();
    let mut progress = Instant::now();
    loop {
        let draining = context.draining.is_cancelled();
        let (patience, most) = match (left > 0, draining) {
            (true, false) => (send_timeout, send_timeout * MAX_FLUSH),
            (true, true) => (MAX_LINGER_AT_SHUTDOWN, MAX_LINGER_AT_SHUTDOWN),
            (false, false) => (LINGER, send_timeout * MAX_FLUSH + LINGER),
            (false, true) => (LINGER_AT_SHUTDOWN, MAX_LINGER_AT_SHUTDOWN),
        };
        let rest = patience.checked_sub(progress.elapsed());
        let (Some(rest), true) = (rest, begun.elapsed() < most) else {
            break;
        };
        let look = rest.min(LINGER_LOOK);
        let drain = poll_fn(|cx| poll_discard(&mut socket, cx));
        if tokio::time::timeout(look, drain).await.is_ok() {
            return;
        }
        let now_left = socket.unacknowledged();
        if now_left < left {
            left = now_left;
            progress = Instant::now();
        }
    }
    if left > 0 {
        socket.abort();
    }
}

/// Reads and throws away; ready when the device has closed or is gone.
fn poll_discard(socket: &mut impl Socket, cx: &mut Context<'_>) -> Poll<()> {
    loop {
        match with_scratch(|scratch| socket.poll_receive(cx, scratch)) {
            Poll::Ready(Ok(Received::Bytes(_))) => {}
            Poll::Ready(_) => return Poll::Ready(()),
            Poll::Pending => return Poll::Pending,
        }
    }
}
