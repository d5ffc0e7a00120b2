//! Looks at the run every second, and when a phase ends: for the progress line, and for the
//! report.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::process::{Process, Usage};
use crate::report::{Sample, per_second, text};
use crate::stats::Stats;

/// How often.
const EVERY: Duration = Duration::from_secs(1);

/// A rest of a phase that is worth a sample of its own; a shorter one goes to the next.
const REST: Duration = Duration::from_millis(100);

/// The same for a whole phase.
const WHOLE: Duration = Duration::from_millis(1);

/// Least length of a sample in which processor time means something: its unit is a tick of
/// ten milliseconds.
const LEAST_OF_CPU: Duration = Duration::from_millis(500);

/// Samples that are kept: a week of them. Later ones are shown but not in the report.
const MOST: usize = 7 * 24 * 3600;

/// See the module.
pub struct Sampler {
    begun: Instant,
    last: Instant,
    done: u64,
    usages: Vec<Option<Usage>>,
    processes: Vec<Process>,
    shows: bool,
    pub samples: Vec<Sample>,
}

impl Sampler {
    /// The first second begins now.
    pub fn new(processes: Vec<Process>, shows: bool) -> Self {
        let now = Instant::now();
        Self {
            begun: now,
            last: now,
            done: 0,
            usages: processes.iter().map(Process::usage).collect(),
            processes,
            shows,
            samples: Vec::new(),
        }
    }

    /// The first second begins now, and not before.
    pub fn restart(&mut self) {
        self.begun = Instant::now();
        self.last = self.begun;
        self.usages = self.usages();
    }

    /// What the processes have used so far.
    pub fn usages(&self) -> Vec<Option<Usage>> {
        self.processes.iter().map(Process::usage).collect()
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.processes.iter().map(|process| process.name.as_str())
    }

    /// Takes a sample if a second has passed.
    pub fn look(&mut self, phase: &'static str, stats: &Stats) {
        if self.last.elapsed() >= EVERY {
            self.take(phase, stats);
        }
    }

    /// Takes a sample of what is left of a phase that has ended.
    pub fn end(&mut self, phase: &'static str, stats: &Stats) {
        let begun = self.samples.last().is_some_and(|last| last.phase == phase);
        let least = if begun { REST } else { WHOLE };
        if self.last.elapsed() >= least {
            self.take(phase, stats);
        }
    }

    fn take(&mut self, phase: &'static str, stats: &Stats) {
        let length = self.last.elapsed();
        self.last += length;
        let usages = self.usages();
        let processes = usages
            .iter()
            .zip(&self.usages)
            .map(|(now, before)| {
                let (now, before) = (now.as_ref()?, before.as_ref()?);
                let cpu = now.cpu.saturating_sub(before.cpu).as_secs_f64();
                let cpu = (length >= LEAST_OF_CPU).then(|| cpu / length.as_secs_f64());
                Some((cpu, now.memory))
            })
            .collect();
        self.usages = usages;
        let recent = stats.take_recent();
        let at = |percentile| (!recent.is_empty()).then(|| recent.value_at_percentile(percentile));
        let all = stats.connected.get() + stats.all_arrived.get();
        let sample = Sample {
            at: self.last.duration_since(self.begun),
            length,
            phase,
            done: all.saturating_sub(self.done),
            p50: at(50.0),
            p99: at(99.0),
            outstanding: stats.outstanding(),
            lost: stats.lost.get(),
            processes,
        };
        self.done = all;
        if self.shows {
            // Whether anybody reads it or not.
            let _ = writeln!(std::io::stderr(), "{}", self.line(&sample));
        }
        if self.samples.len() < MOST {
            self.samples.push(sample);
        }
    }

    fn line(&self, sample: &Sample) -> String {
        let mut line = format!(
            "{:>5.1}s {:<10} {:>8.0}/s",
            sample.at.as_secs_f64(),
            sample.phase,
            per_second(sample.done, sample.length)
        );
        for (name, value) in [("p50", sample.p50), ("p99", sample.p99)] {
            let shown = value.map(|nanos| text::time(Duration::from_nanos(nanos)));
            line += &format!("  {name} {:>8}", shown.as_deref().unwrap_or("-"));
        }
        line += &format!("  {} under way", sample.outstanding);
        if sample.lost > 0 {
            line += &format!("  {} lost", sample.lost);
        }
        for (name, usage) in self.names().zip(&sample.processes) {
            if let Some((cpu, memory)) = usage {
                let cpu = cpu.map_or(String::new(), |cpu| format!(" {:.0} %", cpu * 100.0));
                line += &format!("  {name}{cpu} {}", text::bytes(*memory));
            }
        }
        line
    }
}
