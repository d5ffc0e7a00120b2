//! What goes along with a callback: `grpc-timeout` and `traceparent`, where they are
//! wished for.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use common::{Broker, Call, Device, Handler, Plan, Process, Stage, pattern, within};
use tonic::metadata::MetadataMap;

const TIMEOUT: &str = "grpc-timeout";
const TRACE: &str = "traceparent";

const ON: [(&str, &str); 3] = [
    ("HANDLER__GRPC_TIMEOUT", "true"),
    ("HANDLER__TRACE_CONTEXT", "true"),
    ("HANDLER__REQUEST_TIMEOUT", "7500ms"),
];

type Headers = Vec<(&'static str, MetadataMap)>;

/// A device's whole life: every callback once.
async fn life(stage: &Stage) -> Headers {
    let mut device = stage.subscriber("meter", "down", 1).await;
    device.send("up").await;
    stage.handler.bytes(&device.conn, 2).await;
    stage.adapter.raw_publish("down", 1, "hello").await.ok();
    stage.handler.messages(&device.conn, 1).await;
    stage.adapter.start_timer(&device.conn, 1).await.ok();
    assert_eq!(stage.closed(&device).await, "keepalive_timeout");
    let headers = stage.handler.streams(|log| log.headers.clone());
    let mut names: Vec<_> = headers.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    assert_eq!(names, ["bytes", "closed", "created", "messages", "timer"]);
    headers
}

fn text<'a>(headers: &'a MetadataMap, key: &str) -> Option<&'a str> {
    headers.get(key).map(|value| value.to_str().unwrap())
}

/// A `TimeoutValue` and its unit, as "gRPC over HTTP2" writes them.
fn timeout(headers: &MetadataMap) -> Duration {
    let text = text(headers, TIMEOUT).unwrap();
    let (value, unit) = text.split_at(text.len() - 1);
    assert!((1..=8).contains(&value.len()), "{text}");
    assert!(value.bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    let value = value.parse().unwrap();
    match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => panic!("{text}"),
    }
}

/// Version 00 of W3C Trace Context: the trace's id and the call's.
fn trace(headers: &MetadataMap) -> (String, String) {
    assert_eq!(headers.get_all(TRACE).iter().count(), 1);
    let text = text(headers, TRACE).unwrap();
    let parts: Vec<_> = text.split('-').collect();
    let [version, trace, call, flags] = parts[..] else {
        panic!("{text}");
    };
    let is_hex = |part: &str, length: usize| {
        let digits = part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        digits && part.len() == length
    };
    assert_eq!((version, flags), ("00", "01"), "{text}");
    // All zeros are invalid.
    assert!(is_hex(trace, 32) && trace.contains(|c| c != '0'), "{text}");
    assert!(is_hex(call, 16) && call.contains(|c| c != '0'), "{text}");
    (trace.to_owned(), call.to_owned())
}

#[tokio::test]
async fn nothing_goes_along_where_nothing_is_wished() {
    let stage = Stage::start().await;
    for (name, headers) in life(&stage).await {
        assert_eq!(text(&headers, TIMEOUT), None, "{name}");
        assert_eq!(text(&headers, TRACE), None, "{name}");
    }
    stage.finish().await;
}

/// Every callback says how long it may take, and begins a trace of its own; with both
/// services.
#[tokio::test]
async fn every_callback_has_its_time_and_a_trace() {
    for service in ["ConnectionUnaryHandler", "ConnectionHandler"] {
        let service = [("HANDLER__SERVICE_NAME", service)];
        let stage = Stage::with(&[&ON[..], &service].concat()).await;
        let mut ids = HashSet::new();
        for (_, headers) in life(&stage).await {
            assert_eq!(timeout(&headers), Duration::from_millis(7500));
            let (trace, call) = trace(&headers);
            assert!(ids.insert(trace) && ids.insert(call));
        }
        stage.finish().await;
    }
}

/// The streams of `handler.streaming` are everybody's and have neither; the callbacks
/// that are calls of their own have both.
#[tokio::test]
async fn streams_carry_neither() {
    let streaming = [
        ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
        ("HANDLER__STREAMING", "true"),
    ];
    let stage = Stage::with(&[&ON[..], &streaming].concat()).await;
    for (name, headers) in life(&stage).await {
        if matches!(name, "bytes" | "messages") {
            assert_eq!(text(&headers, TIMEOUT), None, "{name}");
            assert_eq!(text(&headers, TRACE), None, "{name}");
        } else {
            timeout(&headers);
            trace(&headers);
        }
    }
    stage.finish().await;
}

/// With `grpc-timeout` the handler's own library ends a callback that takes too long, also
/// one that waits for a device to take what it is sent, for which the gateway gives time.
#[tokio::test]
async fn the_handlers_own_library_ends_a_callback() {
    let stage = Stage::with(&[
        ("HANDLER__GRPC_TIMEOUT", "true"),
        ("HANDLER__REQUEST_TIMEOUT", "300ms"),
        ("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SNDBUF", "16KiB"),
    ])
    .await;
    let adapter = stage.adapter.clone();
    stage.handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if matches!(event.call, Call::Bytes(_)) {
                for _ in 0..4 {
                    adapter.send(&event.conn, pattern(1 << 20)).await.ok();
                }
            }
            Ok(())
        }
    });
    let mut device = stage.small_device().await;
    device.send("x").await;
    stage.handler.bytes(&device.conn, 1).await;
    // tonic's word for it; the gateway's own would be DEADLINE_EXCEEDED.
    let late = "exproto_callbacks_total{handler=\"default\",method=\"OnReceivedBytes\",outcome=\"CANCELLED\"}";
    stage.admin.metric_until(late, |n| n > 0.5).await;
    // What it was sent need not be waited for any more.
    let conn = device.conn.clone();
    device.reset();
    assert_eq!(stage.handler.closed(&conn).await, "handler_error");
    stage.finish().await;
}

/// The trace that the handler was told is the one in the log.
#[tokio::test]
async fn the_log_has_the_trace() {
    let broker = Broker::start().await;
    let handler = Handler::start().await;
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("HANDLER__TRACE_CONTEXT", "true")
        .set("LOG__LEVEL", "debug");
    let gateway = Process::run(&plan);
    let devices = gateway.address("devices on").await;
    let mut device = Device::dial(devices).await;
    let conn = handler.created(device.port()).await;
    device.send("x").await;
    handler.bytes(&conn, 1).await;
    let headers = handler.streams(|log| log.headers.clone());
    let names: Vec<_> = headers.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["created", "bytes"]);
    for (_, headers) in headers {
        let line = within("the log", gateway.logged(text(&headers, TRACE).unwrap())).await;
        assert!(line.contains("OnSocketCreated") || line.contains("OnReceivedBytes"));
    }
    assert!(matches!(handler.events()[0].call, Call::Created(_)));
}
