//! ConnectionAdapter: every result code of the table, for each of the eight calls. A
//! refusal is gRPC status OK with a code and a message; the helpers assert both.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Adapter, Answer, Broker, Handler, Peer, Plan, Stage, client, within};
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::{ClientInfo, ResultCode};

/// The seven calls that name a connection, each valid but for `conn`.
async fn every_call(adapter: &Adapter, conn: &str) -> Vec<(&'static str, Answer)> {
    vec![
        ("Send", adapter.send(conn, "x").await),
        ("Close", adapter.close(conn).await),
        ("Authenticate", adapter.authenticate(conn, "c").await),
        ("StartTimer", adapter.start_timer(conn, 10).await),
        ("Publish", adapter.publish(conn, "t", 1, "x").await),
        ("Subscribe", adapter.subscribe(conn, "t", 1).await),
        ("Unsubscribe", adapter.unsubscribe(conn, "t").await),
    ]
}

#[track_caller]
fn all_refused(answers: Vec<(&'static str, Answer)>, code: ResultCode) {
    for (call, answer) in answers {
        assert_eq!(answer.code, code, "{call}: {}", answer.message);
        assert!(!answer.message.is_empty(), "{call} must say why");
    }
}

/// Empty, or not an id of ours: PARAMS_TYPE_ERROR.
#[tokio::test]
async fn a_malformed_conn_is_a_params_type_error() {
    let stage = Stage::start().await;
    let device = stage.client("c0").await;
    let shorter = &device.conn[1..];
    let upper = device.conn.to_uppercase();
    let erlang = "g2gDdwxub2RlQGhvc3QuaW8AAAABAAAAAg==";
    for conn in ["", " ", "nonsense", erlang, shorter, &upper, "\u{0}", "ä"] {
        let answers = every_call(&stage.adapter, conn).await;
        all_refused(answers, ResultCode::ParamsTypeError);
    }
    stage.finish().await;
}

/// Well-formed but unknown, of another gateway, or dead: CONN_PROCESS_NOT_ALIVE.
#[tokio::test]
async fn an_unknown_or_dead_conn_is_not_alive() {
    let stage = Stage::start().await;
    let (broker, handler) = (&stage.broker, &stage.handler);
    let other = Plan::new(&broker.url(), &handler.url()).config();
    let other = Gateway::start(&other).await.unwrap();
    let foreign = common::Device::dial(other.addresses().listeners["tcp.default"]).await;
    let foreign_conn = handler.created(foreign.port()).await;

    let dead = stage.client("dead").await;
    let dead_conn = dead.conn.clone();
    drop(dead);
    handler.closed(&dead_conn).await;
    // Answering OnSocketClosed is what ends it.
    let gone = "exproto_connections{listener=\"tcp.default\"}";
    stage.admin.metric_until(gone, |open| open < 0.5).await;

    let alive = stage.client("alive").await;
    let last = if alive.conn.ends_with('0') { "1" } else { "0" };
    let unknown = format!("{}{last}", &alive.conn[..alive.conn.len() - 1]);
    for conn in [&foreign_conn, &dead_conn, &unknown] {
        let answers = every_call(&stage.adapter, conn).await;
        all_refused(answers, ResultCode::ConnProcessNotAlive);
    }
    within("the other gateway's drain", other.drain()).await;
    stage.finish().await;
}

/// No clientinfo, or an empty proto_name, proto_ver or clientid:
/// REQUIRED_PARAMS_MISSED. It may be tried again; an empty username is no fault.
#[tokio::test]
async fn an_incomplete_introduction_is_refused_and_may_be_tried_again() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let missed = ResultCode::RequiredParamsMissed;
    let complete = client("c");
    let name = ClientInfo {
        proto_name: String::new(),
        ..complete.clone()
    };
    let version = ClientInfo {
        proto_ver: String::new(),
        ..complete.clone()
    };
    let id = ClientInfo {
        clientid: String::new(),
        ..complete.clone()
    };
    for (info, field) in [
        (None, "clientinfo"),
        (Some(name), "proto_name"),
        (Some(version), "proto_ver"),
        (Some(id), "clientid"),
    ] {
        let answer = stage.adapter.authenticate_as(&device.conn, info, "").await;
        let message = answer.refused(missed);
        assert!(message.contains(field), "{message:?} must name {field}");
    }
    let nameless = ClientInfo {
        username: String::new(),
        ..complete
    };
    let answer = stage
        .adapter
        .authenticate_as(&device.conn, Some(nameless), "")
        .await;
    answer.ok();
    stage.finish().await;
}

/// A client id that no topic and no MQTT string may hold: PARAMS_TYPE_ERROR, and
/// another may be tried.
#[tokio::test]
async fn a_client_id_that_mqtt_forbids_is_refused() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let long = "x".repeat(65_536);
    for bad in ["a\u{0}b", "a\nb", &long] {
        let answer = stage.adapter.authenticate(&device.conn, bad).await;
        answer.refused(ResultCode::ParamsTypeError);
        let mut info = client("good");
        info.username = bad.to_owned();
        let answer = stage
            .adapter
            .authenticate_as(&device.conn, Some(info), "")
            .await;
        answer.refused(ResultCode::ParamsTypeError);
    }
    stage.adapter.authenticate(&device.conn, "good").await.ok();
    stage.finish().await;
}

/// A device that took the client id of one of the gateway's own connections would have the broker
/// end that one's session, and what waits in it for everybody.
#[tokio::test]
async fn the_gateways_own_client_ids_are_refused() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let mut env = stage.plan.env().iter();
    let (_, node) = env.find(|(key, _)| key == "EXPROTO_NODE_NAME").unwrap();
    for own in ["0", "1", "63", "retained"] {
        let clientid = format!("exproto-{node}-{own}");
        let answer = stage.adapter.authenticate(&device.conn, &clientid).await;
        let message = answer.refused(ResultCode::PermissionDeny);
        assert!(message.contains("gateway's own"), "{message}");
    }
    let clientid = format!("exproto-{node}-device");
    stage
        .adapter
        .authenticate(&device.conn, &clientid)
        .await
        .ok();
    stage.finish().await;
}

/// Authenticate a second time: PERMISSION_DENY, and the first stays.
#[tokio::test]
async fn a_second_authenticate_is_denied() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let device = stage.subscriber("first", "t", 1).await;
    for id in ["first", "second"] {
        let answer = stage.adapter.authenticate(&device.conn, id).await;
        answer.refused(ResultCode::PermissionDeny);
    }
    peer.publish("t", 1, "x").await;
    stage.handler.messages(&device.conn, 1).await;
    // The refused id was not taken from anybody.
    let other = stage.client("second").await;
    assert_eq!(stage.handler.names(&other.conn), ["created"]);
    stage.finish().await;
}

/// Publish, Subscribe, Unsubscribe before Authenticate: PERMISSION_DENY. Send, Close
/// and StartTimer need none.
#[tokio::test]
async fn pubsub_needs_a_client_and_the_rest_does_not() {
    let stage = Stage::start().await;
    let mut device = stage.device().await;
    let (adapter, conn) = (&stage.adapter, device.conn.clone());
    let denied = ResultCode::PermissionDeny;
    adapter.publish(&conn, "t", 1, "x").await.refused(denied);
    adapter.subscribe(&conn, "t", 1).await.refused(denied);
    adapter.unsubscribe(&conn, "t").await.refused(denied);
    adapter.start_timer(&conn, 100).await.ok();
    adapter.send(&conn, "x").await.ok();
    adapter.close(&conn).await.ok();
    assert_eq!(device.read_all().await, b"x");
    stage.finish().await;
}

/// QoS other than 0, 1, 2: PARAMS_TYPE_ERROR.
#[tokio::test]
async fn a_qos_that_does_not_exist_is_refused() {
    let stage = Stage::start().await;
    let device = stage.client("c").await;
    let wrong = ResultCode::ParamsTypeError;
    for qos in [3, 4, 255, u32::MAX] {
        stage.publish(&device, "t", qos, "x").await.refused(wrong);
        stage.subscribe(&device, "t", qos).await.refused(wrong);
        stage
            .adapter
            .raw_publish("t", qos, "x")
            .await
            .refused(wrong);
    }
    stage.finish().await;
}

/// An invalid topic is PARAMS_TYPE_ERROR, and nothing of it is sent to the broker.
#[tokio::test]
async fn an_invalid_topic_is_refused_before_the_broker_sees_it() {
    let stage = Stage::start().await;
    let device = stage.client("c").await;
    let long = "x".repeat(65_536);
    let wrong = ResultCode::ParamsTypeError;
    for topic in ["", "a/+", "#", "a+", "a#b", "a\u{0}b", &long] {
        let answer = stage.publish(&device, topic, 1, "x").await;
        answer.refused(wrong);
        stage
            .adapter
            .raw_publish(topic, 1, "x")
            .await
            .refused(wrong);
    }
    for filter in [
        "",
        "a/#/b",
        "a#",
        "a+/b",
        "a\u{0}b",
        "$share",
        "$share/",
        "$share/g",
        "$share/g/",
        "$share//t",
        "$share/g+/t",
        &long,
    ] {
        let answer = stage.subscribe(&device, filter, 1).await;
        answer.refused(wrong);
        let answer = stage.adapter.unsubscribe(&device.conn, filter).await;
        answer.refused(wrong);
    }
    // What is allowed comes after it and is seen.
    stage.publish(&device, "a/b", 1, "x").await.ok();
    stage.adapter.raw_publish("a/b", 1, "x").await.ok();
    stage.subscribe(&device, "$share/g/+/#", 1).await.ok();
    stage.broker.caught_up().await;
    let seen = |packet: &str| {
        stage
            .broker
            .count(&format!("Received {packet} from exproto"))
    };
    assert_eq!(seen("PUBLISH"), 2);
    assert_eq!(seen("SUBSCRIBE"), 1);
    assert_eq!(seen("UNSUBSCRIBE"), 0);
    stage.finish().await;
}

/// A topic that is too long only with its mountpoint is refused too.
#[tokio::test]
async fn the_mountpoint_counts_into_the_length() {
    let stage = Stage::with(&[("MOUNTPOINT", "m/")]).await;
    let device = stage.client("c").await;
    let longest = "x".repeat(65_534);
    let wrong = ResultCode::ParamsTypeError;
    stage
        .publish(&device, &longest, 1, "x")
        .await
        .refused(wrong);
    stage.subscribe(&device, &longest, 1).await.refused(wrong);
    stage.publish(&device, &longest[1..], 1, "x").await.ok();
    stage.finish().await;
}

/// StartTimer with interval 0 or a type that does not exist: PARAMS_TYPE_ERROR.
#[tokio::test]
async fn a_timer_of_no_length_or_kind_is_refused() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let wrong = ResultCode::ParamsTypeError;
    let (adapter, conn) = (&stage.adapter, &device.conn);
    adapter.start_timer(conn, 0).await.refused(wrong);
    adapter.start_timer_of(conn, 1, 10).await.refused(wrong);
    adapter.start_timer_of(conn, -1, 10).await.refused(wrong);
    adapter.start_timer(conn, u32::MAX).await.ok();
    stage.finish().await;
}

/// Unsubscribe from what was never subscribed is done already.
#[tokio::test]
async fn an_unsubscribe_without_a_subscription_succeeds() {
    let stage = Stage::start().await;
    let device = stage.client("c").await;
    stage.adapter.unsubscribe(&device.conn, "t").await.ok();
    stage.finish().await;
}

/// RawPublish: no connection, no mountpoint.
#[tokio::test]
async fn a_raw_publish_has_no_mountpoint() {
    let stage = Stage::with(&[("MOUNTPOINT", "mounted/")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    for qos in 0..=2 {
        stage.adapter.raw_publish("raw", qos, "x").await.ok();
        assert_eq!(
            peer.next_text().await,
            ("raw".into(), qos as u8, "x".into())
        );
    }
    stage.finish().await;
}

/// `raw_publish = false`: PERMISSION_DENY.
#[tokio::test]
async fn a_raw_publish_can_be_turned_off() {
    let stage = Stage::with(&[("RAW_PUBLISH", "false")]).await;
    let answer = stage.adapter.raw_publish("raw", 1, "x").await;
    let message = answer.refused(ResultCode::PermissionDeny);
    assert!(message.contains("raw_publish"), "{message}");
    let device = stage.client("c").await;
    stage.publish(&device, "t", 1, "x").await.ok();
    assert_eq!(
        stage.broker.counted("Received PUBLISH from exproto").await,
        1
    );
    stage.finish().await;
}

/// The broker denies: PERMISSION_DENY with its reason, and what is allowed works as
/// before. (Mosquitto 2.0.11 hangs up after it denied a publish: the link heals.)
#[tokio::test]
async fn what_the_broker_denies_is_permission_deny() {
    let stage = Stage::around(Broker::limited().await, &[("BROKER__POOL_SIZE", "1")]).await;
    let device = stage.client("c").await;
    let denied = ResultCode::PermissionDeny;
    for qos in [1, 2] {
        let answer = stage.publish(&device, "forbidden/t", qos, "x").await;
        let message = answer.refused(denied);
        assert!(message.contains("not authorized"), "{message}");
        let answer = stage.adapter.raw_publish("forbidden/t", qos, "x").await;
        answer.refused(denied);
    }
    for qos in 0..=2 {
        let answer = stage.subscribe(&device, "forbidden/#", qos).await;
        let message = answer.refused(denied);
        assert!(message.contains("not authorized"), "{message}");
    }
    stage.publish(&device, "allowed", 1, "x").await.ok();
    stage.subscribe(&device, "allowed", 1).await.ok();
    stage.finish().await;
}

/// A refused subscription is none: the next attempt asks the broker again.
#[tokio::test]
async fn a_refused_subscription_leaves_nothing_behind() {
    let stage = Stage::around(Broker::limited().await, &[]).await;
    let first = stage.client("first").await;
    let second = stage.client("second").await;
    for filter in ["forbidden/t", "$share/g/forbidden/t"] {
        for device in [&first, &second] {
            let answer = stage.subscribe(device, filter, 1).await;
            answer.refused(ResultCode::PermissionDeny);
        }
    }
    stage.finish().await;
}

/// Calls are counted by result code.
#[tokio::test]
async fn calls_are_counted_by_code() {
    let stage = Stage::start().await;
    let device = stage.client("c").await;
    stage.publish(&device, "t", 1, "x").await.ok();
    let refused = stage.publish(&device, "t", 7, "x").await;
    refused.refused(ResultCode::ParamsTypeError);
    let count = |method: &str, code: &str| {
        format!("exproto_adapter_calls_total{{method=\"{method}\",code=\"{code}\"}}")
    };
    for (name, expected) in [
        (count("Publish", "SUCCESS"), 1.0),
        (count("Publish", "PARAMS_TYPE_ERROR"), 1.0),
        (count("Authenticate", "SUCCESS"), 1.0),
    ] {
        let found = stage.admin.metric(&name).await;
        assert!((found - expected).abs() < 0.5, "{name} is {found}");
    }
    stage.finish().await;
}

/// A handler on a connection of its own reaches every connection, whichever shard
/// serves either.
#[tokio::test]
async fn any_adapter_connection_reaches_any_device() {
    let stage = Stage::with(&[("SHARDS", "3")]).await;
    let mut devices = Vec::new();
    for _ in 0..6 {
        devices.push(stage.device().await);
    }
    for _ in 0..4 {
        let adapter = Adapter::connect(stage.gateway.addresses().adapter.tcp().unwrap()).await;
        for device in &mut devices {
            adapter.send(&device.conn, "hello").await.ok();
            assert_eq!(device.read(5).await, b"hello");
        }
    }
    stage.finish().await;
}

/// The adapter answers before any handler is there to be called.
#[tokio::test]
async fn the_adapter_serves_without_a_handler() {
    let stage = Stage::assemble(Broker::start().await, Handler::absent(), &[]).await;
    stage.adapter.raw_publish("t", 1, "x").await.ok();
    stage
        .adapter
        .send("", "x")
        .await
        .refused(ResultCode::ParamsTypeError);
    stage.finish().await;
}
