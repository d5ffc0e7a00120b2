//! Where the broker is.

use std::fmt;
use std::str::FromStr;

/// A broker's address and the login for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Broker {
    pub host: String,
    pub port: u16,
    /// User name and password.
    pub login: Option<(String, String)>,
}

/// Without the login.
impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mqtt://{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Broker {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let help = || "mqtt://[USER[:PASSWORD]@]HOST[:PORT] is needed".to_owned();
        let rest = text.strip_prefix("mqtt://").ok_or_else(help)?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        // A password may hold an `@`.
        let (login, address) = match rest.rsplit_once('@') {
            Some((login, address)) => (Some(login), address),
            None => (None, rest),
        };
        let login = login.map(|login| match login.split_once(':') {
            Some((user, password)) => (user.to_owned(), password.to_owned()),
            None => (login.to_owned(), String::new()),
        });
        let (host, port) = match address.rsplit_once(':') {
            // The colon of an IPv6 address stands within brackets.
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| help())?),
            _ => (address, 1883),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(help());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            login,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Broker> {
        text.parse().ok()
    }

    #[test]
    fn addresses_are_read() {
        let login = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        let host = |host: &str, port, login| {
            let host = host.to_owned();
            Some(Broker { host, port, login })
        };
        assert_eq!(parse("mqtt://broker"), host("broker", 1883, None));
        assert_eq!(parse("mqtt://10.0.0.1:1/"), host("10.0.0.1", 1, None));
        assert_eq!(parse("mqtt://[::1]"), host("::1", 1883, None));
        assert_eq!(parse("mqtt://[::1]:2"), host("::1", 2, None));
        assert_eq!(parse("mqtt://u@b"), host("b", 1883, login("u", "")));
        assert_eq!(parse("mqtt://u:p@:1@b:3"), host("b", 3, login("u", "p@:1")));
        for wrong in ["", "broker", "mqtt://", "mqtt://b:x", "http://b"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_login_is_not_shown() {
        let broker: Broker = "mqtt://user:secret@b".parse().unwrap();
        assert_eq!(
            format!("{broker} {broker:?}"),
            "mqtt://b:1883 mqtt://b:1883"
        );
    }
}
