//! Metrics of authentication.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Label};

use super::{
    AUTHENTICATION_RELOADS, AUTHENTICATION_SECONDS, AUTHENTICATIONS, AUTHENTICATIONS_IN_FLIGHT,
    AUTHORIZATION_REQUESTS, AUTHORIZATIONS, Counted, LOGIN_ATTEMPTS_LIMITED, Metrics, label,
};

/// What somebody who is asked can say, or that it says nothing.
const OUTCOMES: [&str; 4] = ["allow", "deny", "ignore", "error"];

/// A counter for each outcome: all of them are there from the start.
struct Outcomes([Counter; 4]);

impl Outcomes {
    fn new(metrics: &Metrics, name: &'static str, labels: &[Label]) -> Self {
        Self(OUTCOMES.map(|outcome| {
            let outcome = std::iter::once(label("outcome", outcome));
            metrics.counter(name, labels.iter().cloned().chain(outcome).collect())
        }))
    }

    fn count(&self, outcome: &str) {
        let mut counters = OUTCOMES.iter().zip(&self.0);
        if let Some((_, counter)) = counters.find(|(name, _)| **name == outcome) {
            counter.increment(1);
        }
    }
}

/// The metrics of an authenticator.
pub struct AuthenticatorMetrics {
    seconds: Histogram,
    outcomes: Outcomes,
}

impl AuthenticatorMetrics {
    /// Counts what it answered, and how long that took.
    pub fn count(&self, outcome: &str, elapsed: Duration) {
        self.seconds.record(elapsed.as_secs_f64());
        self.outcomes.count(outcome);
    }
}

/// The metrics of a service with rules of access.
pub struct SourceMetrics(Outcomes);

impl SourceMetrics {
    /// Counts what it answered.
    pub fn count(&self, outcome: &str) {
        self.0.count(outcome);
    }
}

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

    /// The metrics of an authenticator: of which kind, in the table with which number.
    pub fn authenticator(&self, kind: &'static str, number: &str) -> AuthenticatorMetrics {
        let labels = vec![
            label("authenticator", kind),
            label("number", number.to_owned()),
        ];
        AuthenticatorMetrics {
            seconds: self
                .metrics
                .histogram(AUTHENTICATION_SECONDS, labels.clone()),
            outcomes: Outcomes::new(&self.metrics, AUTHENTICATIONS, &labels),
        }
    }

    /// The metrics of a service with rules, in the table with this number.
    pub fn source(&self, number: &str) -> SourceMetrics {
        let labels = [label("number", number.to_owned())];
        SourceMetrics(Outcomes::new(
            &self.metrics,
            AUTHORIZATION_REQUESTS,
            &labels,
        ))
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
