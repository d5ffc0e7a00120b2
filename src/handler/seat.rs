//! Where a connection is: the one address of its handler that it belongs to.

use std::fmt;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use super::link::Link;
use super::streaming::Lanes;
use crate::metrics::HandlerMetrics;
use crate::proto;

/// One address of a handler, on one shard. Its channel lives as long as the handler's
/// list has it or a connection is at it.
pub(super) struct Member {
    pub(super) link: Arc<Link>,
    /// Room for callbacks, given in turn.
    pub(super) room: Arc<Semaphore>,
    /// The streams to it, where there are any.
    pub(super) lanes: Lanes,
    task: AbortHandle,
}

impl Member {
    /// `task` runs the link.
    pub(super) fn new(
        link: Arc<Link>,
        max_in_flight: usize,
        metrics: HandlerMetrics,
        task: AbortHandle,
    ) -> Arc<Self> {
        Arc::new(Self {
            link,
            room: Arc::new(Semaphore::new(max_in_flight)),
            lanes: Lanes::new(metrics),
            task,
        })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What the handler at an address knows of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Standing {
    /// Nothing.
    #[default]
    New,
    /// OnSocketCreated was sent, and nobody knows whether it came.
    Sent,
    /// OnSocketCreated was answered.
    Known,
}

/// See the module.
#[derive(Default)]
pub(super) struct Seat {
    /// `None` before the first call and after the last.
    pub(super) at: Option<Arc<Member>>,
    pub(super) standing: Standing,
    /// Whether it was at another address before, which knew of it.
    pub(super) moved: bool,
    /// For the OnSocketCreated at another address; only where a connection may move.
    pub(super) conninfo: Option<Box<proto::ConnInfo>>,
}

impl Seat {
    /// Takes the connection to an address that knows nothing of it.
    pub(super) fn take(&mut self, member: Arc<Member>) {
        self.at = Some(member);
        self.standing = Standing::New;
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at.as_ref().map(|member| member.link.endpoint());
        f.debug_struct("Seat")
            .field("at", &at)
            .field("standing", &self.standing)
            .finish_non_exhaustive()
    }
}
