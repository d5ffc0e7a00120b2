//! What an answer that is not OK means for a connection. The table of
//! `docs/handlers.md`, "What each gRPC status does", as code.

use std::error::Error;

use tonic::{Code, Status};

use super::CallFailure;
use super::link::{NotSent, is_broken_off};
use crate::proto::code_name;

/// Characters of a handler's message that are shown.
const MOST_WORDS: usize = 256;

/// A call that did not succeed.
#[derive(Debug)]
pub(super) enum Miss {
    /// The handler is away, and may come back.
    Away { how: Away, why: String },
    /// The handler has answered, or had its time.
    Refused(CallFailure),
}

/// How a handler shows that it is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Away {
    /// There is no channel, or it broke before the call was sent.
    NotSent,
    /// The channel broke; it may have seen the call.
    Broke,
    /// It says so itself: UNAVAILABLE, or breaks off this call alone.
    Declined,
}

/// Whether the handler has said something, be it no.
pub(super) fn is_answer<T>(result: &Result<T, Status>) -> bool {
    match result {
        Ok(_) => true,
        Err(status) => miss(status).is_answer(),
    }
}

impl Miss {
    /// Whether the handler has said something.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::Away { how, .. } => *how == Away::Declined,
        }
    }
}

/// What a status means.
pub(super) fn miss(status: &Status) -> Miss {
    let source = status.source();
    // A status with a cause was made on this side: the channel broke before an answer,
    // or in the middle of one.
    let how = match source {
        Some(source) if source.is::<NotSent>() => Some(Away::NotSent),
        Some(source) if is_broken_off(source) => Some(Away::Declined),
        Some(_) => Some(Away::Broke),
        None if status.code() == Code::Unavailable => Some(Away::Declined),
        None => None,
    };
    if let Some(how) = how {
        let why = words(status);
        Miss::Away { how, why }
    } else {
        Miss::Refused(CallFailure::Failed {
            code: code_name(status.code()),
            message: words(status),
        })
    }
}

/// What a status says, for the log: libraries put whole exceptions there, with what a device
/// has sent in them.
fn words(status: &Status) -> String {
    status.message().chars().take(MOST_WORDS).collect()
}
