//! All connections, by id and by client id.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::handle::Handle;
use crate::id::{ConnId, NodeTag, ShardId};
use crate::numbers::NumberMap;

/// Locks over which the client ids are spread. Only Authenticate and the end of an
/// authenticated connection take one, and briefly.
const CLIENT_LOCKS: usize = 16;

/// Why no connection was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotFound {
    /// The text is no connection id.
    Malformed,
    /// There is no such connection, or no longer.
    Unknown,
}

/// See the module.
#[derive(Default)]
pub struct Registry {
    node: Option<NodeTag>,
    /// One for each shard, so that shards do not wait for each other.
    connections: Vec<Mutex<NumberMap<ConnId, Handle>>>,
    clients: [Mutex<HashMap<Arc<str>, Handle>>; CLIENT_LOCKS],
    hasher: RandomState,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code under these locks can leave a map half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn copies(shard: &Mutex<NumberMap<ConnId, Handle>>) -> Vec<Handle> {
    lock(shard).values().cloned().collect()
}

impl Registry {
    /// For the connections of a gateway with so many shards.
    pub fn new(node: NodeTag, shards: usize) -> Self {
        Self {
            node: Some(node),
            connections: (0..shards).map(|_| Mutex::default()).collect(),
            ..Self::default()
        }
    }

    /// A new id for a connection of `shard`.
    pub fn new_id(&self, shard: ShardId) -> std::io::Result<ConnId> {
        ConnId::generate(self.node.unwrap_or(NodeTag::of("")), shard)
    }

    /// Finds a connection by the text of its id.
    pub fn find(&self, conn: &str) -> Result<Handle, NotFound> {
        let id = ConnId::parse(conn).ok_or(NotFound::Malformed)?;
        let shard = self.shard(id.shard()).ok_or(NotFound::Unknown)?;
        lock(shard).get(&id).cloned().ok_or(NotFound::Unknown)
    }

    fn shard(&self, shard: ShardId) -> Option<&Mutex<NumberMap<ConnId, Handle>>> {
        self.connections.get(usize::from(shard.0))
    }

    /// Enters a connection; it leaves when the entry is dropped.
    pub(super) fn enter(&self, handle: Handle) -> Entry {
        if let Some(shard) = self.shard(handle.id().shard()) {
            lock(shard).insert(handle.id(), handle.clone());
        }
        Entry(handle)
    }

    /// Gives a client id to a connection; returns the one that had it.
    pub(super) fn claim(&self, clientid: &Arc<str>, handle: Handle) -> Option<Handle> {
        lock(self.clients(clientid)).insert(clientid.clone(), handle)
    }

    /// The connection that has a client id.
    pub(super) fn holder(&self, clientid: &str) -> Option<Handle> {
        lock(self.clients(clientid)).get(clientid).cloned()
    }

    /// Takes a client id back, unless another connection has it by now.
    pub(super) fn release(&self, clientid: &str, id: ConnId) {
        let mut clients = lock(self.clients(clientid));
        if clients.get(clientid).is_some_and(|owner| owner.id() == id) {
            clients.remove(clientid);
        }
    }

    #[allow(clippy::indexing_slicing)]
    fn clients(&self, clientid: &str) -> &Mutex<HashMap<Arc<str>, Handle>> {
        // The remainder is below the array's length.
        &self.clients[(self.hasher.hash_one(clientid) % CLIENT_LOCKS as u64) as usize]
    }

    /// Closes every connection, each after its callback in flight: the gateway stops.
    pub fn drain_all(&self) {
        for handle in self.handles() {
            // One that is closing already needs no telling.
            let _ = handle.drain();
        }
    }

    /// Those of one shard.
    pub(super) fn of_shard(&self, shard: ShardId) -> Vec<Handle> {
        self.shard(shard).map(copies).unwrap_or_default()
    }

    /// All of them.
    pub(super) fn handles(&self) -> Vec<Handle> {
        self.connections.iter().flat_map(copies).collect()
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.connections.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A connection's place in the registry.
pub(super) struct Entry(Handle);

impl Drop for Entry {
    fn drop(&mut self) {
        let id = self.0.id();
        let left = self.0.context().registry.shard(id.shard());
        // Dropped outside of the lock.
        let left = left.map(|shard| lock(shard).remove(&id));
        drop(left);
    }
}
