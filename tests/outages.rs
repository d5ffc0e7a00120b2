//! What happens while the broker or the handler is away, and when they come back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{
    Admin, Answer, Broker, Call, Device, Handler, Log, Peer, Plan, Proxy, Stage, free_port, within,
};
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::ResultCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::Status;

const ANONYMOUS: &str = "allow_anonymous true\n";

/// A publish in the background.
fn publishing(stage: &Stage, device: &Device, qos: u32, payload: &str) -> JoinHandle<Answer> {
    let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
    let payload = payload.to_owned();
    tokio::spawn(async move { adapter.publish(&conn, "up", qos, payload).await })
}

/// Waits until the connections to the broker over which devices publish are down.
async fn down(stage: &Stage) {
    stage.admin.ready_until(503, "- broker link").await;
    if common::OWN {
        let up = "exproto_broker_sessions_up";
        stage.admin.metric_until(up, |up| up < 0.5).await;
    }
}

/// Waits until they are up.
async fn up(stage: &Stage) {
    stage.admin.ready_until(200, "ready").await;
    if common::OWN {
        let all = stage.admin.metric("exproto_broker_sessions").await;
        let up = "exproto_broker_sessions_up";
        stage.admin.metric_until(up, |up| up > all - 0.5).await;
    }
}

/// A client whose broker is not there: not yet, or, where that had to be asked who it is, not
/// any more.
async fn without_broker(keys: &[(&str, &str)]) -> (Stage, Device) {
    if !common::OWN {
        let stage = Stage::assemble(Broker::absent(ANONYMOUS), Handler::start().await, keys).await;
        let device = stage.client("c").await;
        return (stage, device);
    }
    let mut stage = Stage::with(keys).await;
    let device = stage.client("c").await;
    stage.broker.kill();
    down(&stage).await;
    (stage, device)
}

/// The key that bounds what waits for the broker.
fn outbox(of: &str) -> String {
    let session = if common::OWN { "SESSION_" } else { "" };
    format!("BROKER__{session}OUTBOX_MAX_{of}")
}

/// How the names begin that the broker has for the connections over which clients publish,
/// where theirs begin with `c`.
const LINKS: &str = if common::OWN { "c" } else { "exproto" };

async fn answer(call: JoinHandle<Answer>) -> Answer {
    within("the answer", call).await.unwrap()
}

/// How often each payload came, until `last` came.
async fn tally(peer: &mut Peer, last: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    loop {
        let (_, _, payload) = peer.next_text().await;
        let done = payload == last;
        *counts.entry(payload).or_default() += 1;
        if done {
            return counts;
        }
    }
}

/// Rules 8 and 12: a broker that is missing at start is waited for; devices are served
/// meanwhile, and what they publish and subscribe waits for it.
#[tokio::test]
async fn a_broker_missing_at_start_is_waited_for() {
    if common::OWN {
        return; // who a device is cannot be asked then
    }
    let broker = Broker::absent(ANONYMOUS);
    let handler = Handler::start().await;
    let mut stage = Stage::assemble(broker, handler, &[]).await;
    let text = stage.admin.ready_until(503, "+ handler default").await;
    assert!(text.starts_with("not ready\n"), "{text}");
    assert!(text.contains("- broker link 0: "), "{text}");
    assert!(text.contains("refused"), "{text}");
    assert_eq!(stage.admin.get("/healthz").await.status, 200);

    let mut device = stage.client("early").await;
    device.send("served").await;
    stage.handler.bytes(&device.conn, 6).await;
    let publishes = [0, 1, 2].map(|qos| publishing(&stage, &device, qos, "waits"));
    let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
    let subscribe = tokio::spawn(async move { adapter.subscribe(&conn, "down", 1).await });
    let outbox = "exproto_broker_outbox_messages";
    stage.admin.metric_until(outbox, |n| n > 2.5).await;
    assert!(!subscribe.is_finished());
    stage.broker.up().await;
    for publish in publishes {
        answer(publish).await.ok();
    }
    answer(subscribe).await.ok();
    let text = stage.admin.ready_until(200, "broker link 1: ").await;
    assert!(
        text.starts_with("ready\n") && !text.contains("\n- "),
        "{text}"
    );
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("down", 1, "works").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["works"]);
    assert!(stage.admin.metric(outbox).await < 0.5);
    stage.finish().await;
}

/// A handler that is missing at start is waited for: connections are held and their
/// callbacks come in order when it appears.
#[tokio::test]
async fn a_handler_missing_at_start_is_waited_for() {
    let mut stage = Stage::assemble(Broker::start().await, Handler::absent(), &[]).await;
    // Before its address is looked up it has none.
    let away = format!("- handler default: {}", stage.handler.url());
    stage.admin.ready_until(503, &away).await;
    stage
        .admin
        .ready_until(503, "+ broker link 0: connected")
        .await;
    let mut device = Device::dial(stage.devices()).await;
    device.send("early").await;
    stage.handler.up().await;
    stage
        .admin
        .ready_until(200, "+ handler default: connected")
        .await;
    device.conn = stage.handler.created(device.port()).await;
    assert_eq!(stage.handler.bytes(&device.conn, 5).await, b"early");
    assert_eq!(stage.handler.names(&device.conn), ["created", "bytes"]);
    stage.finish().await;
}

/// A handler that is killed and comes back: connections are held, and what happened
/// meanwhile arrives in order. The callback that was cut off comes again.
#[tokio::test]
async fn a_restarted_handler_finds_its_connections() {
    let mut stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut device = stage.subscriber("held", "down", 1).await;
    let mut quiet = stage.device().await;
    let gate = stage.handler.hold("bytes");
    device.send("cut off").await;
    stage.handler.bytes(&device.conn, 7).await;
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler default: ").await;
    device.send(", then on").await;
    peer.publish("down", 1, "meanwhile").await;
    gate.open();
    stage.handler.up().await;
    stage.admin.ready_until(200, "ready").await;
    let bytes = stage.handler.bytes(&device.conn, 7 + 7 + 9).await;
    assert_eq!(bytes, b"cut offcut off, then on");
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["meanwhile"]);
    quiet.send("here too").await;
    stage.handler.bytes(&quiet.conn, 8).await;
    let retried = "exproto_callbacks_retried_total{handler=\"default\"}";
    assert!(stage.admin.metric(retried).await > 0.5);
    stage.finish().await;
}

/// UNAVAILABLE is tried again with the connection held; nothing is lost or overtaken.
#[tokio::test]
async fn unavailable_is_tried_again_in_order() {
    let stage = Stage::start().await;
    let tries = Arc::new(AtomicUsize::new(0));
    let count = tries.clone();
    stage.handler.behave(move |event| {
        let again = matches!(event.call, Call::Bytes(_) | Call::Created(_))
            && count.fetch_add(1, Ordering::Relaxed) % 3 != 2;
        async move {
            if again {
                return Err(Status::unavailable("later"));
            }
            Ok(())
        }
    });
    let mut device = stage.device().await;
    device.send("one").await;
    let three_tries = |log: &Log| (log.bytes(&device.conn).len() >= 9).then_some(());
    stage.handler.wait("three tries", three_tries).await;
    device.send("two").await;
    let bytes = stage.handler.bytes(&device.conn, 18).await;
    assert_eq!(bytes, b"oneoneonetwotwotwo");
    let conn = device.conn.clone();
    drop(device);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    assert_eq!(tries.load(Ordering::Relaxed), 9);
    stage.finish().await;
}

/// Close works while the handler is away: the device need not wait for it.
#[tokio::test]
async fn a_device_may_leave_while_the_handler_is_away() {
    let mut stage = Stage::start().await;
    let device = stage.device().await;
    let conn = device.conn.clone();
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler").await;
    drop(device);
    stage.handler.up().await;
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    stage.finish().await;
}

/// Rules 8 and 13: a broker that is killed and comes back without its memory:
/// everything is subscribed again, nobody gets anything twice.
#[tokio::test]
async fn subscriptions_survive_a_broker_that_forgot_them() {
    let mut stage =
        Stage::with(&[("BROKER__POOL_SIZE", if common::OWN { "1" } else { "3" })]).await;
    let mut devices = Vec::new();
    for number in 0..12 {
        let (name, filter) = (format!("c{number}"), format!("down/{number}/#"));
        let device = stage.subscriber(&name, &filter, 1).await;
        stage.subscribe(&device, "all", 0).await.ok();
        devices.push(device);
    }
    let group = stage.subscriber("group", "$share/g/all", 1).await;
    let left = stage.subscriber("left", "gone", 1).await;
    stage.adapter.unsubscribe(&left.conn, "gone").await.ok();
    for _ in 0..2 {
        stage.broker.kill();
        down(&stage).await;
        stage.broker.up().await;
        up(&stage).await;
    }
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("gone", 1, "to nobody").await;
    for (number, device) in devices.iter().enumerate() {
        peer.publish(&format!("down/{number}/x"), 1, "one").await;
        stage.handler.messages(&device.conn, 1).await;
    }
    peer.publish("all", 1, "two").await;
    for device in &devices {
        let payloads = stage.handler.payloads(&device.conn, 2).await;
        assert_eq!(payloads, ["one", "two"]);
    }
    assert_eq!(stage.handler.payloads(&group.conn, 1).await, ["two"]);
    assert_eq!(stage.handler.names(&left.conn), ["created"]);
    stage.finish().await;
}

/// Rule 8, on the way down: what a broker had taken for us before it was killed is
/// delivered after its restart, in order.
#[tokio::test]
async fn what_the_broker_saved_comes_after_its_restart() {
    if common::OWN {
        return; // Mosquitto saves no session that began with a clean start
    }
    let broker = Broker::with(Broker::PERSISTENT).await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [("BROKER__URL", url.as_str()), ("BROKER__POOL_SIZE", "1")];
    let mut stage = Stage::around(broker, &keys).await;
    let device = stage.subscriber("c", "down", 1).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    proxy.cut();
    stage.admin.ready_until(503, "- broker link").await;
    for number in 0..50 {
        peer.publish("down", 1, number.to_string()).await;
    }
    stage.broker.save().await;
    stage.broker.kill();
    stage.broker.up().await;
    proxy.mend();
    let expected: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    assert_eq!(stage.handler.payloads(&device.conn, 50).await, expected);
    stage.finish().await;
}

/// Rule 8: the session at the broker outlives a break of the link: messages published
/// meanwhile arrive.
#[tokio::test]
async fn a_persistent_session_brings_what_came_meanwhile() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let stage = Stage::around(broker, &[("BROKER__URL", url.as_str())]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("c", "down", 1).await;
    proxy.cut();
    down(&stage).await;
    for number in 0..50 {
        peer.publish("down", 1, number.to_string()).await;
    }
    proxy.mend();
    up(&stage).await;
    let expected: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    assert_eq!(stage.handler.payloads(&device.conn, 50).await, expected);
    stage.finish().await;
}

/// A stage whose broker keeps the session of the gateway over a restart. Mosquitto
/// 2.0.11 saves no session that began with a clean start, so the link breaks once.
async fn with_kept_session() -> (Stage, Proxy) {
    let broker = Broker::with(Broker::PERSISTENT).await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [("BROKER__URL", url.as_str()), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::around(broker, &keys).await;
    proxy.cut();
    down(&stage).await;
    proxy.mend();
    up(&stage).await;
    (stage, proxy)
}

/// Kills the broker and starts it again, with the session of the gateway as saved.
async fn restart_with_session(stage: &mut Stage) {
    stage.broker.kill();
    down(stage).await;
    stage.broker.up().await;
    up(stage).await;
    stage.broker.caught_up().await;
    let log = stage.broker.lines();
    let present = |line: &String| line.contains("CONNACK to exproto") && line.ends_with("(1, 0)");
    assert!(log.iter().any(present), "no session was kept: {log:#?}");
}

/// A broker that is killed and comes back with its sessions: subscriptions work, and
/// nothing comes twice.
#[tokio::test]
async fn subscriptions_survive_a_broker_that_kept_them() {
    let (mut stage, _proxy) = with_kept_session().await;
    let device = stage.subscriber("c", "down/#", 1).await;
    stage.broker.save().await;
    restart_with_session(&mut stage).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("down/1", 1, "one").await;
    peer.publish("down/2", 1, "two").await;
    let payloads = stage.handler.payloads(&device.conn, 2).await;
    assert_eq!(payloads, ["one", "two"]);
    stage.finish().await;
}

/// Rule 13: a broker that comes back with sessions from before the last subscriptions,
/// as Mosquitto does that saves every half hour, has them again all the same.
#[tokio::test]
async fn subscriptions_survive_a_broker_that_kept_an_old_session() {
    let (mut stage, _proxy) = with_kept_session().await;
    let device = stage.subscriber("c", "old", 1).await;
    stage.broker.save().await;
    stage.subscribe(&device, "recent", 1).await.ok();
    restart_with_session(&mut stage).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("recent", 1, "for the recent").await;
    peer.publish("old", 1, "for the old").await;
    let payloads = stage.handler.payloads(&device.conn, 1).await;
    assert_eq!(
        payloads[0], "for the recent",
        "the subscription is forgotten"
    );
    stage.finish().await;
}

/// A retained message does not come again because the link broke.
#[tokio::test]
async fn retained_messages_do_not_come_again_after_an_outage() {
    let mut stage = Stage::with(&[("BROKER__POOL_SIZE", "1")]).await;
    let device = stage.subscriber("c", "state", 1).await;
    if common::V4 {
        // What is retained has been fetched; else it would be, and rightly, later.
        stage.broker.logged("Sending UNSUBACK to exproto").await;
    }
    stage.broker.kill();
    down(&stage).await;
    // The new broker has a retained message before the gateway is back: it comes to
    // the peer first, whose connection opens the way.
    stage.broker.up().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.retain("state", "first").await;
    up(&stage).await;
    stage.broker.kill();
    down(&stage).await;
    stage.broker.up().await;
    up(&stage).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("state", 1, "live").await;
    let what = "the live message";
    let payloads = stage.handler.wait(what, |log| {
        let all = log.messages(&device.conn);
        let all: Vec<String> = all
            .iter()
            .map(|m| String::from_utf8(m.payload.to_vec()).unwrap())
            .collect();
        all.contains(&"live".to_owned()).then_some(all)
    });
    let payloads = payloads.await;
    // The first came once at most: as a live message, had the gateway been back.
    let firsts = payloads.iter().filter(|p| *p == "first").count();
    assert!(
        firsts <= 1 && payloads.last().unwrap() == "live",
        "{payloads:?}"
    );
    stage.finish().await;
}

/// Rule 8: the link breaks after the broker took a publish and before its answer
/// came. The publish is sent again and confirmed; at QoS 2 it arrives once.
#[tokio::test]
async fn a_publish_whose_answer_was_lost_is_sent_again() {
    for qos in [1, 2] {
        let broker = Broker::start().await;
        let proxy = Proxy::to(broker.port).await;
        let url = proxy.url();
        let keys = [("BROKER__URL", url.as_str()), ("BROKER__POOL_SIZE", "1")];
        let stage = Stage::around(broker, &keys).await;
        let mut peer = Peer::connect(stage.broker.port).await;
        peer.subscribe("#").await;
        let device = stage.client("c").await;
        proxy.hold();
        let publish = publishing(&stage, &device, qos, "once more");
        let taken = if qos == 1 {
            format!("Sending PUBACK to {LINKS}")
        } else {
            format!("Sending PUBREC to {LINKS}")
        };
        stage.broker.logged(&taken).await;
        proxy.cut();
        down(&stage).await;
        assert!(!publish.is_finished(), "nobody can know yet");
        proxy.mend();
        answer(publish).await.ok();
        stage.broker.logged("(d1, ").await;
        stage.publish(&device, "up", 2, "last").await.ok();
        let counts = tally(&mut peer, "last").await;
        let expected = if qos == 1 { 2 } else { 1 };
        assert_eq!(counts["once more"], expected);
        stage.finish().await;
    }
}

/// Rules 6 and 8: publishes in order over several breaks of the link: at QoS 1 none that was
/// confirmed is missing, at QoS 2 each is there once, in order.
#[tokio::test]
async fn breaks_of_the_link_lose_nothing_that_was_confirmed() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let stage = Stage::around(broker, &[("BROKER__URL", url.as_str())]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.client("c").await;
    let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
    let publisher = tokio::spawn(async move {
        for number in 0..300 {
            let qos = if number % 2 == 0 { 2 } else { 1 };
            adapter
                .publish(&conn, "up", qos, number.to_string())
                .await
                .ok();
        }
    });
    for mark in ["'up'", "'up'", "'up'"] {
        let seen = stage.broker.count(mark);
        stage.broker.logged_times(mark, seen + 30).await;
        proxy.cut();
        proxy.mend();
    }
    within("all publishes", publisher).await.unwrap();
    stage.publish(&device, "up", 2, "last").await.ok();
    let counts = tally(&mut peer, "last").await;
    for number in 0..300 {
        let count = counts.get(&number.to_string()).copied().unwrap_or(0);
        match number % 2 {
            0 => assert_eq!(count, 1, "QoS 2: {number}"),
            _ => assert!(count >= 1, "QoS 1: {number} is missing"),
        }
    }
    stage.finish().await;
}

/// Rule 8: a broker that is killed under load and comes back: each publish that got SUCCESS
/// reached it, before or after.
#[tokio::test]
async fn a_killed_broker_makes_no_false_success() {
    let keys = [("BROKER__PUBLISH_TIMEOUT", "20s")];
    let mut stage = Stage::with(&keys).await;
    let mut publishers = Vec::new();
    for who in 0..4 {
        let device = stage.client(&format!("c{who}")).await;
        let adapter = stage.adapter.clone();
        publishers.push(tokio::spawn(async move {
            let mut answers = Vec::new();
            for number in 0..40 {
                let topic = format!("up/{who}/{number}");
                let answer = adapter.publish(&device.conn, &topic, 1, "x").await;
                answers.push((topic, answer));
            }
            (device, answers)
        }));
    }
    let publish = &format!("Received PUBLISH from {LINKS}");
    stage.broker.logged_times(publish, 40).await;
    stage.broker.kill();
    down(&stage).await;
    let first_life = stage.broker.lines();
    stage.broker.up().await;
    let mut answers = Vec::new();
    let mut devices = Vec::new();
    for publisher in publishers {
        let (device, some) = within("the publishers", publisher).await.unwrap();
        devices.push(device);
        answers.extend(some);
    }
    stage.broker.caught_up().await;
    let lives = [first_life, stage.broker.lines()].concat();
    let received: Vec<&String> = lives.iter().filter(|line| line.contains(publish)).collect();
    assert_eq!(answers.len(), 160);
    for (topic, answer) in answers {
        // The broker was back in time for all.
        answer.ok();
        let quoted = format!("'{topic}'");
        let taken = received.iter().any(|line| line.contains(&quoted));
        assert!(taken, "SUCCESS, but the broker never got {topic}");
    }
    stage.finish().await;
}

/// Rule 8, `publish_timeout`: UNKNOWN with a reason, and the message is withdrawn: it is not
/// published later.
#[tokio::test]
async fn a_publish_that_waited_too_long_is_unknown_and_withdrawn() {
    let keys = [("BROKER__PUBLISH_TIMEOUT", "400ms")];
    let (mut stage, device) = without_broker(&keys).await;
    let begun = Instant::now();
    for qos in [0, 1, 2] {
        let answer = stage.publish(&device, "up", qos, "too late").await;
        let message = answer.refused(ResultCode::Unknown);
        assert!(
            message.contains("400ms") && message.contains("no broker"),
            "{message}"
        );
    }
    assert!(begun.elapsed() >= Duration::from_millis(1200));
    let timeouts = "exproto_broker_publish_timeouts_total";
    assert!((stage.admin.metric(timeouts).await - 3.0).abs() < 0.5);
    let answer = stage.subscribe(&device, "down", 1).await;
    answer.refused(ResultCode::Unknown);
    stage.broker.up().await;
    up(&stage).await;
    stage.publish(&device, "up", 1, "in time").await.ok();
    assert_eq!(
        stage
            .broker
            .counted(&format!("Received PUBLISH from {LINKS}"))
            .await,
        1
    );
    stage.finish().await;
}

/// A subscription whose caller gave up while the broker was away is not made when it
/// comes: nobody would unsubscribe it.
#[tokio::test]
async fn a_subscription_that_was_given_up_is_not_made_later() {
    let keys = [
        ("BROKER__PUBLISH_TIMEOUT", "200ms"),
        ("BROKER__POOL_SIZE", "1"),
    ];
    let (mut stage, device) = without_broker(&keys).await;
    let answer = stage.subscribe(&device, "given-up", 1).await;
    answer.refused(ResultCode::Unknown);
    stage.broker.up().await;
    up(&stage).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    // Its own subscription goes through the same queue, behind the one given up.
    stage.subscribe(&device, "wanted", 1).await.ok();
    peer.publish("given-up", 1, "to nobody").await;
    peer.publish("wanted", 1, "x").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["x"]);
    let unclaimed = stage.admin.metric("exproto_broker_unclaimed_total").await;
    assert!(unclaimed < 0.5, "the broker still has the subscription");
    stage.finish().await;
}

/// Rule 10: a full outbox: UNKNOWN with a reason at once; what waits is published when
/// the broker comes, and then there is room again.
#[tokio::test]
async fn a_full_outbox_refuses_at_once() {
    for bound in [(&*outbox("MESSAGES"), "3"), (&*outbox("BYTES"), "3300")] {
        let keys = [
            bound,
            ("BROKER__POOL_SIZE", "1"),
            ("BROKER__PUBLISH_TIMEOUT", "25s"),
        ];
        let (mut stage, device) = without_broker(&keys).await;
        let payload = "x".repeat(900);
        let waiting: Vec<_> = (0..3)
            .map(|_| publishing(&stage, &device, 1, &payload))
            .collect();
        let waits = "exproto_broker_outbox_messages";
        stage.admin.metric_until(waits, |n| n > 2.5).await;
        let answer = stage.publish(&device, "up", 1, &payload).await;
        let message = answer.refused(ResultCode::Unknown);
        assert!(message.contains("outbox is full"), "{message}");
        assert!(stage.admin.metric("exproto_broker_outbox_full_total").await > 0.5);
        stage.broker.up().await;
        for publish in waiting {
            answer_ok(publish).await;
        }
        stage.publish(&device, "up", 1, &payload).await.ok();
        assert!(stage.admin.metric(waits).await < 0.5);
        stage.finish().await;
    }
}

/// What was sent and is not acknowledged counts to the outbox's bytes: a broker that
/// takes and does not answer does not fill the memory.
#[tokio::test]
async fn what_is_in_flight_counts_to_the_outbox() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [
        ("BROKER__URL", url.as_str()),
        (&outbox("BYTES"), "3300"),
        ("BROKER__POOL_SIZE", "1"),
    ];
    let stage = Stage::around(broker, &keys).await;
    let device = stage.client("c").await;
    let payload = "x".repeat(900);
    proxy.hold();
    let sent = "exproto_broker_published_total";
    let waiting: Vec<_> = (0..3)
        .map(|_| publishing(&stage, &device, 1, &payload))
        .collect();
    stage.admin.metric_until(sent, |n| n > 2.5).await;
    let waiting_to_be_sent = stage.admin.metric("exproto_broker_outbox_messages").await;
    assert!(waiting_to_be_sent < 0.5);
    let answer = stage.publish(&device, "up", 1, &payload).await;
    let message = answer.refused(ResultCode::Unknown);
    assert!(message.contains("outbox is full"), "{message}");
    proxy.release();
    for publish in waiting {
        answer_ok(publish).await;
    }
    stage.publish(&device, "up", 1, &payload).await.ok();
    stage.finish().await;
}

async fn answer_ok(call: JoinHandle<Answer>) {
    answer(call).await.ok();
}

/// Room that was taken by publishes whose callers gave up is used again, and the
/// gauge of what waits comes back to nothing.
#[tokio::test]
async fn abandoned_publishes_make_room() {
    let keys = [
        (&*outbox("MESSAGES"), "2"),
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__PUBLISH_TIMEOUT", "300ms"),
    ];
    let (mut stage, device) = without_broker(&keys).await;
    for _ in 0..6 {
        let answer = stage.publish(&device, "up", 1, "x").await;
        let message = answer.refused(ResultCode::Unknown);
        assert!(message.contains("300ms"), "no room was made: {message}");
    }
    stage.broker.up().await;
    up(&stage).await;
    stage.publish(&device, "up", 1, "y").await.ok();
    let outbox = stage.admin.metric("exproto_broker_outbox_messages").await;
    assert!(outbox.abs() < 0.5, "the gauge says {outbox}, nothing waits");
    stage.finish().await;
}

/// A broker that refuses the login is said so by `/readyz`; the right one works.
#[tokio::test]
async fn a_refused_login_is_told() {
    let mut broker = Broker::absent("allow_anonymous false\npassword_file {dir}/passwords\n");
    let file = broker.dir.path().join("passwords");
    let made = std::process::Command::new("mosquitto_passwd")
        .args(["-b", "-c"])
        .arg(&file)
        .args(["gateway", "right"])
        .status();
    assert!(made.unwrap().success());
    broker.up().await;
    let handler = Handler::start().await;
    let plan = Plan::new(&broker.url(), &handler.url()).set("BROKER__USERNAME", "gateway");
    let wrong = plan.clone().set("BROKER__PASSWORD", "wrong");
    let gateway = Gateway::start(&wrong.config()).await.unwrap();
    let admin = Admin(gateway.addresses().admin.unwrap());
    let text = admin
        .ready_until(503, "refused the connection: not authorized")
        .await;
    assert!(!text.contains("wrong"), "{text}");
    within("the drain", gateway.drain()).await;
    let right = plan.set("BROKER__PASSWORD", "right");
    let gateway = Gateway::start(&right.config()).await.unwrap();
    within("the gateway to be ready", gateway.ready()).await;
    within("the drain", gateway.drain()).await;
}

/// Something that answers no MQTT is no broker: said so, and tried again.
#[tokio::test]
async fn a_broker_that_answers_garbage_is_told() {
    for garbage in [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"\x20\x02\x00\x05",
        b"\x20\xff\xff\xff\xff\x01",
        b"\x30\x05\x00\x01t",
        b"",
    ] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let mut accepted = 0;
            while accepted < 4 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.write_all(garbage).await;
                let _ = stream.shutdown().await;
                accepted += 1;
            }
            listener
        });
        let handler = Handler::start().await;
        let plan = Plan::new(&format!("mqtt://127.0.0.1:{port}"), &handler.url());
        let gateway = Gateway::start(&plan.config()).await.unwrap();
        let admin = Admin(gateway.addresses().admin.unwrap());
        // Two members, two attempts each.
        let listener = within("several attempts", server).await.unwrap();
        admin.ready_until(503, "- broker link 0: no broker: ").await;
        drop(listener);
        within("the drain", gateway.drain()).await;
    }
}

/// A broker that accepts and says nothing is given up after `connect_timeout`.
#[tokio::test]
async fn a_silent_broker_is_told() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let handler = Handler::start().await;
    let plan = Plan::new(&format!("mqtt://127.0.0.1:{port}"), &handler.url())
        .set("BROKER__CONNECT_TIMEOUT", "200ms");
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    let admin = Admin(gateway.addresses().admin.unwrap());
    admin.ready_until(503, "no CONNACK within 200ms").await;
    within("the drain", gateway.drain()).await;
}

/// A broker that gave the session to another client of the same id says so, and
/// `/readyz` says what that means. (Mosquitto 2.0.11 only hangs up, EMQX says it.)
#[tokio::test]
async fn a_session_that_was_taken_over_is_told() {
    if common::V4 {
        return; // a 3.1.1 broker just hangs up
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // CONNACK: welcome. DISCONNECT: session taken over (MQTT 5, 0x8E).
            let answer = b"\x20\x03\x00\x00\x00\xe0\x02\x8e\x00";
            let _ = stream.write_all(answer).await;
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
    });
    let handler = Handler::start().await;
    let plan = Plan::new(&format!("mqtt://127.0.0.1:{port}"), &handler.url());
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    let admin = Admin(gateway.addresses().admin.unwrap());
    let text = admin.ready_until(503, "another client connected as").await;
    assert!(
        text.contains("node_name") && text.contains("client_id_prefix"),
        "{text}"
    );
    server.abort();
    within("the drain", gateway.drain()).await;
}

/// A drain with the broker away ends in time and says what was left.
#[tokio::test]
async fn a_drain_without_a_broker_ends_in_time() {
    let keys = [("SHUTDOWN_TIMEOUT", "500ms")];
    let (stage, mut device) = without_broker(&keys).await;
    let publish = publishing(&stage, &device, 1, "left behind");
    let outbox = "exproto_broker_outbox_messages";
    stage.admin.metric_until(outbox, |n| n > 0.5).await;
    let begun = Instant::now();
    let drain = tokio::spawn(stage.gateway.drain());
    assert_eq!(device.read_all().await, b"");
    assert_eq!(stage.handler.closed(&device.conn).await, "shutdown");
    let drained = within("the drain", drain).await.unwrap();
    assert_eq!((drained.connections, drained.publishes), (0, 1));
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    // Its caller was told no lie.
    if let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(5), publish).await {
        answer.refused(ResultCode::Unknown);
    }
}

/// A drain with the handler away ends without waiting for it.
#[tokio::test]
async fn a_drain_without_a_handler_ends_in_time() {
    let mut stage = Stage::start().await;
    let mut device = stage.device().await;
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler").await;
    device.send("never taken").await;
    let begun = Instant::now();
    let drain = tokio::spawn(stage.gateway.drain());
    device.closed().await;
    let drained = within("the drain", drain).await.unwrap();
    assert_eq!(drained.connections, 0);
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
}

/// What a handler was promised is flushed to the broker by a drain.
#[tokio::test]
async fn a_drain_flushes_what_was_promised() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let stage = Stage::around(broker, &[("BROKER__URL", url.as_str())]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.client("c").await;
    proxy.hold();
    let publishes: Vec<_> = (0..20)
        .map(|n| publishing(&stage, &device, 1, &n.to_string()))
        .collect();
    stage
        .broker
        .logged_times(&format!("Sending PUBACK to {LINKS}"), 20)
        .await;
    let Stage { gateway, .. } = stage;
    let drain = tokio::spawn(gateway.drain());
    proxy.release();
    for publish in publishes {
        answer_ok(publish).await;
    }
    let drained = within("the drain", drain).await.unwrap();
    assert_eq!((drained.connections, drained.publishes), (0, 0));
    for _ in 0..20 {
        peer.next().await;
    }
}

/// The port on which nobody listens stays refused: the helper's own check.
#[tokio::test]
async fn a_free_port_is_free() {
    let port = free_port();
    let connected = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await;
    assert!(connected.is_err());
}
