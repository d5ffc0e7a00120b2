//! Why a connection ended: the stable words of OnSocketClosed.

use std::fmt;

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The device closed it.
    Normal,
    /// The handler called Close.
    ClosedByHandler,
    /// Nothing came from the device for one and a half keepalive intervals.
    KeepaliveTimeout,
    /// Nothing went either way, or no Authenticate came, for too long.
    IdleTimeout,
    /// Another connection took its client id.
    Discarded,
    /// It did what it may not.
    Kicked,
    /// What it showed when it authenticated is not valid any more.
    Expired,
    /// Its queue of messages was full and the policy is to close.
    RateLimited,
    /// The device took none of the bytes sent to it for too long.
    SendTimeout,
    /// The handler was away for too long.
    HandlerUnavailable,
    /// The handler answered a callback with an error, or not in time.
    HandlerError,
    /// The gateway stops.
    Shutdown,
    /// The socket failed, and how.
    SocketError(String),
}

impl CloseReason {
    /// The word alone, without detail: fit for a metric's label.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::ClosedByHandler => "closed_by_handler",
            Self::KeepaliveTimeout => "keepalive_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::Discarded => "discarded",
            Self::Kicked => "kicked",
            Self::Expired => "expired",
            Self::RateLimited => "rate_limited",
            Self::SendTimeout => "send_timeout",
            Self::HandlerUnavailable => "handler_unavailable",
            Self::HandlerError => "handler_error",
            Self::Shutdown => "shutdown",
            Self::SocketError(_) => "socket_error",
        }
    }
}

impl CloseReason {
    /// Whether the device has gone on purpose, as far as anybody can tell, so that nobody
    /// is to hear of a will.
    pub fn is_farewell(&self) -> bool {
        matches!(self, Self::Normal | Self::ClosedByHandler)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SocketError(detail) => write!(f, "socket_error: {detail}"),
            reason => f.write_str(reason.word()),
        }
    }
}
