//! The broker decides: a CONNECT with what the device says is tried there.

use std::time::Duration;

use tokio::sync::Semaphore;

use super::fill::Values;
use super::{Attempt, Decision, Grant};
use crate::broker::{self, LoginError, try_login};
use crate::config::Template;

/// How the broker is asked.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it is.
    pub broker: broker::Options,
    /// The client id that is said.
    pub clientid: Template,
    /// The longest that an attempt takes, waiting for its turn included.
    pub request_timeout: Duration,
    /// Attempts at a time.
    pub pool_size: usize,
}

/// See the module.
pub struct BrokerAuthenticator {
    options: Options,
    turns: Semaphore,
}

impl BrokerAuthenticator {
    /// Connects with each attempt.
    pub fn new(options: &Options) -> Self {
        Self {
            turns: Semaphore::new(options.pool_size.min(Semaphore::MAX_PERMITS)),
            options: options.clone(),
        }
    }

    /// What the broker says; `Err` where it does not say yes or no.
    pub async fn ask(&self, attempt: &Attempt) -> Result<Decision, String> {
        let limit = self.options.request_timeout;
        let tried = tokio::time::timeout(limit, self.login(attempt)).await;
        match tried {
            Ok(Ok(())) => Ok(Decision::Allow(Grant::default())),
            Ok(Err(LoginError::Denied(reason))) => {
                Ok(Decision::Deny(format!("the broker says {reason}")))
            }
            Ok(Err(LoginError::Failed(reason))) => Err(reason),
            Err(_) => Err(format!("no answer within {limit:?}")),
        }
    }

    async fn login(&self, attempt: &Attempt) -> Result<(), LoginError> {
        let stopping = |_| LoginError::Failed("the gateway stops".to_owned());
        let _turn = self.turns.acquire().await.map_err(stopping)?;
        let values = Values {
            attempt,
            wish: None,
        };
        let clientid = values.plain(&self.options.clientid);
        let password = attempt.password.expose();
        try_login(&self.options.broker, &clientid, &attempt.username, password).await
    }
}
