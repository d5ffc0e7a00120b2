//! A connection as everyone but its own task sees it.
//!
//! The task owns the socket and the state machine; others leave their wishes in an
//! inbox under one short lock and wake it. What the inbox holds is bounded: bytes
//! to send by [`Handle::send`], messages by [`super::queue`], the rest by its shape.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::context::ListenerContext;
use super::queue::{MessageQueue, Pushed};
use super::reason::CloseReason;
use crate::auth::acl::Person;
use crate::broker::topic::Mountpoint;
use crate::broker::{Delivery, OwnSession, Subscriber, Subscription, SubscriptionKey};
use crate::handler::Caller;
use crate::id::ConnId;
use crate::tls::Subject;
use crate::transport::PeerInfo;

/// Most subscriptions of one connection. A concentrator that stands for thousands
/// of meters fits; a handler that subscribes in a loop does not.
const MAX_SUBSCRIPTIONS: usize = 10_000;

/// The device as a client of the broker.
#[derive(Debug)]
pub struct Client {
    /// Unique among the gateway's connections.
    pub clientid: Arc<str>,
    /// The one that the handler gave, where whoever vouched for it has given it another.
    pub said: Option<Arc<str>>,
    /// As the handler gave it.
    pub username: String,
    /// In front of its topics on the broker.
    pub mountpoint: Mountpoint,
    /// Whose wishes are checked, unless it may do everything.
    pub person: Option<Box<Person>>,
    /// Its own session at the broker; without one it shares the pool.
    pub own: Option<OwnSession>,
}

/// Why a request to a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is closing or gone.
    NotAlive,
    /// It is not authenticated.
    NotAuthenticated,
    /// It is just being authenticated.
    Authenticating,
    /// It is authenticated.
    AlreadyAuthenticated,
    /// It has as many subscriptions as it may have.
    TooManySubscriptions,
    /// Too much waits for a device that does not keep up.
    SendBufferFull,
}

#[derive(Debug)]
enum Session {
    Anonymous,
    /// Its end is the authentication's, too.
    Authenticating(#[expect(dead_code, reason = "for its drop")] oneshot::Sender<()>),
    Authenticated(Arc<Client>),
}

/// An authentication that is under way: while it lives there can be no other. Dropped without
/// [`Authentication::done`] it leaves the connection as it was.
pub struct Authentication<'a> {
    handle: &'a Handle,
    ended: oneshot::Receiver<()>,
    done: bool,
}

impl Authentication<'_> {
    /// Does `work`, but no longer than the connection lives.
    pub async fn run<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Refused> {
        tokio::select! {
            biased;
            _ = &mut self.ended => Err(Refused::NotAlive),
            result = work => Ok(result),
        }
    }

    /// The device is a client now, until it expires.
    pub fn done(mut self, client: Arc<Client>, expires: Option<Instant>) -> Result<(), Refused> {
        self.done = true;
        self.handle.change(|inbox| {
            inbox.session = Session::Authenticated(client);
            inbox.authenticated = Some(expires);
        })
    }
}

impl Drop for Authentication<'_> {
    fn drop(&mut self) {
        if !self.done {
            // A connection that has ended has nothing to go back to.
            let _ = self
                .handle
                .change(|inbox| inbox.session = Session::Anonymous);
        }
    }
}

/// How many times `high_watermark` may wait for a device. A handler that waits for
/// the answer of each Send never sees more than one of them.
const MAX_WATERMARKS: u64 = 5;

/// Bytes on their way to the device, counted as one stream from the beginning.
#[derive(Debug, Default)]
struct Outgoing {
    chunks: VecDeque<Bytes>,
    accepted: u64,
    sent: u64,
    /// Calls of Send to be answered once so many bytes are sent, in order.
    waiters: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// What bytes for the device count: an empty datagram as one byte, or they could pile
/// up without end.
pub(super) fn weight(bytes: &Bytes) -> usize {
    bytes.len().max(1)
}

struct Inbox {
    /// Nothing is accepted any more.
    closed: bool,
    /// Only while something waits.
    outgoing: Option<Box<Outgoing>>,
    messages: MessageQueue,
    close: Option<CloseReason>,
    drain: bool,
    keepalive: Option<Duration>,
    /// When what was just found out about the device expires.
    authenticated: Option<Option<Instant>>,
    session: Session,
    subscriptions: BTreeMap<String, Subscription>,
    waker: Option<Waker>,
}

/// What the task finds in its inbox. All but `outgoing` is taken out by looking.
#[derive(Default)]
pub(super) struct Wishes {
    pub close: Option<CloseReason>,
    pub drain: bool,
    pub keepalive: Option<Duration>,
    pub authenticated: Option<Option<Instant>>,
    pub messages_wait: bool,
}

impl Wishes {
    /// Whether there is any beside messages.
    pub(super) fn are_some(&self) -> bool {
        let rare = self.keepalive.is_some() || self.authenticated.is_some();
        rare || self.close.is_some() || self.drain
    }
}

struct Shared {
    peer: SocketAddr,
    certificate: Option<Box<Subject>>,
    /// Whether what is sent is a stream, or each piece a datagram of its own.
    stream: bool,
    caller: Arc<Caller>,
    context: Arc<ListenerContext>,
    inbox: Mutex<Inbox>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    pub(super) fn new(
        id: ConnId,
        peer: &PeerInfo,
        stream: bool,
        context: Arc<ListenerContext>,
    ) -> Self {
        Self(Arc::new(Shared {
            peer: peer.peer,
            certificate: peer.certificate.clone().map(Box::new),
            stream,
            caller: Arc::new(Caller::new(id)),
            context,
            inbox: Mutex::new(Inbox {
                closed: false,
                outgoing: None,
                messages: MessageQueue::default(),
                close: None,
                drain: false,
                keepalive: None,
                authenticated: None,
                session: Session::Anonymous,
                subscriptions: BTreeMap::new(),
                waker: None,
            }),
        }))
    }

    /// Its id.
    pub fn id(&self) -> ConnId {
        self.0.caller.conn
    }

    /// The device's address.
    pub fn peer(&self) -> SocketAddr {
        self.0.peer
    }

    /// Whose certificate the device showed.
    pub fn certificate(&self) -> Option<&Subject> {
        self.0.certificate.as_deref()
    }

    /// The connection as its handler knows it.
    pub(super) fn caller(&self) -> &Arc<Caller> {
        &self.0.caller
    }

    /// What it has in common with the other connections of its listener.
    pub(super) fn context(&self) -> &Arc<ListenerContext> {
        &self.0.context
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        // No code under the lock can leave it half changed.
        self.0.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` on an inbox that is open, and wakes the task.
    fn change<R>(&self, change: impl FnOnce(&mut Inbox) -> R) -> Result<R, Refused> {
        let mut inbox = self.lock();
        if inbox.closed {
            return Err(Refused::NotAlive);
        }
        let result = change(&mut inbox);
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(result)
    }

    /// Accepts bytes for the device, in the order of the calls. Returns when no more
    /// than `high_watermark` bytes wait, these included.
    ///
    /// Once it was polled the bytes are accepted, whether it is awaited or not.
    ///
    /// # Errors
    /// [`Refused::SendBufferFull`] when five times `high_watermark` wait already, and
    /// [`Refused::NotAlive`], also when the connection ends without having sent them.
    pub async fn send(&self, bytes: Bytes) -> Result<(), Refused> {
        let watermark = u64::from(self.0.context.settings.high_watermark);
        let answer = self.change(|inbox| {
            let outgoing = inbox.outgoing.get_or_insert_default();
            let waiting = outgoing.accepted - outgoing.sent;
            let size = match self.0.stream {
                true => bytes.len(),
                false => weight(&bytes),
            } as u64;
            // What is larger than all room is taken when nothing waits.
            if waiting > 0 && waiting + size > MAX_WATERMARKS * watermark {
                return Err(Refused::SendBufferFull);
            }
            outgoing.accepted += size;
            // Nothing is nothing in a stream, but a datagram.
            if size > 0 {
                outgoing.chunks.push_back(bytes);
            }
            if outgoing.accepted - outgoing.sent <= watermark {
                return Ok(None);
            }
            let (waiter, answer) = oneshot::channel();
            let position = outgoing.accepted - watermark;
            outgoing.waiters.push_back((position, waiter));
            Ok(Some(answer))
        })??;
        match answer {
            None => Ok(()),
            Some(answer) => answer.await.map_err(|_| Refused::NotAlive),
        }
    }

    /// Asks for the connection to be closed after what was accepted is sent. From
    /// here on it accepts nothing more.
    pub fn close(&self, reason: CloseReason) -> Result<(), Refused> {
        self.change(|inbox| {
            inbox.close = Some(reason);
            inbox.closed = true;
        })
    }

    /// Asks for the connection to be closed because the gateway stops. A callback in
    /// flight is finished first and may still use the connection.
    pub(super) fn drain(&self) -> Result<(), Refused> {
        self.change(|inbox| inbox.drain = true)
    }

    /// Sets or replaces the keepalive interval.
    pub fn start_timer(&self, interval: Duration) -> Result<(), Refused> {
        self.change(|inbox| inbox.keepalive = Some(interval))
    }

    /// Begins an authentication, of which there is one at a time and no second one.
    pub fn authenticating(&self) -> Result<Authentication<'_>, Refused> {
        let (ends, ended) = oneshot::channel();
        self.change(|inbox| match inbox.session {
            Session::Anonymous => {
                inbox.session = Session::Authenticating(ends);
                Ok(())
            }
            Session::Authenticating(_) => Err(Refused::Authenticating),
            Session::Authenticated(_) => Err(Refused::AlreadyAuthenticated),
        })??;
        Ok(Authentication {
            handle: self,
            ended,
            done: false,
        })
    }

    /// The client that the device is.
    pub fn client(&self) -> Result<Arc<Client>, Refused> {
        let inbox = self.lock();
        if inbox.closed {
            return Err(Refused::NotAlive);
        }
        match &inbox.session {
            Session::Authenticated(client) => Ok(client.clone()),
            Session::Anonymous | Session::Authenticating(_) => Err(Refused::NotAuthenticated),
        }
    }

    /// Whether one more subscription fits; the one to the same filter, which it is
    /// going to replace.
    pub fn may_subscribe(&self, filter: &str) -> Result<Option<SubscriptionKey>, Refused> {
        let inbox = self.lock();
        let existing = inbox.subscriptions.get(filter).map(Subscription::key);
        if existing.is_none() && inbox.subscriptions.len() >= MAX_SUBSCRIPTIONS {
            return Err(Refused::TooManySubscriptions);
        }
        Ok(existing)
    }

    /// Keeps a subscription for as long as the connection lives; one to the same
    /// filter is replaced.
    pub fn subscribed(&self, filter: String, subscription: Subscription) -> Result<(), Refused> {
        let mut inbox = self.lock();
        if inbox.closed {
            // Outside the lock, as below: a subscription's end takes locks of the broker's.
            drop(inbox);
            drop(subscription);
            return Err(Refused::NotAlive);
        }
        let replaced = inbox.subscriptions.insert(filter, subscription);
        drop(inbox);
        drop(replaced);
        Ok(())
    }

    /// Ends a subscription; nothing happens if there is none.
    pub fn unsubscribe(&self, filter: &str) -> Result<(), Refused> {
        let ended = self.change(|inbox| inbox.subscriptions.remove(filter))?;
        drop(ended);
        Ok(())
    }

    // What follows is for the connection's own task.

    /// Takes the wishes out, moves bytes to send to the end of `outgoing`, and
    /// remembers whom to wake for more.
    pub(super) fn look(&self, cx: &Context<'_>, outgoing: &mut VecDeque<Bytes>) -> Wishes {
        let mut inbox = self.lock();
        if let Some(waiting) = &mut inbox.outgoing {
            outgoing.extend(waiting.chunks.drain(..));
        }
        match &inbox.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => inbox.waker = Some(cx.waker().clone()),
        }
        Wishes {
            close: inbox.close.take(),
            drain: std::mem::take(&mut inbox.drain),
            keepalive: inbox.keepalive.take(),
            authenticated: inbox.authenticated.take(),
            messages_wait: !inbox.messages.is_empty(),
        }
    }

    /// The next messages for the handler.
    pub(super) fn take_messages(&self, count: usize, bytes: usize) -> Vec<Delivery> {
        self.lock().messages.take(count, bytes)
    }

    /// Notes that the device took bytes, and answers the calls that waited for it.
    pub(super) fn sent(&self, bytes: usize) {
        let mut inbox = self.lock();
        let Some(outgoing) = &mut inbox.outgoing else {
            return;
        };
        outgoing.sent += bytes as u64;
        while let Some((position, _)) = outgoing.waiters.front()
            && *position <= outgoing.sent
        {
            if let Some((_, waiter)) = outgoing.waiters.pop_front() {
                // The caller may have left.
                let _ = waiter.send(());
            }
        }
        if outgoing.accepted == outgoing.sent {
            // An idle connection holds no memory for what it once sent.
            inbox.outgoing = None;
        }
    }

    /// What was accepted for the device will never be sent.
    pub(super) fn abandon(&self) {
        let abandoned = std::mem::take(&mut self.lock().outgoing);
        drop(abandoned);
    }

    /// Accepts nothing more, ends the subscriptions and lets go of the messages. What
    /// was accepted for the device stays to be sent. Returns the client that the device
    /// was.
    pub(super) fn end(&self) -> Option<Arc<Client>> {
        let mut inbox = self.lock();
        inbox.closed = true;
        let messages = std::mem::take(&mut inbox.messages);
        let subscriptions = std::mem::take(&mut inbox.subscriptions);
        let session = std::mem::replace(&mut inbox.session, Session::Anonymous);
        drop(inbox);
        drop(subscriptions);
        let mut messages = messages;
        let lost = messages.take(usize::MAX, usize::MAX).len();
        if lost > 0 {
            self.0.context.metrics.dropped_closed.increment(lost as u64);
        }
        match session {
            Session::Authenticated(client) => Some(client),
            Session::Anonymous | Session::Authenticating(_) => None,
        }
    }

    /// This connection as a subscriber.
    pub fn subscriber(&self) -> Arc<dyn Subscriber> {
        Arc::new(self.clone())
    }
}

impl Subscriber for Handle {
    /// Puts a message into the queue, and what no longer fits out of it.
    fn deliver(&self, delivery: Delivery) -> Result<(), Delivery> {
        let limits = &self.0.context.settings.queue;
        let mut inbox = self.lock();
        if inbox.closed {
            return Err(delivery);
        }
        let pushed = inbox.messages.push(delivery, limits);
        if matches!(pushed, Pushed::Full(_)) {
            inbox.close = Some(CloseReason::RateLimited);
            inbox.closed = true;
        }
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        // Dropped here and not under the lock: it acknowledges.
        let dropped = match pushed {
            Pushed::Queued => Vec::new(),
            Pushed::Dropped(dropped) => dropped,
            Pushed::Full(dropped) => vec![dropped],
        };
        let metrics = &self.0.context.metrics;
        metrics.dropped_full.increment(dropped.len() as u64);
        Ok(())
    }
}
