use super::*;
use crate::broker::{Delivery, Options, Protocol, Subscriber};
use crate::metrics::{BrokerMetrics, Metrics};

struct Nobody;

impl Subscriber for Nobody {
    fn deliver(&self, _: Delivery) -> Result<(), Delivery> {
        Ok(())
    }
}

fn member() -> Arc<Member> {
    let options = Options {
        addresses: Vec::new(),
        protocol: Protocol::V4,
        client_id: String::new(),
        pool_size: 1,
        login: None,
        keep_alive: Duration::ZERO,
        connect_timeout: Duration::ZERO,
        session_expiry: Duration::ZERO,
        publish_timeout: Duration::ZERO,
        outbox_max_messages: 1,
        outbox_max_bytes: 1,
        receive_maximum: 1,
        max_packet_size: 1,
        reconnect: (Duration::ZERO, Duration::ZERO),
        id_property: None,
        from_property: None,
        timestamp_property: None,
        trace: false,
        will: None,
        own: false,
    };
    let metrics = BrokerMetrics::new(&Metrics::new().unwrap());
    Member::new(0, String::new(), Arc::new(options), metrics).unwrap()
}

/// A queue, a member whose subscribers are the newcomers, and a clock.
struct Scene {
    queue: Queue,
    member: Arc<Member>,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        Self {
            queue: Queue::default(),
            member: member(),
            now: Instant::now(),
        }
    }

    fn come(&mut self, filter: &str, qos: QoS) -> SubscriptionKey {
        let filter = TopicFilter::parse(filter).unwrap();
        let (key, _) = self
            .member
            .join(&filter, &filter, qos, Arc::new(Nobody), None);
        let newcomer = Newcomer {
            member: self.member.clone(),
            filter,
            key,
            qos,
        };
        self.queue.push(newcomer, self.now);
        key
    }

    /// What is sent: packet id, filter, and whether it is a SUBSCRIBE.
    fn steps(&mut self) -> Vec<(u16, String, bool)> {
        let steps = std::iter::from_fn(|| self.queue.step(self.now));
        steps
            .map(|step| match step {
                Step::Subscribe(pkid, filter, _) => (pkid, filter.to_string(), true),
                Step::Unsubscribe(pkid, filter) => (pkid, filter.to_string(), false),
            })
            .collect()
    }

    fn subscribes(&mut self) -> Vec<(u16, String)> {
        let steps = self.steps().into_iter();
        steps
            .map(|(pkid, filter, subscribe)| {
                assert!(subscribe);
                (pkid, filter)
            })
            .collect()
    }

    fn retained(&mut self, topic: &str) -> Vec<SubscriptionKey> {
        let newcomers = self.queue.retained(topic, self.now);
        newcomers.iter().map(|newcomer| newcomer.key).collect()
    }

    /// Brings a fetch that was asked for to its end.
    fn finish(&mut self, pkid: u16) {
        assert!(self.queue.subscribed(pkid, self.now));
        self.now += LONGEST_QUIET;
        assert!(
            self.steps()
                .iter()
                .any(|(p, _, s)| (*p, *s) == (pkid, false))
        );
        assert!(self.queue.unsubscribed(pkid, self.now));
    }
}

#[test]
fn a_retained_message_is_for_the_newcomers_of_its_filter_alone() {
    let mut scene = Scene::new();
    let first = scene.come("a/#", QoS::AtMostOnce);
    let second = scene.come("a/#", QoS::AtLeastOnce);
    let other = scene.come("b", QoS::AtMostOnce);
    let qos = |step| match step {
        Some(Step::Subscribe(_, _, qos)) => qos,
        step => panic!("{step:?}"),
    };
    assert_eq!(qos(scene.queue.step(scene.now)), QoS::AtLeastOnce);
    assert_eq!(scene.subscribes(), [(2, "b".to_owned())]);
    assert_eq!(scene.retained("a/1"), [first, second]);
    assert_eq!(scene.retained("b"), [other]);
    assert!(scene.retained("c").is_empty());
    scene.finish(1);
    assert!(scene.retained("a/2").is_empty());
    assert_eq!(scene.queue.len(), 1);
}

#[test]
fn filters_that_overlap_take_turns_and_others_pass() {
    let mut scene = Scene::new();
    for filter in ["a/+", "a/b", "c", "#"] {
        scene.come(filter, QoS::AtMostOnce);
    }
    let started = scene.subscribes();
    assert_eq!(started, [(1, "a/+".into()), (2, "c".into())]);
    scene.finish(1);
    assert_eq!(scene.subscribes(), [(3, "a/b".to_owned())]);
    // Not overtaken for ever.
    scene.finish(3);
    scene.now += PATIENCE;
    scene.come("x", QoS::AtMostOnce);
    assert!(scene.subscribes().is_empty());
    scene.finish(2);
    assert_eq!(scene.subscribes(), [(4, "#".to_owned())]);
}

#[test]
fn a_fetch_goes_on_while_messages_come() {
    let mut scene = Scene::new();
    let key = scene.come("a/#", QoS::AtLeastOnce);
    assert_eq!(scene.subscribes().len(), 1);
    assert!(scene.queue.subscribed(1, scene.now));
    scene.now += QUIET / 2;
    assert_eq!(scene.retained("a/1"), [key]);
    scene.now += QUIET / 2;
    assert!(scene.steps().is_empty(), "not quiet yet");
    scene.now += QUIET / 2;
    assert_eq!(scene.steps(), [(1, "a/#".to_owned(), false)]);
    // Comes while the UNSUBSCRIBE is on its way: there may be more.
    assert_eq!(scene.retained("a/2"), [key]);
    assert!(scene.queue.unsubscribed(1, scene.now));
    assert_eq!(scene.retained("a/3"), [key]);
    scene.now += QUIET;
    assert_eq!(scene.steps(), [(1, "a/#".to_owned(), false)]);
    assert!(scene.queue.unsubscribed(1, scene.now));
    assert_eq!(scene.queue.len(), 0);
    assert!(!scene.queue.unsubscribed(1, scene.now));
}

#[test]
fn a_broken_link_begins_again_and_hands_nothing_out_twice() {
    let mut scene = Scene::new();
    let early = scene.come("a/#", QoS::AtLeastOnce);
    assert_eq!(scene.subscribes().len(), 1);
    assert_eq!(scene.retained("a/1"), [early]);
    let late = scene.come("a/#", QoS::AtLeastOnce);
    scene.queue.reset();
    assert!(!scene.queue.subscribed(1, scene.now));
    let again = scene.subscribes();
    assert_eq!(again, [(2, "a/#".to_owned())]);
    assert!(scene.retained("a/1").is_empty());
    assert_eq!(scene.retained("a/2"), [early]);
    scene.finish(2);
    assert_eq!(scene.subscribes(), [(3, "a/#".to_owned())]);
    assert_eq!(scene.retained("a/1"), [late]);
    assert_eq!(scene.queue.len(), 1);
}

#[test]
fn an_answer_that_does_not_come_is_noticed() {
    let mut scene = Scene::new();
    scene.come("a", QoS::AtMostOnce);
    assert_eq!(scene.subscribes().len(), 1);
    let start = scene.now;
    assert!(!scene.queue.is_unanswered(start));
    scene.now += QUIET;
    assert!(scene.queue.is_unanswered(scene.now));
    assert!(scene.queue.subscribed(1, scene.now));
    assert!(!scene.queue.is_unanswered(scene.now + QUIET));
    scene.now += QUIET_ROUNDS * QUIET;
    assert_eq!(scene.steps().len(), 1);
    assert!(scene.queue.is_unanswered(scene.now + QUIET));
}

#[test]
fn who_has_left_is_not_fetched_for() {
    let mut scene = Scene::new();
    let key = scene.come("a", QoS::AtMostOnce);
    let filter = TopicFilter::parse("a").unwrap();
    scene.member.leave(&filter, key, Some(&filter));
    assert!(scene.steps().is_empty());
    assert_eq!(scene.queue.len(), 0);
    scene.come("b", QoS::AtMostOnce);
    assert_eq!(scene.subscribes().len(), 1);
    assert_eq!(scene.queue.refused(1).unwrap().as_str(), "b");
    assert_eq!(scene.queue.len(), 0);
}

#[test]
fn a_filter_that_the_broker_hangs_up_upon_holds_up_nobody() {
    let mut scene = Scene::new();
    scene.come("secret", QoS::AtMostOnce);
    scene.come("open", QoS::AtMostOnce);
    let mut over = None;
    for time in 0..MAX_HANG_UPS {
        assert!(over.is_none());
        let step = scene.queue.step(scene.now);
        assert!(matches!(step, Some(Step::Subscribe(_, filter, _)) if filter.as_str() == "secret"));
        scene.now += Duration::from_millis(1);
        // Once it is under suspicion it is tried alone.
        assert_eq!(scene.queue.step(scene.now).is_some(), time == 0);
        over = scene.queue.hung_up();
        scene.queue.reset();
    }
    assert_eq!(over.unwrap().as_str(), "secret");
    let step = scene.queue.step(scene.now);
    assert!(matches!(step, Some(Step::Subscribe(_, filter, _)) if filter.as_str() == "open"));
    assert_eq!(scene.queue.len(), 1);
}

#[test]
fn over_a_slow_link_a_fetch_waits_longer() {
    let mut scene = Scene::new();
    scene.come("a", QoS::AtMostOnce);
    let Some(Step::Subscribe(pkid, ..)) = scene.queue.step(scene.now) else {
        panic!("nothing to send");
    };
    scene.now += Duration::from_millis(500);
    assert!(scene.queue.subscribed(pkid, scene.now));
    scene.now += Duration::from_millis(1999);
    assert!(scene.queue.step(scene.now).is_none());
    scene.now += Duration::from_millis(1);
    assert!(matches!(
        scene.queue.step(scene.now),
        Some(Step::Unsubscribe(..))
    ));
}

#[test]
fn a_number_that_the_broker_uses_is_exchanged() {
    let mut scene = Scene::new();
    scene.come("a", QoS::AtMostOnce);
    let Some(Step::Subscribe(first, ..)) = scene.queue.step(scene.now) else {
        panic!("nothing to send");
    };
    assert!(scene.queue.in_use(first, scene.now));
    assert!(!scene.queue.in_use(first, scene.now));
    let step = scene.queue.step(scene.now);
    assert!(matches!(step, Some(Step::Subscribe(second, ..)) if second != first));
}
