//! Metrics of authentication.

use std::time::Duration;

use metrics::{Counter, Gauge};

use super::{
    AUTHENTICATION_RELOADS, AUTHENTICATION_SECONDS, AUTHENTICATIONS, AUTHENTICATIONS_IN_FLIGHT,
    AUTHORIZATIONS, Counted, LOGIN_ATTEMPTS_LIMITED, Metrics, label,
};

/// See the module.
#[derive(Clone)]
pub struct AuthMetrics {
    metrics: Metrics,
    in_flight: Gauge,
    limited: [Counter; 2],
    authorized: [Counter; 2],
}

impl AuthMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        Self {
            in_flight: metrics.gauge(AUTHENTICATIONS_IN_FLIGHT, Vec::new()),
            limited: ["address", "clientid"]
                .map(|by| metrics.counter(LOGIN_ATTEMPTS_LIMITED, vec![label("by", by)])),
            authorized: ["allow", "deny"]
                .map(|outcome| metrics.counter(AUTHORIZATIONS, vec![label("outcome", outcome)])),
            metrics: metrics.clone(),
        }
    }

    /// Counts an authentication as under way.
    pub fn begin(&self) -> Counted<'_> {
        Counted::one(&self.in_flight)
    }

    /// Counts what an authenticator answered, and how long that took.
    pub fn asked(&self, authenticator: &'static str, outcome: &'static str, elapsed: Duration) {
        let mut labels = vec![label("authenticator", authenticator)];
        let seconds = self
            .metrics
            .histogram(AUTHENTICATION_SECONDS, labels.clone());
        seconds.record(elapsed.as_secs_f64());
        labels.push(label("outcome", outcome));
        self.metrics.counter(AUTHENTICATIONS, labels).increment(1);
    }

    /// Counts an attempt that was refused unseen, for its address or else for its client id.
    pub fn limited(&self, by_address: bool) {
        let [address, clientid] = &self.limited;
        if by_address { address } else { clientid }.increment(1);
    }

    /// Counts a wish that was checked.
    pub fn authorized(&self, is_allowed: bool) {
        let [allowed, denied] = &self.authorized;
        if is_allowed { allowed } else { denied }.increment(1);
    }

    /// Counts that a file has changed and what became of it.
    pub fn reloaded(&self, outcome: &'static str) {
        let labels = vec![label("outcome", outcome)];
        self.metrics
            .counter(AUTHENTICATION_RELOADS, labels)
            .increment(1);
    }
}
