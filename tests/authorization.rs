//! What a device may do: rules of files, of services, and those that came with its authentication.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::path::Path;

use common::{Authority, Device, Service, Stage, client, hs256, until, within};
use exproto_sidecar::proto::{ClientInfo, ResultCode};
use exproto_sidecar::tls;
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// A device that is a client, with this user name.
async fn client_of(stage: &Stage, clientid: &str, username: &str) -> Device {
    let device = stage.device().await;
    let info = ClientInfo {
        username: username.to_owned(),
        ..client(clientid)
    };
    stage
        .adapter
        .authenticate_as(&device.conn, Some(info), "p")
        .await
        .ok();
    device
}

#[track_caller]
fn denied(answer: common::Answer) {
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("the rules of access do not allow"), "{why}");
}

const RULES: &str = r#"
[[rules]]                        # nobody listens to everything
permission = "deny"
action = "subscribe"
topics = ["$SYS/#", "eq #"]

[[rules]]
permission = "allow"
username = "admin"

[[rules]]
permission = "deny"
topics = ["plant/secret/#"]

[[rules]]
permission = "allow"
topics = ["plant/${clientid}/#", "plant/all"]
"#;

#[tokio::test]
async fn rules_of_a_file_count_with_the_mountpoint_and_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acl.toml");
    fs::write(&file, RULES).unwrap();
    let stage = Stage::with(&[
        ("MOUNTPOINT", "plant/"),
        ("AUTHORIZATION__NO_MATCH", "deny"),
        ("AUTHORIZATION__SOURCES__1__TYPE", "file"),
        ("AUTHORIZATION__SOURCES__1__PATH", file.to_str().unwrap()),
    ])
    .await;
    let device = client_of(&stage, "c1", "u").await;
    stage.subscribe(&device, "c1/#", 1).await.ok();
    stage.publish(&device, "c1/x", 1, "mine").await.ok();
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["mine"]);
    stage.subscribe(&device, "all", 0).await.ok();
    stage.subscribe(&device, "$share/g/c1/+", 0).await.ok();
    denied(stage.publish(&device, "c2/x", 1, "x").await);
    for filter in ["c2/x", "#", "+/x", "secret/#", "$share/g/c2/+"] {
        denied(stage.subscribe(&device, filter, 1).await);
    }
    // One that names itself so that it would be everybody.
    let plus = client_of(&stage, "+", "u").await;
    denied(stage.subscribe(&plus, "+/x", 1).await);
    let admin = client_of(&stage, "c3", "admin").await;
    stage.subscribe(&admin, "c1/x", 0).await.ok();
    // RawPublish is nobody's.
    stage.adapter.raw_publish("anywhere", 0, "x").await.ok();
    let count = |outcome: &str| format!("exproto_authorizations_total{{outcome=\"{outcome}\"}}");
    assert_eq!(stage.admin.metric(&count("deny")).await, 7.0);
    assert_eq!(stage.admin.metric(&count("allow")).await, 5.0);

    // A fault leaves the rules that there are; a change counts for who is there already.
    fs::write(&file, "rules = 1").unwrap();
    let failed = r#"exproto_authentication_reloads_total{outcome="failed"}"#;
    stage.admin.metric_until(failed, |count| count >= 1.0).await;
    denied(stage.publish(&device, "c2/x", 1, "x").await);
    fs::write(&file, "[[rules]]\npermission = \"allow\"\n").unwrap();
    until("the new rules", || async {
        let answer = stage.publish(&device, "c2/x", 1, "x").await;
        (answer.code == ResultCode::Success).then_some(())
    })
    .await;
    stage.finish().await;
}

#[tokio::test]
async fn who_does_what_it_may_not_can_be_closed_and_raw_publish_can_be_checked() {
    let stage = Stage::with(&[
        ("AUTHORIZATION__NO_MATCH", "deny"),
        ("AUTHORIZATION__DENY_ACTION", "disconnect"),
        ("AUTHORIZATION__CHECK_RAW_PUBLISH", "true"),
    ])
    .await;
    let device = client_of(&stage, "c1", "u").await;
    denied(stage.publish(&device, "t", 0, "x").await);
    assert_eq!(stage.closed(&device).await, "kicked");
    denied(stage.adapter.raw_publish("t", 0, "x").await);
    stage.finish().await;
}

#[tokio::test]
async fn a_service_is_asked_once_for_each_wish() {
    let service = Service::start().await;
    let url = service.url("/acl");
    let stage = Stage::with(&[
        ("AUTHORIZATION__NO_MATCH", "deny"),
        ("AUTHORIZATION__CACHE_MAX_SIZE", "2"),
        ("AUTHORIZATION__CACHE_TTL", "1h"),
        ("AUTHORIZATION__SOURCES__1__TYPE", "http"),
        ("AUTHORIZATION__SOURCES__1__URL", &url),
    ])
    .await;
    let device = client_of(&stage, "c1", "u").await;
    service.says(&json!({"result": "allow"}));
    stage.publish(&device, "a", 1, "x").await.ok();
    let body: serde_json::Value = serde_json::from_str(&service.asked(1).await.body).unwrap();
    assert_eq!(
        body,
        json!({"clientid": "c1", "username": "u", "action": "publish", "topic": "a", "qos": "1"})
    );
    service.says(&json!({"result": "deny"}));
    // Remembered; another action, QoS or topic is another wish.
    stage.publish(&device, "a", 1, "x").await.ok();
    denied(stage.subscribe(&device, "a", 1).await);
    denied(stage.subscribe(&device, "a", 1).await);
    assert_eq!(service.asked.borrow().len(), 2);
    // Two are remembered: the oldest goes.
    denied(stage.publish(&device, "b", 1, "x").await);
    denied(stage.publish(&device, "a", 1, "x").await);
    assert_eq!(service.asked.borrow().len(), 4);
    // Another connection knows nothing of it.
    let other = client_of(&stage, "c2", "u").await;
    denied(stage.publish(&other, "b", 1, "x").await);
    assert_eq!(service.asked.borrow().len(), 5);
    // What it leaves to others is for no_match, and a fault is not remembered.
    service.says(&json!({"result": "ignore"}));
    denied(stage.publish(&other, "c", 1, "x").await);
    service.answers(500, "text/html", "<html>");
    denied(stage.publish(&other, "d", 1, "x").await);
    service.answers(204, "text/plain", "");
    stage.publish(&other, "d", 1, "x").await.ok();
    stage.finish().await;
}

#[tokio::test]
async fn a_decision_is_remembered_for_a_while_only() {
    let service = Service::start().await;
    let url = service.url("/acl");
    let stage = Stage::with(&[
        ("AUTHORIZATION__CACHE_TTL", "300ms"),
        ("AUTHORIZATION__SOURCES__1__TYPE", "http"),
        ("AUTHORIZATION__SOURCES__1__URL", &url),
    ])
    .await;
    let device = client_of(&stage, "c1", "u").await;
    service.says(&json!({"result": "allow"}));
    stage.publish(&device, "a", 1, "x").await.ok();
    service.says(&json!({"result": "deny"}));
    let refused = until("another decision", || async {
        let answer = stage.publish(&device, "a", 1, "x").await;
        (answer.code != ResultCode::Success).then_some(answer)
    });
    denied(refused.await);
    assert_eq!(service.asked.borrow().len(), 2);
    stage.finish().await;
}

#[tokio::test]
async fn a_service_that_hangs_or_errs_denies_and_holds_up_nobody_who_does_not_need_it() {
    let service = Service::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acl.toml");
    fs::write(&file, RULES).unwrap();
    let (url, file) = (service.url("/acl"), file.to_str().unwrap());
    let stage = Stage::with(&[
        ("AUTHORIZATION__SOURCES__1__TYPE", "file"),
        ("AUTHORIZATION__SOURCES__1__PATH", file),
        ("AUTHORIZATION__SOURCES__2__TYPE", "http"),
        ("AUTHORIZATION__SOURCES__2__URL", &url),
        ("AUTHORIZATION__SOURCES__2__REQUEST_TIMEOUT", "20s"),
    ])
    .await;
    let gate = service.hold();
    let waits = client_of(&stage, "c1", "u").await;
    let (adapter, conn) = (stage.adapter.clone(), waits.conn.clone());
    let waiting = tokio::spawn(async move { adapter.publish(&conn, "x", 1, "x").await });
    service.asked(1).await;
    // Also on the same connection: the file decides.
    let other = client_of(&stage, "c2", "u").await;
    for number in 0..50 {
        let (device, own) = [(&waits, "plant/c1/x"), (&other, "plant/c2/x")][number % 2];
        stage.publish(device, own, 1, "x").await.ok();
    }
    assert!(!waiting.is_finished());
    service.says(&json!({"result": "allow"}));
    gate.open();
    within("its answer", waiting).await.unwrap().ok();
    // The default of no_match would have allowed it.
    let large = format!(
        "{{\"result\":\"allow\",\"x\":\"{}\"}}",
        "x".repeat(10_000_000)
    );
    for (status, kind, body) in [
        (500, "application/json", "{\"result\":\"allow\"}"),
        (200, "text/html", "<html>allow</html>"),
        (200, "application/json", "{}"),
        (200, "application/json", &large),
    ] {
        service.answers(status, kind, body);
        denied(stage.publish(&other, "y", 1, "x").await);
    }
    // A service that is dead shows.
    for (outcome, count) in [("allow", 1.0), ("deny", 0.0), ("error", 4.0)] {
        let name =
            format!("exproto_authorization_requests_total{{number=\"2\",outcome=\"{outcome}\"}}");
        assert_eq!(stage.admin.metric(&name).await, count, "{outcome}");
    }
    stage.finish().await;
}

#[tokio::test]
async fn rules_that_come_with_the_authentication_are_the_first() {
    let service = Service::start().await;
    let url = service.url("/auth");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("acl.toml");
    fs::write(&file, RULES).unwrap();
    let stage = Stage::with(&[
        ("AUTHENTICATION__1__MECHANISM", "password_based"),
        ("AUTHENTICATION__1__BACKEND", "http"),
        ("AUTHENTICATION__1__URL", &url),
        ("AUTHORIZATION__NO_MATCH", "deny"),
        ("AUTHORIZATION__SOURCES__1__TYPE", "file"),
        ("AUTHORIZATION__SOURCES__1__PATH", file.to_str().unwrap()),
    ])
    .await;
    service.says(&json!({"result": "allow", "acl": [
        {"permission": "allow", "action": "publish", "topic": "plant/secret/${username}"},
        {"permission": "deny", "topic": "plant/all"},
    ]}));
    let device = client_of(&stage, "c1", "u").await;
    stage.publish(&device, "plant/secret/u", 0, "x").await.ok();
    denied(stage.publish(&device, "plant/secret/v", 0, "x").await);
    denied(stage.publish(&device, "plant/all", 0, "x").await);
    stage.publish(&device, "plant/c1/x", 0, "x").await.ok();
    // The short form says all there is to say.
    service.says(&json!({"result": "allow", "acl": {"pub": ["up"], "sub": ["down/+"]}}));
    let device = client_of(&stage, "c2", "u").await;
    stage.publish(&device, "up", 0, "x").await.ok();
    stage.subscribe(&device, "down/x", 0).await.ok();
    denied(stage.publish(&device, "plant/c2/x", 0, "x").await);
    // No rule counts for a superuser.
    service.says(&json!({"result": "allow", "is_superuser": true, "acl": {}}));
    let device = client_of(&stage, "c3", "u").await;
    stage.publish(&device, "anything", 0, "x").await.ok();
    // Rules that are none let nobody in.
    service.says(&json!({"result": "allow", "acl": {"publish": []}}));
    let device = stage.device().await;
    let answer = stage.adapter.authenticate(&device.conn, "c4").await;
    answer.refused(ResultCode::PermissionDeny);
    stage.finish().await;
}

#[tokio::test]
async fn rules_that_a_token_carries_are_the_first() {
    let secret = "a secret of the tokens with more than 32 bytes";
    let stage = Stage::with(&[
        ("AUTHENTICATION__1__MECHANISM", "jwt"),
        ("AUTHENTICATION__1__SECRET", secret),
        ("AUTHENTICATION__1__ACL_CLAIM_NAME", "rights"),
        ("MOUNTPOINT", "plant/"),
    ])
    .await;
    let login = async |claims| {
        let device = stage.device().await;
        let token = hs256(secret, &claims);
        let info = Some(client("c1"));
        let asked = stage.adapter.authenticate_as(&device.conn, info, &token);
        asked.await.ok();
        device
    };
    let rights = json!({"pub": ["plant/${clientid}/up"], "sub": ["plant/down/#"]});
    let device = login(json!({"rights": rights})).await;
    stage.publish(&device, "c1/up", 1, "x").await.ok();
    stage.subscribe(&device, "down/x", 1).await.ok();
    denied(stage.publish(&device, "c2/up", 1, "x").await);
    denied(stage.subscribe(&device, "#", 1).await);
    // Without the claim there is nothing to go by.
    let device = login(json!({"acl": {}})).await;
    stage.publish(&device, "c2/up", 1, "x").await.ok();
    let device = login(json!({"rights": {}, "is_superuser": true})).await;
    stage.publish(&device, "c2/up", 1, "x").await.ok();
    stage.finish().await;
}

#[tokio::test]
async fn what_a_device_is_can_be_put_in_place_of_what_it_says() {
    let service = Service::start().await;
    let url = service.url("/auth");
    let stage = Stage::with(&[
        ("CLIENTINFO_OVERRIDE__CLIENTID", "${peerhost}-${clientid}"),
        ("CLIENTINFO_OVERRIDE__USERNAME", "${clientid}"),
        ("CLIENTINFO_OVERRIDE__PASSWORD", "${username}:${password}"),
        ("AUTHENTICATION__1__MECHANISM", "password_based"),
        ("AUTHENTICATION__1__BACKEND", "http"),
        ("AUTHENTICATION__1__URL", &url),
        ("MOUNTPOINT", "${clientid}/${username}/"),
    ])
    .await;
    let device = client_of(&stage, "c1", "u").await;
    let body: serde_json::Value = serde_json::from_str(&service.asked(1).await.body).unwrap();
    // All from what the device said, whatever the order.
    assert_eq!(
        body,
        json!({"clientid": "127.0.0.1-c1", "username": "c1", "password": "u:p"})
    );
    let mut peer = common::Peer::connect(stage.broker.port).await;
    peer.subscribe("127.0.0.1-c1/c1/#").await;
    stage.publish(&device, "x", 1, "hello").await.ok();
    assert_eq!(peer.next_text().await.0, "127.0.0.1-c1/c1/x");
    stage.finish().await;
}

#[tokio::test]
async fn a_device_is_who_its_certificate_says() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority");
    let (server, files) = (authority.server("localhost"), authority.client("meter-7"));
    let (ca, service) = (authority.file(), Service::start().await);
    let url = service.url("/auth");
    let stage = Stage::with(&[
        ("LISTENERS__SSL__DEFAULT__BIND", "127.0.0.1:0"),
        (
            "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__CERTFILE",
            &server.cert,
        ),
        ("LISTENERS__SSL__DEFAULT__SSL_OPTIONS__KEYFILE", &server.key),
        ("LISTENERS__SSL__DEFAULT__SSL_OPTIONS__CACERTFILE", &ca),
        (
            "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__VERIFY",
            "verify_peer",
        ),
        ("CLIENTINFO_OVERRIDE__CLIENTID", "${cert_common_name}"),
        ("CLIENTINFO_OVERRIDE__USERNAME", "${cert_subject}"),
        (
            "CLIENTINFO_OVERRIDE__PASSWORD",
            "${cert_common_name}@${peerhost}",
        ),
        ("AUTHENTICATION__1__MECHANISM", "password_based"),
        ("AUTHENTICATION__1__BACKEND", "http"),
        ("AUTHENTICATION__1__URL", &url),
        ("MOUNTPOINT", "${clientid}/"),
    ])
    .await;
    let identity = tls::Identity {
        certfile: files.cert.into(),
        keyfile: files.key.into(),
    };
    let config = tls::client(Some(Path::new(&ca)), Some(&identity), true, &[]).unwrap();
    let address = stage.gateway.addresses().listeners["ssl.default"];
    let tcp = TcpStream::connect(address).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let name = ServerName::try_from("localhost").unwrap();
    let connecting = TlsConnector::from(config).connect(name, tcp);
    let _stream = within("the handshake", connecting).await.unwrap();
    let conn = stage.handler.created(port).await;
    // Whatever it says.
    stage.adapter.authenticate(&conn, "another").await.ok();
    let body: serde_json::Value = serde_json::from_str(&service.asked(1).await.body).unwrap();
    assert_eq!(
        body,
        json!({"clientid": "meter-7", "username": "CN=meter-7", "password": "meter-7@127.0.0.1"})
    );
    let mut peer = common::Peer::connect(stage.broker.port).await;
    peer.subscribe("meter-7/#").await;
    stage.adapter.publish(&conn, "x", 1, "hello").await.ok();
    assert_eq!(peer.next_text().await.0, "meter-7/x");
    stage.finish().await;
}

#[tokio::test]
async fn without_a_certificate_there_is_no_client_id_of_one() {
    let stage = Stage::with(&[("CLIENTINFO_OVERRIDE__CLIENTID", "${cert_common_name}")]).await;
    let device = stage.device().await;
    let answer = stage.adapter.authenticate(&device.conn, "victim").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("no client id"), "{why}");
    stage.finish().await;
}
