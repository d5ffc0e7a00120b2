//! Several handlers, and what each of them may do wrong: failover, health, Unix
//! sockets, statuses, restarts under load.

mod common;

use std::time::Duration;

use common::{Broker, Call, Device, Handler, Peer, Proxy, Python, Stage, free_port, within};
use exproto_sidecar::proto::ResultCode;
use tokio::net::{TcpStream, UnixListener};
use tonic::{Code, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// Channels that are up, of all handlers.
const UP: &str = "exproto_handler_channels_up{handler=\"default\"}";

/// Two handlers and one shard, so that new connections go to them in turn.
async fn two(first: Handler, keys: &[(&str, &str)]) -> (Stage, Handler) {
    let other = Handler::start().await;
    let both = format!("[\"{}\", \"{}\"]", first.url(), other.url());
    let mut all = vec![("HANDLER__ADDRESS", &*both), ("SHARDS", "1")];
    all.extend(keys);
    let stage = Stage::assemble(Broker::start().await, first, &all).await;
    stage.admin.metric_until(UP, |up| up > 1.5).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    (stage, other)
}

/// A device, and whether it is at the stage's own handler.
async fn device(stage: &Stage, other: &Handler) -> (Device, bool) {
    let mut device = Device::dial(stage.devices()).await;
    let port = device.port();
    let (conn, own) = tokio::select! {
        conn = stage.handler.created(port) => (conn, true),
        conn = other.created(port) => (conn, false),
    };
    device.conn = conn;
    (device, own)
}

/// A device at the stage's own handler, and one at the other.
async fn one_at_each(stage: &Stage, other: &Handler) -> [Device; 2] {
    let (first, own) = device(stage, other).await;
    let (second, second_own) = device(stage, other).await;
    assert_ne!(own, second_own, "not in turn");
    if own {
        [first, second]
    } else {
        [second, first]
    }
}

/// `failover = "recreate"`: the connections of a handler that dies move to the other one,
/// which is told of them first; what was cut off comes again. Those of the other stay. The
/// device's session stays too: what every handler does with a new connection is done already.
#[tokio::test]
async fn connections_move_to_the_handler_that_is_there() {
    let keys = [
        ("HANDLER__FAILOVER", "recreate"),
        ("HANDLER__FAILOVER_AFTER", "100ms"),
    ];
    let (mut stage, other) = two(Handler::start().await, &keys).await;
    let [mut moves, mut stays] = one_at_each(&stage, &other).await;
    for (device, clientid) in [(&moves, "moves"), (&stays, "stays")] {
        stage
            .adapter
            .authenticate(&device.conn, clientid)
            .await
            .ok();
        stage
            .adapter
            .subscribe(&device.conn, clientid, 1)
            .await
            .ok();
    }
    let ready = stage.admin.get("/readyz").await.body;
    assert!(ready.contains("handler default: connected\n"), "{ready}");
    let conninfo = stage.conninfo(&moves.conn);
    let _gate = stage.handler.hold("bytes");
    moves.send("cut off").await;
    stage.handler.bytes(&moves.conn, 7).await;
    stage.handler.kill().await;
    moves.send(", on").await;
    stays.send("here").await;
    assert_eq!(other.bytes(&moves.conn, 11).await, b"cut off, on");
    assert_eq!(other.bytes(&stays.conn, 4).await, b"here");
    let created = other.events().into_iter().find(|e| e.conn == moves.conn);
    assert_eq!(created.unwrap().call, Call::Created(conninfo));
    assert_eq!(other.names(&stays.conn), ["created", "bytes"]);
    let failovers = "exproto_handler_failovers_total{handler=\"default\"}";
    stage
        .admin
        .metric_until(failovers, |n| (n - 1.0).abs() < 0.1)
        .await;
    let away = format!("connected, but not {}: ", stage.handler.url());
    stage.admin.ready_until(200, &away).await;
    stage.adapter.authenticate(&moves.conn, "moves").await.ok();
    for (conn, clientid) in [(&moves.conn, "another"), (&stays.conn, "stays")] {
        let answer = stage.adapter.authenticate(conn, clientid).await;
        answer.refused(ResultCode::PermissionDeny);
    }
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("moves", 1, "before it subscribes").await;
    assert_eq!(
        other.payloads(&moves.conn, 1).await,
        ["before it subscribes"]
    );
    stage.adapter.subscribe(&moves.conn, "moves", 1).await.ok();
    // New ones go to who is left, and a moved one ends there.
    let (_new, own) = device(&stage, &other).await;
    assert!(!own);
    let conn = moves.conn.clone();
    drop(moves);
    assert_eq!(other.closed(&conn).await, "normal");
    stage.finish().await;
    other.check();
}

/// `failover = "hold"`, the default: a connection waits for the handler that knows it.
#[tokio::test]
async fn connections_wait_for_their_own_handler() {
    let (mut stage, other) = two(Handler::start().await, &[]).await;
    let [mut waits, _stays] = one_at_each(&stage, &other).await;
    stage.handler.kill().await;
    stage.admin.metric_until(UP, |up| up < 1.5).await;
    waits.send("later").await;
    let held = "exproto_connections_held{handler=\"default\"}";
    stage.admin.metric_until(held, |n| n > 0.5).await;
    let (_new, own) = device(&stage, &other).await;
    assert!(!own);
    stage.handler.up().await;
    assert_eq!(stage.handler.bytes(&waits.conn, 5).await, b"later");
    assert!(other.names(&waits.conn).is_empty());
    stage.finish().await;
    other.check();
}

/// A handler that allows few calls at a time, as proxies do, is given no more, and the time that a
/// callback waits for its turn is not the handler's: with ten devices and half a second for each,
/// two at a time, the last one waits longer than an answer may take.
#[tokio::test]
async fn a_handler_may_allow_few_calls() {
    let mut handler = Handler::absent();
    handler.max_calls = Some(6);
    handler.up().await;
    let keys = [
        ("HANDLER__REQUEST_TIMEOUT", "2s"),
        ("HANDLER__HEALTH_CHECK", "false"),
        ("SHARDS", "1"),
    ];
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let mut devices = Vec::new();
    for _ in 0..10 {
        devices.push(stage.device().await);
    }
    stage.handler.behave(|event| async move {
        if let Call::Bytes(_) = &event.call {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    });
    for device in &mut devices {
        device.send("slowly").await;
    }
    for device in &devices {
        assert_eq!(stage.handler.bytes(&device.conn, 6).await, b"slowly");
        assert_eq!(stage.handler.names(&device.conn), ["created", "bytes"]);
    }
    assert_eq!(stage.gateway.connections(), 10);
    stage.finish().await;
}

/// Each status of gRPC: UNAVAILABLE is tried again, every other one closes.
#[tokio::test]
async fn what_each_status_does() {
    let stage = Stage::start().await;
    for code in (1..=16).map(Code::from_i32) {
        stage.handler.behave(|event| async move {
            let Call::Bytes(bytes) = &event.call else {
                return Ok(());
            };
            match std::str::from_utf8(bytes).unwrap().parse() {
                Ok(code) => Err(Status::new(Code::from_i32(code), "as the device wishes")),
                Err(_) => Ok(()),
            }
        });
        let mut device = stage.device().await;
        device.send((code as i32).to_string()).await;
        if code == Code::Unavailable {
            // It is tried until the handler takes it.
            stage.handler.bytes(&device.conn, 3 * 2).await;
            stage.handler.behave(|_| async { Ok(()) });
            continue;
        }
        assert_eq!(stage.closed(&device).await, "handler_error", "{code:?}");
        device.closed().await;
    }
    stage.finish().await;
}

/// `at_least_once = false`: what may have been taken is not sent again, what was not
/// sent is.
#[tokio::test]
async fn nothing_is_sent_twice_where_that_is_not_wished() {
    let mut stage = Stage::with(&[("HANDLER__AT_LEAST_ONCE", "false")]).await;
    let mut cut = stage.device().await;
    let mut held = stage.device().await;
    let gate = stage.handler.hold("bytes");
    cut.send("once").await;
    stage.handler.bytes(&cut.conn, 4).await;
    stage.handler.kill().await;
    stage.admin.ready_until(503, "- handler default: ").await;
    held.send("not sent").await;
    gate.open();
    stage.handler.up().await;
    assert_eq!(stage.handler.bytes(&held.conn, 8).await, b"not sent");
    assert_eq!(stage.closed(&cut).await, "handler_unavailable");
    assert_eq!(
        stage.handler.names(&cut.conn),
        ["created", "bytes", "closed"]
    );
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Bytes(_) => Err(Status::unavailable("perhaps it was taken")),
            _ => Ok(()),
        }
    });
    held.send("!").await;
    assert_eq!(stage.closed(&held).await, "handler_unavailable");
    assert_eq!(stage.handler.bytes(&held.conn, 9).await, b"not sent!");
    stage.finish().await;
}

/// A handler that says NOT_SERVING keeps its connections and gets no new ones.
#[tokio::test]
async fn a_handler_that_does_not_serve_gets_no_new_connections() {
    let mut handler = Handler::absent();
    let reporter = HealthReporter::new();
    handler.health = Some(reporter.clone());
    handler.up().await;
    let channels = |state: &str| {
        let url = format!("http://127.0.0.1:{}", handler.port);
        format!(
            "exproto_handler_channels{{handler=\"default\",address=\"{url}\",state=\"{state}\"}}"
        )
    };
    let (up, not_serving) = (channels("up"), channels("not_serving"));
    let (stage, other) = two(handler, &[("HANDLER__HEALTH_INTERVAL", "50ms")]).await;
    let [mut old, _other] = one_at_each(&stage, &other).await;
    reporter
        .set_service_status("", ServingStatus::NotServing)
        .await;
    stage.admin.metric_until(&not_serving, |n| n > 0.5).await;
    for _ in 0..4 {
        assert!(!device(&stage, &other).await.1);
    }
    old.send("still here").await;
    stage.handler.bytes(&old.conn, 10).await;
    reporter
        .set_service_status("", ServingStatus::Serving)
        .await;
    stage.admin.metric_until(&up, |n| n > 0.5).await;
    one_at_each(&stage, &other).await;
    stage.finish().await;
    other.check();
}

/// A handler behind a Unix socket.
#[tokio::test]
async fn a_handler_on_a_unix_socket() {
    let handler = Handler::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("handler.sock");
    let (listener, port) = (UnixListener::bind(&path).unwrap(), handler.port);
    let relay = tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
        }
    });
    let address = format!("unix:{}", path.display());
    let keys = [("HANDLER__ADDRESS", &*address)];
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let mut device = stage.device().await;
    device.send("by a path").await;
    assert_eq!(stage.handler.bytes(&device.conn, 9).await, b"by a path");
    stage.finish().await;
    relay.abort();
}

/// A link on which everything vanishes: the callback on it is lost with its connection,
/// and everything after goes over a new channel.
#[tokio::test]
async fn a_blackholed_link_is_replaced() {
    let handler = Handler::start().await;
    let proxy = Proxy::to(handler.port).await;
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let keys = [
        ("HANDLER__ADDRESS", &*address),
        ("HANDLER__REQUEST_TIMEOUT", "500ms"),
        ("HANDLER__HEALTH_CHECK", "false"),
        ("SHARDS", "1"),
    ];
    let stage = Stage::assemble(Broker::start().await, handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let (mut lost, mut quiet) = (stage.device().await, stage.device().await);
    let answered =
        "exproto_callback_duration_seconds_count{handler=\"default\",method=\"OnSocketCreated\"}";
    stage.admin.metric_until(answered, |n| n > 1.5).await;
    // What is connected now swallows everything for ever; new connections work.
    proxy.blackhole();
    proxy.mend();
    lost.send("into the hole").await;
    lost.closed().await;
    quiet.send("around it").await;
    assert_eq!(stage.handler.bytes(&quiet.conn, 9).await, b"around it");
    assert!(stage.handler.bytes(&lost.conn, 0).await.is_empty());
    // Its end is told over the new channel.
    assert_eq!(stage.closed(&lost).await, "handler_error");
    let untold = "exproto_closed_callbacks_lost_total{handler=\"default\"}";
    assert!(stage.admin.metric(untold).await < 0.5);
    stage.finish().await;
}

/// How many devices are at each of two handlers of which one sleeps, and how often those
/// of the other one say something and hear it again.
const SLEEPERS: usize = 20;
const ROUNDS: usize = 50;

/// Round trips of these devices with a handler that sends back what it gets.
async fn round_trips(stage: &Stage, handler: &Handler, devices: &mut [Device]) {
    let adapter = stage.adapter.clone();
    handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if let Call::Bytes(bytes) = event.call {
                adapter.send(&event.conn, bytes).await.ok();
            }
            Ok(())
        }
    });
    for round in 0..ROUNDS {
        let text = format!("{round:04}");
        for device in &mut *devices {
            device.send(&text).await;
        }
        for device in &mut *devices {
            assert_eq!(device.read_text(4).await, text);
        }
    }
}

/// A handler that sleeps slows its own connections, also with as many callbacks as may be
/// under way, and nobody at the other address.
#[tokio::test]
async fn a_handler_that_sleeps_slows_only_its_own() {
    for streaming in [false, true] {
        let mut keys = vec![
            ("HANDLER__MAX_IN_FLIGHT", "4"),
            ("HANDLER__REQUEST_TIMEOUT", "10m"),
        ];
        if streaming {
            keys.push(("HANDLER__SERVICE_NAME", "ConnectionHandler"));
            keys.push(("HANDLER__STREAMING", "true"));
        }
        let (stage, other) = two(Handler::start().await, &keys).await;
        let (mut asleep, mut awake) = (Vec::new(), Vec::new());
        for _ in 0..2 * SLEEPERS {
            match device(&stage, &other).await {
                (device, true) => asleep.push(device),
                (device, false) => awake.push(device),
            }
        }
        assert_eq!((asleep.len(), awake.len()), (SLEEPERS, SLEEPERS));
        let gate = stage.handler.hold("bytes");
        for device in &mut asleep {
            device.send("good night").await;
        }
        // One by one a stream's messages are taken.
        let begun = if streaming { 1 } else { 4 };
        let asleep_with = |log: &common::Log| {
            let calls = log.events.iter();
            let bytes = calls.filter(|event| matches!(event.call, Call::Bytes(_)));
            bytes.count()
        };
        let enough = |log: &common::Log| (asleep_with(log) >= begun).then_some(());
        stage.handler.wait("callbacks that sleep", enough).await;
        let in_flight = "exproto_callbacks_in_flight{handler=\"default\"}";
        let all = |n: f64| n > SLEEPERS as f64 - 0.5;
        stage.admin.metric_until(in_flight, all).await;
        round_trips(&stage, &other, &mut awake).await;
        // It slept all the time.
        assert_eq!(
            stage.handler.wait("", |log| Some(asleep_with(log))).await,
            begun
        );
        assert!(all(stage.admin.metric(in_flight).await));
        gate.open();
        for device in &asleep {
            assert_eq!(stage.handler.bytes(&device.conn, 10).await, b"good night");
        }
        stage.finish().await;
        other.check();
    }
}

/// The same of two handlers with names, one of which is in Python, has fewer threads than
/// there are devices, and never wakes up.
#[tokio::test]
async fn a_named_handler_that_sleeps_slows_only_its_own() {
    let port = free_port();
    let mut python = Python::start(port, &[]).await;
    let stage = Stage::with(&[
        (
            "HANDLERS__SLEEPS__ADDRESS",
            &format!("http://127.0.0.1:{port}"),
        ),
        ("HANDLERS__SLEEPS__REQUEST_TIMEOUT", "10m"),
        ("LISTENERS__TCP__SLEEPS__BIND", "127.0.0.1:0"),
        ("LISTENERS__TCP__SLEEPS__HANDLER", "sleeps"),
    ])
    .await;
    let sleeps = stage.gateway.addresses().listeners["tcp.sleeps"];
    let mut asleep = Vec::new();
    for _ in 0..SLEEPERS {
        let mut device = Device::dial(sleeps).await;
        device.send("sleep").await;
        asleep.push(device);
    }
    // Its threads sleep, and the rest waits in its queue.
    python.printed("bytes ", 10).await;
    let in_flight = "exproto_callbacks_in_flight{handler=\"sleeps\"}";
    let all = |n: f64| n > SLEEPERS as f64 - 0.5;
    stage.admin.metric_until(in_flight, all).await;
    let mut awake = Vec::new();
    for _ in 0..SLEEPERS {
        awake.push(stage.device().await);
    }
    round_trips(&stage, &stage.handler, &mut awake).await;
    assert!(python.runs());
    assert_eq!(python.printed("bytes ", 10).await.len(), 10);
    assert!(all(stage.admin.metric(in_flight).await));
    python.kill().await;
    stage.finish().await;
}
