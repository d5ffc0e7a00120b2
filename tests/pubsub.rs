//! The rules of publish and subscribe through an outside broker.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{
    Broker, Call, Device, Gate, Handler, Peer, Plan, Proxy, Stage, assert_same, client, pattern,
    within,
};
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::{Message, ResultCode};
use rumqttc::v5::mqttbytes::v5::PublishProperties;

/// A stage whose answers from the broker a test can hold back.
async fn behind_proxy(keys: &[(&str, &str)]) -> (Stage, Proxy) {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [&[("BROKER__URL", url.as_str())], keys].concat();
    (Stage::around(broker, &keys).await, proxy)
}

/// How the name begins that the broker has for the connection over which a client's
/// messages go.
fn link_of(clientid: &str) -> &str {
    if common::OWN { clientid } else { "exproto" }
}

fn payload(message: &Message) -> String {
    String::from_utf8(message.payload.to_vec()).unwrap()
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis() as u64
}

/// Sizes of the batches that came to a connection.
fn batches(stage: &Stage, conn: &str) -> Vec<usize> {
    let events = stage.handler.events().into_iter();
    events
        .filter(|event| event.conn == conn)
        .filter_map(|event| match event.call {
            Call::Messages(messages) => Some(messages.len()),
            _ => None,
        })
        .collect()
}

/// A publish arrives at its topic with its QoS and payload, also an empty one and
/// bytes that are no text.
#[tokio::test]
async fn a_publish_arrives_as_it_was_made() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    let device = stage.client("c").await;
    for qos in 0..=2 {
        let topic = format!("up/ä/{qos}");
        stage.publish(&device, &topic, qos, "hello").await.ok();
        assert_eq!(peer.next_text().await, (topic, qos as u8, "hello".into()));
    }
    let large = pattern(300_000);
    for bytes in [vec![], vec![0, 255, 254, 10], large] {
        let answer = stage
            .adapter
            .publish(&device.conn, "bytes", 1, bytes.clone())
            .await;
        answer.ok();
        assert_same(&peer.next().await.payload, &bytes);
    }
    stage.finish().await;
}

/// Rule 7: SUCCESS at QoS 1 after PUBACK, at QoS 2 after PUBCOMP, at QoS 0 when it
/// is written. Here the broker has the message and its answer is held back.
#[tokio::test]
async fn success_waits_for_the_brokers_acknowledgement() {
    let (stage, proxy) = behind_proxy(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    let device = stage.client("c").await;
    for qos in [1, 2] {
        proxy.hold();
        let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
        let publish = async move { adapter.publish(&conn, "held", qos, "x").await };
        let publish = tokio::spawn(publish);
        if qos == 1 {
            // The broker has taken it and has answered.
            peer.next().await;
        } else {
            stage.broker.logged("Sending PUBREC").await;
        }
        // Another one goes all the way meanwhile: time enough for a false answer.
        stage.publish(&device, "passing", 0, "y").await.ok();
        let passed = peer.next_text().await;
        assert_eq!(passed.0, "passing");
        assert!(!publish.is_finished(), "SUCCESS before the broker's answer");
        proxy.release();
        within("the answer", publish).await.unwrap().ok();
        if qos == 2 {
            assert_eq!(peer.next_text().await.0, "held");
            let completed = format!("Sending PUBCOMP to {}", link_of("c"));
            assert_eq!(stage.broker.counted(&completed).await, 1);
        }
    }
    stage.finish().await;
}

/// Rule 7: Subscribe answers after SUBACK. Also for the second one to a filter, and
/// to a shared one.
#[tokio::test]
async fn a_subscribe_waits_for_the_suback() {
    for filter in ["plain", "$share/group/shared"] {
        let (stage, proxy) = behind_proxy(&[("BROKER__POOL_SIZE", "1")]).await;
        let names = ["a", "b"];
        let clients = [stage.client("a").await, stage.client("b").await];
        proxy.hold();
        let mut subscribes = Vec::new();
        for (device, name) in clients.iter().zip(names) {
            let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
            let subscribe = async move { adapter.subscribe(&conn, filter, 1).await };
            subscribes.push(tokio::spawn(subscribe));
            let granted = format!("Sending SUBACK to {}", link_of(name));
            stage.broker.logged(&granted).await;
            // A publish is written after whatever came before it.
            stage.publish(device, "passing", 0, "y").await.ok();
        }
        for subscribe in &subscribes {
            assert!(!subscribe.is_finished(), "{filter}: SUCCESS before SUBACK");
        }
        proxy.release();
        for subscribe in subscribes {
            within("the answer", subscribe).await.unwrap().ok();
        }
        stage.finish().await;
    }
}

/// Rule 6: a connection's publishes keep their order, whatever their QoS.
#[tokio::test]
async fn a_connections_publishes_keep_their_order() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "4")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.client("c").await;
    for number in 0..200 {
        let payload = number.to_string();
        // QoS 2 is published by the broker when it is released: not comparable.
        let qos = number % 2;
        stage.publish(&device, "up", qos, &payload).await.ok();
    }
    for number in 0..200 {
        assert_eq!(peer.next_text().await.2, number.to_string());
    }
    stage.finish().await;
}

/// Rule 6: messages of one topic keep theirs on the way down.
#[tokio::test]
async fn messages_of_a_topic_keep_their_order() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "down/#", 2).await;
    let expected: Vec<String> = (0..300).map(|n| n.to_string()).collect();
    for payload in &expected {
        peer.publish("down/t", 1, payload.clone()).await;
    }
    assert_eq!(stage.handler.payloads(&device.conn, 300).await, expected);
    stage.finish().await;
}

/// After Unsubscribe nothing comes any more.
#[tokio::test]
async fn an_unsubscribe_ends_it() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "one", 1).await;
    stage.subscribe(&device, "two", 1).await.ok();
    peer.publish("one", 1, "1").await;
    stage.handler.messages(&device.conn, 1).await;
    stage.adapter.unsubscribe(&device.conn, "one").await.ok();
    peer.publish("one", 1, "late").await;
    peer.publish("two", 1, "2").await;
    assert_eq!(stage.handler.payloads(&device.conn, 2).await, ["1", "2"]);
    let unsubscribe = format!("Received UNSUBSCRIBE from {}", link_of("c"));
    stage.broker.logged(&unsubscribe).await;
    stage.finish().await;
}

/// Rule 2: the last one to leave removes the subscription at the broker, whether by
/// Unsubscribe or by its end.
#[tokio::test]
async fn the_last_to_leave_unsubscribes_at_the_broker() {
    if common::OWN {
        return; // each has its own
    }
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let first = stage.subscriber("first", "t", 1).await;
    let second = stage.subscriber("second", "t", 1).await;
    let third = stage.client("third").await;
    stage.adapter.unsubscribe(&first.conn, "t").await.ok();
    // A publish is written after what came before it.
    stage.publish(&third, "x", 1, "x").await.ok();
    let unsubscribe = "Received UNSUBSCRIBE from exproto";
    assert_eq!(stage.broker.counted(unsubscribe).await, 0);
    drop(second);
    stage.broker.logged(unsubscribe).await;
    stage.finish().await;
}

/// Rule 2: the subscription's QoS at the broker is the highest that any asked for.
#[tokio::test]
async fn the_highest_qos_is_asked_of_the_broker() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let low = stage.subscriber("low", "t", 0).await;
    let high = stage.subscriber("high", "t", 2).await;
    let middle = stage.subscriber("middle", "t", 1).await;
    peer.publish("t", 2, "x").await;
    for (device, qos) in [(&low, 0), (&high, 2), (&middle, 1)] {
        let messages = stage.handler.messages(&device.conn, 1).await;
        assert_eq!(messages[0].qos, qos);
    }
    stage.finish().await;
}

/// Rule 3: delivered QoS is the lower of the publish's and the subscription's.
#[tokio::test]
async fn the_lower_qos_wins() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    for subscribed in 0..=2_u32 {
        let topic = format!("qos/{subscribed}");
        let device = stage.subscriber(&topic, &topic, subscribed).await;
        for published in 0..=2_u8 {
            peer.publish(&topic, published, published.to_string()).await;
            let messages = stage
                .handler
                .messages(&device.conn, published as usize + 1)
                .await;
            let message = &messages[published as usize];
            assert_eq!(message.qos, subscribed.min(published.into()));
            assert_eq!(payload(message), published.to_string());
        }
    }
    stage.finish().await;
}

/// Rule 1: each of many connections with one matching filter gets one copy.
#[tokio::test]
async fn a_message_fans_out_once_to_each() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "4")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut devices = Vec::new();
    for number in 0..20 {
        // Four filters that all match, five connections each.
        let filter = ["news/today", "news/+", "news/#", "+/today"][number % 4];
        let device = stage.subscriber(&format!("c{number}"), filter, 1).await;
        // What comes last, at the same pool member.
        stage.subscribe(&device, "end", 1).await.ok();
        devices.push(device);
    }
    peer.publish("news/today", 1, "news").await;
    for device in &devices {
        stage.handler.messages(&device.conn, 1).await;
    }
    peer.publish("news/today", 1, "more").await;
    for device in &devices {
        let payloads = stage.handler.payloads(&device.conn, 2).await;
        assert_eq!(payloads, ["news", "more"]);
    }
    stage.finish().await;
}

/// Rule 1: one copy for each matching subscription of a connection, on one pool
/// member and on several.
#[tokio::test]
async fn overlapping_filters_of_one_connection_each_bring_a_copy() {
    for pool in ["1", "4"] {
        let stage = Stage::with(&[("BROKER__POOL_SIZE", pool)]).await;
        let mut peer = Peer::connect(stage.broker.port).await;
        let both = stage.client("both").await;
        let single = stage.client("single").await;
        for filter in ["a/#", "a/b", "a/+", "+/b", "other/#"] {
            stage.subscribe(&both, filter, 1).await.ok();
        }
        stage.subscribe(&single, "a/#", 1).await.ok();
        for (topic, copies) in [("a/b", 4), ("a/c", 2), ("z/b", 1), ("a/b/c", 1)] {
            let before = stage.handler.messages(&both.conn, 0).await.len();
            peer.publish(topic, 1, topic).await;
            stage.handler.messages(&both.conn, before + copies).await;
        }
        // All that was to come came, and no copy beyond: the last of each member.
        let after = stage.handler.messages(&both.conn, 8).await;
        let of = |topic: &str| after.iter().filter(|m| m.topic == topic).count();
        assert_eq!((of("a/b"), of("a/c"), of("z/b"), of("a/b/c")), (4, 2, 1, 1));
        let single = stage.handler.payloads(&single.conn, 3).await;
        assert_eq!(single, ["a/b", "a/c", "a/b/c"]);
        stage.finish().await;
    }
}

/// Subscribing again to the same filter replaces the subscription: one copy, the new
/// QoS.
#[tokio::test]
async fn a_repeated_subscription_replaces_the_first() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 0).await;
    stage.subscribe(&device, "t", 1).await.ok();
    peer.publish("t", 2, "one").await;
    peer.publish("t", 2, "two").await;
    let messages = stage.handler.messages(&device.conn, 2).await;
    let found: Vec<_> = messages.iter().map(|m| (payload(m), m.qos)).collect();
    assert_eq!(found, [("one".to_owned(), 1), ("two".to_owned(), 1)]);
    stage.adapter.unsubscribe(&device.conn, "t").await.ok();
    let unsubscribe = format!("Received UNSUBSCRIBE from {}", link_of("c"));
    stage.broker.logged(&unsubscribe).await;
    stage.finish().await;
}

/// Rule 4: retained messages reach a new subscriber once, also where the filter is
/// subscribed for others already, and only the new one.
#[tokio::test]
async fn retained_messages_reach_the_newcomer_alone() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.retain("state/1", "on").await;
    peer.retain("state/2", "off").await;
    let first = stage.subscriber("first", "state/#", 1).await;
    let mut got = stage.handler.payloads(&first.conn, 2).await;
    got.sort();
    assert_eq!(got, ["off", "on"]);
    let second = stage.subscriber("second", "state/#", 1).await;
    let mut got = stage.handler.payloads(&second.conn, 2).await;
    got.sort();
    assert_eq!(got, ["off", "on"]);
    // Comes through the same member, behind whatever was wrong.
    peer.publish("state/3", 1, "live").await;
    for device in [&first, &second] {
        let got = stage.handler.payloads(&device.conn, 3).await;
        assert_eq!(got.len(), 3);
        assert_eq!(got[2], "live");
    }
    stage.finish().await;
}

/// Rule 4, across filters: a newcomer to one filter does not bring another filter's
/// subscribers the retained message again.
#[tokio::test]
async fn retained_messages_do_not_come_again_through_other_filters() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.retain("state", "on").await;
    let wide = stage.subscriber("wide", "#", 1).await;
    assert_eq!(stage.handler.payloads(&wide.conn, 1).await, ["on"]);
    let narrow = stage.subscriber("narrow", "state", 1).await;
    assert_eq!(stage.handler.payloads(&narrow.conn, 1).await, ["on"]);
    peer.publish("end", 1, "end").await;
    assert_eq!(stage.handler.payloads(&wide.conn, 2).await, ["on", "end"]);
    stage.finish().await;
}

/// Rule 5: `$share`: one member of a gateway's group gets each message, in turn;
/// others are not concerned.
#[tokio::test]
async fn a_shared_subscription_takes_turns() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut members = Vec::new();
    for number in 0..3 {
        let name = format!("m{number}");
        members.push(stage.subscriber(&name, "$share/g/work/#", 1).await);
    }
    let observer = stage.subscriber("observer", "work/#", 1).await;
    for number in 0..9 {
        peer.publish("work/x", 1, number.to_string()).await;
    }
    let mut all = HashSet::new();
    for member in &members {
        let got = stage.handler.messages(&member.conn, 3).await;
        assert_eq!(got.len(), 3, "not in turn");
        all.extend(got.iter().map(payload));
        assert_eq!(got[0].topic, "work/x");
    }
    assert_eq!(all.len(), 9, "one copy of each");
    assert_eq!(stage.handler.messages(&observer.conn, 9).await.len(), 9);
    // Who leaves gets nothing more, the others get it all.
    stage
        .adapter
        .unsubscribe(&members[0].conn, "$share/g/work/#")
        .await
        .ok();
    for number in 9..13 {
        peer.publish("work/x", 1, number.to_string()).await;
    }
    for member in &members[1..] {
        assert_eq!(stage.handler.messages(&member.conn, 5).await.len(), 5);
    }
    assert_eq!(stage.handler.messages(&members[0].conn, 3).await.len(), 3);
    stage.finish().await;
}

/// `$share` over two gateways: the broker gives each message to one of them.
#[tokio::test]
async fn a_group_over_two_gateways_gets_each_message_once() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let plan = Plan::new(&stage.broker.url(), &stage.handler.url());
    let other = Gateway::start(&plan.config()).await.unwrap();
    within("the other gateway", other.ready()).await;
    let here = stage.subscriber("here", "$share/g/t", 1).await;
    let there = Device::dial(other.addresses().listeners["tcp.default"]).await;
    let conn = stage.handler.created(there.port()).await;
    let adapter = common::Adapter::connect(other.addresses().adapter.tcp().unwrap()).await;
    adapter.authenticate(&conn, "there").await.ok();
    adapter.subscribe(&conn, "$share/g/t", 1).await.ok();
    for number in 0..20 {
        peer.publish("t", 1, number.to_string()).await;
    }
    let what = "twenty messages at both together";
    let (ours, theirs) = stage
        .handler
        .wait(what, |log| {
            let (a, b) = (log.messages(&here.conn), log.messages(&conn));
            (a.len() + b.len() >= 20).then_some((a, b))
        })
        .await;
    let all: HashSet<String> = ours.iter().chain(&theirs).map(payload).collect();
    assert_eq!((all.len(), ours.len() + theirs.len()), (20, 20));
    drop(there);
    within("the other gateway's drain", other.drain()).await;
    stage.finish().await;
}

/// Rule 11 and the fields of Message: `from`, `id` and `timestamp` are the publisher's
/// when the message came through a gateway, else empty, new, and of the receipt; `node` is
/// the receiver's.
#[tokio::test]
async fn a_message_says_who_sent_it_and_when() {
    if common::V4 {
        return; // 3.1.1 has no user properties
    }
    let stage = Stage::with(&[("MOUNTPOINT", "m/")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let plan = Plan::new(&stage.broker.url(), &stage.handler.url());
    let other = Gateway::start(&plan.config()).await.unwrap();
    within("the other gateway", other.ready()).await;
    let there = Device::dial(other.addresses().listeners["tcp.default"]).await;
    let conn = stage.handler.created(there.port()).await;
    let adapter = common::Adapter::connect(other.addresses().adapter.tcp().unwrap()).await;
    adapter.authenticate(&conn, "publisher").await.ok();

    let receiver = stage.subscriber("receiver", "#", 1).await;
    let before = now_ms();
    adapter.publish(&conn, "m/through", 1, "x").await.ok();
    let after = now_ms();
    peer.publish("m/plain", 1, "x").await;
    adapter.raw_publish("m/raw", 1, "x").await.ok();
    let id = "00112233445566778899aabbccddeeff";
    let properties = [
        ("exproto-from", "someone"),
        ("exproto-id", id),
        ("exproto-timestamp", "12345"),
    ];
    peer.publish_with("m/told", &properties).await;
    let nonsense = [("exproto-timestamp", "noon"), ("exproto-id", "one")];
    peer.publish_with("m/nonsense", &nonsense).await;
    let messages = stage.handler.messages(&receiver.conn, 5).await;
    let message = |topic: &str| messages.iter().find(|m| m.topic == topic).unwrap();

    let through = message("through");
    assert_eq!(through.from, "publisher");
    assert!((before..=after).contains(&through.timestamp));
    assert_eq!(message("plain").from, "");
    assert!((before..=now_ms()).contains(&message("plain").timestamp));
    assert_eq!(message("raw").from, "");
    assert_eq!(message("told").from, "someone");
    assert_eq!(message("told").id, id);
    assert_eq!(message("told").timestamp, 12345);
    assert!((before..=now_ms()).contains(&message("nonsense").timestamp));
    let ids: HashSet<&str> = messages.iter().map(|m| m.id.as_str()).collect();
    assert_eq!(ids.len(), 5);
    let node = stage.plan.config().node_name.to_string();
    for message in &messages {
        assert_eq!(message.node, node);
        assert_eq!(message.id.len(), 32);
        assert!(
            message.id.bytes().all(|b| b.is_ascii_hexdigit()),
            "{}",
            message.id
        );
    }
    drop(there);
    within("the other gateway's drain", other.drain()).await;
    stage.finish().await;
}

/// Rule 11: a plain subscriber sees those properties and nothing else of the gateway;
/// their names can be changed, and each turned off.
#[tokio::test]
async fn nothing_but_the_named_properties_goes_with_a_publish() {
    if common::V4 {
        return; // 3.1.1 has no user properties
    }
    let defaults = ["exproto-from", "exproto-id", "exproto-timestamp"];
    for names in [defaults, ["who", "which", "when"], ["who", "", ""], [""; 3]] {
        let [from, id, timestamp] = names;
        let stage = Stage::with(&[
            ("BROKER__FROM_PROPERTY", from),
            ("BROKER__ID_PROPERTY", id),
            ("BROKER__TIMESTAMP_PROPERTY", timestamp),
        ])
        .await;
        let mut peer = Peer::connect(stage.broker.port).await;
        peer.subscribe("t").await;
        let device = stage.subscriber("c", "t", 1).await;
        stage.publish(&device, "t", 1, "x").await.ok();
        let publish = peer.next().await;
        let message = stage.handler.messages(&device.conn, 1).await.remove(0);
        assert_eq!(message.from, if from.is_empty() { "" } else { "c" });
        let values = ["c", &message.id, &message.timestamp.to_string()];
        let said = names.into_iter().zip(values);
        let said: Vec<(String, String)> = said
            .filter(|(name, _)| !name.is_empty())
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let expected = (!said.is_empty()).then(|| PublishProperties {
            user_properties: said,
            ..PublishProperties::default()
        });
        assert_eq!(publish.properties, expected);
        stage.finish().await;
    }
}

/// A mountpoint goes in front of every topic with its placeholders filled in, and is
/// taken off the messages. A listener's own takes the place of the gateway's.
#[tokio::test]
async fn mountpoints_are_added_and_taken_off() {
    let stage = Stage::with(&[
        ("MOUNTPOINT", "g/${clientid}/${username}/"),
        ("LISTENERS__TCP__OWN__BIND", "127.0.0.1:0"),
        ("LISTENERS__TCP__OWN__MOUNTPOINT", "own/"),
        ("BROKER__POOL_SIZE", "1"),
    ])
    .await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    let device = stage.client("d1").await;
    stage.publish(&device, "up", 1, "x").await.ok();
    assert_eq!(peer.next_text().await.0, "g/d1/user of d1/up");
    let own = Device::dial(stage.gateway.addresses().listeners["tcp.own"]).await;
    let own_conn = stage.handler.created(own.port()).await;
    let mut told = client("d2");
    // Ignored, as in EMQX since 5.1.
    told.mountpoint = "ignored/".to_owned();
    let answer = stage
        .adapter
        .authenticate_as(&own_conn, Some(told), "")
        .await;
    answer.ok();
    stage.adapter.publish(&own_conn, "up", 1, "x").await.ok();
    assert_eq!(peer.next_text().await.0, "own/up");

    stage.subscribe(&device, "down/#", 1).await.ok();
    stage.subscribe(&device, "$share/grp/jobs", 1).await.ok();
    stage.adapter.subscribe(&own_conn, "down/#", 1).await.ok();
    peer.publish("down/x", 1, "not mounted").await;
    peer.publish("g/d1/user of d1/down/x", 1, "1").await;
    peer.publish("g/d1/user of d1/jobs", 1, "2").await;
    peer.publish("own/down/x", 1, "3").await;
    let topics = |messages: Vec<Message>| -> Vec<(String, String)> {
        messages
            .iter()
            .map(|m| (m.topic.clone(), payload(m)))
            .collect()
    };
    let text = |topic: &str, payload: &str| (topic.to_owned(), payload.to_owned());
    let got = topics(stage.handler.messages(&device.conn, 2).await);
    assert_eq!(got, [text("down/x", "1"), text("jobs", "2")]);
    let got = topics(stage.handler.messages(&own_conn, 1).await);
    assert_eq!(got, [text("down/x", "3")]);
    stage.adapter.unsubscribe(&device.conn, "down/#").await.ok();
    let unsubscribed = "g/d1/user of d1/down/#";
    let unsubscribe = format!("Received UNSUBSCRIBE from {}", link_of("d1"));
    stage.broker.logged(&unsubscribe).await;
    stage.broker.logged(unsubscribed).await;
    drop(own);
    stage.finish().await;
}

/// `clientinfo_mountpoint = true`: the request's mountpoint counts, as in EMQX 4.x.
#[tokio::test]
async fn the_mountpoint_of_the_request_counts_where_that_is_configured() {
    let keys = [("CLIENTINFO_MOUNTPOINT", "true"), ("MOUNTPOINT", "config/")];
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    for (id, mountpoint, topic) in [
        ("a", "mine/${clientid}/", "mine/a/up"),
        ("b", "", "config/up"),
    ] {
        let device = stage.device().await;
        let mut info = client(id);
        info.mountpoint = mountpoint.to_owned();
        let answer = stage
            .adapter
            .authenticate_as(&device.conn, Some(info), "")
            .await;
        answer.ok();
        stage.publish(&device, "up", 1, "x").await.ok();
        assert_eq!(peer.next_text().await.0, topic);
    }
    stage.finish().await;
}

/// A client id that would put a wildcard into the mountpoint is refused: it would
/// open the topics of others.
#[tokio::test]
async fn a_wildcard_cannot_come_in_through_the_mountpoint() {
    let stage = Stage::with(&[("MOUNTPOINT", "d/${clientid}/")]).await;
    let device = stage.device().await;
    for id in ["+", "#", "a+b"] {
        let answer = stage.adapter.authenticate(&device.conn, id).await;
        answer.refused(ResultCode::ParamsTypeError);
    }
    stage.adapter.authenticate(&device.conn, "fine").await.ok();
    stage.finish().await;
}

/// Neither may a name lead to the topics that are the broker's own, or into a shared
/// subscription.
#[tokio::test]
async fn a_name_with_a_dollar_does_not_begin_a_topic() {
    let stage = Stage::with(&[("MOUNTPOINT", "${clientid}/")]).await;
    let device = stage.device().await;
    for id in ["$SYS", "$share", "$"] {
        let answer = stage.adapter.authenticate(&device.conn, id).await;
        answer.refused(ResultCode::ParamsTypeError);
    }
    stage.adapter.authenticate(&device.conn, "a$b").await.ok();
    stage.finish().await;
}

/// What waits comes as one list, up to `max_batch`; with 1, one at a time.
#[tokio::test]
async fn messages_that_wait_come_in_batches() {
    for (max_batch, expected) in [
        ("100", vec![1, 9]),
        ("4", vec![1, 4, 4, 1]),
        ("1", vec![1; 10]),
    ] {
        let stage = Stage::with(&[("HANDLER__MAX_BATCH", max_batch)]).await;
        let mut peer = Peer::connect(stage.broker.port).await;
        let device = stage.subscriber("c", "t", 0).await;
        // Through the same member, behind them.
        let last = stage.subscriber("last", "t", 0).await;
        let gate = Gate::closed();
        let (held, conn) = (gate.clone(), device.conn.clone());
        stage.handler.behave(move |event| {
            let hold = event.conn == conn && event.call.name() == "messages";
            let held = held.clone();
            async move {
                if hold {
                    held.pass().await;
                }
                Ok(())
            }
        });
        peer.publish("t", 1, "0").await;
        stage.handler.messages(&device.conn, 1).await;
        for number in 1..10 {
            peer.publish("t", 1, number.to_string()).await;
        }
        // Both get a copy at the same time: here are all.
        stage.handler.messages(&last.conn, 10).await;
        if common::OWN {
            // Each got its own. What the broker answers now comes behind them.
            stage.broker.logged_times("Sending PUBLISH to c", 10).await;
            stage.publish(&device, "up", 1, "x").await.ok();
        }
        gate.open();
        let numbers: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        assert_eq!(stage.handler.payloads(&device.conn, 10).await, numbers);
        assert_eq!(batches(&stage, &device.conn), expected);
        stage.finish().await;
    }
}

/// A connection whose handler holds its first message, after `count` more were
/// published.
async fn overflowing(keys: &[(&str, &str)], count: usize) -> (Stage, Device, Peer, Gate) {
    let keys = [&[("BROKER__POOL_SIZE", "1")], keys].concat();
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 1).await;
    let gate = stage.handler.hold("messages");
    peer.publish("t", 1, "0").await;
    stage.handler.messages(&device.conn, 1).await;
    for number in 1..=count {
        peer.publish("t", 1, number.to_string()).await;
    }
    (stage, device, peer, gate)
}

/// Waits until nothing of what came for the connection, so many messages, is unacknowledged at
/// the broker.
async fn let_go(stage: &Stage, count: usize) {
    if common::OWN {
        // Its session has ended, and they with it.
        return stage.broker.logged("Received DISCONNECT from c").await;
    }
    let acks = "Received PUBACK from exproto";
    stage.broker.logged_times(acks, count).await;
}

/// Rule 10, `drop_oldest`: the newest stay, and what went is counted.
#[tokio::test]
async fn a_full_queue_drops_the_oldest() {
    let keys = [("QUEUE__MAX_MESSAGES", "5")];
    let (stage, device, _peer, gate) = overflowing(&keys, 12).await;
    let dropped = "exproto_messages_dropped_total{reason=\"queue_full\"}";
    stage.admin.metric_until(dropped, |n| n > 6.5).await;
    gate.open();
    let expected = ["0", "8", "9", "10", "11", "12"];
    assert_eq!(stage.handler.payloads(&device.conn, 6).await, expected);
    // What was dropped is acknowledged to the broker like the rest.
    let acks = format!("Received PUBACK from {}", link_of("c"));
    stage.broker.logged_times(&acks, 13).await;
    stage.finish().await;
}

/// Rule 10: the queue is bounded in bytes too.
#[tokio::test]
async fn a_queue_is_bounded_in_bytes() {
    let keys = [("QUEUE__MAX_BYTES", "10KiB"), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 1).await;
    let gate = stage.handler.hold("messages");
    peer.publish("t", 1, "0").await;
    stage.handler.messages(&device.conn, 1).await;
    for letter in ["a", "b", "c", "d"] {
        peer.publish("t", 1, letter.repeat(4000)).await;
    }
    let dropped = "exproto_messages_dropped_total{reason=\"queue_full\"}";
    stage.admin.metric_until(dropped, |n| n > 1.5).await;
    gate.open();
    let got = stage.handler.payloads(&device.conn, 3).await;
    assert_eq!(got, ["0".to_owned(), "c".repeat(4000), "d".repeat(4000)]);
    stage.finish().await;
}

/// Rule 10, `policy = "close"`: the connection goes, reason `rate_limited`.
#[tokio::test]
async fn a_full_queue_closes_where_that_is_configured() {
    let keys = [("QUEUE__MAX_MESSAGES", "5"), ("QUEUE__POLICY", "close")];
    let (stage, mut device, _peer, gate) = overflowing(&keys, 6).await;
    assert_eq!(device.read_all().await, b"");
    gate.open();
    assert_eq!(stage.closed(&device).await, "rate_limited");
    let messages = stage.handler.messages(&device.conn, 1).await;
    assert_eq!(messages.len(), 1);
    // Nothing stays unacknowledged at the broker.
    let_go(&stage, 7).await;
    stage.finish().await;
}

/// Rule 9: a message of QoS 1 is acknowledged to the broker only when the handler
/// took it, and so is one of QoS 2.
#[tokio::test]
async fn the_broker_is_told_when_the_handler_took_it() {
    for (qos, ack) in [(1, "PUBACK"), (2, "PUBREC")] {
        let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
        // Of the pool's member, not of the link that fetches retained messages.
        let node = stage.plan.config().node_name.to_string();
        let ack = &match common::OWN {
            true => format!("Received {ack} from slow"),
            false => format!("Received {ack} from exproto-{node}-0"),
        };
        let mut peer = Peer::connect(stage.broker.port).await;
        let slow = stage.subscriber("slow", "t", 2).await;
        let quick = stage.subscriber("quick", "t", 2).await;
        let gate = Gate::closed();
        let (held, conn) = (gate.clone(), slow.conn.clone());
        stage.handler.behave(move |event| {
            let hold = event.conn == conn && event.call.name() == "messages";
            let held = held.clone();
            async move {
                if hold {
                    held.pass().await;
                }
                Ok(())
            }
        });
        peer.publish("t", qos, "x").await;
        stage.handler.messages(&slow.conn, 1).await;
        stage.handler.messages(&quick.conn, 1).await;
        // A publish of the gateway's is read by the broker after any false answer.
        stage.publish(&slow, "y", 1, "y").await.ok();
        assert_eq!(stage.broker.counted(ack).await, 0, "acknowledged too early");
        gate.open();
        stage.broker.logged(ack).await;
        assert_eq!(stage.handler.messages(&quick.conn, 1).await.len(), 1);
        stage.finish().await;
    }
}

/// Rule 9: a connection that ends lets go of its messages.
#[tokio::test]
async fn the_broker_is_told_when_the_connection_ended() {
    let keys = [("HANDLER__REQUEST_TIMEOUT", "1s")];
    let (stage, mut device, _peer, gate) = overflowing(&keys, 5).await;
    device.closed().await;
    let_go(&stage, 6).await;
    assert_eq!(stage.closed(&device).await, "handler_error");
    gate.open();
}

/// Rule 9: one connection whose handler does not answer, and the largest backlog it
/// can have with the default bounds, does not stall the pool for the others.
#[tokio::test]
async fn one_slow_connection_does_not_stall_the_pool() {
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("HANDLER__REQUEST_TIMEOUT", "60s"),
    ];
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let slow = stage.subscriber("slow", "slow", 1).await;
    let quick = stage.subscriber("quick", "quick", 1).await;
    let (first, second) = (Gate::closed(), Gate::closed());
    let (conn, gates) = (slow.conn.clone(), (first.clone(), second.clone()));
    stage.handler.behave(move |event| {
        let slow = event.conn == conn;
        let (first, second) = gates.clone();
        async move {
            match event.call {
                Call::Messages(messages) if slow && messages.len() == 1 => first.pass().await,
                Call::Messages(_) if slow => second.pass().await,
                _ => {}
            }
            Ok(())
        }
    });
    peer.publish("slow", 1, "0").await;
    stage.handler.messages(&slow.conn, 1).await;
    for number in 1..=500 {
        peer.publish("slow", 1, number.to_string()).await;
    }
    // Behind all of them.
    peer.publish("quick", 1, "a").await;
    stage.handler.messages(&quick.conn, 1).await;
    first.open();
    // A hundred are in the callback that hangs now, the rest waits.
    stage.handler.messages(&slow.conn, 101).await;
    for number in 501..=1500 {
        peer.publish("slow", 1, number.to_string()).await;
    }
    peer.publish("quick", 1, "b").await;
    let got = stage.handler.payloads(&quick.conn, 2);
    let got = tokio::time::timeout(Duration::from_secs(10), got).await;
    assert_eq!(got.expect("the pool is stalled"), ["a", "b"]);
    second.open();
    stage.finish().await;
}

/// Rule 10: more than the broker takes is an error to the caller and not a lost link.
#[tokio::test]
async fn a_message_too_large_for_the_broker_is_refused() {
    if common::V4 {
        return; // a 3.1.1 broker does not say what it takes
    }
    let broker = Broker::with("allow_anonymous true\nmax_packet_size 2000\n").await;
    let stage = Stage::around(broker, &[("BROKER__POOL_SIZE", "1")]).await;
    let device = stage.client("c").await;
    let connected = format!(" as {}", link_of("c"));
    let connects = stage.broker.counted(&connected).await;
    for qos in 0..=2 {
        let large = "x".repeat(3000);
        let answer = stage.publish(&device, "t", qos, &large).await;
        let message = answer.refused(ResultCode::Unknown);
        assert!(message.contains("2000"), "{message}");
        stage.publish(&device, "t", qos, "small").await.ok();
    }
    assert_eq!(stage.broker.counted(&connected).await, connects);
    stage.finish().await;
}

/// Rule 10: a message larger than `max_packet_size` is not for the gateway; the link stays.
#[tokio::test]
async fn a_message_too_large_for_the_gateway_breaks_nothing() {
    let keys = [
        ("BROKER__MAX_PACKET_SIZE", "10KiB"),
        ("BROKER__POOL_SIZE", "1"),
    ];
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 1).await;
    let connected = format!(" as {}", link_of("c"));
    let connects = stage.broker.counted(&connected).await;
    peer.publish("t", 1, "x".repeat(20_000)).await;
    peer.publish("t", 1, "small").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["small"]);
    let after = stage.broker.counted(&connected).await;
    assert_eq!(after, connects, "the link was lost");
    stage.finish().await;
}

/// A large message fits into a callback with the defaults.
#[tokio::test]
async fn large_messages_reach_the_handler() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 1).await;
    let large = pattern(900_000);
    for count in 1..=5 {
        // One at a time: more than one does not fit into the queue.
        peer.publish("t", 1, large.clone()).await;
        let messages = stage.handler.messages(&device.conn, count).await;
        assert_same(&messages[count - 1].payload, &large);
    }
    stage.finish().await;
}

/// A QoS that the broker does not have is an error to the caller; a subscription at
/// it is made at what there is.
#[tokio::test]
async fn a_qos_beyond_the_brokers_is_refused() {
    let broker = Broker::with("allow_anonymous true\nmax_qos 1\n").await;
    let stage = Stage::around(broker, &[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "t", 2).await;
    let answer = stage.publish(&device, "t", 2, "x").await;
    answer.refused(ResultCode::Unknown);
    peer.publish("t", 1, "y").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["y"]);
    stage.finish().await;
}

/// Two listeners' handlers, one filter: everybody's messages go to their own handler.
#[tokio::test]
async fn messages_go_to_the_handler_of_the_connection() {
    let meters = Handler::start().await;
    let keys = [
        ("HANDLERS__METERS__ADDRESS", meters.url()),
        ("HANDLERS__METERS__MAX_BATCH", "1".to_owned()),
        ("LISTENERS__TCP__METERS__BIND", "127.0.0.1:0".to_owned()),
        ("LISTENERS__TCP__METERS__HANDLER", "meters".to_owned()),
    ];
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let stage = Stage::with(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let ours = stage.subscriber("ours", "t", 1).await;
    let meter = Device::dial(stage.gateway.addresses().listeners["tcp.meters"]).await;
    let conn = meters.created(meter.port()).await;
    stage.adapter.authenticate(&conn, "meter").await.ok();
    stage.adapter.subscribe(&conn, "t", 1).await.ok();
    peer.publish("t", 1, "x").await;
    assert_eq!(stage.handler.payloads(&ours.conn, 1).await, ["x"]);
    assert_eq!(meters.payloads(&conn, 1).await, ["x"]);
    drop(meter);
    assert_eq!(meters.closed(&conn).await, "normal");
    stage.finish().await;
}
