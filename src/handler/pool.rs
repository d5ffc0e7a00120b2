//! The addresses of a handler as one shard sees them, and which of them a connection
//! is at.
//!
//! ```text
//!          Created taken           away for failover_after, another one is open
//!   New ------------------> Known -------------------------------------------+
//!    ^ \                      ^                (failover = "recreate")       |
//!    |  \ sent, no answer     | Created taken                                |
//!    |   +------> Sent -------+                                              |
//!    +-----------------------------------------------------------------------+
//! ```
//!
//! Where nothing is known of a connection it goes to whatever address is open. Once an
//! address may know of it, it stays there, unless it may move.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::link::{self, Link};
use super::resolve::{Directory, Found};
use super::seat::{Member, Standing};
use super::{Caller, Event};
use crate::metrics::HandlerMetrics;

/// How the addresses are used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most callbacks under way at each address at a time.
    pub max_in_flight: usize,
    /// How long an address must be away before its connections move to another one;
    /// `None` never.
    pub failover_after: Option<Duration>,
    /// How each channel behaves.
    pub link: link::Options,
}

/// See the module.
pub struct Pool {
    options: Options,
    directory: Arc<Directory>,
    metrics: HandlerMetrics,
    /// Told whenever a channel or the list has changed.
    changes: Arc<watch::Sender<()>>,
    members: Mutex<Members>,
    next: AtomicUsize,
}

#[derive(Default)]
struct Members {
    /// Those that new connections may go to, in the order of the configuration.
    listed: Vec<Arc<Member>>,
    /// Those that are no address of the handler any more, for as long as connections are
    /// at them. An address that comes back is the same one again.
    gone: Vec<Weak<Member>>,
}

impl Pool {
    /// A pool that has no address until [`Pool::run`] runs. Shards begin their turns at
    /// different addresses: `shard` counts them.
    pub(super) fn new(
        options: Options,
        directory: Arc<Directory>,
        metrics: HandlerMetrics,
        shard: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            options,
            directory,
            metrics,
            changes: Arc::new(watch::Sender::new(())),
            members: Mutex::default(),
            next: AtomicUsize::new(shard),
        })
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // No code under the lock can leave it half changed.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes from now on.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Follows the directory, for ever. Channels are kept up by tasks of this runtime.
    pub(super) async fn run(self: Arc<Self>) {
        let mut found = self.directory.found();
        loop {
            let now = found.borrow_and_update().clone();
            self.follow(&now);
            // The sender lives in the directory, so this cannot fail.
            if found.changed().await.is_err() {
                return;
            }
        }
    }

    fn follow(&self, found: &[Found]) {
        let mut members = self.members();
        members.gone.retain(|member| member.strong_count() > 0);
        let before = std::mem::take(&mut members.listed);
        let gone: Vec<_> = members.gone.iter().filter_map(Weak::upgrade).collect();
        for (target, found) in self.directory.targets().iter().zip(found) {
            for endpoint in &found.endpoints {
                let same = |member: &&Arc<Member>| {
                    let link = &member.link;
                    Arc::ptr_eq(link.target(), target) && link.endpoint() == endpoint
                };
                if let Some(known) = before.iter().chain(&gone).find(same) {
                    members.listed.push(known.clone());
                    continue;
                }
                let link = Link::new(
                    target.clone(),
                    endpoint.clone(),
                    self.options.link.clone(),
                    self.directory.clone(),
                    self.changes.clone(),
                    self.metrics.channels(&target.name),
                );
                let task = tokio::spawn(link.clone().run()).abort_handle();
                let member =
                    Member::new(link, self.options.max_in_flight, self.metrics.clone(), task);
                members.listed.push(member);
            }
        }
        let now = std::mem::take(&mut members.listed);
        let is_listed = |member: &Arc<Member>| now.iter().any(|other| Arc::ptr_eq(other, member));
        let gone = before.iter().chain(&gone).filter(|m| !is_listed(m));
        members.gone = gone.map(Arc::downgrade).collect();
        members.listed = now;
        drop(members);
        self.changes.send_replace(());
    }

    /// Whether new connections can be told to some address.
    pub fn is_open(&self) -> bool {
        self.members().listed.iter().any(|m| m.link.is_open())
    }

    /// Whether there is nobody who could be told of a connection: the address that it is at is
    /// away, or, where nobody knows of it, no address takes it. One whose channel is just being
    /// made counts as there.
    pub(super) fn is_hopeless(&self, caller: &Caller) -> bool {
        let seat = caller.seat();
        if let Some(member) = &seat.at {
            if seat.standing != Standing::New {
                return member.link.is_away();
            }
            if member.link.is_up() {
                // It is just being told.
                return false;
            }
        }
        drop(seat);
        let members = self.members();
        if members.listed.is_empty() {
            let found = self.directory.found();
            let found = found.borrow();
            return found.iter().all(|found| found.trouble.is_some());
        }
        members.listed.iter().all(|m| m.link.takes_nobody())
    }

    /// What is wrong with the addresses that take no new connections, one text each.
    pub fn troubles(&self) -> Vec<String> {
        let found = self.directory.found();
        let (members, found) = (self.members(), found.borrow());
        let mut troubles = Vec::new();
        for (target, found) in self.directory.targets().iter().zip(found.iter()) {
            let name = &target.name;
            if found.endpoints.is_empty() {
                let trouble = found.trouble.as_deref().unwrap_or("not resolved yet");
                troubles.push(format!("{name}: {trouble}"));
            }
            let of_target = members.listed.iter().map(|member| &member.link);
            let of_target = of_target.filter(|link| Arc::ptr_eq(link.target(), target));
            let of_target = of_target.filter(|link| !link.is_open());
            troubles.extend(of_target.map(|link| match found.endpoints.len() {
                1 => format!("{name}: {}", link.trouble()),
                _ => format!("{name} ({}): {}", link.endpoint(), link.trouble()),
            }));
        }
        troubles
    }

    /// The address that the next call about a connection goes to, if it is there. This is
    /// where connections get their address, and move.
    ///
    /// `missed` is since when calls about this event have failed at its address.
    pub(super) fn place(
        &self,
        caller: &Caller,
        event: &Event,
        missed: Option<Instant>,
    ) -> Option<Arc<Member>> {
        let mut seat = caller.seat();
        let Some(member) = seat.at.clone() else {
            let member = self.next(None)?;
            seat.take(member.clone());
            return Some(member);
        };
        let is_up = member.link.is_up();
        let stay = is_up.then(|| member.clone());
        match seat.standing {
            _ if matches!(event, Event::SocketClosed(_)) => stay,
            Standing::New if member.link.is_open() && self.lists(&member) => stay,
            Standing::New => {
                let other = self.next(Some(&member))?;
                seat.take(other.clone());
                Some(other)
            }
            Standing::Sent | Standing::Known => {
                let due = self.moves_at(&member, missed);
                if due.is_none_or(|due| due > Instant::now()) {
                    return stay;
                }
                let Some(other) = self.next(Some(&member)) else {
                    return stay;
                };
                self.metrics.failovers.increment(1);
                tracing::info!(
                    conn = %caller.conn,
                    from = %member.link.endpoint(),
                    to = %other.link.endpoint(),
                    "the connection moves to another address of its handler"
                );
                seat.take(other.clone());
                seat.moved = true;
                Some(other)
            }
        }
    }

    /// When connections at an address may move to another one, if they ever may.
    pub(super) fn moves_at(
        &self,
        member: &Arc<Member>,
        missed: Option<Instant>,
    ) -> Option<Instant> {
        let after = self.options.failover_after?;
        let down = member.link.down_since();
        let away = down.into_iter().chain(missed).min()?;
        // One that is no address of the handler any more is not expected back.
        if down.is_some() && !self.lists(member) {
            return Some(away);
        }
        Some(away + after)
    }

    fn lists(&self, member: &Arc<Member>) -> bool {
        let members = self.members();
        members
            .listed
            .iter()
            .any(|listed| Arc::ptr_eq(listed, member))
    }

    /// The next in turn of those that take new connections.
    fn next(&self, except: Option<&Arc<Member>>) -> Option<Arc<Member>> {
        let members = self.members();
        let is_other = |member: &&Arc<Member>| except.is_none_or(|e| !Arc::ptr_eq(e, member));
        let all = members.listed.iter().filter(is_other);
        let open: Vec<_> = all.filter(|member| member.link.is_open()).collect();
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let chosen = turn.checked_rem(open.len()).and_then(|turn| open.get(turn));
        chosen.map(|member| Arc::clone(member))
    }
}
