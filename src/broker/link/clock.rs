//! What a link waits for, and until when. No IO and no clock of its own.
//!
//! A link that has nothing to wait for but its next ping wakes nobody until then:
//! thousands of devices have links of their own, and almost all of them are idle.

use std::time::Duration;

use tokio::time::Instant;

use super::super::dial::LinkError;

/// How much earlier than the keep-alive asks for a ping is sent, so that the broker never
/// sees it late; with a short keep-alive half of it.
const AHEAD: Duration = Duration::from_secs(1);

/// Between two looks at what awaits an answer without a deadline of its own.
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// The intervals of a link.
#[derive(Debug, Clone, Copy)]
pub(super) struct Intervals {
    /// Within which the broker wants to hear from us (MQTT 5, 3.1.2.10 and 3.2.2.3.14); zero:
    /// it does not.
    pub(super) keep_alive: Duration,
    /// After which a broker that says nothing is asked.
    pub(super) patience: Duration,
    /// After which one that takes no bytes, or answers no ping, is given up.
    pub(super) stall: Duration,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Clock {
    intervals: Intervals,
    last_write: Instant,
    last_read: Instant,
    write_blocked: Option<Instant>,
    ping_sent: Option<Instant>,
    look_at: Option<Instant>,
    /// When subscriptions are asked for again.
    pub(super) retry_at: Option<Instant>,
}

/// A little less than an interval.
fn short_of(interval: Duration) -> Duration {
    interval - AHEAD.min(interval / 2)
}

impl Clock {
    pub(super) fn new(intervals: Intervals, now: Instant) -> Self {
        Self {
            intervals,
            last_write: now,
            last_read: now,
            write_blocked: None,
            ping_sent: None,
            look_at: None,
            retry_at: None,
        }
    }

    /// Some bytes came. Any packet shows that the broker lives.
    pub(super) fn read(&mut self, now: Instant) {
        self.ping_sent = None;
        self.last_read = now;
    }

    /// Some bytes went.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.last_write = now;
        self.write_blocked = None;
    }

    /// Whether there are bytes that cannot be written, as of `now` where that is new.
    pub(super) fn blocked(&mut self, is_blocked: bool, now: impl FnOnce() -> Instant) {
        match is_blocked {
            false => self.write_blocked = None,
            true if self.write_blocked.is_none() => self.write_blocked = Some(now()),
            true => {}
        }
    }

    /// There is something to be looked at again and again, from `now` on where that is new.
    pub(super) fn watch(&mut self, now: impl FnOnce() -> Instant) {
        if self.look_at.is_none() {
            self.look_at = Some(now() + LOOK);
        }
    }

    /// Whether it is time to look. The next one is asked for with [`Clock::watch`].
    pub(super) fn looks(&mut self, now: Instant) -> bool {
        let due = self.look_at.is_some_and(|at| now >= at);
        if due {
            self.look_at = None;
        }
        due
    }

    /// Whether it is time to ask for subscriptions again.
    pub(super) fn retries(&self, now: Instant) -> bool {
        self.retry_at.is_some_and(|at| now >= at)
    }

    /// Fails where the broker has gone silent.
    pub(super) fn check(&self, now: Instant) -> Result<(), LinkError> {
        let stall = self.intervals.stall;
        let stalled = |since: Option<Instant>| since.is_some_and(|at| now >= at + stall);
        if stalled(self.write_blocked) {
            return Err(LinkError::WriteStalled(stall));
        }
        if stalled(self.ping_sent) {
            return Err(LinkError::PingTimeout(stall));
        }
        Ok(())
    }

    /// Whether a ping is to be sent; if so it counts as sent.
    pub(super) fn pings(&mut self, now: Instant) -> bool {
        let quiet = self.quiet_at().is_some_and(|at| now >= at);
        let pings = quiet || (self.ping_sent.is_none() && now >= self.heard_by());
        if pings {
            self.ping_sent.get_or_insert(now);
            self.last_write = now;
        }
        pings
    }

    /// When the next of all this is due: in the future, once what is due has been done.
    pub(super) fn next(&self) -> Instant {
        let others = [
            self.quiet_at(),
            self.write_blocked.map(|at| at + self.intervals.stall),
            self.look_at,
            self.retry_at,
        ];
        others
            .into_iter()
            .flatten()
            .fold(self.heard_by(), Instant::min)
    }

    /// When the broker wants to hear from us.
    fn quiet_at(&self) -> Option<Instant> {
        let interval = self.intervals.keep_alive;
        (!interval.is_zero()).then(|| self.last_write + short_of(interval))
    }

    /// When we want to have heard from the broker: else it is asked, or is given up. One that
    /// hangs may leave us writing for long, into buffers on the way: whatever we wrote
    /// meanwhile does not count.
    fn heard_by(&self) -> Instant {
        match self.ping_sent {
            Some(at) => at + self.intervals.stall,
            None => self.last_read + short_of(self.intervals.patience),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn clock(keep_alive: u64, start: Instant) -> Clock {
        let intervals = Intervals {
            keep_alive: secs(keep_alive),
            patience: secs(30),
            stall: secs(10),
        };
        Clock::new(intervals, start)
    }

    /// Goes from one due time to the next until `end`; those at which a ping was sent, and
    /// how many there were.
    fn drive(clock: &mut Clock, start: Instant, end: Duration, answers: bool) -> (Vec<f64>, u32) {
        let (mut pings, mut wakes) = (Vec::new(), 0);
        while clock.next() < start + end {
            let now = clock.next();
            wakes += 1;
            clock.check(now).unwrap();
            clock.looks(now);
            if clock.pings(now) {
                pings.push((now - start).as_secs_f64());
                if answers {
                    clock.read(now);
                }
            }
            assert!(clock.next() > now, "it never comes to rest");
        }
        (pings, wakes)
    }

    #[test]
    fn an_idle_link_wakes_for_its_pings_only() {
        let start = Instant::now();
        let (pings, wakes) = drive(&mut clock(30, start), start, secs(100), true);
        assert_eq!(pings, [29.0, 58.0, 87.0]);
        assert_eq!(wakes, 3);
    }

    #[test]
    fn the_brokers_own_keep_alive_counts_however_short() {
        let start = Instant::now();
        for (keep_alive, expected) in [(1, vec![0.5, 1.0, 1.5]), (2, vec![1.0]), (10, vec![])] {
            let pings = drive(&mut clock(keep_alive, start), start, secs(2), true).0;
            assert_eq!(pings, expected);
        }
        // None: the broker is asked all the same whether it is there.
        let pings = drive(&mut clock(0, start), start, secs(60), true).0;
        assert_eq!(pings, [29.0, 58.0]);
    }

    #[test]
    fn a_broker_that_answers_no_ping_is_given_up() {
        let start = Instant::now();
        let mut clock = clock(30, start);
        assert!(clock.pings(start + secs(29)));
        let over = start + secs(39);
        assert_eq!(clock.next(), over);
        clock.check(over - secs(1)).unwrap();
        let error = clock.check(over).unwrap_err();
        assert!(matches!(error, LinkError::PingTimeout(_)), "{error}");
        // Anything that it says will do.
        clock.read(over);
        clock.check(over + secs(1)).unwrap();
    }

    #[test]
    fn one_that_only_takes_is_asked_and_given_up() {
        let start = Instant::now();
        let mut clock = clock(30, start);
        for second in 0..29 {
            let now = start + secs(second);
            clock.wrote(now);
            assert!(!clock.pings(now));
        }
        assert!(clock.pings(start + secs(29)));
        // Pings that are due for the broker's sake do not put it off.
        for second in 30..39 {
            clock.wrote(start + secs(second));
            clock.check(start + secs(second)).unwrap();
        }
        clock.check(start + secs(39)).unwrap_err();
    }

    #[test]
    fn bytes_that_nobody_takes_end_the_link() {
        let start = Instant::now();
        let mut clock = clock(30, start);
        clock.blocked(true, || start);
        clock.blocked(true, || start + secs(5));
        assert_eq!(clock.next(), start + secs(10));
        let error = clock.check(start + secs(10)).unwrap_err();
        assert!(matches!(error, LinkError::WriteStalled(_)), "{error}");
        clock.wrote(start + secs(10));
        clock.check(start + secs(20)).unwrap();
        clock.blocked(true, || start + secs(20));
        clock.blocked(false, || start + secs(20));
        clock.check(start + secs(30)).unwrap();
    }

    #[test]
    fn what_is_watched_is_looked_at_once_a_second() {
        let start = Instant::now();
        let mut clock = clock(30, start);
        clock.watch(|| start);
        clock.watch(|| start + secs(5));
        assert_eq!(clock.next(), start + LOOK);
        assert!(!clock.looks(start + LOOK / 2));
        assert!(clock.looks(start + LOOK));
        assert!(!clock.looks(start + 2 * LOOK), "nobody has asked for it");
        clock.retry_at = Some(start + secs(7));
        assert_eq!(clock.next(), start + secs(7));
    }
}
