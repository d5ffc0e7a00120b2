//! Handlers in Python that die, fail, show a bad certificate or vanish: what the handlers in
//! Rust do in other tests, done by grpcio.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{
    Authority, Broker, Device, Files, Handler, Notes, Plan, Process, Python, Stage, free_port,
    network, within, without_repetitions,
};
use tempfile::TempDir;

/// Connections whose callback waits for a handler that is away.
const HELD: &str = "exproto_connections_held{handler=\"default\"}";

/// Channels that are up, of all addresses.
const UP: &str = "exproto_handler_channels_up{handler=\"default\"}";

/// Connections that moved to another address.
const FAILOVERS: &str = "exproto_handler_failovers_total{handler=\"default\"}";

/// Devices at a handler, and how often each says something.
const DEVICES: usize = 10;
const MESSAGES: usize = 20;

/// A gateway of handlers in Python, ready.
async fn stage(address: &str, keys: &[(&str, &str)]) -> Stage {
    let keys = [&[("HANDLER__ADDRESS", address)], keys].concat();
    let stage = Stage::assemble(Broker::start().await, Handler::absent(), &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage
}

/// A device of which this handler was told.
async fn device(stage: &Stage, handler: &Python) -> Device {
    let mut device = Device::dial(stage.devices()).await;
    device.conn = handler.created(device.port()).await;
    device
}

fn message(number: usize) -> String {
    format!("{number:04}")
}

/// Waits until the handler has had the last message of each device.
async fn all_messages(handler: &Python, devices: &[Device]) {
    let last = message(MESSAGES - 1);
    let has_last = |pieces: &Vec<String>| pieces.iter().any(|piece| piece.ends_with(&last));
    let all = |lines: &[String]| {
        let bytes = Notes::of(lines).bytes;
        let complete = |device: &Device| bytes.get(&device.conn).is_some_and(has_last);
        devices.iter().all(complete).then_some(())
    };
    handler.wait("the last messages", all).await;
}

/// All messages of each device came, in order, and again at most the callback that was cut off.
#[track_caller]
fn once_and_in_order(notes: &Notes, devices: &[Device]) {
    let expected: String = (0..MESSAGES).map(message).collect();
    for device in devices {
        let noted = &notes.bytes[&device.conn];
        let pieces = without_repetitions(noted, false);
        assert_eq!(pieces.concat(), expected, "{noted:?}");
        assert!(noted.len() <= pieces.len() + 1, "{noted:?}");
    }
}

/// Two handlers, of which one has died under load.
struct Two {
    stage: Stage,
    lives: Python,
    /// Its devices, which have gone on meanwhile.
    others: Vec<Device>,
    /// Where the one that died was, what it had noted, and its devices.
    port: u16,
    died: Notes,
    orphans: Vec<Device>,
}

impl Two {
    async fn start(keys: &[(&str, &str)]) -> Self {
        let ports = [free_port(), free_port()];
        let (dies, lives) =
            tokio::join!(Python::start(ports[0], &[]), Python::start(ports[1], &[]));
        let both = ports
            .map(|port| format!("http://127.0.0.1:{port}"))
            .join(",");
        let own = [("SHARDS", "1"), ("HANDLER__MAX_OUTAGE", "infinity")];
        let stage = stage(&both, &[&own, keys].concat()).await;
        stage.admin.metric_until(UP, |up| up > 1.5).await;
        let (mut orphans, mut others) = (Vec::new(), Vec::new());
        for _ in 0..2 * DEVICES {
            let mut device = Device::dial(stage.devices()).await;
            let port = device.port();
            let (conn, devices) = tokio::select! {
                conn = dies.created(port) => (conn, &mut orphans),
                conn = lives.created(port) => (conn, &mut others),
            };
            device.conn = conn;
            devices.push(device);
        }
        assert_eq!((orphans.len(), others.len()), (DEVICES, DEVICES));
        let mut dies = Some(dies);
        let mut died = Notes::default();
        for number in 0..MESSAGES {
            let before = dies.as_ref().map_or(0, |dies| {
                let noted = dies.output().into_iter();
                noted.filter(|line| line.starts_with("bytes ")).count()
            });
            for device in orphans.iter_mut().chain(&mut others) {
                device.send(message(number)).await;
            }
            // In the middle of it.
            if let Some(dies) = dies.take_if(|_| number == MESSAGES / 2) {
                dies.printed("bytes ", before + DEVICES / 2).await;
                died.add(&dies.kill().await);
            }
        }
        all_messages(&lives, &others).await;
        Self {
            stage,
            lives,
            others,
            port: ports[0],
            died,
            orphans,
        }
    }

    /// Nobody but `handler` was told of the end of these, and why.
    async fn finish(self, handler: Option<Python>) {
        self.stage.finish().await;
        let notes = Notes::of(&self.lives.kill().await);
        once_and_in_order(&notes, &self.others);
        let mut closed = notes.closed;
        if let Some(handler) = handler {
            let notes = Notes::of(&handler.kill().await);
            assert_eq!(notes.closed.len(), DEVICES);
            closed.extend(notes.closed);
        }
        assert_eq!(closed.len(), 2 * DEVICES);
        assert!(closed.iter().all(|(_, reason)| reason == "shutdown"));
    }
}

/// `failover = "recreate"`: the connections of the one that died move to the other one, which
/// is told of each first, by the same name, and gets what the first one did not acknowledge.
#[tokio::test]
async fn connections_move_to_the_handler_that_is_there() {
    let two = Two::start(&[
        ("HANDLER__FAILOVER", "recreate"),
        ("HANDLER__FAILOVER_AFTER", "100ms"),
    ])
    .await;
    all_messages(&two.lives, &two.orphans).await;
    let lines = two.lives.output();
    for device in &two.orphans {
        let about = |line: &&String| line.contains(&device.conn);
        let about: Vec<_> = lines.iter().filter(about).collect();
        let created = format!("created {} {}", device.port(), device.conn);
        assert_eq!(*about[0], created);
        assert!(about[1..].iter().all(|line| line.starts_with("bytes ")));
    }
    let mut notes = two.died.clone();
    notes.add(&lines);
    once_and_in_order(&notes, &two.orphans);
    assert_eq!(two.stage.admin.metric(FAILOVERS).await, DEVICES as f64);
    two.finish(None).await;
}

/// `failover = "hold"`: they wait, and are served by the one that they know when it is back.
#[tokio::test]
async fn connections_wait_for_their_own_handler() {
    let two = Two::start(&[]).await;
    let all = |n: f64| n > DEVICES as f64 - 0.5;
    two.stage.admin.metric_until(HELD, all).await;
    let again = Python::start(two.port, &[]).await;
    all_messages(&again, &two.orphans).await;
    let lines = again.output();
    assert_eq!(Notes::of(&lines).created.len(), 0);
    let mut notes = two.died.clone();
    notes.add(&lines);
    once_and_in_order(&notes, &two.orphans);
    let lives = Notes::of(&two.lives.output());
    for device in &two.orphans {
        assert!(!lives.bytes.contains_key(&device.conn));
    }
    assert_eq!(two.stage.admin.metric(FAILOVERS).await, 0.0);
    two.finish(Some(again)).await;
}

/// The statuses of gRPC by their numbers, OK left out.
const STATUSES: [&str; 16] = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// OnReceivedBytes that ended so.
fn bytes_ended(outcome: &str) -> String {
    format!(
        r#"exproto_callbacks_total{{handler="default",method="OnReceivedBytes",outcome="{outcome}"}}"#
    )
}

/// What each status does, of a handler that is called in this way.
async fn statuses(arguments: &[&str], keys: &[(&str, &str)], streaming: bool) {
    let port = free_port();
    let python = Python::start(port, arguments).await;
    let stage = stage(&format!("http://127.0.0.1:{port}"), keys).await;
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(device(&stage, &python).await);
    }
    let mut closed = Vec::new();
    for (number, name) in STATUSES.iter().enumerate() {
        let mut fails = device(&stage, &python).await;
        let (code, conn) = (number + 1, fails.conn.clone());
        let bytes = match *name {
            "UNAVAILABLE" => format!("fail {code} 3"),
            _ => format!("fail {code}"),
        };
        fails.send(&bytes).await;
        for other in &mut others {
            other.send(message(number)).await;
        }
        if *name == "UNAVAILABLE" {
            let noted = python.printed(&format!("bytes {conn} {bytes}"), 4).await;
            assert_eq!(noted.len(), 4);
            fails.send("taken").await;
            python.printed(&format!("bytes {conn} taken"), 1).await;
            drop(fails);
            closed.push((conn, "normal".to_owned()));
        } else {
            fails.closed().await;
            assert_eq!(stage.admin.metric(&bytes_ended(name)).await, 1.0, "{name}");
            closed.push((conn, "handler_error".to_owned()));
        }
        for other in &others {
            let line = format!("bytes {} {}", other.conn, message(number));
            python.printed(&line, 1).await;
        }
    }
    // Nobody but them.
    python.printed("closed ", closed.len()).await;
    let notes = Notes::of(&python.output());
    let mut found = notes.closed;
    closed.sort();
    found.sort();
    assert_eq!(found, closed);
    for other in &others {
        let noted = &notes.bytes[&other.conn];
        let pieces = without_repetitions(noted, streaming);
        let expected: Vec<String> = (0..STATUSES.len()).map(message).collect();
        assert_eq!(pieces, expected);
        // What was on a stream with one that failed comes again, nothing else.
        assert!(streaming || noted.len() == pieces.len(), "{noted:?}");
    }
    stage.finish().await;
    python.kill().await;
}

/// UNAVAILABLE is sent again until it is taken, every other one closes the connection that it
/// is about; the others of the same handler go on.
#[tokio::test]
async fn what_each_status_does() {
    statuses(&[], &[], false).await;
}

/// The same of the older service, one by one and on streams that connections share.
#[tokio::test]
async fn what_each_status_of_the_older_service_does() {
    let older = ("HANDLER__SERVICE_NAME", "ConnectionHandler");
    statuses(&["--streams"], &[older], false).await;
    let shared = [older, ("HANDLER__STREAMING", "true"), ("SHARDS", "1")];
    statuses(&["--streams"], &shared, true).await;
}

/// One that comes back with a certificate that has expired: nothing goes to it, which the log
/// and `/readyz` say, and every device waits for a good one.
#[tokio::test]
async fn an_expired_certificate_is_an_outage() {
    let folder = TempDir::new().unwrap();
    let authority = Authority::new(folder.path(), "authority");
    let (good, expired) = (
        authority.server("127.0.0.1"),
        authority.expired("127.0.0.1"),
    );
    let port = free_port();
    let start = |files: &Files| {
        let (key, cert) = (files.key.clone(), files.cert.clone());
        async move { Python::start(port, &["--key", &key, "--cert", &cert]).await }
    };
    let url = format!("https://127.0.0.1:{port}");
    let broker = Broker::start().await;
    let plan = Plan::new(&broker.url(), &url)
        .set("HANDLER__SSL_OPTIONS__CACERTFILE", &authority.file())
        .set("HANDLER__MAX_OUTAGE", "infinity");
    let mut gateway = Process::run(&plan);
    let python = start(&good).await;
    let listener = gateway.address("devices on").await;
    let admin = gateway.admin().await;
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        let mut device = Device::dial(listener).await;
        device.conn = python.created(device.port()).await;
        device.send("before").await;
        devices.push(device);
    }
    let all = |n: f64| n > DEVICES as f64 - 0.5;
    admin.metric_until(&bytes_ended("ok"), all).await;
    python.kill().await;

    let python = start(&expired).await;
    let fault = "the certificate has expired: it was valid until 2002-01-01T00:00:00Z";
    let line = gateway.logged(fault).await;
    assert!(line.contains("handler channel is down"), "{line}");
    assert!(line.contains(&url), "{line}");
    let missing = format!("- handler default: {url}: {fault}");
    admin.ready_until(503, &missing).await;
    for device in &mut devices {
        device.send("meanwhile").await;
    }
    let mut new = Device::dial(listener).await;
    new.send("new").await;
    let all = |n: f64| n > DEVICES as f64 + 0.5;
    admin.metric_until(HELD, all).await;
    assert_eq!(python.kill().await, ["listening"]);

    let python = start(&good).await;
    new.conn = python.created(new.port()).await;
    admin
        .metric_until(&bytes_ended("ok"), |n| n > 2.0 * DEVICES as f64 + 0.5)
        .await;
    admin.ready_until(200, "ready").await;
    let notes = Notes::of(&python.output());
    assert_eq!(notes.created, [new.conn.as_str()]);
    assert_eq!(notes.bytes[&new.conn], ["new"]);
    for device in &devices {
        assert_eq!(notes.bytes[&device.conn], ["meanwhile"]);
    }
    gateway.signal("TERM");
    assert_eq!(gateway.exit().await, Some(0));
    let closed = Notes::of(&python.kill().await).closed;
    assert_eq!(closed.len(), DEVICES + 1);
    assert!(closed.iter().all(|(_, reason)| reason == "shutdown"));
}

/// Its machine's packets are dropped, all of them, and its half of each connection stays open:
/// every device waits, and its bytes come when the machine is back, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_drops_every_packet_is_an_outage() {
    if !network::own("a_machine_that_drops_every_packet_is_an_outage") {
        return;
    }
    for (arguments, streaming) in [(&[][..], "false"), (&["--streams"][..], "true")] {
        let arguments = [&["--host", network::FAR], arguments].concat();
        let python = Python::start(7000, &arguments).await;
        let address = format!("http://{}:7000", network::FAR);
        let service = match streaming {
            "true" => "ConnectionHandler",
            _ => "ConnectionUnaryHandler",
        };
        let stage = stage(
            &address,
            &[
                ("HANDLER__SERVICE_NAME", service),
                ("HANDLER__STREAMING", streaming),
                ("HANDLER__CONNECT_TIMEOUT", "500ms"),
                ("HANDLER__HEALTH_CHECK", "false"),
                ("HANDLER__REQUEST_TIMEOUT", "2s"),
            ],
        )
        .await;
        let mut devices = Vec::new();
        for _ in 0..DEVICES {
            let mut device = device(&stage, &python).await;
            device.send("before").await;
            devices.push(device);
        }
        // What was not answered yet would come again.
        let all = |n: f64| n > DEVICES as f64 - 0.5;
        stage.admin.metric_until(&bytes_ended("ok"), all).await;
        network::vanish();
        for device in &mut devices {
            device.send("in the dark").await;
        }
        stage.admin.ready_until(503, &address).await;
        stage.admin.metric_until(HELD, all).await;
        assert!(stage.admin.metric(UP).await < 0.5);
        network::return_again();
        let all = |n: f64| n > 2.0 * DEVICES as f64 - 0.5;
        stage.admin.metric_until(&bytes_ended("ok"), all).await;
        let notes = Notes::of(&python.output());
        assert_eq!(notes.created.len(), DEVICES);
        for device in &devices {
            assert_eq!(notes.bytes[&device.conn], ["before", "in the dark"]);
        }
        stage.finish().await;
        assert_eq!(Notes::of(&python.kill().await).closed.len(), DEVICES);
    }
}
