//! What the configuration's listeners become: bound sockets first, all of them, then
//! what serves them.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::net::TcpListener as Acceptors;
use tokio_util::sync::CancellationToken;

use super::{BindError, Clients, Error};
use crate::adapter::socket;
use crate::admission::Admission;
use crate::admission::turns::Turns;
use crate::config::{
    AdapterBind, Config, DtlsListener, DtlsOptions, Kind, ListenerView, ProxyProtocol, SslListener,
    SslOptions, TcpListener, TcpOptions, UdpListener, UdpOptions,
};
use crate::connection::{ListenerContext, Registry, Settings};
use crate::handler::client::Client;
use crate::id::HandlerName;
use crate::listener::{DatagramListener, Dtls, Protocol, StreamListener, Tls};
use crate::metrics::{ListenerMetrics, Metrics};
use crate::options::{self, Sending};
use crate::reload::{Current, Watch};
use crate::shard::Shard;
use crate::telemetry::Seldom;
use crate::transport::tcp::Acceptor;
use crate::transport::udp;

/// Every socket that listens.
pub(super) struct Sockets<'a> {
    /// Of the listeners that are enabled.
    pub devices: Vec<(ListenerView<'a>, Bound)>,
    pub adapter: socket::Listener,
    pub admin: Option<Acceptors>,
}

/// The section of one listener.
enum Found<'a> {
    Tcp(&'a TcpListener),
    Ssl(&'a SslListener),
    Udp(&'a UdpListener),
    Dtls(&'a DtlsListener),
}

impl<'a> Found<'a> {
    fn new(config: &'a Config, listener: &ListenerView<'_>) -> Option<Self> {
        let (all, name) = (&config.listeners, listener.name);
        match listener.kind {
            Kind::Tcp => all.tcp.get(name).map(Self::Tcp),
            Kind::Ssl => all.ssl.get(name).map(Self::Ssl),
            Kind::Udp => all.udp.get(name).map(Self::Udp),
            Kind::Dtls => all.dtls.get(name).map(Self::Dtls),
        }
    }
}

/// The sockets of one listener.
pub(super) enum Bound {
    Stream(Acceptor),
    /// One for each shard.
    Datagram(Vec<UdpSocket>),
}

impl Bound {
    fn new(config: &Config, listener: &ListenerView<'_>, shards: usize) -> io::Result<Self> {
        let bind = listener.bind;
        match Found::new(config, listener) {
            Some(
                Found::Tcp(TcpListener { tcp_options, .. })
                | Found::Ssl(SslListener { tcp_options, .. }),
            ) => Acceptor::bind(bind, &options::tcp(tcp_options)).map(Self::Stream),
            Some(
                Found::Udp(UdpListener { udp_options, .. })
                | Found::Dtls(DtlsListener { udp_options, .. }),
            ) => udp::bind(bind, shards, &options::udp(udp_options)).map(Self::Datagram),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }

    /// The address, with the real port where 0 was asked for.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Stream(acceptor) => acceptor.local_addr(),
            Self::Datagram(sockets) => match sockets.first() {
                Some(socket) => socket.local_addr(),
                None => Err(io::Error::from(io::ErrorKind::NotFound)),
            },
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
                Err(error) => {
                    let address = AdapterBind::Tcp(listener.bind);
                    note(format!("{}.bind", listener.key()), address, error);
                }
            }
        }
        let adapter = match &config.server.bind {
            AdapterBind::Tcp(address) => socket::Listener::tcp(*address).await,
            AdapterBind::Unix(path) => {
                socket::Listener::unix(path, config.server.socket_mode.bits())
            }
        };
        let adapter = adapter
            .map_err(|error| note("server.bind".to_owned(), config.server.bind.clone(), error))
            .ok();
        let mut admin = None;
        if let Some(address) = config.admin.bind {
            match Acceptors::bind(address).await {
                Ok(listener) => admin = Some(listener),
                Err(error) => note("admin.bind".to_owned(), AdapterBind::Tcp(address), error),
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
    pub clients: &'a Clients,
    pub registry: &'a Arc<Registry>,
    pub metrics: &'a Metrics,
    pub draining: &'a CancellationToken,
    /// Ends what watches files.
    pub stop: &'a CancellationToken,
}

/// A listener that has not begun.
pub(super) enum Listener {
    Stream(StreamListener),
    Datagram(DatagramListener),
}

impl Listener {
    /// Lets peers in until `closed` is cancelled; what they share lasts until `stop` is.
    pub fn start(
        self,
        shards: &[Shard],
        closed: &CancellationToken,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        match self {
            Self::Stream(listener) => {
                tokio::spawn(listener.run(shards.to_vec(), closed.clone()));
            }
            Self::Datagram(listener) => listener.start(shards, closed, stop)?,
        }
        Ok(())
    }
}

impl Build<'_> {
    /// What serves a listener's sockets.
    pub fn listener(&self, listener: &ListenerView<'_>, bound: Bound) -> Result<Listener, Error> {
        let found = Found::new(self.config, listener);
        let metrics = ListenerMetrics::new(self.metrics, &listener.full_name());
        match (found, bound) {
            (Some(Found::Tcp(found)), Bound::Stream(acceptor)) => {
                let parts = (acceptor, None);
                Ok(self.stream(listener, parts, &found.tcp_options, &found.proxy, metrics))
            }
            (Some(Found::Ssl(found)), Bound::Stream(acceptor)) => {
                let tls = self.tls(listener, &found.ssl_options, &metrics)?;
                let parts = (acceptor, Some(tls));
                Ok(self.stream(listener, parts, &found.tcp_options, &found.proxy, metrics))
            }
            (Some(Found::Udp(found)), Bound::Datagram(sockets)) => {
                let check = &found.health_check;
                let copied = |text: &String| Bytes::copy_from_slice(text.as_bytes());
                let protocol = Protocol::Plain {
                    health_check: (!check.request.is_empty())
                        .then(|| (copied(&check.request), copied(&check.reply))),
                };
                let parts = (sockets, protocol);
                Ok(self.datagram(listener, parts, &found.udp_options, &metrics))
            }
            (Some(Found::Dtls(found)), Bound::Datagram(sockets)) => {
                let dtls = self.dtls(listener, &found.dtls_options, &metrics)?;
                let parts = (sockets, Protocol::Dtls(dtls));
                Ok(self.datagram(listener, parts, &found.udp_options, &metrics))
            }
            _ => Err(options::Error::new(&listener.key(), "it is not there").into()),
        }
    }

    fn stream(
        &self,
        listener: &ListenerView<'_>,
        (acceptor, tls): (Acceptor, Option<Tls>),
        tcp: &TcpOptions,
        proxy: &ProxyProtocol,
        metrics: ListenerMetrics,
    ) -> Listener {
        let settings = options::connection(self.config, listener, Sending::from(tcp));
        Listener::Stream(StreamListener::new(
            acceptor,
            options::tcp(tcp),
            tls,
            Admission::new(options::admission(listener, Some(proxy))),
            self.contexts(listener, &settings, &metrics),
            metrics,
        ))
    }

    fn datagram(
        &self,
        listener: &ListenerView<'_>,
        (sockets, protocol): (Vec<UdpSocket>, Protocol),
        udp: &UdpOptions,
        metrics: &ListenerMetrics,
    ) -> Listener {
        let settings = options::connection(self.config, listener, Sending::from(udp));
        let [received, sent, receive_errors] = metrics.datagrams();
        let dropped = |reason| metrics.datagrams_dropped(reason);
        Listener::Datagram(DatagramListener {
            sockets,
            options: options::udp(udp),
            counters: udp::Counters {
                received,
                sent,
                receive_errors,
                queue_full: dropped("queue_full"),
                queues_full: dropped("queues_full"),
                closed: dropped("closed"),
                draining: dropped("draining"),
                bad_address: dropped("bad_address"),
                too_large: dropped("too_large"),
                send_failed: dropped("send_failed"),
            },
            protocol,
            admission: Arc::new(Admission::new(options::admission(listener, None))),
            contexts: self.contexts(listener, &settings, metrics),
        })
    }

    /// One for each shard.
    fn contexts(
        &self,
        listener: &ListenerView<'_>,
        settings: &Settings,
        metrics: &ListenerMetrics,
    ) -> Vec<Arc<ListenerContext>> {
        let handler: &str = &listener.common.handler;
        let name = HandlerName::new(handler);
        let clients = self.clients.get(handler).into_iter().flatten();
        let context = |(shard, client): (&Shard, &Arc<Client>)| {
            Arc::new(ListenerContext {
                name: listener.full_name(),
                shard: shard.id(),
                settings: settings.clone(),
                handler: name.clone(),
                handlers: Arc::new(client.clone()),
                registry: self.registry.clone(),
                metrics: metrics.clone(),
                draining: self.draining.clone(),
                complaints: Seldom::default(),
            })
        };
        self.shards.iter().zip(clients).map(context).collect()
    }

    fn tls(
        &self,
        listener: &ListenerView<'_>,
        options: &SslOptions,
        metrics: &ListenerMetrics,
    ) -> Result<Tls, Error> {
        let (key, owned) = (listener.key(), options.clone());
        let make = move || options::ssl(&key, &owned);
        Ok(Tls {
            config: self.watched(listener, options::ssl_files(options), make, metrics)?,
            handshake_timeout: options.handshake_timeout,
            handshakes: Turns::new(options.max_handshakes),
        })
    }

    fn dtls(
        &self,
        listener: &ListenerView<'_>,
        options: &DtlsOptions,
        metrics: &ListenerMetrics,
    ) -> Result<Dtls, Error> {
        let (key, owned) = (listener.key(), options.clone());
        let make = move || options::dtls(&key, &owned);
        Ok(Dtls {
            context: self.watched(listener, options::dtls_files(options), make, metrics)?,
            handshake_timeout: options.handshake_timeout,
            handshakes: Turns::new(options.max_handshakes),
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
