//! The example handlers, each as a user starts it, between the program and a real
//! Mosquitto. `scripts/test.sh` makes them ready to run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{Broker, Device, Peer, Plan, Process, free_port, within};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Starts a handler and waits for its word that it listens.
async fn start(program: &Path, arguments: &[&str], handler: u16, adapter: u16) -> Child {
    assert!(
        program.exists(),
        "{} is missing: scripts/test.sh makes the examples ready",
        program.display()
    );
    let mut child = Command::new(program)
        .args(arguments)
        .env("HANDLER_LISTEN", format!("127.0.0.1:{handler}"))
        .env("ADAPTER_ADDRESS", format!("127.0.0.1:{adapter}"))
        .env("HANDLER_KEEPALIVE", "1")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = within("the handler to listen", lines.next_line()).await;
    let line = line.unwrap().unwrap();
    assert_eq!(line, format!("handler listening on 127.0.0.1:{handler}"));
    child
}

/// A line goes up to MQTT, a message comes down, and a device that falls silent is
/// closed by the handler's own timer.
async fn echo(program: &Path, arguments: &[&str]) {
    let broker = Broker::start().await;
    let (handler, adapter) = (free_port(), free_port());
    let plan = Plan::new(&broker.url(), &format!("http://127.0.0.1:{handler}"))
        .set("SERVER__BIND", &format!("127.0.0.1:{adapter}"));
    let gateway = Process::run(&plan);
    let _handler = start(program, arguments, handler, adapter).await;
    gateway.printed("is ready").await;
    let devices = gateway.address("devices on").await;

    let mut peer = Peer::connect(broker.port).await;
    peer.subscribe("devices/+/up").await;
    let mut device = Device::dial(devices).await;
    device.send("21.5").await;
    let (topic, qos, payload) = peer.next_text().await;
    let clientid = format!("tcp{}-127.0.0.1-{}", devices.port(), device.port());
    assert_eq!(topic, format!("devices/{clientid}/up"));
    assert_eq!((qos, payload.as_str()), (1, "21.5"));

    let down = format!("devices/{clientid}/down");
    peer.publish(&down, 1, "fan on").await;
    assert_eq!(device.read(6).await, b"fan on");

    // One and a half seconds of silence.
    let mut rest = Vec::new();
    within(
        "the end of a silent device",
        device.stream.read_to_end(&mut rest),
    )
    .await
    .unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn the_python_example_echoes() {
    let script = root("examples/echo-python/handler.py");
    let python = root("target/examples/venv/bin/python");
    echo(&python, &[script.to_str().unwrap()]).await;
}

#[tokio::test]
async fn the_rust_example_echoes() {
    echo(&root("target/examples/rust/debug/echo-rust"), &[]).await;
}
