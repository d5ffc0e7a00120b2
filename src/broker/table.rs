//! Who subscribed to what at one pool member.
//!
//! Each filter is one subscription at the broker, however many connections share
//! it, and each SUBSCRIBE carries an identifier of its own. The identifiers that
//! come back with a message (MQTT 5, 3.3.2.3.8) say for which filters this copy
//! is, so fan-out is exact whether a broker sends one copy for each overlapping
//! filter or one copy with several identifiers. They also tell for which
//! newcomer the retained messages of a repeated SUBSCRIBE are.
//!
//! A message without identifiers, from a broker that has none, is for whom its topic
//! says; a retained one then is for the newcomer whose turn it is to be served, as
//! far as the order of the broker's packets tells.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::group::{Audience, Group, Recipient, SubscriptionKey};
use super::topic::TopicFilter;
use super::trie::Trie;
use super::wire::{MAX_SUBSCRIPTION_ID, Retained};
use super::{QoS, Subscriber};
use crate::numbers::NumberMap;

/// Identifiers of replaced or ended subscriptions that are still understood: the
/// broker may have queued messages under them. 8 bytes and a map entry each.
const MAX_RETIRED_IDS: usize = 16_384;

struct Entry {
    filter: TopicFilter,
    /// Identifier of the newest SUBSCRIBE that the broker accepted.
    confirmed: Option<u32>,
    /// When that was: a number among the keys, which count up.
    confirmed_at: u64,
    /// Whose SUBSCRIBE was accepted lately.
    newcomers: Vec<Newcomer>,
    /// Whom the retained messages that come with this identifier are for, where they were
    /// asked for again.
    repeated: Option<(u32, Vec<SubscriptionKey>)>,
    /// Identifiers of those after it, oldest first. Any of them may be the one that
    /// the broker uses.
    asked: VecDeque<u32>,
    group: Group,
}

impl Entry {
    fn ask(&self, name: &Arc<str>, retained: Retained) -> Option<Ask> {
        Some(Ask {
            filter: name.clone(),
            qos: self.group.qos(),
            id: self.asked.back().copied().or(self.confirmed)?,
            retained,
        })
    }
}

/// Somebody whose SUBSCRIBE was accepted less than [`RETAINED_UNDER_WAY`] ago, or a
/// little longer.
struct Newcomer {
    key: SubscriptionKey,
    since: Instant,
    /// Whether anything retained has come.
    heard: bool,
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
    pub retained: Retained,
}

/// Retained messages follow the SUBACK; those of QoS 1 and 2 are in the session until they
/// are taken. Where the link breaks so soon after it, they are asked for again: all where the
/// session is lost, and those of whom nothing has come where it is not. Some may then come
/// twice.
const RETAINED_UNDER_WAY: Duration = Duration::from_secs(5);

/// Unanswered SUBSCRIBEs for one filter whose identifiers are kept apart. While the
/// broker is away callers try again and again, and it will see but a few of them.
const MAX_ASKED: usize = 64;

/// See the module.
pub(super) struct Table {
    entries: HashMap<Arc<str>, Entry>,
    ids: NumberMap<u32, Target>,
    retired: VecDeque<u32>,
    /// Whether the broker sends retained messages before the SUBACK, once one without
    /// an identifier has shown it: by coming when only one of the two was possible.
    retained_first: Option<bool>,
    /// The filters' names by topic, once a message came without an identifier.
    by_topic: Option<Trie<Vec<Arc<str>>>>,
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
            ids: NumberMap::default(),
            retired: VecDeque::new(),
            retained_first: None,
            by_topic: None,
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
        if let Some(by_topic) = &mut self.by_topic
            && !self.entries.contains_key(&name)
        {
            index(by_topic, filter, name.clone());
        }
        let entry = self.entries.entry(name.clone()).or_insert_with(|| Entry {
            filter: filter.clone(),
            confirmed: None,
            confirmed_at: key.0,
            newcomers: Vec::new(),
            repeated: None,
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
            retained: Retained::Send,
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
        if let Some(by_topic) = &mut self.by_topic
            && let Some(names) = by_topic.get_mut(filter)
        {
            names.retain(|other| *other != name);
            if names.is_empty() {
                by_topic.remove(filter);
            }
        }
        for id in entry.confirmed.into_iter().chain(entry.asked) {
            self.ids.remove(&id);
        }
        Some(name)
    }

    /// The broker accepted the SUBSCRIBE with this identifier and uses no earlier one
    /// for new messages; those that it has queued may still carry them.
    pub(super) fn confirm(&mut self, filter: &str, id: u32, now: Instant) {
        let Some(entry) = self.entries.get_mut(filter) else {
            return;
        };
        let place = entry.asked.iter().position(|asked| *asked == id);
        let mut past: Vec<u32> = match place {
            Some(place) => entry.asked.drain(..=place).collect(),
            // Sent again behind a later one, it is what the broker uses now.
            None if self.ids.contains_key(&id) && entry.confirmed != Some(id) => Vec::new(),
            None => return,
        };
        past.pop();
        past.extend(entry.confirmed.replace(id));
        self.next_key += 1;
        entry.confirmed_at = self.next_key;
        // A restored one is none of a newcomer's.
        let newcomer = self.ids.get(&id).and_then(|target| target.newcomer);
        if let Some(key) = newcomer.filter(|_| place.is_some()) {
            let recent = |n: &Newcomer| now - n.since < RETAINED_UNDER_WAY;
            let past = entry.newcomers.iter().take_while(|n| !recent(n)).count();
            entry.newcomers.drain(..past);
            entry.newcomers.push(Newcomer {
                key,
                since: now,
                heard: false,
            });
        }
        for id in past {
            self.retire(id);
        }
    }

    /// Whether anybody is subscribed to the filter.
    pub(super) fn contains(&self, filter: &str) -> bool {
        self.entries.contains_key(filter)
    }

    /// The highest QoS that anybody subscribed to the filter asked for.
    pub(super) fn qos(&self, filter: &str) -> Option<QoS> {
        self.entries.get(filter).map(|entry| entry.group.qos())
    }

    /// Everything there is to subscribe, with the newest identifiers. Retained messages are
    /// asked for again for those who may have missed them.
    pub(super) fn restore(&mut self, session_lost: bool, now: Instant) -> Vec<Ask> {
        let entries = self.entries.iter_mut();
        let restore = entries.filter_map(|(name, entry)| {
            let mut ask = entry.ask(name, Retained::Never)?;
            let missed =
                |n: &&Newcomer| now - n.since < RETAINED_UNDER_WAY && (session_lost || !n.heard);
            let missed = entry.newcomers.iter().filter(missed);
            let missed: Vec<_> = missed.map(|newcomer| newcomer.key).collect();
            if missed.is_empty() {
                entry.repeated = None;
            } else {
                ask.retained = Retained::Send;
                entry.repeated = Some((ask.id, missed));
            }
            Some(ask)
        });
        restore.collect()
    }

    /// One of them once more, which the broker refused.
    pub(super) fn again(&self, filter: &str) -> Option<Ask> {
        let (name, entry) = self.entries.get_key_value(filter)?;
        entry.ask(name, Retained::Never)
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
                let repeated = entry.repeated.as_ref().filter(|(again, _)| again == id);
                let keys = match repeated {
                    Some((_, keys)) => keys.as_slice(),
                    None => target.newcomer.as_slice(),
                };
                audience.extend(keys.iter().filter_map(|key| entry.group.get(*key)));
                let mut newcomers = entry.newcomers.iter_mut().rev();
                if let Some(one) = newcomers.find(|n| Some(n.key) == target.newcomer) {
                    one.heard = true;
                }
            } else {
                entry.group.collect(&mut audience);
            }
        }
        if ids.is_empty() && retained {
            audience.extend(self.newcomer(topic));
        } else if ids.is_empty() {
            for name in self.matching(topic) {
                if let Some(entry) = self.entries.get_mut(&name) {
                    entry.group.collect(&mut audience);
                }
            }
        }
        audience
    }

    /// The filters that a topic matches, where nothing else tells whom a message is for.
    fn matching(&mut self, topic: &str) -> Vec<Arc<str>> {
        let by_topic = self.by_topic.get_or_insert_with(|| {
            let mut by_topic = Trie::default();
            for (name, entry) in &self.entries {
                index(&mut by_topic, &entry.filter, name.clone());
            }
            by_topic
        });
        let mut matching = Vec::new();
        by_topic.matches(topic, |names| matching.extend_from_slice(names));
        matching
    }

    /// Whom a retained message without an identifier is for: it comes upon a SUBSCRIBE,
    /// and brokers work these off one after the other. One that sends the SUBACK first
    /// means the one that it accepted last, one that does not the oldest that it has not.
    fn newcomer(&mut self, topic: &str) -> Option<Recipient> {
        let matching = self.matching(topic);
        let mut accepted: Option<(SubscriptionKey, &Entry)> = None;
        let mut asked: Option<(SubscriptionKey, &Entry)> = None;
        for entry in matching.iter().filter_map(|name| self.entries.get(name)) {
            // The members of a group do not get what is retained (MQTT 5, 4.8.2).
            if entry.filter.is_shared() {
                continue;
            }
            let newcomer = |id: &u32| self.ids.get(id)?.newcomer;
            // Also one that has left: what is for it is for nobody else.
            if let Some(key) = entry.confirmed.as_ref().and_then(newcomer)
                && accepted.is_none_or(|(_, last)| entry.confirmed_at > last.confirmed_at)
            {
                accepted = Some((key, entry));
            }
            // The broker may have refused it, or never seen it, when its caller left.
            let waits = |key: &SubscriptionKey| entry.group.get(*key).is_some();
            if let Some(key) = entry.asked.iter().filter_map(newcomer).find(waits)
                && asked.is_none_or(|(oldest, _)| key < oldest)
            {
                asked = Some((key, entry));
            }
        }
        let retained_first = match (accepted, asked) {
            (Some((_, entry)), Some((key, _))) => {
                // Who was accepted before the other asked has likely got everything.
                self.retained_first.unwrap_or(key.0 > entry.confirmed_at)
            }
            (None, None) => return None,
            (accepted, _) => *self.retained_first.insert(accepted.is_none()),
        };
        let (key, entry) = if retained_first { asked } else { accepted }?;
        entry.group.get(key)
    }

    fn retire(&mut self, id: u32) {
        self.retired.push_back(id);
        if self.retired.len() > MAX_RETIRED_IDS
            && let Some(oldest) = self.retired.pop_front()
            && !self.is_confirmed(oldest)
        {
            self.ids.remove(&oldest);
        }
    }

    fn is_confirmed(&self, id: u32) -> bool {
        let target = self.ids.get(&id);
        let entry = target.and_then(|target| self.entries.get(&target.filter));
        entry.is_some_and(|entry| entry.confirmed == Some(id))
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

/// A shared subscription is at the same place as the filter behind its group.
fn index(by_topic: &mut Trie<Vec<Arc<str>>>, filter: &TopicFilter, name: Arc<str>) {
    match by_topic.get_mut(filter) {
        Some(names) => names.push(name),
        None => drop(by_topic.insert(filter, vec![name])),
    }
}

#[cfg(test)]
mod tests;
