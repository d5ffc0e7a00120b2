//! The configuration: layers, types, checks.
//!
//! ```text
//! file, environment, --set        layers   merged by figment; every value remembers its origin
//!        |
//!        v
//! sections of typed values        reader   reads key by key, collects every fault
//!        |                        types, listeners   the sections, declared with schema's macro
//!        v
//! cross-checks                    checks   addresses, handler names, TLS, files
//!        |
//!        v
//! Config, or a Report of all that is wrong
//! ```
//!
//! A value is read by its type (`value`, `values`, `names`, `address`, `access`); `page` turns sections into
//! TOML text; `suggest` finds what an unknown key was meant to be.
//!
//! # Environment
//!
//! `EXPROTO_` and the key in any case, tables joined with `__`: `EXPROTO_BROKER__URL`. Every key can be
//! set so. A variable that matches no key is a fault, with two exceptions: `EXPROTO_CONFIG` names the
//! file, and the variables that Kubernetes adds for Services called `exproto` or `exproto-...`
//! (`EXPROTO_SIDECAR_SERVICE_HOST`, `EXPROTO_SIDECAR_PORT_9100_TCP_ADDR`, ...) are ignored.

mod access;
mod address;
mod auth;
mod authz;
mod checks;
mod layers;
mod listeners;
mod names;
mod page;
mod paths;
mod placeholders;
mod reader;
mod report;
mod schema;
mod suggest;
mod template;
mod types;
mod value;
mod values;

use figment::value::Dict;

pub use access::{AccessRule, AccessRules, Action, PeerList, Peers};
pub use address::{AdapterBind, BrokerUrl, HandlerAddress, HandlerUrl};
pub use auth::{
    Authenticator, Backend, BrokerLogin, ClientInfoOverride, From, HttpMethod, HttpService,
    JwtOptions, Mechanism, OnError, UserFile, UserIdType,
};
pub use authz::{
    Authorization, DenyAction, NoMatch, RuleFile, RuleService, RuleSource, SourceType,
};
pub use layers::{Sources, process_environment};
pub use listeners::{
    DtlsListener, DtlsOptions, HealthCheck, Kind, ListenerOptions, ListenerView, Listeners,
    ProxyProtocol, SslListener, SslOptions, TcpListener, TcpOptions, UdpListener, UdpOptions,
};
pub use names::{ClientIdPrefix, Mountpoint, Name, NodeName, PropertyName};
pub use paths::Files;
pub use placeholders::Placeholder;
pub use report::{Fault, Origin, Report};
pub use template::{HttpUrl, Piece, SecretTemplate, Template, TemplateTable};
pub use types::{
    Admin, Broker, BrokerMode, ClientTls, Config, Failover, Handler, Log, LogFormat, LogLevel,
    LoginAttempts, OnUnavailable, Protocol, Queue, QueuePolicy, Server, ServerTls, ServiceName,
    Verify, Will,
};
pub use values::{FileMode, Limit, Rate, Secret, Size};

use layers::Layers;
use page::Page;
use reader::{Reader, Scope};
use schema::{Section, join};

/// Reads, merges and checks the configuration.
///
/// # Errors
///
/// Every fault of every layer, not only the first.
pub fn load(sources: &Sources) -> Result<Config, Report> {
    let mut faults = Vec::new();
    let layers = Layers::merge(sources, &mut faults);

    // What is meant is rarely a key of one of a list.
    let is_item = |path: &String| path.split('.').any(|part| part.parse::<u16>().is_ok());
    let known: Vec<String> = keys()
        .into_iter()
        .map(|key| key.path)
        .filter(|path| !is_item(path))
        .collect();
    let mut reader = Reader::new(&layers, &known);
    let mut config = Config::read(&mut reader, &Scope::root(layers.root()));
    faults.extend(reader.into_faults());
    // With a broken file the rest is half a configuration, and its contradictions mean nothing.
    if layers.complete() {
        checks::check(&mut config, &layers, &mut faults);
    }
    if faults.is_empty() {
        Ok(config)
    } else {
        Err(Report::new(faults))
    }
}

impl Default for Config {
    /// What [`load`] makes of no sources at all.
    fn default() -> Config {
        let layers = Layers::merge(&Sources::default(), &mut Vec::new());
        Config::read(&mut Reader::new(&layers, &[]), &Scope::root(&Dict::new()))
    }
}

impl Config {
    /// The effective configuration as TOML that loads again, with secrets masked.
    ///
    /// A password that came from `password_file` is left out, since the two exclude each other.
    pub fn to_toml(&self) -> String {
        let mut shown = self.clone();
        if shown.broker.password_file.is_some() {
            shown.broker.password = None;
        }
        for authenticator in shown.authentication.values_mut() {
            if let Authenticator::Jwt(jwt) = authenticator
                && jwt.secret_file.is_some()
            {
                jwt.secret = None;
            }
        }
        shown.page().plain()
    }

    /// The handler with this name; `default` is `[handler]`.
    pub fn handler_named(&self, name: &str) -> Option<&Handler> {
        match name {
            "default" => Some(&self.handler),
            name => self.handlers.get(name),
        }
    }

    fn page(&self) -> Page {
        let mut page = Page::default();
        self.write(&mut page);
        page
    }
}

/// The documented default file. The same on every machine; loads to what no file at all loads to.
pub fn default_file() -> String {
    format!(
        "{DEFAULT_FILE_HEAD}{}",
        Config::default().page().documented().trim_end()
    ) + "\n"
}

const DEFAULT_FILE_HEAD: &str = r##"# Configuration of ExProto Sidecar: every key with its default.
# Generated; keep only what you change.
#
# A value is taken from the last of these that sets it: the default, this file, an environment
# variable, the command line (--set broker.url=mqtt://10.0.0.1). The variable of a key is EXPROTO_
# and the key, tables joined with two underscores: EXPROTO_BROKER__URL,
# EXPROTO_LISTENERS__TCP__DEFAULT__BIND. Lists in a variable are comma-separated or a TOML array.
#
# Durations: "500ms", "30s", "5m", "1h", "7d". Sizes: "64KiB", "1MiB", or a number of bytes.
# Rates: a number per second. "infinity" turns a limit off where its text says so.
# YAML and JSON with the same keys load too.
#
# exproto-sidecar check --config FILE tells what is wrong with a file, or what is in effect.

"##;

/// One key of the configuration, for references and completions.
#[derive(Clone, Debug)]
pub struct Key {
    /// The dotted key, such as `broker.url`. Listeners are shown as `listeners.tcp.default`.
    pub path: String,
    /// The environment variable that sets it.
    pub variable: String,
    /// The default, as an environment variable would hold it; an example where there is none.
    pub default: String,
    /// Meaning, unit and what is allowed.
    pub doc: String,
    /// Whether the value is masked wherever it would be shown.
    pub secret: bool,
}

/// Every key there is, in the order of the default file.
pub fn keys() -> Vec<Key> {
    let page = Config::default().page();
    let mut keys = Vec::new();
    page.walk(&mut |table, line| {
        let path = join(table, line.key);
        keys.push(Key {
            variable: layers::variable_of(&path),
            path,
            default: line.text.clone(),
            doc: line
                .doc
                .lines()
                .map(str::trim)
                .collect::<Vec<_>>()
                .join("\n"),
            secret: line.secret,
        });
    });
    keys
}
