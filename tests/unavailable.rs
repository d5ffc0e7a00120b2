//! Handlers that are away where nobody waits for them, or are so for one device only, and
//! OnSocketClosed that nobody takes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Broker, Call, Device, Handler, Proxy, Stage, within};
use tonic::Status;

const CLOSE: (&str, &str) = ("HANDLER__ON_UNAVAILABLE", "close");

const STREAMING: [(&str, &str); 2] = [
    ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
    ("HANDLER__STREAMING", "true"),
];

/// Devices that are connected.
const OPEN: &str = r#"exproto_connections{listener="tcp.default"}"#;

/// Devices whose handler was away for too long.
const GIVEN_UP: &str =
    r#"exproto_connections_closed_total{listener="tcp.default",reason="handler_unavailable"}"#;

/// Devices that wait for a handler that is away.
const HELD: &str = r#"exproto_connections_held{handler="default"}"#;

/// OnSocketClosed that no handler took.
const LOST: &str = r#"exproto_closed_callbacks_lost_total{handler="default"}"#;

/// One by one, and over streams.
fn both_ways(keys: &[(&'static str, &'static str)]) -> [Vec<(&'static str, &'static str)>; 2] {
    [keys.to_vec(), [keys, &STREAMING].concat()]
}

async fn stage(handler: Handler, keys: &[(&str, &str)]) -> Stage {
    handler.streams(|log| log.shared_streams = true);
    let stage = Stage::assemble(Broker::start().await, handler, keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage
}

async fn is(stage: &Stage, metric: &str, count: usize) {
    let reached = |n: f64| (n - count as f64).abs() < 0.1;
    stage.admin.metric_until(metric, reached).await;
}

/// A handler that answers UNAVAILABLE for the bytes of devices that say "bad", as long as it is told to.
fn unavailable_for_bad(handler: &Handler) -> Arc<AtomicBool> {
    let unavailable = Arc::new(AtomicBool::new(true));
    let asked = unavailable.clone();
    handler.behave(move |event| {
        let bad = matches!(event.call, Call::Bytes(bytes) if bytes.starts_with(b"bad"));
        let refused = bad && asked.load(Ordering::Relaxed);
        async move {
            match refused {
                true => Err(Status::unavailable("not for you")),
                false => Ok(()),
            }
        }
    });
    unavailable
}

/// `on_unavailable = "close"`: UNAVAILABLE closes the device that it is said of, and no other.
#[tokio::test]
async fn who_is_declined_is_closed_at_once() {
    for keys in both_ways(&[CLOSE, ("SHARDS", "1")]) {
        let stage = stage(Handler::start().await, &keys).await;
        unavailable_for_bad(&stage.handler);
        let (mut bad, mut good) = (stage.device().await, stage.device().await);
        // Perhaps on one stream.
        good.send("good").await;
        bad.send("bad").await;
        assert_eq!(bad.read_all().await, b"");
        assert_eq!(stage.closed(&bad).await, "handler_unavailable");
        good.send(" still").await;
        let all = stage.handler.bytes(&good.conn, 10).await;
        assert!(all.ends_with(b" still"), "{all:?}");
        is(&stage, OPEN, 1).await;
        stage.finish().await;
    }
}

/// `on_unavailable = "close"`: with a handler that is gone end all of its devices, those too that
/// have nothing to say, and those that come meanwhile.
#[tokio::test]
async fn a_handler_that_is_gone_takes_its_devices_along() {
    for keys in both_ways(&[CLOSE]) {
        let mut stage = stage(Handler::start().await, &keys).await;
        let gate = stage.handler.hold("bytes");
        let mut devices = Vec::new();
        for _ in 0..8 {
            devices.push(stage.device().await);
        }
        devices[0].send("in flight").await;
        stage.handler.bytes(&devices[0].conn, 9).await;
        stage.handler.kill().await;
        for device in &mut devices {
            assert_eq!(device.read_all().await, b"");
        }
        is(&stage, GIVEN_UP, 8).await;
        is(&stage, LOST, 8).await;
        let mut newcomer = Device::dial(stage.devices()).await;
        assert_eq!(newcomer.read_all().await, b"");
        gate.open();
        stage.handler.up().await;
        stage.admin.ready_until(200, "ready").await;
        let mut device = stage.device().await;
        device.send("back").await;
        stage.handler.bytes(&device.conn, 4).await;
        stage.finish().await;
    }
}

/// `on_unavailable = "close"`: a channel that ends and can be made anew, as with handlers that let
/// their connections live only so long, ends no device.
#[tokio::test]
async fn a_channel_that_is_renewed_ends_nobody() {
    for keys in both_ways(&[CLOSE, ("SHARDS", "1"), ("HANDLER__HEALTH_CHECK", "false")]) {
        let handler = Handler::start().await;
        let proxy = Proxy::to(handler.port).await;
        let address = format!("http://127.0.0.1:{}", proxy.port);
        let keys = [&keys[..], &[("HANDLER__ADDRESS", &address)]].concat();
        let stage = stage(handler, &keys).await;
        let gate = stage.handler.hold("bytes");
        let (quiet, mut busy) = (stage.device().await, stage.device().await);
        busy.send("once").await;
        stage.handler.bytes(&busy.conn, 4).await;
        for round in 1..4 {
            proxy.reset();
            proxy.dialled(1 + round).await;
            // What was in flight is sent again.
            let count = 4 * (round as usize + 1);
            stage.handler.bytes(&busy.conn, count).await;
        }
        gate.open();
        let mut quiet = quiet;
        quiet.send("here").await;
        stage.handler.bytes(&quiet.conn, 4).await;
        is(&stage, OPEN, 2).await;
        assert!(stage.admin.metric(GIVEN_UP).await < 0.5);
        stage.finish().await;
    }
}

/// With streams: a device that the handler is unavailable for waits alone. The others are served,
/// as often as they have something to say, and it is served in order once that works.
#[tokio::test]
async fn who_is_declined_on_a_stream_waits_alone() {
    let keys = [&STREAMING[..], &[("SHARDS", "1")]].concat();
    let stage = stage(Handler::start().await, &keys).await;
    let unavailable = unavailable_for_bad(&stage.handler);
    let mut bad = stage.device().await;
    let mut others = Vec::new();
    for _ in 0..5 {
        others.push(stage.device().await);
    }
    bad.send("bad 0;").await;
    for round in 0..20 {
        for (number, device) in others.iter_mut().enumerate() {
            device.send(format!("{number}: {round:04};")).await;
        }
        let last = format!("{round:04};");
        for device in &others {
            let what = format!("round {round} of {}", device.conn);
            let has = |log: &common::Log| log.bytes(&device.conn).ends_with(last.as_bytes());
            stage
                .handler
                .wait(&what, |log| has(log).then_some(()))
                .await;
        }
        bad.send(format!("bad {};", round + 1)).await;
    }
    is(&stage, HELD, 1).await;
    is(&stage, OPEN, 6).await;
    unavailable.store(false, Ordering::Relaxed);
    let what = "the last of the one that waited";
    let last = |log: &common::Log| log.bytes(&bad.conn).ends_with(b"bad 20;");
    stage
        .handler
        .wait(what, |log| last(log).then_some(()))
        .await;
    let all = String::from_utf8(stage.handler.bytes(&bad.conn, 1).await).unwrap();
    let mut next = 0;
    for number in all.split_terminator(';') {
        let number: usize = number.strip_prefix("bad ").unwrap().parse().unwrap();
        assert!(number <= next, "{number} before {next}");
        next = next.max(number + 1);
    }
    assert_eq!(next, 21);
    is(&stage, HELD, 0).await;
    stage.finish().await;
}

/// An OnSocketClosed that is not answered within `close_timeout` is counted, and the connection
/// is over.
#[tokio::test]
async fn an_end_that_is_not_answered_is_counted() {
    let keys = [
        ("HANDLER__CLOSE_TIMEOUT", "200ms"),
        ("HANDLER__REQUEST_TIMEOUT", "1m"),
    ];
    for keys in both_ways(&keys) {
        let stage = stage(Handler::start().await, &keys).await;
        let gate = stage.handler.hold("closed");
        let device = stage.device().await;
        let conn = device.conn.clone();
        drop(device);
        assert_eq!(stage.handler.closed(&conn).await, "normal");
        is(&stage, LOST, 1).await;
        is(&stage, OPEN, 0).await;
        gate.open();
        stage.finish().await;
    }
}

/// An OnSocketClosed whose turn does not come (`max_in_flight`), because nothing is answered for
/// `close_timeout`, is counted, and the connection is over.
#[tokio::test]
async fn an_end_whose_turn_does_not_come_is_counted() {
    let keys = [
        ("SHARDS", "1"),
        ("HANDLER__MAX_IN_FLIGHT", "1"),
        ("HANDLER__CLOSE_TIMEOUT", "200ms"),
        ("HANDLER__REQUEST_TIMEOUT", "1m"),
    ];
    let stage = stage(Handler::start().await, &keys).await;
    let gate = stage.handler.hold("bytes");
    let (mut slow, quick) = (stage.device().await, stage.device().await);
    slow.send("hours").await;
    stage.handler.bytes(&slow.conn, 5).await;
    let conn = quick.conn.clone();
    drop(quick);
    is(&stage, LOST, 1).await;
    is(&stage, OPEN, 1).await;
    assert_eq!(stage.handler.names(&conn), ["created"]);
    gate.open();
    slow.send("more").await;
    stage.handler.bytes(&slow.conn, 9).await;
    stage.finish().await;
}

/// While calls are answered an OnSocketClosed waits for its turn for longer than `close_timeout`.
#[tokio::test]
async fn an_end_waits_for_its_turn_while_others_are_answered() {
    let keys = [
        ("SHARDS", "1"),
        ("HANDLER__MAX_IN_FLIGHT", "1"),
        ("HANDLER__CLOSE_TIMEOUT", "2s"),
    ];
    let stage = stage(Handler::start().await, &keys).await;
    let mut devices = Vec::new();
    for _ in 0..40 {
        devices.push(stage.device().await);
    }
    stage.handler.behave(|event| async move {
        if matches!(event.call, Call::Closed(_)) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    });
    let conns: Vec<_> = devices.iter().map(|device| device.conn.clone()).collect();
    drop(devices);
    for conn in &conns {
        assert_eq!(stage.handler.closed(conn).await, "normal");
    }
    is(&stage, OPEN, 0).await;
    assert!(stage.admin.metric(LOST).await < 0.5);
    stage.finish().await;
}
