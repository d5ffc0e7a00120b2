//! Who a device is: authenticators, asked one after the other.
//!
//! ```text
//! connection --Attempt--> Auth -> limits -> chain -> file | http | mqtt | jwt --> Grant, or a Denial
//! ```
//!
//! Nothing here knows of connections: an [`Attempt`] is all that there is to say about a device,
//! a [`Grant`] all that is known of it afterwards. What is waited for is bounded by deadlines, and
//! an attempt that is dropped is cancelled.
//!
//! Secrets: a password is a [`Secret`] from the gateway's edge on, and no reason, log line or
//! metric is made of one.

pub mod acl;
pub mod chain;
pub mod file;
pub mod fill;
pub(crate) mod fuzzing;
pub mod hash;
pub(crate) mod hot;
pub mod http;
pub mod jwt;
pub mod limits;
pub mod mqtt;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use crate::config::Secret;
use crate::config::{SecretTemplate, Template};
use crate::metrics::AuthMetrics;
use crate::tls::Subject;
use chain::Chain;
use limits::Limits;

/// An authentication takes at most so long, whoever is asked: a handler waits for it, and in most of
/// them a call that takes longer is given up anyway.
const LONGEST: Duration = Duration::from_secs(30);

/// Authentications under way at a time. Each holds some kilobytes.
const MAX_UNDER_WAY: usize = 20_000;

/// What a device says of itself, and what is known of it.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Client id.
    pub clientid: String,
    /// User name; may be empty.
    pub username: String,
    /// Password; may be empty.
    pub password: Secret,
    /// Name of the device's protocol.
    pub proto_name: String,
    /// Its address.
    pub peer: IpAddr,
    /// Whose certificate it showed.
    pub certificate: Option<Subject>,
}

impl Attempt {
    /// Of no device in particular.
    pub fn nobody() -> Self {
        Self {
            clientid: String::new(),
            username: String::new(),
            password: Secret::new(""),
            proto_name: String::new(),
            peer: std::net::Ipv4Addr::UNSPECIFIED.into(),
            certificate: None,
        }
    }
}

/// What is known of a device that was let in.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grant {
    /// Its client id, in place of what it said.
    pub clientid: Option<String>,
    /// No rule of authorization counts for it.
    pub is_superuser: bool,
    /// When it has to go.
    pub expire_at: Option<SystemTime>,
    /// What it may do, where who vouches for it says so.
    pub rules: Option<acl::Rules>,
    /// Until when they count; beyond it may do nothing.
    pub rules_until: Option<SystemTime>,
}

/// What an authenticator says.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// It is who it says.
    Allow(Grant),
    /// It is not, and why. No secret is in the reason.
    Deny(String),
    /// Somebody else is to be asked, and why.
    Ignore(String),
}

/// Why an authenticator says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// What the device shows is nothing that it could say anything about.
    OfDevice(String),
    /// Who is to be asked is not there, or makes no sense.
    OfService(String),
    /// What the device shows can be judged later only: no failed attempt, and nothing to be told.
    NotYet(String),
    /// The answer has to be waited for, and was not to be.
    Later,
}

impl Fault {
    /// What is wrong. No secret is in it.
    pub fn text(&self) -> &str {
        match self {
            Self::OfDevice(text) | Self::OfService(text) | Self::NotYet(text) => text,
            Self::Later => "it is asked later",
        }
    }
}

/// Why a device is not let in. The texts are for the handler, and hold no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// Somebody has denied it, or nobody has allowed it.
    #[error("authentication refused: {0}")]
    Refused(String),
    /// Nobody has allowed it, and somebody who could have was not there: nothing that counts as
    /// a failed attempt.
    #[error("authentication refused: {0}")]
    Unheard(String),
    /// There were too many failed attempts.
    #[error("authentication refused: {0}")]
    Limited(limits::Limited),
    /// It took too long.
    #[error("authentication took longer than {LONGEST:?}")]
    Late,
    /// Too many at a time.
    #[error("{MAX_UNDER_WAY} authentications are under way already: try again")]
    Busy,
}

/// How devices are authenticated.
#[derive(Debug, Clone)]
pub struct Options {
    /// Who is asked, in order.
    pub authenticators: Vec<chain::Options>,
    /// Failed attempts.
    pub limits: limits::Options,
    /// What devices are in place of what they say.
    pub overrides: Overrides,
    /// What devices may do.
    pub acl: acl::Options,
}

/// What devices are in place of what they say, where there is anything.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The client id.
    pub clientid: Template,
    /// The user name.
    pub username: Template,
    /// The password.
    pub password: SecretTemplate,
}

impl Overrides {
    /// Fills in what the device said.
    fn apply(&self, attempt: &mut Attempt) {
        let filled = |template: &Template| {
            let values = fill::Values {
                attempt,
                wish: None,
            };
            let is_set = !template.pieces().is_empty();
            is_set.then(|| values.plain(template))
        };
        let (clientid, username) = (filled(&self.clientid), filled(&self.username));
        let password = filled(self.password.expose()).map(Secret::new);
        attempt.clientid = clientid.unwrap_or(std::mem::take(&mut attempt.clientid));
        attempt.username = username.unwrap_or(std::mem::take(&mut attempt.username));
        if let Some(password) = password {
            attempt.password = password;
        }
    }
}

/// An authenticator that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct Error {
    /// The key of the configuration that is at fault.
    pub key: String,
    /// What is wrong.
    pub problem: String,
}

/// See the module. Shared by all connections.
pub struct Auth {
    chain: Chain,
    limits: Limits,
    places: Semaphore,
    overrides: Overrides,
    acl: acl::Acl,
    metrics: AuthMetrics,
}

/// What only shows when the options are used, such as what is in a file. Empty when all is well.
pub fn check(options: &Options) -> Vec<Error> {
    let links = options.authenticators.iter();
    let sources = options.acl.sources.iter();
    let errors = links.filter_map(|options| chain::check(options).err());
    errors.chain(sources.flat_map(acl::Acl::check)).collect()
}

/// The number of a list's table, which tells apart who is asked.
fn number_of(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or_default()
}

/// Logs and counts how an attempt to follow a change of `key`'s files ended.
fn told<E: std::fmt::Display>(key: &str, metrics: &AuthMetrics) -> impl Fn(Result<(), E>) + use<E> {
    let (key, metrics) = (key.to_owned(), metrics.clone());
    move |result| match result {
        Ok(()) => {
            metrics.reloaded("ok");
            tracing::info!(key, "the changed file is in use");
        }
        Err(error) => {
            metrics.reloaded("failed");
            tracing::error!(key, %error, "the changed file is of no use; the old one stays");
        }
    }
}

/// A trouble that is told once, however often it comes back, until it is over.
#[derive(Debug)]
pub struct Trouble {
    /// Who has it: "authenticator", "source of rules".
    what: &'static str,
    /// Its table in the configuration.
    key: String,
    /// What it asks: http, mqtt, jwt.
    kind: &'static str,
    /// Where that is, without what could be secret.
    url: String,
    known: Mutex<Option<String>>,
}

impl Trouble {
    /// There is none.
    pub fn new(what: &'static str, key: &str, kind: &'static str, url: String) -> Self {
        Self {
            what,
            key: key.to_owned(),
            kind,
            url,
            known: Mutex::default(),
        }
    }

    /// It is there.
    pub fn is(&self, error: &str) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_deref() != Some(error) {
            tracing::warn!(
                key = self.key,
                kind = self.kind,
                url = self.url,
                error,
                "{} does not answer as it should",
                self.what
            );
            *known = Some(error.to_owned());
        }
    }

    /// It is not, or not any more.
    pub fn is_over(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.take().is_some() {
            tracing::info!(
                key = self.key,
                kind = self.kind,
                url = self.url,
                "{} answers again",
                self.what
            );
        }
    }
}

impl Auth {
    /// Makes what authenticates. What follows changes of files ends with `stop`.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn start(
        options: &Options,
        metrics: AuthMetrics,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, Error> {
        let chain = Chain::new(&options.authenticators, &metrics)?;
        chain.follow(&metrics, stop);
        let acl = acl::Acl::new(&options.acl, &metrics)?;
        acl.follow(&metrics, stop);
        Ok(Arc::new(Self {
            chain,
            limits: Limits::new(&options.limits),
            places: Semaphore::new(MAX_UNDER_WAY),
            overrides: options.overrides.clone(),
            acl,
            metrics,
        }))
    }

    /// Nobody is asked: every device is who it says.
    pub fn is_open(&self) -> bool {
        self.chain.is_empty()
    }

    /// Puts what the device is in place of what it says.
    pub fn set_right(&self, attempt: &mut Attempt) {
        self.overrides.apply(attempt);
    }

    /// What devices may do.
    pub fn acl(&self) -> &acl::Acl {
        &self.acl
    }

    /// Finds out whether a device is who it says. Who has guessed at many passwords at a time
    /// does not learn which one was right: the limit counts when the answer is there, too.
    /// Dropping the future cancels it.
    pub async fn authenticate(&self, attempt: &Attempt) -> Result<Grant, Denial> {
        if self.is_open() {
            return Ok(Grant::default());
        }
        self.admit(attempt)?;
        let _place = self.places.try_acquire().map_err(|_| Denial::Busy)?;
        let _in_flight = self.metrics.begin();
        let asked = tokio::time::timeout(LONGEST, self.chain.ask(attempt)).await;
        let decided = asked.unwrap_or(Err(Denial::Late));
        match decided {
            Err(Denial::Refused(_)) => self.failed(attempt),
            Ok(_) => self.admit(attempt)?,
            Err(_) => {}
        }
        decided
    }

    /// Whether there were not too many failed attempts.
    pub fn admit(&self, attempt: &Attempt) -> Result<(), Denial> {
        self.limits
            .admit(attempt, Instant::now())
            .map_err(|limited| {
                self.metrics.limited(limited.by == limits::By::Address);
                Denial::Limited(limited)
            })
    }

    /// Counts an attempt that somebody else refused.
    pub fn failed(&self, attempt: &Attempt) {
        self.limits.failed(attempt, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a device on this machine.
    pub fn attempt(clientid: &str, username: &str) -> Attempt {
        Attempt {
            clientid: clientid.to_owned(),
            username: username.to_owned(),
            password: Secret::new("x"),
            proto_name: "test".to_owned(),
            peer: std::net::Ipv4Addr::LOCALHOST.into(),
            certificate: None,
        }
    }
}
