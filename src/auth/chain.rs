//! The authenticators, in order. The first that allows or denies decides; one that all ignore is
//! refused, as in EMQX. Before one waits for the key of a token, those behind that know tokens are asked
//! whether it is theirs: keys that do not come hold up nobody else's devices.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::file::{self, UserFile};
use super::http::{self, HttpAuthenticator};
use super::jwt::{self, JwtAuthenticator};
use super::mqtt::{self, BrokerAuthenticator};
use super::{Attempt, Decision, Denial, Error, Fault, Grant, Trouble, number_of};
use crate::config::OnError;
use crate::metrics::{AuthMetrics, AuthenticatorMetrics};

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
    /// A service.
    Http(Box<http::Options>, OnError),
    /// The broker.
    Mqtt(Box<mqtt::Options>, OnError),
    /// Who signs tokens.
    Jwt(Box<jwt::Options>, OnError),
}

/// In place of user names that are tokens.
const HIDDEN: &str = "(not shown: authentication has from = \"username\")";

enum Provider {
    File(UserFile),
    Http(Box<HttpAuthenticator>),
    Mqtt(Box<BrokerAuthenticator>),
    Jwt(Box<JwtAuthenticator>),
}

impl Provider {
    fn new(options: &Options) -> Result<(Self, OnError), Error> {
        let fault = |name: &str, problem: String| Error {
            key: format!("{}.{name}", options.key),
            problem,
        };
        Ok(match &options.provider {
            ProviderOptions::File(file) => {
                let file = UserFile::new(file).map_err(|error| fault("path", error.to_string()))?;
                (Self::File(file), OnError::Ignore)
            }
            ProviderOptions::Http(http, on_error) => (
                Self::Http(Box::new(HttpAuthenticator::new(http))),
                *on_error,
            ),
            ProviderOptions::Mqtt(mqtt, on_error) => (
                Self::Mqtt(Box::new(BrokerAuthenticator::new(mqtt))),
                *on_error,
            ),
            ProviderOptions::Jwt(jwt, on_error) => {
                let made = JwtAuthenticator::new(jwt);
                let jwt = made.map_err(|(name, problem)| fault(name, problem))?;
                (Self::Jwt(Box::new(jwt)), *on_error)
            }
        })
    }

    /// As metrics and logs name it.
    fn name(&self) -> &'static str {
        match self {
            Self::File(_) => "file",
            Self::Http(_) => "http",
            Self::Mqtt(_) => "mqtt",
            Self::Jwt(_) => "jwt",
        }
    }

    /// Where whom it asks is, for the log.
    fn url(options: &ProviderOptions) -> String {
        match options {
            ProviderOptions::File(_) => String::new(),
            ProviderOptions::Http(http, _) => http.url.without_query(),
            ProviderOptions::Mqtt(mqtt, _) => {
                let addresses = mqtt.broker.addresses.iter();
                let urls: Vec<String> = addresses.map(|one| one.url.to_string()).collect();
                urls.join(",")
            }
            ProviderOptions::Jwt(jwt, _) => match &jwt.source {
                jwt::Source::Endpoint(request, _) => request.url.without_query(),
                _ => String::new(),
            },
        }
    }

    /// Whether user names are secret.
    fn hides_usernames(&self) -> bool {
        matches!(self, Self::Jwt(jwt) if jwt.is_from_username())
    }

    async fn ask(&self, attempt: &Attempt, waits: bool) -> Result<Decision, Fault> {
        match self {
            Self::File(file) => Ok(file.ask(attempt).await),
            Self::Http(http) => http.ask(attempt).await.map_err(Fault::OfService),
            Self::Mqtt(mqtt) => mqtt.ask(attempt).await.map_err(Fault::OfService),
            Self::Jwt(jwt) => jwt.ask(attempt, waits).await,
        }
    }
}

struct Link {
    /// Its table in the configuration.
    key: String,
    provider: Provider,
    on_error: OnError,
    trouble: Trouble,
    asked: AuthenticatorMetrics,
}

/// Whether an authenticator can be made.
pub fn check(options: &Options) -> Result<(), Error> {
    Provider::new(options).map(drop)
}

impl Link {
    /// Asks it, and tells what came of it; none where it would have to wait and is not to.
    async fn ask(&self, attempt: &Attempt, username: &str, waits: bool) -> Option<Said> {
        let started = Instant::now();
        let answer = self.provider.ask(attempt, waits).await;
        if matches!(answer, Err(Fault::Later)) {
            return None;
        }
        let is_error = answer.is_err();
        let is_away = matches!(answer, Err(Fault::OfService(_) | Fault::NotYet(_)));
        let decision = self.decision(answer);
        let (outcome, reason) = match &decision {
            Decision::Allow(_) => ("allow", ""),
            Decision::Deny(reason) | Decision::Ignore(reason) if is_error => {
                ("error", reason.as_str())
            }
            Decision::Deny(reason) => ("deny", reason.as_str()),
            Decision::Ignore(reason) => ("ignore", reason.as_str()),
        };
        self.asked.count(outcome, started.elapsed());
        tracing::debug!(
            authenticator = self.key,
            clientid = attempt.clientid,
            username,
            peer = %attempt.peer,
            outcome,
            reason,
            "an authenticator was asked"
        );
        Some((decision, is_away))
    }

    /// What an answer means, or that there is none.
    fn decision(&self, answer: Result<Decision, Fault>) -> Decision {
        match answer {
            Ok(decision) => {
                self.trouble.is_over();
                decision
            }
            Err(fault) => {
                if let Fault::OfService(error) = &fault {
                    self.trouble.is(error);
                }
                let error = fault.text().to_owned();
                match self.on_error {
                    OnError::Ignore => Decision::Ignore(error),
                    OnError::Deny => Decision::Deny(error),
                }
            }
        }
    }
}

/// See the module.
pub struct Chain {
    links: Vec<Link>,
}

impl Chain {
    /// Makes them all.
    pub fn new(options: &[Options], metrics: &AuthMetrics) -> Result<Self, Error> {
        let link = |options: &Options| {
            let (provider, on_error) = Provider::new(options)?;
            let (key, kind) = (options.key.clone(), provider.name());
            let url = Provider::url(&options.provider);
            Ok(Link {
                trouble: Trouble::new("authenticator", &key, kind, url),
                asked: metrics.authenticator(kind, number_of(&key)),
                key,
                provider,
                on_error,
            })
        };
        Ok(Self {
            links: options.iter().map(link).collect::<Result<_, _>>()?,
        })
    }

    /// Follows changes of files until `stop` is cancelled.
    pub fn follow(&self, metrics: &AuthMetrics, stop: &CancellationToken) {
        for link in &self.links {
            match &link.provider {
                Provider::File(file) => file.follow(&link.key, metrics, stop),
                Provider::Jwt(jwt) => jwt.follow(&link.key, metrics, stop),
                Provider::Http(_) | Provider::Mqtt(_) => {}
            }
        }
    }

    /// Whether there is nobody to ask.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Asks one after the other.
    pub async fn ask(&self, attempt: &Attempt) -> Result<Grant, Denial> {
        let mut links = self.links.iter();
        let hidden = links.any(|link| link.provider.hides_usernames());
        let username = if hidden { HIDDEN } else { &attempt.username };
        let mut heard = Heard::default();
        for (place, link) in self.links.iter().enumerate() {
            // Without an answer that one denies, whoever comes behind.
            let waits = link.on_error == OnError::Deny;
            let said = match link.ask(attempt, username, waits).await {
                Some(said) => Some(said),
                None => match self.whose_token(attempt, place + 1).await {
                    Some(other) => {
                        if let Some(said) = other.ask(attempt, username, false).await {
                            heard.hear(other, said);
                        }
                        None
                    }
                    None => link.ask(attempt, username, true).await,
                },
            };
            if let Some(said) = said {
                heard.hear(link, said);
            }
            if heard.verdict.is_some() {
                break;
            }
        }
        heard.end()
    }

    /// The one, from this place on, that has the key of a token and lets its device in.
    async fn whose_token(&self, attempt: &Attempt, from: usize) -> Option<&Link> {
        for link in self.links.iter().skip(from) {
            if let Provider::Jwt(jwt) = &link.provider
                && let Ok(Decision::Allow(_)) = jwt.ask(attempt, false).await
            {
                return Some(link);
            }
        }
        None
    }
}

/// What one has said, and whether that is for want of an answer.
type Said = (Decision, bool);

/// What all have said so far.
#[derive(Default)]
struct Heard {
    verdict: Option<Result<Grant, Denial>>,
    ignored: String,
    /// Whether one of them that ignored it could not be asked.
    unheard: bool,
}

impl Heard {
    fn hear(&mut self, link: &Link, (decision, is_away): Said) {
        let provider = link.provider.name();
        match decision {
            Decision::Allow(grant) => self.verdict = Some(Ok(grant)),
            Decision::Deny(reason) => {
                let reason = format!("{provider}: {reason}");
                self.verdict = Some(Err(match is_away {
                    true => Denial::Unheard(reason),
                    false => Denial::Refused(reason),
                }));
            }
            Decision::Ignore(reason) => {
                self.unheard |= is_away;
                if !self.ignored.is_empty() {
                    self.ignored.push_str(", ");
                }
                self.ignored.push_str(&format!("{provider}: {reason}"));
            }
        }
    }

    fn end(self) -> Result<Grant, Denial> {
        self.verdict.unwrap_or_else(|| {
            let reason = format!("nobody vouches for it ({})", self.ignored);
            Err(match self.unheard {
                true => Denial::Unheard(reason),
                false => Denial::Refused(reason),
            })
        })
    }
}
