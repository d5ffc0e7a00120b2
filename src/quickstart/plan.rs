//! What quickstart is to listen on, and whether it can: everything is tried before
//! anything starts, and all that is in the way is told at once.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use crate::config::{Config, HandlerAddress, Kind, ServiceName};
use crate::options;

/// How far from a taken port another is suggested, and how many are tried.
const STEP: u16 = 10_000;
const SUGGESTIONS: u16 = 100;

/// Where things go.
pub(super) struct Plan {
    /// The embedded broker.
    pub(super) broker: SocketAddr,
    /// The built-in handler, bound and not blocking.
    pub(super) handlers: Vec<TcpListener>,
    /// The listener of the own device, `tcp.<name>`.
    pub(super) device_listener: String,
}

/// Something that is in the way, and the setting that takes it out of it.
struct Fault {
    problem: String,
    setting: Option<(String, String)>,
}

/// An address that somebody will listen on.
struct Need {
    address: SocketAddr,
    what: String,
    key: String,
    /// What stands before the address in the key's value.
    scheme: &'static str,
}

impl Need {
    fn new(address: SocketAddr, what: &str, key: &str, scheme: &'static str) -> Self {
        Self {
            address,
            what: what.to_owned(),
            key: key.to_owned(),
            scheme,
        }
    }
}

impl Plan {
    /// Looks at the configuration, and binds every address once.
    ///
    /// # Errors
    /// All that is in the way, in one text for a person.
    pub(super) fn make(config: &Config) -> anyhow::Result<Self> {
        let mut faults = Vec::new();
        let mut needs = Vec::new();
        let broker = broker(config, &mut faults);
        needs.extend(
            broker.map(|address| Need::new(address, "MQTT broker", "broker.url", "mqtt://")),
        );
        let handlers = handlers(config, &mut faults);
        let handler_addresses: BTreeSet<_> = handlers.iter().map(|need| need.address).collect();
        let mut wanted = handler_addresses.clone();
        // Two handlers may have one address: they are one here.
        needs.extend(
            handlers
                .into_iter()
                .filter(|need| wanted.remove(&need.address)),
        );
        if config.server.ssl_options.enable {
            faults.push(Fault {
                problem: "server.ssl_options: the built-in handler calls the adapter without TLS"
                    .to_owned(),
                setting: Some(setting("server.ssl_options.enable", "false")),
            });
        }
        match config.server.bind.tcp() {
            Some(bind) => needs.push(Need::new(bind, "adapter", "server.bind", "")),
            None => faults.push(Fault {
                problem: "server.bind: the built-in handler calls the adapter over TCP".to_owned(),
                setting: Some(setting("server.bind", "127.0.0.1:9100")),
            }),
        }
        if let Some(address) = config.admin.bind {
            needs.push(Need::new(address, "admin", "admin.bind", ""));
        }
        let mut device_listener = None;
        for listener in config.listeners.enabled() {
            if listener.kind.is_datagram() {
                continue;
            }
            let key = format!("{}.bind", listener.key());
            needs.push(Need::new(listener.bind, "devices", &key, ""));
            let plain = config.listeners.tcp.get(listener.name);
            if listener.kind == Kind::Tcp && plain.is_some_and(|tcp| !tcp.proxy.proxy_protocol) {
                device_listener.get_or_insert(listener.full_name());
            }
        }
        if device_listener.is_none() {
            faults.push(Fault {
                problem: "listeners: a TCP listener is needed, enabled and without proxy_protocol"
                    .to_owned(),
                setting: None,
            });
        }
        let bound = bind(&needs, &mut faults);
        match (broker, device_listener) {
            (Some(broker), Some(device_listener)) if faults.is_empty() => Ok(Self {
                broker,
                handlers: bound
                    .into_iter()
                    .filter(|(address, _)| handler_addresses.contains(address))
                    .map(|(_, listener)| listener)
                    .collect(),
                device_listener,
            }),
            _ => Err(anyhow::Error::msg(report(&faults))),
        }
    }
}

fn setting(key: &str, value: &str) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

fn broker(config: &Config, faults: &mut Vec<Fault>) -> Option<SocketAddr> {
    let url = match config.broker.url.as_slice() {
        [url] => Some(url),
        _ => None,
    };
    let address = url.and_then(|url| {
        let address = loopback(&url.host).filter(|_| !url.tls);
        address.map(|address| SocketAddr::new(address, url.port))
    });
    if address.is_none() {
        let urls: Vec<String> = config.broker.url.iter().map(ToString::to_string).collect();
        let urls = urls.join(",");
        faults.push(Fault {
            problem: format!(
                "broker.url is {urls}: quickstart brings a broker of its own, on this machine and \
                 without TLS (the command run uses one that is there)"
            ),
            setting: Some(setting("broker.url", "mqtt://127.0.0.1:1883")),
        });
    }
    address
}

/// The first address of every handler that a listener uses: one is enough for the
/// gateway to be ready.
fn handlers(config: &Config, faults: &mut Vec<Fault>) -> Vec<Need> {
    let listeners = config.listeners.enabled();
    let names: BTreeSet<&str> = listeners
        .map(|listener| &*listener.common.handler)
        .collect();
    let mut needs = Vec::new();
    for name in names {
        let Some(handler) = config.handler_named(name) else {
            continue;
        };
        let table = options::handler_key(name);
        let key = format!("{table}.address");
        if handler.service_name == ServiceName::ConnectionHandler {
            let key = format!("{table}.service_name");
            faults.push(Fault {
                problem: format!(
                    "{key} is ConnectionHandler: the built-in handler serves ConnectionUnaryHandler"
                ),
                setting: Some(setting(&key, "ConnectionUnaryHandler")),
            });
        }
        let Some(first) = handler.address.first() else {
            continue;
        };
        let plain = match first {
            HandlerAddress::Url(url) if !url.tls => Some(url),
            HandlerAddress::Url(_) | HandlerAddress::Unix(_) => None,
        };
        match plain.and_then(|url| Some((loopback(&url.host)?, url.port))) {
            Some((ip, port)) => {
                let address = SocketAddr::new(ip, port);
                needs.push(Need::new(address, "handler", &key, "http://"));
            }
            None => faults.push(Fault {
                problem: format!(
                    "{key} is {first}: quickstart brings a handler of its own, on this machine \
                     and without TLS (the command run uses one that is there)"
                ),
                setting: Some(setting(&key, "http://127.0.0.1:9001")),
            }),
        }
    }
    needs
}

/// The address that `host` names, if it is this machine's alone.
fn loopback(host: &str) -> Option<IpAddr> {
    if host.eq_ignore_ascii_case("localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    host.parse().ok().filter(IpAddr::is_loopback)
}

/// Binds what can be bound, all of it at once: two needs may be in each other's way.
fn bind(needs: &[Need], faults: &mut Vec<Fault>) -> Vec<(SocketAddr, TcpListener)> {
    let mut bound: Vec<(SocketAddr, TcpListener)> = Vec::new();
    let mut suggested = Vec::new();
    for need in needs {
        let Need { address, key, .. } = need;
        let error = match listen(*address) {
            Ok(listener) => {
                bound.push((*address, listener));
                continue;
            }
            Err(error) => error,
        };
        let rival = needs.iter().find(|other| {
            other.address.port() == address.port() && bound.iter().any(|b| b.0 == other.address)
        });
        let why = match (error.kind(), rival) {
            (io::ErrorKind::AddrInUse, Some(rival)) => {
                format!("wanted for {} ({}) too", rival.what, rival.key)
            }
            (io::ErrorKind::AddrInUse, None) => "taken by another program".to_owned(),
            (io::ErrorKind::PermissionDenied, _) => "not allowed to this user".to_owned(),
            (io::ErrorKind::AddrNotAvailable, _) => "not an address of this machine".to_owned(),
            _ => error.to_string(),
        };
        let other = another(need, &suggested);
        suggested.push(other.port());
        faults.push(Fault {
            problem: format!("{address} for {} ({key}): {why}", need.what),
            setting: Some(setting(key, &format!("{}{other}", need.scheme))),
        });
    }
    bound
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A free address that can be suggested in place of one that is not.
fn another(need: &Need, suggested: &[u16]) -> SocketAddr {
    let (address, mut ip) = (need.address, need.address.ip());
    if TcpListener::bind((ip, 0)).is_err() {
        ip = Ipv4Addr::LOCALHOST.into();
    }
    let base = address.port();
    let first = base.checked_add(STEP).unwrap_or_else(|| base - STEP);
    let candidates = (first..first.saturating_add(SUGGESTIONS)).filter(|p| !suggested.contains(p));
    let free = |port: &u16| TcpListener::bind((ip, *port)).is_ok();
    SocketAddr::new(ip, candidates.clone().find(free).unwrap_or(first))
}

fn report(faults: &[Fault]) -> String {
    let mut text = String::from("quickstart cannot start:\n\n");
    let mut arguments = String::new();
    for fault in faults {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {}", fault.problem);
        if let Some((key, value)) = &fault.setting {
            let variable = key.replace('.', "__").to_ascii_uppercase();
            let _ = writeln!(text, "      EXPROTO_{variable}={value}");
            let _ = write!(arguments, " --set {key}={value}");
        }
    }
    if !arguments.is_empty() {
        let _ = write!(
            text,
            "\nThe variables above choose what would do. The same as arguments:\n\n \
             {arguments}\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AdapterBind;

    fn faults_of(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        match Plan::make(&config) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_configuration_for_others_is_refused_with_a_way_out() {
        let report = faults_of(|config| {
            config.broker.url[0].host = "10.0.0.7".to_owned();
            config.server.ssl_options.enable = true;
            config.handler.service_name = ServiceName::ConnectionHandler;
            for address in &mut config.handler.address {
                if let HandlerAddress::Url(url) = address {
                    url.tls = true;
                }
            }
            for listener in config.listeners.tcp.values_mut() {
                listener.proxy.proxy_protocol = true;
            }
        });
        for text in [
            "broker.url is mqtt://10.0.0.7:1883",
            "EXPROTO_BROKER__URL=mqtt://127.0.0.1:1883",
            "EXPROTO_SERVER__SSL_OPTIONS__ENABLE=false",
            "--set handler.service_name=ConnectionUnaryHandler",
            "handler.address is https://127.0.0.1:9001",
            "EXPROTO_HANDLER__ADDRESS=http://127.0.0.1:9001",
            "without proxy_protocol",
        ] {
            assert!(report.contains(text), "{text:?} is not in:\n{report}");
        }
    }

    #[test]
    fn addresses_of_ones_own_may_be_in_the_way() -> io::Result<()> {
        let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let report = faults_of(|config| {
            config.server.bind = AdapterBind::Tcp(free);
            config.admin.bind = Some(free);
        });
        let text = format!("{free} for admin (admin.bind): wanted for adapter (server.bind) too");
        assert!(report.contains(&text), "{report}");
        Ok(())
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "LocalHost", "127.0.0.1", "127.1.2.3", "::1"] {
            assert!(loopback(host).is_some(), "{host}");
        }
        for host in ["0.0.0.0", "::", "10.0.0.7", "broker", "localhost.example"] {
            assert_eq!(loopback(host), None, "{host}");
        }
    }
}
