//! The peers of a shard.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::queue::Queue;

/// Whose datagram it is: who sent it, and which address of ours it was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flow {
    pub peer: SocketAddr,
    /// `None` where the kernel does not say.
    pub local: Option<IpAddr>,
}

/// The same fields in few words: what is derived would feed the hasher with every part
/// of an address on its own, for each datagram.
impl Hash for Flow {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut ip = |ip: IpAddr, port: u16| match ip {
            IpAddr::V4(v4) => state.write_u64(u64::from(v4.to_bits()) << 16 | u64::from(port)),
            IpAddr::V6(v6) => {
                state.write_u128(v6.to_bits());
                state.write_u16(port);
            }
        };
        ip(self.peer.ip(), self.peer.port());
        if let Some(local) = self.local {
            ip(local, 0);
        }
    }
}

/// A peer as the receiving task and its own end share it.
#[derive(Debug)]
pub(super) struct Peer {
    pub flow: Flow,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub queue: Queue,
    /// Whom to wake for the next datagram.
    pub receiver: Option<Waker>,
    /// Its end was dropped: what comes now is for a new peer.
    pub gone: bool,
}

impl Peer {
    pub fn new(flow: Flow) -> Arc<Self> {
        Arc::new(Self {
            flow,
            state: Mutex::default(),
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // No code under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A peer in the set, found by its flow: the key is not kept twice.
struct Entry(Arc<Peer>);

impl Borrow<Flow> for Entry {
    fn borrow(&self) -> &Flow {
        &self.0.flow
    }
}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.flow.hash(state);
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.0.flow == other.0.flow
    }
}

impl Eq for Entry {}

/// Room that is never given back.
const SMALL: usize = 1024;

/// The peers by flow, hashed with a secret key: the addresses are the senders' choice.
#[derive(Default)]
pub(super) struct Table(HashSet<Entry>);

impl Table {
    pub fn get(&self, flow: &Flow) -> Option<Arc<Peer>> {
        self.0.get(flow).map(|entry| entry.0.clone())
    }

    /// Enters a peer in place of one with the same flow.
    pub fn enter(&mut self, peer: Arc<Peer>) {
        self.0.replace(Entry(peer));
    }

    /// Removes this very peer; a newer one of the same flow stays.
    pub fn remove(&mut self, peer: &Arc<Peer>) {
        let ours = self.0.get(&peer.flow);
        if !ours.is_some_and(|entry| Arc::ptr_eq(&entry.0, peer)) {
            return;
        }
        self.0.remove(&peer.flow);
        // What a flood made grow must not stay for ever.
        if self.0.capacity() > SMALL && self.0.len() < self.0.capacity() / 8 {
            self.0.shrink_to(self.0.len() * 2);
        }
    }

    /// All of them.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.0.iter().map(|entry| &entry.0)
    }
}
