//! Processor time and memory of processes, from /proc.

use std::fs;
use std::time::Duration;

use crate::failure::Failure;

/// The unit of processor time in /proc: USER_HZ is 100 on every architecture for which
/// Rust has a Linux.
pub const TICK: Duration = Duration::from_millis(10);

/// A process that is measured.
#[derive(Debug, Clone)]
pub struct Process {
    pub name: String,
    pid: u32,
}

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Processor time since its start, of all its threads.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub memory: u64,
}

impl Process {
    /// The process of this id.
    pub fn new(name: String, pid: u32) -> Self {
        Self { name, pid }
    }

    /// Those of `--pid`.
    ///
    /// # Errors
    /// One that is not there, or that may not be read.
    pub fn chosen(pids: &[(String, u32)]) -> Result<Vec<Self>, Failure> {
        let found = pids.iter().map(|(name, pid)| {
            let process = Self::new(name.clone(), *pid);
            process.usage().map(|_| process).ok_or_else(|| {
                Failure::Usage(format!(
                    "--pid {name}={pid}: no such process, or it may not be read"
                ))
            })
        });
        found.collect()
    }

    /// What it has used; `None` once it has ended, or where it may not be read.
    pub fn usage(&self) -> Option<Usage> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        Some(Usage {
            cpu: TICK.saturating_mul(u32::try_from(cpu_ticks(&stat)?).ok()?),
            memory: self.memory()?,
        })
    }

    /// The proportional set size where it may be read, as shared pages are counted once
    /// then; the resident set otherwise.
    fn memory(&self) -> Option<u64> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", self.pid)).ok();
        let rollup = read("smaps_rollup").and_then(|text| kilobytes(&text, "Pss:"));
        let memory = rollup.or_else(|| kilobytes(&read("status")?, "VmRSS:"));
        memory.map(|kilobytes| kilobytes * 1024)
    }
}

/// User and system time of a `stat` line, in ticks (proc_pid_stat(5), fields 14, 15).
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The name may hold anything, also spaces and brackets.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The number behind a word at the start of a line.
fn kilobytes(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b 1 2) S 1 7 7 0 -1 4194560 9 9 9 9 130 20 0 0 20 0 1 0 5 6 7";
        assert_eq!(cpu_ticks(stat), Some(150));
        assert_eq!(cpu_ticks("7 (a"), None);
    }

    #[test]
    fn memory_is_found_by_its_name() {
        let text = "Rss:    100 kB\nPss:    90 kB\nPss_Anon:  80 kB\n";
        assert_eq!(kilobytes(text, "Pss:"), Some(90));
        assert_eq!(kilobytes(text, "VmRSS:"), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let this = Process::new("test".to_owned(), std::process::id());
        let before = this.usage().unwrap();
        assert!(before.memory > 100_000);
        let mut sum = 0_u64;
        while this.usage().unwrap().cpu <= before.cpu {
            sum = (0..100_000).fold(sum, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        }
        assert_ne!(sum, 1);
        assert!(Process::new("none".to_owned(), u32::MAX).usage().is_none());
    }
}
