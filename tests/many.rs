//! A thousand devices at once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;

use common::{Adapter, Call, Device, Event, LIMIT, Log, Peer, Stage, within};
use tonic::Status;

const DEVICES: usize = 1000;
const LINES: usize = 3;

/// What a handler of the echo kind does: introduces the device by its first line,
/// publishes each other line, sends each message down as a line.
async fn echo(adapter: Adapter, event: Event) -> Result<(), Status> {
    let conn = &event.conn;
    match event.call {
        Call::Bytes(bytes) => {
            for line in String::from_utf8(bytes.to_vec()).unwrap().lines() {
                if let Some(name) = line.strip_prefix("I am ") {
                    adapter.authenticate(conn, name).await.ok();
                    let down = format!("devices/{name}/down");
                    adapter.subscribe(conn, &down, 1).await.ok();
                    adapter.send(conn, "hello\n").await.ok();
                } else {
                    let (name, text) = line.split_once(' ').unwrap();
                    let up = format!("devices/{name}/up");
                    adapter.publish(conn, &up, 1, text.to_owned()).await.ok();
                }
            }
        }
        Call::Messages(messages) => {
            for message in messages {
                let line = [&message.payload[..], b"\n"].concat();
                adapter.send(conn, line).await.ok();
            }
        }
        _ => {}
    }
    Ok(())
}

async fn introduced(mut device: Device, number: usize) -> Device {
    device.send(format!("I am d{number}\n")).await;
    assert_eq!(device.read_text(6).await, "hello\n");
    device
}

/// A thousand devices, each with lines up and lines down, all at the same time:
/// every line arrives once, in the order of its device.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_devices_at_once() {
    let keys = [
        ("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "infinity"),
        ("BROKER__POOL_SIZE", "4"),
        ("HANDLER__REQUEST_TIMEOUT", "60s"),
        ("BROKER__PUBLISH_TIMEOUT", "60s"),
    ];
    let stage = Stage::with(&keys).await;
    let adapter = stage.adapter.clone();
    stage
        .handler
        .behave(move |event| echo(adapter.clone(), event));
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("devices/+/up").await;

    let address = stage.devices();
    let joining: Vec<_> = (0..DEVICES)
        .map(|number| {
            tokio::spawn(async move { introduced(Device::dial(address).await, number).await })
        })
        .collect();
    let mut devices = Vec::new();
    for device in joining {
        devices.push(within("a device", device).await.unwrap());
    }
    assert_eq!(stage.gateway.connections(), DEVICES);

    // Up and down at the same time.
    let talking: Vec<_> = devices
        .into_iter()
        .enumerate()
        .map(|(number, mut device)| {
            tokio::spawn(async move {
                for line in 0..LINES {
                    device.send(format!("d{number} up {line}\n")).await;
                }
                let mut expected = String::new();
                for line in 0..LINES {
                    expected.push_str(&format!("down {line}\n"));
                }
                assert_eq!(
                    device.read_text(expected.len()).await,
                    expected,
                    "d{number}"
                );
                device
            })
        })
        .collect();
    let mut other = Peer::connect(stage.broker.port).await;
    for line in 0..LINES {
        for number in 0..DEVICES {
            let topic = format!("devices/d{number}/down");
            other.publish(&topic, 1, format!("down {line}")).await;
        }
    }
    let mut ups: HashMap<String, Vec<String>> = HashMap::new();
    for _ in 0..DEVICES * LINES {
        let (topic, _, payload) = peer.next_text().await;
        ups.entry(topic).or_default().push(payload);
    }
    assert_eq!(ups.len(), DEVICES);
    for (topic, lines) in &ups {
        assert_eq!(lines, &["up 0", "up 1", "up 2"], "{topic}");
    }
    let mut devices = Vec::new();
    for device in talking {
        devices.push(within("a device", device).await.unwrap());
    }
    drop(devices);
    let all_closed = |log: &Log| {
        let closed = log
            .events
            .iter()
            .filter(|e| matches!(&e.call, Call::Closed(_)));
        (closed.count() == DEVICES).then_some(())
    };
    stage.handler.wait("the end of all", all_closed).await;
    for event in stage.handler.events() {
        if let Call::Closed(reason) = event.call {
            assert_eq!(reason, "normal");
        }
    }
    stage.finish().await;
}

/// A thousand devices that hang on a drain are all told, each once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_tells_a_thousand() {
    let keys = [("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "infinity")];
    let stage = Stage::with(&keys).await;
    let address = stage.devices();
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        devices.push(Device::dial(address).await);
    }
    let all_created = |log: &Log| (log.events.len() == DEVICES).then_some(());
    stage.handler.wait("all of them", all_created).await;
    let readers: Vec<_> = devices
        .into_iter()
        .map(|mut device| tokio::spawn(async move { device.read_all().await }))
        .collect();
    let Stage {
        gateway, handler, ..
    } = stage;
    let drained = within("the drain", gateway.drain()).await;
    assert_eq!((drained.connections, drained.publishes), (0, 0));
    for reader in readers {
        let read = tokio::time::timeout(LIMIT, reader).await;
        assert_eq!(read.unwrap().unwrap(), b"");
    }
    let mut reasons: HashMap<String, String> = HashMap::new();
    for event in handler.events() {
        if let Call::Closed(reason) = event.call {
            assert_eq!(reasons.insert(event.conn, reason), None, "told twice");
        }
    }
    assert_eq!(reasons.len(), DEVICES);
    assert!(reasons.values().all(|reason| reason == "shutdown"));
    handler.check();
}
