//! Who subscribed to what at one pool member.
//!
//! Each filter is one subscription at the broker, however many connections share
//! it, and each SUBSCRIBE carries an identifier of its own. The identifiers that
//! come back with a message (MQTT 5, 3.3.2.3.8) say for which filters this copy
//! is, so fan-out is exact whether a broker sends one copy for each overlapping
//! filter or one copy with several identifiers. They also tell for which
//! newcomer the retained messages of a repeated SUBSCRIBE are.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::group::{Audience, Group, SubscriptionKey};
use super::topic::TopicFilter;
use super::wire::MAX_SUBSCRIPTION_ID;
use super::{QoS, Subscriber};

/// Identifiers of replaced or ended subscriptions that are still understood: the
/// broker may have queued messages under them. 8 bytes and a map entry each.
const MAX_RETIRED_IDS: usize = 16_384;

struct Entry {
    filter: TopicFilter,
    /// Identifier of the newest SUBSCRIBE that the broker accepted.
    confirmed: Option<u32>,
    /// Identifiers of those after it, oldest first. Any of them may be the one that
    /// the broker uses.
    asked: VecDeque<u32>,
    group: Group,
}

struct Target {
    filter: Arc<str>,
    /// Whose SUBSCRIBE it was: retained messages are for them alone.
    newcomer: Option<SubscriptionKey>,
}

/// What has to be asked of the broker.
pub(super) struct Ask {
    pub filter: Arc<str>,
    pub qos: QoS,
    pub id: u32,
}

/// Unanswered SUBSCRIBEs for one filter whose identifiers are kept apart. While the
/// broker is away callers try again and again, and it will see but a few of them.
const MAX_ASKED: usize = 64;

/// See the module.
pub(super) struct Table {
    entries: HashMap<Arc<str>, Entry>,
    ids: HashMap<u32, Target>,
    retired: VecDeque<u32>,
    next_id: u32,
    next_key: u64,
}

impl Table {
    /// A table whose identifiers begin at `seed`. Two gateways that by mistake share a
    /// client id share a session too; identifiers of their own keep one from taking
    /// the other's messages for its own.
    pub(super) fn new(seed: u32) -> Self {
        Self {
            entries: HashMap::new(),
            ids: HashMap::new(),
            retired: VecDeque::new(),
            next_id: seed % MAX_SUBSCRIPTION_ID,
            next_key: 0,
        }
    }

    /// Number of filters.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a subscriber, to take the place of `replaced` when that is removed. The key
    /// names it in [`Table::remove`]. A SUBSCRIBE is to be sent each time: for the retained
    /// messages, perhaps a higher QoS, and the broker's own word on it.
    pub(super) fn add(
        &mut self,
        filter: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> (SubscriptionKey, Ask) {
        self.next_key += 1;
        let key = SubscriptionKey(self.next_key);
        let id = self.free_id();
        let name: Arc<str> = filter.as_str().into();
        let entry = self.entries.entry(name.clone()).or_insert_with(|| Entry {
            filter: filter.clone(),
            confirmed: None,
            asked: VecDeque::new(),
            group: Group::new(filter.is_shared()),
        });
        entry.group.add(key, subscriber, qos, replaced);
        entry.asked.push_back(id);
        let surplus = (entry.asked.len() > MAX_ASKED)
            .then(|| entry.asked.pop_front())
            .flatten();
        let ask = Ask {
            filter: name.clone(),
            qos: entry.group.qos(),
            id,
        };
        if let Some(surplus) = surplus {
            self.retire(surplus);
        }
        self.ids.insert(
            id,
            Target {
                filter: name,
                newcomer: Some(key),
            },
        );
        (key, ask)
    }

    /// Removes a subscriber; the filter to unsubscribe when it was the last.
    pub(super) fn remove(
        &mut self,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Option<Arc<str>> {
        let entry = self.entries.get_mut(filter.as_str())?;
        entry.group.remove(key)?;
        if !entry.group.is_empty() {
            return None;
        }
        let (name, entry) = self.entries.remove_entry(filter.as_str())?;
        for id in entry.confirmed.into_iter().chain(entry.asked) {
            self.ids.remove(&id);
        }
        Some(name)
    }

    /// The broker accepted the SUBSCRIBE with this identifier and uses no earlier one
    /// for new messages; those that it has queued may still carry them.
    pub(super) fn confirm(&mut self, filter: &str, id: u32) {
        let Some(entry) = self.entries.get_mut(filter) else {
            return;
        };
        let Some(place) = entry.asked.iter().position(|asked| *asked == id) else {
            return;
        };
        let mut past: Vec<u32> = entry.asked.drain(..=place).collect();
        past.pop();
        past.extend(entry.confirmed.replace(id));
        for id in past {
            self.retire(id);
        }
    }

    /// Whether anybody is subscribed to the filter.
    pub(super) fn contains(&self, filter: &str) -> bool {
        self.entries.contains_key(filter)
    }

    /// Everything there is to subscribe.
    pub(super) fn restore(&self) -> Vec<Ask> {
        let newest = |entry: &Entry| entry.asked.back().copied().or(entry.confirmed);
        self.entries
            .iter()
            .filter_map(|(name, entry)| {
                Some(Ask {
                    filter: name.clone(),
                    qos: entry.group.qos(),
                    id: newest(entry)?,
                })
            })
            .collect()
    }

    /// Who gets a message. `ids` are the subscription identifiers it came with;
    /// without any, the broker knows none and the topic decides.
    pub(super) fn audience(&mut self, topic: &str, retained: bool, ids: &[u32]) -> Audience {
        let mut audience = Vec::new();
        for id in ids {
            let Some(target) = self.ids.get(id) else {
                continue;
            };
            let Some(entry) = self.entries.get_mut(&target.filter) else {
                continue;
            };
            // An identifier of somebody else's, in a session that was theirs.
            if !entry.filter.matches(topic) {
                continue;
            }
            if retained {
                audience.extend(target.newcomer.and_then(|key| entry.group.get(key)));
            } else {
                entry.group.collect(&mut audience);
            }
        }
        if ids.is_empty() {
            let entries = self.entries.values_mut();
            for entry in entries.filter(|entry| entry.filter.matches(topic)) {
                entry.group.collect(&mut audience);
            }
        }
        audience
    }

    fn retire(&mut self, id: u32) {
        self.retired.push_back(id);
        if self.retired.len() > MAX_RETIRED_IDS
            && let Some(oldest) = self.retired.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }

    fn free_id(&mut self) -> u32 {
        loop {
            self.next_id = self.next_id % MAX_SUBSCRIPTION_ID + 1;
            if !self.ids.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Delivery;
    use super::*;

    struct Nobody;

    impl Subscriber for Nobody {
        fn deliver(&self, _: Delivery) -> Result<(), Delivery> {
            Ok(())
        }
    }

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::parse(text).unwrap()
    }

    fn add(table: &mut Table, text: &str, qos: QoS) -> (SubscriptionKey, Ask) {
        table.add(&filter(text), qos, Arc::new(Nobody), None)
    }

    #[test]
    fn a_filter_is_asked_for_with_the_highest_qos_and_dropped_with_the_last() {
        let mut table = Table::new(0);
        let (first, ask) = add(&mut table, "a/#", QoS::AtMostOnce);
        assert_eq!(ask.qos, QoS::AtMostOnce);
        let (second, ask) = add(&mut table, "a/#", QoS::ExactlyOnce);
        assert_eq!(ask.qos, QoS::ExactlyOnce);
        let (third, ask) = add(&mut table, "a/#", QoS::AtLeastOnce);
        assert_eq!(ask.qos, QoS::ExactlyOnce);
        assert!(table.remove(&filter("a/#"), first).is_none());
        assert!(table.remove(&filter("a/#"), first).is_none());
        assert!(table.remove(&filter("a/#"), third).is_none());
        assert_eq!(&*table.remove(&filter("a/#"), second).unwrap(), "a/#");
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn overlapping_filters_each_get_their_copy_however_the_broker_sends_them() {
        let mut table = Table::new(0);
        let a = add(&mut table, "a/#", QoS::AtLeastOnce).1.id;
        let b = add(&mut table, "a/b", QoS::AtLeastOnce).1.id;
        assert_eq!(table.audience("a/b", false, &[a, b]).len(), 2);
        assert_eq!(table.audience("a/b", false, &[a]).len(), 1);
        assert_eq!(table.audience("a/b", false, &[b]).len(), 1);
        // A broker that knows none.
        assert_eq!(table.audience("a/b", false, &[]).len(), 2);
        // One that somebody else used in the same session.
        assert!(table.audience("b", false, &[a]).is_empty());
    }

    #[test]
    fn retained_messages_go_to_the_newcomer_alone() {
        let mut table = Table::new(0);
        let first = add(&mut table, "r", QoS::AtMostOnce).1.id;
        let second = add(&mut table, "r", QoS::AtMostOnce).1.id;
        assert_eq!(table.audience("r", true, &[second]).len(), 1);
        assert_eq!(table.audience("r", true, &[first]).len(), 1);
        // A message queued under the replaced identifier is still for both.
        assert_eq!(table.audience("r", false, &[first]).len(), 2);
        assert_eq!(table.audience("r", false, &[second]).len(), 2);
    }

    #[test]
    fn a_shared_subscription_takes_turns() {
        let mut table = Table::new(0);
        let id = add(&mut table, "$share/g/t", QoS::AtLeastOnce).1.id;
        add(&mut table, "$share/g/t", QoS::AtLeastOnce);
        add(&mut table, "$share/g/t", QoS::AtMostOnce);
        let qos: Vec<_> = (0..6)
            .map(|_| {
                let audience = table.audience("t", false, &[id]);
                assert_eq!(audience.len(), 1);
                audience[0].qos
            })
            .collect();
        let at_most_once = qos.iter().filter(|q| **q == QoS::AtMostOnce).count();
        assert_eq!(at_most_once, 2, "each of three got two of six");
    }

    #[test]
    fn the_identifier_that_the_broker_uses_is_kept_whatever_fails_after_it() {
        let mut table = Table::new(0);
        let (first, ask) = add(&mut table, "a", QoS::AtMostOnce);
        table.confirm("a", ask.id);
        for _ in 0..MAX_RETIRED_IDS + MAX_ASKED + 100 {
            let (key, _) = table.add(&filter("a"), QoS::AtMostOnce, Arc::new(Nobody), Some(first));
            table.remove(&filter("a"), key);
        }
        assert_eq!(table.audience("a", false, &[ask.id]).len(), 1);
    }

    #[test]
    fn the_next_in_turn_stands_in_for_one_that_has_ended() {
        let mut table = Table::new(0);
        let id = add(&mut table, "$share/g/t", QoS::AtMostOnce).1.id;
        add(&mut table, "$share/g/t", QoS::AtLeastOnce);
        let audience = table.audience("t", false, &[id]);
        assert_eq!(audience.len(), 1);
        assert_eq!(audience[0].others.len(), 1);
        assert_ne!(audience[0].others[0].1, audience[0].qos);
    }

    #[test]
    fn a_repeated_subscription_takes_the_place_of_the_first() {
        let mut table = Table::new(0);
        let (first, _) = add(&mut table, "a", QoS::AtMostOnce);
        let (second, ask) = table.add(
            &filter("a"),
            QoS::AtLeastOnce,
            Arc::new(Nobody),
            Some(first),
        );
        let id = ask.id;
        let qos = |table: &mut Table| {
            let audience = table.audience("a", false, &[id]);
            audience.iter().map(|r| r.qos).collect::<Vec<_>>()
        };
        assert_eq!(
            qos(&mut table),
            [QoS::AtMostOnce],
            "until the broker answered"
        );
        assert!(table.remove(&filter("a"), first).is_none());
        assert_eq!(qos(&mut table), [QoS::AtLeastOnce]);
        assert!(table.remove(&filter("a"), second).is_some());
    }

    #[test]
    fn a_repeated_subscription_that_fails_leaves_the_first() {
        let mut table = Table::new(0);
        let (first, _) = add(&mut table, "$share/g/a", QoS::AtMostOnce);
        let (second, ask) = table.add(
            &filter("$share/g/a"),
            QoS::AtLeastOnce,
            Arc::new(Nobody),
            Some(first),
        );
        for _ in 0..3 {
            let audience = table.audience("a", false, &[ask.id]);
            assert_eq!(audience.len(), 1);
            assert_eq!(audience[0].qos, QoS::AtMostOnce);
        }
        assert!(table.remove(&filter("$share/g/a"), second).is_none());
        assert_eq!(table.audience("a", false, &[ask.id]).len(), 1);
    }

    #[test]
    fn an_ended_subscription_gets_nothing_more() {
        let mut table = Table::new(0);
        let (key, ask) = add(&mut table, "a", QoS::AtMostOnce);
        table.remove(&filter("a"), key);
        assert!(table.audience("a", false, &[ask.id]).is_empty());
    }

    #[test]
    fn retired_identifiers_are_bounded() {
        let mut table = Table::new(0);
        for _ in 0..MAX_RETIRED_IDS + 100 {
            let (key, _) = add(&mut table, "a", QoS::AtMostOnce);
            let (other, ask) = add(&mut table, "b", QoS::AtMostOnce);
            table.confirm("b", ask.id);
            table.remove(&filter("a"), key);
            let _ = other;
        }
        assert!(table.ids.len() <= MAX_RETIRED_IDS + 2);
        for _ in 0..MAX_RETIRED_IDS + 100 {
            add(&mut table, "c", QoS::AtMostOnce);
        }
        assert!(table.ids.len() <= MAX_RETIRED_IDS + MAX_ASKED + 2);
    }
}
