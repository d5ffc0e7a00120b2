//! One member of the pool as its callers see it: an outbox, a subscription table
//! and the state of the link. The link's task ([`super::link`]) does the rest.
//!
//! Lock rule: a member's lock is never held while a subscriber is called.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use bytes::BytesMut;
use tokio::sync::oneshot;

use super::group::{Audience, Recipient, SubscriptionKey};
use super::session::{PublishWaiter, Receipt, Session, SubscribeRequest};
use super::table::Table;
use super::topic::TopicFilter;
use super::topics::{Answer, Topics};
use super::wire::{InboundPublish, OutboundPublish, Protocol, Retained, Welcome};
use super::{Options, PublishError, QoS, Refusal, Subscriber};
use crate::metrics::BrokerMetrics;

/// Bytes encoded ahead of the socket. Enough for one large write; what waits
/// beyond it stays in the outbox, where it is bounded and can be withdrawn.
const WRITE_AHEAD: usize = 64 * 1024;

/// Requests about filters that may wait before the void ones among them are thrown
/// out. While the broker is away callers give up and try again.
const TIDY_AT: usize = 1024;

/// Ended subscriptions that are ended once more when a session is continued. Brokers
/// save sessions every now and then, and so many end meanwhile at the most.
const MAX_RELEASED: usize = 1024;

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

enum Control {
    Subscribe(SubscribeRequest),
    Unsubscribe(Arc<str>),
}

struct Shared {
    state: LinkState,
    closing: bool,
    outbox: VecDeque<Waiting>,
    outbox_bytes: usize,
    control: VecDeque<Control>,
    /// When `control` is long enough to be looked through for what is void.
    tidy_at: usize,
    /// Requests in `control` that restore a subscription.
    restores: usize,
    /// Filters that the broker was asked for and not yet told to forget.
    at_broker: HashSet<Arc<str>>,
    /// Those that it was told to forget last, at most [`MAX_RELEASED`]: a session that it
    /// saved before may still have them.
    released: VecDeque<Arc<str>>,
    /// Those that it hangs up upon when they are restored.
    unwelcome: HashSet<Arc<str>>,
    taken: Vec<Receipt>,
    /// Its subscriptions with MQTT 5.
    table: Table,
    /// Its subscriptions with MQTT 3.1.1; one of the two stays empty.
    topics: Topics,
    /// What the broker granted at its last CONNACK.
    welcome: Option<Welcome>,
    /// Publishes that await an acknowledgement; the session's own count.
    unacknowledged: usize,
    /// Their bytes.
    unacknowledged_bytes: usize,
    waker: Option<Waker>,
}

/// See the module.
pub(super) struct Member {
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
        client_id: String,
        options: Arc<Options>,
        metrics: BrokerMetrics,
    ) -> std::io::Result<Arc<Self>> {
        let mut seed = [0; 4];
        getrandom::fill(&mut seed).map_err(std::io::Error::from)?;
        Ok(Arc::new(Self {
            client_id,
            options,
            metrics,
            shared: Mutex::new(Shared {
                state: LinkState::Connecting,
                closing: false,
                outbox: VecDeque::new(),
                outbox_bytes: 0,
                control: VecDeque::new(),
                tidy_at: TIDY_AT,
                restores: 0,
                at_broker: HashSet::new(),
                released: VecDeque::new(),
                unwelcome: HashSet::new(),
                taken: Vec::new(),
                table: Table::new(u32::from_be_bytes(seed)),
                topics: Topics::default(),
                welcome: None,
                unacknowledged: 0,
                unacknowledged_bytes: 0,
                waker: None,
            }),
        }))
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
            Ok(())
        })?;
        self.metrics.outbox_messages.increment(1.0);
        Ok(confirmed)
    }

    /// Forgets publishes whose callers have left. They leave in the order they
    /// came, for all wait equally long, so those in front are enough.
    fn withdraw_abandoned(&self, shared: &mut Shared) {
        while let Some(waiting) = shared.outbox.front()
            && waiting.waiter.is_closed()
        {
            shared.outbox_bytes = shared.outbox_bytes.saturating_sub(waiting.publish.size());
            shared.outbox.pop_front();
            self.metrics.outbox_messages.decrement(1.0);
        }
    }

    /// Adds a subscriber in the place of `replaced`; the key is for
    /// [`Member::unsubscribe`].
    pub(super) fn subscribe(
        &self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
        waiter: oneshot::Sender<Result<QoS, Refusal>>,
    ) -> SubscriptionKey {
        self.change(|shared| {
            let (key, ask) = shared.table.add(filter, qos, subscriber, replaced);
            let request = SubscribeRequest {
                filter: ask.filter,
                qos: ask.qos,
                id: ask.id,
                retained: Retained::Send,
                waiter: Some(waiter),
            };
            shared.ask(Control::Subscribe(request));
            key
        })
    }

    /// Takes a subscriber away; harmless when it is gone already.
    pub(super) fn unsubscribe(&self, filter: &TopicFilter, key: SubscriptionKey) {
        self.change(|shared| {
            if let Some(filter) = shared.table.remove(filter, key) {
                shared.forget(filter);
            }
        });
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
            let in_doubt = !shared.state.is_up() || shared.restores > 0;
            let topics = &mut shared.topics;
            let (key, answer, question) =
                topics.add(filter, held, qos, subscriber, replaced, in_doubt);
            if let Some((ask, waiter)) = question {
                let request = SubscribeRequest {
                    filter: ask.filter,
                    qos: ask.qos,
                    id: ask.id,
                    retained: Retained::Send,
                    waiter: Some(waiter),
                };
                shared.ask(Control::Subscribe(request));
            }
            (key, answer)
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
        self.change(|shared| {
            shared.topics.remove(filter, key);
            if let Some(name) = released.and_then(|held| shared.topics.release(held)) {
                shared.forget(name);
            }
        });
    }

    /// With MQTT 3.1.1: one subscriber, if it is still there.
    pub(super) fn subscriber(
        &self,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Option<Recipient> {
        self.lock().topics.get(filter, key)
    }

    /// Sets the state and says whether it changed.
    pub(super) fn set_state(&self, state: LinkState) -> bool {
        let mut shared = self.lock();
        let changed = shared.state != state;
        shared.state = state;
        changed
    }

    /// A CONNACK came. Everything is subscribed again, before anything that waits: also
    /// where the broker has a session of ours, which may be one that it saved long ago.
    pub(super) fn welcomed(&self, welcome: &Welcome) {
        let mut shared = self.lock();
        shared.welcome = Some(welcome.clone());
        if !welcome.session_present {
            shared.at_broker.clear();
        }
        let waiting = std::mem::take(&mut shared.control);
        let mut restore = shared.table.restore();
        restore.append(&mut shared.topics.restore());
        restore.retain(|ask| !shared.unwelcome.contains(&ask.filter));
        shared.restores = restore.len();
        // First what nobody wants any more: beside a filter that overlaps with it a
        // message would come twice. In a new session there is nothing to end; the one
        // that is there may be older than what was ended lately.
        if welcome.session_present {
            let asked = waiting.iter().filter_map(|control| match control {
                Control::Unsubscribe(filter) => Some(filter),
                Control::Subscribe(_) => None,
            });
            let ended: HashSet<_> = asked.chain(&shared.released).cloned().collect();
            let gone = ended.into_iter().filter(|name| !shared.holds(name));
            let unsubscribe: Vec<_> = gone.map(Control::Unsubscribe).collect();
            shared.control.extend(unsubscribe);
        }
        let restore = restore.into_iter().map(|ask| {
            Control::Subscribe(SubscribeRequest {
                filter: ask.filter,
                qos: ask.qos,
                id: ask.id,
                retained: Retained::Never,
                waiter: None,
            })
        });
        shared.control.extend(restore);
        // Those whose callers have left have taken the subscription back.
        shared
            .control
            .extend(waiting.into_iter().filter(|control| match control {
                Control::Subscribe(request) => request.waiter.is_some() && !request.is_abandoned(),
                Control::Unsubscribe(_) => false,
            }));
    }

    /// The broker hangs up whenever it is asked to restore this one: it is asked no more
    /// until somebody subscribes anew.
    pub(super) fn is_unwelcome(&self, filter: Arc<str>, refusal: &Refusal) {
        let mut shared = self.lock();
        self.lose(&mut shared, &filter, refusal);
        shared.unwelcome.insert(filter);
    }

    /// The broker accepted a SUBSCRIBE: identifiers before it are of the past.
    pub(super) fn subscribed(&self, filter: &str, id: u32) {
        self.lock().table.confirm(filter, id);
    }

    /// A SUBSCRIBE did not get through and is sent again if it is still of use: with the
    /// QoS of now, for others may have asked meanwhile.
    pub(super) fn subscribe_again(&self, mut request: SubscribeRequest) {
        self.change(|shared| {
            if shared.wants(&request) {
                let (table, topics) = (&shared.table, &shared.topics);
                let wanted = table.qos(&request.filter);
                let wanted = wanted.or_else(|| topics.qos(&request.filter));
                request.qos = wanted.unwrap_or(request.qos);
                shared.restores += usize::from(request.waiter.is_none());
                shared.control.push_front(Control::Subscribe(request));
            }
        });
    }

    /// An UNSUBSCRIBE did not get through and is sent again unless somebody has
    /// subscribed meanwhile.
    pub(super) fn unsubscribe_again(&self, filter: Arc<str>) {
        self.change(|shared| {
            if !shared.table.contains(&filter) && !shared.topics.holds(&filter) {
                shared.ask(Control::Unsubscribe(filter));
            }
        });
    }

    /// The broker refused to restore a subscription.
    pub(super) fn not_restored(&self, filter: &str, refusal: &Refusal) {
        self.lose(&mut self.lock(), filter, refusal);
    }

    fn lose(&self, shared: &mut Shared, filter: &str, refusal: &Refusal) {
        tracing::error!(filter, %refusal, "a subscription could not be restored");
        self.metrics.not_restored.increment(1);
        shared.topics.not_restored(filter);
    }

    /// Answers a SUBSCRIBE that the broker has said it will not take.
    fn refuse(&self, shared: &mut Shared, request: SubscribeRequest, refusal: Refusal) {
        match request.waiter {
            // The caller may have left, and taken it back.
            Some(waiter) => drop(waiter.send(Err(refusal))),
            None => self.lose(shared, &request.filter, &refusal),
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
        while session.can_subscribe() && out.len() < WRITE_AHEAD {
            match shared.control.pop_front() {
                Some(Control::Subscribe(request)) if !shared.wants(&request) => {
                    shared.restores -= usize::from(request.waiter.is_none());
                }
                Some(Control::Subscribe(request)) => {
                    shared.restores -= usize::from(request.waiter.is_none());
                    let welcome = shared.welcome.as_ref();
                    if let Some(refusal) = welcome.and_then(|w| w.refuses(&request.filter)) {
                        self.refuse(shared, request, refusal);
                        continue;
                    }
                    shared.at_broker.insert(request.filter.clone());
                    session.subscribe(request, out);
                }
                Some(Control::Unsubscribe(filter)) => session.unsubscribe(filter, out),
                None => break,
            }
        }
        while out.len() < WRITE_AHEAD && session.can_publish() {
            let Some(Waiting {
                mut publish,
                waiter,
            }) = shared.outbox.pop_front()
            else {
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
        shared.closing && shared.outbox.is_empty() && shared.control.is_empty() && session.is_idle()
    }

    /// Who gets a message.
    pub(super) fn audience(&self, publish: &InboundPublish, topic: &str) -> Audience {
        let mut shared = self.lock();
        match self.options.protocol {
            Protocol::V4 => shared.topics.audience(topic),
            Protocol::V5 => {
                let ids = &publish.subscription_ids;
                shared.table.audience(topic, publish.retain, ids)
            }
        }
    }

    /// Whether subscriptions wait to be restored.
    pub(super) fn restoring(&self) -> bool {
        self.lock().restores > 0
    }

    /// Filters subscribed at this member.
    pub(super) fn filters(&self) -> usize {
        let shared = self.lock();
        shared.table.len() + shared.topics.len()
    }
}

impl Shared {
    /// Whether a SUBSCRIBE is still of use: its caller waits, or, where it restores,
    /// somebody is subscribed.
    fn wants(&self, request: &SubscribeRequest) -> bool {
        match request.waiter {
            Some(_) => !request.is_abandoned(),
            None => self.table.contains(&request.filter) || self.topics.holds(&request.filter),
        }
    }

    /// Whether anybody relies on this filter.
    fn holds(&self, filter: &str) -> bool {
        self.table.contains(filter) || self.topics.holds(filter)
    }

    /// Nobody relies on this filter any more. Where the broker was never asked there is
    /// nothing to take back.
    fn forget(&mut self, filter: Arc<str>) {
        self.unwelcome.remove(&filter);
        if !self.at_broker.remove(&filter) {
            return;
        }
        self.released.push_back(filter.clone());
        if self.released.len() > MAX_RELEASED {
            self.released.pop_front();
        }
        self.ask(Control::Unsubscribe(filter));
    }

    fn ask(&mut self, control: Control) {
        if let Control::Subscribe(request) = &control {
            self.unwelcome.remove(&request.filter);
        }
        self.control.push_back(control);
        if self.control.len() >= self.tidy_at {
            let control = std::mem::take(&mut self.control);
            let useful = |control: &Control| match control {
                Control::Subscribe(request) => self.wants(request),
                Control::Unsubscribe(_) => true,
            };
            self.control = control.into_iter().filter(useful).collect();
            let restores = |control: &&Control| matches!(control, Control::Subscribe(request) if request.waiter.is_none());
            self.restores = self.control.iter().filter(restores).count();
            self.tidy_at = TIDY_AT.max(2 * self.control.len());
        }
    }

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
