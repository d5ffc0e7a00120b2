//! From the configuration to the options of each component.
//!
//! Components know their own options and not the configuration; this is the one
//! place where both meet.

mod auth;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::ServerConfig;

use crate::adapter;
use crate::adapter::tokens::{TokenFile, Tokens};
use crate::admission;
use crate::auth as authentication;
use crate::broker;
use crate::config::{
    BrokerMode, ClientTls, Config, DenyAction, DtlsOptions, Failover, Files, Handler,
    HandlerAddress, Limit, ListenerView, OnUnavailable, Protocol, ProxyProtocol, QueuePolicy, Rate,
    ServiceName, SslOptions, TcpOptions, UdpOptions, Verify,
};
use crate::connection::machine::Timeouts;
use crate::connection::own::WillTemplate;
use crate::connection::{Limits, Policy, Settings};
use crate::handler::{Pings, client, link, pool, resolve, streaming};
use crate::id::HandlerName;
use crate::tls::{self, ClientFiles, Identity, PeerCheck, Renewed};
use crate::transport::dtls::{self, ClientCertificates};
use crate::transport::{tcp, udp};

pub use auth::auth;

/// A part of the configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct Error {
    key: String,
    problem: String,
}

impl Error {
    /// What is wrong with `key`.
    pub fn new(key: &str, problem: impl ToString) -> Self {
        Self {
            key: key.to_owned(),
            problem: problem.to_string(),
        }
    }
}

impl From<authentication::Error> for Error {
    fn from(error: authentication::Error) -> Self {
        Self::new(&error.key, error.problem)
    }
}

/// Everything about the configuration that only shows when it is used, such as
/// what is in a certificate's file. Empty when all is well.
pub fn check(config: &Config) -> Vec<Error> {
    let mut errors = Vec::new();
    errors.extend(server_tls(config).err());
    let files = token_files(config);
    let each = files.iter().map(std::slice::from_ref).map(tokens);
    let faults: Vec<Error> = each.filter_map(Result::err).collect();
    match faults.is_empty() {
        true => errors.extend(tokens(&files).err()),
        false => errors.extend(faults),
    }
    errors.extend(broker(config).err());
    match auth(config) {
        Ok(options) => errors.extend(authentication::check(&options).into_iter().map(Error::from)),
        Err(error) => errors.push(error),
    }
    errors.extend(targets(&handler_key("default"), &config.handler).err());
    for (name, handler) in &config.handlers {
        errors.extend(targets(&handler_key(name), handler).err());
    }
    for (name, listener) in &config.listeners.ssl {
        if listener.common.enable {
            errors.extend(ssl(&format!("listeners.ssl.{name}"), &listener.ssl_options).err());
        }
    }
    for (name, listener) in &config.listeners.dtls {
        if listener.common.enable {
            errors.extend(dtls(&format!("listeners.dtls.{name}"), &listener.dtls_options).err());
        }
    }
    errors
}

/// The table of the handler with this name.
pub fn handler_key(name: &str) -> String {
    match name {
        "default" => "handler".to_owned(),
        name => format!("handlers.{name}"),
    }
}

fn identity(certfile: &Option<PathBuf>, keyfile: &Option<PathBuf>) -> Option<Identity> {
    Some(Identity {
        certfile: certfile.clone()?,
        keyfile: keyfile.clone()?,
    })
}

fn client_tls(
    key: &str,
    tls: &ClientTls,
    alpn: &'static [&'static [u8]],
) -> Result<Arc<Renewed>, Error> {
    let key = format!("{key}.ssl_options");
    let files = ClientFiles {
        cacertfile: tls.cacertfile.clone(),
        identity: identity(&tls.certfile, &tls.keyfile),
        verify: tls.verify == Verify::Peer,
        alpn,
    };
    Renewed::new(&key, files).map_err(|error| Error::new(&key, error))
}

/// TLS of the adapter, if it is on.
pub fn server_tls(config: &Config) -> Result<Option<Arc<ServerConfig>>, Error> {
    let tls = &config.server.ssl_options;
    if !tls.enable {
        return Ok(None);
    }
    let key = "server.ssl_options";
    let identity = identity(&tls.certfile, &tls.keyfile)
        .ok_or_else(|| Error::new(key, "certfile and keyfile are needed"))?;
    let authorities = (tls.verify == Verify::Peer)
        .then_some(tls.cacertfile.as_deref())
        .flatten();
    tls::server(&identity, authorities, &[b"h2"])
        .map(Some)
        .map_err(|error| Error::new(key, error))
}

/// The files that the adapter's TLS is made of.
pub fn server_tls_files(config: &Config) -> Vec<PathBuf> {
    let tls = &config.server.ssl_options;
    let files = [&tls.certfile, &tls.keyfile, &tls.cacertfile];
    files.into_iter().flatten().cloned().collect()
}

/// How the adapter serves.
pub fn adapter(config: &Config) -> adapter::Options {
    let server = &config.server;
    adapter::Options {
        max_message_size: server.max_message_size.bytes(),
        max_concurrent_streams: server.max_concurrent_streams,
        max_connection_age: server.max_connection_age.finite(),
        isolate: server.isolate_handlers,
        trace: passes_traces(config),
    }
}

/// The files with the tokens that handlers must show. Without any, everybody may call.
pub fn token_files(config: &Config) -> Vec<TokenFile> {
    let common = config.server.token_file.iter().map(|path| TokenFile {
        key: "server.token_file".to_owned(),
        path: path.clone(),
        owner: None,
    });
    let named = config
        .handlers
        .iter()
        .map(|(name, handler)| (&**name, handler));
    let own = std::iter::once(("default", &config.handler))
        .chain(named)
        .filter_map(|(name, handler)| {
            Some(TokenFile {
                key: format!("{}.adapter_token_file", handler_key(name)),
                path: handler.adapter_token_file.clone()?,
                owner: Some(HandlerName::new(name)),
            })
        });
    common.chain(own).collect()
}

/// What is in these files.
pub fn tokens(files: &[TokenFile]) -> Result<Arc<Tokens>, Error> {
    Tokens::read(files).map_err(|(key, error)| Error::new(&key, error))
}

/// The addresses of a handler.
pub fn targets(key: &str, handler: &Handler) -> Result<Vec<resolve::Target>, Error> {
    let tls = if handler.address.iter().any(HandlerAddress::uses_tls) {
        Some(client_tls(key, &handler.ssl_options, &[b"h2"])?)
    } else {
        None
    };
    let target = |address: &HandlerAddress| {
        let place = match address {
            HandlerAddress::Url(url) => resolve::Place::Port {
                host: url.host.clone(),
                port: url.port,
            },
            HandlerAddress::Unix(path) => resolve::Place::Socket(path.clone()),
        };
        let tls = tls.clone().filter(|_| address.uses_tls());
        let (connect, request) = (handler.connect_timeout, handler.request_timeout);
        resolve::Target::new(address.to_string(), place, tls, connect, request)
            .map_err(|error| Error::new(&format!("{key}.address"), error))
    };
    handler.address.iter().map(target).collect()
}

/// How events are delivered to the handler of the table `key`, by each of so many shards.
pub fn client(key: &str, handler: &Handler, shards: usize) -> client::Options {
    let ping = |interval| Pings {
        interval,
        timeout: handler.keepalive_timeout,
    };
    let (unary, streams) = ("ConnectionUnaryHandler", "ConnectionHandler");
    let (service, other) = match handler.service_name {
        ServiceName::ConnectionUnaryHandler => (unary, streams),
        ServiceName::ConnectionHandler => (streams, unary),
    };
    // Streams are of the one service only.
    let streaming = match handler.streaming {
        true => format!(" and {key}.streaming = false"),
        false => String::new(),
    };
    client::Options {
        service,
        service_advice: format!("{key}.service_name = \"{other}\"{streaming}"),
        request_timeout: handler.request_timeout,
        close_timeout: handler.close_timeout,
        on_unavailable: match handler.on_unavailable {
            OnUnavailable::Hold => client::OnUnavailable::Hold(handler.max_outage.finite()),
            OnUnavailable::Close => client::OnUnavailable::Close(handler.connect_timeout),
        },
        streaming: handler.streaming.then(|| streaming::Options {
            max_messages: handler.stream_max_messages,
            max_bytes: handler.stream_max_bytes.bytes(),
            max_age: handler.stream_max_age,
            at_least_once: handler.at_least_once,
        }),
        at_least_once: handler.at_least_once,
        grpc_timeout: handler.grpc_timeout,
        trace_context: handler.trace_context,
        pool: pool::Options {
            max_in_flight: (handler.max_in_flight / shards.max(1)).max(1),
            failover_after: match handler.failover {
                Failover::Hold => None,
                Failover::Recreate => Some(handler.failover_after),
            },
            link: link::Options {
                health: handler.health_check.then_some(handler.health_interval),
                pings: handler.keepalive_interval.finite().map(ping),
            },
        },
    }
}

/// How the broker is reached and used.
pub fn broker(config: &Config) -> Result<broker::Options, Error> {
    let broker = &config.broker;
    let tls = if broker.url.iter().any(|url| url.tls) {
        Some(client_tls("broker", &broker.ssl_options, &[])?)
    } else {
        None
    };
    let (prefix, node) = (&*broker.client_id_prefix, &*config.node_name);
    let name = |property: &Option<crate::config::PropertyName>| {
        property.as_ref().map(|name| name.to_string())
    };
    let address = |url: &crate::config::BrokerUrl| broker::Address {
        url: url.to_string().into(),
        host: url.host.clone(),
        port: url.port,
        tls: tls.clone().filter(|_| url.tls),
    };
    Ok(broker::Options {
        addresses: broker.url.iter().map(address).collect(),
        protocol: match broker.protocol {
            Protocol::V4 => broker::Protocol::V4,
            Protocol::V5 => broker::Protocol::V5,
        },
        client_id: format!("{prefix}-{node}"),
        // RawPublish has one route, which is one connection.
        pool_size: match broker.mode {
            BrokerMode::Pool => broker.pool_size,
            BrokerMode::PerClient => 1,
        },
        login: (broker.username.is_some() || broker.password.is_some()).then(|| broker::Login {
            username: broker.username.clone().unwrap_or_default(),
            password: broker
                .password
                .as_ref()
                .map(|password| password.expose().to_owned())
                .unwrap_or_default(),
        }),
        keep_alive: broker.keep_alive,
        connect_timeout: broker.connect_timeout,
        session_expiry: broker.session_expiry,
        publish_timeout: broker.publish_timeout,
        outbox_max_messages: broker.outbox_max_messages,
        outbox_max_bytes: broker.outbox_max_bytes.bytes(),
        receive_maximum: broker.receive_maximum,
        max_packet_size: u32::try_from(broker.max_packet_size.bytes()).unwrap_or(u32::MAX),
        reconnect: (broker.reconnect_min, broker.reconnect_max),
        from_property: name(&broker.from_property),
        id_property: name(&broker.id_property),
        timestamp_property: name(&broker.timestamp_property),
        trace: passes_traces(config),
        will: None,
        own: false,
    })
}

/// Whether a handler that a listener names is told of traces: then those that handlers and messages
/// are part of go on.
fn passes_traces(config: &Config) -> bool {
    let mut handlers = used_handlers(config).into_values();
    handlers.any(|handler| handler.trace_context)
}

/// The handlers that a listener names, by name; the others need not be there.
pub fn used_handlers(config: &Config) -> BTreeMap<&str, &Handler> {
    let listeners = config.listeners.enabled();
    listeners
        .filter_map(|listener| {
            let name: &str = &listener.common.handler;
            Some((name, config.handler_named(name)?))
        })
        .collect()
}

/// What the sessions of devices have in common, and how many there may be; where each
/// device has its own.
pub fn own_sessions(config: &Config) -> Result<Option<(broker::Options, usize)>, Error> {
    let settings = &config.broker;
    if settings.mode == BrokerMode::Pool {
        return Ok(None);
    }
    let options = broker::Options {
        outbox_max_messages: settings.session_outbox_max_messages,
        outbox_max_bytes: settings.session_outbox_max_bytes.bytes(),
        ..broker(config)?
    };
    Ok(Some((options, settings.max_sessions)))
}

/// The will of each device that has its own session, where there is one.
pub fn will(config: &Config) -> Option<WillTemplate> {
    let will = &config.broker.will;
    (!will.topic.pieces().is_empty()).then(|| WillTemplate {
        topic: will.topic.clone(),
        payload: will.payload.clone(),
        qos: broker::QoS::from_number(will.qos.into()).unwrap_or(broker::QoS::AtMostOnce),
        retain: will.retain,
    })
}

/// TLS of a listener whose table is `key`.
pub fn ssl(key: &str, options: &SslOptions) -> Result<Arc<ServerConfig>, Error> {
    let identities = identities(&options.certfile, &options.keyfile);
    let peers = (options.verify == Verify::Peer).then(|| PeerCheck {
        authorities: options.cacertfile.to_vec(),
        required: options.fail_if_no_peer_cert,
    });
    tls::devices(&identities, peers.as_ref())
        .map_err(|error| Error::new(&format!("{key}.ssl_options"), error))
}

/// DTLS of a listener whose table is `key`.
pub fn dtls(key: &str, options: &DtlsOptions) -> Result<Arc<dtls::Context>, Error> {
    let client_certificates = match (options.verify, options.fail_if_no_peer_cert) {
        (Verify::None, _) => ClientCertificates::NotAsked,
        (Verify::Peer, false) => ClientCertificates::Asked,
        (Verify::Peer, true) => ClientCertificates::Required,
    };
    let options = dtls::Options {
        identities: identities(&options.certfile, &options.keyfile),
        client_authorities: options.cacertfile.to_vec(),
        client_certificates,
        psk_file: options.psk_file.clone(),
        ..dtls::Options::default()
    };
    dtls::Context::new(&options)
        .map(Arc::new)
        .map_err(|error| Error::new(&format!("{key}.dtls_options"), error))
}

/// The files that DTLS of a listener is made of.
pub fn dtls_files(options: &DtlsOptions) -> Vec<PathBuf> {
    let (certs, keys) = (&options.certfile, &options.keyfile);
    let files = [certs, keys, &options.cacertfile].into_iter();
    let files = files.flat_map(|files| files.to_vec());
    files.chain(options.psk_file.clone()).collect()
}

/// The files that TLS of a listener is made of.
pub fn ssl_files(options: &SslOptions) -> Vec<PathBuf> {
    let files = [&options.certfile, &options.keyfile, &options.cacertfile];
    files.into_iter().flat_map(|files| files.to_vec()).collect()
}

fn identities(certfiles: &Files, keyfiles: &Files) -> Vec<Identity> {
    let pairs = certfiles.iter().zip(keyfiles.iter());
    let identity = |(certfile, keyfile): (&PathBuf, &PathBuf)| Identity {
        certfile: certfile.clone(),
        keyfile: keyfile.clone(),
    };
    pairs.map(identity).collect()
}

/// How the connections of a listener behave, with what depends on its sockets.
pub fn connection(config: &Config, listener: &ListenerView<'_>, sending: Sending) -> Settings {
    let common = listener.common;
    let rate = |limit: &Limit<Rate>| limit.finite().map(|rate| rate.per_second());
    let name: &str = &common.handler;
    let handler = config.handler_named(name).unwrap_or(&config.handler);
    Settings {
        timeouts: Arc::new(Timeouts {
            idle: config.idle_timeout.finite(),
            reap: listener.kind.is_datagram(),
            authenticate: config.authenticate_timeout.finite(),
            send: sending.timeout,
        }),
        high_watermark: sending.high_watermark,
        max_bytes_rate: rate(&common.max_bytes_rate),
        max_messages_rate: rate(&common.max_messages_rate),
        queue: Limits {
            max_messages: config.queue.max_messages,
            max_bytes: config.queue.max_bytes.bytes(),
            policy: match config.queue.policy {
                QueuePolicy::DropOldest => Policy::DropOldest,
                QueuePolicy::Close => Policy::Close,
            },
        },
        max_batch: handler.max_batch,
        mountpoint: mountpoint(config, listener).to_owned(),
        clientinfo_mountpoint: config.clientinfo_mountpoint,
        enable_authn: common.enable_authn,
        disconnect_denied: config.authorization.deny_action == DenyAction::Disconnect,
        node_name: config.node_name.to_string(),
    }
}

/// The prefix of the topics of a listener's connections, a template.
pub fn mountpoint<'a>(config: &'a Config, listener: &ListenerView<'a>) -> &'a str {
    let own: &str = &listener.common.mountpoint;
    if own.is_empty() {
        &config.mountpoint
    } else {
        own
    }
}

/// What waits to be sent to a device, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// Nothing taken by the device for so long ends its connection.
    pub timeout: Duration,
    /// Bytes.
    pub high_watermark: u32,
}

impl From<&TcpOptions> for Sending {
    fn from(options: &TcpOptions) -> Self {
        let watermark = options.high_watermark.bytes();
        Self {
            timeout: options.send_timeout,
            high_watermark: u32::try_from(watermark).unwrap_or(u32::MAX),
        }
    }
}

/// How long a socket that takes no datagrams is borne with: the system's own buffers are
/// full, which passes soon or not at all.
const DATAGRAM_SEND_TIMEOUT: Duration = Duration::from_secs(15);

impl From<&UdpOptions> for Sending {
    fn from(options: &UdpOptions) -> Self {
        let watermark = options.high_watermark.bytes();
        Self {
            timeout: DATAGRAM_SEND_TIMEOUT,
            high_watermark: u32::try_from(watermark).unwrap_or(u32::MAX),
        }
    }
}

/// How the sockets of a listener are set up.
pub fn tcp(options: &TcpOptions) -> tcp::Options {
    tcp::Options {
        backlog: i32::try_from(options.backlog).unwrap_or(i32::MAX),
        nodelay: options.nodelay,
        recbuf: options.recbuf.map(|size| size.bytes()),
        sndbuf: options.sndbuf.map(|size| size.bytes()),
    }
}

/// UDP sockets of a listener.
pub fn udp(options: &UdpOptions) -> udp::Options {
    udp::Options {
        recbuf: options.recbuf.map(|size| size.bytes()),
        sndbuf: options.sndbuf.map(|size| size.bytes()),
        queue_datagrams: options.queue_max_datagrams,
        queue_bytes: options.queue_max_bytes.bytes(),
        ..udp::Options::default()
    }
}

/// Who may connect to a listener; over TCP a load balancer may say who it is.
pub fn admission(listener: &ListenerView<'_>, proxy: Option<&ProxyProtocol>) -> admission::Options {
    let common = listener.common;
    admission::Options {
        access_rules: common.access_rules.clone(),
        max_connections: common.max_connections.finite(),
        max_connections_per_address: common.max_connections_per_address.finite(),
        max_conn_rate: common.max_conn_rate.finite().map(|r| r.per_second()),
        proxy_protocol: proxy
            .filter(|proxy| proxy.proxy_protocol)
            .map(|proxy| admission::Proxy {
                timeout: proxy.proxy_protocol_timeout,
                trusted: proxy.proxy_protocol_trusted.clone(),
            }),
    }
}
