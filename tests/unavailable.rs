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
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
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

/// OnReceivedBytes that a handler took.
const TAKEN: &str =
    r#"exproto_callbacks_total{handler="default",method="OnReceivedBytes",outcome="ok"}"#;

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

/// What a handler does with what it cannot serve.
#[derive(Clone)]
enum Fault {
    /// It says UNAVAILABLE.
    Declines,
    /// Its code panics, and its library resets the call.
    Panics,
    /// All of its channel breaks.
    Cuts(Arc<Proxy>),
}

/// A handler that does so for the bytes of devices that say "bad", as long as it is told to.
fn no_use_for_bad(handler: &Handler, fault: Fault) -> Arc<AtomicBool> {
    let is_faulty = Arc::new(AtomicBool::new(true));
    let asked = is_faulty.clone();
    handler.behave(move |event| {
        let bad = matches!(event.call, Call::Bytes(bytes) if bytes.starts_with(b"bad"));
        let fault = (bad && asked.load(Ordering::Relaxed)).then(|| fault.clone());
        async move {
            match fault {
                None => Ok(()),
                Some(Fault::Declines) => Err(Status::unavailable("not for you")),
                Some(Fault::Panics) => panic!("as the test wants it"),
                Some(Fault::Cuts(proxy)) => {
                    proxy.reset();
                    std::future::pending().await
                }
            }
        }
    });
    is_faulty
}

/// `on_unavailable = "close"`: UNAVAILABLE, or a call that is broken off, closes the device that it
/// is about, and no other.
#[tokio::test]
async fn who_is_declined_is_closed_at_once() {
    // Streams of two messages, so that it is known who shares one.
    let two = [
        ("HANDLER__STREAM_MAX_MESSAGES", "2"),
        ("HANDLER__STREAM_MAX_AGE", "1m"),
        ("HANDLER__REQUEST_TIMEOUT", "10m"),
    ];
    let keys = [&[CLOSE, ("SHARDS", "1")], &two[..]].concat();
    for fault in [Fault::Declines, Fault::Panics] {
        for keys in both_ways(&keys) {
            let stage = stage(Handler::start().await, &keys).await;
            no_use_for_bad(&stage.handler, fault.clone());
            let (mut bad, mut good) = (stage.device().await, stage.device().await);
            let mut other = stage.device().await;
            good.send("good").await;
            bad.send("bad").await;
            assert_eq!(bad.read_all().await, b"");
            assert_eq!(stage.closed(&bad).await, "handler_unavailable");
            good.send(" still").await;
            other.send("too").await;
            let all = stage.handler.bytes(&good.conn, 10).await;
            assert!(all.ends_with(b" still"), "{all:?}");
            stage.handler.bytes(&other.conn, 3).await;
            is(&stage, OPEN, 2).await;
            stage.finish().await;
        }
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
        let (mut quiet, mut busy) = (stage.device().await, stage.device().await);
        for round in 0..3 {
            let gate = stage.handler.hold("bytes");
            busy.send("once").await;
            stage.handler.bytes(&busy.conn, 8 * round + 4).await;
            proxy.reset();
            // What was in flight is sent again.
            stage.handler.bytes(&busy.conn, 8 * round + 8).await;
            gate.open();
            let times = (round + 1) as f64 - 0.5;
            stage.admin.metric_until(TAKEN, |n| n > times).await;
        }
        quiet.send("here").await;
        stage.handler.bytes(&quiet.conn, 4).await;
        is(&stage, OPEN, 2).await;
        assert!(stage.admin.metric(GIVEN_UP).await < 0.5);
        stage.finish().await;
    }
}

/// With streams: a device whose bytes a handler cannot serve waits alone. The others are served,
/// as often as they have something to say, and it is served in order once that works.
#[tokio::test]
async fn who_is_declined_on_a_stream_waits_alone() {
    for name in ["declines", "panics", "cuts"] {
        let handler = Handler::start().await;
        let proxy = Arc::new(Proxy::to(handler.port).await);
        let address = format!("http://127.0.0.1:{}", proxy.port);
        let own = [("SHARDS", "1"), ("HANDLER__ADDRESS", &*address)];
        let stage = stage(handler, &[&STREAMING[..], &own].concat()).await;
        let fault = match name {
            "declines" => Fault::Declines,
            "panics" => Fault::Panics,
            _ => Fault::Cuts(proxy),
        };
        println!("a handler that {name}");
        waits_alone(stage, fault).await;
    }
}

async fn waits_alone(stage: Stage, fault: Fault) {
    let is_faulty = no_use_for_bad(&stage.handler, fault);
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
    is_faulty.store(false, Ordering::Relaxed);
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

/// The same beside traffic that never pauses, with streams that are answered next to the one that
/// fails.
#[tokio::test]
async fn who_is_declined_beside_traffic_waits_alone() {
    let keys = [&STREAMING[..], &[("SHARDS", "1")]].concat();
    let stage = stage(Handler::start().await, &keys).await;
    let is_faulty = Arc::new(AtomicBool::new(true));
    let asked = is_faulty.clone();
    stage.handler.behave(move |event| {
        let bad = matches!(event.call, Call::Bytes(bytes) if bytes == "bad");
        let declined = bad && asked.load(Ordering::Relaxed);
        async move {
            if declined {
                // So that the next stream is open, and full of others, by then.
                tokio::time::sleep(Duration::from_millis(30)).await;
                return Err(Status::unavailable("not for you"));
            }
            Ok(())
        }
    });
    let mut bad = stage.device().await;
    let mut senders = Vec::new();
    let stop = CancellationToken::new();
    for _ in 0..5 {
        let (mut device, stop) = (stage.device().await, stop.clone());
        senders.push(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(2));
            while !stop.is_cancelled() {
                ticks.tick().await;
                device.send("on and on;").await;
            }
            device.send("end").await;
            device
        }));
    }
    bad.send("bad").await;
    // What is tried alone is not on a stream, and waits by itself.
    let times = "exproto_callbacks_retried_total{handler=\"default\"}";
    stage.admin.metric_until(times, |n| n > 1.5).await;
    is(&stage, HELD, 1).await;
    stop.cancel();
    for sender in senders {
        let device = within("a device", sender).await.unwrap();
        let what = format!("the end of {}", device.conn);
        let last = |log: &common::Log| log.bytes(&device.conn).ends_with(b"end");
        let found = |log: &common::Log| last(log).then_some(());
        stage.handler.wait(&what, found).await;
        is(&stage, HELD, 1).await;
    }
    is_faulty.store(false, Ordering::Relaxed);
    is(&stage, HELD, 0).await;
    is(&stage, OPEN, 1).await;
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

/// `on_unavailable = "close"`: something that greets and hangs up, such as a proxy with nobody behind
/// it, is no handler: its devices are closed, and new ones too.
#[tokio::test]
async fn who_greets_and_hangs_up_is_away() {
    let greeter = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", greeter.local_addr().unwrap());
    let accepted = tokio::spawn(async move {
        loop {
            let (mut stream, _) = greeter.accept().await.unwrap();
            // An empty SETTINGS frame.
            let _ = stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
        }
    });
    for keys in both_ways(&[CLOSE, ("HANDLER__HEALTH_CHECK", "false")]) {
        let keys = [&keys[..], &[("HANDLER__ADDRESS", &*address)]].concat();
        let stage = Stage::assemble(Broker::start().await, Handler::absent(), &keys).await;
        let mut device = Device::dial(stage.devices()).await;
        device.send("anybody?").await;
        assert_eq!(device.read_all().await, b"");
        is(&stage, GIVEN_UP, 1).await;
        is(&stage, OPEN, 0).await;
    }
    accepted.abort();
}
