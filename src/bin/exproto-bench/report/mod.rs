//! What a run has found out, and its forms.

pub mod chart;
pub mod json;
pub mod text;

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::options::{Options, Scenario};
use crate::process::TICK;
use crate::stats::Stats;

/// Percentiles that are shown.
pub const PERCENTILES: [f64; 6] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99];

/// Processor time below it, in ticks, says nothing of a message: a tick more or less would be
/// more than 5 % of it.
const LEAST_TICKS: u32 = 20;

/// One second of a run, or less where a phase ended.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Since the connections began, or the messages.
    pub at: Duration,
    /// How long it was in fact.
    pub length: Duration,
    /// What it belongs to: `connecting`, `warming up`, `measuring`, `draining`, `idle`.
    pub phase: &'static str,
    /// Messages that arrived, or connections that opened.
    pub done: u64,
    /// Nanoseconds; `None` where nothing was done.
    pub p50: Option<u64>,
    pub p99: Option<u64>,
    pub outstanding: u64,
    pub lost: u64,
    /// Of each process: processors in use, if it was long enough to tell, and bytes.
    pub processes: Vec<Option<(Option<f64>, u64)>>,
}

/// What a process has used.
#[derive(Debug, Clone)]
pub struct ProcessReport {
    pub name: String,
    /// While it was measured.
    pub cpu: Option<Duration>,
    /// In bytes: before the devices connected, after it, and in the end.
    pub before: Option<u64>,
    pub connected: Option<u64>,
    pub end: Option<u64>,
}

impl ProcessReport {
    /// Processors in use; `None` where a tick more or less would make much of it.
    pub fn processors(&self, measured: Duration) -> Option<f64> {
        let told = measured >= TICK * 100 || (!self.is_too_short() && !measured.is_zero());
        let cpu = self.cpu.filter(|_| told)?;
        Some(cpu.as_secs_f64() / measured.as_secs_f64())
    }

    /// Processor time that is too little to divide.
    pub fn is_too_short(&self) -> bool {
        self.cpu.is_some_and(|cpu| cpu < TICK * LEAST_TICKS)
    }

    /// Processor time for each message; `None` where there was too little of it.
    pub fn cpu_each(&self, messages: u64) -> Option<Duration> {
        let cpu = self.cpu.filter(|_| !self.is_too_short())?;
        let nanos = cpu.as_nanos().checked_div(u128::from(messages))?;
        Some(Duration::from_nanos(u64::try_from(nanos).ok()?))
    }

    /// Bytes for each connection: what came with them, after the idle time if that was
    /// measured. `None` where memory was freed meanwhile.
    pub fn memory_each(&self, scenario: Scenario, connections: u64) -> Option<u64> {
        let with = match scenario {
            Scenario::Idle => self.end,
            _ => self.connected,
        };
        let grown = with?.checked_sub(self.before?)?;
        grown.checked_div(connections)
    }
}

/// The result of a run.
#[derive(Debug, Clone)]
pub struct Report {
    pub options: Options,
    /// Why it ended before its time.
    pub ended_early: Option<String>,
    /// How long connecting took, and how long was measured.
    pub connecting: Duration,
    pub measured: Duration,
    pub counts: Counts,
    /// Nanoseconds.
    pub latency: Histogram<u64>,
    /// Fan-out: until the last device.
    pub to_all: Histogram<u64>,
    pub processes: Vec<ProcessReport>,
    pub samples: Vec<Sample>,
    /// Callbacks to the built-in handler while it was measured.
    pub callbacks: u64,
    /// Calls of the built-in handler that failed, and the first of them.
    pub failures: u64,
    pub trouble: Option<String>,
}

/// Numbers of a run.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Messages that arrived while it was measured: the throughput.
    pub completed: u64,
    pub sent: u64,
    pub arrived: u64,
    pub lost: u64,
    pub lost_before: u64,
    /// Neither arrived nor lost: a run that was ended early.
    pub unsettled: u64,
    pub duplicated: u64,
    pub late: u64,
    pub out_of_order: u64,
    pub unknown: u64,
    pub skipped: u64,
    pub published: u64,
    pub complete: u64,
    pub connected: u64,
    pub refused: u64,
    pub closed: u64,
}

impl Counts {
    /// As they stand; `completed` is known to who measured.
    pub fn read(stats: &Stats, completed: u64) -> Self {
        let (sent, arrived, lost) = (stats.sent.get(), stats.arrived.get(), stats.lost.get());
        Self {
            completed,
            sent,
            arrived,
            lost,
            lost_before: stats.lost_before.get(),
            unsettled: sent.saturating_sub(arrived).saturating_sub(lost),
            duplicated: stats.duplicated.get(),
            late: stats.late.get(),
            out_of_order: stats.out_of_order.get(),
            unknown: stats.unknown.get(),
            skipped: stats.skipped.get(),
            published: stats.published.get(),
            complete: stats.complete.get(),
            connected: stats.connected.get(),
            refused: stats.refused.get(),
            closed: stats.closed.get(),
        }
    }
}

impl Report {
    /// Messages a second, or connections.
    pub fn throughput(&self) -> f64 {
        let (count, time) = match self.options.scenario {
            Scenario::Storm => (self.counts.connected, self.connecting),
            _ => (self.counts.completed, self.measured),
        };
        per_second(count, time)
    }

    /// Messages in a callback; `None` without a handler of ours.
    pub fn messages_each_callback(&self) -> Option<f64> {
        (self.callbacks > 0).then(|| ratio(self.counts.completed, self.callbacks))
    }

    /// What processor time is divided by.
    pub fn units(&self) -> u64 {
        match self.options.scenario {
            Scenario::Storm => self.counts.connected,
            Scenario::Idle => 0,
            _ => self.counts.completed,
        }
    }
}

#[allow(clippy::cast_precision_loss)]
fn ratio(count: u64, of: u64) -> f64 {
    count as f64 / of as f64
}

/// A rate; nothing where there was no time.
#[allow(clippy::cast_precision_loss)]
pub fn per_second(count: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::stats::histogram;

    /// A small run.
    pub(super) fn report() -> Report {
        let arguments = "exproto-bench echo --devices 3 --window 2 --payload 30";
        let options = Options::try_parse_from(arguments.split(' ')).unwrap();
        let mut latency = histogram().unwrap();
        for micros in 1..=1000 {
            latency.record(micros * 1000).unwrap();
        }
        let sample = |second, done| Sample {
            at: Duration::from_secs(second),
            length: Duration::from_secs(1),
            phase: "measuring",
            done,
            p50: None,
            p99: Some(2_000_000),
            outstanding: 6,
            lost: 0,
            processes: vec![Some((Some(0.5), 1024)), None],
        };
        let process = |name: &str, cpu| ProcessReport {
            name: name.to_owned(),
            cpu,
            before: Some(1_000_000),
            connected: Some(1_006_000),
            end: Some(2_000_000),
        };
        Report {
            options,
            ended_early: None,
            connecting: Duration::from_millis(500),
            measured: Duration::from_secs(2),
            counts: Counts {
                completed: 1000,
                sent: 1003,
                arrived: 1000,
                lost: 1,
                unsettled: 2,
                duplicated: 4,
                connected: 3,
                ..Counts::default()
            },
            latency,
            to_all: histogram().unwrap(),
            processes: vec![
                process("gateway", Some(Duration::from_millis(500))),
                process("gone", None),
            ],
            samples: vec![sample(1, 400), sample(2, 600)],
            callbacks: 400,
            failures: 1,
            trouble: Some("Send: <refused>".to_owned()),
        }
    }

    #[test]
    fn the_text_says_what_was_found() {
        let text = text::render(&report());
        for part in [
            "echo over tcp, 3 devices, 30 bytes, QoS 1, closed loop, window 2\n",
            "  connections     3 opened in 500 ms, 6/s\n",
            "  throughput      500 messages/s over 2.00 s\n",
            "1003 sent, 1000 arrived, 1 lost, 4 duplicated, 2 under way at the end\n",
            "p50 500 µs",
            "max 1.00 ms\n",
            "  gateway         25 % of a processor, 500 µs a message, 1.9 MiB, 2.0 KiB a connection\n",
            "  handler         400 callbacks, 2.5 messages each\n",
            "1 calls failed, the first: Send: <refused>\n",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn the_json_says_the_same() {
        let json = json::render(&report());
        assert_eq!(json["throughput"], 500.0);
        assert_eq!(json["handler"]["messages_per_callback"], 2.5);
        assert_eq!(json["messages"]["duplicated"], 4);
        assert_eq!(json["processes"][0]["cpu_us_per_message"], 500.0);
        assert_eq!(json["processes"][0]["cpu_s"], 0.5);
        assert_eq!(json["processes"][0]["memory"]["per_connection"], 2000);
        assert!(json["processes"][1]["cpu_us_per_message"].is_null());
        let p50 = json["latency_us"]["p50"].as_f64().unwrap();
        assert!((p50 - 500.0).abs() < 1.0, "{p50}");
        assert!(json["fan_out"].is_null());
        assert_eq!(json["samples"][1]["per_second"], 600.0);
    }

    /// Memory that shrank meanwhile says nothing of connections, and no messages no
    /// processor time.
    #[test]
    fn what_cannot_be_said_is_not_said() {
        let mut report = report();
        let process = &mut report.processes[0];
        process.connected = Some(10);
        assert_eq!(process.memory_each(Scenario::Echo, 3), None);
        // What is there after the idle time.
        assert_eq!(process.memory_each(Scenario::Idle, 4), Some(250_000));
        assert_eq!(process.cpu_each(0), None);
        process.cpu = Some(TICK * 19);
        assert_eq!(process.cpu_each(1000), None);
        let text = text::render(&report);
        let told = "10 % of a processor, too short to tell for a message, 1.9 MiB";
        assert!(text.contains(told), "{text}");
        let process = &report.processes[0];
        assert_eq!(process.processors(TICK * 50), None);
        assert_eq!(process.processors(TICK * 190), Some(0.1));
        assert!(per_second(5, Duration::ZERO).abs() < f64::EPSILON);
    }
}
