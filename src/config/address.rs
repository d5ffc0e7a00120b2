//! Addresses: where to listen, where the handler and the broker are.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use figment::value::Value;

use super::value::{ConfigValue, Rejected, whole};

impl ConfigValue for SocketAddr {
    fn allowed() -> String {
        "an IP address and port such as \"0.0.0.0:7993\" or \"[::]:7993\", or a port alone for every IPv4 address"
            .to_owned()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        let text = text.trim();
        let port = text.strip_prefix(':').unwrap_or(text);
        text.parse()
            .ok()
            .or_else(|| {
                Some(SocketAddr::from((
                    Ipv4Addr::UNSPECIFIED,
                    port.parse().ok()?,
                )))
            })
            .ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        let port = match value {
            Value::String(_, text) => return Self::from_text(text),
            Value::Num(_, n) => whole(n).and_then(|n| u16::try_from(n).ok()),
            _ => None,
        };
        port.map(|port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
            .ok_or_else(|| Rejected::new(Self::allowed()))
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

/// Whether two sockets of one transport cannot be bound at once.
///
/// Port 0 is a fresh port each time. `[::]` takes IPv4 too: that is the default of Linux.
pub(crate) fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let takes_all = |ip: IpAddr| ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let same_family = a.is_ipv4() == b.is_ipv4();
    a.port() != 0
        && a.port() == b.port()
        && (a.ip() == b.ip()
            || takes_all(a.ip())
            || takes_all(b.ip())
            || (same_family && (a.ip().is_unspecified() || b.ip().is_unspecified())))
}

/// Scheme, host and port of a URL.
struct Endpoint {
    tls: bool,
    host: String,
    port: u16,
}

/// Why a URL is not an endpoint.
enum NoEndpoint {
    UserInfo,
    Other,
}

/// Reads `scheme://host[:port]` with at most a `/` behind it. Each scheme comes with its port.
fn endpoint(text: &str, plain: (&str, u16), tls: (&str, u16)) -> Result<Endpoint, NoEndpoint> {
    let (scheme, authority) = text.trim().split_once("://").ok_or(NoEndpoint::Other)?;
    let (secure, default_port) = if scheme.eq_ignore_ascii_case(plain.0) {
        (false, plain.1)
    } else if scheme.eq_ignore_ascii_case(tls.0) {
        (true, tls.1)
    } else {
        return Err(NoEndpoint::Other);
    };
    if authority.contains('@') {
        return Err(NoEndpoint::UserInfo);
    }
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let (host, port) = split_host(authority).ok_or(NoEndpoint::Other)?;
    let port = match port {
        None => default_port,
        Some(digits) => port_number(digits).ok_or(NoEndpoint::Other)?,
    };
    Ok(Endpoint {
        tls: secure,
        host,
        port,
    })
}

fn split_host(authority: &str) -> Option<(String, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        let port = match rest {
            "" => None,
            rest => Some(rest.strip_prefix(':')?),
        };
        return Some((host.parse::<Ipv6Addr>().ok()?.to_string(), port));
    }
    let (host, port) = match authority.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    // `_` is no host name by RFC 952, but Compose and Kubernetes users have it in service names.
    let is_host = (1..=253).contains(&host.len())
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    is_host.then(|| (host.to_owned(), port))
}

fn port_number(digits: &str) -> Option<u16> {
    let all_digits = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|port| all_digits && *port != 0)
}

macro_rules! url {
    (
        $(#[$attribute:meta])* $name:ident, $plain:expr, $tls:expr,
        allowed: $allowed:literal, user_info: $user_info:literal
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub struct $name {
            /// Whether the scheme asks for TLS.
            pub tls: bool,
            /// A host name or an IP address; IPv6 without its brackets.
            pub host: String,
            /// The port, never 0.
            pub port: u16,
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let scheme = if self.tls { $tls.0 } else { $plain.0 };
                if self.host.contains(':') {
                    write!(f, "{scheme}://[{}]:{}", self.host, self.port)
                } else {
                    write!(f, "{scheme}://{}:{}", self.host, self.port)
                }
            }
        }

        impl ConfigValue for $name {
            fn allowed() -> String {
                $allowed.to_owned()
            }

            fn from_text(text: &str) -> Result<Self, Rejected> {
                match endpoint(text, $plain, $tls) {
                    Ok(Endpoint { tls, host, port }) => Ok($name { tls, host, port }),
                    Err(NoEndpoint::UserInfo) => Err(Rejected::new(concat!($allowed, "; ", $user_info))),
                    Err(NoEndpoint::Other) => Err(Rejected::new($allowed)),
                }
            }

            fn to_text(&self) -> String {
                self.to_string()
            }
        }
    };
}

url! {
    /// The address of a user's handler service on the network.
    HandlerUrl, ("http", 80), ("https", 443),
    allowed: "http://HOST:PORT or https://HOST:PORT, IPv6 in brackets, without path or query, or unix:/PATH",
    user_info: "user and password are not supported here"
}

/// The longest path of a Unix socket, in bytes: `sun_path` of unix(7) without its NUL.
const MAX_SOCKET_PATH: usize = 107;

/// The path in `unix:/PATH`; nothing where `text` does not begin like one.
fn socket_path(text: &str) -> Option<Result<PathBuf, Rejected>> {
    let path = text.trim().strip_prefix("unix:")?;
    // gRPC writes an absolute path either way.
    let path = match path.strip_prefix("//") {
        Some(absolute) if absolute.starts_with('/') => absolute,
        _ => path,
    };
    let is_path = path.starts_with('/') && !path.starts_with("//") && !path.ends_with('/');
    if !is_path || path.len() > MAX_SOCKET_PATH || path.contains('\0') {
        return Some(Err(Rejected::new(format!(
            "unix:/PATH with an absolute path of at most {MAX_SOCKET_PATH} bytes"
        ))));
    }
    Some(Ok(path.into()))
}

/// Where the adapter listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AdapterBind {
    /// A TCP port.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl AdapterBind {
    /// The TCP port, if it is one.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for AdapterBind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ConfigValue for AdapterBind {
    fn allowed() -> String {
        format!("{}, or unix:/PATH", SocketAddr::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        if let Some(path) = socket_path(text) {
            return path.map(Self::Unix);
        }
        SocketAddr::from_text(text)
            .map(Self::Tcp)
            .map_err(|_| Rejected::new(Self::allowed()))
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        match value {
            Value::String(_, text) => Self::from_text(text),
            value => SocketAddr::from_value(value)
                .map(Self::Tcp)
                .map_err(|_| Rejected::new(Self::allowed())),
        }
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

/// The address of a user's handler service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HandlerAddress {
    /// A TCP port, perhaps with TLS.
    Url(HandlerUrl),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl HandlerAddress {
    /// Whether the channel is encrypted.
    pub fn uses_tls(&self) -> bool {
        matches!(self, Self::Url(url) if url.tls)
    }
}

impl fmt::Display for HandlerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ConfigValue for HandlerAddress {
    fn allowed() -> String {
        HandlerUrl::allowed()
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        match socket_path(text) {
            Some(path) => path.map(Self::Unix),
            None => HandlerUrl::from_text(text).map(Self::Url),
        }
    }

    fn to_text(&self) -> String {
        self.to_string()
    }
}

url! {
    /// The address of the MQTT broker.
    BrokerUrl, ("mqtt", 1883), ("mqtts", 8883),
    allowed: "mqtt://HOST:PORT or mqtts://HOST:PORT, IPv6 in brackets, without path or query",
    user_info: "user and password belong in broker.username and broker.password or broker.password_file"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(text: &str) -> Option<String> {
        BrokerUrl::from_text(text).ok().map(|url| url.to_string())
    }

    #[test]
    fn urls_have_default_ports_and_brackets() {
        assert_eq!(
            broker("mqtt://broker").as_deref(),
            Some("mqtt://broker:1883")
        );
        assert_eq!(
            broker("MQTTS://b.example/").as_deref(),
            Some("mqtts://b.example:8883")
        );
        assert_eq!(
            broker("mqtt://[::1]:18830").as_deref(),
            Some("mqtt://[::1]:18830")
        );
        let handler = HandlerAddress::from_text("https://my_svc").unwrap();
        assert_eq!(handler.to_string(), "https://my_svc:443");
    }

    #[test]
    fn handlers_may_listen_on_a_path() {
        let text = |text: &str| HandlerAddress::from_text(text).map(|a| a.to_string());
        for same in ["unix:/run/x.sock", " unix:///run/x.sock "] {
            assert_eq!(text(same).as_deref(), Ok("unix:/run/x.sock"));
        }
        let long = format!("unix:/{}", "x".repeat(MAX_SOCKET_PATH));
        for bad in ["unix:", "unix:x", "unix://x", "unix:/", "unix:/x/", &long] {
            let refused = HandlerAddress::from_text(bad).unwrap_err();
            assert!(refused.allowed.starts_with("unix:/PATH"), "{bad:?}");
        }
        assert!(text("unix").is_err());
    }

    #[test]
    fn the_adapter_may_listen_on_a_path() {
        let text = |text: &str| AdapterBind::from_text(text).map(|a| a.to_string());
        assert_eq!(
            text("unix:///run/x.sock").as_deref(),
            Ok("unix:/run/x.sock")
        );
        assert_eq!(text(":9100").as_deref(), Ok("0.0.0.0:9100"));
        for bad in ["unix:x", "http://127.0.0.1:9100", "localhost:9100", ""] {
            let refused = text(bad).unwrap_err();
            assert!(refused.allowed.contains("unix:/PATH"), "{bad:?}");
        }
        let port = AdapterBind::from_value(&Value::from(9100_u16)).map(|bind| bind.tcp());
        assert_eq!(
            port,
            Ok(Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9100))))
        );
    }

    #[test]
    fn urls_that_say_more_or_less_are_refused() {
        for bad in [
            "",
            "broker:1883",
            "http://broker",
            "mqtt://",
            "mqtt://:1883",
            "mqtt://b:0",
            "mqtt://b:+1",
            "mqtt://b:65536",
            "mqtt://b/path",
            "mqtt://b?x=1",
            "mqtt://u:p@b",
            "mqtt://::1",
            "mqtt://[::1",
            "mqtt://[::1]x",
            "mqtt://a b",
        ] {
            assert_eq!(broker(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_bind_may_leave_out_the_address() {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7993));
        for text in ["0.0.0.0:7993", ":7993", "7993"] {
            assert_eq!(SocketAddr::from_text(text), Ok(any));
        }
        for bad in ["", ":", "localhost:7993", "0.0.0.0", "70000"] {
            assert!(SocketAddr::from_text(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn wildcard_addresses_collide() {
        let collide = |a: &str, b: &str| collide(a.parse().unwrap(), b.parse().unwrap());
        assert!(collide("0.0.0.0:1", "127.0.0.1:1"));
        assert!(collide("[::]:1", "127.0.0.1:1"));
        assert!(!collide("0.0.0.0:1", "[::1]:1"));
        assert!(!collide("127.0.0.2:1", "127.0.0.1:1"));
        assert!(!collide("0.0.0.0:0", "0.0.0.0:0"));
    }
}
