//! When the messages of an open loop are due.
//!
//! The times are fixed before anything is sent, and a message's latency counts from its
//! time, not from when there was room for it: a system that stalls for a second owes
//! the answers to all messages of that second. Measuring from the sending instead would
//! leave out the very ones that had to wait (coordinated omission).

/// Nanoseconds in a second.
const SECOND: u128 = 1_000_000_000;

/// Messages at an even rate.
#[derive(Debug)]
pub struct Schedule {
    start: u64,
    rate: u64,
    next: u64,
}

impl Schedule {
    /// `start` in nanoseconds, `rate` in messages a second, at least one.
    pub fn new(start: u64, rate: u64) -> Self {
        Self {
            start,
            rate: rate.max(1),
            next: 0,
        }
    }

    /// When the next message is due, in nanoseconds. Reckoned from the start, so that
    /// no error adds up.
    pub fn next_due(&self) -> u64 {
        let offset = u128::from(self.next) * SECOND / u128::from(self.rate);
        self.start
            .saturating_add(u64::try_from(offset).unwrap_or(u64::MAX))
    }

    /// The next message if it is due by `now`: its number and its time.
    pub fn take(&mut self, now: u64) -> Option<(u64, u64)> {
        let due = self.next_due();
        (due <= now).then(|| {
            let number = self.next;
            self.next += 1;
            (number, due)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(schedule: &mut Schedule, now: u64) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| schedule.take(now)).collect()
    }

    #[test]
    fn messages_are_due_at_an_even_rate() {
        let mut schedule = Schedule::new(500, 4);
        assert_eq!(schedule.take(499), None);
        assert_eq!(all(&mut schedule, 500), [(0, 500)]);
        assert_eq!(schedule.next_due(), 250_000_500);
        assert_eq!(all(&mut schedule, 250_000_499), []);
        assert_eq!(all(&mut schedule, 250_000_500), [(1, 250_000_500)]);
    }

    /// Who comes late gives each message the time at which it was due, not the
    /// present: nothing is left out.
    #[test]
    fn a_stall_leaves_nothing_out() {
        let mut schedule = Schedule::new(0, 1000);
        let late = all(&mut schedule, 5_000_000);
        let times: Vec<u64> = late.iter().map(|(_, time)| *time).collect();
        assert_eq!(
            times,
            [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]
        );
    }

    #[test]
    fn an_odd_rate_does_not_drift() {
        let mut schedule = Schedule::new(0, 7);
        let second = 1_000_000_000;
        let in_an_hour = std::iter::from_fn(|| schedule.take(3600 * second - 1)).count();
        assert_eq!(in_an_hour, 7 * 3600);
        assert_eq!(schedule.next_due(), 3600 * second);
    }
}
