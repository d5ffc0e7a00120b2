//! Logs: text or JSON on standard error.

use std::io;

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
