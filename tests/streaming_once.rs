//! `handler.streaming` with `at_least_once = false`: nothing comes twice, and a connection
//! of which nobody knows what was taken is closed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Broker, Call, Gate, Handler, Proxy, Stage, within};
use tonic::Status;

const RESENT: &str = r#"exproto_handler_stream_resent_total{handler="default"}"#;

async fn stage(handler: Handler, keys: &[(&str, &str)]) -> Stage {
    handler.streams(|log| log.shared_streams = true);
    let own = [
        ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
        ("HANDLER__STREAMING", "true"),
        ("HANDLER__AT_LEAST_ONCE", "false"),
        ("SHARDS", "1"),
    ];
    let keys = [&own[..], keys].concat();
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage
}

/// The handler is killed: what was on a stream is not sent again, read or not, and its
/// connections are closed. What was not on one is sent when it is back.
#[tokio::test]
async fn what_was_on_a_stream_is_not_sent_again() {
    let mut stage = stage(Handler::start().await, &[]).await;
    let mut read = stage.device().await;
    let mut unread = stage.device().await;
    let mut later = stage.device().await;
    let gate = stage.handler.hold("bytes");
    read.send("read").await;
    stage.handler.bytes(&read.conn, 4).await;
    stage.handler.streams(|log| log.deaf = Some(Gate::closed()));
    unread.send("perhaps").await;
    let in_flight = r#"exproto_handler_stream_unacknowledged{handler="default"}"#;
    stage.admin.metric_until(in_flight, |n| n > 1.5).await;
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler default: ").await;
    later.send("not sent").await;
    gate.open();
    stage.handler.streams(|log| log.deaf = None);
    stage.handler.up().await;
    assert_eq!(stage.handler.bytes(&later.conn, 8).await, b"not sent");
    for device in [&read, &unread] {
        assert_eq!(stage.closed(device).await, "handler_unavailable");
    }
    assert_eq!(
        stage.handler.names(&read.conn),
        ["created", "bytes", "closed"]
    );
    assert_eq!(stage.handler.names(&unread.conn), ["created", "closed"]);
    assert!(stage.admin.metric(RESENT).await < 0.5);
    later.send("!").await;
    assert_eq!(stage.handler.bytes(&later.conn, 9).await, b"not sent!");
    stage.finish().await;
}

/// A line that is reset does the same as a handler that is killed.
#[tokio::test]
async fn a_reset_line_sends_nothing_twice() {
    let handler = Handler::start().await;
    let proxy = Proxy::to(handler.port).await;
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let stage = stage(handler, &[("HANDLER__ADDRESS", &address)]).await;
    let mut cut = stage.device().await;
    let mut stays = stage.device().await;
    let gate = stage.handler.hold("bytes");
    cut.send("once").await;
    stage.handler.bytes(&cut.conn, 4).await;
    proxy.reset();
    gate.open();
    assert_eq!(stage.closed(&cut).await, "handler_unavailable");
    stays.send("after").await;
    assert_eq!(stage.handler.bytes(&stays.conn, 5).await, b"after");
    assert_eq!(
        stage.handler.names(&cut.conn),
        ["created", "bytes", "closed"]
    );
    assert!(stage.admin.metric(RESENT).await < 0.5);
    stage.finish().await;
}

/// UNAVAILABLE may come from a handler that has taken it: it is not sent again either.
#[tokio::test]
async fn unavailable_is_not_sent_again() {
    let stage = stage(Handler::start().await, &[]).await;
    let mut device = stage.device().await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Bytes(_) => Err(Status::unavailable("perhaps it was taken")),
            _ => Ok(()),
        }
    });
    device.send("once").await;
    assert_eq!(stage.closed(&device).await, "handler_unavailable");
    assert_eq!(
        stage.handler.names(&device.conn),
        ["created", "bytes", "closed"]
    );
    assert!(stage.admin.metric(RESENT).await < 0.5);
    stage.finish().await;
}

/// An error, and an answer that is late or too early, say nothing of what was taken: all that shared
/// the stream are closed, and what was on no stream goes on.
#[tokio::test]
async fn what_a_stream_leaves_open_is_not_sent_again() {
    for name in ["an error", "late", "early"] {
        let keys = [
            ("HANDLER__STREAM_MAX_MESSAGES", "2"),
            ("HANDLER__STREAM_MAX_AGE", "5s"),
            ("HANDLER__REQUEST_TIMEOUT", "300ms"),
        ];
        let stage = stage(Handler::start().await, &keys).await;
        let mut devices = Vec::new();
        for _ in 0..2 {
            devices.push(stage.device().await);
        }
        let gate = Gate::closed();
        let held = gate.clone();
        stage.handler.behave(move |event| {
            let held = held.clone();
            async move {
                match event.call {
                    Call::Bytes(bytes) if bytes == "bad" && name == "an error" => {
                        Err(Status::internal("no"))
                    }
                    Call::Bytes(bytes) if bytes == "bad" && name == "late" => {
                        held.pass().await;
                        Ok(())
                    }
                    _ => Ok(()),
                }
            }
        });
        stage.handler.streams(|log| log.hasty = name == "early");
        devices[0].send("good").await;
        if name != "early" {
            devices[1].send("bad").await;
        }
        let closed = if name == "early" { 1 } else { 2 };
        for device in &devices[..closed] {
            assert_eq!(stage.closed(device).await, "handler_error", "{name}");
            let names = stage.handler.names(&device.conn);
            assert_eq!(names, ["created", "bytes", "closed"], "{name}");
        }
        assert!(stage.admin.metric(RESENT).await < 0.5, "{name}");
        gate.open();
        stage.handler.streams(|log| log.hasty = false);
        let mut others = [stage.device().await, stage.device().await];
        for device in &mut others {
            device.send("on").await;
        }
        for device in &others {
            assert_eq!(stage.handler.bytes(&device.conn, 2).await, b"on", "{name}");
        }
        // The last stream may wait for another message until it is old.
        let unacknowledged = r#"exproto_handler_stream_unacknowledged{handler="default"}"#;
        stage.admin.metric_until(unacknowledged, |n| n < 0.5).await;
        // A callback that is given up may still be ending in the handler when the next one comes.
        if name != "late" {
            stage.finish().await;
        }
    }
}
