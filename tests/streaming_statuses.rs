//! `handler.streaming`: what each status of gRPC does to everybody whose bytes are on the
//! stream that ends with it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Broker, Call, Device, Gate, Handler, Log, Stage, within};
use tonic::{Code, Status};

const RECEIVED: &str = r#"exproto_received_bytes_total{listener="tcp.default"}"#;
const RESENT: &str = r#"exproto_handler_stream_resent_total{handler="default"}"#;
const UNACKNOWLEDGED: &str = r#"exproto_handler_stream_unacknowledged{handler="default"}"#;

/// Devices that share a stream with one whose bytes fail.
const OTHERS: usize = 5;

/// How often UNAVAILABLE is answered before the bytes are taken: on a stream, on the next, and to
/// the bytes alone.
const REFUSALS: usize = 3;

/// Those that were everybody's.
const SHARED: usize = 2;

/// Streams of OnReceivedBytes that ended so.
fn ended(outcome: &str) -> String {
    format!(
        r#"exproto_handler_streams_ended_total{{handler="default",method="OnReceivedBytes",outcome="{outcome}"}}"#
    )
}

/// A gateway whose streams end when everybody has said what they say for a status, and not
/// before.
async fn stage() -> Stage {
    let handler = Handler::start().await;
    let count = (2 * OTHERS + 1).to_string();
    let keys = [
        ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
        ("HANDLER__STREAMING", "true"),
        ("HANDLER__STREAM_MAX_MESSAGES", &*count),
        ("HANDLER__STREAM_MAX_AGE", "60s"),
        ("HANDLER__REQUEST_TIMEOUT", "10m"),
        ("SHARDS", "1"),
    ];
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage
}

/// The bytes of a device, callback by callback.
fn pieces(log: &Log, conn: &str) -> Vec<String> {
    let text = |call: &Call| match call {
        Call::Bytes(bytes) => Some(String::from_utf8(bytes.to_vec()).unwrap()),
        _ => None,
    };
    log.of(conn).filter_map(text).collect()
}

/// Devices that each say this, in an entry of its own.
async fn say(stage: &Stage, devices: &mut [Device], text: &str) {
    let before = stage.admin.metric(RECEIVED).await;
    let all = before + (devices.len() * text.len()) as f64 - 0.5;
    for device in &mut *devices {
        device.send(text).await;
    }
    stage.admin.metric_until(RECEIVED, |n| n > all).await;
}

/// Fails what is bad, so often, and does nothing before the gate is open.
fn fail(stage: &Stage, code: Code, times: usize) -> Gate {
    let (gate, left) = (Gate::closed(), Arc::new(AtomicUsize::new(times)));
    let held = gate.clone();
    stage.handler.behave(move |event| {
        let (held, left) = (held.clone(), left.clone());
        async move {
            let Call::Bytes(bytes) = event.call else {
                return Ok(());
            };
            held.pass().await;
            let take = |left: usize| left.checked_sub(1);
            let (set, get) = (Ordering::Relaxed, Ordering::Relaxed);
            if bytes == "bad" && left.fetch_update(set, get, take).is_ok() {
                return Err(Status::new(code, "as the device wishes"));
            }
            Ok(())
        }
    });
    gate
}

/// All but UNAVAILABLE close the connection that they are about and no other: what else was
/// on the stream comes again, in order, where it may have been taken. UNAVAILABLE sends
/// everything again, and the next time each message alone until it is taken.
#[tokio::test]
async fn what_each_status_does_to_those_on_the_stream() {
    let stage = stage().await;
    let mut others = Vec::new();
    for _ in 0..OTHERS {
        others.push(stage.device().await);
    }
    let mut said: Vec<String> = Vec::new();
    let mut resent = 0;
    for code in (1..=16).map(Code::from_i32) {
        let away = code == Code::Unavailable;
        let times = if away { REFUSALS } else { usize::MAX };
        let gate = fail(&stage, code, times);
        let mut bad = [stage.device().await];
        let (before, after) = (
            format!("{} before", code as i32),
            format!("{} after", code as i32),
        );
        say(&stage, &mut others, &before).await;
        say(&stage, &mut bad, "bad").await;
        say(&stage, &mut others, &after).await;
        gate.open();
        let [mut bad] = bad;
        let failed = if away {
            SHARED
        } else {
            assert_eq!(stage.closed(&bad).await, "handler_error", "{code:?}");
            bad.closed().await;
            1
        };
        resent += failed * (2 * OTHERS + 1);
        said.extend(std::iter::repeat_n(before, failed + 1));
        said.push(after);
        for other in &others {
            let what = format!("what was said around {code:?}");
            let all = |log: &Log| {
                let pieces = pieces(log, &other.conn);
                (pieces.len() >= said.len()).then_some(pieces)
            };
            assert_eq!(stage.handler.wait(&what, all).await, said, "{code:?}");
        }
        stage.admin.metric_until(UNACKNOWLEDGED, |n| n < 0.5).await;
        assert_eq!(stage.admin.metric(RESENT).await, resent as f64, "{code:?}");
        // Once more alone, or until it was taken.
        let bad = stage.handler.streams(|log| pieces(log, &bad.conn));
        let tried = if away { REFUSALS + 1 } else { failed + 1 };
        assert_eq!(bad, vec!["bad"; tried]);
    }
    assert_eq!(stage.admin.metric(&ended("error")).await, 15.0);
    assert_eq!(stage.admin.metric(&ended("broken")).await, SHARED as f64);
    for other in &others {
        let names = stage.handler.names(&other.conn);
        assert!(names[1..].iter().all(|name| *name == "bytes"), "{names:?}");
    }
    stage.finish().await;
}
