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
