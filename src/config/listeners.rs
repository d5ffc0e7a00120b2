//! The sections of the listeners.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::access::{AccessRules, PeerList};
use super::names::{Mountpoint, Name};
use super::paths::Files;
use super::schema::{Flat, Named, Nested, Within, section};
use super::types::{TICK, Verify};
use super::values::{Limit, Rate, Size};

/// The kinds of listeners, with the names they have in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Plain TCP.
    Tcp,
    /// TLS over TCP.
    Ssl,
    /// UDP.
    Udp,
    /// DTLS over UDP.
    Dtls,
}

impl Kind {
    /// As in `listeners.<kind>`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Ssl => "ssl",
            Self::Udp => "udp",
            Self::Dtls => "dtls",
        }
    }

    /// Whether its sockets are UDP's.
    pub fn is_datagram(self) -> bool {
        matches!(self, Self::Udp | Self::Dtls)
    }
}

section! {
    /// `[listeners]`: where devices connect.
    pub struct Listeners {
        /// Listeners for plain TCP, `[listeners.tcp.NAME]`.
        tcp: BTreeMap<String, TcpListener> = Named {
            required: "bind",
            optional_for: Some("default"),
            built_in: Some("default"),
            reserved: None,
        },

        /// Listeners for TLS over TCP, `[listeners.ssl.NAME]`. For example, with its defaults:
        ssl: BTreeMap<String, SslListener> = LISTENERS,

        /// Listeners for UDP, `[listeners.udp.NAME]`: a connection is a peer's address and port, one
        /// datagram is one OnReceivedBytes, one Send is one datagram. For example, with its defaults:
        udp: BTreeMap<String, UdpListener> = LISTENERS,

        /// Listeners for DTLS 1.2 over UDP, `[listeners.dtls.NAME]`. For example, with its defaults:
        dtls: BTreeMap<String, DtlsListener> = LISTENERS,
    }
}

/// Of a kind of which there is none unless it is configured.
const LISTENERS: Named = Named {
    required: "bind",
    optional_for: Some("default"),
    built_in: None,
    reserved: None,
};

section! {
    /// What listeners of every kind have.
    pub struct ListenerOptions {
        /// Whether it listens: true or false.
        enable: bool = "true",

        /// The handler of its connections: "default" is `[handler]`, NAME is `[handlers.NAME]`.
        handler: Name = "default",

        /// Prefix of every topic, in place of the gateway's. "" for the gateway's.
        mountpoint: Mountpoint = "",

        /// Whether its devices are authenticated, where there is any authentication: true or false;
        /// false lets in every device for which the handler calls Authenticate.
        enable_authn: bool = "true",

        /// The most connections at a time, at least 1, or "infinity".
        max_connections: Limit<usize> = Within("1024000", Limit::Finite(1)..),

        /// The most connections of one IPv4 address or IPv6 /64 at a time, at least 1, or
        /// "infinity".
        max_connections_per_address: Limit<usize> = Within("infinity", Limit::Finite(1)..),

        /// The most new connections, a number per second, or "infinity".
        max_conn_rate: Limit<Rate> = "1000",

        /// Which peers may connect. The first rule that names a peer's address decides:
        /// `["allow 192.168.0.0/24", "deny 10.0.0.1-10.0.0.9", "deny all"]`.
        /// A peer that no rule names may connect, as in EMQX: end with "deny all" to admit only
        /// what is listed.
        access_rules: AccessRules = "allow all",

        /// The most received bytes of each connection, a number per second, or "infinity". Above it
        /// a stream is read more slowly, a datagram is dropped.
        max_bytes_rate: Limit<Rate> = "infinity",

        /// The most reads or datagrams of each connection, a number per second, or "infinity".
        max_messages_rate: Limit<Rate> = "infinity",
    }
}

section! {
    /// The PROXY protocol, of listeners over TCP.
    pub struct ProxyProtocol {
        /// Whether a load balancer in front announces the peer with the PROXY protocol, v1 or v2:
        /// true or false. When true, a connection without it is closed.
        proxy_protocol: bool = "false",

        /// The longest that this announcement takes. A duration.
        proxy_protocol_timeout: Duration = Within("3s", TICK..),

        /// Who may announce peers: addresses, networks and ranges such as "10.0.0.0/8", or "all".
        /// With proxy_protocol, anybody else is turned away.
        proxy_protocol_trusted: PeerList = "all",
    }
}

section! {
    /// `[listeners.tcp.NAME]`: one TCP listener.
    pub struct TcpListener {
        /// IP address and port, such as `"0.0.0.0:7993"` or `"[::]:7993"`; a port alone is every IPv4
        /// address, `[::]` every IPv4 and IPv6 address. Required but for the name default.
        bind: SocketAddr = "0.0.0.0:7993",

        /// What listeners of every kind have.
        common: ListenerOptions = Flat,

        /// The PROXY protocol.
        proxy: ProxyProtocol = Flat,

        /// The sockets.
        tcp_options: TcpOptions = Nested,
    }
}

section! {
    /// `[listeners.ssl.NAME]`: one TLS listener.
    pub struct SslListener {
        /// IP address and port. Required but for the name default.
        bind: SocketAddr = "0.0.0.0:7994",

        /// What listeners of every kind have.
        common: ListenerOptions = Flat,

        /// The PROXY protocol.
        proxy: ProxyProtocol = Flat,

        /// The sockets.
        tcp_options: TcpOptions = Nested,

        /// TLS 1.2 and 1.3.
        ssl_options: SslOptions = Nested,
    }
}

section! {
    /// `[listeners.udp.NAME]`: one UDP listener.
    pub struct UdpListener {
        /// IP address and port. Required but for the name default.
        bind: SocketAddr = "0.0.0.0:7993",

        /// What listeners of every kind have.
        common: ListenerOptions = Flat,

        /// The sockets.
        udp_options: UdpOptions = Nested,

        /// A datagram that is answered at once, without a connection and without a callback: for
        /// load balancers.
        health_check: HealthCheck = Nested,
    }
}

section! {
    /// `[listeners.dtls.NAME]`: one DTLS listener.
    pub struct DtlsListener {
        /// IP address and port. Required but for the name default.
        bind: SocketAddr = "0.0.0.0:7995",

        /// What listeners of every kind have.
        common: ListenerOptions = Flat,

        /// The sockets.
        udp_options: UdpOptions = Nested,

        /// DTLS 1.2.
        dtls_options: DtlsOptions = Nested,
    }
}

section! {
    /// Options of TCP sockets.
    pub struct TcpOptions {
        /// The most connections that wait to be accepted, 1 to 65535.
        backlog: u32 = Within("1024", 1..=65535),

        /// Whether small writes are sent at once (TCP_NODELAY): true or false.
        nodelay: bool = "true",

        /// A device that takes nothing of what is written to it for so long is disconnected,
        /// reason send_timeout. A duration.
        send_timeout: Duration = Within("15s", TICK..),

        /// The most bytes that wait to be written to one device before Send waits. A size.
        high_watermark: Size = Within("1MiB", Size::new(1)..),

        /// The kernel's receive buffer (SO_RCVBUF). A size; "" leaves it to the system.
        recbuf: Option<Size> = "",

        /// The kernel's send buffer (SO_SNDBUF). A size; "" leaves it to the system.
        sndbuf: Option<Size> = "",
    }
}

section! {
    /// Options of UDP sockets.
    pub struct UdpOptions {
        /// The most datagrams that wait for one connection's handler, at least 1; further ones are
        /// dropped.
        queue_max_datagrams: usize = Within("64", 1..),

        /// The most bytes of them. A size.
        queue_max_bytes: Size = Within("256KiB", Size::new(1)..),

        /// The most bytes that wait to be sent to one device before Send waits. A size.
        high_watermark: Size = Within("256KiB", Size::new(1)..),

        /// The kernel's receive buffer (SO_RCVBUF) of each of the listener's sockets, of which every
        /// shard has one. A size; "" leaves it to the system.
        recbuf: Option<Size> = "1MiB",

        /// The kernel's send buffer (SO_SNDBUF). A size; "" leaves it to the system.
        sndbuf: Option<Size> = "",
    }
}

section! {
    /// A datagram that is answered without a callback.
    pub struct HealthCheck {
        /// The whole content of such a datagram. "" for none.
        request: String = "",

        /// The answer. Keep it short: whoever asks may have forged the address it goes to.
        reply: String = "",
    }
}

section! {
    /// TLS towards devices.
    pub struct SslOptions {
        /// PEM file with the certificate chain, or a list of them: a device gets the one for the
        /// server name it asks for and whose key it can use, else the first. Required.
        certfile: Files = "",

        /// PEM file with the certificate's private key, or a list in the same order. Required.
        keyfile: Files = "",

        /// PEM file with the authorities that devices' certificates are checked with. "" for none.
        cacertfile: Files = "",

        /// "verify_none", or "verify_peer": a device's certificate must be one that cacertfile
        /// vouches for.
        verify: Verify = "verify_none",

        /// With "verify_peer": whether a device without a certificate is turned away.
        fail_if_no_peer_cert: bool = "false",

        /// The longest that the handshake takes. A duration.
        handshake_timeout: Duration = Within("15s", TICK..),

        /// The most handshakes under way at a time, at least 1. Beyond it the one that has been
        /// stuck for longest, three seconds at least, gives way; else further ones wait.
        max_handshakes: usize = Within("1000", 1..),
    }
}

section! {
    /// DTLS towards devices.
    pub struct DtlsOptions {
        /// PEM file with the certificate chain, or a list of them, one for each kind of key (ECDSA,
        /// RSA). "" with a psk_file alone.
        certfile: Files = "",

        /// PEM file with the certificate's private key, or a list in the same order.
        keyfile: Files = "",

        /// PEM file with the authorities that devices' certificates are checked with. "" for none.
        cacertfile: Files = "",

        /// File with the devices' pre-shared keys: a line is IDENTITY:KEY, the key in hexadecimal.
        /// "" for none.
        psk_file: Option<PathBuf> = "",

        /// "verify_none", or "verify_peer": a device's certificate must be one that cacertfile
        /// vouches for.
        verify: Verify = "verify_none",

        /// With "verify_peer": whether a device without a certificate is turned away. One with a
        /// pre-shared key is not.
        fail_if_no_peer_cert: bool = "false",

        /// The longest that the handshake takes. A duration.
        handshake_timeout: Duration = Within("15s", TICK..),

        /// The most handshakes under way at a time, at least 1. Beyond it the one that has been
        /// stuck for longest, three seconds at least, gives way; else a device's attempts are
        /// dropped, and it tries again.
        max_handshakes: usize = Within("1000", 1..),
    }
}

/// A listener of any kind, as far as all are the same.
#[derive(Debug, Clone, Copy)]
pub struct ListenerView<'a> {
    /// Its kind.
    pub kind: Kind,
    /// NAME in `[listeners.<kind>.NAME]`.
    pub name: &'a str,
    /// Address and port.
    pub bind: SocketAddr,
    /// What listeners of every kind have.
    pub common: &'a ListenerOptions,
}

impl ListenerView<'_> {
    /// `<kind>.<name>`.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.kind.name(), self.name)
    }

    /// The table of its keys.
    pub fn key(&self) -> String {
        format!("listeners.{}", self.full_name())
    }
}

impl Listeners {
    /// All of them, those that are not enabled too.
    pub fn all(&self) -> impl Iterator<Item = ListenerView<'_>> {
        macro_rules! views {
            ($map:expr, $kind:expr) => {
                $map.iter().map(|(name, listener)| ListenerView {
                    kind: $kind,
                    name,
                    bind: listener.bind,
                    common: &listener.common,
                })
            };
        }
        views!(self.tcp, Kind::Tcp)
            .chain(views!(self.ssl, Kind::Ssl))
            .chain(views!(self.udp, Kind::Udp))
            .chain(views!(self.dtls, Kind::Dtls))
    }

    /// Those that are enabled.
    pub fn enabled(&self) -> impl Iterator<Item = ListenerView<'_>> {
        self.all().filter(|listener| listener.common.enable)
    }
}
