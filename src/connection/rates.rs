//! `max_bytes_rate` and `max_messages_rate` of one connection.

use std::time::{Duration, Instant};

use super::context::ListenerContext;
use crate::rate::TokenBucket;

/// Longest rest after a read, however low the rate.
const MAX_REST: Duration = Duration::from_secs(24 * 3600);

/// Limits on what one device sends; boxed, for most connections have none.
pub(super) struct Rates {
    bytes: Option<TokenBucket>,
    messages: Option<TokenBucket>,
    /// When reading goes on.
    pub(super) resume: Option<Instant>,
}

impl Rates {
    pub(super) fn new(context: &ListenerContext, now: Instant) -> Option<Box<Self>> {
        let settings = &context.settings;
        let bucket = |rate: Option<f64>| rate.map(|rate| TokenBucket::new(rate, now));
        let rates = Self {
            bytes: bucket(settings.max_bytes_rate),
            messages: bucket(settings.max_messages_rate),
            resume: None,
        };
        (rates.bytes.is_some() || rates.messages.is_some()).then(|| Box::new(rates))
    }

    /// How long reading must rest after a read.
    pub(super) fn debit(&mut self, bytes: usize, now: Instant) -> Duration {
        let rest = |bucket: &mut Option<TokenBucket>, amount: f64| {
            bucket
                .as_mut()
                .map_or(Duration::ZERO, |bucket| bucket.debit(amount, now))
        };
        rest(&mut self.bytes, bytes as f64)
            .max(rest(&mut self.messages, 1.0))
            .min(MAX_REST)
    }

    /// Whether a datagram is within the limits; it counts only then.
    pub(super) fn admits(&mut self, bytes: usize, now: Instant) -> bool {
        let within = |bucket: &mut Option<TokenBucket>, amount: f64| {
            bucket.as_mut().is_none_or(|bucket| bucket.has(amount, now))
        };
        let admitted = within(&mut self.bytes, bytes as f64) && within(&mut self.messages, 1.0);
        if admitted {
            self.debit(bytes, now);
        }
        admitted
    }

    /// Most bytes of one read from a stream: a second's worth, so that the rest after
    /// it is about a second and the device is not lost sight of.
    pub(super) fn burst(&self) -> usize {
        let bytes = self.bytes.as_ref().map_or(f64::MAX, TokenBucket::burst);
        // A cast from floating point saturates.
        (bytes as usize).max(1)
    }
}
