//! One member of the pool as its callers see it: an outbox, the [subscriptions](Filters)
//! and the state of the link. The link's task ([`super::link`]) does the rest.
//!
//! Lock rule: a member's lock is never held while a subscriber is called.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::oneshot;

use tokio::time::Instant;

use super::filters::Filters;
use super::group::{Audience, Recipient, SubscriptionKey};
use super::session::{PublishWaiter, Receipt, Session, SubscribeRequest};
use super::topic::TopicFilter;
use super::topics::Answer;
use super::wire::{InboundPublish, OutboundPublish, Welcome};
use super::{Options, PublishError, QoS, Refusal, Subscriber};
use crate::metrics::BrokerMetrics;

/// Bytes encoded ahead of the socket. Enough for one large write; what waits
/// beyond it stays in the outbox, where it is bounded and can be withdrawn.
const WRITE_AHEAD: usize = 64 * 1024;

/// How long a full outbox is not searched again, for that costs as much as it is long.
const SEARCH_PAUSE: Duration = Duration::from_millis(100);

/// State of a link to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// Not tried yet, or being tried for the first time.
    Connecting,
    /// Connected to this address, every subscription restored.
    Up(Arc<str>),
    /// Not connected, and why: each address with its reason.
    Down(String),
}

impl LinkState {
    /// Whether the member is connected.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up(_))
    }
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connecting => f.write_str("connecting to the broker"),
            Self::Up(address) => write!(f, "connected to {address}"),
            Self::Down(reason) => write!(f, "no broker: {reason}"),
        }
    }
}

struct Waiting {
    publish: OutboundPublish,
    waiter: PublishWaiter,
}

struct Shared {
    state: LinkState,
    closing: bool,
    outbox: VecDeque<Waiting>,
    outbox_bytes: usize,
    filters: Filters,
    taken: Vec<Receipt>,
    /// What the broker granted at its last CONNACK.
    welcome: Option<Welcome>,
    /// Publishes that await an acknowledgement; the session's own count.
    unacknowledged: usize,
    /// Their bytes.
    unacknowledged_bytes: usize,
    /// When the whole outbox was last searched for publishes whose callers have left.
    searched: Option<Instant>,
    waker: Option<Waker>,
    /// Whether the farewell is to bring about the will.
    with_will: bool,
    /// Of a device's own connection: told of the first CONNACK.
    first: Option<oneshot::Sender<()>>,
}

/// See the module.
pub(super) struct Member {
    number: usize,
    client_id: String,
    options: Arc<Options>,
    metrics: BrokerMetrics,
    shared: Mutex<Shared>,
}

/// QoS 0 publishes that were encoded, by the position in the byte stream at which
/// each ends.
pub(super) type WriteWaiters = VecDeque<(u64, PublishWaiter)>;

impl Member {
    pub(super) fn new(
        number: usize,
        client_id: String,
        options: Arc<Options>,
        metrics: BrokerMetrics,
    ) -> std::io::Result<Arc<Self>> {
        let filters = Filters::new(options.protocol, metrics.clone())?;
        Ok(Arc::new(Self {
            number,
            client_id,
            options,
            metrics,
            shared: Mutex::new(Shared {
                state: LinkState::Connecting,
                closing: false,
                outbox: VecDeque::new(),
                outbox_bytes: 0,
                filters,
                taken: Vec::new(),
                welcome: None,
                unacknowledged: 0,
                unacknowledged_bytes: 0,
                searched: None,
                waker: None,
                with_will: false,
                first: None,
            }),
        }))
    }

    /// Its place in the pool.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    pub(super) fn client_id(&self) -> &str {
        &self.client_id
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn metrics(&self) -> &BrokerMetrics {
        &self.metrics
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // No code under the lock can leave it half changed.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change` under the lock and wakes the link's task.
    fn change<R>(&self, change: impl FnOnce(&mut Shared) -> R) -> R {
        let mut shared = self.lock();
        let result = change(&mut shared);
        let waker = shared.waker.take();
        drop(shared);
        if let Some(waker) = waker {
            waker.wake();
        }
        result
    }

    pub(super) fn state(&self) -> LinkState {
        self.lock().state.clone()
    }

    pub(super) fn count_timeout(&self) {
        self.metrics.publish_timeouts.increment(1);
    }

    /// Publishes accepted and not confirmed.
    pub(super) fn waiting(&self) -> usize {
        let mut shared = self.lock();
        self.withdraw_abandoned(&mut shared);
        shared.outbox.len() + shared.unacknowledged
    }

    /// Nothing new is accepted; the link ends when everything is confirmed.
    pub(super) fn close(&self) {
        self.change(|shared| shared.closing = true);
    }

    /// Like [`Member::close`]; `with_will` has the broker publish the will.
    pub(super) fn leave_broker(&self, with_will: bool) {
        self.change(|shared| {
            if !shared.closing {
                shared.with_will = with_will;
            }
            shared.closing = true;
        });
    }

    /// Accepts nothing more and forgets what waits to be sent: there will be no link.
    pub(super) fn abandon(&self) {
        let outbox = self.change(|shared| {
            shared.closing = true;
            shared.outbox_bytes = 0;
            std::mem::take(&mut shared.outbox)
        });
        let left = outbox.len() as f64;
        self.metrics.outbox_messages.decrement(left);
    }

    /// Whether the farewell is to bring about the will.
    pub(super) fn leaves_with_will(&self) -> bool {
        self.lock().with_will
    }

    /// What is returned resolves with the first CONNACK to come.
    pub(super) fn first_welcome(&self) -> oneshot::Receiver<()> {
        let (first, welcome) = oneshot::channel();
        self.lock().first = Some(first);
        welcome
    }

    pub(super) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Puts a publish into the outbox; what is returned resolves with its fate.
    pub(super) fn publish(
        &self,
        publish: OutboundPublish,
    ) -> Result<oneshot::Receiver<Result<(), PublishError>>, PublishError> {
        let (waiter, confirmed) = oneshot::channel();
        let size = publish.size();
        self.change(|shared| {
            if shared.closing {
                return Err(PublishError::Stopped);
            }
            if let Some(welcome) = &shared.welcome {
                welcome.check(&publish)?;
            }
            if !shared.has_room(size, &self.options) {
                self.withdraw_abandoned(shared);
                if !shared.has_room(size, &self.options) {
                    self.metrics.outbox_full.increment(1);
                    return Err(PublishError::OutboxFull(shared.state.to_string()));
                }
            }
            shared.outbox_bytes += size;
            shared.outbox.push_back(Waiting { publish, waiter });
            // Before the link, on another thread, can take it and count it out.
            self.metrics.outbox_messages.increment(1.0);
            Ok(confirmed)
        })
    }

    /// Forgets publishes whose callers have left. Most leave in the order they came, for
    /// they wait equally long, unless they have deadlines of their own.
    fn withdraw_abandoned(&self, shared: &mut Shared) {
        while let Some(waiting) = shared.outbox.front()
            && waiting.waiter.is_closed()
        {
            shared.outbox_bytes = shared.outbox_bytes.saturating_sub(waiting.publish.size());
            shared.outbox.pop_front();
            self.metrics.outbox_messages.decrement(1.0);
        }
        let now = Instant::now();
        if shared.searched.is_some_and(|at| now - at < SEARCH_PAUSE) {
            return;
        }
        shared.searched = Some(now);
        let before = shared.outbox.len();
        let bytes = &mut shared.outbox_bytes;
        shared.outbox.retain(|waiting| {
            let stays = !waiting.waiter.is_closed();
            if !stays {
                *bytes = bytes.saturating_sub(waiting.publish.size());
            }
            stays
        });
        let left = before - shared.outbox.len();
        self.metrics.outbox_messages.decrement(left as f64);
    }

    /// Adds a subscriber in the place of `replaced`; the key is for
    /// [`Member::unsubscribe`]. Nobody answers `waiter` once the member is closing.
    pub(super) fn subscribe(
        &self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
        waiter: oneshot::Sender<Result<QoS, Refusal>>,
    ) -> Option<SubscriptionKey> {
        self.change(|shared| {
            let filters = &mut shared.filters;
            (!shared.closing).then(|| filters.add(filter, qos, subscriber, replaced, waiter))
        })
    }

    /// Takes a subscriber away; harmless when it is gone already.
    pub(super) fn unsubscribe(&self, filter: &TopicFilter, key: SubscriptionKey) {
        self.change(|shared| shared.filters.remove(filter, key));
    }

    /// With MQTT 3.1.1: adds a subscriber, whose messages come through `held`.
    pub(super) fn join(
        &self,
        filter: &TopicFilter,
        held: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> (SubscriptionKey, Answer) {
        self.change(|shared| {
            let in_doubt = !shared.state.is_up();
            let filters = &mut shared.filters;
            filters.join(filter, held, qos, subscriber, replaced, in_doubt)
        })
    }

    /// With MQTT 3.1.1: takes a subscriber away, and `released` at the broker if
    /// nothing relies on it any more.
    pub(super) fn leave(
        &self,
        filter: &TopicFilter,
        key: SubscriptionKey,
        released: Option<&TopicFilter>,
    ) {
        self.change(|shared| shared.filters.leave(filter, key, released));
    }

    /// With MQTT 3.1.1: one subscriber, if it is still there.
    pub(super) fn subscriber(
        &self,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Option<Recipient> {
        self.lock().filters.subscriber(filter, key)
    }

    /// Sets the state and says whether it changed.
    pub(super) fn set_state(&self, state: LinkState) -> bool {
        let mut shared = self.lock();
        let changed = shared.state != state;
        shared.state = state;
        changed
    }

    /// A CONNACK came: everything is subscribed again.
    pub(super) fn welcomed(&self, welcome: &Welcome) {
        let mut shared = self.lock();
        shared.welcome = Some(welcome.clone());
        shared.filters.welcomed(welcome, Instant::now());
        if let Some(first) = shared.first.take() {
            // Who waited may have left.
            let _ = first.send(());
        }
    }

    /// The broker hangs up whenever it is asked to restore this one: it is asked no more
    /// for long, or until somebody subscribes anew.
    pub(super) fn is_unwelcome(&self, filter: Arc<str>, refusal: &Refusal) {
        let now = Instant::now();
        self.lock().filters.is_unwelcome(filter, refusal, now);
    }

    /// The broker accepted a SUBSCRIBE.
    pub(super) fn subscribed(&self, filter: &str, id: u32) {
        self.lock().filters.accepted(filter, id, Instant::now());
    }

    /// A SUBSCRIBE did not get through and is sent again if it is still of use.
    pub(super) fn subscribe_again(&self, request: SubscribeRequest) {
        self.change(|shared| shared.filters.subscribe_again(request));
    }

    /// An UNSUBSCRIBE did not get through and is sent again if it is still of use.
    pub(super) fn unsubscribe_again(&self, filter: Arc<str>) {
        self.change(|shared| shared.filters.unsubscribe_again(filter));
    }

    /// The broker refused to restore a subscription.
    pub(super) fn not_restored(&self, filter: &Arc<str>, refusal: &Refusal) {
        let now = Instant::now();
        self.lock().filters.not_restored(filter, refusal, now);
    }

    /// When to call [`Member::retry`], if at all.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.lock().filters.retry_at()
    }

    /// Asks again for what the broker would not restore, when it is time.
    pub(super) fn retry(&self, now: Instant) {
        let mut shared = self.lock();
        if shared.filters.retry(now)
            && let Some(waker) = shared.waker.take()
        {
            drop(shared);
            waker.wake();
        }
    }

    /// Tells the session what was taken.
    pub(super) fn settle(&self, session: &mut Session, out: &mut BytesMut) {
        for receipt in self.lock().taken.drain(..) {
            session.taken(receipt, out);
        }
    }

    /// Moves work into the session, as far as it takes any, and remembers whom to
    /// wake for more. `position` is where `out` begins in the byte stream. True
    /// when the member is closing and nothing is left to do.
    pub(super) fn pull(
        &self,
        cx: &Context<'_>,
        session: &mut Session,
        out: &mut BytesMut,
        position: u64,
        written: &mut WriteWaiters,
    ) -> bool {
        let mut shared = self.lock();
        let shared = &mut *shared;
        for receipt in shared.taken.drain(..) {
            session.taken(receipt, out);
        }
        let welcome = shared.welcome.as_ref();
        shared.filters.pull(session, welcome, out, WRITE_AHEAD);
        while out.len() < WRITE_AHEAD && session.can_publish() {
            let Some(Waiting { publish, waiter }) = shared.outbox.pop_front() else {
                break;
            };
            shared.outbox_bytes = shared.outbox_bytes.saturating_sub(publish.size());
            self.metrics.outbox_messages.decrement(1.0);
            // Nobody waits for it any more: withdrawn.
            if waiter.is_closed() {
                continue;
            }
            let allowed = shared.welcome.as_ref().map(|w| w.check(&publish));
            if let Some(Err(error)) = allowed {
                let _ = waiter.send(Err(error));
                continue;
            }
            if publish.qos() == QoS::AtMostOnce {
                publish.encode(0, false, out);
                written.push_back((position + out.len() as u64, waiter));
            } else {
                session.publish(publish, waiter, out);
            }
            self.metrics.published.increment(1);
        }
        shared.unacknowledged = session.unacknowledged();
        shared.unacknowledged_bytes = session.unacknowledged_bytes();
        let register = |slot: &mut Option<Waker>| match slot {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            slot => *slot = Some(cx.waker().clone()),
        };
        register(&mut shared.waker);
        shared.closing && shared.outbox.is_empty() && shared.filters.is_idle() && session.is_idle()
    }

    /// Who gets a message.
    pub(super) fn audience(&self, publish: &InboundPublish, topic: &str) -> Audience {
        self.lock().filters.audience(publish, topic)
    }

    /// Whether subscriptions wait to be restored.
    pub(super) fn restoring(&self) -> bool {
        self.lock().filters.restoring()
    }

    /// Filters subscribed at this member.
    pub(super) fn filters(&self) -> usize {
        self.lock().filters.len()
    }
}

impl Shared {
    fn has_room(&self, size: usize, options: &Options) -> bool {
        let bytes = self.outbox_bytes + self.unacknowledged_bytes;
        self.outbox.len() < options.outbox_max_messages
            && (bytes == 0 || bytes + size <= options.outbox_max_bytes)
    }
}

/// Acknowledges a message to the broker when its last holder lets go of it: when
/// every handler took it, or the connection ended, or its queue dropped it.
pub struct AckOnDrop {
    member: Arc<Member>,
    receipt: Receipt,
}

impl AckOnDrop {
    pub(super) fn new(member: &Arc<Member>, receipt: Receipt) -> Arc<Self> {
        Arc::new(Self {
            member: member.clone(),
            receipt,
        })
    }
}

impl Drop for AckOnDrop {
    fn drop(&mut self) {
        self.member.change(|shared| shared.taken.push(self.receipt));
    }
}

impl fmt::Debug for AckOnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AckOnDrop").field(&self.receipt).finish()
    }
}
