//! The sections about what a device may do.

use std::collections::BTreeMap;
use std::convert::identity;
use std::path::PathBuf;
use std::time::Duration;

use figment::value::Value;

use super::auth::{HttpMethod, OnError};
use super::names::words;
use super::page::Page;
use super::reader::{Reader, Scope};
use super::schema::{Item, Listed, Nested, Section, Within, section, unconfigured};
use super::template::{HttpUrl, TemplateTable};
use super::types::{ClientTls, TICK};

words! {
    /// What it means when no rule fits.
    pub enum NoMatch {
        /// It may.
        Allow = "allow",
        /// It may not.
        Deny = "deny",
    }

    /// What becomes of a device that does what it may not.
    pub enum DenyAction {
        /// The call is refused.
        Ignore = "ignore",
        /// The connection is closed, too.
        Disconnect = "disconnect",
    }

    /// Where rules come from.
    pub enum SourceType {
        /// A file.
        File = "file",
        /// A service.
        Http = "http",
    }
}

section! {
    /// `[authorization]`: what devices may publish and subscribe to.
    pub struct Authorization {
        /// What it means when no rule fits: "allow" or "deny".
        no_match: NoMatch = "allow",

        /// What becomes of a device that does what it may not: "ignore" refuses the call
        /// (PERMISSION_DENY), "disconnect" closes the connection, too, reason kicked.
        deny_action: DenyAction = "ignore",

        /// Whether RawPublish is checked, too, as by a device without names at 0.0.0.0: true or
        /// false.
        check_raw_publish: bool = "false",

        /// Decisions of services that are remembered for each connection, at most; 0 for none.
        cache_max_size: usize = Within("32", 0..=10_000),

        /// How long they are remembered. A duration.
        cache_ttl: Duration = Within("1m", TICK..),

        /// Where rules come from, asked in order after those that an authenticator gave. Numbered
        /// as authenticators are. For example, with their defaults:
        sources: BTreeMap<u16, RuleSource> = Listed,
    }
}

/// One of `[[authorization.sources]]`.
#[derive(Clone, Debug, PartialEq)]
pub enum RuleSource {
    /// A file of rules.
    File(RuleFile),
    /// A service.
    Http(Box<RuleService>),
}

impl RuleSource {
    /// Whether it is asked at all.
    pub fn is_enabled(&self) -> bool {
        match self {
            Self::File(options) => options.enable,
            Self::Http(options) => options.enable,
        }
    }
}

impl Item for RuleSource {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, value: &Value) -> Option<Self> {
        reader.require(scope, "type", value);
        Some(match reader.value(scope, "type", identity)? {
            SourceType::File => {
                reader.require(scope, "path", value);
                Self::File(Section::read(reader, scope))
            }
            SourceType::Http => {
                reader.require(scope, "url", value);
                Self::Http(Box::new(Section::read(reader, scope)))
            }
        })
    }

    fn write(&self, page: &mut Page) {
        match self {
            Self::File(options) => Section::write(options, page),
            Self::Http(options) => Section::write(&**options, page),
        }
    }

    fn examples() -> Vec<(&'static str, Self)> {
        vec![
            (" A file of rules:", Self::File(unconfigured())),
            (
                " A service, asked over HTTP as EMQX asks it:",
                Self::Http(Box::new(unconfigured())),
            ),
        ]
    }
}

section! {
    /// A file of rules.
    pub struct RuleFile {
        /// What it is: "file". Required.
        r#type: SourceType = "file",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// The file: TOML, see docs/authentication.md. It is read again when it changes. Required.
        path: PathBuf = "acl.toml",
    }
}

section! {
    /// A service that decides.
    pub struct RuleService {
        /// What it is: "http". Required.
        r#type: SourceType = "http",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// "post", or "get", which puts the body into the query.
        method: HttpMethod = "post",

        /// The service, with placeholders as for authentication, and ${action} (publish, subscribe),
        /// ${topic} (with the mountpoint) and ${qos}. Required.
        url: HttpUrl = "http://127.0.0.1:8080/acl",

        /// Headers, with placeholders. Values that could be secret are not shown.
        headers: TemplateTable = "",

        /// The members of the JSON object, or of the form, with placeholders.
        body: TemplateTable = "{ clientid = '${clientid}', username = '${username}', action = '${action}', topic = '${topic}', qos = '${qos}' }",

        /// The longest that an answer takes, waiting for its turn included. A duration.
        request_timeout: Duration = Within("5s", TICK..),

        /// The longest that connecting takes. A duration.
        connect_timeout: Duration = Within("5s", TICK..),

        /// The most requests at a time, 1 to 1024; further ones wait for their turn.
        pool_size: usize = Within("8", 1..=1024),

        /// What no answer, or one that makes no sense, means: "deny", or "ignore", which asks the
        /// next source, as EMQX does.
        on_error: OnError = "deny",

        /// TLS towards an https:// service.
        ssl_options: ClientTls = Nested,
    }
}
