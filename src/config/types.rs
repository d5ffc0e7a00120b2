//! The sections of the configuration and their keys: the reference that the default file is made of.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use figment::value::Value;

use super::address::{AdapterBind, BrokerUrl, HandlerAddress};
use super::auth::{Authenticator, ClientInfoOverride};
use super::authz::Authorization;
use super::listeners::Listeners;
use super::names::{ClientIdPrefix, Mountpoint, NodeName, PropertyName, words};
use super::schema::{Computed, Listed, Named, Nested, Within, section};
use super::template::Template;
use super::value::{ConfigValue, Rejected};
use super::values::{FileMode, Limit, Secret, Size};

/// The shortest duration of a key for which zero makes no sense.
pub(super) const TICK: Duration = Duration::from_millis(1);

section! {
    /// The whole configuration, checked.
    pub struct Config {
        /// The gateway's name, in `Message.node` of every message handed to a handler.
        /// 1 to 255 bytes without control characters. Default: the host name.
        node_name: NodeName = Computed(host_name, "<host name>"),

        /// Prefix of every topic a connection publishes or subscribes to, such as "meters/${clientid}/".
        /// ${clientid} and ${username} are filled in. "" for none. A listener may have its own.
        mountpoint: Mountpoint = "",

        /// A connection that is not authenticated and over which nothing went either way for so long
        /// is closed, reason idle_timeout. A duration (ms, s, m, h, d) or "infinity".
        idle_timeout: Limit<Duration> = Within("30s", Limit::Finite(TICK)..),

        /// Whether handlers may call RawPublish, which knows no mountpoint and no access control.
        /// true or false; false answers PERMISSION_DENY.
        raw_publish: bool = "true",

        /// Whether the mountpoint of an AuthenticateRequest counts, as in EMQX 4.x.
        /// true or false; false ignores it, as EMQX does since 5.1.
        clientinfo_mountpoint: bool = "false",

        /// A connection that is not authenticated so long after it was accepted is closed, busy or
        /// not, reason idle_timeout. A duration or "infinity".
        authenticate_timeout: Limit<Duration> = Within("infinity", Limit::Finite(TICK)..),

        /// Threads that serve connections. 0 to 256; 0 is one for each CPU core.
        shards: usize = Within("0", 0..=256),

        /// The longest that a drain takes after SIGTERM. What is left then is closed without
        /// ceremony. A duration; "0s" does not wait at all.
        shutdown_timeout: Duration = "15s",

        /// ConnectionAdapter: the gRPC service that handlers call to send, publish, subscribe...
        server: Server = Nested,

        /// The handler that every listener uses unless it names another. Its name is "default".
        handler: Handler = Nested,

        /// Further handlers, with the same keys as `[handler]`; `address` is required.
        /// A listener chooses one with its key `handler`. Names are of a-z, 0-9, _ and -.
        ///
        /// ```toml
        /// [handlers.meters]
        /// address = ["http://10.0.0.7:9001", "http://10.0.0.8:9001"]
        /// ```
        handlers: BTreeMap<String, Handler> =
            Named { required: "address", optional_for: None, built_in: None, reserved: Some(("default", "the table [handler]")) },

        /// The MQTT broker that messages go to and come from.
        broker: Broker = Nested,

        /// Who is asked whether a device is who it says it is, when a handler calls Authenticate: one
        /// after the other until one of them allows or denies it. With none of them every device is
        /// let in; with some, one that all of them ignore is not. In variables and on the command
        /// line they have numbers from 1 on, which put them in order: EXPROTO_AUTHENTICATION__1__PATH.
        /// For example, with their defaults:
        authentication: BTreeMap<u16, Authenticator> = Listed,

        /// What a device is, in place of what it says, before anybody is asked. Placeholders:
        /// ${clientid} ${username} ${peerhost} ${cert_common_name} ${cert_subject} ${proto_name}, and
        /// ${password} for the password alone.
        clientinfo_override: ClientInfoOverride = Nested,

        /// What devices may publish and subscribe to.
        authorization: Authorization = Nested,

        /// How often a device may fail to authenticate; counts where there is any authentication.
        login_attempts: LoginAttempts = Nested,

        /// HTTP for operators: /metrics /healthz /readyz.
        admin: Admin = Nested,

        /// The gateway's own log.
        log: Log = Nested,

        /// Messages from the broker that wait for a connection's handler, for each connection.
        queue: Queue = Nested,

        /// Where devices connect. With no listener configured there is tcp.default, as below; as
        /// soon as one is, there are only those that are configured.
        listeners: Listeners = Nested,
    }
}

/// The default of `node_name`.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| fs::read_to_string("/etc/hostname"))
        .unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "exproto-sidecar".to_owned()
    } else {
        name.to_owned()
    }
}

section! {
    /// `[server]`: the gRPC ConnectionAdapter.
    pub struct Server {
        /// IP address and port, such as "127.0.0.1:9100"; a port alone is every IPv4 address.
        /// "unix:/PATH" is a Unix socket.
        bind: AdapterBind = "127.0.0.1:9100",

        /// Who may connect to the Unix socket: octal digits as of chmod, in quotes. Write permission
        /// is what counts.
        socket_mode: FileMode = "0660",

        /// The largest request taken from a handler. A size (KiB, MiB, GiB).
        max_message_size: Size = Within("4MiB", Size::new(1)..),

        /// Connections of handlers at once; those beyond are closed.
        max_connections: usize = Within("1024", 1..),

        /// Calls that one connection may have under way. A call waits for the broker or for a slow
        /// device; those beyond wait at the handler.
        max_concurrent_streams: u32 = Within("65536", 1..=1_000_000),

        /// How long a connection of a handler lasts, up to a tenth more or less; then it is asked to go
        /// (GOAWAY), which gRPC's clients answer with a new one. Calls under way have 30 seconds to end.
        /// Where a proxy spreads connections over gateways, or certificates expire. A duration or
        /// "infinity".
        max_connection_age: Limit<Duration> = Within("infinity", Limit::Finite(Duration::from_secs(1))..),

        /// File with tokens, one a line, of which a handler must show one with every call, as the
        /// metadata "authorization: Bearer TOKEN". Read again when it changes. "" lets everybody call,
        /// unless handlers have tokens of their own (handler.adapter_token_file).
        token_file: Option<PathBuf> = "",

        /// Whether a handler can act only on connections that were announced to it: true or false.
        /// Handlers are told apart by the tokens of their adapter_token_file, which each then needs.
        isolate_handlers: bool = "false",

        /// TLS of the adapter.
        ssl_options: ServerTls = Nested,
    }
}

section! {
    /// TLS where the gateway is the server.
    pub struct ServerTls {
        /// Whether TLS is on: true or false. Needs certfile and keyfile.
        enable: bool = "false",

        /// PEM file with the certificate chain, relative to the working directory. "" for none.
        certfile: Option<PathBuf> = "",

        /// PEM file with the certificate's private key. "" for none.
        keyfile: Option<PathBuf> = "",

        /// PEM file with the authorities that clients' certificates are checked with. "" for none.
        cacertfile: Option<PathBuf> = "",

        /// "verify_none", or "verify_peer" for mutual TLS: a client must show a certificate that
        /// cacertfile vouches for.
        verify: Verify = "verify_none",
    }
}

section! {
    /// TLS where the gateway is the client.
    pub struct ClientTls {
        /// PEM file with the authorities the server is checked with. "" for those of the system.
        cacertfile: Option<PathBuf> = "",

        /// PEM file with the gateway's own certificate chain, for mutual TLS. "" for none.
        certfile: Option<PathBuf> = "",

        /// PEM file with the certificate's private key. "" for none.
        keyfile: Option<PathBuf> = "",

        /// "verify_peer", or "verify_none", which trusts any server: for tests only.
        verify: Verify = "verify_peer",
    }
}

section! {
    /// `[handler]` and `[handlers.NAME]`: a user's ConnectionHandler.
    pub struct Handler {
        /// Where the service listens: "http://HOST:PORT", https:// for TLS, "unix:/PATH" for a Unix
        /// socket, or a list of them. A host name counts as all the addresses that it resolves to.
        /// A connection stays with the address that saw its OnSocketCreated; new ones go in turn
        /// over those that are there.
        address: Vec<HandlerAddress> = "http://127.0.0.1:9001",

        /// The gRPC service it implements: "ConnectionUnaryHandler", or "ConnectionHandler", the
        /// streaming one, the only one that EMQX 4.2 to 4.4 knew.
        service_name: ServiceName = "ConnectionUnaryHandler",

        /// Sends OnReceivedBytes and OnReceivedMessages over streams that many connections share,
        /// for throughput, instead of one by one. Only with "ConnectionHandler". Bytes and messages of
        /// one connection then come in no order to each other, and may come twice: see handlers.md.
        streaming: bool = "false",

        /// With streaming: how long a stream is written to. Its messages are known to be taken only
        /// when it has ended. A duration.
        stream_max_age: Duration = Within("5ms", TICK..),

        /// With streaming: the most messages on one stream, at least 1. A stream begins with fewer and
        /// a handler that answers fast gets more.
        stream_max_messages: usize = Within("1024", 1..),

        /// With streaming: the most bytes on one stream; a larger message has one of its own. A size.
        stream_max_bytes: Size = Within("256KiB", Size::new(1)..),

        /// The longest that one callback takes. A duration.
        request_timeout: Duration = Within("5s", TICK..),

        /// The longest that connecting takes, each attempt. A duration.
        connect_timeout: Duration = Within("5s", TICK..),

        /// How long OnSocketClosed is tried, from when it is its turn (max_in_flight); then it is
        /// counted as lost. A duration.
        close_timeout: Duration = Within("5s", TICK..),

        /// The most messages in one OnReceivedMessages, at least 1. Set 1 for a handler that reads
        /// only the first.
        max_batch: usize = Within("100", 1..),

        /// The most callbacks under way at one address at a time, at least 1; further ones wait for
        /// their turn. gRPC servers in Python and C++ refuse calls when 1,000 wait.
        max_in_flight: usize = Within("900", 1..),

        /// What becomes of connections while the handler is away: "hold" keeps them and tries their
        /// callbacks again with backoff, "close" closes them all at once, reason handler_unavailable.
        on_unavailable: OnUnavailable = "hold",

        /// With "hold": the longest outage a connection is held for. A duration or "infinity".
        max_outage: Limit<Duration> = Within("60s", Limit::Finite(TICK)..),

        /// File with this handler's own tokens for its calls to the adapter, as in server.token_file,
        /// which it may show as well as those. "" for none.
        adapter_token_file: Option<PathBuf> = "",

        /// Where a connection is held: "hold" waits for its own address to come back, "recreate"
        /// moves it to another one that is there, with an OnSocketCreated of the same conn first.
        failover: Failover = "hold",

        /// With "recreate": how long a connection's address must be away before it moves. Less than
        /// max_outage. A duration.
        failover_after: Duration = Within("5s", TICK..),

        /// Whether a callback is sent again when it is unknown whether the handler took it: the
        /// channel broke, or the answer was UNAVAILABLE. false: it is not, and the connection is
        /// closed, reason handler_unavailable; only what was never sent is tried again.
        at_least_once: bool = "true",

        /// How often host names are resolved; they also are when connecting fails.
        /// A duration or "infinity".
        resolve_interval: Limit<Duration> = Within("30s", Limit::Finite(TICK)..),

        /// Whether a handler is asked for its health (grpc.health.v1, the server as a whole). One
        /// that says NOT_SERVING gets no new connections; one without that service is healthy.
        health_check: bool = "true",

        /// How often it is asked. A duration.
        health_interval: Duration = Within("10s", TICK..),

        /// While callbacks are under way and nothing comes: how often an HTTP/2 ping is sent. Most
        /// gRPC servers hang up on the third ping within five minutes unless they are told to
        /// permit more. A duration or "infinity".
        keepalive_interval: Limit<Duration> = Within("infinity", Limit::Finite(TICK)..),

        /// How long the answer to such a ping may take before the channel counts as broken.
        /// A duration.
        keepalive_timeout: Duration = Within("3s", TICK..),

        /// Whether request_timeout goes along with every callback as grpc-timeout. The handler's own
        /// library then ends a callback at that time, also one that waits for the gateway.
        grpc_timeout: bool = "false",

        /// Whether callbacks carry a traceparent header (W3C Trace Context), which the log tells at
        /// level debug, and traces that calls to the adapter and messages are part of go on.
        trace_context: bool = "false",

        /// TLS towards an https:// address.
        ssl_options: ClientTls = Nested,
    }
}

section! {
    /// `[broker]`: the MQTT broker.
    pub struct Broker {
        /// "mqtt://HOST:PORT", mqtts:// for TLS. Without a port it is 1883, or 8883 for mqtts://.
        /// Or a list of them, the nodes of one broker, tried in turn.
        url: Vec<BrokerUrl> = "mqtt://127.0.0.1:1883",

        /// The MQTT version: 5, or 4 for MQTT 3.1.1 (protocol level 4), for brokers that know no
        /// MQTT 5 or no subscription identifiers. 4 carries neither Message.from nor the time of
        /// publishing, and may open further connections for filters that overlap.
        protocol: Protocol = "5",

        /// "pool": the devices share the gateway's connections. "per_client": Authenticate opens a
        /// connection with the device's client id, user name and password; MQTT 5 only.
        mode: BrokerMode = "pool",

        /// The most devices with a connection of their own at a time (mode per_client), at least 1.
        max_sessions: usize = Within("10000", 1..),

        /// In place of outbox_max_messages on a device's own connection, at least 1.
        session_outbox_max_messages: usize = Within("100", 1..),

        /// In place of outbox_max_bytes on a device's own connection. A size.
        session_outbox_max_bytes: Size = Within("64KiB", Size::new(1)..),

        /// Mode per_client: the will of each device.
        will: Will = Nested,

        /// Connections to the broker, 1 to 64. Mode per_client has one, for RawPublish.
        pool_size: usize = Within("4", 1..=64),

        /// The user name the gateway gives the broker. "" for none.
        username: Option<String> = "",

        /// The password the gateway gives the broker, "" for none. Never shown. See password_file.
        password: Option<Secret> = "",

        /// File with the password, in place of password; a line end behind it is left out. "" for none.
        password_file: Option<PathBuf> = "",

        /// What the client ids of the gateway's own connections begin with: 1 to 32 characters
        /// without / + # and white space.
        client_id_prefix: ClientIdPrefix = "exproto",

        /// MQTT keep-alive of those connections. A duration from 5s to 65535s.
        keep_alive: Duration = Within("30s", Duration::from_secs(5)..=Duration::from_secs(65535)),

        /// The longest that connecting takes, each attempt. A duration.
        connect_timeout: Duration = Within("10s", TICK..),

        /// How long the broker keeps a session that lost its connection. A duration; "0s" ends it
        /// with the connection.
        session_expiry: Duration = "1h",

        /// How long a publish waits for the broker's acknowledgement. A duration.
        publish_timeout: Duration = Within("10s", TICK..),

        /// The most messages that wait to be sent to the broker, on each connection, at least 1.
        outbox_max_messages: usize = Within("10000", 1..),

        /// The most bytes that wait for the broker, to be sent or to be acknowledged, on each
        /// connection. A size.
        outbox_max_bytes: Size = Within("16MiB", Size::new(1)..),

        /// The most QoS 1 and 2 messages the broker may have in flight towards the gateway, on each
        /// connection (Receive Maximum of MQTT 5). 1 to 65535.
        receive_maximum: u16 = Within("1024", 1..=65535),

        /// The largest MQTT packet taken from the broker; it drops larger messages. Below the 4 MiB
        /// that gRPC servers take by default, so that every message fits into a callback.
        /// A size from 1KiB to 256MiB.
        max_packet_size: Size = Within("3MiB", Size::new(1 << 10)..=Size::new(256 << 20)),

        /// The wait before the first attempt to connect again; it doubles with each. A duration.
        reconnect_min: Duration = Within("100ms", TICK..),

        /// The longest such wait, not shorter than reconnect_min. A duration.
        reconnect_max: Duration = Within("1500ms", TICK..),

        /// The user property that carries a publisher's clientid, for Message.from. "" turns it off.
        from_property: Option<PropertyName> = "exproto-from",

        /// The user property that carries a message's id, for Message.id. "" turns it off.
        id_property: Option<PropertyName> = "exproto-id",

        /// The user property that carries the time of publishing, for Message.timestamp. "" turns it off.
        timestamp_property: Option<PropertyName> = "exproto-timestamp",

        /// TLS towards an mqtts:// broker.
        ssl_options: ClientTls = Nested,
    }
}

words! {
    /// Whose connections to the broker there are.
    pub enum BrokerMode {
        /// A few of the gateway's.
        Pool = "pool",
        /// One of each device's.
        PerClient = "per_client",
    }
}

section! {
    /// `[broker.will]`: what the broker publishes when a device's own connection ends abnormally.
    pub struct Will {
        /// The topic as the broker sees it, without a mountpoint; ${clientid}, ${username}, ${peerhost},
        /// ${cert_common_name}, ${cert_subject} and ${proto_name} are filled in. "" for no will.
        topic: Template = "",

        /// The message, with the same placeholders.
        payload: Template = "",

        /// Its QoS: 0, 1 or 2.
        qos: u16 = Within("0", 0..=2),

        /// Whether the broker keeps it for those who subscribe later: true or false.
        retain: bool = "false",
    }
}

section! {
    /// `[login_attempts]`: failed attempts to authenticate.
    pub struct LoginAttempts {
        /// The most failed attempts in each window from one IPv4 address or IPv6 /64, at least 1, or
        /// "infinity". Beyond, attempts are refused unseen until the window has passed.
        max_per_address: Limit<u32> = Within("100", Limit::Finite(1)..),

        /// The most failed attempts in each window with one client id, whatever address they come
        /// from, at least 1, or "infinity". Who keeps guessing with a device's client id keeps that
        /// device out, too.
        max_per_clientid: Limit<u32> = Within("20", Limit::Finite(1)..),

        /// How long failed attempts count. A duration.
        window: Duration = Within("1m", TICK..),
    }
}

section! {
    /// `[admin]`: HTTP for operators.
    pub struct Admin {
        /// IP address and port, such as "127.0.0.1:9180". "" turns it off.
        bind: Option<SocketAddr> = "127.0.0.1:9180",
    }
}

section! {
    /// `[log]`: the gateway's own log.
    pub struct Log {
        /// The least that is logged: "error", "warn", "info", "debug" or "trace".
        level: LogLevel = "info",

        /// "text", or "json" for one JSON object a line.
        format: LogFormat = "text",
    }
}

section! {
    /// `[queue]`: messages that wait for one connection's handler.
    pub struct Queue {
        /// The most messages, at least 1.
        max_messages: usize = Within("1000", 1..),

        /// The most bytes. A size.
        max_bytes: Size = Within("1MiB", Size::new(1)..),

        /// What happens when it is full: "drop_oldest" drops the oldest message, "close" closes
        /// the connection.
        policy: QueuePolicy = "drop_oldest",
    }
}

words! {
    /// Whether the certificate of the other side is checked.
    pub enum Verify {
        /// Any certificate, or none, will do.
        None = "verify_none",
        /// A certificate that the authorities vouch for is required.
        Peer = "verify_peer",
    }

    /// The gRPC service that a handler implements.
    pub enum ServiceName {
        /// Each callback is a unary call.
        ConnectionUnaryHandler = "ConnectionUnaryHandler",
        /// Each callback is a client stream.
        ConnectionHandler = "ConnectionHandler",
    }

    /// What becomes of connections while their handler is away.
    pub enum OnUnavailable {
        /// They are kept, and callbacks tried again.
        Hold = "hold",
        /// They are closed.
        Close = "close",
    }

    /// What becomes of connections whose own handler address is away while another is there.
    pub enum Failover {
        /// They wait for it.
        Hold = "hold",
        /// They move.
        Recreate = "recreate",
    }

    /// What happens when a connection's queue is full.
    pub enum QueuePolicy {
        /// The oldest message goes.
        DropOldest = "drop_oldest",
        /// The connection goes.
        Close = "close",
    }

    /// The least that is logged.
    pub enum LogLevel {
        /// Something failed for good.
        Error = "error",
        /// Something is wrong and may heal.
        Warn = "warn",
        /// Start, stop and other rare events.
        Info = "info",
        /// Every connection.
        Debug = "debug",
        /// Every message.
        Trace = "trace",
    }

    /// How a log line looks.
    pub enum LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object.
        Json = "json",
    }
}

/// The version of MQTT spoken with the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// MQTT 3.1.1.
    V4,
    /// MQTT 5.0.
    V5,
}

impl ConfigValue for Protocol {
    fn allowed() -> String {
        "4 or 5".to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        match text.trim() {
            "4" => Ok(Protocol::V4),
            "5" => Ok(Protocol::V5),
            _ => Err(Rejected::new(Self::allowed())),
        }
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        u16::from_value(value)
            .map_err(|_| Rejected::new(Self::allowed()))
            .and_then(|number| Self::from_text(&number.to_string()))
    }

    fn to_text(&self) -> String {
        match self {
            Protocol::V4 => "4".to_owned(),
            Protocol::V5 => "5".to_owned(),
        }
    }

    fn to_toml(&self) -> String {
        self.to_text()
    }
}
