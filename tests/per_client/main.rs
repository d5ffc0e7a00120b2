//! One MQTT session for each device (`broker.mode = "per_client"`), on Mosquitto.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../common/mod.rs"]
mod common;
mod kicked;
mod secrets;

use common::{Adapter, Broker, Device, Handler, Peer, Plan, Process, Stage, client, until, within};
use exproto_sidecar::proto::{ClientInfo, ResultCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MODE: (&str, &str) = ("BROKER__MODE", "per_client");
const WILL: [(&str, &str); 4] = [
    ("BROKER__POOL_SIZE", "1"),
    MODE,
    ("BROKER__WILL__TOPIC", "gone/${clientid}"),
    (
        "BROKER__WILL__PAYLOAD",
        "${clientid} of ${username} is gone",
    ),
];

/// Over this broker, in the mode.
async fn stage(broker: Broker, keys: &[(&str, &str)]) -> Stage {
    let mut all = WILL.to_vec();
    all.extend(keys);
    Stage::around(broker, &all).await
}

/// A broker that knows `gateway`, `ann` and `bob`, each with the password `right`. A device may
/// read `cmd/` and write `data/` behind its own name only.
async fn guarded() -> Broker {
    let acl = "user gateway\ntopic readwrite #\npattern read cmd/%u/#\npattern write data/%u/#\n";
    Broker::guarded(&USERS, acl).await
}

const USERS: [(&str, &str); 3] = [("gateway", "right"), ("ann", "right"), ("bob", "right")];

const GATEWAY: [(&str, &str); 2] = [
    ("BROKER__USERNAME", "gateway"),
    ("BROKER__PASSWORD", "right"),
];

fn info(clientid: &str, username: &str) -> Option<ClientInfo> {
    Some(ClientInfo {
        username: username.to_owned(),
        ..client(clientid)
    })
}

/// A foreign client with this id: its socket, once the broker has taken it.
async fn rival(port: u16, clientid: &str) -> TcpStream {
    rival_as(port, clientid, None).await
}

/// With user name and password.
async fn rival_as(port: u16, clientid: &str, login: Option<(&str, &str)>) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let mut body = b"\x00\x04MQTT\x05".to_vec();
    // Clean start, and whether there are user name and password; keep-alive, no properties.
    body.push(if login.is_some() { 0xC2 } else { 0x02 });
    body.extend([0, 60, 0]);
    let login = login.map_or_else(Vec::new, |(username, password)| vec![username, password]);
    for text in [vec![clientid], login].concat() {
        body.extend([0, u8::try_from(text.len()).unwrap()]);
        body.extend(text.as_bytes());
    }
    let head = [0x10, u8::try_from(body.len()).unwrap()];
    stream
        .write_all(&[&head, &body[..]].concat())
        .await
        .unwrap();
    let mut head = [0; 4];
    within("a CONNACK", stream.read_exact(&mut head))
        .await
        .unwrap();
    assert_eq!((head[0], head[3]), (0x20, 0), "the rival is taken");
    stream
}

#[tokio::test]
async fn a_device_is_a_client_of_the_broker() {
    let stage = stage(Broker::start().await, &[]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up/#").await;
    let one = stage.subscriber("one", "down/#", 1).await;
    let two = stage.subscriber("two", "down/+", 2).await;
    stage.broker.logged("as one (").await;
    stage.broker.logged("as two (").await;
    assert_eq!(stage.admin.metric("exproto_broker_sessions_up").await, 2.0);
    assert_eq!(stage.admin.metric("exproto_broker_links_up").await, 1.0);

    for qos in 0..=2 {
        stage.publish(&one, "up/1", qos, "x").await.ok();
        assert_eq!(peer.next_text().await.1, qos as u8);
    }
    for qos in 0..=2_u8 {
        peer.publish("down/1", qos, format!("m{qos}")).await;
    }
    for device in [&one, &two] {
        let texts = stage.handler.payloads(&device.conn, 3).await;
        assert_eq!(texts, ["m0", "m1", "m2"]);
    }
    // One copy for each matching subscription of a device's, as over the pool.
    stage.subscribe(&one, "down/1", 0).await.ok();
    peer.publish("down/1", 1, "twice").await;
    let texts = stage.handler.payloads(&one.conn, 5).await;
    assert_eq!(texts[3..], ["twice", "twice"]);
    stage.adapter.raw_publish("up/raw", 1, "raw").await.ok();
    assert_eq!(peer.next_text().await.2, "raw");
    stage.finish().await;
}

#[tokio::test]
async fn the_broker_says_who_a_device_is_and_what_it_may_do() {
    let stage = stage(guarded().await, &GATEWAY).await;
    let mut peer = Peer::connect_as(stage.broker.port, Some(("gateway", "right"))).await;
    peer.subscribe("data/#").await;
    let device = stage.device().await;
    let adapter = &stage.adapter;
    for (name, password) in [("ann", "wrong"), ("eve", "right"), ("", "")] {
        let answer = adapter.authenticate_as(&device.conn, info("a1", name), password);
        let why = answer.await.refused(ResultCode::PermissionDeny);
        assert!(why.contains("the broker says not authorized"), "{why}");
    }
    let answer = adapter.authenticate_as(&device.conn, info("a1", "ann"), "right");
    answer.await.ok();
    let bob = stage.device().await;
    let answer = adapter.authenticate_as(&bob.conn, info("b1", "bob"), "right");
    answer.await.ok();

    stage.publish(&device, "data/ann/t", 1, "mine").await.ok();
    assert_eq!(peer.next_text().await.2, "mine");
    let refused = stage.publish(&device, "data/bob/t", 1, "not mine").await;
    refused.refused(ResultCode::PermissionDeny);
    // Mosquitto grants every filter, and sends what may be read.
    for one in [&device, &bob] {
        stage.subscribe(one, "cmd/#", 1).await.ok();
    }
    peer.publish("cmd/bob/x", 1, "for bob").await;
    peer.publish("cmd/ann/x", 1, "for ann").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["for ann"]);
    assert_eq!(stage.handler.payloads(&bob.conn, 1).await, ["for bob"]);
    stage.finish().await;
}

#[tokio::test]
async fn the_mqtt_authenticator_asks_a_guarded_broker() {
    let mut keys = GATEWAY.to_vec();
    keys.extend([
        ("AUTHENTICATION__1__MECHANISM", "password_based"),
        ("AUTHENTICATION__1__BACKEND", "mqtt"),
    ]);
    let stage = Stage::around(guarded().await, &keys).await;
    let device = stage.device().await;
    let adapter = &stage.adapter;
    let wrong = adapter.authenticate_as(&device.conn, info("a1", "ann"), "wrong");
    let why = wrong.await.refused(ResultCode::PermissionDeny);
    assert!(why.contains("mqtt: the broker says"), "{why}");
    let right = adapter.authenticate_as(&device.conn, info("a1", "ann"), "right");
    right.await.ok();
    // The pool is another client of the broker's, with rights of its own.
    stage.publish(&device, "data/bob/t", 1, "x").await.ok();
    stage.finish().await;
}

#[tokio::test]
async fn a_client_id_moves_to_its_newest_connection() {
    let stage = stage(Broker::start().await, &[]).await;
    let older = stage.subscriber("d", "down/#", 1).await;
    let newer = stage.subscriber("d", "down/#", 1).await;
    assert_eq!(stage.closed(&older).await, "discarded");
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("down/x", 1, "for the newer").await;
    let texts = stage.handler.payloads(&newer.conn, 1).await;
    assert_eq!(texts, ["for the newer"]);
    let up = "exproto_broker_sessions_up";
    stage.admin.metric_until(up, |up| up == 1.0).await;
    stage.finish().await;
}

#[tokio::test]
async fn the_will_follows_an_abnormal_end_and_no_other() {
    let stage = stage(Broker::start().await, &[]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("gone/#").await;

    // Neither of these: the next will to come is the one after them.
    let mut finished = stage.client("finished").await;
    finished.finish().await;
    assert_eq!(stage.closed(&finished).await, "normal");
    let closed = stage.client("closed").await;
    stage.adapter.close(&closed.conn).await.ok();
    assert_eq!(stage.closed(&closed).await, "closed_by_handler");
    let sessions = "exproto_broker_sessions";
    stage.admin.metric_until(sessions, |open| open == 0.0).await;

    let lost = stage.client("lost").await;
    let conn = lost.conn.clone();
    lost.reset();
    let reason = stage.handler.closed(&conn).await;
    assert!(reason.starts_with("socket_error"), "{reason}");
    let (topic, qos, text) = peer.next_text().await;
    assert_eq!((&*topic, qos), ("gone/lost", 0));
    assert!(text.starts_with("lost of "), "{text}");

    let silent = stage.client("silent").await;
    stage.adapter.start_timer(&silent.conn, 1).await.ok();
    assert_eq!(stage.closed(&silent).await, "keepalive_timeout");
    assert_eq!(peer.next_text().await.0, "gone/silent");

    // The gateway's end is the device's, as far as others can see.
    let _left = stage.client("left").await;
    within("the drain", stage.gateway.drain()).await;
    assert_eq!(peer.next_text().await.0, "gone/left");
}

/// The broker says it for a gateway that cannot any more, as it was asked to.
#[tokio::test]
async fn the_will_outlives_the_gateway() {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let plan = Plan::new(&broker.url(), &handler.url())
        .set_all(&WILL)
        .set("BROKER__WILL__QOS", "1")
        .set("BROKER__WILL__RETAIN", "true");
    let process = Process::run(&plan);
    let adapter = Adapter::connect(process.address("adapter on").await).await;
    let device = Device::dial(process.address("devices on").await).await;
    let conn = handler.created(device.port()).await;
    adapter.authenticate(&conn, "d1").await.ok();
    process.signal("KILL");
    let said = (
        "gone/d1".to_owned(),
        1,
        "d1 of user of d1 is gone".to_owned(),
    );
    let mut peer = Peer::connect(broker.port).await;
    peer.subscribe("gone/#").await;
    assert_eq!(peer.next_text().await, said);
    // Also for those that come later.
    let mut peer = Peer::connect(broker.port).await;
    peer.subscribe("gone/#").await;
    assert_eq!(peer.next_text().await, said);
}

#[tokio::test]
async fn a_broker_that_comes_back_finds_everything_again() {
    let mut stage = stage(Broker::with(Broker::PERSISTENT).await, &[]).await;
    let devices = [
        stage.subscriber("d0", "down/0", 1).await,
        stage.subscriber("d1", "down/1", 1).await,
    ];
    // The broker keeps for this one what comes before it is back itself.
    let mut watcher = Peer::durable(stage.broker.port, "watcher").await;
    watcher.subscribe("up").await;
    let up = "exproto_broker_sessions_up";
    stage.broker.save().await;
    drop(watcher);
    stage.broker.kill();
    stage.admin.metric_until(up, |up| up == 0.0).await;
    // Held until the broker is back.
    let held = {
        let (adapter, conn) = (stage.adapter.clone(), devices[0].conn.clone());
        tokio::spawn(async move { adapter.publish(&conn, "up", 1, "held").await })
    };
    let outbox = "exproto_broker_outbox_messages";
    stage.admin.metric_until(outbox, |held| held == 1.0).await;
    stage.broker.up().await;
    within("the publish", held).await.unwrap().ok();
    stage.admin.metric_until(up, |up| up == 2.0).await;
    stage.broker.caught_up().await;
    let published = "Received PUBLISH from d0 ";
    assert_eq!(stage.broker.counted(published).await, 1);
    let mut watcher = Peer::durable(stage.broker.port, "watcher").await;
    let held = ("up".to_owned(), 1, "held".to_owned());
    assert_eq!(watcher.next_text().await, held);
    let mut peer = Peer::connect(stage.broker.port).await;
    for (number, device) in devices.iter().enumerate() {
        peer.publish(&format!("down/{number}"), 1, format!("m{number}"))
            .await;
        let texts = stage.handler.payloads(&device.conn, 1).await;
        assert_eq!(texts, [format!("m{number}")]);
    }
    stage.finish().await;
}

#[tokio::test]
async fn what_waits_for_an_absent_broker_is_bounded() {
    let keys = [
        ("BROKER__SESSION_OUTBOX_MAX_MESSAGES", "2"),
        ("BROKER__PUBLISH_TIMEOUT", "1s"),
    ];
    let mut stage = stage(Broker::start().await, &keys).await;
    let device = stage.client("d").await;
    stage.broker.kill();
    let up = "exproto_broker_sessions_up";
    stage.admin.metric_until(up, |up| up == 0.0).await;
    let publish = || stage.publish(&device, "up", 1, "x");
    let (one, two, third) = tokio::join!(publish(), publish(), async {
        let outbox = "exproto_broker_outbox_messages";
        stage.admin.metric_until(outbox, |held| held == 2.0).await;
        publish().await
    });
    let why = third.refused(ResultCode::Unknown);
    assert!(why.contains("the outbox is full"), "{why}");
    for answer in [one, two] {
        answer.refused(ResultCode::Unknown);
    }
    // Nobody says no while the broker is away, and nobody gets in.
    let newcomer = stage.device().await;
    let answer = stage.adapter.authenticate(&newcomer.conn, "new").await;
    let why = answer.refused(ResultCode::Unknown);
    assert!(why.contains("no session at the broker"), "{why}");
    stage.broker.up().await;
    stage.adapter.authenticate(&newcomer.conn, "new").await.ok();
    stage.finish().await;
}

#[tokio::test]
async fn no_more_sessions_than_allowed() {
    let stage = stage(Broker::start().await, &[("BROKER__MAX_SESSIONS", "2")]).await;
    let one = stage.client("one").await;
    let _two = stage.client("two").await;
    let three = stage.device().await;
    let answer = stage.adapter.authenticate(&three.conn, "three").await;
    let why = answer.refused(ResultCode::Unknown);
    assert!(why.contains("broker.max_sessions"), "{why}");
    let refused = "exproto_broker_sessions_refused_total";
    assert_eq!(stage.admin.metric(refused).await, 1.0);
    // A place is free when its session is over.
    stage.adapter.close(&one.conn).await.ok();
    let adapter = &stage.adapter;
    let conn = &three.conn;
    until("a place", || async move {
        let answer = adapter.authenticate(conn, "three").await;
        (answer.code == ResultCode::Success).then_some(())
    })
    .await;
    stage.finish().await;
}

/// Sessions cost no thread, and all of them are served.
#[tokio::test]
async fn hundreds_of_sessions() {
    const SESSIONS: usize = 300;
    let stage = stage(Broker::start().await.quiet(), &[]).await;
    let mut devices = Vec::new();
    for number in 0..SESSIONS {
        let filter = format!("down/{number}");
        devices.push(stage.subscriber(&format!("d{number}"), &filter, 1).await);
    }
    let up = stage.admin.metric("exproto_broker_sessions_up").await;
    assert_eq!(up, SESSIONS as f64);
    let mut peer = Peer::connect(stage.broker.port).await;
    for (number, device) in devices.iter().enumerate() {
        peer.publish(&format!("down/{number}"), 1, number.to_string())
            .await;
        let texts = stage.handler.payloads(&device.conn, 1).await;
        assert_eq!(texts, [number.to_string()]);
    }
    stage.finish().await;
}
