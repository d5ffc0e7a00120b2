//! The example handlers, each as a user starts it, between the program and a real
//! Mosquitto. `scripts/test.sh` makes them ready to run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::{Authority, Broker, Device, Peer, Plan, Process, free_port, within};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Starts a handler and waits for its word that it listens.
async fn start(program: &Path, arguments: &[&str], handler: u16, adapter: u16) -> Child {
    let adapter = format!("127.0.0.1:{adapter}");
    start_with(program, arguments, handler, &adapter).await
}

async fn start_with(program: &Path, arguments: &[&str], handler: u16, adapter: &str) -> Child {
    assert!(
        program.exists(),
        "{} is missing: scripts/test.sh makes the examples ready",
        program.display()
    );
    let mut child = Command::new(program)
        .args(arguments)
        .env("HANDLER_LISTEN", format!("127.0.0.1:{handler}"))
        .env("ADAPTER_ADDRESS", adapter)
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

/// Sends a line up as a device of this listener and gives its topic.
async fn one_line(devices: SocketAddr, peer: &mut Peer, line: &str) -> (Device, String) {
    let mut device = Device::dial(devices).await;
    device.send(line).await;
    let (topic, _, payload) = peer.next_text().await;
    assert_eq!(payload, line);
    (device, topic)
}

/// The address of a listener in the line that says ready.
fn devices_of(ready: &str, listener: &str) -> SocketAddr {
    let part = ready
        .split("devices on ")
        .find(|part| part.contains(listener));
    part.unwrap().split(' ').next().unwrap().parse().unwrap()
}

/// Two handlers, each with a token of its own, isolated from one another, with mutual TLS both
/// ways: each serves its listener.
#[tokio::test]
async fn python_handlers_are_secured_and_isolated() {
    let folder = TempDir::new().unwrap();
    exproto_sidecar::tls::install_provider();
    let authority = Authority::new(folder.path(), "authority");
    let (ca, files) = (authority.file(), authority.server("127.0.0.1"));
    let broker = Broker::start().await;
    let ports = [free_port(), free_port()];
    let adapter = free_port();
    let mut plan = Plan::new(&broker.url(), &format!("https://127.0.0.1:{}", ports[0]))
        .set("SERVER__BIND", &format!("127.0.0.1:{adapter}"))
        .set("SERVER__ISOLATE_HANDLERS", "true")
        .set("SERVER__SSL_OPTIONS__ENABLE", "true")
        .set("SERVER__SSL_OPTIONS__CERTFILE", &files.cert)
        .set("SERVER__SSL_OPTIONS__KEYFILE", &files.key)
        .set("SERVER__SSL_OPTIONS__CACERTFILE", &ca)
        .set("SERVER__SSL_OPTIONS__VERIFY", "verify_peer")
        .set("LISTENERS__TCP__OTHER__BIND", "127.0.0.1:0")
        .set("LISTENERS__TCP__OTHER__HANDLER", "other");
    let other = format!("https://127.0.0.1:{}", ports[1]);
    plan = plan.set("HANDLERS__OTHER__ADDRESS", &other);
    let mut tokens = Vec::new();
    for (table, token) in [
        ("HANDLER", "0123456789abcdef"),
        ("HANDLERS__OTHER", "fedcba9876543210"),
    ] {
        let file = folder.path().join(table).display().to_string();
        fs::write(&file, format!("{token}\n")).unwrap();
        plan = plan
            .set(&format!("{table}__ADAPTER_TOKEN_FILE"), &file)
            .set(&format!("{table}__SSL_OPTIONS__CACERTFILE"), &ca)
            .set(&format!("{table}__SSL_OPTIONS__CERTFILE"), &files.cert)
            .set(&format!("{table}__SSL_OPTIONS__KEYFILE"), &files.key);
        tokens.push(file);
    }
    let gateway = Process::run(&plan);
    let script = root("examples/echo-python/handler.py")
        .display()
        .to_string();
    let python = root("target/examples/venv/bin/python");
    let mut handlers = Vec::new();
    for (port, token) in ports.iter().zip(&tokens) {
        let arguments = [
            &script,
            "--ca",
            &ca,
            "--cert",
            &files.cert,
            "--key",
            &files.key,
            "--token-file",
            token,
        ];
        handlers.push(start(&python, &arguments, *port, adapter).await);
    }
    let ready = gateway.printed("is ready").await;
    let mut peer = Peer::connect(broker.port).await;
    peer.subscribe("devices/+/up").await;
    for listener in ["(tcp.default)", "(tcp.other)"] {
        let devices = devices_of(&ready, listener);
        let (mut device, topic) = one_line(devices, &mut peer, "21.5").await;
        peer.publish(&topic.replace("/up", "/down"), 1, "fan on")
            .await;
        assert_eq!(device.read(6).await, b"fan on");
    }
}

/// Both ways over Unix sockets, with a token.
#[tokio::test]
async fn a_python_handler_needs_no_port() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| format!("unix:{}", folder.path().join(name).display());
    let token = folder.path().join("token").display().to_string();
    fs::write(&token, "0123456789abcdef\n").unwrap();
    let broker = Broker::start().await;
    let plan = Plan::new(&broker.url(), &path("handler.sock"))
        .set("SERVER__BIND", &path("adapter.sock"))
        .set("SERVER__TOKEN_FILE", &token);
    let gateway = Process::run(&plan);
    let script = root("examples/echo-python/handler.py")
        .display()
        .to_string();
    let python = root("target/examples/venv/bin/python");
    let mut handler = Command::new(&python)
        .args([&script, "--token-file", &token])
        .args([
            "--listen",
            &path("handler.sock"),
            "--adapter",
            &path("adapter.sock"),
        ])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let line = gateway.printed("is ready").await;
    assert!(
        line.contains(&format!("adapter on {}", path("adapter.sock"))),
        "{line}"
    );
    let mut peer = Peer::connect(broker.port).await;
    peer.subscribe("devices/+/up").await;
    let devices = gateway.address("devices on").await;
    let (mut device, topic) = one_line(devices, &mut peer, "21.5").await;
    peer.publish(&topic.replace("/up", "/down"), 1, "fan on")
        .await;
    assert_eq!(device.read(6).await, b"fan on");
    drop(device);
    handler.kill().await.unwrap();
}
