//! What an answer that is not OK means for a connection. The table of
//! `docs/handlers.md`, "What each gRPC status does", as code.

use std::error::Error;

use tonic::{Code, Status};

use super::CallFailure;
use super::link::NotSent;

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
            why: status.message().to_owned(),
        }
    } else {
        Miss::Refused(CallFailure::Failed {
            code: code_name(status.code()),
            message: status.message().to_owned(),
        })
    }
}

/// The name of a gRPC status code as the gRPC documents spell it.
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
