//! Who ends a device's own session, and who does not.

use std::fs;

use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::ResultCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::common::{
    Adapter, Admin, Broker, Device, Handler, Peer, Plan, Proxy, node_name, within,
};
use super::{GATEWAY, USERS, WILL, guarded, info, rival, stage};

#[tokio::test]
async fn who_loses_its_session_to_another_client_is_kicked() {
    let stage = stage(Broker::start().await, &[]).await;
    let mut device = stage.client("d1").await;
    let other = stage.client("d2").await;
    // A client that comes back whenever it is taken over, as clients do.
    let port = stage.broker.port;
    let rivals = tokio::spawn(async move {
        loop {
            let mut stream = rival(port, "d1").await;
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
    });
    assert_eq!(stage.closed(&device).await, "kicked");
    rivals.abort();
    device.closed().await;
    stage.publish(&other, "t", 1, "still there").await.ok();
    let kicked = "exproto_broker_sessions_kicked_total";
    assert_eq!(stage.admin.metric(kicked).await, 1.0);
    stage.finish().await;
}

/// A device that has moved to another gateway: there it stays, and the older connection goes.
#[tokio::test]
async fn the_newer_of_two_gateways_has_the_session() {
    let stage = stage(Broker::start().await, &[("BROKER__KEEP_ALIVE", "5s")]).await;
    let plan = stage.plan.clone().set("NODE_NAME", &node_name("second"));
    let second = Gateway::start(&plan.config()).await.unwrap();
    within("the second gateway", second.ready()).await;
    let adapter = Adapter::connect(second.addresses().adapter.tcp().unwrap()).await;
    let older = stage.subscriber("d1", "down/#", 1).await;
    // Its link has lived for seconds: a young one could be taken for one that is contested.
    stage.broker.logged("Received PINGREQ from d1").await;
    let newer = Device::dial(second.addresses().listeners["tcp.default"]).await;
    let conn = stage.handler.created(newer.port()).await;
    adapter.authenticate(&conn, "d1").await.ok();
    adapter.subscribe(&conn, "down/#", 1).await.ok();
    assert_eq!(stage.closed(&older).await, "kicked");
    let admin = Admin(second.addresses().admin.unwrap());
    let up = "exproto_broker_sessions_up";
    admin.metric_until(up, |up| up == 1.0).await;
    adapter.publish(&conn, "up", 1, "still there").await.ok();
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("down/x", 1, "for the newer").await;
    let texts = stage.handler.payloads(&conn, 1).await;
    assert_eq!(texts, ["for the newer"]);
    within("the drain", second.drain()).await;
    stage.finish().await;
}

/// Somebody asks for a device's client id while the broker does not answer, and meanwhile the
/// device's link is given up: it keeps its session, and what waits in it.
#[tokio::test]
async fn who_is_asked_for_in_vain_stays() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [
        ("BROKER__URL", url.as_str()),
        ("BROKER__KEEP_ALIVE", "5s"),
        ("BROKER__CONNECT_TIMEOUT", "12s"),
        ("BROKER__PUBLISH_TIMEOUT", "29s"),
    ];
    let stage = stage(broker, &keys).await;
    let device = stage.client("d1").await;
    let other = stage.device().await;
    let dialled = proxy.connections();
    proxy.blackhole();
    let asked = tokio::spawn({
        let (adapter, conn) = (stage.adapter.clone(), other.conn.clone());
        async move { adapter.authenticate(&conn, "d1").await }
    });
    proxy.dialled(dialled + 1).await;
    let published = tokio::spawn({
        let (adapter, conn) = (stage.adapter.clone(), device.conn.clone());
        async move { adapter.publish(&conn, "up", 1, "kept").await }
    });
    let up = "exproto_broker_sessions_up";
    stage.admin.metric_until(up, |up| up < 0.5).await;
    proxy.mend();
    let answer = within("an answer", asked).await.unwrap();
    answer.refused(ResultCode::Unknown);
    within("the publish", published).await.unwrap().ok();
    stage.publish(&device, "up", 1, "on").await.ok();
    assert_eq!(stage.handler.names(&device.conn), ["created"]);
    stage.finish().await;
}

/// An operator disables the user: Mosquitto says *administrative action*.
#[tokio::test]
async fn who_is_kicked_by_the_operator_is_kicked() {
    let mut broker = Broker::limited().await;
    broker.kill();
    let file = broker.dir.path().join("roles.json");
    let operator = r#""acls":[{"acltype":"publishClientSend","topic":"$CONTROL/#","priority":9,"allow":true},"#;
    let roles = fs::read_to_string(&file).unwrap();
    fs::write(&file, roles.replacen(r#""acls":["#, operator, 1)).unwrap();
    broker.up().await;
    let stage = stage(broker, &[]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let control = "$CONTROL/dynamic-security/v1";
    let create = r#"{"commands":[{"command":"createClient","username":"ann","password":"right"}]}"#;
    peer.publish(control, 1, create).await;
    let device = stage.device().await;
    let adapter = &stage.adapter;
    let answer = adapter.authenticate_as(&device.conn, info("a1", "ann"), "right");
    answer.await.ok();
    let disable = r#"{"commands":[{"command":"disableClient","username":"ann"}]}"#;
    peer.publish(control, 1, disable).await;
    assert_eq!(stage.closed(&device).await, "kicked");
    let again = stage.device().await;
    let answer = adapter.authenticate_as(&again.conn, info("a1", "ann"), "right");
    answer.await.refused(ResultCode::PermissionDeny);
    stage.finish().await;
}

#[tokio::test]
async fn who_is_refused_when_the_broker_comes_back_is_kicked() {
    let mut stage = stage(guarded().await, &GATEWAY).await;
    let mut devices = Vec::new();
    for name in ["ann", "bob"] {
        let device = stage.device().await;
        let info = info(name, name);
        let answer = stage.adapter.authenticate_as(&device.conn, info, "right");
        answer.await.ok();
        devices.push(device);
    }
    stage.broker.kill();
    let [gateway, _, bob] = USERS;
    stage.broker.users(&[gateway, bob]);
    stage.broker.up().await;
    assert_eq!(stage.closed(&devices[0]).await, "kicked");
    stage.publish(&devices[1], "data/bob/t", 1, "x").await.ok();
    stage.finish().await;
}

/// A broker that is busy, or starts, has not said who a device is.
#[tokio::test]
async fn who_is_put_off_when_the_broker_comes_back_is_not_kicked() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("mqtt://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let (seen, mut attempts) = watch::channel(0);
    // CONNACK: welcome, server unavailable, server busy, use another server.
    let answers = [0, 0x88, 0x89, 0x89, 0x88, 0x9C, 0];
    let broker = tokio::spawn(async move {
        let mut held = Vec::new();
        let mut number = 0;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut connect = [0; 256];
            let length = stream.read(&mut connect).await.unwrap();
            let is_the_device = connect[..length]
                .windows(4)
                .any(|part| part == b"\x00\x02d1");
            let answer = if is_the_device { answers[number] } else { 0 };
            stream.write_all(&[0x20, 3, 0, answer, 0]).await.unwrap();
            if !is_the_device {
                held.push(stream);
                continue;
            }
            number += 1;
            seen.send_replace(number);
            // The first link breaks, the last one stays.
            if number == answers.len() {
                held.push(stream);
            }
        }
    });
    let handler = Handler::start().await;
    let plan = Plan::new(&url, &handler.url()).set_all(&WILL[..2]);
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    let adapter = Adapter::connect(gateway.addresses().adapter.tcp().unwrap()).await;
    let device = Device::dial(gateway.addresses().listeners["tcp.default"]).await;
    let conn = handler.created(device.port()).await;
    adapter.authenticate(&conn, "d1").await.ok();
    let all = attempts.wait_for(|number| *number == answers.len());
    within("all attempts", all).await.unwrap();
    let admin = Admin(gateway.addresses().admin.unwrap());
    let up = "exproto_broker_sessions_up";
    admin.metric_until(up, |up| up == 1.0).await;
    assert_eq!(handler.names(&conn), ["created"]);
    broker.abort();
    within("the drain", gateway.drain()).await;
}
