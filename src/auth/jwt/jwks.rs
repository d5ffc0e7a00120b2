//! A service that gives keys: asked at the start, every so often, and when a token names a key that
//! is not there. That token waits for what the service says, once no other issuer vouches for it: its
//! device is no guesser because keys have changed. Tokens with made-up names of keys gain nothing by
//! it: together they bring about one request in each pause, and are refused, and counted, when it
//! is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::StatusCode;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Keys;
use super::key;
use crate::auth::fill::Values;
use crate::auth::http::{Asker, Options};
use crate::auth::{Attempt, Fault, MAX_UNDER_WAY, Trouble};
use crate::metrics::AuthMetrics;

/// Between two requests passes at least so long, however many tokens name keys that are not there,
/// and however often it fails.
const LEAST_PAUSE: Duration = Duration::from_secs(5);

/// Tokens that wait for keys at a time, of all endpoints: others than those who bring them are to be
/// authenticated, too.
static PLACES: Semaphore = Semaphore::const_new(MAX_UNDER_WAY / 2);

/// The longest that a token waits for the next answer: an authentication takes no longer than
/// thirty seconds.
const MAX_WAIT: Duration = Duration::from_secs(20);

/// What the service has said so far.
#[derive(Debug, Default)]
struct Said {
    /// The last keys.
    keys: Option<Arc<Keys>>,
    /// The request that was answered last, or failed, by its number; from 1 on.
    request: u64,
    /// Whether the last one brought no keys.
    has_failed: bool,
}

struct Shared {
    asker: Asker,
    /// For the log.
    url: String,
    interval: Duration,
    /// How long a request takes at most, and a token waits for one.
    patience: Duration,
    said: watch::Sender<Said>,
    wanted: Notify,
    /// Requests that have begun.
    begun: AtomicU64,
}

/// See the module.
pub struct Endpoint(Arc<Shared>);

impl Endpoint {
    pub fn new(request: &Options, interval: Duration) -> Self {
        Self(Arc::new(Shared {
            asker: Asker::new(request),
            url: request.url.without_query(),
            interval,
            patience: request.client.request_timeout,
            said: watch::Sender::default(),
            wanted: Notify::new(),
            begun: AtomicU64::new(0),
        }))
    }

    /// The keys. Where there are none yet, or not the one that the token names, it `waits` for the
    /// answer to a request that begins from now on.
    ///
    /// # Errors
    /// [`Fault::Later`] where it would have to wait and is not to. There are no keys, or it cannot be
    /// said that the one that the token names is none.
    pub async fn keys(&self, kid: Option<&str>, waits: bool) -> Result<Arc<Keys>, Fault> {
        let shared = &self.0;
        // What is under way may have been answered before the key was there.
        let next = shared.begun.load(Ordering::Acquire) + 1;
        let mut said = shared.said.subscribe();
        let has = |keys: &Keys| keys.iter().any(|key| key.is_named(kid));
        let there = said.borrow_and_update().keys.clone();
        if let Some(keys) = there.filter(|keys| has(keys)) {
            return Ok(keys);
        }
        if !waits {
            return Err(Fault::Later);
        }
        let later = |why: &str| Fault::NotYet(why.to_owned());
        let full = |_| later("too many tokens wait for keys");
        let _place = PLACES.try_acquire().map_err(full)?;
        let first = said.wait_for(|said| said.keys.is_some());
        let first = tokio::time::timeout(shared.patience, first).await;
        if !matches!(first, Ok(Ok(_))) {
            let why = "the service has not given any keys";
            return Err(Fault::OfService(why.to_owned()));
        }
        drop(first);
        shared.wanted.notify_one();
        let limit = shared.least_pause() + 2 * shared.patience;
        let is_said =
            |said: &Said| said.request >= next || said.keys.as_ref().is_some_and(|keys| has(keys));
        let is_said = said.wait_for(is_said);
        let Ok(Ok(said)) = tokio::time::timeout(limit.min(MAX_WAIT), is_said).await else {
            return Err(later("the key that the token names is not fetched yet"));
        };
        match &said.keys {
            Some(keys) if has(keys) || !said.has_failed => Ok(keys.clone()),
            _ => Err(later("the key that the token names cannot be fetched")),
        }
    }

    /// Asks until `stop` is cancelled.
    pub fn follow(&self, name: &str, metrics: &AuthMetrics, stop: &CancellationToken) {
        let (shared, stop) = (self.0.clone(), stop.clone());
        let (name, metrics) = (name.to_owned(), metrics.clone());
        tokio::spawn(async move {
            let trouble = Trouble::new("authenticator", &name, "jwt", shared.url.clone());
            loop {
                let asked = Instant::now();
                let result = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    result = shared.fetch() => result,
                };
                let least = shared.least_pause();
                let pause = if result.is_ok() {
                    shared.interval
                } else {
                    least
                };
                match &result {
                    Ok(()) => {
                        metrics.reloaded("ok");
                        trouble.is_over();
                    }
                    Err(error) => {
                        metrics.reloaded("failed");
                        trouble.is(error);
                    }
                }
                let wanted = async {
                    shared.wanted.notified().await;
                    tokio::time::sleep_until(asked + least).await;
                };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep_until(asked + pause) => {}
                    () = wanted => {}
                }
            }
        });
    }
}

impl Shared {
    fn least_pause(&self) -> Duration {
        LEAST_PAUSE.min(self.interval)
    }

    async fn fetch(&self) -> Result<(), String> {
        let request = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let asked = self.ask().await;
        self.said.send_modify(|said| {
            said.request = request;
            said.has_failed = asked.is_err();
            if let Ok(keys) = &asked {
                said.keys = Some(keys.clone());
            }
        });
        asked.map(drop)
    }

    async fn ask(&self) -> Result<Arc<Keys>, String> {
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
        key::jwks(&answer.body).map(Arc::new)
    }
}
