//! Handlers, in Rust and in Python, that are killed and started again and again under load:
//! every device stays, its bytes come in order, and only a callback that was not
//! acknowledged comes again.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;

use common::{
    Broker, Call, Device, Handler, Log, Notes, Python, Stage, free_port, until, within,
    without_repetitions,
};

/// How often the handler is killed, and devices that send meanwhile.
const RESTARTS: usize = 20;
const DEVICES: usize = 1000;

/// The bytes of each connection, a piece for each callback.
type Pieces = HashMap<String, Vec<String>>;

/// What every device sends after so many restarts.
fn message(round: usize) -> String {
    format!("{round:04}")
}

/// Whether the last bytes of all devices have come.
fn complete(pieces: &Pieces) -> bool {
    let last = message(RESTARTS - 1);
    let ended = |pieces: &&Vec<String>| pieces.iter().any(|piece| piece.ends_with(&last));
    pieces.values().filter(ended).count() == DEVICES
}

/// Callbacks of this name that the handler acknowledged, once it is so many.
async fn acknowledged(stage: &Stage, method: &str, at_least: f64) -> f64 {
    let name =
        format!(r#"exproto_callbacks_total{{handler="default",method="{method}",outcome="ok"}}"#);
    stage.admin.metric_until(&name, |n| n >= at_least).await
}

/// Everything came in order, and nothing again that was acknowledged: that would have been
/// acknowledged twice. Returns how many callbacks came again.
async fn once_and_in_order(stage: &Stage, pieces: &Pieces, streaming: bool) -> usize {
    let expected: String = (0..RESTARTS).map(message).collect();
    let mut different = 0;
    for pieces in pieces.values() {
        let known = without_repetitions(pieces, streaming);
        assert_eq!(known.concat(), expected);
        different += known.len();
    }
    let taken = acknowledged(stage, "OnReceivedBytes", different as f64).await;
    assert_eq!(taken, different as f64);
    let created = acknowledged(stage, "OnSocketCreated", DEVICES as f64).await;
    assert_eq!(created, DEVICES as f64);
    pieces.values().map(Vec::len).sum::<usize>() - different
}

/// A handler in Rust, called in this way.
async fn is_killed_again_and_again(keys: &[(&str, &str)], streaming: bool) {
    let keys = [keys, &[("HANDLER__MAX_OUTAGE", "infinity")]].concat();
    let mut stage = Stage::assemble(Broker::start().await, Handler::start().await, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        devices.push(stage.device().await);
    }
    for round in 0..RESTARTS {
        let before = stage.handler.events().len();
        let sending = async {
            for device in &mut devices {
                device.send(message(round)).await;
            }
        };
        // In the middle of it.
        let killing = async {
            let some = |log: &Log| (log.events.len() >= before + DEVICES / 4).then_some(());
            stage.handler.wait("a part of the callbacks", some).await;
            stage.handler.kill().await;
            stage.handler.up().await;
        };
        tokio::join!(sending, killing);
    }
    let pieces = until("every byte", || async {
        let mut pieces = Pieces::new();
        for event in stage.handler.events() {
            if let Call::Bytes(bytes) = event.call {
                let bytes = String::from_utf8(bytes.to_vec()).unwrap();
                pieces.entry(event.conn).or_default().push(bytes);
            }
        }
        complete(&pieces).then_some(pieces)
    })
    .await;
    let again = once_and_in_order(&stage, &pieces, streaming).await;
    assert!(again > 0, "never killed in the middle of a callback");
    for device in &devices {
        let names = stage.handler.names(&device.conn);
        assert_eq!(names.iter().filter(|name| **name == "closed").count(), 0);
    }
    stage.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_is_killed_again_and_again_loses_nothing() {
    is_killed_again_and_again(&[], false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_streaming_one_that_is_killed_again_and_again_loses_nothing() {
    let keys = [
        ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
        ("HANDLER__STREAMING", "true"),
    ];
    is_killed_again_and_again(&keys, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_in_python_that_is_killed_again_and_again_loses_nothing() {
    let port = free_port();
    let mut python = Python::start(port, &[]).await;
    let address = format!("http://127.0.0.1:{port}");
    let stage = Stage::with(&[
        ("HANDLER__ADDRESS", &*address),
        ("HANDLER__MAX_OUTAGE", "infinity"),
        // With ten threads for a thousand devices.
        ("HANDLER__REQUEST_TIMEOUT", "30s"),
    ])
    .await;
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        devices.push(Device::dial(stage.devices()).await);
    }
    let mut notes = Notes::default();
    for round in 0..RESTARTS {
        for device in &mut devices {
            device.send(message(round)).await;
        }
        // In the middle of it; the first time, of OnSocketCreated.
        let some = if round == 0 { "created " } else { "bytes " };
        python.printed(some, DEVICES / 4).await;
        notes.add(&python.kill().await);
        python = Python::start(port, &[]).await;
    }
    let last = until("every byte", || async {
        let (mut notes, lines) = (notes.clone(), python.output());
        notes.add(&lines);
        complete(&notes.bytes).then_some(lines)
    })
    .await;
    notes.add(&last);
    assert_eq!(notes.closed, []);
    once_and_in_order(&stage, &notes.bytes, false).await;
    // Only what was under way when it was killed comes twice.
    let mut created = notes.created;
    assert!(created.len() >= DEVICES);
    created.sort();
    created.dedup();
    assert_eq!(created.len(), DEVICES);
    stage.finish().await;
    let end = Notes::of(&python.kill().await);
    assert_eq!(end.closed.len(), DEVICES);
}
