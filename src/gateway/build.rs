//! What the configuration's listeners become: bound sockets first, all of them, then
//! what serves them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{BindError, Error, Pools};
use crate::admission::Admission;
use crate::config::{Config, Kind, ListenerView};
use crate::connection::{ListenerContext, Registry, Settings};
use crate::listener::{StreamListener, Tls};
use crate::metrics::{ListenerMetrics, Metrics};
use crate::options::{self, Sending};
use crate::reload::{Current, Watch};
use crate::shard::Shard;
use crate::transport::tcp::Acceptor;

/// Every socket that listens.
pub(super) struct Sockets<'a> {
    /// Of the listeners that are enabled.
    pub devices: Vec<(ListenerView<'a>, Bound)>,
    pub adapter: TcpListener,
    pub admin: Option<TcpListener>,
}

/// The sockets of one listener.
pub(super) enum Bound {
    Stream(Acceptor),
}

impl Bound {
    fn new(config: &Config, listener: &ListenerView<'_>, _shards: usize) -> io::Result<Self> {
        let listeners = &config.listeners;
        let tcp = match listener.kind {
            Kind::Tcp => listeners.tcp.get(listener.name).map(|l| &l.tcp_options),
            Kind::Ssl => listeners.ssl.get(listener.name).map(|l| &l.tcp_options),
            Kind::Udp | Kind::Dtls => None,
        };
        let Some(tcp) = tcp else {
            return Err(io::Error::other("not available"));
        };
        Acceptor::bind(listener.bind, &options::tcp(tcp)).map(Self::Stream)
    }

    /// The address, with the real port where 0 was asked for.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Stream(acceptor) => acceptor.local_addr(),
        }
    }
}

impl<'a> Sockets<'a> {
    /// Binds them all, and names all that cannot be bound, not only the first.
    pub async fn bind(config: &'a Config, shards: usize) -> Result<Self, Error> {
        let mut errors = Vec::new();
        let mut note = |key: String, address, error| {
            errors.push(BindError {
                key,
                address,
                error,
            });
        };
        let mut devices = Vec::new();
        for listener in config.listeners.enabled() {
            match Bound::new(config, &listener, shards) {
                Ok(bound) => devices.push((listener, bound)),
                Err(error) => note(format!("{}.bind", listener.key()), listener.bind, error),
            }
        }
        let adapter = TcpListener::bind(config.server.bind).await;
        let adapter = adapter
            .map_err(|error| note("server.bind".to_owned(), config.server.bind, error))
            .ok();
        let mut admin = None;
        if let Some(address) = config.admin.bind {
            match TcpListener::bind(address).await {
                Ok(listener) => admin = Some(listener),
                Err(error) => note("admin.bind".to_owned(), address, error),
            }
        }
        match adapter {
            Some(adapter) if errors.is_empty() => Ok(Self {
                devices,
                adapter,
                admin,
            }),
            _ => Err(Error::Bind(errors)),
        }
    }
}

/// What listeners are made of.
pub(super) struct Build<'a> {
    pub config: &'a Config,
    pub shards: &'a [Shard],
    pub pools: &'a Pools,
    pub registry: &'a Arc<Registry>,
    pub metrics: &'a Metrics,
    pub draining: &'a CancellationToken,
    /// Ends what watches files.
    pub stop: &'a CancellationToken,
}

/// A listener that has not begun.
pub(super) enum Listener {
    Stream(StreamListener),
}

impl Listener {
    /// Lets peers in until `stop` is cancelled.
    pub fn start(self, shards: &[Shard], stop: &CancellationToken) {
        match self {
            Self::Stream(listener) => {
                tokio::spawn(listener.run(shards.to_vec(), stop.clone()));
            }
        }
    }
}

impl Build<'_> {
    /// What serves a listener's sockets.
    pub fn listener(&self, listener: &ListenerView<'_>, bound: Bound) -> Result<Listener, Error> {
        let metrics = ListenerMetrics::new(self.metrics, &listener.full_name());
        let listeners = &self.config.listeners;
        let missing = || options::Error::new(&listener.key(), "it is not configured");
        match bound {
            Bound::Stream(acceptor) => {
                let (tcp, proxy, ssl) = match listener.kind {
                    Kind::Ssl => {
                        let found = listeners.ssl.get(listener.name).ok_or_else(missing)?;
                        (&found.tcp_options, &found.proxy, Some(&found.ssl_options))
                    }
                    _ => {
                        let found = listeners.tcp.get(listener.name).ok_or_else(missing)?;
                        (&found.tcp_options, &found.proxy, None)
                    }
                };
                let settings = options::connection(self.config, listener, Sending::from(tcp));
                let tls = ssl
                    .map(|ssl| self.tls(listener, ssl, &metrics))
                    .transpose()?;
                Ok(Listener::Stream(StreamListener::new(
                    acceptor,
                    options::tcp(tcp),
                    tls,
                    Admission::new(options::admission(listener, Some(proxy))),
                    self.contexts(listener, &settings, &metrics),
                    metrics,
                )))
            }
        }
    }

    /// One for each shard.
    fn contexts(
        &self,
        listener: &ListenerView<'_>,
        settings: &Settings,
        metrics: &ListenerMetrics,
    ) -> Vec<Arc<ListenerContext>> {
        let handler: &str = &listener.common.handler;
        let pools = self.pools.get(handler).into_iter().flatten();
        let context = |(shard, pool): (&Shard, &Arc<_>)| {
            Arc::new(ListenerContext {
                name: listener.full_name(),
                shard: shard.id(),
                settings: settings.clone(),
                handlers: Arc::clone(pool) as Arc<_>,
                registry: self.registry.clone(),
                metrics: metrics.clone(),
                draining: self.draining.clone(),
            })
        };
        self.shards.iter().zip(pools).map(context).collect()
    }

    fn tls(
        &self,
        listener: &ListenerView<'_>,
        options: &crate::config::SslOptions,
        metrics: &ListenerMetrics,
    ) -> Result<Tls, Error> {
        let (key, owned) = (listener.key(), options.clone());
        let make = move || options::ssl(&key, &owned);
        Ok(Tls {
            config: self.watched(listener, options::ssl_files(options), make, metrics)?,
            handshake_timeout: options.handshake_timeout,
            handshakes: Semaphore::new(options.max_handshakes.min(Semaphore::MAX_PERMITS)),
        })
    }

    /// A value made from files, and made again when they change.
    fn watched<T: Send + Sync + 'static>(
        &self,
        listener: &ListenerView<'_>,
        files: Vec<PathBuf>,
        make: impl Fn() -> Result<Arc<T>, options::Error> + Send + 'static,
        metrics: &ListenerMetrics,
    ) -> Result<Arc<Current<T>>, options::Error> {
        let watch = Watch::new(files);
        let current = Current::new(make()?);
        let (name, metrics) = (listener.full_name(), metrics.clone());
        let told = move |result: Result<(), options::Error>| match result {
            Ok(()) => {
                metrics.reloaded("ok");
                tracing::info!(listener = name, "the changed files are in use");
            }
            Err(error) => {
                metrics.reloaded("failed");
                tracing::error!(listener = name, %error, "the changed files are of no use; the old ones stay");
            }
        };
        tokio::spawn(watch.run(current.clone(), make, told, self.stop.clone()));
        Ok(current)
    }
}
