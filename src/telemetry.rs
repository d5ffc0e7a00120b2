//! Logs: text or JSON on standard error, and what keeps peers from filling them.

use std::fmt::{self, Debug, Write};
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::Field;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::{self, Writer};

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
            .fmt_fields(format::debug_fn(field).delimited(" "))
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"))
}

/// Writes a field of a line as text.
fn field(writer: &mut Writer<'_>, field: &Field, value: &dyn Debug) -> fmt::Result {
    match field.name() {
        "message" => {}
        name => write!(writer, "{}=", name.strip_prefix("r#").unwrap_or(name))?,
    }
    let mut escaped = Escaped {
        writer,
        left: LONGEST,
    };
    write!(escaped, "{value:?}")
}

/// Keeps a value in its line, and the line short: what peers say is in some of them, who could
/// feign lines otherwise.
struct Escaped<'a, 'w> {
    writer: &'a mut Writer<'w>,
    /// Characters that may still come.
    left: usize,
}

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match self.left {
                0 => return Ok(()),
                1 => self.writer.write_str("...")?,
                _ if c.is_control() => write!(self.writer, "{}", c.escape_default())?,
                _ => self.writer.write_char(c)?,
            }
            self.left -= 1;
        }
        Ok(())
    }
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

/// Characters of a value in a line of text.
const LONGEST: usize = 2048;

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
    use std::sync::Arc;

    use super::*;

    /// What is logged goes here.
    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_feigns_a_line() {
        let page = Page::default();
        let to = page.clone();
        let logger = tracing_subscriber::fmt()
            .fmt_fields(format::debug_fn(field).delimited(" "))
            .with_ansi(false)
            .without_time()
            .with_writer(move || to.clone())
            .finish();
        let said = "bad\n2026-01-01T00:00:00Z  INFO exproto_sidecar: feigned\u{1b}[2J";
        tracing::subscriber::with_default(logger, || {
            tracing::warn!(error = %said, quoted = said, number = 7, "it {said}");
            tracing::warn!(long = %"x".repeat(10_000), "long");
        });
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].contains(r"error=bad\n2026-01-01T00:00:00Z"),
            "{text}"
        );
        assert!(
            lines[0].contains(r"feigned\u{1b}[2J") && lines[0].contains("number=7"),
            "{text}"
        );
        assert!(
            lines[1].len() < 2 * LONGEST && lines[1].ends_with("..."),
            "{text}"
        );
    }

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
