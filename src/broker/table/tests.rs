use super::*;
use crate::broker::Delivery;

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

/// The QoS tells who it is.
fn without_id(table: &mut Table, topic: &str) -> Vec<QoS> {
    let audience = table.audience(topic, true, &[]);
    audience.iter().map(|recipient| recipient.qos).collect()
}

#[test]
fn without_identifiers_retained_messages_go_to_the_one_that_was_just_accepted() {
    let mut table = Table::new(0);
    let (_, first) = add(&mut table, "r/#", QoS::AtMostOnce);
    // All three at once.
    let (second, two) = add(&mut table, "r/a", QoS::AtLeastOnce);
    let (_, third) = add(&mut table, "r/#", QoS::ExactlyOnce);
    add(&mut table, "$share/g/#", QoS::AtMostOnce);
    table.confirm("r/#", first.id, Instant::now());
    assert_eq!(without_id(&mut table, "r/a"), [QoS::AtMostOnce]);
    table.confirm("r/a", two.id, Instant::now());
    assert_eq!(without_id(&mut table, "r/a"), [QoS::AtLeastOnce]);
    table.confirm("r/#", third.id, Instant::now());
    assert_eq!(without_id(&mut table, "r/a"), [QoS::ExactlyOnce]);
    assert_eq!(without_id(&mut table, "r/b"), [QoS::ExactlyOnce]);
    // The SUBACK comes first here: these are the rest of them.
    let (_, late) = add(&mut table, "r/a", QoS::AtLeastOnce);
    assert_eq!(without_id(&mut table, "r/b"), [QoS::ExactlyOnce]);
    assert_eq!(without_id(&mut table, "r/a"), [QoS::ExactlyOnce]);
    table.confirm("r/a", late.id, Instant::now());
    assert_eq!(without_id(&mut table, "r/a"), [QoS::AtLeastOnce]);
    // Other messages are for all.
    assert_eq!(table.audience("r/a", false, &[]).len(), 5);
    assert!(table.remove(&filter("r/a"), second).is_none());
}

#[test]
fn without_identifiers_retained_messages_may_come_before_the_suback() {
    let mut table = Table::new(0);
    let (_, first) = add(&mut table, "r", QoS::AtMostOnce);
    assert_eq!(without_id(&mut table, "r"), [QoS::AtMostOnce]);
    table.confirm("r", first.id, Instant::now());
    let (_, second) = add(&mut table, "r", QoS::AtLeastOnce);
    add(&mut table, "#", QoS::ExactlyOnce);
    assert_eq!(without_id(&mut table, "r"), [QoS::AtLeastOnce]);
    table.confirm("r", second.id, Instant::now());
    assert_eq!(without_id(&mut table, "r"), [QoS::ExactlyOnce]);
}

/// Before the broker has shown its order, who asked last is likely meant.
#[test]
fn without_identifiers_who_was_served_long_ago_gets_nothing_more() {
    let mut table = Table::new(0);
    let (_, first) = add(&mut table, "r", QoS::AtMostOnce);
    table.confirm("r", first.id, Instant::now());
    let (second, ask) = add(&mut table, "r", QoS::AtLeastOnce);
    assert_eq!(without_id(&mut table, "r"), [QoS::AtLeastOnce]);
    table.confirm("r", ask.id, Instant::now());
    assert_eq!(without_id(&mut table, "r"), [QoS::AtLeastOnce]);
    // One that was on its way for nobody shows nothing.
    assert!(without_id(&mut table, "q").is_empty());
    // Nor does anybody else when the one that it is for has left.
    table.remove(&filter("r"), second);
    assert!(without_id(&mut table, "r").is_empty());
    assert!(without_id(&mut table, "q").is_empty());
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
    table.confirm("a", ask.id, Instant::now());
    for _ in 0..MAX_RETIRED_IDS + MAX_ASKED + 100 {
        let (key, _) = table.add(&filter("a"), QoS::AtMostOnce, Arc::new(Nobody), Some(first));
        table.remove(&filter("a"), key);
    }
    assert_eq!(table.audience("a", false, &[ask.id]).len(), 1);
}

#[test]
fn a_subscribe_that_was_sent_again_behind_a_later_one_counts() {
    let mut table = Table::new(0);
    let (_, first) = add(&mut table, "a", QoS::AtMostOnce);
    let (_, second) = add(&mut table, "a", QoS::AtMostOnce);
    table.confirm("a", second.id, Instant::now());
    table.confirm("a", first.id, Instant::now());
    for _ in 0..MAX_RETIRED_IDS + 100 {
        let (key, other) = add(&mut table, "b", QoS::AtMostOnce);
        table.confirm("b", other.id, Instant::now());
        let _ = key;
    }
    assert_eq!(table.audience("a", false, &[first.id]).len(), 2);
    assert!(table.audience("a", false, &[second.id]).is_empty());
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
        table.confirm("b", ask.id, Instant::now());
        table.remove(&filter("a"), key);
        let _ = other;
    }
    assert!(table.ids.len() <= MAX_RETIRED_IDS + 2);
    for _ in 0..MAX_RETIRED_IDS + 100 {
        add(&mut table, "c", QoS::AtMostOnce);
    }
    assert!(table.ids.len() <= MAX_RETIRED_IDS + MAX_ASKED + 2);
}

#[test]
fn without_identifiers_each_filter_of_the_topic_counts() {
    let mut table = Table::new(0);
    let texts = ["a/#", "a/b", "$share/g/a/b", "$share/h/a/b", "c"];
    let mut keys: Vec<_> = texts
        .map(|text| add(&mut table, text, QoS::AtMostOnce).0)
        .into();
    assert_eq!(table.audience("a/b", false, &[]).len(), 4);
    // What comes and goes from now on is found too.
    add(&mut table, "+/b", QoS::AtMostOnce);
    add(&mut table, "a/b", QoS::AtMostOnce);
    assert_eq!(table.audience("a/b", false, &[]).len(), 6);
    table
        .remove(&filter("$share/g/a/b"), keys.remove(2))
        .unwrap();
    table.remove(&filter("a/#"), keys.remove(0)).unwrap();
    assert_eq!(table.audience("a/b", false, &[]).len(), 4);
    assert_eq!(table.audience("c", false, &[]).len(), 1);
    assert!(table.audience("d", false, &[]).is_empty());
}

#[test]
fn retained_messages_under_way_are_asked_for_again() {
    let (mut table, now) = (Table::new(0), Instant::now());
    let ask = add(&mut table, "r", QoS::AtLeastOnce).1;
    table.confirm("r", ask.id, now);
    let mut retained = |lost, later| table.restore(lost, now + later)[0].retained;
    assert_eq!(retained(true, Duration::from_secs(1)), Retained::Send);
    // In a session that is still there those of QoS 0 may be lost; not once some have come.
    assert_eq!(retained(false, Duration::from_secs(1)), Retained::Send);
    assert_eq!(retained(true, RETAINED_UNDER_WAY), Retained::Never);
    assert_eq!(table.audience("r", true, &[ask.id]).len(), 1);
    let mut retained = |lost, later| table.restore(lost, now + later)[0].retained;
    assert_eq!(retained(false, Duration::from_secs(1)), Retained::Never);
    assert_eq!(retained(true, Duration::from_secs(1)), Retained::Send);
}

#[test]
fn retained_messages_come_again_to_all_who_may_have_missed_them() {
    let (mut table, now) = (Table::new(0), Instant::now());
    let old = add(&mut table, "r", QoS::AtLeastOnce).1;
    table.confirm("r", old.id, now);
    let later = now + RETAINED_UNDER_WAY;
    let newcomers: Vec<_> = (0..2)
        .map(|_| {
            let (key, ask) = add(&mut table, "r", QoS::AtLeastOnce);
            table.confirm("r", ask.id, later);
            key
        })
        .collect();
    let ask = table
        .restore(true, later + Duration::from_secs(1))
        .remove(0);
    assert_eq!(ask.retained, Retained::Send);
    assert_eq!(table.audience("r", true, &[ask.id]).len(), 2);
    // One that has left is nobody any more, and who comes now gets its own.
    table.remove(&filter("r"), newcomers[0]);
    assert_eq!(table.audience("r", true, &[ask.id]).len(), 1);
    let next = add(&mut table, "r", QoS::AtLeastOnce).1;
    assert_eq!(table.audience("r", true, &[next.id]).len(), 1);
}
