//! The sections of the listeners.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::access::AccessRules;
use super::names::{Mountpoint, Name};
use super::schema::{Named, Nested, Within, section};
use super::types::TICK;
use super::values::{Limit, Rate, Size};

section! {
    /// `[listeners]`: where devices connect.
    pub struct Listeners {
        /// Listeners for plain TCP, `[listeners.tcp.NAME]`. `bind` is required but for tcp.default.
        tcp: BTreeMap<String, TcpListener> =
            Named { required: "bind", built_in: Some("default"), reserved: None },
    }
}

section! {
    /// `[listeners.tcp.NAME]`: one TCP listener.
    pub struct TcpListener {
        /// IP address and port, such as `"0.0.0.0:7993"` or `"[::]:7993"`; a port alone is every IPv4
        /// address.
        bind: SocketAddr = "0.0.0.0:7993",

        /// Whether it listens: true or false.
        enable: bool = "true",

        /// The handler of its connections: "default" is `[handler]`, NAME is `[handlers.NAME]`.
        handler: Name = "default",

        /// Prefix of every topic, in place of the gateway's. "" for the gateway's.
        mountpoint: Mountpoint = "",

        /// The most connections at a time, at least 1, or "infinity".
        max_connections: Limit<usize> = Within("1024000", Limit::Finite(1)..),

        /// The most new connections, a number per second, or "infinity".
        max_conn_rate: Limit<Rate> = "1000",

        /// Which peers may connect. The first rule that names a peer's address decides:
        /// `["allow 192.168.0.0/24", "deny 10.0.0.1-10.0.0.9", "deny all"]`.
        /// A peer that no rule names may connect, as in EMQX: end with "deny all" to admit only
        /// what is listed.
        access_rules: AccessRules = "allow all",

        /// Whether a load balancer in front announces the peer with the PROXY protocol, v1 or v2:
        /// true or false. When true, a connection without it is closed.
        proxy_protocol: bool = "false",

        /// The longest that this announcement takes. A duration.
        proxy_protocol_timeout: Duration = Within("3s", TICK..),

        /// The most received bytes of each connection, a number per second, or "infinity".
        max_bytes_rate: Limit<Rate> = "infinity",

        /// The most reads of each connection, a number per second, or "infinity".
        max_messages_rate: Limit<Rate> = "infinity",

        /// The sockets.
        tcp_options: TcpOptions = Nested,
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
