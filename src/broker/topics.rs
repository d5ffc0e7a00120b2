//! Who subscribed to what at one pool member, where messages bear no identifiers
//! (MQTT 3.1.1).
//!
//! The [planner](super::plan) sees to it that a message comes to a member once; the
//! topic says for whom it is. What the member holds at the broker are other filters
//! than its connections': fewer and wider.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::Shared;
use tokio::sync::oneshot;

use super::group::{Audience, Group, SubscriptionKey};
use super::table::Ask;
use super::topic::TopicFilter;
use super::trie::Trie;
use super::{QoS, Refusal, Subscriber};

/// Resolves with the broker's answer to a SUBSCRIBE.
pub(super) type Answer = Shared<oneshot::Receiver<Result<QoS, Refusal>>>;

/// To be sent, with the sender that resolves the answer.
pub(super) type Question = (Ask, oneshot::Sender<Result<QoS, Refusal>>);

/// A filter that is subscribed at the broker.
struct Held {
    /// Highest QoS asked for so far.
    qos: QoS,
    /// Kept, so that the SUBSCRIBE counts as wanted while this is here.
    answer: Answer,
}

impl Held {
    fn is_refused(&self) -> bool {
        matches!(self.answer.peek(), Some(Ok(Err(_)) | Err(_)))
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Topics {
    groups: Trie<Box<Group>>,
    held: HashMap<Arc<str>, Held>,
    next_key: u64,
}

impl Topics {
    /// Number of filters at the broker.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Adds a subscriber, in the place of `replaced`, to a filter whose messages come
    /// through `held`. Its subscription is good when the answer is; there is a
    /// question to be asked where `held` is new here or its QoS too low.
    pub(super) fn add(
        &mut self,
        filter: &TopicFilter,
        held: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
    ) -> (SubscriptionKey, Answer, Option<Question>) {
        self.next_key += 1;
        let key = SubscriptionKey(self.next_key);
        if self.groups.get(filter).is_none() {
            let group = Group::new(filter.is_shared());
            self.groups.insert(filter, Box::new(group));
        }
        if let Some(group) = self.groups.get_mut(filter) {
            group.add(key, subscriber, qos, replaced);
        }
        let known = self.held.get(held.as_str());
        match known {
            Some(known) if known.qos >= qos && !known.is_refused() => {
                (key, known.answer.clone(), None)
            }
            _ => {
                let qos = known.map_or(qos, |known| known.qos.max(qos));
                let name: Arc<str> = held.as_str().into();
                let (answered, answer) = oneshot::channel();
                let answer = answer.shared();
                let asked = Held {
                    qos,
                    answer: answer.clone(),
                };
                self.held.insert(name.clone(), asked);
                let ask = Ask {
                    filter: name,
                    qos,
                    id: 0,
                };
                (key, answer, Some((ask, answered)))
            }
        }
    }

    /// Removes a subscriber; harmless when it is gone.
    pub(super) fn remove(&mut self, filter: &TopicFilter, key: SubscriptionKey) {
        if let Some(group) = self.groups.get_mut(filter)
            && group.remove(key)
            && group.is_empty()
        {
            self.groups.remove(filter);
        }
    }

    /// Nothing relies on a filter any more: its name, to be unsubscribed.
    pub(super) fn release(&mut self, held: &TopicFilter) -> Option<Arc<str>> {
        self.held.remove_entry(held.as_str()).map(|(name, _)| name)
    }

    /// One subscriber, if it is still there.
    pub(super) fn get(
        &self,
        filter: &TopicFilter,
        key: SubscriptionKey,
    ) -> Option<(Arc<dyn Subscriber>, QoS)> {
        self.groups.get(filter)?.get(key)
    }

    /// Everything to subscribe again after the broker lost the session, except
    /// what `on_its_way` is being subscribed anyway.
    pub(super) fn restore(&self, on_its_way: impl Fn(&str) -> bool) -> Vec<Ask> {
        let lost = self.held.iter().filter(|(name, _)| !on_its_way(name));
        lost.map(|(name, held)| Ask {
            filter: name.clone(),
            qos: held.qos,
            id: 0,
        })
        .collect()
    }

    /// Who gets a message.
    pub(super) fn audience(&mut self, topic: &str) -> Audience {
        let mut audience = Vec::new();
        self.groups
            .matches(topic, |group| group.collect(&mut audience));
        audience
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

    fn add(
        topics: &mut Topics,
        text: &str,
        held: &str,
        qos: QoS,
    ) -> (SubscriptionKey, Answer, Option<Question>) {
        topics.add(&filter(text), &filter(held), qos, Arc::new(Nobody), None)
    }

    #[test]
    fn a_filter_is_asked_for_once_and_again_for_a_higher_qos() {
        let mut topics = Topics::default();
        let (_, _, question) = add(&mut topics, "a/#", "a/#", QoS::AtMostOnce);
        assert_eq!(question.unwrap().0.qos, QoS::AtMostOnce);
        let (_, _, question) = add(&mut topics, "a/b", "a/#", QoS::AtLeastOnce);
        let (ask, _answered) = question.unwrap();
        assert_eq!((&*ask.filter, ask.qos), ("a/#", QoS::AtLeastOnce));
        assert!(add(&mut topics, "a/c", "a/#", QoS::AtMostOnce).2.is_none());
        assert_eq!(topics.len(), 1);
        assert_eq!(topics.audience("a/b").len(), 2);
        assert_eq!(topics.restore(|_| false)[0].qos, QoS::AtLeastOnce);
        assert!(topics.restore(|name| name == "a/#").is_empty());
    }

    #[test]
    fn all_who_came_meanwhile_hear_the_answer_and_a_refusal_is_not_kept() {
        let mut topics = Topics::default();
        let (_, first, question) = add(&mut topics, "a", "a", QoS::AtLeastOnce);
        let (_, second, none) = add(&mut topics, "a", "a", QoS::AtLeastOnce);
        assert!(none.is_none() && second.clone().now_or_never().is_none());
        let refusal = Refusal {
            denied: false,
            reason: "no".to_owned(),
        };
        question.unwrap().1.send(Err(refusal.clone())).unwrap();
        for answer in [first, second] {
            assert_eq!(answer.now_or_never().unwrap(), Ok(Err(refusal.clone())));
        }
        let again = add(&mut topics, "a", "a", QoS::AtMostOnce).2;
        assert!(again.is_some(), "the broker may have changed its mind");
    }

    #[test]
    fn a_question_is_withdrawn_with_what_it_was_for() {
        let mut topics = Topics::default();
        let (key, answer, question) = add(&mut topics, "a", "a", QoS::AtLeastOnce);
        let (_, answered) = question.unwrap();
        drop(answer);
        assert!(!answered.is_closed(), "others may rely on it");
        topics.remove(&filter("a"), key);
        assert_eq!(topics.release(&filter("a")).as_deref(), Some("a"));
        assert!(answered.is_closed());
        assert!(topics.groups.is_empty() && topics.audience("a").is_empty());
    }
}
