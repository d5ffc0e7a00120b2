//! The rules of pub/sub on whatever broker is named, a Mosquitto of its own without a
//! name: `EXPROTO_TEST_BROKER=mqtt://127.0.0.1:1883 cargo test --test brokers`.
//!
//! The broker must be on 127.0.0.1, without TLS, speak MQTT 5 (3.1.1 for the same tests
//! in `brokers_v4.rs`), let everybody in (or `EXPROTO_TEST_LOGIN`, which is
//! `USER:PASSWORD`), and may be in use: topics are new ones in every run.
//! `scripts/brokers.sh` starts some.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Broker, Call, Gate, Peer, Proxy, Stage, node_name};

/// A gateway at the broker, and where the broker is.
struct Scene {
    stage: Stage,
    proxy: Proxy,
    port: u16,
    /// A level that no other test has.
    level: String,
}

fn login() -> Option<(String, String)> {
    let login = std::env::var("EXPROTO_TEST_LOGIN").ok()?;
    let (username, password) = login.split_once(':').expect("USER:PASSWORD");
    Some((username.to_owned(), password.to_owned()))
}

impl Scene {
    async fn start() -> Self {
        Self::with(&[]).await
    }

    async fn with(settings: &[(&str, &str)]) -> Self {
        let named = std::env::var("EXPROTO_TEST_BROKER").ok();
        let broker = match named {
            Some(_) => Broker::absent(""),
            None => Broker::start().await,
        };
        let port = named.map_or(broker.port, |url| {
            let port = url.strip_prefix("mqtt://127.0.0.1:").map(str::parse);
            port.expect("mqtt://127.0.0.1:PORT").unwrap()
        });
        // Breaks the link on any broker.
        let proxy = Proxy::to(port).await;
        let url = proxy.url();
        let mut keys = settings.to_vec();
        keys.push(("BROKER__URL", url.as_str()));
        let login = login();
        if let Some((username, password)) = &login {
            keys.push(("BROKER__USERNAME", username));
            keys.push(("BROKER__PASSWORD", password));
        }
        let stage = Stage::around(broker, &keys).await;
        Self {
            stage,
            proxy,
            port,
            level: node_name("brokers"),
        }
    }

    fn topic(&self, rest: &str) -> String {
        format!("{}/{rest}", self.level)
    }

    async fn peer(&self) -> Peer {
        let login = login();
        let login = login
            .as_ref()
            .map(|(user, word)| (user.as_str(), word.as_str()));
        match common::V4 {
            true => Peer::connect_v4(self.port, login).await,
            false => Peer::connect_as(self.port, login).await,
        }
    }

    /// Asserts that a connection got just these: a message published last to a
    /// filter of its own shows that nothing else is on its way.
    async fn got(&self, device: &common::Device, peer: &mut Peer, expected: &[&str]) {
        let end = self.topic(&format!("end/{}", device.port()));
        self.stage.subscribe(device, &end, 2).await.ok();
        peer.publish(&end, 2, "end").await;
        let handler = &self.stage.handler;
        let payloads = handler.wait("the end", |log| {
            let messages = log.messages(&device.conn).into_iter();
            let payloads = messages.map(|m| String::from_utf8(m.payload.to_vec()).unwrap());
            let mut payloads: Vec<String> = payloads.collect();
            let end = payloads.iter().position(|p| p == "end")?;
            payloads.remove(end);
            // Between topics there is no order.
            payloads.sort();
            (payloads.len() >= expected.len()).then_some(payloads)
        });
        assert_eq!(payloads.await, expected);
    }
}

/// Rule 7: publishes of each QoS are confirmed and arrive, in order.
#[tokio::test]
async fn publishes_are_confirmed() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let up = scene.topic("up");
    peer.subscribe(&up).await;
    let device = scene.stage.client("c").await;
    for number in 0..30_u32 {
        let (qos, payload) = (number % 3, number.to_string());
        scene.stage.publish(&device, &up, qos, &payload).await.ok();
        let (topic, got, text) = peer.next_text().await;
        assert_eq!((topic, u32::from(got), text), (up.clone(), qos, payload));
    }
    scene.stage.finish().await;
}

/// Rule 1: overlapping filters of one connection each give a copy.
#[tokio::test]
async fn overlap_on_one_connection() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let device = scene.stage.client("c").await;
    for filter in ["a/#", "a/+", "a/b"] {
        let filter = scene.topic(filter);
        scene.stage.subscribe(&device, &filter, 1).await.ok();
    }
    peer.publish(&scene.topic("a/b"), 1, "x").await;
    peer.publish(&scene.topic("a/b/c"), 1, "y").await;
    scene.got(&device, &mut peer, &["x", "x", "x", "y"]).await;
    scene.stage.finish().await;
}

/// Rule 1: overlapping filters of two connections each give one copy to theirs.
#[tokio::test]
async fn overlap_on_two_connections() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let one = scene.stage.subscriber("one", &scene.topic("a/#"), 1).await;
    let two = scene.stage.subscriber("two", &scene.topic("a/b"), 1).await;
    let same = scene.stage.subscriber("same", &scene.topic("a/b"), 1).await;
    for payload in ["x", "y"] {
        peer.publish(&scene.topic("a/b"), 1, payload).await;
    }
    for device in [&one, &two, &same] {
        scene.got(device, &mut peer, &["x", "y"]).await;
    }
    scene.stage.finish().await;
}

/// Rule 2: who unsubscribes gets nothing more, the others do.
#[tokio::test]
async fn the_last_to_leave_unsubscribes() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let filter = scene.topic("left");
    let stays = scene.stage.subscriber("stays", &filter, 1).await;
    let leaves = scene.stage.subscriber("leaves", &filter, 1).await;
    let answer = scene.stage.adapter.unsubscribe(&leaves.conn, &filter).await;
    answer.ok();
    peer.publish(&filter, 1, "x").await;
    scene.got(&stays, &mut peer, &["x"]).await;
    scene.got(&leaves, &mut peer, &[]).await;
    scene.stage.finish().await;
}

/// Rule 3: the lower QoS of publish and own subscription, also where another
/// connection asked for more: it is delivered, once.
#[tokio::test]
async fn the_lower_qos() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let filter = scene.topic("qos");
    for own in [2, 0, 1] {
        let name = format!("q{own}");
        let device = scene.stage.subscriber(&name, &filter, own).await;
        for qos in [0, 1, 2] {
            peer.publish(&filter, qos, qos.to_string()).await;
        }
        let messages = scene.stage.handler.messages(&device.conn, 3).await;
        let mut got: Vec<_> = messages
            .iter()
            .map(|m| (m.payload.to_vec(), m.qos))
            .collect();
        got.sort();
        let expected: Vec<_> = (0..3_u32)
            .map(|qos| (qos.to_string().into_bytes(), qos.min(own)))
            .collect();
        assert_eq!(got, expected, "subscribed at {own}");
    }
    scene.stage.finish().await;
}

/// Rule 4: retained messages reach each newcomer once, and nobody else.
#[tokio::test]
async fn retained_messages_to_the_newcomer() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let state = scene.topic("state");
    peer.retain(&state, "kept").await;
    let first = scene.stage.subscriber("first", &state, 1).await;
    scene.got(&first, &mut peer, &["kept"]).await;
    let second = scene.stage.subscriber("second", &state, 1).await;
    scene.got(&second, &mut peer, &["kept"]).await;
    peer.publish(&state, 1, "live").await;
    for device in [&first, &second] {
        let mut payloads = scene.stage.handler.payloads(&device.conn, 3).await;
        // Between topics there is no order.
        payloads.sort();
        assert_eq!(payloads, ["end", "kept", "live"]);
    }
    peer.retain(&state, "").await;
    scene.stage.finish().await;
}

/// Rule 5: a shared subscription gives each message to one member, to all in turn.
#[tokio::test]
async fn shared_subscriptions() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let work = scene.topic("work");
    let filter = format!("$share/group/{work}");
    let one = scene.stage.subscriber("one", &filter, 1).await;
    let two = scene.stage.subscriber("two", &filter, 1).await;
    for number in 0..10 {
        peer.publish(&work, 1, number.to_string()).await;
    }
    let handler = &scene.stage.handler;
    let mut all = handler.payloads(&one.conn, 5).await;
    all.extend(handler.payloads(&two.conn, 5).await);
    all.sort();
    assert_eq!(all.concat(), "0123456789");
    scene.stage.finish().await;
}

/// Rule 11: the publisher's client id and the time travel along.
#[tokio::test]
async fn the_publisher_is_known() {
    if common::V4 {
        return; // no message of 3.1.1 can carry it
    }
    let scene = Scene::start().await;
    let topic = scene.topic("from");
    let reader = scene.stage.subscriber("reader", &topic, 1).await;
    let writer = scene.stage.client("the writer").await;
    scene.stage.publish(&writer, &topic, 1, "x").await.ok();
    let messages = scene.stage.handler.messages(&reader.conn, 1).await;
    assert_eq!(messages[0].from, "the writer");
    assert!(messages[0].timestamp > 1_700_000_000_000);
    scene.stage.finish().await;
}

/// Rule 8: after a broken link the session is as it was: what was published meanwhile
/// arrives, what waited is confirmed.
#[tokio::test]
async fn a_broken_link_is_mended() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let (down, up) = (scene.topic("down"), scene.topic("up"));
    peer.subscribe(&up).await;
    let device = scene.stage.subscriber("c", &down, 1).await;
    scene.proxy.cut();
    scene.stage.admin.ready_until(503, "- broker link").await;
    for number in 0..10 {
        peer.publish(&down, 1, number.to_string()).await;
    }
    let (adapter, conn) = (scene.stage.adapter.clone(), device.conn.clone());
    let publish = tokio::spawn(async move { adapter.publish(&conn, &up, 1, "waits").await });
    let outbox = "exproto_broker_outbox_messages";
    scene.stage.admin.metric_until(outbox, |n| n > 0.5).await;
    scene.proxy.mend();
    common::within("the answer", publish).await.unwrap().ok();
    assert_eq!(peer.next_text().await.2, "waits");
    let mut payloads = scene.stage.handler.payloads(&device.conn, 10).await;
    payloads.sort();
    assert_eq!(payloads.concat(), "0123456789");
    scene.stage.finish().await;
}

/// Rule 6: messages of one topic keep their order, also those that waited in the
/// session for a link.
#[tokio::test]
async fn what_waited_comes_in_order() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let down = scene.topic("down");
    let device = scene.stage.subscriber("c", &down, 1).await;
    scene.proxy.cut();
    scene.stage.admin.ready_until(503, "- broker link").await;
    for number in 0..10 {
        peer.publish(&down, 1, number.to_string()).await;
    }
    scene.proxy.mend();
    let payloads = scene.stage.handler.payloads(&device.conn, 10).await;
    assert_eq!(payloads.concat(), "0123456789");
    scene.stage.finish().await;
}

/// Large messages both ways.
#[tokio::test]
async fn large_messages() {
    let scene = Scene::start().await;
    let mut peer = scene.peer().await;
    let (down, up) = (scene.topic("down"), scene.topic("up"));
    peer.subscribe(&up).await;
    let device = scene.stage.subscriber("c", &down, 1).await;
    let large = "x".repeat(200_000);
    scene.stage.publish(&device, &up, 1, &large).await.ok();
    assert_eq!(peer.next_text().await.2, large);
    peer.publish(&down, 1, large.clone()).await;
    assert_eq!(scene.stage.handler.payloads(&device.conn, 1).await, [large]);
    scene.stage.finish().await;
}

/// Rule 9: a handler that does not answer for one connection stops nobody else's messages,
/// however few the broker lets be unacknowledged, and gets its own when it is there again.
#[tokio::test]
async fn a_slow_handler_stalls_nobody_else() {
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("HANDLER__REQUEST_TIMEOUT", "60s"),
    ];
    let scene = Scene::with(&keys).await;
    let mut peer = scene.peer().await;
    let (slow_topic, quick_topic) = (scene.topic("slow"), scene.topic("quick"));
    let slow = scene.stage.subscriber("s", &slow_topic, 1).await;
    let quick = scene.stage.subscriber("q", &quick_topic, 1).await;
    let (gate, conn) = (Gate::closed(), slow.conn.clone());
    let held = gate.clone();
    scene.stage.handler.behave(move |event| {
        let (held, slow) = (held.clone(), event.conn == conn);
        async move {
            if slow && matches!(event.call, Call::Messages(_)) {
                held.pass().await;
            }
            Ok(())
        }
    });
    for number in 0..200 {
        peer.publish(&slow_topic, 1, number.to_string()).await;
    }
    peer.publish(&quick_topic, 1, "passes").await;
    let passed = scene.stage.handler.payloads(&quick.conn, 1).await;
    assert_eq!(passed, ["passes"]);
    gate.open();
    let all: Vec<String> = (0..200).map(|number| number.to_string()).collect();
    assert_eq!(scene.stage.handler.payloads(&slow.conn, 200).await, all);
    scene.stage.finish().await;
}
