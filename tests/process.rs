//! The program: command line, signals, exit codes, what it prints and what it never
//! prints.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use common::{
    Adapter, Authority, Broker, Call, Device, Handler, Peer, Plan, Process, client, free_port,
    within,
};
use exproto_sidecar::proto::ResultCode;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::Status;

/// A program with its broker and handler, ready.
struct Scene {
    broker: Broker,
    handler: Handler,
    program: Process,
    adapter: Adapter,
}

impl Scene {
    async fn with(keys: &[(&str, &str)]) -> Self {
        let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
        let plan = Plan::new(&broker.url(), &handler.url()).set_all(keys);
        let program = Process::run(&plan);
        let adapter = Adapter::connect(program.address("adapter on").await).await;
        Self {
            broker,
            handler,
            program,
            adapter,
        }
    }

    async fn device(&self) -> Device {
        let mut device = Device::dial(self.program.address("devices on").await).await;
        device.conn = self.handler.created(device.port()).await;
        device
    }
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    pairs.iter().map(own).collect()
}

/// Runs to the end: exit code, standard output, standard error.
async fn run(arguments: &[&str], env: &[(String, String)]) -> (Option<i32>, String, String) {
    let mut program = Process::start(arguments, env);
    let code = program.exit().await;
    (code, program.output().join("\n"), program.log().join("\n"))
}

/// One line on standard output when ready, not before, with the real addresses;
/// `/readyz` answers 503 before and 200 from then on.
#[tokio::test]
async fn one_line_tells_that_it_is_ready() {
    let mut broker = Broker::absent("allow_anonymous true\n");
    let handler = Handler::start().await;
    let admin_port = free_port();
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("ADMIN__BIND", &format!("127.0.0.1:{admin_port}"));
    let mut program = Process::run(&plan);
    let admin = common::Admin((Ipv4Addr::LOCALHOST, admin_port).into());
    admin.ready_until(503, "- broker link 0").await;
    assert_eq!(admin.get("/healthz").await.status, 200);
    assert!(program.output().is_empty(), "{:?}", program.output());
    broker.up().await;
    let line = program.printed("is ready").await;
    assert_eq!(admin.get("/readyz").await.status, 200);
    assert!(
        line.contains(&format!("admin on 127.0.0.1:{admin_port}")),
        "{line}"
    );
    Device::dial(program.address("devices on").await).await;
    Adapter::connect(program.address("adapter on").await).await;
    program.signal("TERM");
    assert_eq!(program.exit().await, Some(0));
    assert_eq!(program.output(), [line], "one line and no more");
}

/// SIGTERM and SIGINT drain: callbacks in flight finish, every connection gets
/// OnSocketClosed (`shutdown`), `/readyz` answers 503 meanwhile, nobody new comes in,
/// exit 0.
#[tokio::test]
async fn a_signal_drains_and_exits_with_0() {
    for signal in ["TERM", "INT"] {
        let mut scene = Scene::with(&[]).await;
        let mut busy = scene.device().await;
        let mut quiet = scene.device().await;
        let gate = scene.handler.hold("bytes");
        busy.send("work").await;
        scene.handler.bytes(&busy.conn, 4).await;
        let admin = scene.program.admin().await;
        let devices = scene.program.address("devices on").await;
        scene.program.signal(signal);
        assert_eq!(scene.handler.closed(&quiet.conn).await, "shutdown");
        assert_eq!(quiet.read_all().await, b"");
        admin.ready_until(503, "draining").await;
        assert_eq!(admin.get("/healthz").await.status, 200);
        let refused = tokio::net::TcpStream::connect(devices).await;
        assert!(refused.is_err(), "still accepts");
        // The handler that is still at work can still use the adapter.
        scene.adapter.raw_publish("up", 1, "last words").await.ok();
        gate.open();
        assert_eq!(scene.handler.closed(&busy.conn).await, "shutdown");
        assert_eq!(busy.read_all().await, b"");
        assert_eq!(scene.program.exit().await, Some(0));
        scene.handler.check();
    }
}

/// A second signal exits at once.
#[tokio::test]
async fn a_second_signal_exits_at_once() {
    let mut scene = Scene::with(&[("HANDLER__REQUEST_TIMEOUT", "60s")]).await;
    let mut device = scene.device().await;
    let gate = scene.handler.hold("bytes");
    device.send("hangs").await;
    scene.handler.bytes(&device.conn, 5).await;
    scene.program.signal("TERM");
    scene.program.logged("draining").await;
    let begun = Instant::now();
    scene.program.signal("TERM");
    let code = scene.program.exit().await;
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
    gate.open();
}

/// A signal before it is ready ends it as well.
#[tokio::test]
async fn a_signal_ends_it_also_while_it_waits() {
    let plan = Plan::new(
        &format!("mqtt://127.0.0.1:{}", free_port()),
        &format!("http://127.0.0.1:{}", free_port()),
    );
    let mut program = Process::run(&plan);
    program.logged("listening").await;
    program.signal("TERM");
    assert_eq!(program.exit().await, Some(0));
    assert!(program.output().is_empty());
}

/// SIGHUP, which is to reload one day, ends nothing.
#[tokio::test]
async fn a_hangup_ends_nothing() {
    let mut scene = Scene::with(&[]).await;
    let mut device = scene.device().await;
    scene.program.signal("HUP");
    device.send("still here").await;
    scene.handler.bytes(&device.conn, 10).await;
    scene.device().await;
    scene.program.signal("TERM");
    assert_eq!(scene.program.exit().await, Some(0));
    assert_eq!(scene.handler.closed(&device.conn).await, "shutdown");
}

/// A callback that never ends is given up after `shutdown_timeout`; exit 0 all the
/// same.
#[tokio::test]
async fn a_drain_has_an_end() {
    let keys = [
        ("SHUTDOWN_TIMEOUT", "500ms"),
        ("HANDLER__REQUEST_TIMEOUT", "60s"),
    ];
    let mut scene = Scene::with(&keys).await;
    let mut device = scene.device().await;
    let gate = scene.handler.hold("bytes");
    device.send("hangs").await;
    scene.handler.bytes(&device.conn, 5).await;
    let begun = Instant::now();
    scene.program.signal("TERM");
    assert_eq!(scene.program.exit().await, Some(0));
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    scene
        .program
        .logged("left when the time to drain was over")
        .await;
    gate.open();
}

/// A configuration at fault: exit 2 and one message with every fault, the key, what
/// was found and what is allowed; nothing on standard output.
#[tokio::test]
async fn a_bad_configuration_exits_with_2_and_tells_every_fault() {
    let bad = env(&[
        ("EXPROTO_IDLE_TIMEOUT", "soon"),
        ("EXPROTO_BROKER__POOL_SIZE", "0"),
        ("EXPROTO_NO_SUCH_KEY", "1"),
    ]);
    for arguments in [&[][..], &["run"], &["check"]] {
        let (code, out, err) = run(arguments, &bad).await;
        assert_eq!(code, Some(2), "{err}");
        assert_eq!(out, "");
        for part in [
            "EXPROTO_IDLE_TIMEOUT",
            "idle_timeout",
            "soon",
            "broker.pool_size",
            "EXPROTO_NO_SUCH_KEY",
        ] {
            assert!(err.contains(part), "{part} is not in: {err}");
        }
    }
}

/// A missing file, named on the command line or in the environment: exit 2, and its
/// name.
#[tokio::test]
async fn a_missing_file_exits_with_2() {
    let (code, _, err) = run(&["--config", "/nowhere/a.toml"], &[]).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("/nowhere/a.toml"), "{err}");
    let named = env(&[("EXPROTO_CONFIG", "/nowhere/b.toml")]);
    let (code, _, err) = run(&["check"], &named).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("/nowhere/b.toml"), "{err}");
}

/// A certificate that is none: exit 2, also by `check`, and its file's name.
#[tokio::test]
async fn a_bad_certificate_exits_with_2() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("not-a.pem");
    fs::write(&file, "nothing of the kind").unwrap();
    let file = file.to_str().unwrap();
    let keys = env(&[
        ("EXPROTO_SERVER__SSL_OPTIONS__ENABLE", "true"),
        ("EXPROTO_SERVER__SSL_OPTIONS__CERTFILE", file),
        ("EXPROTO_SERVER__SSL_OPTIONS__KEYFILE", file),
    ]);
    for arguments in [&["check"][..], &["run"]] {
        let (code, _, err) = run(arguments, &keys).await;
        assert_eq!(code, Some(2), "{err}");
        assert!(
            err.contains("server.ssl_options") && err.contains("not-a.pem"),
            "{err}"
        );
    }
}

/// An authority's file of a handler that is there, but has no certificate in it: the same, and
/// which handler's it is.
#[tokio::test]
async fn a_bad_authority_of_a_handler_exits_with_2() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let key = fs::read_to_string(authority.server("127.0.0.1").key).unwrap();
    let good = fs::read_to_string(authority.file()).unwrap();
    let file = dir.path().join("handlers.pem");
    let path = file.to_str().unwrap();
    for name in ["handler", "handlers.meters"] {
        let keys = env(&[
            ("EXPROTO_HANDLER__ADDRESS", "https://127.0.0.1:1"),
            ("EXPROTO_HANDLERS__METERS__ADDRESS", "https://127.0.0.1:2"),
        ]);
        let set = format!("{name}.ssl_options.cacertfile={path}");
        let check = ["check", "--set", &set];
        let cut = &good[..good.len() / 2];
        for bad in ["", "nothing of the kind", &key, cut] {
            fs::write(&file, bad).unwrap();
            let (code, out, err) = run(&check, &keys).await;
            assert_eq!(code, Some(2), "{bad:?}: {err}");
            assert_eq!(out, "");
            let named = format!("\n{name}.ssl_options: {path}: a certificate in PEM is needed: ");
            assert!(err.contains(&named), "{bad:?}: {err}");
        }
        fs::write(&file, &good).unwrap();
        let (code, _, err) = run(&check, &keys).await;
        assert_eq!(code, Some(0), "{err}");
    }
}

/// An unknown command or option: exit 2 from the command line's own check.
#[tokio::test]
async fn a_bad_command_line_exits_with_2() {
    for arguments in [&["fly"][..], &["--colour", "red"], &["--set", "nothing"]] {
        let (code, out, err) = run(arguments, &[]).await;
        assert_eq!(code, Some(2), "{err}");
        assert_eq!(out, "");
        assert!(!err.is_empty());
    }
}

/// A port that is taken: exit 1, and which key and address.
#[tokio::test]
async fn a_taken_port_exits_with_1() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (key, name) in [
        (
            "LISTENERS__TCP__DEFAULT__BIND",
            "listeners.tcp.default.bind",
        ),
        ("SERVER__BIND", "server.bind"),
        ("ADMIN__BIND", "admin.bind"),
    ] {
        let plan = Plan::new("mqtt://127.0.0.1:1", "http://127.0.0.1:1").set(key, &address);
        let mut program = Process::run(&plan);
        assert_eq!(program.exit().await, Some(1));
        let err = program.log().join("\n");
        assert!(err.contains(&address) && err.contains(name), "{err}");
        assert!(program.output().is_empty());
    }
}

/// Layers: command line over environment over file over defaults; `check` prints what
/// is in effect, with secrets masked, as TOML that loads again.
#[tokio::test]
async fn check_prints_what_is_in_effect_and_no_secret() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("gateway.toml");
    let text = "node_name = \"from-file\"\nidle_timeout = \"7s\"\n[broker]\n\
                username = \"user\"\npassword = \"file-secret\"\nkeep_alive = \"11s\"\n";
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let variables = env(&[
        ("EXPROTO_CONFIG", file),
        ("EXPROTO_IDLE_TIMEOUT", "8s"),
        ("EXPROTO_BROKER__KEEP_ALIVE", "12s"),
    ]);
    let set = ["check", "--set", "broker.keep_alive=13s"];
    let (code, out, err) = run(&set, &variables).await;
    assert_eq!(code, Some(0), "{err}");
    for line in [
        "node_name = \"from-file\"",
        "idle_timeout = \"8s\"",
        "keep_alive = \"13s\"",
    ] {
        assert!(out.contains(line), "{line} is not in: {out}");
    }
    assert!(
        !out.contains("file-secret") && !err.contains("file-secret"),
        "{out}"
    );
    assert!(out.contains("username = \"user\""), "{out}");
    let again = dir.path().join("again.toml");
    fs::write(&again, &out).unwrap();
    let (code, second, err) = run(&["check", "--config", again.to_str().unwrap()], &[]).await;
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(out, second);
}

/// A secret at fault is not shown in the report either.
#[tokio::test]
async fn a_fault_does_not_show_a_secret() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("secret");
    fs::write(&file, "secret-of-the-file\n").unwrap();
    let bad = env(&[
        ("EXPROTO_BROKER__PASSWORD", "secret-of-the-variable"),
        ("EXPROTO_BROKER__PASSWORD_FILE", file.to_str().unwrap()),
        ("EXPROTO_BROKER__PASSWORT", "secret-of-the-typo"),
    ]);
    let (code, out, err) = run(&["check"], &bad).await;
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("password_file"), "{err}");
    for secret in [
        "secret-of-the-variable",
        "secret-of-the-file",
        "secret-of-the-typo",
    ] {
        assert!(!out.contains(secret) && !err.contains(secret), "{err}");
    }
}

/// `default-config` is the file in `config/`, and is valid.
#[tokio::test]
async fn the_default_file_is_the_one_in_the_repository() {
    let mut program = Process::start(&["default-config"], &[]);
    assert_eq!(program.exit().await, Some(0));
    let printed = program.output().join("\n") + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/config/default.toml");
    let kept = fs::read_to_string(path).expect(path);
    assert!(
        printed == kept,
        "{path} differs: exproto-sidecar default-config > config/default.toml"
    );
    let (code, with_file, err) = run(&["check", "--config", path], &[]).await;
    assert_eq!(code, Some(0), "{err}");
    let (code, without, _) = run(&["check"], &[]).await;
    assert_eq!(code, Some(0));
    assert_eq!(with_file, without, "the file changes something");
}

/// JSON logs: every line is an object, and each line about a connection has its
/// `conn`.
#[tokio::test]
async fn json_logs_carry_the_connection() {
    let keys = [("LOG__FORMAT", "json"), ("LOG__LEVEL", "trace")];
    let mut scene = Scene::with(&keys).await;
    scene.handler.behave(|event| async move {
        match event.call {
            Call::Bytes(_) => Err(tonic::Status::internal("refused by the test")),
            _ => Ok(()),
        }
    });
    let mut device = scene.device().await;
    scene.adapter.authenticate(&device.conn, "c").await.ok();
    let answer = scene.adapter.publish(&device.conn, "t", 9, "x").await;
    answer.refused(ResultCode::ParamsTypeError);
    device.send("bad").await;
    device.closed().await;
    assert_eq!(scene.handler.closed(&device.conn).await, "handler_error");
    scene.program.signal("TERM");
    assert_eq!(scene.program.exit().await, Some(0));
    let lines: Vec<Value> = scene
        .program
        .log()
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let about = |part: &str| {
        let found = lines.iter().find(|line| {
            line["message"]
                .as_str()
                .is_some_and(|message| message.contains(part))
        });
        found.unwrap_or_else(|| panic!("no line says {part:?}: {lines:#?}"))
    };
    // In its span, or as a field of the line itself.
    for part in [
        "connection opened",
        "callback failed",
        "connection closed",
        "refused",
    ] {
        let line = about(part);
        let conn = line["span"]["conn"].as_str().or(line["conn"].as_str());
        assert_eq!(conn, Some(device.conn.as_str()), "{line}");
    }
    // Whatever is said within the span of a connection says whose it is.
    for line in &lines {
        if line["span"]["name"] == "connection" {
            assert!(line["span"]["conn"].is_string(), "{line}");
        }
    }
}

/// At trace level, in both formats, through everything that touches a password: the
/// device's and the broker's are nowhere.
#[tokio::test]
async fn passwords_are_in_no_log() {
    for format in ["text", "json"] {
        let keys = [
            ("LOG__LEVEL", "trace"),
            ("LOG__FORMAT", format),
            ("BROKER__USERNAME", "gateway"),
            ("BROKER__PASSWORD", "hunter2-of-the-broker"),
        ];
        let mut scene = Scene::with(&keys).await;
        let mut peer = Peer::connect(scene.broker.port).await;
        peer.subscribe("up").await;
        let device = scene.device().await;
        let password = "hunter2-of-the-device";
        for info in [
            None,
            Some(client("")),
            Some(client("c")),
            Some(client("again")),
        ] {
            let adapter = &scene.adapter;
            adapter.authenticate_as(&device.conn, info, password).await;
        }
        let answer = scene
            .adapter
            .authenticate_as("nonsense", Some(client("x")), password)
            .await;
        answer.refused(ResultCode::ParamsTypeError);
        scene.adapter.publish(&device.conn, "up", 1, "x").await.ok();
        peer.next().await;
        // A login that the broker refuses is told, without the password.
        scene.broker.kill();
        let admin = scene.program.admin().await;
        admin.ready_until(503, "- broker").await;
        scene.program.signal("TERM");
        assert_eq!(scene.program.exit().await, Some(0));
        let log = [scene.program.log(), scene.program.output()]
            .concat()
            .join("\n");
        assert!(
            log.contains("connection opened"),
            "not at trace level: {log}"
        );
        assert!(!log.contains("hunter2"), "{log}");
        // Not in another form either.
        for encoded in ["68756e74657232", "aHVudGVyMg"] {
            assert!(!log.contains(encoded), "{log}");
        }
        let bytes = "104, 117, 110, 116, 101, 114, 50";
        assert!(!log.contains(bytes), "{log}");
    }
}

/// `/metrics` is Prometheus text with help, and no label holds a connection, a client
/// or a topic.
#[tokio::test]
async fn metrics_have_help_and_no_private_labels() {
    let scene = Scene::with(&[]).await;
    let device = scene.device().await;
    scene
        .adapter
        .authenticate(&device.conn, "a-client")
        .await
        .ok();
    scene
        .adapter
        .publish(&device.conn, "a/topic", 1, "x")
        .await
        .ok();
    scene
        .adapter
        .subscribe(&device.conn, "a/topic", 1)
        .await
        .ok();
    let admin = scene.program.admin().await;
    let page = admin.get("/metrics").await;
    assert_eq!(page.status, 200);
    assert!(
        page.head.contains("text/plain; version=0.0.4"),
        "{}",
        page.head
    );
    let samples = page
        .body
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut count = 0;
    for sample in samples {
        let name = sample.split(['{', ' ']).next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .unwrap_or(name);
        assert!(family.starts_with("exproto_"), "{sample}");
        assert!(
            page.body.contains(&format!("# HELP {family} ")),
            "no help: {sample}"
        );
        count += 1;
    }
    assert!(count > 20, "{}", page.body);
    for private in [device.conn.as_str(), "a-client", "a/topic"] {
        assert!(!page.body.contains(private), "{private} in the metrics");
    }
    assert_eq!(admin.get("/nothing").await.status, 404);
}

/// `admin.bind = ""` turns the admin server off.
#[tokio::test]
async fn the_admin_server_can_be_turned_off() {
    let scene = Scene::with(&[("ADMIN__BIND", "")]).await;
    let line = scene.program.printed("is ready").await;
    assert!(!line.contains("admin"), "{line}");
}

/// `--version` and `--help` say what they should and exit with 0.
#[tokio::test]
async fn version_and_help() {
    let (code, out, _) = run(&["--version"], &[]).await;
    assert_eq!(code, Some(0));
    assert!(out.contains(env!("CARGO_PKG_VERSION")), "{out}");
    let (code, out, _) = run(&["--help"], &[]).await;
    assert_eq!(code, Some(0));
    for word in ["run", "check", "default-config", "quickstart", "--config"] {
        assert!(out.contains(word), "{word} is not in: {out}");
    }
}

/// A gateway that was killed and starts anew finds nothing of its old sessions that
/// disturbs it: what the old one subscribed is gone.
#[tokio::test]
async fn a_killed_gateway_starts_clean() {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let plan = Plan::new(&broker.url(), &handler.url()).set("BROKER__POOL_SIZE", "1");
    let program = Process::run(&plan);
    let adapter = Adapter::connect(program.address("adapter on").await).await;
    let mut device = Device::dial(program.address("devices on").await).await;
    device.conn = handler.created(device.port()).await;
    adapter.authenticate(&device.conn, "c").await.ok();
    adapter.subscribe(&device.conn, "old", 1).await.ok();
    program.signal("KILL");
    let mut program = program;
    program.exit().await;
    device.closed().await;
    let mut peer = Peer::connect(broker.port).await;
    peer.publish("old", 1, "waits at the broker").await;
    let mut program = Process::run(&plan);
    let adapter = Adapter::connect(program.address("adapter on").await).await;
    let mut device = Device::dial(program.address("devices on").await).await;
    device.conn = handler.created(device.port()).await;
    adapter.authenticate(&device.conn, "c").await.ok();
    adapter.subscribe(&device.conn, "new", 1).await.ok();
    peer.publish("new", 1, "fresh").await;
    assert_eq!(handler.payloads(&device.conn, 1).await, ["fresh"]);
    program.signal("TERM");
    assert_eq!(program.exit().await, Some(0));
    // Its session does not stay behind at the broker.
    within(
        "the goodbye",
        broker.logged("Received DISCONNECT from exproto"),
    )
    .await;
}

/// Devices from many addresses whose callbacks all fail write a few lines, and the others
/// are counted.
#[tokio::test]
async fn a_flood_does_not_fill_the_log() {
    const DEVICES: u8 = 250;
    let begun = Instant::now();
    let scene = Scene::with(&[("SHARDS", "1")]).await;
    scene
        .handler
        .behave(|_| async { Err(Status::internal("not today")) });
    let to = scene.program.address("devices on").await;
    let mut devices = Vec::new();
    for host in 1..=DEVICES {
        devices.push(Device::dial_from(&format!("127.0.4.{host}"), to).await);
    }
    let closed =
        "exproto_connections_closed_total{listener=\"tcp.default\",reason=\"handler_error\"}";
    let all = f64::from(DEVICES) - 0.5;
    let admin = scene.program.admin().await;
    admin.metric_until(closed, |n| n > all).await;
    let log = scene.program.log();
    let told = log.iter().filter(|line| line.contains("a callback failed"));
    // Ten in ten seconds.
    let most = 10 * (1 + begun.elapsed().as_secs() / 10);
    let told = told.count() as u64;
    assert!((1..=most).contains(&told), "{told} lines");
}
