//! The authenticators, in order. The first that allows or denies decides; one that all ignore is
//! refused, as in EMQX.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::file::{self, UserFile};
use super::{Attempt, Decision, Denial, Error, Grant};
use crate::metrics::AuthMetrics;

/// One authenticator.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its table in the configuration.
    pub key: String,
    /// Who it is.
    pub provider: ProviderOptions,
}

/// Whom an authenticator asks.
#[derive(Debug, Clone)]
pub enum ProviderOptions {
    /// A file of users.
    File(file::Options),
}

enum Provider {
    File(UserFile),
}

impl Provider {
    fn new(options: &Options) -> Result<Self, Error> {
        match &options.provider {
            ProviderOptions::File(file) => {
                let file = UserFile::new(file).map_err(|problem| Error {
                    key: format!("{}.path", options.key),
                    problem: problem.to_string(),
                })?;
                Ok(Self::File(file))
            }
        }
    }

    /// As metrics and logs name it.
    fn name(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
        }
    }

    async fn ask(&self, attempt: &Attempt) -> Decision {
        match self {
            Self::File(file) => file.ask(attempt).await,
        }
    }
}

struct Link {
    /// Its table in the configuration.
    key: String,
    provider: Provider,
}

/// Whether an authenticator can be made.
pub fn check(options: &Options) -> Result<(), Error> {
    Provider::new(options).map(drop)
}

/// See the module.
pub struct Chain {
    links: Vec<Link>,
    metrics: AuthMetrics,
}

impl Chain {
    /// Makes them all.
    pub fn new(options: &[Options], metrics: &AuthMetrics) -> Result<Self, Error> {
        let link = |options: &Options| {
            Ok(Link {
                key: options.key.clone(),
                provider: Provider::new(options)?,
            })
        };
        Ok(Self {
            links: options.iter().map(link).collect::<Result<_, _>>()?,
            metrics: metrics.clone(),
        })
    }

    /// Follows changes of files until `stop` is cancelled.
    pub fn follow(&self, metrics: &AuthMetrics, stop: &CancellationToken) {
        for link in &self.links {
            match &link.provider {
                Provider::File(file) => file.follow(&link.key, metrics, stop),
            }
        }
    }

    /// Whether there is nobody to ask.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Asks one after the other.
    pub async fn ask(&self, attempt: &Attempt) -> Result<Grant, Denial> {
        let mut ignored = String::new();
        for link in &self.links {
            let provider = link.provider.name();
            let started = Instant::now();
            let decision = link.provider.ask(attempt).await;
            let (outcome, reason) = match &decision {
                Decision::Allow(_) => ("allow", ""),
                Decision::Deny(reason) => ("deny", reason.as_str()),
                Decision::Ignore(reason) => ("ignore", reason.as_str()),
            };
            self.metrics.asked(provider, outcome, started.elapsed());
            tracing::debug!(
                authenticator = link.key,
                clientid = attempt.clientid,
                username = attempt.username,
                peer = %attempt.peer,
                outcome,
                reason,
                "an authenticator was asked"
            );
            match decision {
                Decision::Allow(grant) => return Ok(grant),
                Decision::Deny(reason) => {
                    return Err(Denial::Refused(format!("{provider}: {reason}")));
                }
                Decision::Ignore(reason) => {
                    if !ignored.is_empty() {
                        ignored.push_str(", ");
                    }
                    ignored.push_str(&format!("{provider}: {reason}"));
                }
            }
        }
        Err(Denial::Refused(format!(
            "nobody vouches for it ({ignored})"
        )))
    }
}
