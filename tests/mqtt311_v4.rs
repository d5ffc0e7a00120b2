//! What MQTT 3.1.1 towards the broker needs of its own: overlapping filters without
//! identifiers, retained messages fetched, sessions wiped.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;

use common::{Admin, Broker, Device, Handler, Peer, Plan, Stage, within};
use exproto_sidecar::broker::topic::TopicFilter;
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::{Message, ResultCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn payload(message: &Message) -> String {
    String::from_utf8(message.payload.to_vec()).unwrap()
}

/// Who subscribed to what, in this order: wide before narrow and after, shared groups
/// across, the same filter by several.
const SUBSCRIPTIONS: &[(usize, &str)] = &[
    (0, "a/b"),
    (1, "a/+"),
    (0, "a/#"),
    (2, "a/b"),
    (2, "a/c"),
    (1, "#"),
    (3, "+/b"),
    (3, "a/b/#"),
    (4, "$share/g/a/b"),
    (4, "$share/h/a/+"),
    (2, "$share/g/a/b"),
    (0, "x/y"),
    (3, "x/+"),
];

const TOPICS: &[&str] = &["a/b", "a/c", "a", "a/b/c", "x/y", "z/b", "q"];

/// Rule 1: one copy for each matching subscription, on one connection to the broker
/// and on several, whatever the order in which filters come and go; and rule 5.
#[tokio::test]
async fn overlapping_filters_each_bring_one_copy() {
    for pool in ["1", "4"] {
        let stage = Stage::with(&[("BROKER__POOL_SIZE", pool)]).await;
        let mut peer = Peer::connect(stage.broker.port).await;
        let mut devices = Vec::new();
        for number in 0..5 {
            devices.push(stage.client(&format!("c{number}")).await);
        }
        let conns: Vec<String> = devices.iter().map(|d| d.conn.clone()).collect();
        let all_of = async |total: usize| {
            let what = format!("{total} messages with a pool of {pool}");
            let found = |log: &common::Log| {
                let all: Vec<_> = conns.iter().map(|conn| log.messages(conn)).collect();
                (all.iter().map(Vec::len).sum::<usize>() >= total).then_some(all)
            };
            stage.handler.wait(&what, found).await
        };
        let mut subscribed: Vec<(usize, &str)> = Vec::new();
        let mut expected: HashMap<(usize, &str), usize> = HashMap::new();
        let mut shared = 0;
        for step in 0..2 * SUBSCRIPTIONS.len() {
            match SUBSCRIPTIONS.get(step) {
                Some((device, filter)) => {
                    stage.subscribe(&devices[*device], filter, 1).await.ok();
                    subscribed.push((*device, filter));
                }
                // The oldest go first, so that what they held stays for others.
                None => {
                    let (device, filter) = subscribed.remove(0);
                    let conn = &devices[device].conn;
                    stage.adapter.unsubscribe(conn, filter).await.ok();
                }
            }
            for topic in TOPICS {
                peer.publish(topic, 1, step.to_string()).await;
                let mut groups = HashSet::new();
                for (device, filter) in &subscribed {
                    let parsed = TopicFilter::parse(filter).unwrap();
                    if !parsed.matches(topic) {
                        continue;
                    }
                    if parsed.is_shared() {
                        groups.insert(*filter);
                    } else {
                        *expected.entry((*device, *topic)).or_default() += 1;
                    }
                }
                shared += groups.len();
            }
            // What is on its way when somebody comes or goes may reach him or not.
            all_of(expected.values().sum::<usize>() + shared).await;
        }
        let all = all_of(expected.values().sum::<usize>() + shared).await;
        let mut found: HashMap<(usize, &str), usize> = HashMap::new();
        for (device, messages) in all.iter().enumerate() {
            for message in messages {
                let topic = TOPICS.iter().find(|topic| **topic == message.topic);
                *found.entry((device, topic.unwrap())).or_default() += 1;
            }
        }
        // Which member of a group got a message is the gateway's choice.
        let mut by_groups = 0;
        for device in 0..devices.len() {
            for topic in TOPICS {
                let of = |map: &HashMap<_, usize>| map.get(&(device, *topic)).copied();
                let (got, due) = (of(&found).unwrap_or(0), of(&expected).unwrap_or(0));
                let in_a_group = [2, 4].contains(&device) && topic.starts_with("a/");
                assert!(
                    got == due || (in_a_group && got > due),
                    "device {device}, {topic}: {got} and not {due} with a pool of {pool}"
                );
                by_groups += got - due;
            }
        }
        assert_eq!(by_groups, shared);
        stage.finish().await;
    }
}

/// Rules 2 and 3: what is covered is not asked of the broker again, unless with a
/// higher QoS; each gets the lower of the publish's and its own.
#[tokio::test]
async fn a_covered_filter_raises_the_qos_at_the_broker() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let wide = stage.subscriber("wide", "a/#", 0).await;
    let low = stage.subscriber("low", "a/b", 0).await;
    let high = stage.subscriber("high", "a/+", 2).await;
    peer.publish("a/b", 2, "x").await;
    for (device, qos) in [(&wide, 0), (&low, 0), (&high, 2)] {
        let messages = stage.handler.messages(&device.conn, 1).await;
        assert_eq!(messages[0].qos, qos);
    }
    let node = stage.plan.config().node_name.to_string();
    let member = format!("from exproto-{node}-0");
    let subscribes = format!("Received SUBSCRIBE {member}");
    assert_eq!(stage.broker.count(&subscribes), 2);
    // The wide one stays at the broker as long as somebody relies on it.
    stage.adapter.unsubscribe(&wide.conn, "a/#").await.ok();
    peer.publish("a/b", 1, "y").await;
    assert_eq!(stage.handler.payloads(&low.conn, 2).await, ["x", "y"]);
    drop((low, high));
    let unsubscribes = format!("Received UNSUBSCRIBE {member}");
    stage.broker.logged(&unsubscribes).await;
    assert_eq!(stage.handler.messages(&wide.conn, 1).await.len(), 1);
    stage.finish().await;
}

/// Rule 4: retained messages, more than the broker sends without acknowledgement, come
/// to each newcomer once and to nobody else, also where its filter is covered by
/// another or asked for at the same time.
#[tokio::test]
async fn retained_messages_are_fetched_for_each_newcomer() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    for number in 0..120 {
        peer.retain(&format!("state/{number}"), number.to_string())
            .await;
    }
    let mut expected: Vec<String> = (0..120).map(|n| n.to_string()).collect();
    expected.sort();
    let sorted = |mut payloads: Vec<String>| {
        payloads.sort();
        payloads
    };
    let first = stage.subscriber("first", "state/+", 1).await;
    let got = stage.handler.payloads(&first.conn, 120).await;
    assert_eq!(sorted(got), expected);
    // Covered, identical, overlapping, all at once.
    let second = stage.client("second").await;
    for filter in ["state/+", "state/7", "+/8", "#"] {
        stage.subscribe(&second, filter, 1).await.ok();
    }
    // The members of a group get nothing that is retained.
    stage.subscribe(&second, "$share/g/state/9", 1).await.ok();
    let got = stage.handler.payloads(&second.conn, 242).await;
    let twice = expected.iter().flat_map(|n| [n.clone(), n.clone()]);
    let all = twice.chain(["7".to_owned(), "8".to_owned()]).collect();
    assert_eq!(sorted(got), sorted(all));
    // Subscribing again brings them again, as MQTT 3.1.1 (3.8.4) wants it.
    stage.subscribe(&second, "state/7", 1).await.ok();
    stage.handler.messages(&second.conn, 243).await;
    peer.publish("state/7", 1, "live").await;
    let got = stage.handler.payloads(&second.conn, 246).await;
    assert_eq!(got[242..], ["7", "live", "live", "live"]);
    let got = stage.handler.payloads(&first.conn, 121).await;
    assert_eq!(got[120..], ["live"]);
    stage.finish().await;
}

/// A retained message keeps its QoS, up to the subscription's.
#[tokio::test]
async fn a_retained_message_has_the_lower_qos() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.retain("state", "on").await;
    for (name, asked, expected) in [("a", 0, 0), ("b", 1, 1), ("c", 2, 1)] {
        let device = stage.subscriber(name, "state", asked).await;
        let messages = stage.handler.messages(&device.conn, 1).await;
        assert_eq!(messages[0].qos, expected);
        assert_eq!(payload(&messages[0]), "on");
    }
    stage.finish().await;
}

/// Without user properties nobody knows who published; the time is that of receipt.
#[tokio::test]
async fn a_message_has_no_sender_and_the_time_of_receipt() {
    let stage = Stage::start().await;
    let device = stage.subscriber("c", "t", 1).await;
    let before = exproto_sidecar::broker::now_ms();
    stage.publish(&device, "t", 1, "x").await.ok();
    let messages = stage.handler.messages(&device.conn, 1).await;
    assert_eq!(messages[0].from, "");
    assert!((before..=exproto_sidecar::broker::now_ms()).contains(&messages[0].timestamp));
    stage.finish().await;
}

/// The sessions begin and end with the gateway: what an earlier run left behind is
/// wiped, and nothing stays behind for the broker to keep.
#[tokio::test]
async fn sessions_are_wiped_at_start_and_at_the_end() {
    let broker = Broker::start().await;
    let handler = Handler::start().await;
    let stage = Stage::assemble(broker, handler, &[("BROKER__POOL_SIZE", "1")]).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let node = stage.plan.config().node_name.to_string();
    // p2 is Mosquitto's word for 3.1.1, c1 a clean session, c0 one that is kept.
    let connects = |broker: &Broker, clean: u8| {
        let client = format!("as exproto-{node}-0 (p2, c{clean}, ");
        broker.count(&client)
    };
    assert_eq!(connects(&stage.broker, 1), 1);
    assert_eq!(connects(&stage.broker, 0), 1);
    within("the drain", stage.gateway.drain()).await;
    let client = format!("as exproto-{node}-0 (p2, c1, ");
    stage.broker.logged_times(&client, 2).await;
}

/// What overlaps on every connection that may be opened is refused, and said why.
#[tokio::test]
async fn filters_that_overlap_beyond_all_bounds_are_refused() {
    let stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.client("c").await;
    // Each has its word in another level, so that all of them overlap.
    let filter = |number: usize| {
        let mut levels = vec!["+"; 65];
        levels[number] = "x";
        levels.join("/")
    };
    for number in 0..64 {
        stage.subscribe(&device, &filter(number), 1).await.ok();
    }
    let answer = stage.subscribe(&device, &filter(64), 1).await;
    let message = answer.refused(ResultCode::Unknown);
    assert!(message.contains("64 connections"), "{message}");
    let refused = "exproto_broker_overlaps_refused_total";
    stage.admin.metric_until(refused, |n| n > 0.5).await;
    // The 64 and the one that fetches are all there, and all are needed.
    stage.admin.ready_until(200, "+ broker link 64").await;
    peer.publish(&vec!["x"; 65].join("/"), 1, "all").await;
    assert_eq!(stage.handler.messages(&device.conn, 64).await.len(), 64);
    stage.finish().await;
}

/// Answers every CONNECT with these bytes.
async fn scripted(answer: &'static [u8]) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut connect = [0; 12];
            let _ = stream.read_exact(&mut connect).await;
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        }
    });
    (port, server)
}

/// A broker that cannot do what is asked of it is named, and so is the way out.
#[tokio::test]
async fn a_broker_of_the_other_version_is_told() {
    for (protocol, answer, told) in [
        // CONNACK of 3.1.1: unacceptable protocol version, and a welcome.
        ("5", &b"\x20\x02\x00\x01"[..], "set broker.protocol = 4"),
        ("5", b"\x20\x02\x00\x00", "set broker.protocol = 4"),
        // CONNACK of 5: unsupported protocol version.
        ("5", b"\x20\x03\x00\x84\x00", "set broker.protocol = 4"),
        ("5", b"", "does it speak MQTT 5?"),
        ("4", b"\x20\x02\x00\x01", "set broker.protocol = 5"),
        ("4", b"", "does it speak MQTT 3.1.1?"),
    ] {
        let (port, server) = scripted(answer).await;
        let handler = Handler::start().await;
        let plan = Plan::new(&format!("mqtt://127.0.0.1:{port}"), &handler.url())
            .set("BROKER__PROTOCOL", protocol);
        let gateway = Gateway::start(&plan.config()).await.unwrap();
        let admin = Admin(gateway.addresses().admin.unwrap());
        admin.ready_until(503, told).await;
        server.abort();
        within("the drain", gateway.drain()).await;
    }
}

/// A restart of the broker, without its memory: what covers and what is covered, the
/// further connections too, are all back.
#[tokio::test]
async fn a_broker_that_forgot_gets_all_of_it_again() {
    let mut stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let mut devices: Vec<(Device, &str)> = Vec::new();
    for (number, filter) in ["a/b", "a/#", "a/c", "+/b", "$share/g/a/b"]
        .iter()
        .enumerate()
    {
        let device = stage.subscriber(&format!("c{number}"), filter, 1).await;
        devices.push((device, filter));
    }
    stage.broker.kill();
    stage.admin.ready_until(503, "- broker link").await;
    stage.broker.up().await;
    stage.admin.ready_until(200, "ready").await;
    let mut peer = Peer::connect(stage.broker.port).await;
    for round in 1..=2 {
        peer.publish("a/b", 1, round.to_string()).await;
        peer.publish("a/c", 1, round.to_string()).await;
        for (device, filter) in &devices {
            let each = if *filter == "a/#" { 2 } else { 1 };
            let messages = stage.handler.messages(&device.conn, each * round).await;
            assert_eq!(messages.len(), each * round, "{filter}");
        }
    }
    stage.finish().await;
}

/// A publish upon which the broker hangs up fails after a few times, also where the
/// link has subscriptions to restore each time; the link is there for the others.
#[tokio::test]
async fn a_packet_that_the_broker_hangs_up_upon_fails() {
    let broker = Broker::with("allow_anonymous true\nmax_packet_size 2000\n").await;
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__PUBLISH_TIMEOUT", "20s"),
    ];
    let stage = Stage::around(broker, &keys).await;
    let device = stage.subscriber("c", "t", 1).await;
    let answer = stage.publish(&device, "t", 1, &"x".repeat(3000)).await;
    answer.refused(ResultCode::Unknown);
    stage.publish(&device, "t", 1, "small").await.ok();
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["small"]);
    stage.finish().await;
}
