//! What goes wrong where it is said who a device is: each fault denies or is ignored, says why in
//! the log, and holds up nobody else.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::Ipv4Addr;
use std::time::Instant;

use common::{
    Adapter, Admin, Answer, Broker, Device, Handler, Plan, Process, Service, Signer, client, hs256,
    http_item, item, seconds, until, within,
};
use exproto_sidecar::proto::{ClientInfo, ResultCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const SECRET: &str = "a secret of the tokens with more than 32 bytes";

/// A gateway as a program, at `debug`, with what it needs.
struct Scene {
    handler: Handler,
    process: Process,
    adapter: Adapter,
    admin: Admin,
    _broker: Broker,
}

impl Scene {
    async fn with(keys: &[(String, String)]) -> Self {
        Self::around(Broker::start().await, keys).await
    }

    async fn around(broker: Broker, keys: &[(String, String)]) -> Self {
        let handler = Handler::start().await;
        let mut plan = Plan::new(&broker.url(), &handler.url())
            .set("LOG__LEVEL", "debug")
            .set("LOGIN_ATTEMPTS__MAX_PER_CLIENTID", "infinity");
        for (key, value) in keys {
            plan = plan.set(key, value);
        }
        let process = Process::run(&plan);
        Self {
            adapter: Adapter::connect(process.address("adapter on").await).await,
            admin: process.admin().await,
            handler,
            process,
            _broker: broker,
        }
    }

    async fn device(&self) -> Device {
        let mut device = Device::dial(self.process.address("devices on").await).await;
        device.conn = self.handler.created(device.port()).await;
        device
    }

    async fn login(&self, clientid: &str, username: &str, password: &str) -> (Device, Answer) {
        let device = self.device().await;
        let info = info(clientid, username);
        let asked = self.adapter.authenticate_as(&device.conn, info, password);
        let answer = asked.await;
        (device, answer)
    }

    /// A login that somebody waits for.
    async fn logging_in(&self, clientid: &str, password: &str) -> JoinHandle<Answer> {
        let (device, adapter) = (self.device().await, self.adapter.clone());
        let (info, password) = (info(clientid, "u"), password.to_owned());
        tokio::spawn(async move {
            let connected = &device;
            let conn = &connected.conn;
            adapter.authenticate_as(conn, info, &password).await
        })
    }

    /// Waits for a line of the log that has all of these.
    async fn logged(&self, parts: &[&str]) {
        let process = &self.process;
        until(&parts.join(" ... "), || async move {
            let log = process.log();
            let found = log
                .iter()
                .any(|line| parts.iter().all(|part| line.contains(part)));
            found.then_some(())
        })
        .await;
    }
}

fn info(clientid: &str, username: &str) -> Option<ClientInfo> {
    Some(ClientInfo {
        username: username.to_owned(),
        ..client(clientid)
    })
}

/// What somebody who is trusted has not signed.
fn unsigned() -> Vec<(&'static str, String, &'static str)> {
    let claims = json!({"sub": "c"});
    let good = hs256(SECRET, &claims);
    let parts: Vec<&str> = good.split('.').collect();
    let none = "eyJhbGciOiJub25lIn0"; // {"alg":"none"}
    vec![
        ("none", format!("{none}.{}.", parts[1]), "is not signed"),
        (
            "none, signed",
            format!("{none}.{}.{}", parts[1], parts[2]),
            "is not signed",
        ),
        (
            "wrong key",
            hs256("another secret of more than 32 bytes", &claims),
            "none of the keys",
        ),
        ("cut", good[..good.len() - 4].to_owned(), "none of the keys"),
        (
            "no signature",
            format!("{}.{}.", parts[0], parts[1]),
            "none of the keys",
        ),
        (
            "two parts",
            format!("{}.{}", parts[0], parts[1]),
            "is no token",
        ),
        ("garbage", "a password".to_owned(), "is no token"),
        (
            "too long",
            format!("{good}{}", "x".repeat(20_000)),
            "more than 16384 bytes",
        ),
        ("nothing", String::new(), "is no token"),
    ]
}

/// What they have signed, and does not count all the same.
fn unfit() -> Vec<(&'static str, String, &'static str)> {
    let token = |claims| hs256(SECRET, &claims);
    vec![
        (
            "expired",
            token(json!({"sub": "c", "exp": seconds(-60)})),
            "has expired",
        ),
        (
            "early",
            token(json!({"sub": "c", "nbf": seconds(60)})),
            "is not valid yet",
        ),
        (
            "another's",
            token(json!({"sub": "d"})),
            "claim sub is not the device's",
        ),
        (
            "nobody's",
            token(json!({})),
            "claim sub is not the device's",
        ),
        (
            "odd",
            token(json!({"sub": "c", "exp": "soon"})),
            "is no time",
        ),
    ]
}

#[tokio::test]
async fn a_bad_token_denies_or_is_ignored_as_configured_and_the_log_says_why() {
    let jwt = |number, on_error: &str| {
        item(
            number,
            &[
                ("MECHANISM", "jwt"),
                ("SECRET", SECRET),
                ("VERIFY_CLAIMS", "{ sub = \"${clientid}\" }"),
                ("ON_ERROR", on_error),
            ],
        )
    };
    let service = Service::start().await;
    let second = http_item(2, &service.url("/"));
    let ignoring = Scene::with(&[jwt(1, "ignore"), second.clone()].concat()).await;
    let denying = Scene::with(&[jwt(1, "deny"), second].concat()).await;
    for (what, token, why) in unsigned() {
        // Left to the second, who lets everybody in.
        let (_, answer) = ignoring.login("c", "u", &token).await;
        assert_eq!(
            answer.code,
            ResultCode::Success,
            "{what}: {}",
            answer.message
        );
        ignoring.logged(&["authentication.1", "error", why]).await;
        let asked = service.asked.borrow().len();
        let (_, answer) = denying.login("c", "u", &token).await;
        let answer = answer.refused(ResultCode::PermissionDeny);
        assert!(answer.contains(why), "{what}: {answer}");
        denying.logged(&["authentication.1", "error", why]).await;
        assert_eq!(service.asked.borrow().len(), asked, "{what}");
    }
    let asked = service.asked.borrow().len();
    for (what, token, why) in unfit() {
        for scene in [&ignoring, &denying] {
            let (_, answer) = scene.login("c", "u", &token).await;
            let answer = answer.refused(ResultCode::PermissionDeny);
            assert!(answer.contains(why), "{what}: {answer}");
            scene.logged(&["authentication.1", "deny", why]).await;
        }
    }
    // Whoever was denied was put to nobody else; and a good one is let in.
    for scene in [&ignoring, &denying] {
        scene
            .login("c", "u", &hs256(SECRET, &json!({"sub": "c"})))
            .await
            .1
            .ok();
    }
    assert_eq!(service.asked.borrow().len(), asked);
}

/// A set of keys that cannot be used, and a part of what is said about it.
fn bad_sets() -> Vec<(u16, &'static str, String, &'static str)> {
    let html = "<html>keys</html>".to_owned();
    let large = format!("{{\"keys\":[],\"x\":\"{}\"}}", "x".repeat(10_000_000));
    vec![
        (500, "text/html", html.clone(), "status 500"),
        (302, "text/html", html.clone(), "status 302"),
        (200, "text/html", html, "it is no JSON"),
        (200, "application/json", large, "more than 262144 bytes"),
        (200, "application/json", "{}".to_owned(), "it has no keys"),
        (
            200,
            "application/json",
            "{\"keys\":[{\"kty\":\"oct\"}]}".to_owned(),
            "none of its keys",
        ),
    ]
}

#[tokio::test]
async fn an_endpoint_without_keys_denies_its_tokens_and_says_why_and_keeps_what_it_gave() {
    let service = Service::start().await;
    let (one, two) = (Signer::new("one"), Signer::new("two"));
    let keys = item(
        1,
        &[
            ("MECHANISM", "jwt"),
            ("ENDPOINT", &service.url("/jwks?key=hunter2")),
            ("REFRESH_INTERVAL", "1s"),
            ("REQUEST_TIMEOUT", "300ms"),
        ],
    );
    service.answers(404, "text/plain", "");
    let scene = Scene::with(&keys).await;
    let token = one.token(&json!({"sub": "c"}));
    // From the start, and then with keys that it once gave.
    for is_known in [false, true] {
        for (status, kind, body, why) in bad_sets() {
            service.answers(status, kind, &body);
            let before = scene.process.log().len();
            until(why, || {
                let log = scene.process.log();
                let told = log[before..]
                    .iter()
                    .any(|l| l.contains("authentication.1") && l.contains(why));
                async move { told.then_some(()) }
            })
            .await;
            let (_, answer) = scene.login("c", "u", &token).await;
            if is_known {
                answer.ok();
                continue;
            }
            let answer = answer.refused(ResultCode::PermissionDeny);
            assert!(answer.contains("has not given any keys"), "{answer}");
        }
        service.says(&json!({"keys": [one.jwk()]}));
        let url = service.url("/jwks");
        for word in [
            "authenticator does not answer as it should",
            "answers again",
        ] {
            scene.logged(&["authentication.1", "jwt", &url, word]).await;
        }
        scene.login("c", "u", &token).await.1.ok();
    }
    assert!(!scene.process.log().iter().any(|l| l.contains("hunter2")));
    // A key that it has not is none, however often it is asked.
    let (_, answer) = scene
        .login("c", "u", &two.token(&json!({"sub": "c"})))
        .await;
    let answer = answer.refused(ResultCode::PermissionDeny);
    assert!(answer.contains("none of the keys"), "{answer}");
}

#[tokio::test]
async fn an_endpoint_that_hangs_holds_up_nobody_who_has_no_token() {
    let (keys, passwords) = (Service::start().await, Service::start().await);
    let signer = Signer::new("one");
    keys.says(&json!({"keys": [signer.jwk()]}));
    let gate = keys.hold();
    let mut all = item(
        1,
        &[
            ("MECHANISM", "jwt"),
            ("ENDPOINT", &keys.url("/jwks")),
            ("REQUEST_TIMEOUT", "20s"),
        ],
    );
    all.extend(http_item(2, &passwords.url("/")));
    all.extend(http_item(3, &passwords.url("/")));
    let scene = Scene::with(&all).await;
    keys.asked(1).await;
    let waiting = scene.logging_in("c", &signer.token(&json!({}))).await;
    let in_flight = "exproto_authentications_in_flight";
    scene
        .admin
        .metric_until(in_flight, |count| count == 1.0)
        .await;
    for number in 0..50 {
        scene
            .login(&format!("p{number}"), "u", "a password")
            .await
            .1
            .ok();
    }
    assert_eq!(scene.admin.metric(in_flight).await, 1.0);
    gate.open();
    within("the token's answer", waiting).await.unwrap().ok();
    // Nobody else was asked about it.
    assert_eq!(passwords.asked.borrow().len(), 50);
}

/// Somebody who listens where a broker is expected, and says this to whoever connects.
async fn impostor(says: &'static [u8]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(says).await.unwrap();
                let _ = stream.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    port
}

/// The broker as an authenticator, and as the one where each device has a session.
#[tokio::test]
async fn a_broker_that_is_silent_or_is_none_has_no_say() {
    let html = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n\
        <html><head><title>400 Bad Request</title></head><body>No.</body></html>\r\n";
    for (says, why) in [
        (&b""[..], "within 300ms"),
        (html, "no valid mqtt"),
        (b"\x20\x03\x00\x88\x00", "server unavailable"),
    ] {
        let url = format!("mqtt://127.0.0.1:{}", impostor(says).await);
        for is_own in [false, true] {
            let handler = Handler::start().await;
            let mut keys = vec![("BROKER__CONNECT_TIMEOUT".to_owned(), "300ms".to_owned())];
            if is_own {
                keys.push(("BROKER__MODE".to_owned(), "per_client".to_owned()));
                keys.push(("BROKER__POOL_SIZE".to_owned(), "1".to_owned()));
            } else {
                keys.extend(item(
                    1,
                    &[("MECHANISM", "password_based"), ("BACKEND", "mqtt")],
                ));
            }
            let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (&**k, &**v)).collect();
            let plan = Plan::new(&url, &handler.url()).set_all(&keys);
            let gateway = exproto_sidecar::gateway::Gateway::start(&plan.config())
                .await
                .unwrap();
            let addresses = gateway.addresses();
            let adapter = Adapter::connect(addresses.adapter.tcp().unwrap()).await;
            let device = Device::dial(addresses.listeners["tcp.default"]).await;
            let conn = handler.created(device.port()).await;
            let answer = adapter.authenticate_as(&conn, info("c", "u"), "p").await;
            let code = if is_own {
                ResultCode::Unknown
            } else {
                ResultCode::PermissionDeny
            };
            let answer = answer.refused(code);
            assert!(answer.to_lowercase().contains(why), "{answer}");
            within("the drain", gateway.drain()).await;
        }
    }
}

/// The next address is asked while there is time, and the one that answered is the first from then on.
#[tokio::test]
async fn a_broker_address_that_hangs_leaves_time_for_the_next() {
    let (handler, broker) = (Handler::start().await, Broker::start().await);
    let urls = format!("mqtt://127.0.0.1:{},{}", impostor(b"").await, broker.url());
    let keys = item(
        1,
        &[
            ("MECHANISM", "password_based"),
            ("BACKEND", "mqtt"),
            ("REQUEST_TIMEOUT", "4s"),
        ],
    );
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (&**k, &**v)).collect();
    // By itself a connection may take ten seconds.
    let plan = Plan::new(&urls, &handler.url()).set_all(&keys);
    let gateway = exproto_sidecar::gateway::Gateway::start(&plan.config())
        .await
        .unwrap();
    let addresses = gateway.addresses();
    let adapter = Adapter::connect(addresses.adapter.tcp().unwrap()).await;
    for (clientid, least) in [("one", 2), ("two", 0)] {
        let device = Device::dial(addresses.listeners["tcp.default"]).await;
        let conn = handler.created(device.port()).await;
        let asked = Instant::now();
        let answer = adapter.authenticate_as(&conn, info(clientid, "u"), "p");
        answer.await.ok();
        assert_eq!(asked.elapsed().as_secs() / 2 * 2, least);
    }
    within("the drain", gateway.drain()).await;
}

/// Many guesses at a time are no more guesses than one after the other.
#[tokio::test]
async fn of_many_guesses_at_a_time_none_is_right_once_too_many_were_wrong() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/"));
    keys.push((
        "LOGIN_ATTEMPTS__MAX_PER_CLIENTID".to_owned(),
        "3".to_owned(),
    ));
    let scene = Scene::with(&keys).await;
    let mut guesses = Vec::new();
    let wrong = service.hold();
    for number in 1..=4 {
        guesses.push(scene.logging_in("victim", "guess").await);
        service.asked(number).await;
    }
    let right = service.hold();
    let last = scene.logging_in("victim", "the right one").await;
    service.asked(5).await;
    service.says(&json!({"result": "deny"}));
    wrong.open();
    for guess in guesses {
        let answer = within("a guess", guess).await.unwrap();
        answer.refused(ResultCode::PermissionDeny);
    }
    service.says(&json!({"result": "allow"}));
    right.open();
    let answer = within("the right guess", last).await.unwrap();
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(
        why.contains("too many failed attempts with this client id"),
        "{why}"
    );
    scene.login("another", "u", "p").await.1.ok();
}

/// An outage is no guess: when it is over everybody is let in at once.
#[tokio::test]
async fn a_service_that_is_away_costs_nobody_an_attempt() {
    let (passwords, keys) = (Service::start().await, Service::start().await);
    let signer = Signer::new("one");
    let mut all = item(
        1,
        &[
            ("MECHANISM", "jwt"),
            ("ENDPOINT", &keys.url("/jwks")),
            ("REFRESH_INTERVAL", "1s"),
            ("REQUEST_TIMEOUT", "300ms"),
        ],
    );
    all.extend(http_item(2, &passwords.url("/")));
    for on_error in ["ignore", "deny"] {
        let mut all = all.clone();
        all.extend(item(1, &[("ON_ERROR", on_error)]));
        all.extend(item(2, &[("ON_ERROR", on_error)]));
        if on_error == "deny" {
            // Else nobody would ever be put to the second.
            all.retain(|(key, _)| !key.starts_with("AUTHENTICATION__1"));
        }
        for limit in ["MAX_PER_CLIENTID", "MAX_PER_ADDRESS"] {
            all.push((format!("LOGIN_ATTEMPTS__{limit}"), "3".to_owned()));
        }
        for service in [&passwords, &keys] {
            service.answers(500, "text/plain", "");
        }
        let scene = Scene::with(&all).await;
        let token = signer.token(&json!({}));
        for shown in ["a password", &token, "a password", &token, "a password"] {
            let (_, answer) = scene.login("c", "u", shown).await;
            let why = answer.refused(ResultCode::PermissionDeny);
            assert!(why.contains("status 500"), "{why}");
        }
        passwords.answers(204, "text/plain", "");
        scene.login("c", "u", "a password").await.1.ok();
        keys.says(&json!({"keys": [signer.jwk()]}));
        // What is denied counts all the same.
        passwords.says(&json!({"result": "deny"}));
        for _ in 0..3 {
            let (_, answer) = scene.login("c", "u", "a guess").await;
            let why = answer.refused(ResultCode::PermissionDeny);
            assert!(why.contains("the service denies it"), "{why}");
        }
        let (_, answer) = scene.login("c", "u", "a guess").await;
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains("too many failed attempts"), "{why}");
    }
}

/// Where user names are tokens, nobody is to see them.
#[tokio::test]
async fn a_token_in_the_user_name_is_in_no_log() {
    let keys = item(
        1,
        &[
            ("MECHANISM", "jwt"),
            ("SECRET", SECRET),
            ("FROM", "username"),
        ],
    );
    let mut keys = keys;
    keys.push(("LOG__LEVEL".to_owned(), "trace".to_owned()));
    keys.extend(item(
        2,
        &[("MECHANISM", "password_based"), ("BACKEND", "mqtt")],
    ));
    let mut scene = Scene::with(&keys).await;
    let good = hs256(SECRET, &json!({"sub": "c"}));
    let expired = hs256(SECRET, &json!({"sub": "c", "exp": seconds(-60)}));
    let (device, answer) = scene.login("c", &good, "").await;
    answer.ok();
    scene.adapter.publish(&device.conn, "t", 1, "x").await.ok();
    let (_, answer) = scene.login("c", &expired, "").await;
    let mut said = vec![answer.refused(ResultCode::PermissionDeny)];
    let forged = format!("{}x", &good[..good.len() - 1]);
    // The broker lets everybody in.
    scene.login("c", &forged, "").await.1.ok();
    said.push(scene.admin.get("/metrics").await.body);
    scene.process.signal("TERM");
    assert_eq!(scene.process.exit().await, Some(0));
    said.extend(scene.process.log());
    assert!(
        said.iter()
            .any(|line| line.contains("an authenticator was asked"))
    );
    for token in [good, expired, forged] {
        for part in token.split('.').skip(1) {
            let shown = said.iter().find(|line| line.contains(part));
            assert_eq!(shown, None, "{part}");
        }
    }
}
