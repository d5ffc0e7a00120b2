//! Which retained messages are being fetched for whom. No IO and no clock.
//!
//! ```text
//! waiting --start--> Asked --SUBACK--> Listening --quiet for a while--> Leaving
//!                                       ^                        |
//!                                       +-- UNSUBACK, but more --+-- UNSUBACK --> done
//! ```
//!
//! A retained message does not say which SUBSCRIBE it answers, so filters that
//! overlap are not asked for at the same time. Brokers may send retained messages
//! behind the SUBACK, and those beyond their window of unacknowledged messages only
//! as we acknowledge: a fetch is over when an UNSUBSCRIBE, sent after a quiet while,
//! was answered and nothing came in between.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::broker::QoS;
use crate::broker::group::SubscriptionKey;
use crate::broker::member::Member;
use crate::broker::topic::TopicFilter;
use crate::broker::trie::Trie;

/// How long a fetch stays open without a message. Brokers that look retained
/// messages up in the background have sent them by then.
pub(super) const QUIET: Duration = Duration::from_millis(200);

/// The same over a slow link: so many times as long as the SUBACK took, up to this.
const LONGEST_QUIET: Duration = Duration::from_secs(5);
const QUIET_ROUNDS: u32 = 4;

/// So many times in a row may the broker hang up upon the same SUBSCRIBE, which is sent
/// alone from the second time on.
const MAX_HANG_UPS: u32 = 3;

/// Fetches at the same time; with [`QUIET`] some 4,000 a second. Far below the number
/// of packet ids.
const MAX_ACTIVE: usize = 1024;

/// How many of those that wait are looked at for one that overlaps with none that is
/// being fetched.
const LOOK_AHEAD: usize = 64;

/// Whoever waits so long in front is not overtaken any more.
const PATIENCE: Duration = Duration::from_secs(1);

/// Topics remembered for each fetch, so that none is handed out twice when the link
/// breaks and the fetch begins again. 8 bytes and a set's entry each.
const MAX_SEEN: usize = 100_000;

/// A subscriber that has not had the retained messages.
pub(in crate::broker) struct Newcomer {
    pub member: Arc<Member>,
    pub filter: TopicFilter,
    pub key: SubscriptionKey,
    pub qos: QoS,
}

impl Newcomer {
    fn is_gone(&self) -> bool {
        self.member.subscriber(&self.filter, self.key).is_none()
    }
}

/// A filter and all who want its retained messages.
struct Fetch {
    filter: TopicFilter,
    newcomers: Vec<Newcomer>,
    since: Instant,
    seen: HashSet<u64>,
}

enum Stage {
    /// When.
    Asked(Instant),
    /// When the last message or answer came.
    Listening(Instant),
    /// When, and whether a message came since.
    Leaving(Instant, bool),
}

struct Active {
    /// Where it stood among those that waited.
    order: u64,
    fetch: Fetch,
    stage: Stage,
    /// How long it stays open without a message.
    quiet: Duration,
}

/// What is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Subscribe(u16, TopicFilter, QoS),
    Unsubscribe(u16, TopicFilter),
}

/// See the module.
#[derive(Default)]
pub(super) struct Queue {
    waiting: BTreeMap<u64, Fetch>,
    /// Where a filter waits.
    places: HashMap<Arc<str>, u64>,
    next_order: u64,
    /// Subscribers in `waiting` and `active`.
    newcomers: usize,
    /// By packet id.
    active: BTreeMap<u16, Active>,
    /// The packet ids of the filters in `active`.
    filters: Trie<u16>,
    last_pkid: u16,
    /// The order of the fetch that the broker may have hung up upon, and how often.
    suspect: Option<(u64, u32)>,
    hasher: RandomState,
}

impl Queue {
    /// Subscribers that wait or are being served.
    pub(super) fn len(&self) -> usize {
        self.newcomers
    }

    /// Adds a subscriber; those who wait for one filter are served together.
    pub(super) fn push(&mut self, newcomer: Newcomer, now: Instant) {
        self.newcomers += 1;
        let name: Arc<str> = newcomer.filter.as_str().into();
        if let Some(place) = self.places.get(&name)
            && let Some(fetch) = self.waiting.get_mut(place)
        {
            fetch.newcomers.push(newcomer);
            return;
        }
        self.next_order += 1;
        self.places.insert(name, self.next_order);
        let fetch = Fetch {
            filter: newcomer.filter.clone(),
            newcomers: vec![newcomer],
            since: now,
            seen: HashSet::new(),
        };
        self.waiting.insert(self.next_order, fetch);
    }

    /// The next thing to send, if there is any now.
    pub(super) fn step(&mut self, now: Instant) -> Option<Step> {
        self.start(now).or_else(|| self.leave(now))
    }

    fn start(&mut self, now: Instant) -> Option<Step> {
        let most = if self.suspect.is_some() {
            1
        } else {
            MAX_ACTIVE
        };
        while self.active.len() < most {
            let impatient = |(_, fetch): (_, &Fetch)| now - fetch.since >= PATIENCE;
            let look_ahead = match self.waiting.iter().next().is_some_and(impatient) {
                true => 1,
                false => LOOK_AHEAD,
            };
            let mut candidates = self.waiting.iter().take(look_ahead);
            let (order, _) = candidates.find(|(_, fetch)| !self.filters.overlaps(&fetch.filter))?;
            let order = *order;
            let mut fetch = self.waiting.remove(&order)?;
            if self.places.get(fetch.filter.as_str()) == Some(&order) {
                self.places.remove(fetch.filter.as_str());
            }
            self.newcomers -= fetch.newcomers.len();
            fetch.newcomers.retain(|newcomer| !newcomer.is_gone());
            self.newcomers += fetch.newcomers.len();
            let Some(qos) = fetch.newcomers.iter().map(|newcomer| newcomer.qos).max() else {
                continue;
            };
            let pkid = self.free_pkid();
            let filter = fetch.filter.clone();
            self.filters.insert(&filter, pkid);
            let active = Active {
                order,
                fetch,
                stage: Stage::Asked(now),
                quiet: QUIET,
            };
            self.active.insert(pkid, active);
            return Some(Step::Subscribe(pkid, filter, qos));
        }
        None
    }

    fn leave(&mut self, now: Instant) -> Option<Step> {
        self.active.iter_mut().find_map(|(pkid, active)| {
            let Stage::Listening(since) = active.stage else {
                return None;
            };
            if now < since + active.quiet {
                return None;
            }
            active.stage = Stage::Leaving(now, false);
            Some(Step::Unsubscribe(*pkid, active.fetch.filter.clone()))
        })
    }

    /// A SUBACK came. False if it was not asked for.
    pub(super) fn subscribed(&mut self, pkid: u16, now: Instant) -> bool {
        match self.active.get_mut(&pkid) {
            Some(active) => {
                let Stage::Asked(since) = active.stage else {
                    return false;
                };
                let rounds = (now - since) * QUIET_ROUNDS;
                active.quiet = rounds.clamp(QUIET, LONGEST_QUIET);
                active.stage = Stage::Listening(now);
                // The broker does not hang up upon it.
                self.suspect = None;
                true
            }
            None => false,
        }
    }

    /// The broker has a message of its own with this number in flight and took nothing:
    /// it is asked again, a subscription with another number. False if it was not asked.
    pub(super) fn in_use(&mut self, pkid: u16, now: Instant) -> bool {
        let Some(mut active) = self.active.remove(&pkid) else {
            return false;
        };
        if let Stage::Asked(_) = active.stage {
            self.filters.remove(&active.fetch.filter);
            self.waiting.insert(active.order, active.fetch);
        } else {
            active.stage = Stage::Listening(now);
            self.active.insert(pkid, active);
        }
        true
    }

    /// The broker hung up. The oldest SUBSCRIBE without an answer is the likely cause;
    /// when it was so several times in a row its fetch is over: the filter.
    pub(super) fn hung_up(&mut self) -> Option<TopicFilter> {
        let asked = self.active.iter().filter_map(|(pkid, active)| {
            let Stage::Asked(since) = active.stage else {
                return None;
            };
            Some((since, active.order, *pkid))
        });
        let Some((_, order, pkid)) = asked.min() else {
            self.suspect = None;
            return None;
        };
        let times = match self.suspect {
            Some((suspect, times)) if suspect == order => times + 1,
            _ => 1,
        };
        self.suspect = Some((order, times));
        if times < MAX_HANG_UPS {
            return None;
        }
        self.suspect = None;
        self.finish(pkid)
    }

    /// The broker refused: the filter whose fetch is over.
    pub(super) fn refused(&mut self, pkid: u16) -> Option<TopicFilter> {
        self.finish(pkid)
    }

    /// An UNSUBACK came. False if it was not asked for.
    pub(super) fn unsubscribed(&mut self, pkid: u16, now: Instant) -> bool {
        let Some(active) = self.active.get_mut(&pkid) else {
            return false;
        };
        match active.stage {
            Stage::Leaving(_, true) => active.stage = Stage::Listening(now),
            Stage::Leaving(_, false) => {
                self.finish(pkid);
            }
            Stage::Asked(_) | Stage::Listening(_) => return false,
        }
        true
    }

    /// Whether the broker owes an answer since before `limit`.
    pub(super) fn is_unanswered(&self, limit: Instant) -> bool {
        let mut stages = self.active.values().map(|active| &active.stage);
        stages.any(|stage| match stage {
            Stage::Asked(since) | Stage::Leaving(since, _) => *since < limit,
            Stage::Listening(_) => false,
        })
    }

    /// Those whom a retained message is for.
    pub(super) fn retained(&mut self, topic: &str, now: Instant) -> &[Newcomer] {
        let mut found = None;
        self.filters.matches(topic, |pkid| found = Some(*pkid));
        let Some(active) = found.and_then(|pkid| self.active.get_mut(&pkid)) else {
            return &[];
        };
        match &mut active.stage {
            Stage::Asked(_) => {}
            Stage::Listening(since) => *since = now,
            Stage::Leaving(_, heard) => *heard = true,
        }
        let fetch = &mut active.fetch;
        let is_new = fetch.seen.insert(self.hasher.hash_one(topic));
        if fetch.seen.len() > MAX_SEEN {
            // Only a link that breaks now could show it.
            fetch.seen.clear();
        }
        if is_new { &fetch.newcomers } else { &[] }
    }

    /// The link broke: what was being fetched is fetched again, first of all.
    pub(super) fn reset(&mut self) {
        self.filters = Trie::default();
        for active in std::mem::take(&mut self.active).into_values() {
            // Nobody joins it any more: they have not had what it handed out.
            self.waiting.insert(active.order, active.fetch);
        }
    }

    fn finish(&mut self, pkid: u16) -> Option<TopicFilter> {
        let fetch = self.active.remove(&pkid)?.fetch;
        self.suspect = None;
        self.newcomers -= fetch.newcomers.len();
        self.filters.remove(&fetch.filter);
        Some(fetch.filter)
    }

    /// There always is one: [`MAX_ACTIVE`] is far less than 65,535.
    fn free_pkid(&mut self) -> u16 {
        loop {
            self.last_pkid = self.last_pkid.checked_add(1).unwrap_or(1);
            if !self.active.contains_key(&self.last_pkid) {
                return self.last_pkid;
            }
        }
    }
}

#[cfg(test)]
mod tests;
