//! Two gateways on one broker, with names of their own and with the same.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::time::Duration;

use common::{Admin, Broker, Handler, Peer, Plan, Process, Stage, node_name, within};
use exproto_sidecar::gateway::Gateway;

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
    let adapter = common::Adapter::connect(other.addresses().adapter).await;
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
