//! `handler.streaming`: bytes and messages over streams that connections share.
//!
//! What remains of the order, what comes twice and when, and that nothing is lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::{
    Broker, Call, Device, Gate, Handler, Log, Notes, Peer, Plan, Process, Proxy, Python, Stage,
    free_port, pattern, within,
};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tonic::Status;

const KEYS: [(&str, &str); 2] = [
    ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
    ("HANDLER__STREAMING", "true"),
];

const RESENT: &str = r#"exproto_handler_stream_resent_total{handler="default"}"#;
const RECEIVED: &str = r#"exproto_received_bytes_total{listener="tcp.default"}"#;
const UNACKNOWLEDGED: &str = r#"exproto_handler_stream_unacknowledged{handler="default"}"#;

/// Streams of one callback that ended so.
fn ended(method: &str, outcome: &str) -> String {
    format!(
        r#"exproto_handler_streams_ended_total{{handler="default",method="{method}",outcome="{outcome}"}}"#
    )
}

async fn stage(keys: &[(&str, &str)]) -> Stage {
    around(Handler::start().await, keys).await
}

async fn around(handler: Handler, keys: &[(&str, &str)]) -> Stage {
    handler.streams(|log| log.shared_streams = true);
    let keys = [&KEYS[..], keys].concat();
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage
}

/// A line that tells its number, always as long.
fn line(number: usize) -> String {
    format!("{number:07}\n")
}

/// The number of a device's lines in each of its callbacks.
fn numbers(log: &Log, conn: &str) -> Vec<Vec<usize>> {
    let bytes = log.of(conn).filter_map(|call| match call {
        Call::Bytes(bytes) => Some(std::str::from_utf8(bytes).unwrap()),
        _ => None,
    });
    let parse = |text: &str| text.lines().map(|line| line.parse().unwrap()).collect();
    bytes.map(parse).collect()
}

/// Each device sends so many lines in the background.
fn send_lines(devices: Vec<Device>, count: usize) -> JoinHandle<Vec<Device>> {
    tokio::spawn(async move {
        let mut devices = devices;
        for number in 0..count {
            for device in &mut devices {
                device.send(line(number)).await;
            }
        }
        devices
    })
}

/// Waits until the handler has had every line of a device; says how many callbacks
/// came again. What came for the first time must have come in order.
async fn all_lines(stage: &Stage, device: &Device, count: usize) -> usize {
    let what = format!("the last line of {}", device.conn);
    let found = |log: &Log| {
        let numbers = numbers(log, &device.conn);
        let last = numbers.iter().flatten().any(|number| *number == count - 1);
        last.then_some(numbers)
    };
    let callbacks = stage.handler.wait(&what, found).await;
    let mut next = 0;
    let mut again = 0;
    for callback in &callbacks {
        again += usize::from(callback[0] < next);
        for number in callback {
            assert!(*number <= next, "{number} before {next}");
            next = next.max(number + 1);
        }
    }
    assert_eq!(next, count);
    again
}

/// Bytes of many devices: each device's in order and once, several on a stream.
#[tokio::test]
async fn each_connections_bytes_come_in_order_and_once() {
    let stage = stage(&[]).await;
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(stage.device().await);
    }
    let devices = within("the devices", send_lines(devices, 200))
        .await
        .unwrap();
    for device in devices {
        assert_eq!(all_lines(&stage, &device, 200).await, 0);
        let conn = device.conn.clone();
        drop(device);
        assert_eq!(stage.handler.closed(&conn).await, "normal");
    }
    let streams = stage.handler.streams(|log| log.streams.clone());
    let of = |name| streams.iter().filter(move |(other, _)| *other == name);
    assert!(of("bytes").any(|(_, count)| *count > 1), "{streams:?}");
    assert!(
        of("created")
            .chain(of("closed"))
            .all(|(_, count)| *count == 1)
    );
    assert!(stage.admin.metric(&ended("OnReceivedBytes", "ok")).await > 0.5);
    assert!(stage.admin.metric(UNACKNOWLEDGED).await < 0.5);
    assert!(stage.admin.metric(RESENT).await < 0.5);
    stage.finish().await;
}

/// More than one stream or one window holds passes whole.
#[tokio::test]
async fn many_bytes_of_one_device_pass_whole() {
    let stage = stage(&[("HANDLER__STREAM_MAX_BYTES", "16KiB")]).await;
    let mut device = stage.device().await;
    let all = pattern(4 * 1024 * 1024);
    device.send(&all).await;
    let bytes = stage.handler.bytes(&device.conn, all.len()).await;
    common::assert_same(&bytes, &all);
    stage.finish().await;
}

/// A device is not read while its bytes wait for a stream, and what comes then is joined: a
/// slow handler gets a few large callbacks, not one for each of a device's writes.
#[tokio::test]
async fn what_comes_while_bytes_wait_for_a_stream_is_joined() {
    let stage = stage(&[("HANDLER__STREAM_MAX_MESSAGES", "1")]).await;
    let gate = stage.handler.hold("bytes");
    let mut device = stage.device().await;
    // The first is on a stream, which it ends; the second waits.
    for number in 0..2 {
        device.send(line(number)).await;
        let read = 8.0 * (number + 1) as f64 - 0.5;
        stage.admin.metric_until(RECEIVED, |n| n > read).await;
    }
    for number in 2..100 {
        device.send(line(number)).await;
    }
    gate.open();
    assert_eq!(all_lines(&stage, &device, 100).await, 0);
    let callbacks = stage.handler.streams(|log| numbers(log, &device.conn));
    // Three, and one more where a device's write came just before the second one's turn.
    assert!((3..6).contains(&callbacks.len()), "{callbacks:?}");
    stage.finish().await;
}

/// OnSocketCreated is answered before the first bytes go out.
#[tokio::test]
async fn created_is_answered_before_bytes_go_out() {
    let stage = stage(&[]).await;
    let gate = stage.handler.hold("created");
    let mut early = Device::dial(stage.devices()).await;
    early.send("early").await;
    early.conn = stage.handler.created(early.port()).await;
    // Another device's whole life passes meanwhile, once it is let in.
    assert_eq!(stage.handler.names(&early.conn), ["created"]);
    gate.open();
    stage.handler.bytes(&early.conn, 5).await;
    assert_eq!(stage.handler.names(&early.conn), ["created", "bytes"]);
    stage.finish().await;
}

/// OnSocketClosed comes when everything before it is answered.
#[tokio::test]
async fn closed_waits_for_everything_before_it() {
    let stage = stage(&[]).await;
    let gate = stage.handler.hold("bytes");
    let mut device = stage.device().await;
    device.send(line(0)).await;
    stage.handler.bytes(&device.conn, 8).await;
    // One more, that may have to wait for a stream; beyond it the device is not read.
    device.send(line(1)).await;
    stage.admin.metric_until(RECEIVED, |n| n > 15.5).await;
    stage.adapter.close(&device.conn).await.ok();
    // The socket is closed; only the handler is not told yet.
    assert!(device.read_all().await.is_empty());
    assert_eq!(stage.handler.names(&device.conn), ["created", "bytes"]);
    gate.open();
    assert_eq!(stage.closed(&device).await, "closed_by_handler");
    assert_eq!(stage.handler.bytes(&device.conn, 16).await.len(), 16);
    // That nothing is at the same time as another is checked here.
    stage.finish().await;
}

/// The timer too.
#[tokio::test]
async fn the_timer_comes_after_all_bytes() {
    let stage = stage(&[]).await;
    let mut device = stage.device().await;
    stage.adapter.start_timer(&device.conn, 1).await.ok();
    device.send("last words").await;
    assert_eq!(stage.closed(&device).await, "keepalive_timeout");
    let names = stage.handler.names(&device.conn);
    assert_eq!(names, ["created", "bytes", "timer", "closed"]);
    stage.finish().await;
}

/// A handler that is killed and restarted under load: nothing is lost, nothing is
/// overtaken, and what comes twice was sent again, which is counted.
#[tokio::test]
async fn a_killed_handler_loses_nothing() {
    let mut stage = stage(&[]).await;
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(stage.device().await);
    }
    let conn = devices[0].conn.clone();
    let sending = send_lines(devices, 600);
    for kill in 1..=3 {
        let seen = |log: &Log| {
            let last = numbers(log, &conn).into_iter().flatten().max();
            last.filter(|last| *last > kill * 100)
        };
        stage.handler.wait("some lines", seen).await;
        stage.handler.kill().await;
        stage.handler.up().await;
    }
    let devices = within("the devices", sending).await.unwrap();
    let mut again = 0;
    for device in &devices {
        again += all_lines(&stage, device, 600).await;
    }
    let resent = stage.admin.metric(RESENT).await;
    assert!(
        again as f64 <= resent + 0.5,
        "{again} came again, {resent} were sent again"
    );
    assert!(
        stage
            .admin
            .metric(&ended("OnReceivedBytes", "broken"))
            .await
            > 0.5
    );
    stage.finish().await;
}

/// The line to the handler is reset under load.
#[tokio::test]
async fn a_reset_line_loses_nothing() {
    let handler = Handler::start().await;
    let proxy = Proxy::to(handler.port).await;
    let url = format!("http://127.0.0.1:{}", proxy.port);
    let stage = around(handler, &[("HANDLER__ADDRESS", &url)]).await;
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(stage.device().await);
    }
    let conn = devices[0].conn.clone();
    let sending = send_lines(devices, 600);
    for reset in 1..=3 {
        let seen = |log: &Log| {
            let last = numbers(log, &conn).into_iter().flatten().max();
            last.filter(|last| *last > reset * 100)
        };
        stage.handler.wait("some lines", seen).await;
        proxy.reset();
    }
    let devices = within("the devices", sending).await.unwrap();
    let mut again = 0;
    for device in &devices {
        again += all_lines(&stage, device, 600).await;
    }
    let resent = stage.admin.metric(RESENT).await;
    assert!(
        again as f64 <= resent + 0.5,
        "{again} came again, {resent} were sent again"
    );
    stage.finish().await;
}

/// A handler that answers UNAVAILABLE gets everything again, in order, later.
#[tokio::test]
async fn unavailable_is_sent_again_in_order() {
    let stage = stage(&[]).await;
    let device = stage.device().await;
    let left = std::sync::atomic::AtomicUsize::new(3);
    stage.handler.behave(move |event| {
        let away = matches!(event.call, Call::Bytes(_))
            && left
                .fetch_update(
                    std::sync::atomic::Ordering::Relaxed,
                    std::sync::atomic::Ordering::Relaxed,
                    |left| left.checked_sub(1),
                )
                .is_ok();
        async move {
            match away {
                true => Err(Status::unavailable("later")),
                false => Ok(()),
            }
        }
    });
    let devices = within("the device", send_lines(vec![device], 50))
        .await
        .unwrap();
    assert!(all_lines(&stage, &devices[0], 50).await > 0);
    assert!(stage.admin.metric(RESENT).await > 0.5);
    stage.finish().await;
}

/// A handler that is away for longer than is borne: its connections are closed, and
/// not before.
#[tokio::test]
async fn an_outage_has_an_end() {
    let mut stage = stage(&[("HANDLER__MAX_OUTAGE", "300ms")]).await;
    let mut device = stage.device().await;
    let quiet = stage.device().await;
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler").await;
    device.send("nobody").await;
    device.closed().await;
    let unavailable = r#"exproto_callbacks_total{handler="default",method="OnReceivedBytes",outcome="unavailable"}"#;
    stage.admin.metric_until(unavailable, |n| n > 0.5).await;
    assert!(stage.admin.metric(UNACKNOWLEDGED).await < 0.5);
    stage.handler.up().await;
    stage.admin.ready_until(200, "ready").await;
    let mut quiet = quiet;
    quiet.send("still here").await;
    stage.handler.bytes(&quiet.conn, 10).await;
    stage.finish().await;
}

/// A status other than UNAVAILABLE closes the connection whose message it is about, and
/// no other that was on the same stream; nothing comes after it.
#[tokio::test]
async fn an_error_closes_only_the_connection_that_it_is_about() {
    let stage = stage(&[("SHARDS", "1")]).await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Bytes(bytes) if bytes.starts_with(b"bad") => Err(Status::invalid_argument("no")),
            _ => Ok(()),
        }
    });
    let mut bad = stage.device().await;
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(stage.device().await);
    }
    let sending = send_lines(devices, 100);
    bad.send("bad").await;
    assert_eq!(stage.closed(&bad).await, "handler_error");
    let devices = within("the devices", sending).await.unwrap();
    for device in &devices {
        all_lines(&stage, device, 100).await;
    }
    let names = stage.handler.names(&bad.conn);
    assert_eq!(names, ["created", "bytes", "bytes", "closed"]);
    assert!(stage.admin.metric(&ended("OnReceivedBytes", "error")).await > 0.5);
    for device in devices {
        let conn = device.conn.clone();
        drop(device);
        assert_eq!(stage.handler.closed(&conn).await, "normal");
    }
    stage.finish().await;
}

/// A handler that answers before the end of a stream: what it has not read comes
/// again, and from then on it gets streams of one message.
#[tokio::test]
async fn an_answer_before_the_end_loses_nothing() {
    // Streams are not over by themselves before the answer comes.
    let keys = [("SHARDS", "1"), ("HANDLER__STREAM_MAX_AGE", "60s")];
    let stage = stage(&keys).await;
    let mut devices = Vec::new();
    for _ in 0..4 {
        devices.push(stage.device().await);
    }
    stage.handler.streams(|log| log.hasty = true);
    for device in &mut devices {
        device.send(line(0)).await;
    }
    let early = ended("OnReceivedBytes", "early");
    stage.admin.metric_until(&early, |n| n > 0.5).await;
    for device in &devices {
        stage.handler.bytes(&device.conn, 8).await;
    }
    let devices = within("the devices", send_lines(devices, 50)).await;
    for device in &devices.unwrap() {
        all_lines(&stage, device, 50).await;
    }
    stage.finish().await;
}

/// A handler that reads no stream: what it is sent has a bound, the device is pushed
/// back, and its connection is closed in time.
#[tokio::test]
async fn a_handler_that_never_reads_is_given_up() {
    let stage = stage(&[("HANDLER__REQUEST_TIMEOUT", "1s")]).await;
    let mut device = stage.device().await;
    let answered = |log: &Log| (!log.streams.is_empty()).then_some(());
    let what = "the answer to OnSocketCreated";
    stage.handler.wait(what, answered).await;
    let gate = Gate::closed();
    stage.handler.streams(|log| log.deaf = Some(gate.clone()));
    let endless = tokio::spawn(async move {
        let chunk = [0; 16 * 1024];
        while device.stream.write_all(&chunk).await.is_ok() {}
    });
    let failed = r#"exproto_callbacks_total{handler="default",method="OnReceivedBytes",outcome="DEADLINE_EXCEEDED"}"#;
    stage.admin.metric_until(failed, |n| n > 0.5).await;
    within("the end at the device", endless).await.unwrap();
    let received = r#"exproto_received_bytes_total{listener="tcp.default"}"#;
    let received = stage.admin.metric(received).await;
    assert!(
        received < 2.0 * 1024.0 * 1024.0,
        "{received} bytes were read"
    );
    stage.handler.streams(|log| log.deaf = None);
    gate.open();
    // It works again for others.
    let mut device = stage.device().await;
    device.send("hello").await;
    stage.handler.bytes(&device.conn, 5).await;
    within("the drain", stage.gateway.drain()).await;
}

/// A drain: everything that was read is answered before the end.
#[tokio::test]
async fn a_drain_waits_for_every_answer() {
    let stage = stage(&[]).await;
    let gate = stage.handler.hold("bytes");
    let mut devices = Vec::new();
    for _ in 0..10 {
        let mut device = stage.device().await;
        device.send(line(0)).await;
        devices.push(device);
    }
    let received = r#"exproto_received_bytes_total{listener="tcp.default"}"#;
    stage.admin.metric_until(received, |n| n > 79.5).await;
    let Stage {
        gateway, handler, ..
    } = stage;
    let drain = tokio::spawn(gateway.drain());
    gate.open();
    let drained = within("the drain", drain).await.unwrap();
    assert_eq!(drained.connections, 0);
    for device in &devices {
        let names = handler.names(&device.conn);
        assert_eq!(names, ["created", "bytes", "closed"]);
        assert_eq!(handler.closed(&device.conn).await, "shutdown");
    }
    handler.check();
}

/// A message of QoS 1 is acknowledged to the broker when its stream is answered.
#[tokio::test]
async fn a_message_is_acknowledged_when_the_handler_took_it() {
    let stage = stage(&[]).await;
    let device = stage.subscriber("c", "down", 1).await;
    let gate = stage.handler.hold("messages");
    let mut peer = Peer::connect(stage.broker.port).await;
    for number in 0..5 {
        peer.publish("down", 1, number.to_string()).await;
    }
    stage.handler.messages(&device.conn, 1).await;
    stage.broker.caught_up().await;
    let acknowledged = "Received PUBACK from exproto";
    assert_eq!(stage.broker.count(acknowledged), 0);
    gate.open();
    stage.broker.logged_times(acknowledged, 5).await;
    let payloads = stage.handler.payloads(&device.conn, 5).await;
    assert_eq!(payloads, ["0", "1", "2", "3", "4"]);
    stage.finish().await;
}

/// Messages of many connections under load, both ways, with a handler that is killed:
/// each connection's in order.
#[tokio::test]
async fn messages_survive_a_killed_handler() {
    let mut stage = stage(&[]).await;
    let mut devices = Vec::new();
    for number in 0..5 {
        devices.push(stage.subscriber(&format!("c{number}"), "down", 1).await);
    }
    let mut peer = Peer::connect(stage.broker.port).await;
    for number in 0..100 {
        peer.publish("down", 1, number.to_string()).await;
        if number == 50 {
            stage.handler.kill().await;
            stage.handler.up().await;
        }
    }
    for device in &devices {
        let all = |log: &Log| {
            let messages = log.messages(&device.conn);
            let payloads = messages.iter().map(|m| {
                let text = std::str::from_utf8(&m.payload).unwrap();
                text.parse::<usize>().unwrap()
            });
            let payloads: Vec<usize> = payloads.collect();
            payloads.contains(&99).then_some(payloads)
        };
        let payloads = stage.handler.wait("the last message", all).await;
        let distinct: HashSet<usize> = payloads.iter().copied().collect();
        assert_eq!(distinct.len(), 100);
        let mut next = 0;
        for number in payloads {
            assert!(number <= next, "{number} before {next}");
            next = next.max(number + 1);
        }
    }
    stage.finish().await;
}

/// A handler written in Python as EMQX's are, with fewer threads than connections, restarted
/// under load: echoes come to every device in order, none is lost.
#[tokio::test]
async fn a_python_handler_serves_and_is_restarted() {
    let broker = Broker::start().await;
    let (port, adapter) = (free_port(), free_port());
    let plan = Plan::new(&broker.url(), &format!("http://127.0.0.1:{port}"))
        .set("SERVER__BIND", &format!("127.0.0.1:{adapter}"))
        .set_all(&KEYS);
    let gateway = Process::run(&plan);
    let adapter = adapter.to_string();
    let arguments = ["--streams", "--adapter", &adapter];
    let handler = Python::start(port, &arguments).await;
    gateway.printed("is ready").await;
    let address = gateway.address("devices on").await;
    let mut devices = Vec::new();
    for _ in 0..20 {
        let mut device = Device::dial(address).await;
        device.send(line(0)).await;
        assert_eq!(device.read_text(8).await, line(0));
        devices.push(device);
    }
    let sending = {
        let mut devices = devices;
        tokio::spawn(async move {
            for number in 1..200 {
                for device in &mut devices {
                    device.send(line(number)).await;
                }
                if number % 20 == 0 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            devices
        })
    };
    handler.kill().await;
    let handler = Python::start(port, &arguments).await;
    let devices = within("the devices", sending).await.unwrap();
    for mut device in devices {
        let mut next = 1;
        while next < 200 {
            let number: usize = device.read_text(8).await.trim().parse().unwrap();
            assert!(number <= next, "{number} before {next}");
            next = next.max(number + 1);
        }
    }
    gateway.signal("TERM");
    let mut gateway = gateway;
    assert_eq!(gateway.exit().await, Some(0));
    // What the handler saw of the connections: the end of each, after all of its bytes.
    let closed = Notes::of(&handler.kill().await).closed;
    assert_eq!(closed.len(), 20, "{closed:?}");
    let distinct: HashSet<String> = closed.into_iter().map(|(conn, _)| conn).collect();
    assert_eq!(distinct.len(), 20);
}
