//! A handler behind a host name: the name counts as all the addresses that it has, now.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use common::{Broker, Device, Handler, Names, Stage, free_port_at, within};

/// Channels that are up, of all addresses.
const UP: &str = "exproto_handler_channels_up{handler=\"default\"}";

const HOSTS: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

/// Handlers at [`HOSTS`], all on one port.
async fn three() -> [Handler; 3] {
    let port = free_port_at(&HOSTS);
    let mut handlers = HOSTS.map(|host| Handler::absent_at(host, port));
    for handler in &mut handlers {
        handler.up().await;
    }
    handlers
}

/// A gateway of one shard whose handler is at `handlers.test`.
async fn stage(first: Handler, names: &Names, keys: &[(&str, &str)]) -> Stage {
    let address = format!("http://handlers.test:{}", first.port);
    let mut all = vec![("HANDLER__ADDRESS", &*address), ("SHARDS", "1")];
    all.extend(keys);
    let names = Arc::new(names.clone());
    Stage::resolving(Broker::start().await, first, &all, names).await
}

async fn channels(stage: &Stage, count: usize) {
    let is = |up: f64| (up - count as f64).abs() < 0.1;
    stage.admin.metric_until(UP, is).await;
}

/// A device, and the number of the handler that was told of it.
async fn device(stage: &Stage, others: &[Handler; 2]) -> (Device, usize) {
    let mut device = Device::dial(stage.devices()).await;
    let port = device.port();
    let (conn, at) = tokio::select! {
        conn = stage.handler.created(port) => (conn, 0),
        conn = others[0].created(port) => (conn, 1),
        conn = others[1].created(port) => (conn, 2),
    };
    device.conn = conn;
    (device, at)
}

/// Addresses come and go: new connections go to those that the name has, each stays with
/// the handler that saw its OnSocketCreated, and nobody stays with one that is gone.
#[tokio::test]
async fn a_name_is_all_the_addresses_that_it_has_now() {
    let [a, b, c] = three().await;
    let others = [b, c];
    let names = Names::new(&HOSTS[..1]);
    let stage = stage(a, &names, &[("HANDLER__RESOLVE_INTERVAL", "50ms")]).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let (mut old, at) = device(&stage, &others).await;
    assert_eq!(at, 0);
    // All of them, in turn, over IPv6 too.
    names.say(&HOSTS);
    channels(&stage, 3).await;
    let mut counts = [0; 3];
    for _ in 0..6 {
        let (device, at) = device(&stage, &others).await;
        counts[at] += 1;
        let conn = device.conn.clone();
        drop(device);
        match at {
            0 => stage.handler.closed(&conn).await,
            other => others[other - 1].closed(&conn).await,
        };
    }
    assert_eq!(counts, [2, 2, 2]);
    // The first one has a connection and keeps its channel, the last one has none.
    names.say(&HOSTS[1..2]);
    channels(&stage, 2).await;
    let mut new = Vec::new();
    for _ in 0..4 {
        let (device, at) = device(&stage, &others).await;
        assert_eq!(at, 1);
        new.push(device);
    }
    old.send("still here").await;
    assert_eq!(stage.handler.bytes(&old.conn, 10).await, b"still here");
    // Its channel ends with its last connection.
    let conn = old.conn.clone();
    drop(old);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    channels(&stage, 1).await;
    // An address may come back.
    names.say(&HOSTS[..2]);
    channels(&stage, 2).await;
    let mut turns = [
        device(&stage, &others).await.1,
        device(&stage, &others).await.1,
    ];
    turns.sort_unstable();
    assert_eq!(turns, [0, 1]);
    stage.finish().await;
    others.iter().for_each(Handler::check);
}

/// Where connecting fails the name is asked for at once, whatever the interval. A
/// connection whose address the name has no more is not kept waiting for it.
#[tokio::test]
async fn a_name_is_resolved_again_when_its_handler_is_away() {
    let [a, b, c] = three().await;
    let others = [b, c];
    let names = Names::new(&HOSTS[..1]);
    let keys = [
        ("HANDLER__RESOLVE_INTERVAL", "infinity"),
        ("HANDLER__FAILOVER", "recreate"),
        // More than anything here waits.
        ("HANDLER__FAILOVER_AFTER", "10m"),
        ("HANDLER__MAX_OUTAGE", "20m"),
    ];
    let mut stage = stage(a, &names, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let (mut moves, at) = device(&stage, &others).await;
    assert_eq!(at, 0);
    // Nobody asks yet.
    names.say(&HOSTS[1..2]);
    stage.handler.kill().await;
    moves.send("to the next").await;
    assert_eq!(others[0].bytes(&moves.conn, 11).await, b"to the next");
    assert_eq!(others[0].names(&moves.conn), ["created", "bytes"]);
    let (new, at) = device(&stage, &others).await;
    assert_eq!(at, 1);
    drop((moves, new));
    stage.finish().await;
    others.iter().for_each(Handler::check);
}

/// A name that cannot be resolved any more keeps the addresses that it had; one that never
/// could is told, and asked for again.
#[tokio::test]
async fn a_name_that_cannot_be_resolved() {
    let [a, mut b, c] = three().await;
    let names = Names::new(&[]);
    names.fail("the name server is away");
    let stage = stage(a, &names, &[("HANDLER__RESOLVE_INTERVAL", "50ms")]).await;
    let told = "handlers.test:";
    let text = stage
        .admin
        .ready_until(503, "the name server is away")
        .await;
    assert!(text.contains(told), "{text}");
    names.say(&[]);
    stage.admin.ready_until(503, "it has none").await;
    names.say(&HOSTS[1..2]);
    within("the gateway to be ready", stage.gateway.ready()).await;
    names.fail("the name server is away again");
    b.kill().await;
    stage.admin.ready_until(503, told).await;
    b.up().await;
    stage.admin.ready_until(200, "").await;
    let others = [b, c];
    let (mut device, at) = device(&stage, &others).await;
    assert_eq!(at, 1);
    device.send("found").await;
    others[0].bytes(&device.conn, 5).await;
    stage.finish().await;
}

/// A short interval is kept also while nothing changes.
#[tokio::test]
async fn a_name_is_resolved_again_and_again() {
    let handler = Handler::start().await;
    let names = Names::new(&HOSTS[..1]);
    let stage = stage(handler, &names, &[("HANDLER__RESOLVE_INTERVAL", "50ms")]).await;
    // With gaps that double this would take most of a minute.
    names.asked(12).await;
    stage.finish().await;
}

/// A name with too many addresses has 64.
#[tokio::test]
async fn a_name_has_only_so_many_addresses() {
    let handler = Handler::start().await;
    // Nobody listens there.
    let hosts = (1..=100).map(|last| IpAddr::from([127, 1, 1, last]));
    let names = Names::new(&hosts.collect::<Vec<_>>());
    let stage = stage(handler, &names, &[]).await;
    let down = format!(
        "exproto_handler_channels{{handler=\"default\",address=\"http://handlers.test:{}\",state=\"down\"}}",
        stage.handler.port
    );
    stage
        .admin
        .metric_until(&down, |down| (down - 64.0).abs() < 0.1)
        .await;
    stage.finish().await;
}
