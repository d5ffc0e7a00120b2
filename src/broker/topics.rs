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

use super::group::{Audience, ByQoS, Group, Recipient, SubscriptionKey};
use super::table::Ask;
use super::topic::TopicFilter;
use super::trie::Trie;
use super::wire::Retained;
use super::{QoS, Refusal, Subscriber};

/// Resolves with the broker's answer to a SUBSCRIBE.
pub(super) type Answer = Shared<oneshot::Receiver<Result<QoS, Refusal>>>;

/// To be sent, with the sender that resolves the answer.
pub(super) type Question = (Ask, oneshot::Sender<Result<QoS, Refusal>>);

/// A filter that is subscribed at the broker.
struct Held {
    /// The QoS that the broker was asked for last.
    asked: QoS,
    /// What those ask for who rely on it.
    by_qos: ByQoS,
    /// Kept, so that the SUBSCRIBE counts as wanted while this is here.
    answer: Answer,
    /// Whether the broker refused it when it was restored.
    not_restored: bool,
}

impl Held {
    fn is_refused(&self) -> bool {
        self.not_restored || matches!(self.answer.peek(), Some(Ok(Err(_)) | Err(_)))
    }
}

/// Those who subscribed to one filter.
struct Reliant {
    group: Group,
    /// What their messages come through. The plan changes it for none that is there.
    held: Arc<str>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Topics {
    reliant: Trie<Box<Reliant>>,
    held: HashMap<Arc<str>, Held>,
    next_key: u64,
}

impl Topics {
    /// Number of filters at the broker.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether the filter is subscribed at the broker, or to be.
    pub(super) fn holds(&self, filter: &str) -> bool {
        self.held.contains_key(filter)
    }

    /// The QoS that the filter is subscribed with at the broker, or to be.
    pub(super) fn qos(&self, filter: &str) -> Option<QoS> {
        self.held.get(filter).map(|held| held.asked)
    }

    /// Adds a subscriber, to take the place of `replaced` when that is removed, to a
    /// filter whose messages come through `held`. Its subscription is good when the
    /// answer is; there is a question to be asked where `held` is new here or its QoS
    /// too low, and where the last answer is of the past because the broker may not have
    /// `held` now (`in_doubt`).
    pub(super) fn add(
        &mut self,
        filter: &TopicFilter,
        held: &TopicFilter,
        qos: QoS,
        subscriber: Arc<dyn Subscriber>,
        replaced: Option<SubscriptionKey>,
        in_doubt: bool,
    ) -> (SubscriptionKey, Answer, Option<Question>) {
        self.next_key += 1;
        let key = SubscriptionKey(self.next_key);
        if self.reliant.get(filter).is_none() {
            let reliant = Reliant {
                group: Group::new(filter.is_shared()),
                held: held.as_str().into(),
            };
            self.reliant.insert(filter, Box::new(reliant));
        }
        if let Some(reliant) = self.reliant.get_mut(filter) {
            reliant.group.add(key, subscriber, qos, replaced);
        }
        let mut by_qos = ByQoS::default();
        if let Some(known) = self.held.get_mut(held.as_str()) {
            known.by_qos.add(qos);
            let is_past = in_doubt && known.answer.clone().now_or_never().is_some();
            if known.asked >= qos && !known.is_refused() && !is_past {
                return (key, known.answer.clone(), None);
            }
            by_qos = std::mem::take(&mut known.by_qos);
        } else {
            by_qos.add(qos);
        }
        let name: Arc<str> = held.as_str().into();
        let (answered, answer) = oneshot::channel();
        let answer = answer.shared();
        let ask = Ask {
            filter: name.clone(),
            qos: by_qos.highest(),
            id: 0,
            retained: Retained::Send,
        };
        let asked = Held {
            asked: ask.qos,
            by_qos,
            answer: answer.clone(),
            not_restored: false,
        };
        self.held.insert(name, asked);
        (key, answer, Some((ask, answered)))
    }

    /// Removes a subscriber; harmless when it is gone.
    pub(super) fn remove(&mut self, filter: &TopicFilter, key: SubscriptionKey) {
        let Some(reliant) = self.reliant.get_mut(filter) else {
            return;
        };
        let Some(qos) = reliant.group.remove(key) else {
            return;
        };
        if let Some(held) = self.held.get_mut(&reliant.held) {
            held.by_qos.remove(qos);
        }
        if reliant.group.is_empty() {
            self.reliant.remove(filter);
        }
    }

    /// Nothing relies on a filter any more: its name, to be unsubscribed.
    pub(super) fn release(&mut self, held: &TopicFilter) -> Option<Arc<str>> {
        self.held.remove_entry(held.as_str()).map(|(name, _)| name)
    }

    /// One subscriber, if it is still there.
    pub(super) fn get(&self, filter: &TopicFilter, key: SubscriptionKey) -> Option<Recipient> {
        self.reliant.get(filter)?.group.get(key)
    }

    /// Everything there is to subscribe; it is taken for asked.
    pub(super) fn restore(&mut self) -> Vec<Ask> {
        let restore = |(name, held): (&Arc<str>, &mut Held)| {
            held.asked = held.by_qos.highest();
            held.not_restored = false;
            Ask::restore(name, held.asked)
        };
        self.held.iter_mut().map(restore).collect()
    }

    /// One of them once more, which the broker refused.
    pub(super) fn again(&self, filter: &str) -> Option<Ask> {
        let (name, held) = self.held.get_key_value(filter)?;
        Some(Ask::restore(name, held.by_qos.highest()))
    }

    /// The broker has taken what it refused before.
    pub(super) fn restored(&mut self, filter: &str) {
        if let Some(held) = self.held.get_mut(filter) {
            held.not_restored = false;
        }
    }

    /// The broker refused what was restored: the next who relies on it asks again.
    pub(super) fn not_restored(&mut self, filter: &str) {
        if let Some(held) = self.held.get_mut(filter) {
            held.not_restored = true;
        }
    }

    /// Who gets a message.
    pub(super) fn audience(&mut self, topic: &str) -> Audience {
        let mut audience = Vec::new();
        self.reliant
            .matches(topic, |reliant| reliant.group.collect(&mut audience));
        audience
    }
}

impl Ask {
    /// Retained messages are fetched by a connection of their own.
    fn restore(filter: &Arc<str>, qos: QoS) -> Self {
        Self {
            filter: filter.clone(),
            qos,
            id: 0,
            retained: Retained::Never,
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

    fn add(
        topics: &mut Topics,
        text: &str,
        held: &str,
        qos: QoS,
    ) -> (SubscriptionKey, Answer, Option<Question>) {
        let nobody = Arc::new(Nobody);
        topics.add(&filter(text), &filter(held), qos, nobody, None, false)
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
        assert_eq!(topics.restore()[0].qos, QoS::AtLeastOnce);
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
    fn an_answer_of_the_past_is_none_while_the_broker_is_away() {
        let mut topics = Topics::default();
        let (_, _, question) = add(&mut topics, "a/#", "a/#", QoS::AtLeastOnce);
        question.unwrap().1.send(Ok(QoS::AtLeastOnce)).unwrap();
        assert!(add(&mut topics, "a/b", "a/#", QoS::AtLeastOnce).2.is_none());
        let (narrow, wide) = (filter("a/c"), filter("a/#"));
        let mut doubt = || {
            let nobody = Arc::new(Nobody);
            topics.add(&narrow, &wide, QoS::AtMostOnce, nobody, None, true)
        };
        let (_, answer, question) = doubt();
        assert!(answer.clone().now_or_never().is_none());
        assert!(doubt().2.is_none(), "all wait for one answer");
        let (ask, answered) = question.unwrap();
        assert_eq!(ask.qos, QoS::AtLeastOnce);
        answered.send(Ok(QoS::AtLeastOnce)).unwrap();
        assert_eq!(answer.now_or_never().unwrap(), Ok(Ok(QoS::AtLeastOnce)));
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
        assert!(topics.reliant.is_empty() && topics.audience("a").is_empty());
    }

    #[test]
    fn what_is_restored_is_asked_for_with_the_qos_that_is_still_wanted() {
        let mut topics = Topics::default();
        let _ = add(&mut topics, "a/b", "a/#", QoS::AtMostOnce);
        let (key, ..) = add(&mut topics, "a/c", "a/#", QoS::ExactlyOnce);
        assert_eq!(topics.restore()[0].qos, QoS::ExactlyOnce);
        topics.remove(&filter("a/c"), key);
        assert!(add(&mut topics, "a/d", "a/#", QoS::AtLeastOnce).2.is_none());
        assert_eq!(topics.restore()[0].qos, QoS::AtLeastOnce);
        let (ask, _answered) = add(&mut topics, "a/c", "a/#", QoS::ExactlyOnce).2.unwrap();
        assert_eq!(ask.qos, QoS::ExactlyOnce);
        topics.not_restored("a/#");
        assert!(add(&mut topics, "a/e", "a/#", QoS::AtMostOnce).2.is_some());
    }

    #[test]
    fn a_repeated_subscription_counts_when_the_first_is_gone() {
        let mut topics = Topics::default();
        let (first, ..) = add(&mut topics, "a", "a", QoS::AtMostOnce);
        let (a, nobody) = (filter("a"), Arc::new(Nobody));
        let _ = topics.add(&a, &a, QoS::AtLeastOnce, nobody, Some(first), false);
        let qos = |topics: &mut Topics| {
            let audience = topics.audience("a");
            audience.iter().map(|r| r.qos).collect::<Vec<_>>()
        };
        assert_eq!(qos(&mut topics), [QoS::AtMostOnce]);
        topics.remove(&a, first);
        assert_eq!(qos(&mut topics), [QoS::AtLeastOnce]);
    }
}
