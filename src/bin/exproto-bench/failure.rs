//! What ends the bench without a result, and the exit code of each.

use std::fmt::Display;
use std::process::ExitCode;

/// Exit codes are part of the interface: see [`Failure::code`].
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Options that do not go together, or a file that cannot be read.
    #[error("{0}")]
    Usage(String),
    /// Devices cannot connect, or not all of them; or the adapter cannot be reached.
    #[error("{0}")]
    Gateway(String),
    /// The handler's address is taken.
    #[error("{0}")]
    HandlerAddress(String),
    /// The MQTT broker does not answer, or refuses.
    #[error("{0}")]
    Mqtt(String),
    /// Everything is there, but what is sent does not come to its end.
    #[error("{0}")]
    NoAnswer(String),
    /// A signal, before anything was measured.
    #[error("{0}: nothing was measured")]
    Interrupted(&'static str),
    /// This program's own trouble: threads, files of the report.
    #[error("{0}")]
    Own(String),
}

impl Failure {
    /// Of this program's own trouble.
    pub fn own(what: &str, error: impl Display) -> Self {
        Self::Own(format!("{what}: {error}"))
    }

    /// The exit code.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Own(_) => 1,
            Self::Usage(_) => 2,
            Self::Gateway(_) => 3,
            Self::HandlerAddress(_) => 4,
            Self::Mqtt(_) => 5,
            Self::NoAnswer(_) => 6,
            // As shells have it for SIGINT.
            Self::Interrupted(_) => 130,
        })
    }
}
