//! The subscribers of one filter.

use std::sync::Arc;

use indexmap::IndexMap;

use super::{QoS, Subscriber};

/// Names one subscriber of one filter; a later one is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionKey(pub(super) u64);

/// Whom a message is for, with the QoS of the subscription.
pub(super) struct Recipient {
    pub subscriber: Arc<dyn Subscriber>,
    pub qos: QoS,
    /// In a shared subscription, whose turn it is if this one has just ended.
    pub others: Vec<(Arc<dyn Subscriber>, QoS)>,
}

/// Everyone whom a message is for.
pub(super) type Audience = Vec<Recipient>;

/// Members of a shared subscription that are tried in place of one that has ended.
const MAX_OTHERS: usize = 3;

/// How many subscribers asked for each QoS.
#[derive(Debug, Default)]
pub(super) struct ByQoS([usize; 3]);

impl ByQoS {
    pub(super) fn add(&mut self, qos: QoS) {
        self.change(qos, 1);
    }

    pub(super) fn remove(&mut self, qos: QoS) {
        self.change(qos, -1);
    }

    fn change(&mut self, qos: QoS, change: isize) {
        if let Some(count) = self.0.get_mut(qos as usize) {
            *count = count.saturating_add_signed(change);
        }
    }

    /// The highest QoS that anybody asked for.
    pub(super) fn highest(&self) -> QoS {
        match self.0 {
            [_, 0, 0] => QoS::AtMostOnce,
            [_, _, 0] => QoS::AtLeastOnce,
            _ => QoS::ExactlyOnce,
        }
    }
}

struct Member {
    subscriber: Arc<dyn Subscriber>,
    qos: QoS,
    /// Whose place it takes. As long as that one is there, because the broker has not
    /// answered yet, only retained messages are for this one.
    replaces: Option<SubscriptionKey>,
}

/// See the module.
pub(super) struct Group {
    members: IndexMap<SubscriptionKey, Member>,
    by_qos: ByQoS,
    /// Each message goes to one of them only.
    shared: bool,
    /// Whose turn it is then.
    turn: usize,
}

impl Group {
    pub(super) fn new(shared: bool) -> Self {
        Self {
            members: IndexMap::new(),
            by_qos: ByQoS::default(),
            shared,
            turn: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The highest QoS that a member asked for.
    pub(super) fn qos(&self) -> QoS {
        self.by_qos.highest()
    }

    /// Adds a subscriber, to take the place of `replaced` when that is removed.
    pub(super) fn add(
        &mut self,
        key: SubscriptionKey,
        subscriber: Arc<dyn Subscriber>,
        qos: QoS,
        replaced: Option<SubscriptionKey>,
    ) {
        let member = Member {
            subscriber,
            qos,
            replaces: replaced,
        };
        self.members.insert(key, member);
        self.by_qos.add(qos);
    }

    /// The QoS of the subscriber, if it was there.
    pub(super) fn remove(&mut self, key: SubscriptionKey) -> Option<QoS> {
        let member = self.members.swap_remove(&key)?;
        self.by_qos.remove(member.qos);
        Some(member.qos)
    }

    /// One subscriber alone: what is retained is for it also while it replaces another.
    pub(super) fn get(&self, key: SubscriptionKey) -> Option<Recipient> {
        self.members.get(&key).map(Recipient::only)
    }

    /// Adds those who get the next message.
    pub(super) fn collect(&mut self, audience: &mut Audience) {
        let counts = |member: &Member| {
            let replaced = member.replaces.as_ref();
            !replaced.is_some_and(|key| self.members.contains_key(key))
        };
        if !self.shared {
            audience.reserve(self.members.len());
            let members = self.members.values().filter(|member| counts(member));
            audience.extend(members.map(Recipient::only));
            return;
        }
        // The members in turn.
        let count = self.members.len();
        let mut in_turn = (1..=count)
            .map(|step| (self.turn + step) % count)
            .filter_map(|index| Some((index, self.members.get_index(index)?.1)))
            .filter(|(_, member)| counts(member));
        if let Some((index, member)) = in_turn.next() {
            let others = in_turn.take(MAX_OTHERS);
            audience.push(Recipient {
                others: others.map(|(_, m)| (m.subscriber.clone(), m.qos)).collect(),
                ..Recipient::only(member)
            });
            self.turn = index;
        }
    }
}

impl Recipient {
    fn only(member: &Member) -> Self {
        Self {
            subscriber: member.subscriber.clone(),
            qos: member.qos,
            others: Vec::new(),
        }
    }
}
