//! What a shard's receiving task and its peers' ends have in common.
//!
//! They run on one thread, so that the locks are never waited for; they are there
//! because a connection's task must be `Send`. None is held while another is taken or a
//! task is woken.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_util::task::AtomicWaker;

use super::io::Io;
use super::queue::Queue;
use super::table::{Peer, Table};
use super::{Counters, Options};

/// Bytes that a peer with an empty queue may put in although the queues of the shard
/// are full: a packet of usual size, less than the connection itself takes. So those
/// who fill the queues cannot silence the others.
const ALWAYS_TAKEN: usize = 1500;

pub(super) struct Shared {
    pub io: Io,
    /// As bound; may be all addresses.
    pub bound: SocketAddr,
    pub counters: Counters,
    table: Mutex<Table>,
    queue_datagrams: usize,
    queue_bytes: usize,
    queues_bytes: usize,
    /// Bytes in all queues.
    queued: AtomicUsize,
    /// Tasks that wait until they can send, by the address of their peer. Sockets keep
    /// one waker for each direction, and here many may wait.
    blocked: Mutex<HashMap<usize, Waker>>,
    /// The receiving task, which waits for them.
    pub demux: AtomicWaker,
    /// The receiving task has ended.
    closed: AtomicBool,
}

/// The peer's end was dropped: the datagram is a stranger's.
pub(super) struct Gone;

/// The socket is full.
#[derive(Debug)]
pub(super) struct Blocked;

impl Shared {
    pub fn new(io: Io, options: &Options, counters: Counters) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            bound: io.local_addr()?,
            io,
            counters,
            table: Mutex::default(),
            queue_datagrams: options.queue_datagrams,
            queue_bytes: options.queue_bytes,
            queues_bytes: options.queues_bytes,
            queued: AtomicUsize::new(0),
            blocked: Mutex::default(),
            demux: AtomicWaker::new(),
            closed: AtomicBool::new(false),
        }))
    }

    pub fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocked(&self) -> MutexGuard<'_, HashMap<usize, Waker>> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn waiting_to_send(&self) -> usize {
        self.blocked().len()
    }

    #[cfg(test)]
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::SeqCst)
    }

    /// Puts a datagram into a peer's queue and wakes its task; one that does not fit is
    /// dropped and counted.
    pub fn push(&self, peer: &Peer, datagram: &[u8]) -> Result<(), Gone> {
        let cost = Queue::cost(datagram.len());
        let mut state = peer.lock();
        if state.gone {
            return Err(Gone);
        }
        let queue = &mut state.queue;
        let waiting = queue.datagrams();
        if waiting > 0
            && (waiting >= self.queue_datagrams || queue.bytes() + cost > self.queue_bytes)
        {
            drop(state);
            self.counters.queue_full.increment(1);
            return Ok(());
        }
        let first_small = waiting == 0 && cost <= ALWAYS_TAKEN;
        if !first_small && self.queued.load(Ordering::Relaxed) + cost > self.queues_bytes {
            drop(state);
            self.counters.queues_full.increment(1);
            return Ok(());
        }
        queue.push(datagram);
        self.queued.fetch_add(cost, Ordering::Relaxed);
        let waker = state.receiver.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// The oldest datagram of a peer, at the start of `buffer`; `None` when there will
    /// be no more.
    pub fn poll_pop(
        &self,
        peer: &Peer,
        cx: &Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Option<usize>> {
        let mut state = peer.lock();
        let before = state.queue.bytes();
        if let Some(count) = state.queue.pop(buffer) {
            let taken = before - state.queue.bytes();
            self.queued.fetch_sub(taken, Ordering::Relaxed);
            return Poll::Ready(Some(count));
        }
        // Set before it wakes the receivers: one that registers later sees it.
        if self.closed.load(Ordering::SeqCst) {
            return Poll::Ready(None);
        }
        match &state.receiver {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => state.receiver = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// The end of a peer.
    pub fn leave(&self, peer: &Arc<Peer>) {
        let mut state = peer.lock();
        state.gone = true;
        let queue = std::mem::take(&mut state.queue);
        let receiver = state.receiver.take();
        drop(state);
        self.queued.fetch_sub(queue.bytes(), Ordering::Relaxed);
        self.counters.closed.increment(queue.datagrams() as u64);
        self.table().remove(peer);
        drop((queue, receiver));
    }

    /// Sends one datagram, from `source` if this host has it. Whatever becomes of it is
    /// nobody's error with UDP: it is counted, and the peer goes on.
    pub fn send(
        &self,
        peer: SocketAddr,
        mut source: Option<IpAddr>,
        datagram: &[u8],
    ) -> Result<(), Blocked> {
        let mut again = true;
        loop {
            let Err(error) = self.io.send(peer, source, datagram) else {
                self.counters.sent.increment(1);
                return Ok(());
            };
            match error.kind() {
                ErrorKind::WouldBlock => return Err(Blocked),
                // What the kernel says, depending on its version, of a source that this
                // host no longer has; it may be there again for the next datagram.
                ErrorKind::NetworkUnreachable
                | ErrorKind::InvalidInput
                | ErrorKind::AddrNotAvailable
                    if source.take().is_some() => {}
                // About an earlier datagram, to whatever peer; it stood in the way of
                // this one.
                ErrorKind::ConnectionRefused if std::mem::take(&mut again) => {}
                _ => {
                    let counters = &self.counters;
                    match error.raw_os_error() {
                        Some(libc::EMSGSIZE) => counters.too_large.increment(1),
                        _ => counters.send_failed.increment(1),
                    }
                    let bytes = datagram.len();
                    tracing::debug!(%peer, bytes, %error, "a datagram was not sent");
                    return Ok(());
                }
            }
        }
    }

    /// Wakes the task once the socket takes datagrams again.
    pub fn block(&self, peer: &Arc<Peer>, cx: &Context<'_>) {
        let key = Arc::as_ptr(peer).addr();
        let replaced = self.blocked().insert(key, cx.waker().clone());
        drop(replaced);
        // It may sleep without an interest in sending.
        self.demux.wake();
    }

    /// The task waits no longer.
    pub fn unblock(&self, peer: &Arc<Peer>) {
        let waker = self.blocked().remove(&Arc::as_ptr(peer).addr());
        drop(waker);
    }

    /// Wakes those who wait to send, if the socket takes datagrams.
    pub fn poll_blocked(&self, cx: &mut Context<'_>) {
        if self.blocked().is_empty() {
            return;
        }
        if self.io.poll_writable(cx).is_ready() {
            self.wake_blocked();
        }
    }

    fn wake_blocked(&self) {
        let blocked = std::mem::take(&mut *self.blocked());
        for waker in blocked.into_values() {
            waker.wake();
        }
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Nothing is received any more; tells all peers.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let peers: Vec<_> = self.table().peers().cloned().collect();
        for peer in peers {
            let waker = peer.lock().receiver.take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        self.wake_blocked();
    }
}
