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
    /// Identifier of the newest SUBSCRIBE.
    id: u32,
    /// Highest QoS asked for so far.
    qos: QoS,
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

/// See the module.
#[derive(Default)]
pub(super) struct Table {
    entries: HashMap<Arc<str>, Entry>,
    ids: HashMap<u32, Target>,
    retired: VecDeque<u32>,
    next_id: u32,
    next_key: u64,
}

impl Table {
    /// Number of filters.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds a subscriber, in the place of `replaced`. The key names it in
    /// [`Table::remove`]. A SUBSCRIBE is to be sent each time: for the retained
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
            id,
            qos,
            group: Group::new(filter.is_shared()),
        });
        entry.group.add(key, subscriber, qos, replaced);
        let previous = std::mem::replace(&mut entry.id, id);
        entry.qos = entry.qos.max(qos);
        let ask = Ask {
            filter: name.clone(),
            qos: entry.qos,
            id,
        };
        if previous != id {
            self.retire(previous);
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
        if !entry.group.remove(key) || !entry.group.is_empty() {
            return None;
        }
        let (name, entry) = self.entries.remove_entry(filter.as_str())?;
        self.ids.remove(&entry.id);
        Some(name)
    }

    /// Everything to subscribe again after the broker lost the session, except
    /// what `on_its_way` is being subscribed anyway.
    pub(super) fn restore(&self, on_its_way: impl Fn(&str) -> bool) -> Vec<Ask> {
        self.entries
            .iter()
            .filter(|(name, _)| !on_its_way(name))
            .map(|(name, entry)| Ask {
                filter: name.clone(),
                qos: entry.qos,
                id: entry.id,
            })
            .collect()
    }

    /// Who gets a message. `ids` are the subscription identifiers it came with.
    pub(super) fn audience(&mut self, retained: bool, ids: &[u32]) -> Audience {
        let mut audience = Vec::new();
        for id in ids {
            let Some(target) = self.ids.get(id) else {
                continue;
            };
            let Some(entry) = self.entries.get_mut(&target.filter) else {
                continue;
            };
            if retained {
                audience.extend(target.newcomer.and_then(|key| entry.group.get(key)));
            } else {
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
        let mut table = Table::default();
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
        let mut table = Table::default();
        let a = add(&mut table, "a/#", QoS::AtLeastOnce).1.id;
        let b = add(&mut table, "a/b", QoS::AtLeastOnce).1.id;
        assert_eq!(table.audience(false, &[a, b]).len(), 2);
        assert_eq!(table.audience(false, &[a]).len(), 1);
        assert_eq!(table.audience(false, &[b]).len(), 1);
        assert!(table.audience(false, &[]).is_empty());
    }

    #[test]
    fn retained_messages_go_to_the_newcomer_alone() {
        let mut table = Table::default();
        let first = add(&mut table, "r", QoS::AtMostOnce).1.id;
        let second = add(&mut table, "r", QoS::AtMostOnce).1.id;
        assert_eq!(table.audience(true, &[second]).len(), 1);
        assert_eq!(table.audience(true, &[first]).len(), 1);
        // A message queued under the replaced identifier is still for both.
        assert_eq!(table.audience(false, &[first]).len(), 2);
        assert_eq!(table.audience(false, &[second]).len(), 2);
    }

    #[test]
    fn a_shared_subscription_takes_turns() {
        let mut table = Table::default();
        let id = add(&mut table, "$share/g/t", QoS::AtLeastOnce).1.id;
        add(&mut table, "$share/g/t", QoS::AtLeastOnce);
        add(&mut table, "$share/g/t", QoS::AtMostOnce);
        let qos: Vec<_> = (0..6)
            .map(|_| {
                let audience = table.audience(false, &[id]);
                assert_eq!(audience.len(), 1);
                audience[0].1
            })
            .collect();
        let at_most_once = qos.iter().filter(|q| **q == QoS::AtMostOnce).count();
        assert_eq!(at_most_once, 2, "each of three got two of six");
    }

    #[test]
    fn a_repeated_subscription_takes_the_place_of_the_first() {
        let mut table = Table::default();
        let (first, _) = add(&mut table, "a", QoS::AtMostOnce);
        let (second, ask) = table.add(
            &filter("a"),
            QoS::AtLeastOnce,
            Arc::new(Nobody),
            Some(first),
        );
        let id = ask.id;
        assert_eq!(table.audience(false, &[id]).len(), 1);
        assert!(table.remove(&filter("a"), first).is_none());
        assert!(table.remove(&filter("a"), second).is_some());
    }

    #[test]
    fn an_ended_subscription_gets_nothing_more() {
        let mut table = Table::default();
        let (key, ask) = add(&mut table, "a", QoS::AtMostOnce);
        table.remove(&filter("a"), key);
        assert!(table.audience(false, &[ask.id]).is_empty());
    }

    #[test]
    fn retired_identifiers_are_bounded() {
        let mut table = Table::default();
        for _ in 0..MAX_RETIRED_IDS + 100 {
            let (key, _) = add(&mut table, "a", QoS::AtMostOnce);
            add(&mut table, "b", QoS::AtMostOnce);
            table.remove(&filter("a"), key);
        }
        assert!(table.ids.len() <= MAX_RETIRED_IDS + 2);
    }
}
