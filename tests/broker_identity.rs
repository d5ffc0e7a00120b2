//! Two gateways on one broker, with names of their own and with the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use common::{Admin, Broker, Handler, Peer, Plan, Process, Stage, node_name, within};
use exproto_sidecar::gateway::Gateway;
use rumqttc::v5::mqttbytes::v5::{Connect, Packet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Two gateways with names of their own: each gets its copy of what both subscribe,
/// its own retained and shared messages, and one that stops or dies takes nothing from
/// the other.
#[tokio::test]
async fn two_gateways_do_not_disturb_each_other() {
    let one = Stage::start().await;
    let (other_broker, handler) = (one.broker.url(), Handler::start().await);
    let plan = Plan::new(&other_broker, &handler.url());
    let other = Gateway::start(&plan.config()).await.unwrap();
    within("the other to be ready", other.ready()).await;
    let adapter = common::Adapter::connect(other.addresses().adapter.tcp().unwrap()).await;
    let mut far = common::Device::dial(other.addresses().listeners["tcp.default"]).await;
    far.conn = handler.created(far.port()).await;
    adapter.authenticate(&far.conn, "same name").await.ok();
    let near = one.client("same name").await;
    let mut peer = Peer::connect(one.broker.port).await;
    peer.retain("state", "kept").await;
    for filter in ["state", "both/+", "both/#"] {
        one.subscribe(&near, filter, 1).await.ok();
        adapter.subscribe(&far.conn, filter, 1).await.ok();
    }
    peer.publish("both/x", 1, "for both").await;
    let expected = ["kept", "for both", "for both"];
    assert_eq!(one.handler.payloads(&near.conn, 3).await, expected);
    assert_eq!(handler.payloads(&far.conn, 3).await, expected);
    // From one to the other, through the broker.
    one.publish(&near, "both/y", 1, "across").await.ok();
    let across = handler.messages(&far.conn, 5).await;
    assert_eq!(across[3].from, "same name");
    within("the drain", other.drain()).await;
    peer.publish("both/z", 1, "for one").await;
    let payloads = one.handler.payloads(&near.conn, 7).await;
    assert_eq!(payloads[5..], ["for one", "for one"]);
    assert_eq!(handler.messages(&far.conn, 5).await.len(), 5);
    one.finish().await;
}

/// A gateway that is started twice with one identity: the broker lets one of both stay
/// at a time. Both say what that looks like, and they do not fight in a tight loop.
/// Each waits longer each time before it takes the session back.
#[tokio::test]
async fn one_identity_twice_is_told() {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let name = node_name("twin");
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("NODE_NAME", &name)
        .set("BROKER__POOL_SIZE", "1")
        .set("BROKER__RECONNECT_MAX", "1s");
    let first = Process::run(&plan);
    first.printed("is ready").await;
    let second = Process::run(&plan);
    second.printed("is ready").await;
    let hint = "does a second gateway run with the same node_name and client_id_prefix?";
    for program in [&first, &second] {
        let line = program.logged(hint).await;
        assert!(line.contains(&format!("exproto-{name}-0")), "{line}");
        let admin = Admin(program.address("admin on").await);
        admin.ready_until(503, hint).await;
    }
    // From here on each of them waits for half of reconnect_max at least, and then for
    // twice as long each time: two or three attempts in three seconds.
    let welcome = format!("Sending CONNACK to exproto-{name}-0");
    let before = broker.count(&welcome);
    let window = tokio::time::timeout(
        Duration::from_secs(3),
        broker.logged_times(&welcome, before + 7),
    );
    assert!(window.await.is_err(), "they fight in a tight loop");
    let before = broker.count(&welcome);
    let again = broker.logged_times(&welcome, before + 1);
    within("one of them to try again", again).await;
}

/// When the second one has gone, the first has its subscriptions as before.
#[tokio::test]
async fn what_a_twin_took_comes_back() {
    let keys = [("BROKER__POOL_SIZE", "1"), ("BROKER__RECONNECT_MAX", "1s")];
    let stage = Stage::with(&keys).await;
    let device = stage.subscriber("c", "down", 1).await;
    let mut twin = Process::run(&stage.plan);
    twin.printed("is ready").await;
    let admin = Admin(twin.address("admin on").await);
    admin.ready_until(503, "- broker link 0").await;
    twin.signal("KILL");
    twin.exit().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    stage.admin.ready_until(200, "ready").await;
    peer.publish("down", 1, "back").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["back"]);
    stage.finish().await;
}

/// The CONNECT of the next connection, which stays open.
async fn connect(listener: &TcpListener) -> (TcpStream, Connect) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut buffer = BytesMut::new();
    loop {
        assert!(stream.read_buf(&mut buffer).await.unwrap() > 0);
        if let Ok(Packet::Connect(connect, ..)) = Packet::read(&mut buffer, None) {
            return (stream, connect);
        }
    }
}

/// Rules 8 and 10, and who the gateway is to the broker: each member of the pool has a
/// client id of its own, which stays over a restart; the start ends what session there is
/// and begins one that the broker saves, a link that broke goes on with it; the broker is
/// told how much it may send.
#[tokio::test]
async fn the_broker_is_told_who_connects_and_what_it_may_send() {
    const CONNACK: &[u8] = b"\x20\x03\x00\x00\x00";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://{}", listener.local_addr().unwrap());
    let handler = Handler::start().await;
    let plan = Plan::new(&url, &handler.url()).set_all(&[
        ("NODE_NAME", "meters-1"),
        ("BROKER__CLIENT_ID_PREFIX", "gw"),
        ("BROKER__POOL_SIZE", "2"),
        ("BROKER__RECEIVE_MAXIMUM", "77"),
        ("BROKER__MAX_PACKET_SIZE", "100KiB"),
        ("BROKER__SESSION_EXPIRY", "90s"),
        ("BROKER__KEEP_ALIVE", "20s"),
    ]);
    for _ in 0..2 {
        let program = Process::run(&plan);
        let (mut ended, mut begun, mut streams) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        while begun.len() < 2 {
            let (mut stream, connect) = within("a link", connect(&listener)).await;
            let properties = connect.properties.as_ref().unwrap();
            assert_eq!(connect.keep_alive, 20);
            assert_eq!(properties.receive_maximum, Some(77));
            assert_eq!(properties.max_packet_size, Some(100 * 1024));
            assert_eq!(properties.session_expiry_interval, Some(90));
            stream.write_all(CONNACK).await.unwrap();
            if connect.clean_start {
                assert!(ended.insert(connect.client_id), "once is enough");
                // Its DISCONNECT.
                let mut rest = Vec::new();
                let end = stream.read_to_end(&mut rest);
                within("its end", end).await.unwrap();
            } else {
                assert!(
                    ended.contains(&connect.client_id),
                    "an earlier run's session"
                );
                begun.insert(connect.client_id);
                streams.push(stream);
            }
        }
        let expected = ["gw-meters-1-0", "gw-meters-1-1"].map(str::to_owned);
        assert_eq!(begun, BTreeSet::from(expected));
        program.printed("is ready").await;
        streams.clear();
        for _ in &begun {
            let (stream, again) = within("the link again", connect(&listener)).await;
            assert!(!again.clean_start && begun.contains(&again.client_id));
            streams.push(stream);
        }
        // Before its links end: it would connect once more, and be taken for the next run.
        drop(program);
    }
}

/// Rule 12: the pauses between attempts double up to the longest, each with jitter of at
/// most a half.
#[tokio::test]
async fn a_broker_that_hangs_up_is_not_hammered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("mqtt://{}", listener.local_addr().unwrap());
    let handler = Handler::start().await;
    let plan = Plan::new(&url, &handler.url()).set_all(&[
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__RECONNECT_MIN", "50ms"),
        ("BROKER__RECONNECT_MAX", "400ms"),
    ]);
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    drop(within("the first attempt", connect(&listener)).await);
    let mut last = Instant::now();
    for pause in [50, 100, 200, 400, 400] {
        drop(within("an attempt", connect(&listener)).await);
        let (now, least) = (Instant::now(), Duration::from_millis(pause / 2));
        assert!(now - last >= least, "{:?} instead of {least:?}", now - last);
        last = now;
    }
    within("the drain", gateway.drain()).await;
}
