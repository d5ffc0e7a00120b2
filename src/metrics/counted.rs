//! Gauges of what is under way.

use metrics::Gauge;

/// One more on a gauge for as long as it lives, also when its work is abandoned.
pub struct Counted<'a>(&'a Gauge);

impl<'a> Counted<'a> {
    /// One more.
    pub fn one(gauge: &'a Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// Adds a number that changes to a gauge that others add to as well, for as long as it lives.
pub struct Share {
    gauge: Gauge,
    value: usize,
}

impl Share {
    /// Nothing yet.
    pub fn new(gauge: Gauge) -> Self {
        Self { gauge, value: 0 }
    }

    /// What it adds from now on.
    pub fn set(&mut self, value: usize) {
        if value != self.value {
            self.gauge.increment(value as f64 - self.value as f64);
            self.value = value;
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
