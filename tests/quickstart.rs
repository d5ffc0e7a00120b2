//! `exproto-sidecar quickstart` as a person would try it.

#![cfg(feature = "quickstart")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{Client, Connection, Event, MqttOptions};

/// Longest wait for anything; only a failure takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

/// What quickstart listens on, by the variable that says so.
struct Addresses {
    broker: SocketAddr,
    handler: SocketAddr,
    adapter: SocketAddr,
    admin: SocketAddr,
    devices: SocketAddr,
    /// Where it works.
    directory: tempfile::TempDir,
}

impl Addresses {
    fn free() -> Self {
        let free = |_| SocketAddr::from((Ipv4Addr::LOCALHOST, common::free_port()));
        let [broker, handler, adapter, admin, devices] = [0; 5].map(free);
        Self {
            broker,
            handler,
            adapter,
            admin,
            devices,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-sidecar"));
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy().to_ascii_uppercase();
            if text.starts_with("EXPROTO_") {
                command.env_remove(name);
            }
        }
        command
            .arg("quickstart")
            .env("EXPROTO_BROKER__URL", format!("mqtt://{}", self.broker))
            .env(
                "EXPROTO_HANDLER__ADDRESS",
                format!("http://{}", self.handler),
            )
            .env("EXPROTO_SERVER__BIND", self.adapter.to_string())
            .env("EXPROTO_ADMIN__BIND", self.admin.to_string())
            .env(
                "EXPROTO_LISTENERS__TCP__DEFAULT__BIND",
                self.devices.to_string(),
            )
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

/// A running quickstart and what it prints.
struct Quickstart {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Quickstart {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        Self {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// Waits for a line that contains all of `parts`.
    fn expect(&mut self, parts: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line with {parts:?} in:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if parts.iter().all(|part| line.contains(part)) {
                return line;
            }
        }
    }

    /// SIGTERM, and what comes of it.
    fn terminate(mut self) -> ExitStatus {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").arg(id).status().unwrap().success());
        let deadline = Instant::now() + PATIENCE;
        // Its output ends with it.
        while self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
        self.child.wait().unwrap()
    }
}

impl Drop for Quickstart {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// A device: lines over TCP.
struct Device {
    stream: BufReader<TcpStream>,
    clientid: String,
}

impl Device {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut device = Self {
            stream: BufReader::new(stream),
            clientid: String::new(),
        };
        let greeting = device.read_line();
        let rest = greeting.strip_prefix("you are ").unwrap();
        rest.split(';')
            .next()
            .unwrap()
            .clone_into(&mut device.clientid);
        device
    }

    fn read_line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn write(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }
}

/// An MQTT client that is subscribed to `filter`.
fn subscriber(broker: SocketAddr, filter: &str) -> (Client, Connection) {
    let options = MqttOptions::new("test", broker.ip().to_string(), broker.port());
    let (client, mut connection) = Client::new(options, 8);
    client.subscribe(filter, QoS::AtLeastOnce).unwrap();
    next(&mut connection, |packet| {
        matches!(packet, Packet::SubAck(_)).then_some(())
    });
    (client, connection)
}

/// Waits for a packet that `found` takes.
fn next<T>(connection: &mut Connection, mut found: impl FnMut(Packet) -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if let Event::Incoming(packet) = connection.recv_timeout(left).unwrap().unwrap()
            && let Some(found) = found(packet)
        {
            return found;
        }
    }
}

fn next_message(connection: &mut Connection) -> (String, String) {
    next(connection, |packet| match packet {
        Packet::Publish(publish) => Some((
            String::from_utf8(publish.topic.to_vec()).unwrap(),
            String::from_utf8(publish.payload.to_vec()).unwrap(),
        )),
        _ => None,
    })
}

#[test]
fn it_shows_both_ways_and_then_serves_whoever_tries() {
    let addresses = Addresses::free();
    let mut quickstart = Quickstart::start(&mut addresses.command());
    quickstart.expect(&["MQTT broker", &addresses.broker.to_string()]);
    quickstart.expect(&["device-1 connected"]);
    quickstart.expect(&["device-1 sends the line: temperature=21.5"]);
    quickstart.expect(&["up ", "devices/device-1/up: temperature=21.5"]);
    quickstart.expect(&["down ", "devices/device-1/down: fan=on"]);
    quickstart.expect(&["device-1 received the line: fan=on"]);
    quickstart.expect(&["device-1 disconnected (normal)"]);
    let devices = addresses.devices;
    quickstart.expect(&[&format!("nc {} {}", devices.ip(), devices.port())]);
    let broker = format!(
        "-h {} -p {}",
        addresses.broker.ip(),
        addresses.broker.port()
    );
    quickstart.expect(&["mosquitto_sub", &broker, "'devices/+/up'"]);
    quickstart.expect(&["mosquitto_pub", &broker, "'devices/device-2/down'"]);

    let mut device = Device::connect(devices);
    assert_eq!(device.clientid, "device-2");
    let (client, mut connection) = subscriber(addresses.broker, "devices/+/up");
    device.write("hello, wor");
    device.write("ld\r\nagain\n");
    let up = "devices/device-2/up".to_owned();
    assert_eq!(
        next_message(&mut connection),
        (up.clone(), "hello, world".to_owned())
    );
    assert_eq!(next_message(&mut connection), (up, "again".to_owned()));
    quickstart.expect(&["up ", "devices/device-2/up: hello, world"]);

    let publish = |topic: &str, payload: &str| {
        let payload = payload.to_owned();
        client
            .publish(topic, QoS::AtLeastOnce, false, payload)
            .unwrap();
    };
    publish("devices/device-2/down", "hi there");
    publish("devices/device-99/down", "anybody?");
    next(&mut connection, |packet| {
        matches!(packet, Packet::PubAck(_)).then_some(())
    });
    assert_eq!(device.read_line(), "hi there");
    quickstart.expect(&["down ", "devices/device-2/down: hi there"]);
    quickstart.expect(&["devices/device-99/down: anybody?", "no such device"]);

    // Names are not used twice, and everybody is told of the end.
    let mut other = Device::connect(devices);
    assert_eq!(other.clientid, "device-3");
    drop(device);
    quickstart.expect(&["device-2 disconnected (normal)"]);
    assert_eq!(quickstart.terminate().code(), Some(0));
    assert_eq!(other.read_line(), "");
    let left_behind = std::fs::read_dir(addresses.directory.path()).unwrap();
    assert_eq!(left_behind.count(), 0);
}

#[test]
fn a_line_without_an_end_is_not_kept_for_ever() {
    let addresses = Addresses::free();
    let mut quickstart = Quickstart::start(&mut addresses.command());
    quickstart.expect(&["Ctrl-C"]);
    let mut device = Device::connect(addresses.devices);
    device.write(&"x".repeat(64 * 1024 + 1));
    assert_eq!(device.read_line(), "a line has at most 65536 bytes");
    assert_eq!(device.read_line(), "");
    quickstart.expect(&["device-2 is closed: a line has at most 65536 bytes"]);
    assert_eq!(quickstart.terminate().code(), Some(0));
}

#[test]
fn topics_have_the_mountpoint_of_the_configuration() {
    let addresses = Addresses::free();
    let mut command = addresses.command();
    command.args(["--set", "mountpoint=meters/${clientid}/"]);
    let mut quickstart = Quickstart::start(&mut command);
    quickstart.expect(&[
        "up ",
        "meters/device-1/devices/device-1/up: temperature=21.5",
    ]);
    quickstart.expect(&["device-1 received the line: fan=on"]);
    quickstart.expect(&["mosquitto_sub", "'meters/+/devices/+/up'"]);
    assert_eq!(quickstart.terminate().code(), Some(0));
}

#[test]
fn ports_that_are_taken_are_named_with_the_way_out() {
    let addresses = Addresses::free();
    let taken =
        [addresses.broker, addresses.devices].map(|address| TcpListener::bind(address).unwrap());
    let mut child = addresses.command().stderr(Stdio::piped()).spawn().unwrap();
    let (mut shown, mut said) = (String::new(), String::new());
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut shown)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
    assert_eq!(shown, "");
    for text in [
        format!("{} for MQTT broker (broker.url): taken", addresses.broker),
        "EXPROTO_BROKER__URL=mqtt://127.0.0.1:".to_owned(),
        format!(
            "{} for devices (listeners.tcp.default.bind): taken",
            addresses.devices
        ),
        "EXPROTO_LISTENERS__TCP__DEFAULT__BIND=127.0.0.1:".to_owned(),
        "--set broker.url=mqtt://127.0.0.1:".to_owned(),
    ] {
        assert!(said.contains(&text), "{text:?} is not in:\n{said}");
    }
    assert!(!said.contains("EXPROTO_HANDLER__ADDRESS"), "{said}");
    drop(taken);
}
