//! The subscribers of one filter.

use std::sync::Arc;

use indexmap::IndexMap;

use super::{QoS, Subscriber};

/// Names one subscriber of one filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SubscriptionKey(pub(super) u64);

/// The subscribers that a message is for, each with its subscription's QoS.
pub(super) type Audience = Vec<(Arc<dyn Subscriber>, QoS)>;

/// See the module.
pub(super) struct Group {
    members: IndexMap<SubscriptionKey, (Arc<dyn Subscriber>, QoS)>,
    /// Each message goes to one of them only.
    shared: bool,
    /// Whose turn it is then.
    turn: usize,
}

impl Group {
    pub(super) fn new(shared: bool) -> Self {
        Self {
            members: IndexMap::new(),
            shared,
            turn: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Adds a subscriber in the place of `replaced`.
    pub(super) fn add(
        &mut self,
        key: SubscriptionKey,
        subscriber: Arc<dyn Subscriber>,
        qos: QoS,
        replaced: Option<SubscriptionKey>,
    ) {
        if let Some(replaced) = replaced {
            self.members.swap_remove(&replaced);
        }
        self.members.insert(key, (subscriber, qos));
    }

    /// Whether the subscriber was there.
    pub(super) fn remove(&mut self, key: SubscriptionKey) -> bool {
        self.members.swap_remove(&key).is_some()
    }

    pub(super) fn get(&self, key: SubscriptionKey) -> Option<(Arc<dyn Subscriber>, QoS)> {
        self.members.get(&key).cloned()
    }

    /// Adds those who get the next message.
    pub(super) fn collect(&mut self, audience: &mut Audience) {
        if !self.shared {
            audience.extend(self.members.values().cloned());
            return;
        }
        self.turn = self.turn.wrapping_add(1) % self.members.len().max(1);
        if let Some((_, member)) = self.members.get_index(self.turn) {
            audience.push(member.clone());
        }
    }
}
