//! The subscriptions of one pool member, and what is to be said to the broker about them:
//! requests that wait to be sent, and what a new connection has to be told again.
//!
//! No IO and no lock of its own: it is a part of the [member](super::member).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::group::{Audience, Recipient, SubscriptionKey};
use super::session::{Session, SubscribeRequest};
use super::table::{Ask, Table};
use super::topic::TopicFilter;
use super::topics::{Answer, Topics};
use super::wire::{InboundPublish, Protocol, Welcome};
use super::{QoS, Refusal, Subscriber};
use crate::metrics::BrokerMetrics;

/// Requests that may wait before the void ones among them are thrown out. While the
/// broker is away callers give up and try again.
const TIDY_AT: usize = 1024;

/// Ended subscriptions that are ended once more when a session is continued. Brokers
/// save sessions every now and then, and so many end meanwhile at the most.
const MAX_RELEASED: usize = 1024;

/// First and longest pause before a subscription that the broker would not restore is
/// asked for again. What decides about permission may come up later than the broker.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The same for one upon which the broker hangs up, for it costs everybody broken links.
const RETRY_UNWELCOME: (Duration, Duration) =
    (Duration::from_secs(600), Duration::from_secs(24 * 3600));

/// A subscription upon which the broker hangs up when it is restored.
struct Unwelcome {
    /// Not asked for until then.
    until: Instant,
    pause: Duration,
}

enum Request {
    Subscribe(SubscribeRequest),
    Unsubscribe(Arc<str>),
}

impl Request {
    /// Whether it brings back a subscription that was there.
    fn restores(&self) -> bool {
        matches!(self, Self::Subscribe(request) if request.waiter.is_none())
    }
}

/// See the module.
pub(super) struct Filters {
    protocol: Protocol,
    metrics: BrokerMetrics,
    /// The subscriptions with MQTT 5.
    table: Table,
    /// The subscriptions with MQTT 3.1.1; one of the two stays empty.
    topics: Topics,
    waiting: VecDeque<Request>,
    /// When `waiting` is long enough to be looked through for what is void.
    tidy_at: usize,
    /// How many of them restore a subscription.
    restores: usize,
    /// Filters that the broker was asked for and not yet told to forget.
    at_broker: HashSet<Arc<str>>,
    /// Those that it was told to forget last, at most [`MAX_RELEASED`]: a session that it
    /// saved before may still have them.
    released: VecDeque<Arc<str>>,
    /// Those that it hangs up upon when they are restored.
    unwelcome: HashMap<Arc<str>, Unwelcome>,
    /// Those that it refused to restore, and the gauge counts.
    missing: HashSet<Arc<str>>,
    /// When they are asked for again, unless the broker's answers are still to come.
    retry_at: Option<Instant>,
    retry_pause: Duration,
}

impl Filters {
    pub(super) fn new(protocol: Protocol, metrics: BrokerMetrics) -> std::io::Result<Self> {
        let mut seed = [0; 4];
        getrandom::fill(&mut seed).map_err(std::io::Error::from)?;
        Ok(Self {
            protocol,
            metrics,
            table: Table::new(u32::from_be_bytes(seed)),
            topics: Topics::default(),
            waiting: VecDeque::new(),
            tidy_at: TIDY_AT,
            restores: 0,
            at_broker: HashSet::new(),
            released: VecDeque::new(),
            unwelcome: HashMap::new(),
            missing: HashSet::new(),
            retry_at: None,
            retry_pause: RETRY.0,
        })
    }

    /// Filters subscribed at the broker, or to be.
    pub(super) fn len(&self) -> usize {
        self.table.len() + self.topics.len()
    }

    /// Whether nothing waits to be sent.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether subscriptions wait to be restored.
    pub(super) fn restoring(&self) -> bool {
        self.restores > 0
    }

    /// Adds a subscriber in the place of `replaced`; the key is for [`Filters::remove`].
    pub(super) fn add(
        &mut self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
        waiter: oneshot::Sender<Result<QoS, Refusal>>,
    ) -> SubscriptionKey {
        let (key, ask) = self.table.add(filter, qos, subscriber, replaced);
        self.wait(Request::Subscribe(ask.asked_by(Some(waiter))));
        key
    }

    /// Takes a subscriber away; harmless when it is gone already.
    pub(super) fn remove(&mut self, filter: &TopicFilter, key: SubscriptionKey) {
        if let Some(filter) = self.table.remove(filter, key) {
            self.forget(filter);
        }
    }

    /// With MQTT 3.1.1: adds a subscriber, whose messages come through `held`. The broker
    /// may not have what it had (`in_doubt`) while its link is not up.
    pub(super) fn join(
        &mut self,
        filter: &TopicFilter,
        held: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
        in_doubt: bool,
    ) -> (SubscriptionKey, Answer) {
        let in_doubt = in_doubt || self.restoring();
        let topics = &mut self.topics;
        let (key, answer, question) = topics.add(filter, held, qos, subscriber, replaced, in_doubt);
        if let Some((ask, waiter)) = question {
            self.wait(Request::Subscribe(ask.asked_by(Some(waiter))));
        }
        (key, answer)
    }

    /// With MQTT 3.1.1: takes a subscriber away, and `released` at the broker if
    /// nothing relies on it any more.
    pub(super) fn leave(
        &mut self,
        filter: &TopicFilter,
        key: SubscriptionKey,
        released: Option<&TopicFilter>,
    ) {
        self.topics.remove(filter, key);
        if let Some(name) = released.and_then(|held| self.topics.release(held)) {
            self.forget(name);
        }
    }

    /// With MQTT 3.1.1: one subscriber, if it is still there.
    pub(super) fn subscriber(
        &self,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Option<Recipient> {
        self.topics.get(filter, key)
    }

    /// Who gets a message.
    pub(super) fn audience(&mut self, publish: &InboundPublish, topic: &str) -> Audience {
        match self.protocol {
            Protocol::V4 => self.topics.audience(topic),
            Protocol::V5 => {
                let ids = &publish.subscription_ids;
                self.table.audience(topic, publish.retain, ids)
            }
        }
    }

    /// A CONNACK came. Everything is subscribed again, before anything that waits: also
    /// where the broker has a session of ours, which may be one that it saved long ago.
    pub(super) fn welcomed(&mut self, welcome: &Welcome, now: Instant) {
        if !welcome.session_present {
            self.at_broker.clear();
        }
        let waiting = std::mem::take(&mut self.waiting);
        let mut restore = self.table.restore(!welcome.session_present, now);
        restore.append(&mut self.topics.restore());
        restore.retain(|ask| self.barred(&ask.filter, now).is_none());
        self.restores = restore.len();
        (self.retry_at, self.retry_pause) = (None, RETRY.0);
        // What is asked for again now is not missing until it is refused again.
        let mut missing = std::mem::take(&mut self.missing);
        let before = missing.len();
        missing.retain(|filter| self.barred(filter, now).is_some());
        self.metrics
            .missing
            .decrement((before - missing.len()) as f64);
        self.missing = missing;
        self.wait_for_barred(now);
        // First what nobody wants any more: beside a filter that overlaps with it a
        // message would come twice. In a new session there is nothing to end; the one
        // that is there may be older than what was ended lately.
        if welcome.session_present {
            let asked = waiting.iter().filter_map(|request| match request {
                Request::Unsubscribe(filter) => Some(filter),
                Request::Subscribe(_) => None,
            });
            let ended: HashSet<_> = asked.chain(&self.released).cloned().collect();
            let gone = ended.into_iter().filter(|name| !self.holds(name));
            let unsubscribe: Vec<_> = gone.map(Request::Unsubscribe).collect();
            self.waiting.extend(unsubscribe);
        }
        let restore = restore.into_iter().map(|ask| ask.asked_by(None));
        self.waiting.extend(restore.map(Request::Subscribe));
        // Those whose callers have left have taken the subscription back.
        let waiting = waiting.into_iter().filter(|request| match request {
            Request::Subscribe(request) => request.waiter.is_some() && !request.is_abandoned(),
            Request::Unsubscribe(_) => false,
        });
        self.waiting.extend(waiting);
    }

    /// Moves requests into the session, as far as it takes any and `out` has no more than
    /// `ahead` bytes.
    pub(super) fn pull(
        &mut self,
        session: &mut Session,
        welcome: Option<&Welcome>,
        out: &mut BytesMut,
        ahead: usize,
    ) {
        if let Some(wanted) = session.restores_alone() {
            let Some(filter) = wanted else {
                return;
            };
            let is_it = |request: &Request| matches!(request, Request::Subscribe(r) if r.waiter.is_none() && r.filter == *filter);
            let place = self.waiting.iter().position(is_it);
            match place.and_then(|place| self.waiting.remove(place)) {
                Some(Request::Subscribe(request)) if self.wants(&request) => {
                    self.restores -= 1;
                    self.at_broker.insert(request.filter.clone());
                    session.restore_alone(request, out);
                    return;
                }
                // Nobody wants it any more.
                Some(_) => self.restores -= 1,
                None => {}
            }
            session.acquit(out);
        }
        while session.can_subscribe() && out.len() < ahead {
            let request = match self.waiting.pop_front() {
                None => return,
                Some(Request::Unsubscribe(filter)) => {
                    session.unsubscribe(filter, out);
                    continue;
                }
                Some(Request::Subscribe(request)) => request,
            };
            self.restores -= usize::from(request.waiter.is_none());
            if !self.wants(&request) {
                continue;
            }
            if let Some(refusal) = welcome.and_then(|welcome| welcome.refuses(&request.filter)) {
                match request.waiter {
                    // The caller may have left, and taken it back.
                    Some(waiter) => drop(waiter.send(Err(refusal))),
                    None => self.lose(&request.filter, &refusal),
                }
                continue;
            }
            self.at_broker.insert(request.filter.clone());
            session.subscribe(request, out);
        }
    }

    /// The broker accepted a SUBSCRIBE: identifiers before it are of the past.
    pub(super) fn accepted(&mut self, filter: &str, id: u32, now: Instant) {
        self.table.confirm(filter, id, now);
        self.unwelcome.remove(filter);
        if self.found(filter) {
            self.topics.restored(filter);
            tracing::info!(filter, "a subscription is restored after all");
        }
    }

    /// A SUBSCRIBE did not get through and is sent again if it is still of use: with the
    /// QoS of now, for others may have asked meanwhile.
    pub(super) fn subscribe_again(&mut self, mut request: SubscribeRequest) {
        if self.wants(&request) {
            let wanted = self.table.qos(&request.filter);
            let wanted = wanted.or_else(|| self.topics.qos(&request.filter));
            request.qos = wanted.unwrap_or(request.qos);
            self.restores += usize::from(request.waiter.is_none());
            self.waiting.push_front(Request::Subscribe(request));
        }
    }

    /// An UNSUBSCRIBE did not get through and is sent again unless somebody has
    /// subscribed meanwhile.
    pub(super) fn unsubscribe_again(&mut self, filter: Arc<str>) {
        if !self.holds(&filter) {
            self.wait(Request::Unsubscribe(filter));
        }
    }

    /// The broker refused to restore a subscription: it is asked again later.
    pub(super) fn not_restored(&mut self, filter: &Arc<str>, refusal: &Refusal, now: Instant) {
        if self.holds(filter) {
            self.lose(filter, refusal);
            self.retry_by(now + self.retry_pause);
        }
    }

    /// The broker hangs up whenever it is asked to restore this one: it is asked no more
    /// for long, or until somebody subscribes anew.
    pub(super) fn is_unwelcome(&mut self, filter: Arc<str>, refusal: &Refusal, now: Instant) {
        if !self.holds(&filter) {
            return;
        }
        self.lose(&filter, refusal);
        let (first, longest) = RETRY_UNWELCOME;
        let before = self.unwelcome.get(&filter).map(|one| one.pause * 2);
        let pause = before.unwrap_or(first).min(longest);
        let until = now + pause;
        self.unwelcome.insert(filter, Unwelcome { until, pause });
        self.retry_by(until);
    }

    /// Until when a filter is not to be asked for.
    fn barred(&self, filter: &str, now: Instant) -> Option<Instant> {
        let until = self.unwelcome.get(filter)?.until;
        (now < until).then_some(until)
    }

    fn retry_by(&mut self, at: Instant) {
        self.retry_at = Some(self.retry_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn wait_for_barred(&mut self, now: Instant) {
        let missing = self.missing.iter();
        if let Some(at) = missing.filter_map(|name| self.barred(name, now)).min() {
            self.retry_by(at);
        }
    }

    /// When to call [`Filters::retry`], if at all.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Asks again for what the broker would not restore, when it is time; true if there is
    /// anything to send.
    pub(super) fn retry(&mut self, now: Instant) -> bool {
        if self.retry_at.is_none_or(|at| now < at) {
            return false;
        }
        self.retry_at = None;
        self.retry_pause = (self.retry_pause * 2).min(RETRY.1);
        let again: Vec<Ask> = self
            .missing
            .iter()
            .filter(|filter| self.barred(filter, now).is_none())
            .filter_map(|name| self.table.again(name).or_else(|| self.topics.again(name)))
            .collect();
        self.restores += again.len();
        let requests = again.into_iter().map(|ask| ask.asked_by(None));
        self.waiting.extend(requests.map(Request::Subscribe));
        self.wait_for_barred(now);
        true
    }

    fn lose(&mut self, filter: &Arc<str>, refusal: &Refusal) {
        self.topics.not_restored(filter);
        if self.missing.insert(filter.clone()) {
            self.metrics.not_restored.increment(1);
            self.metrics.missing.increment(1.0);
            tracing::error!(%filter, %refusal, "a subscription could not be restored");
        }
    }

    /// Whether the filter was missing, which it is no more.
    fn found(&mut self, filter: &str) -> bool {
        let was_missing = self.missing.remove(filter);
        if was_missing {
            self.metrics.missing.decrement(1.0);
        }
        was_missing
    }

    /// Whether a SUBSCRIBE is still of use: its caller waits, or, where it restores,
    /// somebody is subscribed.
    fn wants(&self, request: &SubscribeRequest) -> bool {
        match request.waiter {
            Some(_) => !request.is_abandoned(),
            None => self.holds(&request.filter),
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
        self.found(&filter);
        if !self.at_broker.remove(&filter) {
            return;
        }
        self.released.push_back(filter.clone());
        if self.released.len() > MAX_RELEASED {
            self.released.pop_front();
        }
        self.wait(Request::Unsubscribe(filter));
    }

    fn wait(&mut self, request: Request) {
        if let Request::Subscribe(request) = &request {
            self.unwelcome.remove(&request.filter);
        }
        self.waiting.push_back(request);
        if self.waiting.len() >= self.tidy_at {
            let waiting = std::mem::take(&mut self.waiting);
            let useful = |request: &Request| match request {
                Request::Subscribe(request) => self.wants(request),
                Request::Unsubscribe(_) => true,
            };
            self.waiting = waiting.into_iter().filter(useful).collect();
            self.restores = self.waiting.iter().filter(|r| r.restores()).count();
            self.tidy_at = TIDY_AT.max(2 * self.waiting.len());
        }
    }
}

impl Ask {
    /// As a request; of nobody's where a lost subscription is restored.
    fn asked_by(self, waiter: Option<oneshot::Sender<Result<QoS, Refusal>>>) -> SubscribeRequest {
        SubscribeRequest {
            filter: self.filter,
            qos: self.qos,
            id: self.id,
            retained: self.retained,
            waiter,
        }
    }
}
