//! Ways to a handler on which nothing comes through: black holes, half-open channels,
//! servers of something else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::time::{Duration, Instant};

use common::{
    Broker, Device, Gate, Handler, Plan, Process, Proxy, Python, Stage, free_port, network, within,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Channels that are up, of all addresses.
const UP: &str = "exproto_handler_channels_up{handler=\"default\"}";

/// Connections whose callback waits for a handler that is away.
const HELD: &str = "exproto_connections_held{handler=\"default\"}";

/// OnSocketClosed that no handler took.
const LOST: &str = "exproto_closed_callbacks_lost_total{handler=\"default\"}";

/// A handler behind a proxy, and the keys that lead there, on one shard.
async fn behind_proxy(keys: &[(&str, &str)]) -> (Handler, Proxy, Vec<(String, String)>) {
    let handler = Handler::start().await;
    let proxy = Proxy::to(handler.port).await;
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let own = [("HANDLER__ADDRESS", &*address), ("SHARDS", "1")];
    let keys = own.iter().chain(keys);
    let keys = keys.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    (handler, proxy, keys.collect())
}

async fn assemble(handler: Handler, keys: &[(String, String)]) -> Stage {
    let keys: Vec<_> = keys.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    Stage::assemble(Broker::start().await, handler, &keys).await
}

async fn up(stage: &Stage, count: usize) {
    let is = |up: f64| (up - count as f64).abs() < 0.1;
    stage.admin.metric_until(UP, is).await;
}

/// Connected, but no word ever comes: such a channel is not up, and devices are held
/// until there is one.
#[tokio::test]
async fn a_black_hole_is_not_up() {
    let keys = [
        ("HANDLER__CONNECT_TIMEOUT", "200ms"),
        ("HANDLER__HEALTH_CHECK", "false"),
        ("HANDLER__REQUEST_TIMEOUT", "200ms"),
    ];
    let (handler, proxy, keys) = behind_proxy(&keys).await;
    proxy.blackhole();
    let stage = assemble(handler, &keys).await;
    let text = stage
        .admin
        .ready_until(503, "no word of HTTP/2 within 200ms")
        .await;
    let expected = format!("- handler default: http://127.0.0.1:{}: ", proxy.port);
    assert!(text.contains(&expected), "{text}");
    let mut device = Device::dial(stage.devices()).await;
    device.send("patience").await;
    stage.admin.metric_until(HELD, |n| n > 0.5).await;
    proxy.dialled(proxy.connections() + 2).await;
    assert!(stage.admin.metric(UP).await < 0.5);
    proxy.mend();
    device.conn = stage.handler.created(device.port()).await;
    assert_eq!(stage.handler.bytes(&device.conn, 8).await, b"patience");
    stage.finish().await;
}

/// A channel over which nothing comes any more, nor over a new one: the callback that shows
/// it is lost with its connection, and for everybody else the handler is away. New
/// connections go to the other address. The end of the one that was lost is told when
/// there is somebody to tell.
#[tokio::test]
async fn what_vanishes_in_a_black_hole_is_an_outage() {
    let keys = [
        ("HANDLER__CONNECT_TIMEOUT", "200ms"),
        ("HANDLER__HEALTH_CHECK", "false"),
        ("HANDLER__REQUEST_TIMEOUT", "500ms"),
        ("HANDLER__CLOSE_TIMEOUT", "1m"),
    ];
    let (handler, proxy, mut keys) = behind_proxy(&keys).await;
    let other = Handler::start().await;
    for (key, value) in &mut keys {
        if key == "HANDLER__ADDRESS" {
            *value = format!("{value},{}", other.url());
        }
    }
    let stage = assemble(handler, &keys).await;
    up(&stage, 2).await;
    let mut at_proxy = Vec::new();
    for _ in 0..6 {
        let mut device = Device::dial(stage.devices()).await;
        let port = device.port();
        tokio::select! {
            conn = stage.handler.created(port) => {
                device.conn = conn;
                at_proxy.push(device);
            }
            _ = other.created(port) => {}
        }
    }
    let [lost, waits, ..] = &mut at_proxy[..] else {
        panic!("not in turn");
    };
    // Both have been answered, or one of them would show it.
    let answered =
        "exproto_callback_duration_seconds_count{handler=\"default\",method=\"OnSocketCreated\"}";
    stage.admin.metric_until(answered, |n| n > 5.5).await;
    proxy.blackhole();
    lost.send("into the hole").await;
    lost.closed().await;
    up(&stage, 1).await;
    waits.send("later").await;
    // It, and the end of the one that was lost.
    stage.admin.metric_until(HELD, |n| n > 1.5).await;
    for _ in 0..3 {
        other
            .created(Device::dial(stage.devices()).await.port())
            .await;
    }
    proxy.dialled(proxy.connections() + 2).await;
    assert!(stage.admin.metric(UP).await < 1.5);
    proxy.mend();
    assert_eq!(stage.handler.bytes(&waits.conn, 5).await, b"later");
    assert_eq!(stage.handler.closed(&lost.conn).await, "handler_error");
    assert!(stage.admin.metric(LOST).await < 0.5);
    assert_eq!(stage.handler.names(&lost.conn), ["created", "closed"]);
    stage.finish().await;
    other.check();
}

/// A handler's machine whose packets are dropped, all of them, with no call under way and no
/// reset: what is sent then gets no acknowledgement. That is an outage, found before
/// `request_timeout`: the device stays, and its bytes come when the machine is back, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_drops_every_packet_is_an_outage() {
    if !network::own("a_machine_that_drops_every_packet_is_an_outage") {
        return;
    }
    for streaming in ["false", "true"] {
        let mut far = Handler::absent_at(network::FAR.parse().unwrap(), 7000);
        far.up().await;
        let address = format!("http://{}:7000", network::FAR);
        let keys = [
            ("HANDLER__ADDRESS", &*address),
            ("HANDLER__SERVICE_NAME", "ConnectionHandler"),
            ("HANDLER__STREAMING", streaming),
            ("HANDLER__CONNECT_TIMEOUT", "500ms"),
            ("HANDLER__HEALTH_CHECK", "false"),
            ("HANDLER__REQUEST_TIMEOUT", "2s"),
        ];
        let stage = Stage::assemble(Broker::start().await, far, &keys).await;
        within("the gateway to be ready", stage.gateway.ready()).await;
        let mut devices = Vec::new();
        for _ in 0..20 {
            let mut device = stage.device().await;
            device.send("before, ").await;
            stage.handler.bytes(&device.conn, 8).await;
            devices.push(device);
        }
        // What was not answered yet would come again.
        let answered =
            r#"exproto_callbacks_total{handler="default",method="OnReceivedBytes",outcome="ok"}"#;
        stage.admin.metric_until(answered, |n| n > 19.5).await;
        network::vanish();
        for device in &mut devices {
            device.send("in the dark").await;
        }
        stage.admin.ready_until(503, &address).await;
        stage.admin.metric_until(HELD, |n| n > 19.5).await;
        assert!(stage.admin.metric(UP).await < 0.5);
        network::return_again();
        for device in &devices {
            let bytes = stage.handler.bytes(&device.conn, 19).await;
            assert_eq!(bytes, b"before, in the dark");
            let names = stage.handler.names(&device.conn);
            assert_eq!(names, ["created", "bytes", "bytes"]);
        }
        stage.admin.metric_until(HELD, |n| n < 0.5).await;
        stage.finish().await;
    }
}

/// A server that greets as HTTP/2 wants it and hangs up: the pauses grow, as they do towards
/// one that is not there.
#[tokio::test]
async fn one_that_greets_and_hangs_up_is_left_in_peace() {
    /// SETTINGS that set nothing (RFC 9113, 6.5).
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let keys = [
        ("HANDLER__ADDRESS", &*address),
        ("HANDLER__HEALTH_CHECK", "false"),
        ("SHARDS", "1"),
    ];
    let starting = Stage::assemble(Broker::start().await, Handler::absent(), &keys);
    let begun = Instant::now();
    let greeted = async {
        for _ in 0..6 {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&SETTINGS).await.unwrap();
            // What the gateway says meanwhile, so that the end is not a reset.
            let _ = stream.read(&mut [0; 4096]).await;
        }
    };
    let (stage, ()) = tokio::join!(starting, within("six connections", greeted));
    // 50, 100, 200, 400 and 800 ms: never less, however busy the machine.
    let pauses = Duration::from_millis(50 + 100 + 200 + 400 + 800);
    assert!(begun.elapsed() >= pauses, "{:?}", begun.elapsed());
    stage.finish().await;
}

/// HTTP/2 pings find a handler that has fallen silent in the midst of a callback: that is an
/// outage, and the callback is sent again when it is back.
#[tokio::test]
async fn pings_find_a_silent_handler() {
    let keys = [
        ("HANDLER__KEEPALIVE_INTERVAL", "100ms"),
        ("HANDLER__KEEPALIVE_TIMEOUT", "200ms"),
        ("HANDLER__CONNECT_TIMEOUT", "200ms"),
        ("HANDLER__REQUEST_TIMEOUT", "10m"),
    ];
    let (handler, proxy, keys) = behind_proxy(&keys).await;
    let stage = assemble(handler, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let mut device = stage.device().await;
    let gate = stage.handler.hold("bytes");
    device.send("twice ").await;
    stage.handler.bytes(&device.conn, 6).await;
    proxy.blackhole();
    up(&stage, 0).await;
    stage.admin.metric_until(HELD, |n| n > 0.5).await;
    // The handler's side of it ends, too.
    stage.handler.behave(|_| async { Ok(()) });
    gate.open();
    proxy.mend();
    let twice = stage.handler.bytes(&device.conn, 12).await;
    assert_eq!(twice, b"twice twice ");
    device.send("once").await;
    stage.handler.bytes(&device.conn, 16).await;
    assert_eq!(
        stage.handler.names(&device.conn),
        ["created", "bytes", "bytes", "bytes"]
    );
    stage.finish().await;
}

/// gRPC's own servers hang up on who pings too often. Then there are no more pings, and
/// the callback that was under way is sent again and left in peace.
#[tokio::test]
async fn a_handler_that_forbids_pings_gets_no_more() {
    let broker = Broker::start().await;
    let port = free_port();
    let plan = Plan::new(&broker.url(), &format!("http://127.0.0.1:{port}"))
        .set("HANDLER__KEEPALIVE_INTERVAL", "50ms")
        .set("HANDLER__REQUEST_TIMEOUT", "10m")
        .set("SHARDS", "1");
    let mut gateway = Process::run(&plan);
    let python = Python::start(port, &[]).await;
    let devices = gateway.address("devices on").await;
    let mut device = Device::dial(devices).await;
    device.send("sleep").await;
    let line = gateway.logged("forbids pings").await;
    assert!(line.contains("it gets no more"), "{line}");
    let asleep = python.printed("bytes ", 2).await;
    assert_eq!(asleep[0], asleep[1]);
    let admin = gateway.admin().await;
    admin.metric_until(UP, |up| (up - 1.0).abs() < 0.1).await;
    python.kill().await;
    gateway.signal("TERM");
    assert_eq!(gateway.exit().await, Some(0));
    let told = gateway.log().into_iter();
    assert_eq!(
        told.filter(|line| line.contains("forbids pings")).count(),
        1
    );
}

/// A server that speaks something else, or nothing after a word, is never up, and told.
#[tokio::test]
async fn a_server_of_something_else_is_told() {
    for (says, hangs_up, trouble) in [
        ("HTTP/1.1 400 Bad Request\r\n\r\n", true, "frame"),
        ("220 mail.example ESMTP\r\n", false, "frame"),
        (
            "",
            true,
            "hung up without a word of HTTP/2: does it want TLS",
        ),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let gate = Gate::closed();
        let open = gate.clone();
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let open = open.clone();
                tokio::spawn(async move {
                    let mut preface = [0; 4096];
                    let _ = stream.read(&mut preface).await;
                    let _ = stream.write_all(says.as_bytes()).await;
                    if !hangs_up {
                        open.pass().await;
                    }
                });
            }
        });
        let keys = [
            ("HANDLER__ADDRESS", &*address),
            ("HANDLER__HEALTH_CHECK", "false"),
        ];
        let stage = Stage::assemble(Broker::start().await, Handler::absent(), &keys).await;
        let text = stage.admin.ready_until(503, trouble).await;
        assert!(text.contains(&address), "{text}");
        assert!(stage.admin.metric(UP).await < 0.5);
        stage.finish().await;
        gate.open();
        server.abort();
    }
}
