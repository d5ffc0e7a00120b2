//! Looks at the run every second: for the progress line, and for the report.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::process::{Process, Usage};
use crate::report::{Sample, per_second, text};
use crate::stats::Stats;

/// How often.
const EVERY: Duration = Duration::from_secs(1);

/// Seconds that are kept: a week. Later ones are shown but not in the report.
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
        let length = self.last.elapsed();
        if length < EVERY {
            return;
        }
        self.last += length;
        let usages = self.usages();
        let processes = usages
            .iter()
            .zip(&self.usages)
            .map(|(now, before)| {
                let (now, before) = (now.as_ref()?, before.as_ref()?);
                let cpu = now.cpu.saturating_sub(before.cpu).as_secs_f64();
                Some((cpu / length.as_secs_f64(), now.memory))
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
            "{:>5.0}s {:<10} {:>8.0}/s",
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
                line += &format!("  {name} {:.0} % {}", cpu * 100.0, text::bytes(*memory));
            }
        }
        line
    }
}
