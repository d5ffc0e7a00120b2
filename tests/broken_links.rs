//! Links to the broker that break in the ways of real networks, with a fault proxy
//! between the gateway and a Mosquitto: nothing that was confirmed is lost, what comes
//! twice is what MQTT sends twice, and the order of each connection stays.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use common::{Answer, Broker, Device, Peer, Proxy, Stage, within};
use exproto_sidecar::proto::ResultCode;
use tokio::task::JoinHandle;

const ANONYMOUS: &str = "allow_anonymous true\n";

/// A stage whose gateway reaches the broker through a proxy.
async fn proxied(broker: Broker, keys: &[(&str, &str)]) -> (Stage, Proxy) {
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [keys, &[("BROKER__URL", url.as_str())]].concat();
    (Stage::around(broker, &keys).await, proxy)
}

fn publishing(stage: &Stage, device: &Device, qos: u32, payload: String) -> JoinHandle<Answer> {
    let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
    tokio::spawn(async move { adapter.publish(&conn, "up", qos, payload).await })
}

async fn answer(call: JoinHandle<Answer>) -> Answer {
    within("the answer", call).await.unwrap()
}

/// What arrived of numbered payloads `WHO/NUMBER`.
#[derive(Default)]
struct Arrivals {
    /// By sender, in the order of arrival.
    numbers: HashMap<String, Vec<usize>>,
}

impl Arrivals {
    fn of(payloads: impl IntoIterator<Item = String>) -> Self {
        let mut arrivals = Self::default();
        for payload in payloads {
            let (who, number) = payload.split_once('/').unwrap();
            let numbers = arrivals.numbers.entry(who.to_owned()).or_default();
            numbers.push(number.parse().unwrap());
        }
        arrivals
    }

    /// Asserts that `count` of each sender are there, each for the first time in
    /// order, and gives the number of those that came again.
    #[track_caller]
    fn complete(&self, senders: usize, count: usize) -> usize {
        let mut repeated = 0;
        assert_eq!(self.numbers.len(), senders);
        for (who, numbers) in &self.numbers {
            let mut next = 0;
            for number in numbers {
                assert!(*number <= next, "{who}: {number} came before {next}");
                if *number == next {
                    next += 1;
                } else {
                    repeated += 1;
                }
            }
            assert_eq!(next, count, "{who}: the last are missing");
        }
        repeated
    }
}

/// How many lines of the broker's log have both.
fn both(broker: &Broker, one: &str, other: &str) -> usize {
    let lines = broker.lines();
    let found = lines
        .iter()
        .filter(|l| l.contains(one) && l.contains(other));
    found.count()
}

/// Rules 6 and 8: resets in the middle of confirmed publishes lose none; at QoS 1
/// only what was sent again as a duplicate comes twice, at QoS 2 nothing does.
#[tokio::test]
async fn resets_under_publishes() {
    for qos in [1, 2] {
        let (stage, proxy) = proxied(Broker::start().await, &[]).await;
        let mut peer = Peer::connect(stage.broker.port).await;
        peer.subscribe("up").await;
        // So that some are always on their way.
        proxy.delay(Duration::from_millis(2));
        let mut publishers = Vec::new();
        for who in 0..4 {
            let device = stage.client(&format!("c{who}")).await;
            let adapter = stage.adapter.clone();
            publishers.push(tokio::spawn(async move {
                for number in 0..100 {
                    let payload = format!("{who}/{number}");
                    let answer = adapter.publish(&device.conn, "up", qos, payload).await;
                    answer.ok();
                }
                device
            }));
        }
        for _ in 0..5 {
            let seen = stage.broker.count("Received PUBLISH from exproto");
            let more = stage
                .broker
                .logged_times("Received PUBLISH from exproto", seen + 40);
            more.await;
            proxy.reset();
        }
        let mut devices = Vec::new();
        for publisher in publishers {
            devices.push(within("the publishers", publisher).await.unwrap());
        }
        peer.publish("up", 2, "last").await;
        let mut payloads = Vec::new();
        loop {
            match peer.next_text().await.2 {
                last if last == "last" => break,
                payload => payloads.push(payload),
            }
        }
        let repeated = Arrivals::of(payloads).complete(4, 100);
        let marked = both(&stage.broker, "Received PUBLISH from exproto", "(d1, ");
        assert!(marked > 0, "no reset hit a publish");
        match qos {
            1 => assert!(repeated <= marked, "{repeated} twice, {marked} marked"),
            _ => assert_eq!(repeated, 0),
        }
        stage.finish().await;
    }
}

/// The same on the way down: what the broker confirmed to its publisher reaches the
/// handler, in order; twice only what the broker marked as sent again.
#[tokio::test]
async fn resets_under_deliveries() {
    for qos in [1, 2] {
        let (stage, proxy) = proxied(Broker::start().await, &[]).await;
        let device = stage.subscriber("c", "down", qos).await;
        proxy.delay(Duration::from_millis(2));
        let mut peer = Peer::connect(stage.broker.port).await;
        let publisher = tokio::spawn(async move {
            for number in 0..300 {
                let qos = if qos == 1 { 1 } else { 2 };
                peer.publish("down", qos, format!("p/{number}")).await;
            }
            peer
        });
        for part in 1..5 {
            stage.handler.messages(&device.conn, part * 50).await;
            proxy.reset();
        }
        let mut peer = within("the publisher", publisher).await.unwrap();
        peer.publish("down", 1, "p/300").await;
        let what = "the last message";
        let payloads = stage.handler.wait(what, |log| {
            let messages = log.messages(&device.conn).into_iter();
            let texts = messages.map(|m| String::from_utf8(m.payload.to_vec()).unwrap());
            let payloads: Vec<String> = texts.collect();
            (payloads.last()? == "p/300").then_some(payloads)
        });
        let repeated = Arrivals::of(payloads.await).complete(1, 301);
        let marked = both(&stage.broker, "Sending PUBLISH to exproto", "(d1, ");
        assert!(repeated <= marked, "{repeated} twice, {marked} marked");
        if qos == 2 {
            assert_eq!(repeated, 0);
        }
        stage.finish().await;
    }
}

/// A half-open link: open, and nothing comes through. The ping finds it, a silent
/// newcomer is given up, and what waited is confirmed when the network is back.
#[tokio::test]
async fn a_half_open_link_is_noticed() {
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__KEEP_ALIVE", "5s"),
        ("BROKER__CONNECT_TIMEOUT", "500ms"),
        ("BROKER__PUBLISH_TIMEOUT", "25s"),
    ];
    let (stage, proxy) = proxied(Broker::start().await, &keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.subscriber("c", "down", 1).await;
    proxy.blackhole();
    let begun = Instant::now();
    let publishes = [1, 2].map(|qos| publishing(&stage, &device, qos, "swallowed".into()));
    stage
        .admin
        .ready_until(503, "answered no ping for 5s")
        .await;
    let noticed = begun.elapsed();
    assert!(noticed < Duration::from_secs(13), "after {noticed:?}");
    stage
        .admin
        .ready_until(503, "no CONNACK within 500ms")
        .await;
    peer.publish("down", 1, "meanwhile").await;
    assert!(publishes.iter().all(|publish| !publish.is_finished()));
    proxy.mend();
    for publish in publishes {
        answer(publish).await.ok();
        assert_eq!(peer.next_text().await.2, "swallowed");
    }
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["meanwhile"]);
    stage.finish().await;
}

/// Writing is no sign of life of the other side: a broker that hangs while its
/// buffers still take our bytes is noticed too.
#[tokio::test]
async fn a_silent_broker_is_noticed_under_traffic() {
    let keys = [("BROKER__POOL_SIZE", "1"), ("BROKER__KEEP_ALIVE", "5s")];
    let (stage, proxy) = proxied(Broker::start().await, &keys).await;
    let device = stage.client("c").await;
    proxy.blackhole();
    let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
    let traffic = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            adapter.publish(&conn, "up", 0, "x").await;
        }
    });
    stage
        .admin
        .ready_until(503, "answered no ping for 5s")
        .await;
    traffic.abort();
    proxy.mend();
    stage.admin.ready_until(200, "ready").await;
    stage.publish(&device, "up", 1, "works").await.ok();
    stage.finish().await;
}

/// Rule 10: the outbox is bounded behind a link that swallows too: refused at once when it is
/// full, UNKNOWN at the deadline. What was never sent is withdrawn, what was sent goes
/// its way.
#[tokio::test]
async fn bounds_hold_behind_a_half_open_link() {
    const WINDOW: usize = 20;
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__KEEP_ALIVE", "5s"),
        ("BROKER__CONNECT_TIMEOUT", "500ms"),
        ("BROKER__PUBLISH_TIMEOUT", "1500ms"),
        ("BROKER__OUTBOX_MAX_MESSAGES", "3"),
    ];
    let extra = format!("{ANONYMOUS}max_inflight_messages {WINDOW}\n");
    let (stage, proxy) = proxied(Broker::with(&extra).await, &keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.client("c").await;
    proxy.blackhole();
    let mut publishes = Vec::new();
    // Not more at once than the outbox holds: it empties into the window.
    let published = "exproto_broker_published_total";
    for number in 0..WINDOW {
        publishes.push(publishing(&stage, &device, 1, format!("sent/{number}")));
        let sent = number as f64 + 0.5;
        stage.admin.metric_until(published, |n| n > sent).await;
    }
    for number in 0..3 {
        publishes.push(publishing(&stage, &device, 1, format!("waits/{number}")));
    }
    let outbox = "exproto_broker_outbox_messages";
    stage.admin.metric_until(outbox, |n| n > 2.5).await;
    let refused = stage.publish(&device, "up", 1, "one too many").await;
    let message = refused.refused(ResultCode::Unknown);
    assert!(message.contains("outbox is full"), "{message}");
    for publish in publishes {
        let message = answer(publish).await.refused(ResultCode::Unknown);
        assert!(message.contains("within 1.5s"), "{message}");
    }
    stage.admin.ready_until(503, "- broker link 0: ").await;
    proxy.mend();
    stage.admin.ready_until(200, "ready").await;
    stage.publish(&device, "up", 1, "sent/20").await.ok();
    let mut payloads = Vec::new();
    while payloads.len() <= WINDOW {
        payloads.push(peer.next_text().await.2);
    }
    assert_eq!(Arrivals::of(payloads).complete(1, WINDOW + 1), 0);
    stage.finish().await;
}

/// Rule 12: a broker that is there and refuses for a while: said so, tried again, and
/// all is as before when it takes us again, though it has forgotten everything.
#[tokio::test]
async fn a_broker_that_refuses_for_a_while() {
    let keys = [("BROKER__PUBLISH_TIMEOUT", "25s")];
    let mut stage = Stage::around(Broker::start().await, &keys).await;
    let device = stage.subscriber("c", "down", 1).await;
    stage.broker.kill();
    stage.broker.configure("allow_anonymous false\n");
    stage.broker.up().await;
    let refused = "refused the connection: not authorized";
    stage.admin.ready_until(503, refused).await;
    let publishes = [0, 1, 2].map(|qos| publishing(&stage, &device, qos, qos.to_string()));
    stage.broker.kill();
    stage.broker.configure(ANONYMOUS);
    stage.broker.up().await;
    for publish in publishes {
        answer(publish).await.ok();
    }
    stage.admin.ready_until(200, "ready").await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("down", 1, "works").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["works"]);
    stage.finish().await;
}

/// A slow link is no broken link: a large message takes its time, those behind it
/// follow, and the connection stays.
#[tokio::test]
async fn a_slow_link_stays() {
    let keys = [
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__KEEP_ALIVE", "5s"),
        ("BROKER__PUBLISH_TIMEOUT", "25s"),
    ];
    let (stage, proxy) = proxied(Broker::start().await, &keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let device = stage.subscriber("c", "down", 1).await;
    let before = proxy.connections();
    proxy.slow(40_000);
    let large = "x".repeat(240_000);
    let begun = Instant::now();
    let first = publishing(&stage, &device, 1, large.clone());
    let published = "exproto_broker_published_total";
    stage.admin.metric_until(published, |n| n > 0.5).await;
    let second = publishing(&stage, &device, 1, "small".to_owned());
    answer(first).await.ok();
    assert!(begun.elapsed() > Duration::from_secs(5), "not slow");
    answer(second).await.ok();
    assert_eq!(peer.next_text().await.2, large);
    assert_eq!(peer.next_text().await.2, "small");
    peer.publish("down", 1, large.clone()).await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, [large]);
    assert_eq!(proxy.connections(), before);
    stage.finish().await;
}

/// Rule 13: a thousand filters are subscribed again at a broker that forgot them, or
/// may have; each gets its message once.
#[tokio::test]
async fn a_thousand_filters_survive() {
    const FILTERS: usize = 1000;
    let (mut stage, proxy) = proxied(Broker::start().await, &[]).await;
    let mut devices = Vec::new();
    for who in 0..10 {
        let device = stage.client(&format!("c{who}")).await;
        for number in (who..FILTERS).step_by(10) {
            let filter = format!("down/{number}/+");
            stage.subscribe(&device, &filter, 1).await.ok();
        }
        devices.push(device);
    }
    for round in 1..=2 {
        let dialled = proxy.connections();
        if round == 1 {
            proxy.reset();
        } else {
            stage.broker.kill();
            stage.broker.up().await;
        }
        proxy.dialled(dialled + 2).await;
        stage.admin.ready_until(200, "ready").await;
        let subscribes = stage.broker.count("Received SUBSCRIBE from exproto");
        match round {
            // Another client might have had the session in between: said again.
            1 => assert_eq!(subscribes, 2 * FILTERS, "the session was there"),
            _ => assert_eq!(subscribes, FILTERS, "the session was lost"),
        }
        let mut peer = Peer::connect(stage.broker.port).await;
        for number in 0..FILTERS {
            let topic = format!("down/{number}/x");
            peer.publish(&topic, 1, number.to_string()).await;
        }
        for (who, device) in devices.iter().enumerate() {
            let count = round * FILTERS / 10;
            let payloads = stage.handler.payloads(&device.conn, count).await;
            let mine = (who..FILTERS).step_by(10).map(|n| n.to_string());
            let mut latest = payloads[count - FILTERS / 10..].to_vec();
            latest.sort_by_key(|text| text.parse::<usize>().unwrap());
            assert!(latest.into_iter().eq(mine), "round {round}, device {who}");
        }
    }
    stage.finish().await;
}
