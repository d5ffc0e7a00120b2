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
async fn echo(program: &Path, arguments: &[&str], keys: &[(&str, &str)]) {
    let broker = Broker::start().await;
    let (handler, adapter) = (free_port(), free_port());
    let plan = Plan::new(&broker.url(), &format!("http://127.0.0.1:{handler}"))
        .set("SERVER__BIND", &format!("127.0.0.1:{adapter}"))
        .set_all(keys);
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

/// The interpreter that has gRPC, and a script of the examples.
fn python(script: &str) -> (PathBuf, String) {
    let script = root(script).display().to_string();
    (root("target/examples/venv/bin/python"), script)
}

const UNARY: &str = "examples/echo-python/handler.py";
const STREAMS: &str = "examples/echo-python-streams/handler.py";

#[tokio::test]
async fn the_python_example_echoes() {
    let (python, script) = python(UNARY);
    echo(&python, &[&script], &[]).await;
}

/// A handler that knows the streaming service only, as those for EMQX 4.2 to 5.0 do.
#[tokio::test]
async fn the_python_example_of_the_older_service_echoes() {
    let (python, script) = python(STREAMS);
    let service = ("HANDLER__SERVICE_NAME", "ConnectionHandler");
    echo(&python, &[&script], &[service]).await;
    let streaming = ("HANDLER__STREAMING", "true");
    echo(&python, &[&script], &[service, streaming]).await;
}

#[tokio::test]
async fn the_rust_example_echoes() {
    echo(&root("target/examples/rust/debug/echo-rust"), &[], &[]).await;
}

/// A handler that offers only the service that it is not called by: the device is
/// closed, and the log says what to set.
async fn told(script: &str, keys: &[(&str, &str)], advice: &str) {
    let broker = Broker::start().await;
    let (handler, adapter) = (free_port(), free_port());
    let plan = Plan::new(&broker.url(), &format!("http://127.0.0.1:{handler}")).set_all(keys);
    let gateway = Process::run(&plan);
    let (python, script) = python(script);
    let _handler = start(&python, &[&script], handler, adapter).await;
    let devices = gateway.address("devices on").await;
    Device::dial(devices).await.closed().await;
    let line = gateway.logged("the handler answered UNIMPLEMENTED").await;
    assert!(line.contains(advice), "{line}");
}

#[tokio::test]
async fn a_handler_of_the_other_service_is_told_of() {
    let advice = r#"needs handler.service_name = "ConnectionHandler")"#;
    told(STREAMS, &[], advice).await;
    let service = ("HANDLER__SERVICE_NAME", "ConnectionHandler");
    let advice = r#"needs handler.service_name = "ConnectionUnaryHandler")"#;
    told(UNARY, &[service], advice).await;
    let streaming = ("HANDLER__STREAMING", "true");
    let advice =
        r#"needs handler.service_name = "ConnectionUnaryHandler" and handler.streaming = false)"#;
    told(UNARY, &[service, streaming], advice).await;
}
