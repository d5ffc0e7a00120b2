//! Checks that look at more than one key, or at the file system.

mod placeholders;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::address::{AdapterBind, HandlerAddress, collide};
use super::auth::Authenticator;
use super::authz::RuleSource;
use super::layers::Layers;
use super::paths::Files;
use super::report::{Fault, Origin};
use super::template::{Piece, TemplateTable};
use super::types::{
    Broker, BrokerMode, ClientTls, Config, Failover, Handler, OnUnavailable, Protocol, Server,
    ServerTls, ServiceName, Verify, Will,
};
use super::value::ConfigValue;
use super::values::{Limit, Secret};

/// Looks at what the sections cannot see by themselves, and reads the password file.
pub(crate) fn check(config: &mut Config, layers: &Layers, faults: &mut Vec<Fault>) {
    let mut checks = Checks { layers, faults };
    checks.addresses(config);
    checks.handler_names(config);
    checks.adapter(&config.server);
    checks.server_tls("server.ssl_options", &config.server.ssl_options);
    checks.device_tls(config);
    checks.health_checks(config);
    checks.handler("handler", &config.handler);
    for (name, handler) in &config.handlers {
        checks.handler(&format!("handlers.{name}"), handler);
    }
    checks.isolation(config);
    checks.broker(config);
    checks.placeholders(config);
    for (number, authenticator) in &mut config.authentication {
        let mode = config.broker.mode;
        checks.authenticator(&format!("authentication.{number}"), authenticator, mode);
    }
    for (number, source) in &config.authorization.sources {
        if let RuleSource::Http(service) = source {
            let table = format!("authorization.sources.{number}");
            let tls = service.url.tls;
            checks.client_tls(&table, &service.ssl_options, tls, "url", "https://");
            checks.headers(&table, &service.headers);
        }
    }
}

struct Checks<'a> {
    layers: &'a Layers,
    faults: &'a mut Vec<Fault>,
}

impl Checks<'_> {
    fn fault(&mut self, key: &str, problem: impl Into<String>) {
        self.faults
            .push(Fault::new(self.layers.origin_of(key), key, problem));
    }

    /// Whether a value was at fault already. Its default stands in for it, and what that leads to
    /// would only mislead.
    fn spoiled(&self, key: &str) -> bool {
        self.faults.iter().any(|fault| fault.key() == key)
    }

    fn addresses(&mut self, config: &Config) {
        let adapter = config.server.bind.tcp();
        let mut streams: Vec<(String, SocketAddr)> = Vec::new();
        streams.extend(adapter.map(|bind| ("server.bind".to_owned(), bind)));
        streams.extend(
            config
                .admin
                .bind
                .map(|bind| ("admin.bind".to_owned(), bind)),
        );
        let mut datagrams = Vec::new();
        for listener in config.listeners.enabled() {
            let bound = (format!("{}.bind", listener.key()), listener.bind);
            match listener.kind.is_datagram() {
                false => streams.push(bound),
                true => datagrams.push(bound),
            }
        }
        self.distinct(streams);
        self.distinct(datagrams);
    }

    /// TCP and UDP have ports of their own.
    fn distinct(&mut self, mut bound: Vec<(String, SocketAddr)>) {
        bound.retain(|(key, _)| !self.spoiled(key));
        for (index, (key, address)) in bound.iter().enumerate() {
            let earlier = bound.iter().take(index);
            for (other, other_address) in earlier.filter(|(_, other)| collide(*address, *other)) {
                // The default is rarely the one to change.
                let (key, address, other, other_address) = match self.layers.origin_of(key) {
                    Origin::Default => (other, other_address, key, address),
                    _ => (key, address, other, other_address),
                };
                let origin = self.layers.origin_of(other);
                self.fault(
                    key,
                    format!(
                        "found {address}, but {other} has {other_address} ({origin}); allowed: an address that \
                         no other listener, server.bind or admin.bind has"
                    ),
                );
            }
        }
    }

    fn handler_names(&mut self, config: &Config) {
        for listener in config.listeners.all() {
            let (key, handler) = (
                format!("{}.handler", listener.key()),
                &listener.common.handler,
            );
            if config.handler_named(handler).is_none() && !self.spoiled(&key) {
                let names: Vec<&str> = std::iter::once("default")
                    .chain(config.handlers.keys().map(String::as_str))
                    .collect();
                self.fault(
                    &key,
                    format!(
                        "found {:?}, which is no handler; allowed: {}",
                        &**handler,
                        names.join(", ")
                    ),
                );
            }
        }
    }

    fn handler(&mut self, table: &str, handler: &Handler) {
        let tls = handler.address.iter().any(HandlerAddress::uses_tls);
        self.client_tls(table, &handler.ssl_options, tls, "address", "https://");
        let service_name = format!("{table}.service_name");
        if handler.streaming
            && handler.service_name == ServiceName::ConnectionUnaryHandler
            && !self.spoiled(&service_name)
        {
            self.fault(
                &format!("{table}.streaming"),
                format!(
                    "found true with {service_name} = \"ConnectionUnaryHandler\"; allowed: with \"ConnectionHandler\", or false"
                ),
            );
        }
        let repeated = handler.address.iter().enumerate().find(|(index, address)| {
            let mut earlier = handler.address.iter().take(*index);
            earlier.any(|other| other == *address)
        });
        if let Some((_, address)) = repeated {
            let key = format!("{table}.address");
            self.fault(
                &key,
                format!("found {address} twice; allowed: each address once"),
            );
        }
        if handler.failover == Failover::Recreate {
            self.failover(table, handler);
            if handler.streaming && !self.spoiled(&format!("{table}.streaming")) {
                let failover = format!("{table}.failover");
                self.fault(
                    &failover,
                    format!(
                        "found \"recreate\", but {table}.streaming is true; allowed: with false only"
                    ),
                );
            }
        }
    }

    /// A connection that is closed before it may move never does.
    fn failover(&mut self, table: &str, handler: &Handler) {
        let [failover, after, outage] =
            ["failover", "failover_after", "max_outage"].map(|name| format!("{table}.{name}"));
        if handler.on_unavailable == OnUnavailable::Close {
            self.fault(
                &failover,
                format!(
                    "found \"recreate\", but {table}.on_unavailable is \"close\"; allowed: with \"hold\" only"
                ),
            );
        } else if let Limit::Finite(limit) = handler.max_outage
            && handler.failover_after >= limit
            && !self.spoiled(&after)
            && !self.spoiled(&outage)
        {
            let (found, limit) = (handler.failover_after.to_text(), limit.to_text());
            // The default is rarely the one to change.
            if self.layers.origin_of(&after) == Origin::Default {
                self.fault(
                    &outage,
                    format!("found {limit}; allowed: more than {after}, which is {found}"),
                );
            } else {
                self.fault(
                    &after,
                    format!("found {found}; allowed: less than {outage}, which is {limit}"),
                );
            }
        }
    }

    /// What does not go with the mode.
    fn broker_mode(&mut self, broker: &Broker) {
        // Where they stand makes no difference: `check` prints the defaults, too.
        let default = Config::default().broker;
        let messages = broker.session_outbox_max_messages;
        let bytes = broker.session_outbox_max_bytes;
        let per_client = [
            ("max_sessions", broker.max_sessions != default.max_sessions),
            (
                "session_outbox_max_messages",
                messages != default.session_outbox_max_messages,
            ),
            (
                "session_outbox_max_bytes",
                bytes != default.session_outbox_max_bytes,
            ),
            ("will.topic", broker.will.topic != default.will.topic),
            ("will.payload", broker.will.payload != default.will.payload),
            ("will.qos", broker.will.qos != default.will.qos),
            ("will.retain", broker.will.retain != default.will.retain),
        ];
        if broker.mode == BrokerMode::Pool {
            for (name, _) in per_client.iter().filter(|(_, is_set)| *is_set) {
                self.fault(
                    &format!("broker.{name}"),
                    "found a value with broker.mode = \"pool\"; allowed: with \"per_client\"",
                );
            }
            return;
        }
        if broker.protocol != Protocol::V5 && !self.spoiled("broker.protocol") {
            self.fault(
                "broker.protocol",
                "found 4 with broker.mode = \"per_client\", whose exact fan-out needs subscription \
                 identifiers; allowed: 5",
            );
        }
        if ![1, default.pool_size].contains(&broker.pool_size) && !self.spoiled("broker.pool_size")
        {
            self.fault(
                "broker.pool_size",
                format!(
                    "found {} with broker.mode = \"per_client\", where devices share no connection; \
                     allowed: 1, or leave it out",
                    broker.pool_size
                ),
            );
        }
        self.will(&broker.will, &default.will);
    }

    /// A will without a topic is none, and one to a filter neither.
    fn will(&mut self, will: &Will, default: &Will) {
        if self.spoiled("broker.will.topic") {
            return;
        }
        let has_wildcard = |piece: &Piece| match piece {
            Piece::Text(text) => text.contains(['+', '#']),
            Piece::Fill(_) => false,
        };
        if will.topic.pieces().iter().any(has_wildcard) {
            let found = will.topic.to_text();
            self.fault(
                "broker.will.topic",
                format!("found {found:?}; allowed: a topic, which has no + and no #"),
            );
        }
        if !will.topic.pieces().is_empty() {
            return;
        }
        for (name, is_set) in [
            ("payload", will.payload != default.payload),
            ("qos", will.qos != default.qos),
            ("retain", will.retain != default.retain),
        ] {
            if is_set {
                self.fault(
                    &format!("broker.will.{name}"),
                    "found a value without broker.will.topic; allowed: with it",
                );
            }
        }
    }

    /// What a Unix socket has no use for, and a port neither.
    fn adapter(&mut self, server: &Server) {
        let unix = matches!(server.bind, AdapterBind::Unix(_));
        if self.spoiled("server.bind") {
            return;
        }
        if unix && server.ssl_options.enable {
            self.fault(
                "server.ssl_options.enable",
                "found true with a Unix socket in server.bind; allowed: false, for server.socket_mode says who may connect",
            );
        }
        // A dump has the default written out.
        if !unix && server.socket_mode != Config::default().server.socket_mode {
            self.fault(
                "server.socket_mode",
                "set without a Unix socket in server.bind; allowed: with \"unix:/PATH\" there",
            );
        }
    }

    /// Who cannot be told from others cannot be kept apart from them.
    fn isolation(&mut self, config: &Config) {
        if !config.server.isolate_handlers {
            return;
        }
        let mut without: Vec<String> = config
            .listeners
            .enabled()
            .filter_map(|listener| {
                let name: &str = &listener.common.handler;
                let handler = config.handler_named(name)?;
                let key = match name {
                    "default" => "handler.adapter_token_file".to_owned(),
                    name => format!("handlers.{name}.adapter_token_file"),
                };
                (handler.adapter_token_file.is_none() && !self.spoiled(&key)).then_some(key)
            })
            .collect();
        without.sort();
        without.dedup();
        if !without.is_empty() {
            self.fault(
                "server.isolate_handlers",
                format!(
                    "found true without {}; allowed: with them, for handlers are told apart by their tokens, or false",
                    without.join(", ")
                ),
            );
        }
    }

    fn broker(&mut self, config: &mut Config) {
        self.broker_mode(&config.broker);
        let broker = &mut config.broker;
        let tls = broker.url.iter().any(|url| url.tls);
        self.client_tls("broker", &broker.ssl_options, tls, "url", "mqtts://");
        let repeated = broker.url.iter().enumerate().find(|(index, url)| {
            let mut earlier = broker.url.iter().take(*index);
            // Host names know no case.
            earlier
                .any(|other| other.port == url.port && other.host.eq_ignore_ascii_case(&url.host))
        });
        if let Some((_, url)) = repeated {
            self.fault(
                "broker.url",
                format!("found {url} after the same host and port; allowed: each of them once"),
            );
        }
        if broker.reconnect_max < broker.reconnect_min
            && !self.spoiled("broker.reconnect_min")
            && !self.spoiled("broker.reconnect_max")
        {
            let (max, min) = (
                broker.reconnect_max.to_text(),
                broker.reconnect_min.to_text(),
            );
            // The default is rarely the one to change.
            if self.layers.origin_of("broker.reconnect_max") == Origin::Default {
                self.fault(
                    "broker.reconnect_min",
                    format!(
                        "found {min}; allowed: not more than broker.reconnect_max, which is {max}"
                    ),
                );
            } else {
                self.fault(
                    "broker.reconnect_max",
                    format!(
                        "found {max}; allowed: not less than broker.reconnect_min, which is {min}"
                    ),
                );
            }
        }
        let file = broker.password_file.clone();
        self.secret_file("broker", "password", file, &mut broker.password);
    }

    /// A secret that is in a file of its own.
    fn secret_file(
        &mut self,
        table: &str,
        name: &str,
        file: Option<PathBuf>,
        secret: &mut Option<Secret>,
    ) {
        let Some(path) = file else {
            return;
        };
        let (key, other) = (format!("{table}.{name}_file"), format!("{table}.{name}"));
        if secret.is_some() {
            let origin = self.layers.origin_of(&other);
            let problem = format!("{other} is set too ({origin}); allowed: one of them");
            self.fault(&key, problem);
        }
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                match Secret::from_text(text) {
                    Ok(found) if !text.is_empty() => *secret = Some(found),
                    Ok(_) => self.fault(
                        &key,
                        format!("found {path:?}, which is empty; allowed: a file with the {name}"),
                    ),
                    Err(rejected) => self.fault(
                        &key,
                        format!(
                            "found {path:?}, whose content is no {name}; allowed: {}",
                            rejected.allowed
                        ),
                    ),
                }
            }
            Err(error) => self.unreadable(&key, &path, &error),
        }
    }

    fn headers(&mut self, table: &str, headers: &TemplateTable) {
        for (name, _) in headers.iter() {
            if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
                let problem = format!("found {name:?}; allowed: the name of a header");
                self.fault(&format!("{table}.headers"), problem);
            }
        }
    }

    fn authenticator(&mut self, table: &str, authenticator: &mut Authenticator, mode: BrokerMode) {
        match authenticator {
            Authenticator::File(_) => {}
            Authenticator::Mqtt(login) => {
                if login.enable && mode == BrokerMode::PerClient {
                    self.fault(
                        &format!("{table}.backend"),
                        "found \"mqtt\" with broker.mode = \"per_client\", where the broker is asked \
                         about each device anyway; allowed: with \"pool\", or leave this table out",
                    );
                }
            }
            Authenticator::Http(service) => {
                let tls = service.url.tls;
                self.client_tls(table, &service.ssl_options, tls, "url", "https://");
                self.headers(table, &service.headers);
            }
            Authenticator::Jwt(jwt) => {
                let tls = jwt.endpoint.as_ref().is_some_and(|endpoint| endpoint.tls);
                self.client_tls(table, &jwt.ssl_options, tls, "endpoint", "https://");
                let file = jwt.secret_file.clone();
                let sources = [
                    jwt.secret.is_some() || file.is_some(),
                    jwt.public_key.is_some(),
                    jwt.jwks_file.is_some(),
                    jwt.endpoint.is_some(),
                ];
                let count = sources.iter().filter(|is_set| **is_set).count();
                // What is off need not be there.
                if jwt.enable && count != 1 {
                    let problem = format!(
                        "found {count} of secret, public_key, jwks_file and endpoint; allowed: one of them"
                    );
                    self.fault(&format!("{table}.mechanism"), problem);
                }
                self.secret_file(table, "secret", file, &mut jwt.secret);
            }
        }
    }

    fn device_tls(&mut self, config: &Config) {
        for (name, listener) in &config.listeners.ssl {
            let table = format!("listeners.ssl.{name}.ssl_options");
            let options = &listener.ssl_options;
            if listener.common.enable {
                let [certs, keys] = [&options.certfile, &options.keyfile];
                self.identities(&table, certs, keys, "");
                self.peers(
                    &table,
                    options.verify,
                    options.fail_if_no_peer_cert,
                    &options.cacertfile,
                );
            }
        }
        for (name, listener) in &config.listeners.dtls {
            let table = format!("listeners.dtls.{name}.dtls_options");
            let options = &listener.dtls_options;
            if listener.common.enable {
                let [certs, keys] = [&options.certfile, &options.keyfile];
                if options.psk_file.is_none() || !certs.is_empty() || !keys.is_empty() {
                    self.identities(&table, certs, keys, ", or a psk_file");
                }
                if let Some(path) = &options.psk_file
                    && let Err(error) = readable(path)
                {
                    self.unreadable(&format!("{table}.psk_file"), path, &error);
                }
                self.peers(
                    &table,
                    options.verify,
                    options.fail_if_no_peer_cert,
                    &options.cacertfile,
                );
            }
        }
    }

    /// Certificates and keys in pairs, and not without any.
    fn identities(&mut self, table: &str, certs: &Files, keys: &Files, or_else: &str) {
        let [certfile, keyfile] = ["certfile", "keyfile"].map(|name| format!("{table}.{name}"));
        if self.spoiled(&certfile) || self.spoiled(&keyfile) {
            return;
        }
        if certs.is_empty() || keys.is_empty() {
            let missing = if certs.is_empty() {
                &certfile
            } else {
                &keyfile
            };
            let problem = format!(
                "found nothing; allowed: {certfile} and {keyfile}{or_else}, or the listener with enable = false"
            );
            self.fault(missing, problem);
        } else if certs.len() != keys.len() {
            let problem = format!(
                "found {} for {} in {certfile}; allowed: as many, in the same order",
                keys.len(),
                certs.len()
            );
            self.fault(&keyfile, problem);
        }
        self.all_readable(table, "certfile", certs);
        self.all_readable(table, "keyfile", keys);
    }

    /// How devices' certificates are looked at.
    fn peers(&mut self, table: &str, verify: Verify, required: bool, authorities: &Files) {
        self.all_readable(table, "cacertfile", authorities);
        let cacertfile = format!("{table}.cacertfile");
        if verify == Verify::Peer && authorities.is_empty() && !self.spoiled(&cacertfile) {
            self.fault(
                &format!("{table}.verify"),
                format!(
                    "found \"verify_peer\" without {cacertfile}; allowed: with the file of the devices' authorities"
                ),
            );
        }
        if required && verify == Verify::None && !self.spoiled(&format!("{table}.verify")) {
            self.fault(
                &format!("{table}.fail_if_no_peer_cert"),
                format!("found true without {table}.verify = \"verify_peer\"; allowed: with it, or false"),
            );
        }
    }

    fn all_readable(&mut self, table: &str, name: &str, files: &Files) {
        for path in files.iter() {
            if let Err(error) = readable(path) {
                self.unreadable(&format!("{table}.{name}"), path, &error);
            }
        }
    }

    fn health_checks(&mut self, config: &Config) {
        for (name, listener) in &config.listeners.udp {
            let check = &listener.health_check;
            let table = format!("listeners.udp.{name}.health_check");
            if check.request.is_empty() && !check.reply.is_empty() {
                let problem = format!("set without {table}.request; allowed: both or neither");
                self.fault(&format!("{table}.reply"), problem);
            }
        }
    }

    fn server_tls(&mut self, table: &str, tls: &ServerTls) {
        self.pair(table, &tls.certfile, &tls.keyfile, tls.enable);
        // What is off is not loaded, so it may name files that only another machine has. But what
        // nobody has turned off is not on either, and everything would go in the clear.
        let enable = format!("{table}.enable");
        let named = TLS_FILES
            .iter()
            .zip([&tls.certfile, &tls.keyfile, &tls.cacertfile])
            .find(|(_, file)| file.is_some())
            .map(|(name, _)| *name)
            .or((tls.verify == Verify::Peer).then_some("verify"));
        if !tls.enable
            && self.layers.origin_of(&enable) == Origin::Default
            && let Some(name) = named
            && !self.spoiled(&format!("{table}.{name}"))
        {
            self.fault(
                &format!("{table}.{name}"),
                format!("set, but {enable} is not; allowed: with {enable} = true, or = false to say that it is off"),
            );
        }
        if !tls.enable {
            return;
        }
        self.files(table, [&tls.certfile, &tls.keyfile, &tls.cacertfile]);
        let cacertfile = format!("{table}.cacertfile");
        if tls.verify == Verify::Peer && tls.cacertfile.is_none() && !self.spoiled(&cacertfile) {
            self.fault(
                &format!("{table}.verify"),
                format!(
                    "found \"verify_peer\" without {cacertfile}; allowed: with the file of the clients' authorities"
                ),
            );
        }
    }

    /// `address` is the key beside `ssl_options` whose `scheme` would make them count.
    fn client_tls(&mut self, table: &str, tls: &ClientTls, on: bool, address: &str, scheme: &str) {
        let (address, table) = (format!("{table}.{address}"), format!("{table}.ssl_options"));
        self.pair(&table, &tls.certfile, &tls.keyfile, false);
        let files = [&tls.certfile, &tls.keyfile, &tls.cacertfile];
        self.files(&table, files);
        if on || self.spoiled(&address) {
            return;
        }
        for (name, _) in TLS_FILES
            .iter()
            .zip(files)
            .filter(|(_, file)| file.is_some())
        {
            self.fault(
                &format!("{table}.{name}"),
                format!("set, but {address} does not use TLS; allowed: with {scheme} only"),
            );
        }
        if tls.verify == Verify::None {
            self.fault(
                &format!("{table}.verify"),
                format!("found \"verify_none\", but {address} does not use TLS; allowed: with {scheme} only"),
            );
        }
    }

    /// A certificate needs its key and the other way round.
    fn pair(
        &mut self,
        table: &str,
        certfile: &Option<PathBuf>,
        keyfile: &Option<PathBuf>,
        required: bool,
    ) {
        let missing = match (certfile, keyfile) {
            (Some(_), Some(_)) => return,
            (None, None) if required => {
                let key = format!("{table}.enable");
                self.fault(
                    &key,
                    format!("found true without {table}.certfile and {table}.keyfile; allowed: with both, or false"),
                );
                return;
            }
            (None, None) => return,
            (Some(_), None) => ("certfile", "keyfile"),
            (None, Some(_)) => ("keyfile", "certfile"),
        };
        let (set, unset) = missing;
        self.fault(
            &format!("{table}.{set}"),
            format!("set without {table}.{unset}; allowed: both or neither"),
        );
    }

    fn files(&mut self, table: &str, files: [&Option<PathBuf>; 3]) {
        for (name, path) in TLS_FILES.iter().zip(files) {
            let Some(path) = path else { continue };
            if let Err(error) = readable(path) {
                self.unreadable(&format!("{table}.{name}"), path, &error);
            }
        }
    }

    fn unreadable(&mut self, key: &str, path: &Path, error: &io::Error) {
        self.fault(
            key,
            format!("found {path:?}, which cannot be read: {error}; allowed: a readable file"),
        );
    }
}

/// The keys of the files in `ssl_options`, in the order in which the checks list the files.
const TLS_FILES: [&str; 3] = ["certfile", "keyfile", "cacertfile"];

fn readable(path: &Path) -> io::Result<()> {
    // Linux opens a directory for reading too.
    if File::open(path)?.metadata()?.is_dir() {
        return Err(io::Error::other("it is a directory"));
    }
    Ok(())
}
