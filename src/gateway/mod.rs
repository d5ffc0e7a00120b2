//! The whole gateway: what is built once, what once for each shard, and the order
//! of start and of drain.
//!
//! ```text
//! control thread   accept loops, adapter's accept loop, admin
//! shard 0..n       connections, handler channels, adapter connections,
//!                  pool members i where i mod n is the shard
//! shared           registry (a lock for each shard), broker handle, metrics
//! ```

mod adapter;
mod build;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::adapter::Adapter;
use crate::admin::{self, Readiness, Status};
use crate::auth::Auth;
use crate::broker::{Broker, BrokerTasks, CutOff, LinkState, OwnSessions};
use crate::config::{AdapterBind, Config};
use crate::connection::command::{Commands, RawPublish};
use crate::connection::own::Own;
use crate::connection::{Registry, close_forsaken};
use crate::handler::client::Client;
use crate::handler::resolve::{Directory, Resolve, System};
use crate::id::{HandlerName, NodeTag, ShardId};
use crate::memory;
use crate::metrics::{AdapterMetrics, AuthMetrics, BrokerMetrics, HandlerMetrics, Metrics};
use crate::options;
use crate::shard::{Shard, ShardThread};
use build::{Build, Sockets};

/// How often histograms are tidied; what is recorded between waits in memory.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How often memory that is free is given back.
const TIDY: Duration = Duration::from_secs(15);

/// How often start-up looks whether everything is there.
const READY_POLL: Duration = Duration::from_millis(20);

/// Part of the time to drain that is kept for what the broker has to confirm.
const BROKER_RESERVE: Duration = Duration::from_secs(2);

/// Longest wait for answers to handlers after the last connection has ended.
const ADAPTER_GRACE: Duration = Duration::from_secs(1);

/// Why the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration names something that cannot be used.
    #[error(transparent)]
    Options(#[from] options::Error),
    /// Addresses cannot be bound.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Bind(Vec<BindError>),
    /// The system refuses a thread, a runtime or randomness.
    #[error("the system refuses what the gateway needs: {0}")]
    System(#[from] io::Error),
    /// DTLS cannot be set up.
    #[error("DTLS cannot be set up: {0}")]
    Dtls(#[from] crate::transport::dtls::Error),
    /// The metrics contradict each other.
    #[error("metrics cannot be set up: {0}")]
    Metrics(String),
    /// The compiled interface cannot be read.
    #[error("reflection cannot be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} ({key}): {error}")]
pub struct BindError {
    /// The configuration's key.
    pub key: String,
    /// The address.
    pub address: AdapterBind,
    /// The system's word.
    pub error: io::Error,
}

/// Where a running gateway can be reached, with real ports where 0 was asked for.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// Each listener, `<kind>.<name>`.
    pub listeners: BTreeMap<String, SocketAddr>,
    /// ConnectionAdapter.
    pub adapter: AdapterBind,
    /// The admin server.
    pub admin: Option<SocketAddr>,
}

/// What a drain left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut off.
    pub connections: usize,
    /// Publishes that the broker has not confirmed.
    pub publishes: usize,
}

/// A running gateway. Dropping it without [`Gateway::drain`] cuts everything off.
pub struct Gateway {
    addresses: Addresses,
    health: Arc<Health>,
    registry: Arc<Registry>,
    connections: TaskTracker,
    broker_tasks: BrokerTasks,
    own_sessions: Option<OwnSessions>,
    adapter_tasks: TaskTracker,
    stops: Stops,
    shutdown_timeout: Duration,
    shards: Vec<ShardThread>,
}

/// What ends what, in this order.
#[derive(Clone, Default)]
struct Stops {
    /// New connections.
    listeners: CancellationToken,
    /// The connections; nobody waits for an absent handler any more.
    draining: CancellationToken,
    /// The adapter, once no connection is left.
    adapter: CancellationToken,
    /// The admin server, last.
    admin: CancellationToken,
}

/// One handler as all shards see it.
struct HandlerHealth {
    name: String,
    clients: Vec<Arc<Client>>,
}

struct Health {
    /// Whether everything was there once.
    started: watch::Sender<bool>,
    draining: CancellationToken,
    broker: Broker,
    handlers: Vec<HandlerHealth>,
}

impl Health {
    /// The things outside of the gateway that it needs.
    fn needs(&self) -> Vec<Status> {
        let mut statuses = Vec::new();
        for (index, state) in self.broker.states().into_iter().enumerate() {
            let text = format!("broker link {index}: {state}");
            statuses.push(match state {
                LinkState::Up(_) => Status::good(text),
                LinkState::Connecting | LinkState::Down(_) => Status::missing(text),
            });
        }
        statuses.extend(self.handlers.iter().map(HandlerHealth::status));
        statuses
    }
}

impl Readiness for Health {
    fn statuses(&self) -> Vec<Status> {
        let mut statuses = self.needs();
        if self.draining.is_cancelled() {
            statuses.insert(0, Status::missing("draining"));
        } else if !*self.started.borrow() {
            statuses.insert(0, Status::missing("starting"));
        }
        statuses
    }
}

impl HandlerHealth {
    /// Good when every shard can tell new connections to one of the handler's addresses.
    fn status(&self) -> Status {
        let name = &self.name;
        let mut pools = self.clients.iter().map(|client| client.pool());
        match pools.find(|pool| !pool.is_open()) {
            // One address is enough; what the others lack is worth knowing.
            None => {
                let all = self.clients.iter().map(|client| client.pool().troubles());
                match all
                    .map(|troubles| troubles.join(", "))
                    .find(|t| !t.is_empty())
                {
                    None => Status::good(format!("handler {name}: connected")),
                    Some(troubles) => {
                        Status::good(format!("handler {name}: connected, but not {troubles}"))
                    }
                }
            }
            Some(away) => {
                let troubles = match away.troubles().join(", ") {
                    none if none.is_empty() => "not connected yet".to_owned(),
                    troubles => troubles,
                };
                Status::missing(format!("handler {name}: {troubles}"))
            }
        }
    }
}

impl Gateway {
    /// Builds and starts everything. Returns when all addresses are bound; whether
    /// the broker and the handlers are there is for [`Gateway::ready`] to say.
    pub async fn start(config: &Config) -> Result<Self, Error> {
        Self::start_and_tell(config, |_| ()).await
    }

    /// Like [`Gateway::start`]; calls `tell` once the broker and the handlers are
    /// there for the first time, before `/readyz` says so.
    pub async fn start_and_tell(
        config: &Config,
        tell: impl FnOnce(&Addresses) + Send + 'static,
    ) -> Result<Self, Error> {
        Self::start_resolving(config, Arc::new(System), tell).await
    }

    /// Like [`Gateway::start_and_tell`], with a resolver of host names other than the
    /// system's.
    pub async fn start_resolving(
        config: &Config,
        resolver: Arc<dyn Resolve>,
        tell: impl FnOnce(&Addresses) + Send + 'static,
    ) -> Result<Self, Error> {
        let metrics = Metrics::new().map_err(|error| Error::Metrics(error.to_string()))?;
        let broker_options = options::broker(config)?;
        let own_sessions = options::own_sessions(config)?;
        let stops = Stops::default();
        let auth = Auth::start(
            &options::auth(config)?,
            AuthMetrics::new(&metrics),
            &stops.admin,
        )
        .map_err(options::Error::from)?;
        // Every address is bound before anything else: a gateway that cannot start must
        // not have answered a device or taken over another one's sessions.
        let Sockets {
            devices,
            adapter: adapter_listener,
            admin: admin_listener,
        } = Sockets::bind(config, shards_of(config)).await?;
        let addresses = Addresses {
            listeners: devices
                .iter()
                .map(|(listener, bound)| Ok((listener.full_name(), bound.local_addr()?)))
                .collect::<io::Result<_>>()?,
            adapter: match adapter_listener.local_addr()? {
                Some(address) => AdapterBind::Tcp(address),
                None => config.server.bind.clone(),
            },
            admin: admin_listener
                .as_ref()
                .map(TcpListener::local_addr)
                .transpose()?,
        };

        let connections = TaskTracker::new();
        let (shards, shard_threads) = start_shards(config, &connections)?;
        let node = NodeTag::of(&config.node_name);
        let registry = Arc::new(Registry::new(node, shards.len()));
        let draining = &stops.draining;
        let clients = start_handlers(config, &shards, &metrics, draining, &resolver)?;
        watch_handlers(&clients, &shards, &registry);
        let runtimes: Vec<_> = shards.iter().map(|shard| shard.runtime().clone()).collect();
        let broker_metrics = BrokerMetrics::new(&metrics);
        let (broker, broker_tasks) = Broker::start(broker_options, &runtimes, &broker_metrics)?;
        let adapter_metrics = AdapterMetrics::new(&metrics);
        let own_sessions = own_sessions
            .map(|(options, max)| OwnSessions::new(options, max, &runtimes, &broker_metrics));
        let own = own_sessions.clone();
        let own = own.map(|sessions| Own::new(sessions, options::will(config)));
        let commands = Commands::new(
            registry.clone(),
            broker.clone(),
            auth,
            own,
            match (config.raw_publish, config.authorization.check_raw_publish) {
                (false, _) => RawPublish::Off,
                (true, false) => RawPublish::On,
                (true, true) => RawPublish::Checked,
            },
            adapter_metrics.foreign.clone(),
        );
        let adapter = Adapter::new(
            commands,
            options::adapter(config),
            adapter::follow_tls(config, &adapter_metrics, &stops.admin)?,
            adapter::follow_tokens(config, &adapter_metrics, &stops.admin)?,
            adapter_metrics.clone(),
        )?;
        adapter.tell_health(false).await;
        let build = Build {
            config,
            shards: &shards,
            clients: &clients,
            registry: &registry,
            metrics: &metrics,
            draining: &stops.draining,
            stop: &stops.listeners,
        };
        let listeners = devices
            .into_iter()
            .map(|(listener, bound)| build.listener(&listener, bound))
            .collect::<Result<Vec<_>, _>>()?;
        let health = Arc::new(Health {
            started: watch::Sender::new(false),
            draining: stops.draining.clone(),
            broker,
            handlers: clients
                .into_iter()
                .map(|(name, clients)| HandlerHealth { name, clients })
                .collect(),
        });
        tokio::spawn(announce(health.clone(), addresses.clone(), tell));

        let mut started = health.started.subscribe();
        let ready = async move {
            // A sender that is gone is a gateway that has ended.
            let _ = started.wait_for(|started| *started).await;
        };
        let (draining, stop) = (stops.draining.clone(), stops.adapter.clone());
        tokio::spawn(adapter.clone().keep_health(ready, draining, stop));
        let adapter_tasks = TaskTracker::new();
        let accept = adapter::accept(
            adapter_listener,
            adapter,
            adapter::Bound {
                max_connections: config.server.max_connections,
                refused: adapter_metrics.max_connections,
            },
            shards.clone(),
            adapter_tasks.clone(),
            stops.adapter.clone(),
        );
        tokio::spawn(accept);
        for listener in listeners {
            listener.start(&shards, &stops.listeners, &stops.adapter)?;
        }
        if let Some(listener) = admin_listener {
            let handle = metrics.handle();
            let stop = stops.admin.clone();
            tokio::spawn(admin::serve(listener, health.clone(), handle, stop));
        }
        tokio::spawn(upkeep(metrics, stops.admin.clone()));
        Ok(Self {
            addresses,
            health,
            registry,
            connections,
            broker_tasks,
            own_sessions,
            adapter_tasks,
            stops,
            shutdown_timeout: config.shutdown_timeout,
            shards: shard_threads,
        })
    }

    /// Where it can be reached.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Waits until the broker and every handler were connected once. Cancel safe.
    pub async fn ready(&self) {
        // The sender lives in `health`, so this cannot fail.
        let _ = self
            .health
            .started
            .subscribe()
            .wait_for(|ready| *ready)
            .await;
    }

    /// What the gateway needs and has not got, one line each.
    pub fn missing(&self) -> Vec<String> {
        let needs = self.health.needs().into_iter();
        needs.filter(|s| !s.is_good).map(|s| s.text).collect()
    }

    /// Number of open connections.
    pub fn connections(&self) -> usize {
        self.registry.len()
    }

    /// Stops in order: no new connections, OnSocketClosed (`shutdown`) for every
    /// one, what the broker was promised, then the rest. Takes at most
    /// `shutdown_timeout` and a second.
    pub async fn drain(self) -> Drained {
        let deadline = Instant::now() + self.shutdown_timeout;
        self.stops.listeners.cancel();
        // Told first, so that a callback that gives up waiting for its handler ends in
        // `shutdown`; and again for connections that were just being set up.
        self.registry.drain_all();
        self.stops.draining.cancel();
        self.registry.drain_all();
        self.connections.close();
        // A connection that was being set up meanwhile sees the token by itself.
        // The broker must have some of the time, whatever the devices take.
        let reserve = BROKER_RESERVE.min(self.shutdown_timeout / 4);
        let all = tokio::time::timeout_at(deadline - reserve, self.connections.wait()).await;
        let connections = if all.is_ok() { 0 } else { self.registry.len() };
        let cut_off = match &self.own_sessions {
            Some(own) => own.drain(deadline).await,
            None => CutOff::default(),
        };
        if cut_off.sessions > 0 {
            tracing::warn!(
                cut_off = cut_off.sessions,
                "devices' sessions at the broker were not ended in time"
            );
        }
        let publishes = cut_off.publishes + self.broker_tasks.drain(deadline).await;
        self.stops.adapter.cancel();
        self.adapter_tasks.close();
        // Handlers that keep their connection open are not waited for.
        let _ = tokio::time::timeout(ADAPTER_GRACE, self.adapter_tasks.wait()).await;
        self.stops.admin.cancel();
        drop(self.shards);
        Drained {
            connections,
            publishes,
        }
    }
}

/// Waits until everything is there, and says so.
async fn announce(health: Arc<Health>, addresses: Addresses, tell: impl FnOnce(&Addresses)) {
    while !health.draining.is_cancelled() {
        if health.needs().iter().all(|status| status.is_good) {
            tell(&addresses);
            health.started.send_replace(true);
            return;
        }
        tokio::time::sleep(READY_POLL).await;
    }
}

/// How many shards there are to be.
fn shards_of(config: &Config) -> usize {
    match config.shards {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

fn start_shards(
    config: &Config,
    connections: &TaskTracker,
) -> Result<(Vec<Shard>, Vec<ShardThread>), Error> {
    let mut shards = Vec::new();
    let mut threads = Vec::new();
    for number in 0..u16::try_from(shards_of(config)).unwrap_or(u16::MAX) {
        let (shard, thread) = Shard::start(ShardId(number), connections.clone())?;
        shards.push(shard);
        threads.push(thread);
    }
    Ok((shards, threads))
}

/// Each handler's clients by name, one for each shard.
type Clients = BTreeMap<String, Vec<Arc<Client>>>;

fn start_handlers(
    config: &Config,
    shards: &[Shard],
    metrics: &Metrics,
    draining: &CancellationToken,
    resolver: &Arc<dyn Resolve>,
) -> Result<Clients, Error> {
    let mut all = Clients::new();
    for (name, handler) in options::used_handlers(config) {
        let key = options::handler_key(name);
        let metrics = HandlerMetrics::new(metrics, name);
        let targets = options::targets(&key, handler)?;
        let interval = handler.resolve_interval.finite();
        let directory = Directory::new(targets, resolver.clone(), interval);
        tokio::spawn(directory.clone().run());
        let mut clients = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            let client = Client::new(
                options::client(&key, handler, shards.len()),
                directory.clone(),
                metrics.clone(),
                draining.clone(),
                number,
            );
            let client = client.map_err(|error| options::Error::new(&key, error))?;
            let client = Arc::new(client);
            shard.runtime().spawn(client.clone().run());
            clients.push(client);
        }
        all.insert(name.to_owned(), clients);
    }
    Ok(all)
}

/// Closes connections whose handler is away, where that is configured.
fn watch_handlers(clients: &Clients, shards: &[Shard], registry: &Arc<Registry>) {
    for (name, clients) in clients {
        for (shard, client) in shards.iter().zip(clients) {
            let (registry, name) = (registry.clone(), HandlerName::new(name));
            let watching = close_forsaken(registry, shard.id(), name, client.clone());
            shard.runtime().spawn(watching);
        }
    }
}

async fn upkeep(metrics: Metrics, stop: CancellationToken) {
    let handle = metrics.handle();
    let mut ticks = tokio::time::interval(METRICS_UPKEEP);
    let mut tidies = tokio::time::interval(TIDY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => handle.run_upkeep(),
            _ = tidies.tick() => memory::tidy(),
        }
    }
}
