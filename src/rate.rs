//! A token bucket: the one way this gateway limits a rate.

use std::time::{Duration, Instant};

/// Tokens that refill at a steady rate up to one second's worth.
///
/// Holds no clock: every call says what time it is.
#[derive(Debug)]
pub struct TokenBucket {
    rate: f64,
    tokens: f64,
    refilled: Instant,
}

impl TokenBucket {
    /// A full bucket of `rate` tokens a second. Its burst is one second's worth,
    /// and at least one token.
    pub fn new(rate: f64, now: Instant) -> Self {
        Self {
            rate,
            tokens: rate.max(1.0),
            refilled: now,
        }
    }

    /// Takes one token if there is one.
    pub fn try_take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }

    /// Takes `amount` tokens, into debt where there are not enough, and says how
    /// long it takes until the debt is paid.
    pub fn debit(&mut self, amount: f64, now: Instant) -> Duration {
        self.refill(now);
        self.tokens -= amount;
        if self.tokens >= 0.0 {
            Duration::ZERO
        } else {
            Duration::try_from_secs_f64(-self.tokens / self.rate).unwrap_or(Duration::MAX)
        }
    }

    /// Whether there are `amount` tokens, or all that it ever holds.
    pub fn has(&mut self, amount: f64, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= amount.min(self.burst())
    }

    /// The most tokens it ever holds.
    pub fn burst(&self) -> f64 {
        self.rate.max(1.0)
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate).min(self.burst());
        self.refilled = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_one_second_then_the_rate_holds() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10.0, start);
        assert_eq!((0..20).filter(|_| bucket.try_take(start)).count(), 10);
        let later = start + Duration::from_millis(500);
        assert_eq!((0..20).filter(|_| bucket.try_take(later)).count(), 5);
    }

    #[test]
    fn debt_is_paid_at_the_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(1000.0, start);
        assert_eq!(bucket.debit(1000.0, start), Duration::ZERO);
        assert_eq!(bucket.debit(500.0, start), Duration::from_millis(500));
        let paid = start + Duration::from_millis(500);
        assert_eq!(bucket.debit(0.0, paid), Duration::ZERO);
    }

    #[test]
    fn what_is_more_than_a_burst_passes_a_full_bucket() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10.0, start);
        assert!(bucket.has(25.0, start));
        bucket.debit(25.0, start);
        assert!(!bucket.has(1.0, start + Duration::from_secs(1)));
        assert!(bucket.has(1.0, start + Duration::from_secs(2)));
    }

    #[test]
    fn a_rate_below_one_still_lets_one_through() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(0.5, start);
        assert!(bucket.try_take(start));
        assert!(!bucket.try_take(start + Duration::from_secs(1)));
        assert!(bucket.try_take(start + Duration::from_secs(2)));
    }
}
