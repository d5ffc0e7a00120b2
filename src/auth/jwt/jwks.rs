//! A service that gives keys: asked at the start, every so often, and when a token names a key that
//! is not there.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Keys;
use super::key;
use crate::auth::fill::Values;
use crate::auth::http::{Asker, Options};
use crate::auth::{Attempt, Trouble};
use crate::metrics::AuthMetrics;

/// Between two requests passes at least so long, however many tokens name keys that are not there,
/// and however often it fails.
const LEAST_PAUSE: Duration = Duration::from_secs(5);

struct Shared {
    asker: Asker,
    interval: Duration,
    /// How long a token waits for the first keys.
    patience: Duration,
    keys: watch::Sender<Option<Arc<Keys>>>,
    wanted: Notify,
}

/// See the module.
pub struct Endpoint(Arc<Shared>);

impl Endpoint {
    pub fn new(request: &Options, interval: Duration) -> Self {
        Self(Arc::new(Shared {
            asker: Asker::new(request),
            interval,
            patience: request.client.request_timeout,
            keys: watch::Sender::new(None),
            wanted: Notify::new(),
        }))
    }

    /// The keys; waits for the first ones. A token that names another one has them asked for.
    pub async fn keys(&self, kid: Option<&str>) -> Result<Arc<Keys>, String> {
        let mut keys = self.0.keys.subscribe();
        let first = tokio::time::timeout(self.0.patience, keys.wait_for(Option::is_some)).await;
        let found = match first {
            Ok(Ok(keys)) => keys.clone(),
            _ => None,
        };
        let found = found.ok_or("the service has not given any keys")?;
        if !found.iter().any(|key| key.is_named(kid)) {
            self.0.wanted.notify_one();
        }
        Ok(found)
    }

    /// Asks until `stop` is cancelled.
    pub fn follow(&self, name: &str, metrics: &AuthMetrics, stop: &CancellationToken) {
        let (shared, stop) = (self.0.clone(), stop.clone());
        let (name, metrics) = (name.to_owned(), metrics.clone());
        tokio::spawn(async move {
            let trouble = Trouble::default();
            loop {
                let asked = Instant::now();
                let result = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    result = shared.fetch() => result,
                };
                let pause = match &result {
                    Ok(()) => shared.interval,
                    Err(_) => LEAST_PAUSE.min(shared.interval),
                };
                match &result {
                    Ok(()) => {
                        metrics.reloaded("ok");
                        trouble.is_over(&name);
                    }
                    Err(error) => {
                        metrics.reloaded("failed");
                        trouble.is(&name, error);
                    }
                }
                let least = LEAST_PAUSE.min(shared.interval);
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep_until(asked + pause) => {}
                    () = shared.wanted.notified() => {
                        tokio::time::sleep_until(asked + least).await;
                    }
                }
            }
        });
    }
}

impl Shared {
    async fn fetch(&self) -> Result<(), String> {
        let nobody = Attempt::nobody();
        let values = Values {
            attempt: &nobody,
            wish: None,
        };
        let answer = self
            .asker
            .ask(&values)
            .await
            .map_err(|error| error.to_string())?;
        if answer.status != StatusCode::OK {
            return Err(format!("it answers with status {}", answer.status.as_u16()));
        }
        self.keys
            .send_replace(Some(Arc::new(key::jwks(&answer.body)?)));
        Ok(())
    }
}
