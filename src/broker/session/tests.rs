//! The session against a broker in the test: what it writes is decoded again.

use proptest::prelude::*;
use rumqttc::v5::mqttbytes::v5::Packet;

use super::super::wire::UserProperties;
use super::*;

fn welcome(session_present: bool, receive_maximum: u16) -> Welcome {
    Welcome {
        session_present,
        receive_maximum,
        max_qos: QoS::ExactlyOnce,
        max_packet_size: None,
        subscription_ids: true,
        shared_subscriptions: true,
        wildcards: true,
        keep_alive: None,
    }
}

fn connected(receive_maximum: u16) -> Session {
    let mut session = Session::new(Protocol::V5, 1024);
    session.connected(&welcome(false, receive_maximum), &mut BytesMut::new());
    session
}

fn publish(
    session: &mut Session,
    payload: &str,
    qos: QoS,
    out: &mut BytesMut,
) -> oneshot::Receiver<Result<(), PublishError>> {
    let (waiter, confirmed) = oneshot::channel();
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    let publish = OutboundPublish::new(Protocol::V5, "t", qos, payload, std::iter::empty());
    session.publish(publish, waiter, out);
    confirmed
}

/// What the session wrote, as the codec reads it.
fn written(out: &mut BytesMut) -> Vec<Packet> {
    let mut packets = Vec::new();
    while !out.is_empty() {
        packets.push(Packet::read(out, None).unwrap());
    }
    packets
}

/// Payload, packet id and duplicate flag of each publish.
fn publishes(out: &mut BytesMut) -> Vec<(String, u16, bool)> {
    written(out)
        .into_iter()
        .filter_map(|packet| match packet {
            Packet::Publish(publish) => Some((
                String::from_utf8(publish.payload.to_vec()).unwrap(),
                publish.pkid,
                publish.dup,
            )),
            _ => None,
        })
        .collect()
}

fn incoming(pkid: u16, qos: QoS, dup: bool) -> Inbound {
    Inbound::Publish(InboundPublish {
        dup,
        retain: false,
        qos,
        pkid,
        topic: Bytes::from_static(b"t"),
        payload: Bytes::new(),
        user_properties: UserProperties::default(),
        subscription_ids: Vec::new(),
    })
}

fn receipt(event: Event) -> Receipt {
    match event {
        Event::Deliver(_, Some(receipt)) => receipt,
        other => panic!("{other:?}"),
    }
}

#[test]
fn qos_1_is_confirmed_by_puback_and_not_before() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut confirmed = publish(&mut session, "a", QoS::AtLeastOnce, &mut out);
    let pkid = publishes(&mut out)[0].1;
    assert!(confirmed.try_recv().is_err() && !session.is_idle());
    session.receive(Inbound::PubAck(pkid, Ok(())), &mut out);
    assert_eq!(confirmed.try_recv().unwrap(), Ok(()));
    assert!(session.is_idle());
}

#[test]
fn qos_2_is_confirmed_by_pubcomp() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut confirmed = publish(&mut session, "a", QoS::ExactlyOnce, &mut out);
    let pkid = publishes(&mut out)[0].1;
    session.receive(Inbound::PubRec(pkid, Ok(())), &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubRel(_)]));
    assert!(confirmed.try_recv().is_err());
    session.receive(Inbound::PubComp(pkid, Ok(())), &mut out);
    assert_eq!(confirmed.try_recv().unwrap(), Ok(()));
}

#[test]
fn a_refusal_reaches_the_caller() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    for (qos, ack) in [
        (QoS::AtLeastOnce, Inbound::PubAck as fn(_, _) -> _),
        (QoS::ExactlyOnce, Inbound::PubRec),
    ] {
        let mut confirmed = publish(&mut session, "a", qos, &mut out);
        let pkid = publishes(&mut out)[0].1;
        let refusal = Refusal {
            denied: true,
            reason: "not authorized".into(),
        };
        session.receive(ack(pkid, Err(refusal.clone())), &mut out);
        let expected = Err(PublishError::Refused(refusal));
        assert_eq!(confirmed.try_recv().unwrap(), expected);
        assert!(session.is_idle());
    }
}

#[test]
fn the_brokers_window_is_kept() {
    let (mut session, mut out) = (connected(2), BytesMut::new());
    let _first = publish(&mut session, "a", QoS::AtLeastOnce, &mut out);
    assert!(session.can_publish());
    let _second = publish(&mut session, "b", QoS::AtLeastOnce, &mut out);
    assert!(!session.can_publish());
    let pkid = publishes(&mut out)[0].1;
    session.receive(Inbound::PubAck(pkid, Ok(())), &mut out);
    assert!(session.can_publish());
}

#[test]
fn unconfirmed_publishes_are_sent_again_in_order_and_within_the_window() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut waiters: Vec<_> = ["a", "b", "c", "d"]
        .iter()
        .map(|payload| publish(&mut session, payload, QoS::AtLeastOnce, &mut out))
        .collect();
    let first = publishes(&mut out);
    session.receive(Inbound::PubAck(first[1].1, Ok(())), &mut out);
    session.disconnected();
    assert!(!session.can_publish());
    session.connected(&welcome(true, 2), &mut out);
    let again = publishes(&mut out);
    assert_eq!(
        again,
        [
            ("a".into(), first[0].1, true),
            ("c".into(), first[2].1, true)
        ]
    );
    assert!(!session.can_publish(), "d must go first");
    session.receive(Inbound::PubAck(first[0].1, Ok(())), &mut out);
    assert_eq!(publishes(&mut out), [("d".into(), first[3].1, true)]);
    session.receive(Inbound::PubAck(first[2].1, Ok(())), &mut out);
    session.receive(Inbound::PubAck(first[3].1, Ok(())), &mut out);
    assert!(session.is_idle() && session.can_publish());
    assert!(
        waiters
            .iter_mut()
            .all(|waiter| waiter.try_recv() == Ok(Ok(())))
    );
}

#[test]
fn a_lost_session_gets_them_as_new() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let _waiter = publish(&mut session, "a", QoS::AtLeastOnce, &mut out);
    out.clear();
    session.disconnected();
    session.connected(&welcome(false, 10), &mut out);
    let again = publishes(&mut out);
    assert_eq!(again.len(), 1);
    assert!(!again[0].2, "a duplicate of nothing the broker knows");
}

#[test]
fn a_release_goes_on_in_its_session_and_fails_without_it() {
    for present in [true, false] {
        let (mut session, mut out) = (connected(10), BytesMut::new());
        let mut confirmed = publish(&mut session, "a", QoS::ExactlyOnce, &mut out);
        let pkid = publishes(&mut out)[0].1;
        session.receive(Inbound::PubRec(pkid, Ok(())), &mut out);
        out.clear();
        session.disconnected();
        session.connected(&welcome(present, 10), &mut out);
        if present {
            assert!(matches!(written(&mut out)[..], [Packet::PubRel(_)]));
            session.receive(Inbound::PubComp(pkid, Ok(())), &mut out);
            assert_eq!(confirmed.try_recv().unwrap(), Ok(()));
        } else {
            let lost = Err(PublishError::SessionLost);
            assert_eq!(confirmed.try_recv().unwrap(), lost);
        }
        assert!(session.is_idle());
    }
}

#[test]
fn a_message_is_acknowledged_when_it_was_taken() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let one = receipt(session.receive(incoming(5, QoS::AtLeastOnce, false), &mut out));
    let two = receipt(session.receive(incoming(6, QoS::ExactlyOnce, false), &mut out));
    assert!(out.is_empty());
    session.taken(two, &mut out);
    session.taken(one, &mut out);
    assert!(matches!(
        written(&mut out)[..],
        [Packet::PubRec(_), Packet::PubAck(_)]
    ));
    session.receive(Inbound::PubRel(6), &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubComp(_)]));
}

#[test]
fn a_message_that_comes_again_is_delivered_once() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    for qos in [QoS::AtLeastOnce, QoS::ExactlyOnce] {
        // Still with its connections when the broker sends it again.
        let held = receipt(session.receive(incoming(7, qos, false), &mut out));
        session.disconnected();
        session.connected(&welcome(true, 10), &mut out);
        let again = session.receive(incoming(7, qos, true), &mut out);
        assert!(matches!(again, Event::None), "{again:?}");
        session.taken(held, &mut out);
        assert_eq!(written(&mut out).len(), 1);
        session.receive(Inbound::PubRel(7), &mut out);
        out.clear();
        // Taken while the link was down.
        let held = receipt(session.receive(incoming(8, qos, false), &mut out));
        session.disconnected();
        session.taken(held, &mut out);
        assert!(out.is_empty());
        session.connected(&welcome(true, 10), &mut out);
        let again = session.receive(incoming(8, qos, true), &mut out);
        assert!(matches!(again, Event::None), "{again:?}");
        assert_eq!(written(&mut out).len(), 1);
        session.receive(Inbound::PubRel(8), &mut out);
        out.clear();
    }
}

#[test]
fn a_late_receipt_does_not_acknowledge_another_message() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let old = receipt(session.receive(incoming(9, QoS::AtLeastOnce, false), &mut out));
    session.disconnected();
    session.connected(&welcome(false, 10), &mut out);
    let new = receipt(session.receive(incoming(9, QoS::AtLeastOnce, false), &mut out));
    session.taken(old, &mut out);
    assert!(out.is_empty());
    session.taken(new, &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubAck(_)]));
}

/// The broker hangs up, and the link comes back. What could not be restored.
fn hang_up(session: &mut Session, out: &mut BytesMut) -> Option<(Arc<str>, Refusal)> {
    let lost = session.hung_up();
    session.disconnected();
    out.clear();
    session.connected(&welcome(true, 10), out);
    lost
}

/// A suspect is on trial: first the broker is asked whether it is there.
fn answer_ping(session: &mut Session, out: &mut BytesMut) {
    assert!(matches!(written(out)[..], [Packet::PingReq(_)]));
    assert!(!session.can_publish() && !session.can_subscribe());
    session.receive(Inbound::PingResp, out);
}

#[test]
fn a_packet_upon_which_the_broker_hangs_up_fails_when_that_is_proven() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut poison = publish(&mut session, "poison", QoS::AtLeastOnce, &mut out);
    let mut innocent = publish(&mut session, "innocent", QoS::AtLeastOnce, &mut out);
    for _ in 0..trial::SUSPECTED {
        assert!(hang_up(&mut session, &mut out).is_none());
    }
    for _ in 0..trial::PROOFS {
        assert!(poison.try_recv().is_err());
        answer_ping(&mut session, &mut out);
        let alone = publishes(&mut out);
        assert_eq!((alone.len(), &alone[0].0[..]), (1, "poison"));
        hang_up(&mut session, &mut out);
    }
    assert!(matches!(
        poison.try_recv(),
        Ok(Err(PublishError::Refused(_)))
    ));
    let again = publishes(&mut out);
    assert_eq!((again.len(), &again[0].0[..]), (1, "innocent"));
    session.receive(Inbound::PubAck(again[0].1, Ok(())), &mut out);
    assert_eq!(innocent.try_recv().unwrap(), Ok(()));
}

/// A broker that falls over time and again proves nothing about what it was sent.
#[test]
fn nothing_is_blamed_for_a_broker_that_fails_by_itself() {
    for qos in [QoS::AtLeastOnce, QoS::ExactlyOnce] {
        let (mut session, mut out) = (connected(10), BytesMut::new());
        let mut first = publish(&mut session, "first", qos, &mut out);
        let mut second = publish(&mut session, "second", QoS::AtLeastOnce, &mut out);
        for _ in 0..50 {
            assert!(hang_up(&mut session, &mut out).is_none());
            assert!(first.try_recv().is_err());
        }
        // It stays at last, and is given the one alone, then the rest.
        answer_ping(&mut session, &mut out);
        let alone = publishes(&mut out);
        assert_eq!((alone.len(), alone[0].2), (1, true));
        if qos == QoS::ExactlyOnce {
            session.receive(Inbound::PubRec(alone[0].1, Ok(())), &mut out);
            assert!(matches!(written(&mut out)[..], [Packet::PubRel(_)]));
            session.receive(Inbound::PubComp(alone[0].1, Ok(())), &mut out);
        } else {
            session.receive(Inbound::PubAck(alone[0].1, Ok(())), &mut out);
        }
        assert_eq!(first.try_recv(), Ok(Ok(())));
        let rest = publishes(&mut out);
        assert_eq!((rest.len(), &rest[0].0[..]), (1, "second"));
        session.receive(Inbound::PubAck(rest[0].1, Ok(())), &mut out);
        assert_eq!(second.try_recv(), Ok(Ok(())));
        assert!(session.is_idle() && session.can_publish());
    }
}

/// A broker that takes its time is none that hangs up.
#[test]
fn a_trial_does_not_wait_for_ever() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut slow = publish(&mut session, "slow", QoS::ExactlyOnce, &mut out);
    let mut next = publish(&mut session, "next", QoS::AtLeastOnce, &mut out);
    for _ in 0..trial::SUSPECTED {
        hang_up(&mut session, &mut out);
    }
    answer_ping(&mut session, &mut out);
    let sent = publishes(&mut out);
    let mut rest = Vec::new();
    let mut looks = 0;
    while session.is_watching() {
        session.tick(&mut out);
        rest.extend(publishes(&mut out));
        looks += 1;
    }
    assert!((2..10).contains(&looks), "{looks}");
    assert_eq!((rest.len(), &rest[0].0[..]), (1, "next"));
    session.receive(Inbound::PubAck(rest[0].1, Ok(())), &mut out);
    session.receive(Inbound::PubRec(sent[0].1, Ok(())), &mut out);
    session.receive(Inbound::PubComp(sent[0].1, Ok(())), &mut out);
    assert_eq!(slow.try_recv(), Ok(Ok(())));
    assert_eq!(next.try_recv(), Ok(Ok(())));
    assert!(session.is_idle());
}

/// After a broken link the broker may have completed what it is asked to release
/// (MQTT 5, 3.7.2.1), and some brokers answer twice.
#[test]
fn a_release_that_is_not_known_any_more_was_completed() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut confirmed = publish(&mut session, "a", QoS::ExactlyOnce, &mut out);
    let pkid = publishes(&mut out)[0].1;
    session.receive(Inbound::PubRec(pkid, Ok(())), &mut out);
    session.disconnected();
    out.clear();
    session.connected(&welcome(true, 10), &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubRel(_)]));
    session.receive(Inbound::PubCompUnknown(pkid), &mut out);
    assert_eq!(confirmed.try_recv(), Ok(Ok(())));
    let again = session.receive(Inbound::PubComp(pkid, Ok(())), &mut out);
    assert!(matches!(again, Event::None), "{again:?}");
    // One that was never released cannot have been completed.
    let mut confirmed = publish(&mut session, "b", QoS::ExactlyOnce, &mut out);
    let pkid = publishes(&mut out)[0].1;
    session.receive(Inbound::PubRec(pkid, Ok(())), &mut out);
    session.receive(Inbound::PubCompUnknown(pkid), &mut out);
    assert!(matches!(confirmed.try_recv(), Ok(Err(_))));
}

/// A broker that goes back to a session that it saved long ago may use a number again for
/// another message, and mark it as sent again.
#[test]
fn another_message_under_a_number_that_is_held_is_delivered() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let held = receipt(session.receive(incoming(5, QoS::AtLeastOnce, false), &mut out));
    session.disconnected();
    session.connected(&welcome(true, 10), &mut out);
    let Inbound::Publish(publish) = incoming(5, QoS::AtLeastOnce, true) else {
        panic!("no publish");
    };
    let other = InboundPublish {
        payload: Bytes::from_static(b"another"),
        ..publish
    };
    let other = receipt(session.receive(Inbound::Publish(other), &mut out));
    session.taken(held, &mut out);
    assert!(out.is_empty());
    session.taken(other, &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubAck(_)]));
}

/// HiveMQ stops at fifty messages and ejabberd at one, and neither says so: the same ones
/// that wait for long while nothing comes are taken for what it waits for.
#[test]
fn a_broker_that_waits_for_a_slow_handler_goes_on() {
    for window in [1, 50] {
        let (mut session, mut out) = (connected(10), BytesMut::new());
        assert!(!session.is_watching(), "there is nothing to look at");
        for pkid in 1..=window {
            session.receive(incoming(pkid, QoS::AtLeastOnce, false), &mut out);
            for _ in 0..3 {
                assert!(session.is_watching() && !session.tick(&mut out));
            }
        }
        assert!(out.is_empty(), "messages came all the time");
        let mut looks = 0;
        while session.is_watching() && !session.tick(&mut out) {
            looks += 1;
        }
        assert!(looks < 5);
        assert_eq!(written(&mut out).len(), usize::from(window));
        // What comes now is acknowledged at once, so that nobody waits again.
        for pkid in 1..=200 {
            session.receive(incoming(pkid, QoS::AtLeastOnce, false), &mut out);
            assert_eq!(written(&mut out).len(), 1);
        }
        assert_eq!(session.take_acknowledged_early(), u64::from(window) + 200);
        // And after a while when it was taken, as before.
        let mut looks = 0;
        while session.is_watching() {
            session.tick(&mut out);
            looks += 1;
        }
        assert!(looks < 20);
        let next = receipt(session.receive(incoming(300, QoS::AtLeastOnce, false), &mut out));
        assert!(out.is_empty());
        session.taken(next, &mut out);
        assert_eq!(written(&mut out).len(), 1);
        session.tick(&mut out);
        assert!(!session.is_watching(), "all was taken");
    }
}

/// To `a/#`, with the identifier 3.
fn subscribe(session: &mut Session, out: &mut BytesMut) -> oneshot::Receiver<Result<QoS, Refusal>> {
    let (waiter, answer) = oneshot::channel();
    let request = SubscribeRequest {
        filter: "a/#".into(),
        qos: QoS::AtLeastOnce,
        id: 3,
        retained: Retained::Send,
        waiter: Some(waiter),
    };
    session.subscribe(request, out);
    answer
}

#[test]
fn a_subscription_is_answered_by_its_suback_across_a_broken_link() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut answer = subscribe(&mut session, &mut out);
    out.clear();
    session.disconnected();
    session.connected(&welcome(false, 10), &mut out);
    let packets = written(&mut out);
    let [Packet::Subscribe(subscribe)] = &packets[..] else {
        panic!("{packets:?}");
    };
    assert_eq!(subscribe.properties.as_ref().unwrap().id, Some(3));
    let granted = Inbound::SubAck(subscribe.pkid, Ok(QoS::AtLeastOnce));
    let event = session.receive(granted, &mut out);
    assert!(matches!(event, Event::Subscribed(_, 3)));
    assert_eq!(answer.try_recv().unwrap(), Ok(QoS::AtLeastOnce));
}

#[test]
fn a_subscription_is_refused_by_another_broker_that_has_none_of_its_kind() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut answer = subscribe(&mut session, &mut out);
    out.clear();
    session.disconnected();
    let other = Welcome {
        wildcards: false,
        ..welcome(false, 10)
    };
    session.connected(&other, &mut out);
    assert!(out.is_empty() && session.is_idle());
    let refusal = answer.try_recv().unwrap().unwrap_err();
    assert!(refusal.reason.contains("wildcards"), "{refusal}");
}

/// The packet ids of what the session wrote about filters.
fn about_filters(out: &mut BytesMut) -> Vec<u16> {
    let pkids = written(out).into_iter().map(|packet| match packet {
        Packet::Subscribe(subscribe) => subscribe.pkid,
        Packet::Unsubscribe(unsubscribe) => unsubscribe.pkid,
        other => panic!("{other:?}"),
    });
    pkids.collect()
}

#[test]
fn a_packet_id_that_the_broker_uses_itself_is_changed() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut answer = subscribe(&mut session, &mut out);
    session.unsubscribe("b".into(), &mut out);
    let first = about_filters(&mut out);
    let event = session.receive(Inbound::PkidInUse(first[0]), &mut out);
    let Event::SubscribeAgain(request) = event else {
        panic!("{event:?}");
    };
    let event = session.receive(Inbound::PkidInUse(first[1]), &mut out);
    assert!(matches!(&event, Event::UnsubscribeAgain(filter) if &**filter == "b"));
    assert!(out.is_empty() && session.is_idle());
    session.subscribe(request, &mut out);
    session.unsubscribe("b".into(), &mut out);
    let second = about_filters(&mut out);
    let far = |(a, b): (&u16, &u16)| a.abs_diff(*b) > 10_000;
    assert!(first.iter().zip(&second).all(far), "{first:?} {second:?}");
    let granted = Inbound::SubAck(second[0], Ok(QoS::AtLeastOnce));
    let event = session.receive(granted, &mut out);
    assert!(matches!(event, Event::Subscribed(_, 3)));
    assert_eq!(answer.try_recv().unwrap(), Ok(QoS::AtLeastOnce));
}

#[test]
fn a_broker_that_takes_no_packet_id_is_not_asked_for_ever() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    let mut answer = subscribe(&mut session, &mut out);
    for _ in 0..MAX_RENUMBERED {
        let pkid = about_filters(&mut out)[0];
        match session.receive(Inbound::PkidInUse(pkid), &mut out) {
            Event::SubscribeAgain(request) => session.subscribe(request, &mut out),
            other => panic!("{other:?}"),
        }
    }
    session.unsubscribe("b".into(), &mut out);
    for pkid in about_filters(&mut out) {
        let event = session.receive(Inbound::PkidInUse(pkid), &mut out);
        assert!(matches!(event, Event::None));
    }
    assert!(session.is_idle());
    let refusal = answer.try_recv().unwrap().unwrap_err();
    assert_eq!(refusal.reason, "packet identifier in use");
}

#[test]
fn slow_takers_leave_half_of_the_window_to_others() {
    let mut session = Session::new(Protocol::V5, 8);
    let mut out = BytesMut::new();
    session.connected(&welcome(false, 10), &mut out);
    let mut receipts = Vec::new();
    for pkid in 1..=4 {
        receipts.push(receipt(
            session.receive(incoming(pkid, QoS::AtLeastOnce, false), &mut out),
        ));
    }
    assert!(out.is_empty(), "nobody took anything");
    session.receive(incoming(5, QoS::AtLeastOnce, false), &mut out);
    let packets = written(&mut out);
    assert!(
        matches!(&packets[..], [Packet::PubAck(ack)] if ack.pkid == 1),
        "{packets:?}"
    );
    assert_eq!(session.take_acknowledged_early(), 1);
    // Taken after all: not acknowledged again.
    session.taken(receipts[0], &mut out);
    assert!(out.is_empty());
    session.taken(receipts[1], &mut out);
    assert!(matches!(written(&mut out)[..], [Packet::PubAck(_)]));
    session.receive(incoming(6, QoS::AtLeastOnce, false), &mut out);
    assert!(out.is_empty(), "one was taken, so one more may wait");
}

proptest! {
    /// Whatever breaks and in whatever order the broker acknowledges: everything is
    /// confirmed once, nothing that was confirmed is sent again, and what is sent
    /// again keeps its order.
    #[test]
    fn nothing_is_lost_and_nothing_confirmed_comes_twice(
        steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..120),
        window in 1u16..6,
    ) {
        let (mut session, mut out) = (connected(window), BytesMut::new());
        let mut waiting = Vec::new();
        let mut unacknowledged: Vec<(usize, u16)> = Vec::new();
        let mut next = 0usize;
        for (step, index) in steps {
            match step {
                0 | 1 if session.can_publish() => {
                    let waiter = publish(&mut session, &next.to_string(), QoS::AtLeastOnce, &mut out);
                    waiting.push(waiter);
                    next += 1;
                }
                2 if !unacknowledged.is_empty() => {
                    let (number, pkid) = unacknowledged.remove(index.index(unacknowledged.len()));
                    session.receive(Inbound::PubAck(pkid, Ok(())), &mut out);
                    prop_assert_eq!(waiting[number].try_recv(), Ok(Ok(())));
                }
                3 => {
                    session.disconnected();
                    out.clear();
                    unacknowledged.clear();
                    session.connected(&welcome(true, window), &mut out);
                }
                _ => {}
            }
            let mut last = unacknowledged.iter().map(|(number, _)| *number).max();
            for (payload, pkid, _) in publishes(&mut out) {
                let number: usize = payload.parse().unwrap();
                prop_assert!(last.is_none_or(|last| last < number), "order");
                prop_assert!(waiting[number].try_recv().is_err(), "confirmed before");
                last = Some(number);
                unacknowledged.push((number, pkid));
            }
            prop_assert!(unacknowledged.len() <= usize::from(window));
        }
        // In the end the broker is patient.
        while let Some((_, pkid)) = unacknowledged.pop() {
            session.receive(Inbound::PubAck(pkid, Ok(())), &mut out);
            for (payload, pkid, _) in publishes(&mut out) {
                unacknowledged.push((payload.parse().unwrap(), pkid));
            }
        }
        prop_assert!(session.is_idle());
    }
}

fn restore(filter: &str) -> SubscribeRequest {
    SubscribeRequest {
        filter: filter.into(),
        qos: QoS::AtLeastOnce,
        id: 3,
        retained: Retained::Never,
        waiter: None,
    }
}

/// What is restored is another packet after each CONNACK, and the same filter.
#[test]
fn a_filter_upon_which_the_broker_hangs_up_is_found_out() {
    let (mut session, mut out) = (connected(10), BytesMut::new());
    for _ in 0..trial::SUSPECTED {
        session.subscribe(restore("poison"), &mut out);
        session.subscribe(restore("innocent"), &mut out);
        assert!(session.restoring());
        assert!(hang_up(&mut session, &mut out).is_none());
    }
    let mut lost = None;
    for _ in 0..trial::PROOFS {
        assert!(lost.is_none());
        assert_eq!(session.restores_alone(), Some(None));
        answer_ping(&mut session, &mut out);
        let alone = session.restores_alone().unwrap().unwrap();
        assert_eq!(alone.as_ref(), "poison");
        session.restore_alone(restore("poison"), &mut out);
        assert_eq!(session.restores_alone(), Some(None));
        assert!(session.restoring());
        lost = hang_up(&mut session, &mut out);
    }
    assert_eq!(lost.unwrap().0.as_ref(), "poison");
    assert_eq!(session.restores_alone(), None);
    assert!(!session.restoring());
    // An innocent one is restored, and others after it.
    for _ in 0..trial::SUSPECTED {
        session.subscribe(restore("innocent"), &mut out);
        assert!(hang_up(&mut session, &mut out).is_none());
    }
    answer_ping(&mut session, &mut out);
    session.restore_alone(restore("innocent"), &mut out);
    let pkid = session.last_pkid;
    let event = session.receive(Inbound::SubAck(pkid, Ok(QoS::AtLeastOnce)), &mut out);
    assert!(matches!(event, Event::Subscribed(..)), "{event:?}");
    assert_eq!(session.restores_alone(), None);
    assert!(session.can_subscribe() && session.can_publish() && !session.restoring());
}

#[test]
fn what_another_broker_does_not_take_is_not_sent_again() {
    let (mut session, mut out) = (connected(100), BytesMut::new());
    let mut large = publish(&mut session, &"x".repeat(200), QoS::AtLeastOnce, &mut out);
    let mut exact = publish(&mut session, "exactly", QoS::ExactlyOnce, &mut out);
    let mut small = publish(&mut session, "small", QoS::AtLeastOnce, &mut out);
    assert!(session.unacknowledged_bytes() > 200);
    session.disconnected();
    let other = Welcome {
        max_packet_size: Some(100),
        max_qos: QoS::AtLeastOnce,
        ..welcome(false, 100)
    };
    out.clear();
    session.connected(&other, &mut out);
    let sent = publishes(&mut out);
    assert_eq!(sent.len(), 1);
    assert!(matches!(
        large.try_recv(),
        Ok(Err(PublishError::TooLarge { limit: 100, .. }))
    ));
    assert!(matches!(
        exact.try_recv(),
        Ok(Err(PublishError::QosNotSupported(QoS::AtLeastOnce)))
    ));
    session.receive(Inbound::PubAck(sent[0].1, Ok(())), &mut out);
    assert_eq!(small.try_recv(), Ok(Ok(())));
    assert!(session.is_idle());
    assert_eq!(session.unacknowledged_bytes(), 0);
}
