//! Logs: text or JSON on standard error, and what keeps peers from filling them.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::config::{LogFormat, LogLevel};

/// Starts logging. Libraries log at `info` at most, whatever the level: what they
/// say below that is about bytes, some of which are secret.
///
/// # Errors
/// Logging was started before.
pub fn init(level: LogLevel, format: LogFormat) -> anyhow::Result<()> {
    let filter = filter(level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let started = match format {
        LogFormat::Text => builder
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"))
}

fn filter(level: LogLevel) -> Result<EnvFilter, ParseError> {
    let (ours, others) = match level {
        LogLevel::Error => ("error", "error"),
        LogLevel::Warn => ("warn", "warn"),
        LogLevel::Info => ("info", "warn"),
        LogLevel::Debug => ("debug", "info"),
        LogLevel::Trace => ("trace", "info"),
    };
    // It warns of every broken ClientHello, in the words of whoever sent it: anybody could
    // fill the log. The refusal is counted, and told at `debug`.
    let rustls = match level {
        LogLevel::Debug | LogLevel::Trace => others,
        _ => "error",
    };
    EnvFilter::try_new(format!("{others},rustls={rustls},exproto_sidecar={ours}"))
}

/// Lines of one kind within [`INTERVAL`]: enough to see what is wrong, whether it is one
/// peer or many.
const MOST: u32 = 10;

/// How long the others of that kind are left out then, and counted.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lines of a kind that peers can bring about, as often as they like: so many are
/// written, whoever they are about, and the others counted.
///
/// Nothing is remembered of the peers: a flood from many addresses finds no more room
/// than one from a few.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    /// When the interval began.
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Seldom {
    /// Whether a line is to be written, and how many were left out since the last one:
    /// to be told with it, as `left_out`.
    pub fn tell(&self, now: Instant) -> Option<u64> {
        // No code under the lock can leave it half changed.
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = lines.since.is_none_or(|since| now >= since + INTERVAL);
        if begun {
            lines.since = Some(now);
            lines.written = 0;
        }
        if lines.written < MOST {
            lines.written += 1;
            return Some(std::mem::take(&mut lines.left_out));
        }
        lines.left_out += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_others_are_counted_and_told_with_the_next() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        for _ in 0..MOST {
            assert_eq!(seldom.tell(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(seldom.tell(start + INTERVAL / 2), None);
        }
        assert_eq!(seldom.tell(start + INTERVAL), Some(1000));
        assert_eq!(seldom.tell(start + INTERVAL), Some(0));
    }
}
