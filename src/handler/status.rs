//! What an answer that is not OK means for a connection. The table of
//! `docs/handlers.md`, "What each gRPC status does", as code.

use std::error::Error;

use tonic::{Code, Status};

use super::CallFailure;
use super::link::NotSent;
use crate::proto::code_name;

/// Characters of a handler's message that are shown.
const MOST_WORDS: usize = 256;

/// A call that did not succeed.
#[derive(Debug)]
pub(super) enum Miss {
    /// The handler is away, and may come back.
    Away {
        /// Whether it may have seen the call.
        sent: bool,
        why: String,
    },
    /// The handler has answered, or had its time.
    Refused(CallFailure),
}

/// What a status means.
pub(super) fn miss(status: &Status) -> Miss {
    let source = status.source();
    // A status with a cause was made on this side: the channel broke before an answer,
    // or in the middle of one.
    if source.is_some() || status.code() == Code::Unavailable {
        Miss::Away {
            sent: !source.is_some_and(|source| source.is::<NotSent>()),
            why: words(status),
        }
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
