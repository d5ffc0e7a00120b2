//! The broker decides: a CONNECT with what the device says is tried there.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

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
    /// The address that answered last.
    first: AtomicUsize,
}

impl BrokerAuthenticator {
    /// Connects with each attempt.
    pub fn new(options: &Options) -> Self {
        Self {
            turns: Semaphore::new(options.pool_size.min(Semaphore::MAX_PERMITS)),
            first: AtomicUsize::default(),
            options: options.clone(),
        }
    }

    /// What the broker says; `Err` where it does not say yes or no.
    pub async fn ask(&self, attempt: &Attempt) -> Result<Decision, String> {
        let limit = self.options.request_timeout;
        let until = Instant::now() + limit;
        let turn = timeout_at(until, self.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(format!("no turn to ask within {limit:?}"));
        };
        let values = Values {
            attempt,
            wish: None,
        };
        let (broker, clientid) = (&self.options.broker, values.plain(&self.options.clientid));
        let (username, password) = (&attempt.username, attempt.password.expose());
        match try_login(broker, &self.first, until, &clientid, username, password).await {
            Ok(()) => Ok(Decision::Allow(Grant::default())),
            Err(LoginError::Denied(reason)) => {
                Ok(Decision::Deny(format!("the broker says {reason}")))
            }
            Err(LoginError::Failed(reason)) => Err(reason),
        }
    }
}
