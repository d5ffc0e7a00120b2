//! The pool as the rest of the gateway sees it.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::fetch::{Fetcher, Newcomer};
use super::member::Member;
use super::plan::{NoRoom, Planner};
use super::topic::TopicFilter;
use super::wire::OutboundPublish;
use super::{
    LinkState, Options, Protocol, Publication, PublishError, QoS, SubscribeError, Subscriber,
    SubscriptionKey, link, now_ms,
};
use crate::id::MessageIds;
use crate::metrics::BrokerMetrics;
use crate::trace::{self, Traceparent};

/// Connections that MQTT 3.1.1 may need for filters that overlap, in all. Each
/// costs the broker a client; more than a few mean that something is amiss.
const MAX_MEMBERS: usize = 64;

/// The pool. Cheap to clone.
#[derive(Clone)]
pub struct Broker {
    pool: Arc<Pool>,
}

struct Pool {
    options: Arc<Options>,
    metrics: BrokerMetrics,
    /// The pool's own and, with MQTT 3.1.1, those that may be opened.
    members: Vec<Arc<Member>>,
    /// Publishes are spread over so many.
    spread: usize,
    hasher: RandomState,
    ids: MessageIds,
    /// With MQTT 3.1.1.
    overlaps: Option<Overlaps>,
    runtimes: Vec<Handle>,
    tasks: Mutex<Tasks>,
}

/// A user property of MQTT 5.
type Property<'a> = (&'a str, Cow<'a, str>);

#[derive(Default)]
struct Tasks {
    /// Members whose tasks were started, from the first on.
    started: usize,
    /// Their tasks, until the drain takes them.
    handles: Vec<JoinHandle<()>>,
}

/// What it takes where messages bear no identifiers.
struct Overlaps {
    /// Lock order: this one, then a member's.
    plan: Mutex<Planner>,
    fetcher: Fetcher,
}

/// The tasks behind a [`Broker`].
pub struct BrokerTasks {
    broker: Broker,
    stop_fetching: CancellationToken,
    fetching: Option<JoinHandle<()>>,
}

/// No code under one of the locks can leave its data half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Broker {
    /// Whether a client id is one of the gateway's own: one of its connections', or of those that
    /// may be opened.
    pub fn owns(&self, client_id: &str) -> bool {
        let rest = client_id.strip_prefix(&*self.pool.options.client_id);
        let number = rest.and_then(|rest| rest.strip_prefix('-'));
        number.is_some_and(|n| n == "retained" || n.parse::<usize>().is_ok())
    }

    /// Starts the pool; member `i` runs on runtime `i mod runtimes`.
    ///
    /// A broker that is down is waited for: [`Broker::states`] tells.
    ///
    /// # Errors
    /// Fails only where the system has no randomness for message ids.
    pub fn start(
        options: Options,
        runtimes: &[Handle],
        metrics: &BrokerMetrics,
    ) -> std::io::Result<(Self, BrokerTasks)> {
        let options = Arc::new(options);
        let spread = options.pool_size.max(1);
        let stop_fetching = CancellationToken::new();
        let (overlaps, most, fetching) = match options.protocol {
            Protocol::V5 => (None, spread, None),
            Protocol::V4 => {
                let most = spread.max(MAX_MEMBERS);
                let plan = Mutex::new(Planner::new(spread, most));
                let stop = stop_fetching.clone();
                let (fetcher, task) = Fetcher::new(options.clone(), metrics.clone(), stop)?;
                let fetching = runtimes.first().map(|runtime| runtime.spawn(task));
                (Some(Overlaps { plan, fetcher }), most, fetching)
            }
        };
        let member = |number| {
            let client_id = format!("{}-{number}", options.client_id);
            Member::new(number, client_id, options.clone(), metrics.clone())
        };
        let members = (0..most).map(member).collect::<Result<Vec<_>, _>>()?;
        let pool = Arc::new(Pool {
            options: options.clone(),
            metrics: metrics.clone(),
            members,
            spread,
            hasher: RandomState::new(),
            ids: MessageIds::new()?,
            overlaps,
            runtimes: runtimes.to_vec(),
            tasks: Mutex::default(),
        });
        pool.open(spread);
        let broker = Self { pool };
        let tasks = BrokerTasks {
            broker: broker.clone(),
            stop_fetching,
            fetching,
        };
        Ok((broker, tasks))
    }

    /// A pool of one member, whose task is started elsewhere.
    ///
    /// # Errors
    /// Fails only where the system has no randomness for message ids.
    pub(super) fn of_one(
        member: Arc<Member>,
        options: Arc<Options>,
        metrics: BrokerMetrics,
    ) -> std::io::Result<Self> {
        Ok(Self {
            pool: Arc::new(Pool {
                options,
                metrics,
                members: vec![member],
                spread: 1,
                hasher: RandomState::new(),
                ids: MessageIds::new()?,
                overlaps: None,
                runtimes: Vec::new(),
                tasks: Mutex::default(),
            }),
        })
    }

    /// Publishes a message and waits for its confirmation: QoS 0 until it is
    /// written towards the broker, QoS 1 until PUBACK, QoS 2 until PUBCOMP.
    /// Publishes of one `route` keep their order.
    ///
    /// Cancel safe: a message that was not sent yet is withdrawn, one that was
    /// sent goes its way.
    pub async fn publish(&self, route: u64, message: Publication) -> Result<(), PublishError> {
        let pool = &*self.pool;
        let member = pool.spread(route).ok_or(PublishError::Stopped)?;
        let protocol = pool.options.protocol;
        let properties = match protocol {
            Protocol::V4 => [const { None }; 4],
            Protocol::V5 => pool.properties(message.from.as_deref(), message.trace),
        };
        let properties = properties.iter().flatten();
        let publish = OutboundPublish::new(
            protocol,
            message.topic.as_str(),
            message.qos,
            message.payload,
            properties.map(|(name, value)| (*name, &**value)),
        );
        let confirmed = member.publish(publish)?;
        let limit = pool.options.publish_timeout;
        match timeout(limit, confirmed).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(PublishError::Stopped),
            Err(_) => {
                member.count_timeout();
                Err(PublishError::TimedOut(limit, member.state().to_string()))
            }
        }
    }

    /// Subscribes and waits for the SUBACK; with MQTT 3.1.1 it may be the one of a
    /// filter that covers this one. The subscription ends when what is returned is
    /// dropped. It takes the place of `replaced`, one to the same filter, so that no
    /// message is missed or comes twice.
    ///
    /// Messages may be delivered before this returns (MQTT 5, 3.8.4), retained ones
    /// also after. Cancel safe: nothing stays subscribed.
    pub async fn subscribe(
        &self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> Result<Subscription, SubscribeError> {
        match &self.pool.overlaps {
            None => self.ask(filter, qos, subscriber, replaced).await,
            Some(overlaps) => self.join(overlaps, filter, qos, subscriber, replaced).await,
        }
    }

    /// Each subscriber's SUBSCRIBE goes to the broker.
    async fn ask(
        &self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> Result<Subscription, SubscribeError> {
        let hash = self.pool.hasher.hash_one(filter.as_str());
        let member = self.pool.spread(hash).ok_or(SubscribeError::Stopped)?;
        let (answered, answer) = oneshot::channel();
        let key = member.subscribe(filter, qos, subscriber, replaced, answered);
        let key = key.ok_or(SubscribeError::Stopped)?;
        // From here on, leaving in any way takes the subscription back.
        let subscription = self.subscription(member, filter, key);
        let limit = self.pool.options.publish_timeout;
        match timeout(limit, answer).await {
            Ok(Ok(Ok(_granted))) => Ok(subscription),
            Ok(Ok(Err(refusal))) => Err(SubscribeError::Refused(refusal)),
            Ok(Err(_)) => Err(SubscribeError::Stopped),
            Err(_) => Err(SubscribeError::TimedOut(limit, member.state().to_string())),
        }
    }

    /// The planner says whether the broker is to be asked, and through whom.
    async fn join(
        &self,
        overlaps: &Overlaps,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> Result<Subscription, SubscribeError> {
        let pool = &self.pool;
        let limit = pool.options.publish_timeout;
        let deadline = Instant::now() + limit;
        let (subscription, answer) = {
            if pool.members.iter().any(|member| member.is_closing()) {
                return Err(SubscribeError::Stopped);
            }
            // Held until the member has it too: both must see all changes in one order.
            let mut plan = lock(&overlaps.plan);
            let planned = plan.add(filter).map_err(|NoRoom| {
                pool.metrics.overlaps_refused.increment(1);
                SubscribeError::Overlaps(pool.members.len())
            })?;
            pool.open(plan.open());
            let member = pool.members.get(planned.member);
            let member = member.ok_or(SubscribeError::Stopped)?;
            let (key, answer) = member.join(filter, &planned.held, qos, subscriber, replaced);
            (self.subscription(member, filter, key), answer)
        };
        let member = &subscription.member;
        match timeout_at(deadline, answer).await {
            Ok(Ok(Ok(_granted))) => {}
            Ok(Ok(Err(refusal))) => return Err(SubscribeError::Refused(refusal)),
            Ok(Err(_)) => return Err(SubscribeError::Stopped),
            Err(_) => return Err(SubscribeError::TimedOut(limit, member.state().to_string())),
        }
        // The members of a group do not get what is retained (MQTT 5, 4.8.2).
        if !filter.is_shared() {
            let newcomer = Newcomer {
                member: member.clone(),
                filter: filter.clone(),
                key: subscription.key,
                qos,
            };
            let fetcher = &overlaps.fetcher;
            let left = deadline.saturating_duration_since(Instant::now());
            if !fetcher.fetch(newcomer, left).await {
                let state = fetcher.state().to_string();
                return Err(SubscribeError::NotFetched(limit, state));
            }
        }
        Ok(subscription)
    }

    fn subscription(
        &self,
        member: &Arc<Member>,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Subscription {
        Subscription {
            pool: self.pool.clone(),
            member: member.clone(),
            filter: filter.clone(),
            key,
        }
    }

    /// The state of each link, in order.
    pub fn states(&self) -> Vec<LinkState> {
        let open = self.pool.open_members();
        let mut states: Vec<_> = open.iter().map(|member| member.state()).collect();
        let overlaps = self.pool.overlaps.iter();
        states.extend(overlaps.map(|overlaps| overlaps.fetcher.state()));
        states
    }
}

impl Pool {
    /// What a publish tells of itself to other gateways, and all that it does: one that
    /// is sent again tells the same.
    fn properties<'a>(
        &'a self,
        from: Option<&'a str>,
        trace: Option<Traceparent>,
    ) -> [Option<Property<'a>>; 4] {
        let options = &*self.options;
        let from = options.from_property.as_deref().zip(from.map(Cow::from));
        let id = options.id_property.as_deref();
        let id = id.map(|name| (name, self.ids.next_id().text().into()));
        let timestamp = options.timestamp_property.as_deref();
        let timestamp = timestamp.map(|name| (name, now_ms().to_string().into()));
        let trace = trace.map(|trace| (trace::KEY, trace.to_string().into()));
        [from, id, timestamp, trace]
    }

    /// One of the members that work is spread over.
    fn spread(&self, number: u64) -> Option<&Arc<Member>> {
        let index = number % self.spread as u64;
        self.members.get(usize::try_from(index).ok()?)
    }

    /// Those whose tasks were started.
    fn open_members(&self) -> &[Arc<Member>] {
        let open = lock(&self.tasks).started;
        self.members.get(..open).unwrap_or_default()
    }

    /// Starts members' tasks until so many were started; none while stopping.
    fn open(&self, number: usize) {
        let mut tasks = lock(&self.tasks);
        let runtimes = self.runtimes.iter().cycle();
        let all = self.members.iter().zip(runtimes).take(number);
        for (member, runtime) in all.skip(tasks.started) {
            if member.is_closing() {
                return;
            }
            if tasks.started >= self.spread {
                tracing::info!(
                    client_id = member.client_id(),
                    "one more connection to the broker, for filters that overlap"
                );
            }
            tasks.started += 1;
            tasks.handles.push(runtime.spawn(link::run(member.clone())));
        }
    }
}

impl BrokerTasks {
    /// Sends and confirms what was accepted, ends the sessions, and stops; at
    /// `deadline` what is left fails. Says how many publishes were left.
    pub async fn drain(self, deadline: Instant) -> usize {
        let pool = &self.broker.pool;
        self.stop_fetching.cancel();
        for member in &pool.members {
            member.close();
        }
        let tasks = std::mem::take(&mut lock(&pool.tasks).handles);
        let mut left = 0;
        for (mut task, member) in tasks.into_iter().zip(&pool.members) {
            // A link that is down and owes nothing is not worth waiting for.
            let owes = member.state().is_up() || member.waiting() > 0;
            let limit = if owes { deadline } else { Instant::now() };
            if timeout_at(limit, &mut task).await.is_err() {
                task.abort();
                left += member.waiting();
            }
        }
        if let Some(mut fetching) = self.fetching
            && timeout_at(deadline, &mut fetching).await.is_err()
        {
            fetching.abort();
        }
        left
    }
}

/// A subscription; dropping it ends it.
pub struct Subscription {
    pool: Arc<Pool>,
    member: Arc<Member>,
    filter: TopicFilter,
    key: SubscriptionKey,
}

impl Subscription {
    /// Its name at its filter.
    pub fn key(&self) -> SubscriptionKey {
        self.key
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let Some(overlaps) = &self.pool.overlaps else {
            self.member.unsubscribe(&self.filter, self.key);
            return;
        };
        let mut plan = lock(&overlaps.plan);
        let released = plan.remove(&self.filter).map(|gone| gone.held);
        self.member.leave(&self.filter, self.key, released.as_ref());
    }
}
