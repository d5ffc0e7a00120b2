//! Who may connect, how many and how fast: refused before any callback, counted, and
//! never the end of accepting.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::{
    Admin, Broker, Call, Device, Handler, Plan, Process, Stage, assert_same, pattern, until, within,
};
use exproto_sidecar::proto::Address;

fn refused(reason: &str) -> String {
    format!("exproto_connections_refused_total{{listener=\"tcp.default\",reason=\"{reason}\"}}")
}

async fn assert_refused(admin: &Admin, reason: &str, count: u32) {
    let what = refused(reason);
    let found = admin
        .metric_until(&what, |n| n > f64::from(count) - 0.5)
        .await;
    assert!((found - f64::from(count)).abs() < 0.5, "{what} is {found}");
}

/// Only these were told to the handler.
#[track_caller]
fn assert_told(stage: &Stage, devices: &[&Device]) {
    let told = stage.handler.events().into_iter();
    let mut told: Vec<String> = told
        .filter(|event| matches!(event.call, Call::Created(_)))
        .map(|event| event.conn)
        .collect();
    let mut expected: Vec<String> = devices.iter().map(|d| d.conn.clone()).collect();
    told.sort();
    expected.sort();
    assert_eq!(told, expected);
}

/// `max_connections`: one too many is refused and counted; when one leaves there is
/// room again.
#[tokio::test]
async fn no_more_than_max_connections() {
    let stage = Stage::with(&[("LISTENERS__TCP__DEFAULT__MAX_CONNECTIONS", "2")]).await;
    let (first, second) = (stage.device().await, stage.device().await);
    let mut third = Device::dial(stage.devices()).await;
    third.closed().await;
    assert_refused(&stage.admin, "max_connections", 1).await;
    assert_told(&stage, &[&first, &second]);
    let first_conn = first.conn.clone();
    drop(first);
    stage.handler.closed(&first_conn).await;
    let (handler, devices) = (&stage.handler, stage.devices());
    let again = until("room", || async {
        let mut device = Device::dial(devices).await;
        device.send("hello").await;
        let told = tokio::time::timeout(Duration::from_millis(200), handler.created(device.port()));
        told.await.ok().map(|conn| (device, conn))
    })
    .await;
    stage.handler.bytes(&again.1, 5).await;
    stage.finish().await;
}

/// `max_conn_rate`: beyond a second's worth connections are refused and counted; a
/// second later there is room.
#[tokio::test]
async fn no_faster_than_max_conn_rate() {
    let stage = Stage::with(&[("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "5")]).await;
    let begun = Instant::now();
    let mut devices = Vec::new();
    for _ in 0..20 {
        devices.push(Device::dial(stage.devices()).await);
    }
    let elapsed = begun.elapsed().as_secs_f64();
    let most = 5.0 + (elapsed * 5.0).ceil();
    let all_seen = |open: f64, refused: f64| open + refused > 19.5;
    let opened = "exproto_connections_opened_total{listener=\"tcp.default\"}";
    let (open, turned_away) = until("all twenty", || async {
        let open = stage.admin.metric(opened).await;
        let turned_away = stage.admin.metric(&refused("max_conn_rate")).await;
        all_seen(open, turned_away).then_some((open, turned_away))
    })
    .await;
    assert!(open >= 5.0 && open <= most, "{open} of 20 in {elapsed} s");
    assert!(turned_away >= 20.0 - most);
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.device().await;
    stage.finish().await;
}

/// An address that is at its limit does not use up the rate of the others.
#[tokio::test]
async fn a_full_address_leaves_the_rate_to_others() {
    let stage = Stage::with(&[
        ("LISTENERS__TCP__DEFAULT__MAX_CONNECTIONS_PER_ADDRESS", "1"),
        ("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "2"),
    ])
    .await;
    let first = stage.device().await;
    for _ in 0..10 {
        Device::dial(stage.devices()).await.closed().await;
    }
    assert_refused(&stage.admin, "max_connections_per_address", 10).await;
    let mut other = Device::dial_from("127.0.0.5", stage.devices()).await;
    other.conn = stage.handler.created(other.port()).await;
    assert_told(&stage, &[&first, &other]);
    stage.finish().await;
}

/// `access_rules`: a peer that is denied is refused before any callback.
#[tokio::test]
async fn denied_peers_are_refused() {
    let stage = Stage::with(&[
        ("LISTENERS__TCP__DEFAULT__ACCESS_RULES", "deny 127.0.0.1"),
        ("LISTENERS__TCP__OPEN__BIND", "127.0.0.1:0"),
        (
            "LISTENERS__TCP__OPEN__ACCESS_RULES",
            "deny 10.0.0.0/8, allow 127.0.0.0/8, deny all",
        ),
    ])
    .await;
    for _ in 0..3 {
        Device::dial(stage.devices()).await.closed().await;
    }
    assert_refused(&stage.admin, "access_rules", 3).await;
    let mut open = Device::dial(stage.gateway.addresses().listeners["tcp.open"]).await;
    open.conn = stage.handler.created(open.port()).await;
    assert_told(&stage, &[&open]);
    stage.finish().await;
}

const PROXY: (&str, &str) = ("LISTENERS__TCP__DEFAULT__PROXY_PROTOCOL", "true");

/// A device behind a load balancer that sends `header`, and what the handler is told.
async fn through_balancer(stage: &Stage, header: &[u8]) -> (Device, Address, Address) {
    let mut device = Device::dial(stage.devices()).await;
    let before = stage.handler.events().len();
    device.send([header, b"hello"].concat()).await;
    let (conn, info) = stage
        .handler
        .wait("OnSocketCreated", |log| {
            log.events[before..]
                .iter()
                .find_map(|event| match &event.call {
                    Call::Created(info) => Some((event.conn.clone(), info.clone())),
                    _ => None,
                })
        })
        .await;
    device.conn = conn;
    // What came behind the header is the device's.
    assert_eq!(stage.handler.bytes(&device.conn, 5).await, b"hello");
    (device, info.peername.unwrap(), info.sockname.unwrap())
}

fn address(host: &str, port: u16) -> Address {
    Address {
        host: host.to_owned(),
        port: port.into(),
    }
}

/// `proxy_protocol`: v1 and v2 name the device; LOCAL and UNKNOWN leave the
/// connection's own addresses. The bytes behind the header are the device's.
#[tokio::test]
async fn the_proxy_protocol_names_the_device() {
    let stage = Stage::with(&[PROXY]).await;
    let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 7993\r\n";
    let (_one, peer, local) = through_balancer(&stage, v1).await;
    assert_eq!(
        (peer, local),
        (address("192.0.2.1", 5000), address("192.0.2.2", 7993))
    );
    let v1 = b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n";
    let (_two, peer, local) = through_balancer(&stage, v1).await;
    assert_eq!(
        (peer, local),
        (address("2001:db8::1", 1), address("2001:db8::2", 2))
    );
    let v2 =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x09\xc0\x00\x02\x0a\x13\x88\x1f\x39";
    let (_three, peer, local) = through_balancer(&stage, v2).await;
    assert_eq!(
        (peer, local),
        (address("192.0.2.9", 5000), address("192.0.2.10", 7993))
    );
    let own_end = stage.devices().port();
    for header in [
        &b"PROXY UNKNOWN\r\n"[..],
        b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00",
    ] {
        let (device, peer, local) = through_balancer(&stage, header).await;
        assert_eq!(peer, address("127.0.0.1", device.port()));
        assert_eq!(local, address("127.0.0.1", own_end));
    }
    stage.finish().await;
}

/// Behind a load balancer the access rules are for the device it names.
#[tokio::test]
async fn access_rules_see_through_the_balancer() {
    let rules = (
        "LISTENERS__TCP__DEFAULT__ACCESS_RULES",
        "deny 192.0.2.0/24,deny 127.0.0.1",
    );
    let stage = Stage::with(&[PROXY, rules]).await;
    let mut denied = Device::dial(stage.devices()).await;
    denied.send("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n").await;
    denied.closed().await;
    assert_refused(&stage.admin, "access_rules", 1).await;
    let allowed = b"PROXY TCP4 198.51.100.1 192.0.2.2 1 2\r\n";
    let (device, peer, _) = through_balancer(&stage, allowed).await;
    assert_eq!(peer.host, "198.51.100.1");
    assert_told(&stage, &[&device]);
    stage.finish().await;
}

/// `proxy_protocol_trusted`: who is not trusted to name peers is turned away unread.
#[tokio::test]
async fn only_trusted_balancers_name_devices() {
    let trusted = (
        "LISTENERS__TCP__DEFAULT__PROXY_PROTOCOL_TRUSTED",
        "10.0.0.0/8,127.0.0.1-127.0.0.9",
    );
    let stage = Stage::with(&[PROXY, trusted]).await;
    let mut strange = Device::dial_from("127.0.0.10", stage.devices()).await;
    strange.closed().await;
    assert_refused(&stage.admin, "proxy_protocol_trusted", 1).await;
    let (device, ..) = through_balancer(&stage, b"PROXY UNKNOWN\r\n").await;
    assert_told(&stage, &[&device]);
    stage.finish().await;
}

/// `max_connections_per_address`: one too many of an address is refused and counted,
/// others are not concerned; behind a load balancer its devices count, not itself.
#[tokio::test]
async fn no_more_than_max_connections_per_address() {
    let most = ("LISTENERS__TCP__DEFAULT__MAX_CONNECTIONS_PER_ADDRESS", "2");
    let stage = Stage::with(&[most]).await;
    let (first, second) = (stage.device().await, stage.device().await);
    let mut third = Device::dial(stage.devices()).await;
    third.closed().await;
    assert_refused(&stage.admin, "max_connections_per_address", 1).await;
    let mut other = Device::dial_from("127.0.0.2", stage.devices()).await;
    other.conn = stage.handler.created(other.port()).await;
    assert_told(&stage, &[&first, &second, &other]);
    stage.finish().await;
    let stage = Stage::with(&[PROXY, most]).await;
    let mut devices = Vec::new();
    for host in 1..=4 {
        let header = format!("PROXY TCP4 192.0.2.{host} 192.0.2.100 1 2\r\n");
        devices.push(through_balancer(&stage, header.as_bytes()).await);
    }
    stage.finish().await;
}

/// Without a header, with half of one, or with something else: refused, counted, no
/// callback. A slow one is refused after `proxy_protocol_timeout`, and holds up
/// nobody.
#[tokio::test]
async fn bad_and_slow_proxy_headers_are_refused() {
    let timeout = ("LISTENERS__TCP__DEFAULT__PROXY_PROTOCOL_TIMEOUT", "500ms");
    let stage = Stage::with(&[PROXY, timeout]).await;
    let begun = Instant::now();
    let mut slow = Device::dial(stage.devices()).await;
    slow.send("PROXY TCP4 192.0.2.1 ").await;
    let mut silent = Device::dial(stage.devices()).await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PROXY TCP4 nonsense\r\n",
        b"\x00\x01\x02",
        &[b'P'; 5000],
    ] {
        let mut device = Device::dial(stage.devices()).await;
        device.send(garbage).await;
        device.closed().await;
    }
    assert_refused(&stage.admin, "proxy_protocol", 4).await;
    let (device, ..) = through_balancer(&stage, b"PROXY UNKNOWN\r\n").await;
    slow.closed().await;
    silent.closed().await;
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert_refused(&stage.admin, "proxy_protocol", 6).await;
    assert_told(&stage, &[&device]);
    stage.finish().await;
}

/// `max_bytes_rate` paces a device: every byte arrives, no faster than allowed, and
/// the pauses are counted.
#[tokio::test]
async fn bytes_are_paced() {
    let stage = Stage::with(&[("LISTENERS__TCP__DEFAULT__MAX_BYTES_RATE", "400000")]).await;
    let mut device = stage.device().await;
    let sent = pattern(1_000_000);
    let begun = Instant::now();
    for piece in sent.chunks(10_000) {
        device.send(piece).await;
    }
    let received = stage.handler.bytes(&device.conn, sent.len()).await;
    let took = begun.elapsed();
    assert_same(&received, &sent);
    // One second's worth at once, one read of at most 256 KiB into debt, the rest at
    // the rate: 0.84 s.
    assert!(took >= Duration::from_millis(800), "{took:?}");
    let paused = "exproto_reads_paused_total{listener=\"tcp.default\"}";
    assert!(stage.admin.metric(paused).await > 0.5);
    stage.finish().await;
}

/// `max_messages_rate` paces reads.
#[tokio::test]
async fn reads_are_paced() {
    let stage = Stage::with(&[("LISTENERS__TCP__DEFAULT__MAX_MESSAGES_RATE", "5")]).await;
    let mut device = stage.device().await;
    let begun = Instant::now();
    for number in 1..=8 {
        device.send("x").await;
        stage.handler.bytes(&device.conn, number).await;
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(350), "{took:?}");
    let paused = "exproto_reads_paused_total{listener=\"tcp.default\"}";
    assert!(stage.admin.metric(paused).await > 0.5);
    stage.finish().await;
}

/// One device that is paced does not slow another.
#[tokio::test]
async fn pacing_one_device_does_not_slow_another() {
    let keys = [
        ("LISTENERS__TCP__DEFAULT__MAX_BYTES_RATE", "1000"),
        ("SHARDS", "1"),
    ];
    let stage = Stage::with(&keys).await;
    let mut fast = stage.device().await;
    fast.send(pattern(50_000)).await;
    stage.handler.bytes(&fast.conn, 1).await;
    let begun = Instant::now();
    for number in 1..=20 {
        let mut other = stage.device().await;
        other.send("x").await;
        stage.handler.bytes(&other.conn, 1).await;
        assert!(begun.elapsed() < Duration::from_secs(20), "{number}");
    }
    stage.finish().await;
}

/// A drain and the close of a paced device do not wait for its debt.
#[tokio::test]
async fn a_paced_device_is_closed_at_once() {
    let stage = Stage::with(&[("LISTENERS__TCP__DEFAULT__MAX_BYTES_RATE", "10")]).await;
    let mut device = stage.device().await;
    device.send(pattern(10_000)).await;
    // It has had its share for minutes.
    let paused = "exproto_reads_paused_total{listener=\"tcp.default\"}";
    stage.admin.metric_until(paused, |n| n > 0.5).await;
    stage.adapter.close(&device.conn).await.ok();
    assert_eq!(stage.closed(&device).await, "closed_by_handler");
    device.closed().await;
    stage.finish().await;
}

/// No file descriptor left: the gateway survives, tries on without spinning, and
/// accepts again when there is one.
#[tokio::test]
async fn a_lack_of_file_descriptors_is_survived() {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("BROKER__POOL_SIZE", "1")
        .set("SHARDS", "1");
    let program = Process::limited(64, plan.env());
    let devices: SocketAddr = program.address("devices on").await;
    let admin = program.admin().await;
    let mut held = Vec::new();
    for _ in 0..80 {
        held.push(Device::dial(devices).await);
    }
    program.logged("cannot accept").await;
    // The ones that came in are served.
    handler.created(held[0].port()).await;
    held[0].send("still served").await;
    let since = Instant::now();
    let conn = handler.created(held[0].port()).await;
    handler.bytes(&conn, 12).await;
    held.clear();
    // Back to work, and the look at the page needs a descriptor too.
    let mut device = Device::dial(devices).await;
    device.conn = handler.created(device.port()).await;
    device.send("served again").await;
    handler.bytes(&device.conn, 12).await;
    program.logged("accepting again").await;
    let name = "exproto_accept_errors_total{listener=\"tcp.default\"}";
    let errors = until("the page", || async {
        let page = admin.try_get("/metrics").await?;
        let line = page.body.lines().find(|line| line.starts_with(name))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    })
    .await;
    // A pause of a tenth of a second after each: a spin would have made thousands.
    let most = 20.0 + since.elapsed().as_secs_f64() * 20.0;
    assert!((1.0..most).contains(&errors), "{errors} errors");
    let complaints = program
        .log()
        .iter()
        .filter(|l| l.contains("cannot accept"))
        .count();
    assert!(complaints < 10, "{complaints} lines about it");
    program.signal("TERM");
    let mut program = program;
    assert_eq!(program.exit().await, Some(0));
}

/// What is sent right behind the handshake, and a device that leaves at once, are a
/// connection like any other.
#[tokio::test]
async fn a_device_that_leaves_at_once_is_told_whole() {
    let stage = Stage::start().await;
    for _ in 0..50 {
        let mut device = Device::dial(stage.devices()).await;
        device.send("bye").await;
        let port = device.port();
        drop(device);
        let conn = within("its creation", stage.handler.created(port)).await;
        assert_eq!(stage.handler.closed(&conn).await, "normal");
        assert_eq!(stage.handler.bytes(&conn, 3).await, b"bye");
    }
    stage.finish().await;
}
