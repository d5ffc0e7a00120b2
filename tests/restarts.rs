//! Handlers, in Rust and in Python, that are killed and started again and again under load:
//! every device stays, its bytes come in order, and only a callback that was not
//! acknowledged comes again.

mod common;

use std::collections::HashMap;

use common::{Call, Device, Log, Python, Stage, free_port, until};

/// How often the handler is killed, and devices that send meanwhile.
const RESTARTS: usize = 20;
const DEVICES: usize = 1000;

/// The bytes of each connection, a piece for each callback.
type Pieces = HashMap<String, Vec<Vec<u8>>>;

/// What every device sends after so many restarts.
fn message(round: usize) -> String {
    format!("{round:04}")
}

/// Whether the last bytes of all devices have come.
fn complete(pieces: &Pieces) -> bool {
    let last = message(RESTARTS - 1);
    let ended =
        |pieces: &&Vec<Vec<u8>>| pieces.last().is_some_and(|p| p.ends_with(last.as_bytes()));
    pieces.values().filter(ended).count() == DEVICES
}

/// Everything came in order, and nothing again that was acknowledged: that would have been
/// acknowledged twice.
async fn once_and_in_order(stage: &Stage, mut pieces: Pieces) {
    let expected: String = (0..RESTARTS).map(message).collect();
    let mut different = 0.0;
    for pieces in pieces.values_mut() {
        // Bytes are never the same twice, so what is comes again.
        pieces.dedup();
        assert_eq!(pieces.concat(), expected.as_bytes());
        different += pieces.len() as f64;
    }
    let taken =
        r#"exproto_callbacks_total{handler="default",method="OnReceivedBytes",outcome="ok"}"#;
    let taken = stage.admin.metric_until(taken, |n| n >= different).await;
    assert_eq!(taken, different);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_is_killed_again_and_again_loses_nothing() {
    let mut stage = Stage::with(&[("HANDLER__MAX_OUTAGE", "infinity")]).await;
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        devices.push(stage.device().await);
    }
    for round in 0..RESTARTS {
        let before = stage.handler.events().len();
        for device in &mut devices {
            device.send(message(round)).await;
        }
        // In the middle of it.
        let some = |log: &Log| (log.events.len() >= before + DEVICES / 4).then_some(());
        stage.handler.wait("a part of the callbacks", some).await;
        stage.handler.kill().await;
        stage.handler.up().await;
    }
    let pieces = until("every byte", || async {
        let mut pieces = Pieces::new();
        for event in stage.handler.events() {
            if let Call::Bytes(bytes) = event.call {
                pieces.entry(event.conn).or_default().push(bytes.to_vec());
            }
        }
        complete(&pieces).then_some(pieces)
    })
    .await;
    once_and_in_order(&stage, pieces).await;
    for device in &devices {
        let names = stage.handler.names(&device.conn);
        assert_eq!(names.iter().filter(|name| **name == "closed").count(), 0);
    }
    stage.finish().await;
}

/// The lines of one run of the handler in Python.
#[allow(clippy::panic)]
fn noted(lines: &[String], pieces: &mut Pieces, created: &mut Vec<String>) {
    for line in lines {
        let words: Vec<_> = line.split(' ').collect();
        match *words {
            ["created", conn, _] => created.push(conn.to_owned()),
            ["bytes", conn, bytes] => {
                let pieces = pieces.entry(conn.to_owned()).or_default();
                pieces.push(bytes.into());
            }
            ["listening"] => {}
            _ => panic!("{line}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_in_python_that_is_killed_again_and_again_loses_nothing() {
    let port = free_port();
    let start = || async {
        let port = port.to_string();
        Python::start("tests/noting_handler/handler.py", &[&port]).await
    };
    let mut python = start().await;
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
    let (mut pieces, mut created) = (Pieces::new(), Vec::new());
    for round in 0..RESTARTS {
        for device in &mut devices {
            device.send(message(round)).await;
        }
        // In the middle of it; the first time, of OnSocketCreated.
        let some = if round == 0 { "created " } else { "bytes " };
        python.printed(some, DEVICES / 4).await;
        noted(&python.kill().await, &mut pieces, &mut created);
        python = start().await;
    }
    let last = until("every byte", || async {
        let (mut pieces, lines) = (pieces.clone(), python.output());
        noted(&lines, &mut pieces, &mut Vec::new());
        complete(&pieces).then_some(lines)
    })
    .await;
    noted(&last, &mut pieces, &mut created);
    once_and_in_order(&stage, pieces).await;
    // Only what was under way when it was killed comes twice.
    assert!(created.len() >= DEVICES);
    created.sort();
    created.dedup();
    assert_eq!(created.len(), DEVICES);
    stage.finish().await;
    let rest = python.kill().await;
    let closed = rest.iter().filter(|line| line.starts_with("closed "));
    assert_eq!(closed.count(), DEVICES);
}
