//! A connection as everyone but its own task sees it.
//!
//! The task owns the socket and the state machine; others leave their wishes in an
//! inbox under one short lock and wake it. What the inbox holds is bounded: bytes
//! to send by a semaphore, messages by [`super::queue`], the rest by its shape.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::context::ListenerContext;
use super::queue::{MessageQueue, Pushed};
use super::reason::CloseReason;
use crate::broker::topic::Mountpoint;
use crate::broker::{Delivery, Subscriber, Subscription, SubscriptionKey};
use crate::handler::Caller;
use crate::id::ConnId;

/// Most subscriptions of one connection. A concentrator that stands for thousands
/// of meters fits; a handler that subscribes in a loop does not.
const MAX_SUBSCRIPTIONS: usize = 10_000;

/// The device as a client of the broker.
#[derive(Debug)]
pub struct Client {
    /// Unique among the gateway's connections.
    pub clientid: Arc<str>,
    /// As the handler gave it.
    pub username: String,
    /// In front of its topics on the broker.
    pub mountpoint: Mountpoint,
}

/// Why a request to a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is closing or gone.
    NotAlive,
    /// It is not authenticated.
    NotAuthenticated,
    /// It is, or is just being, authenticated.
    AlreadyAuthenticated,
    /// It has as many subscriptions as it may have.
    TooManySubscriptions,
}

#[derive(Debug)]
enum Session {
    Anonymous,
    Authenticating,
    Authenticated(Arc<Client>),
}

/// Bytes to send, with what they took of the room.
#[derive(Debug)]
pub(super) struct Chunk {
    pub bytes: Bytes,
    pub permits: u32,
}

struct Inbox {
    /// Nothing is accepted any more.
    closed: bool,
    outgoing: VecDeque<Chunk>,
    messages: MessageQueue,
    close: Option<CloseReason>,
    drain: bool,
    keepalive: Option<Duration>,
    authenticated: bool,
    session: Session,
    subscriptions: HashMap<String, Subscription>,
    waker: Option<Waker>,
}

/// What the task finds in its inbox. All but `outgoing` is taken out by looking.
#[derive(Default)]
pub(super) struct Wishes {
    pub close: Option<CloseReason>,
    pub drain: bool,
    pub keepalive: Option<Duration>,
    pub authenticated: bool,
    pub messages_wait: bool,
}

struct Shared {
    id: ConnId,
    peer: SocketAddr,
    caller: Arc<Caller>,
    context: Arc<ListenerContext>,
    /// Free bytes of the send buffer.
    room: Semaphore,
    inbox: Mutex<Inbox>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    pub(super) fn new(id: ConnId, peer: SocketAddr, context: Arc<ListenerContext>) -> Self {
        Self(Arc::new(Shared {
            id,
            peer,
            caller: Arc::new(Caller::new(id.to_string())),
            room: Semaphore::new(context.settings.high_watermark as usize),
            context,
            inbox: Mutex::new(Inbox {
                closed: false,
                outgoing: VecDeque::new(),
                messages: MessageQueue::default(),
                close: None,
                drain: false,
                keepalive: None,
                authenticated: false,
                session: Session::Anonymous,
                subscriptions: HashMap::new(),
                waker: None,
            }),
        }))
    }

    /// Its id.
    pub fn id(&self) -> ConnId {
        self.0.id
    }

    /// The device's address.
    pub fn peer(&self) -> SocketAddr {
        self.0.peer
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

    /// Accepts bytes for the device, in the order of the calls. Waits while more
    /// than `high_watermark` bytes wait already. Cancel safe: nothing is sent then.
    pub async fn send(&self, bytes: Bytes) -> Result<(), Refused> {
        if bytes.is_empty() {
            return self.change(|_| ());
        }
        let all = self.0.context.settings.high_watermark;
        let permits = u32::try_from(bytes.len()).unwrap_or(u32::MAX).min(all);
        // Fair, so the order holds; closed with the connection.
        let room = self.0.room.acquire_many(permits).await;
        let room = room.map_err(|_| Refused::NotAlive)?;
        self.change(|inbox| inbox.outgoing.push_back(Chunk { bytes, permits }))?;
        // Given back by the task when the bytes are sent.
        room.forget();
        Ok(())
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

    /// Begins an authentication; ends with [`Handle::authenticated`] or
    /// [`Handle::not_authenticated`].
    pub fn authenticating(&self) -> Result<(), Refused> {
        self.change(|inbox| match inbox.session {
            Session::Anonymous => {
                inbox.session = Session::Authenticating;
                Ok(())
            }
            Session::Authenticating | Session::Authenticated(_) => {
                Err(Refused::AlreadyAuthenticated)
            }
        })?
    }

    /// The authentication failed; another may be tried.
    pub fn not_authenticated(&self) {
        // A connection that has ended has nothing to go back to.
        let _ = self.change(|inbox| inbox.session = Session::Anonymous);
    }

    /// The device is a client now.
    pub fn authenticated(&self, client: Arc<Client>) -> Result<(), Refused> {
        self.change(|inbox| {
            inbox.session = Session::Authenticated(client);
            inbox.authenticated = true;
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
            Session::Anonymous | Session::Authenticating => Err(Refused::NotAuthenticated),
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
    pub(super) fn look(&self, cx: &Context<'_>, outgoing: &mut VecDeque<Chunk>) -> Wishes {
        let mut inbox = self.lock();
        outgoing.append(&mut inbox.outgoing);
        if inbox.outgoing.capacity() > 0 {
            inbox.outgoing = VecDeque::new();
        }
        match &inbox.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => inbox.waker = Some(cx.waker().clone()),
        }
        Wishes {
            close: inbox.close.take(),
            drain: std::mem::take(&mut inbox.drain),
            keepalive: inbox.keepalive.take(),
            authenticated: std::mem::take(&mut inbox.authenticated),
            messages_wait: !inbox.messages.is_empty(),
        }
    }

    /// The next messages for the handler.
    pub(super) fn take_messages(&self, count: usize, bytes: usize) -> Vec<Delivery> {
        self.lock().messages.take(count, bytes)
    }

    /// Gives back the room that sent bytes took.
    pub(super) fn sent(&self, permits: u32) {
        self.0.room.add_permits(permits as usize);
    }

    /// Accepts nothing more, wakes those who wait in [`Handle::send`], ends the
    /// subscriptions and lets go of the messages. What was accepted for the device
    /// stays to be sent. Returns the client that the device was.
    pub(super) fn end(&self) -> Option<Arc<Client>> {
        self.0.room.close();
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
            Session::Anonymous | Session::Authenticating => None,
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
        if matches!(pushed, Pushed::Full) {
            inbox.close = Some(CloseReason::RateLimited);
            inbox.closed = true;
        }
        let waker = inbox.waker.take();
        drop(inbox);
        if let Some(waker) = waker {
            waker.wake();
        }
        // What is dropped is dropped here, outside the lock: it acknowledges.
        let dropped = match &pushed {
            Pushed::Queued => 0,
            Pushed::Dropped(dropped) => dropped.len(),
            Pushed::Full => 1,
        };
        let metrics = &self.0.context.metrics;
        metrics.dropped_full.increment(dropped as u64);
        Ok(())
    }
}
