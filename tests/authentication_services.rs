//! Services that say who a device is: over HTTP, a set of keys, a broker; and their faults.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{Method, StatusCode};
use axum::serve::ListenerExt;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use common::{
    Adapter, Answer, Authority, Broker, Call, Device, Plan, Process, Service, Signer, Stage,
    client, free_port, hs256, http_item, item, seconds, until, within,
};
use exproto_sidecar::proto::{ClientInfo, ResultCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn stage(keys: &[(String, String)]) -> Stage {
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    Stage::with(&keys).await
}

fn device(clientid: &str, username: &str) -> Option<ClientInfo> {
    Some(ClientInfo {
        username: username.to_owned(),
        ..client(clientid)
    })
}

/// A login on a new connection.
async fn login(stage: &Stage, clientid: &str, username: &str, password: &str) -> (Device, Answer) {
    let connected = stage.device().await;
    let info = device(clientid, username);
    let answer = stage
        .adapter
        .authenticate_as(&connected.conn, info, password)
        .await;
    (connected, answer)
}

#[tokio::test]
async fn a_service_is_asked_as_emqx_asks_it_and_decides() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/auth?id=${clientid}"));
    keys.extend(item(
        1,
        &[
            ("HEADERS", "{ x-key = \"${proto_name}!\" }"),
            ("BODY__HOST", "${peerhost}"),
            ("BODY__NAME", "${username}"),
        ],
    ));
    let stage = stage(&keys).await;
    let (_, answer) = login(&stage, "a/b c", "x\"y", "secret").await;
    answer.ok();
    let asked = service.asked(1).await;
    assert_eq!(asked.method, Method::POST);
    assert_eq!(asked.uri, "/auth?id=a%2Fb%20c");
    assert_eq!(asked.headers["x-key"], "test!");
    assert_eq!(asked.headers["content-type"], "application/json");
    let body: Value = serde_json::from_str(&asked.body).unwrap();
    assert_eq!(body, json!({"host": "127.0.0.1", "name": "x\"y"}));

    service.says(&json!({"result": "deny"}));
    let (_, answer) = login(&stage, "c", "u", "p").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert_eq!(why, "authentication refused: http: the service denies it");
    service.says(&json!({"result": "ignore"}));
    let (_, answer) = login(&stage, "c", "u", "p").await;
    assert!(
        answer
            .refused(ResultCode::PermissionDeny)
            .contains("nobody vouches")
    );
    service.says(&json!({"result": "allow", "expire_at": seconds(-1)}));
    login(&stage, "c", "u", "p")
        .await
        .1
        .refused(ResultCode::PermissionDeny);

    service.says(&json!({"result": "allow", "expire_at": seconds(2)}));
    let (device, answer) = login(&stage, "c", "u", "p").await;
    answer.ok();
    assert_eq!(stage.closed(&device).await, "expired");
    stage.finish().await;
}

#[tokio::test]
async fn a_get_has_all_of_it_in_its_query_and_a_form_in_its_body() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/get"));
    keys.extend(item(
        1,
        &[("METHOD", "get"), ("BODY", "{ p = \"${password}\" }")],
    ));
    keys.extend(http_item(2, &service.url("/form")));
    keys.extend(item(
        2,
        &[
            (
                "HEADERS",
                "{ content-type = \"application/x-www-form-urlencoded\" }",
            ),
            ("BODY", "{ p = \"${password}\", u = \"${username}\" }"),
        ],
    ));
    let stage = stage(&keys).await;
    service.says(&json!({"result": "ignore"}));
    login(&stage, "c", "ann", "a&b=c")
        .await
        .1
        .refused(ResultCode::PermissionDeny);
    let (get, form) = (service.asked(1).await, service.asked(2).await);
    assert_eq!(
        (get.method, get.uri.to_string(), get.body.as_str()),
        (Method::GET, "/get?p=a%26b%3Dc".to_owned(), "")
    );
    assert_eq!(form.body, "p=a%26b%3Dc&u=ann");
    stage.finish().await;
}

/// What a service can do wrong, and a part of what is said about it.
fn faults() -> Vec<(u16, &'static str, String, &'static str)> {
    vec![
        (
            500,
            "application/json",
            "{\"result\":\"allow\"}".to_owned(),
            "status 500",
        ),
        (302, "text/plain", String::new(), "status 302"),
        (200, "text/html", "<html>allow</html>".to_owned(), "no JSON"),
        (200, "application/json", "<html>".to_owned(), "no JSON"),
        (
            200,
            "application/json",
            format!("\"{}\"", "x".repeat(10_000_000)),
            "more than 65536 bytes",
        ),
        (
            200,
            "application/json",
            "{\"result\":\"maybe\"}".to_owned(),
            "none of allow",
        ),
    ]
}

#[tokio::test]
async fn a_faulty_service_is_ignored_or_denies_as_configured() {
    let (first, second, third) = (
        Service::start().await,
        Service::start().await,
        Service::start().await,
    );
    let mut keys = http_item(1, &first.url("/"));
    keys.extend(item(1, &[("REQUEST_TIMEOUT", "300ms")]));
    keys.extend(http_item(2, &second.url("/")));
    keys.extend(item(2, &[("ON_ERROR", "deny")]));
    keys.extend(http_item(3, &third.url("/")));
    let stage = stage(&keys).await;
    for (status, kind, body, part) in faults() {
        // The first one's fault leaves the decision to the second; the second one's denies.
        first.answers(status, kind, &body);
        second.answers(204, "text/plain", "");
        login(&stage, "c", "u", "p").await.1.ok();
        second.answers(status, kind, &body);
        let (_, answer) = login(&stage, "d", "u", "p").await;
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains(part), "{why}");
    }
    // Slow.
    second.answers(204, "text/plain", "");
    let gate = first.hold();
    login(&stage, "c", "u", "p").await.1.ok();
    gate.open();
    // Whoever was denied was not put to the third.
    assert!(third.asked.borrow().is_empty());
    // Which of them it is can be told.
    for (number, count) in [(1, 13.0), (2, 6.0)] {
        let errors = format!(
            "exproto_authentications_total{{authenticator=\"http\",number=\"{number}\",outcome=\"error\"}}"
        );
        assert_eq!(stage.admin.metric(&errors).await, count);
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_service_that_is_down_is_no_decision_and_it_is_asked_again_when_it_is_back() {
    let port = free_port();
    let mut keys = http_item(1, &format!("http://127.0.0.1:{port}/"));
    keys.extend(item(1, &[("CONNECT_TIMEOUT", "1s")]));
    let stage = stage(&keys).await;
    let (_, answer) = login(&stage, "c", "u", "p").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("refused"), "{why}");
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, port).into()).unwrap();
    let listener = socket.listen(16).unwrap();
    let router = Router::new().fallback(|| async { StatusCode::NO_CONTENT });
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    login(&stage, "c", "u", "p").await.1.ok();
    stage.finish().await;
}

#[tokio::test]
async fn who_waits_holds_up_nobody_and_is_asked_once() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/"));
    keys.push((
        "LISTENERS__TCP__OPEN__BIND".to_owned(),
        "127.0.0.1:0".to_owned(),
    ));
    keys.push((
        "LISTENERS__TCP__OPEN__ENABLE_AUTHN".to_owned(),
        "false".to_owned(),
    ));
    // Far less than the service takes.
    keys.push(("HANDLER__REQUEST_TIMEOUT".to_owned(), "300ms".to_owned()));
    let stage = stage(&keys).await;
    let gate = service.hold();

    // Authenticates within its callback, as handlers do.
    let adapter = stage.adapter.clone();
    let (done, mut answers) = tokio::sync::mpsc::unbounded_channel();
    stage.handler.behave(move |event| {
        let (adapter, done) = (adapter.clone(), done.clone());
        async move {
            if let Call::Bytes(bytes) = &event.call {
                let clientid = String::from_utf8(bytes.to_vec()).unwrap();
                let info = device(&clientid, "u");
                let answer = adapter.authenticate_as(&event.conn, info, "p").await;
                done.send(answer).unwrap();
            }
            Ok(())
        }
    });
    let mut waiting = stage.device().await;
    waiting.send("one").await;
    service.asked(1).await;

    // A second one on the same connection.
    let info = device("two", "u");
    let second = stage
        .adapter
        .authenticate_as(&waiting.conn, info, "p")
        .await;
    assert!(
        second
            .refused(ResultCode::PermissionDeny)
            .contains("being authenticated")
    );
    stage
        .publish(&waiting, "t", 0, "x")
        .await
        .refused(ResultCode::PermissionDeny);

    // Everybody else goes on.
    let open = stage.gateway.addresses().listeners["tcp.open"];
    let mut other = Device::dial(open).await;
    other.conn = stage.handler.created(other.port()).await;
    stage.adapter.authenticate(&other.conn, "other").await.ok();
    stage.publish(&other, "t", 1, "x").await.ok();
    assert_eq!(
        stage
            .admin
            .metric("exproto_authentications_in_flight")
            .await,
        1.0
    );

    // Longer than the handler has for a callback: it is not to blame.
    tokio::time::sleep(Duration::from_millis(700)).await;
    gate.open();
    within("the answer", answers.recv()).await.unwrap().ok();
    stage.publish(&waiting, "t", 1, "x").await.ok();
    stage.finish().await;
}

/// Connections are kept and used again, and there are no more than the pool may have.
#[tokio::test]
async fn a_service_is_asked_over_a_few_connections() {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (opened, at_once, most) =
        <(Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
    let counted = opened.clone();
    let listener = listener.tap_io(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let (now, peak) = (at_once.clone(), most.clone());
    let router = Router::new().fallback(move || {
        let (now, peak) = (now.clone(), peak.clone());
        async move {
            peak.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Others come meanwhile, if they may.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            now.fetch_sub(1, Ordering::SeqCst);
            StatusCode::NO_CONTENT
        }
    });
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let mut keys = http_item(1, &url);
    keys.extend(item(1, &[("POOL_SIZE", "2")]));
    let stage = stage(&keys).await;
    for _ in 0..3 {
        let logins = (0..20).map(|number| {
            let stage = &stage;
            async move { login(stage, &format!("c{number}"), "u", "p").await.1.ok() }
        });
        futures_util::future::join_all(logins).await;
    }
    assert_eq!(most.load(Ordering::SeqCst), 2);
    // Of sixty requests; one may be opened while another is just given back.
    let opened = opened.load(Ordering::SeqCst);
    assert!((2..=10).contains(&opened), "{opened}");
    stage.finish().await;
}

#[tokio::test]
async fn a_connection_that_ends_meanwhile_ends_its_authentication() {
    let service = Service::start().await;
    let stage = stage(&http_item(1, &service.url("/"))).await;
    let gate = service.hold();
    let device_ = stage.device().await;
    let (adapter, conn) = (stage.adapter.clone(), device_.conn.clone());
    let waiting =
        tokio::spawn(async move { adapter.authenticate_as(&conn, device("c", "u"), "p").await });
    service.asked(1).await;
    stage.adapter.close(&device_.conn).await.ok();
    let answer = within("the answer", waiting).await.unwrap();
    answer.refused(ResultCode::ConnProcessNotAlive);
    stage
        .admin
        .metric_until("exproto_authentications_in_flight", |count| count == 0.0)
        .await;
    // A handler that gives up leaves the connection as it was.
    let device_ = stage.device().await;
    let (adapter, conn) = (stage.adapter.clone(), device_.conn.clone());
    let given_up =
        tokio::spawn(async move { adapter.authenticate_as(&conn, device("c", "u"), "p").await });
    service.asked(2).await;
    given_up.abort();
    stage
        .admin
        .metric_until("exproto_authentications_in_flight", |count| count == 0.0)
        .await;
    gate.open();
    let info = device("c", "u");
    stage
        .adapter
        .authenticate_as(&device_.conn, info, "p")
        .await
        .ok();
    stage.finish().await;
}

fn jwt(number: usize, keys: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut all = item(
        number,
        &[
            ("MECHANISM", "jwt"),
            ("VERIFY_CLAIMS", "{ sub = \"${clientid}\" }"),
        ],
    );
    all.extend(item(number, keys));
    all
}

#[tokio::test]
async fn tokens_are_checked_with_the_keys_of_an_endpoint_that_change() {
    let service = Service::start().await;
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    service.says(&json!({"keys": [old.jwk()]}));
    let url = service.url("/jwks.json");
    let mut keys = jwt(1, &[("ENDPOINT", &url), ("REFRESH_INTERVAL", "1s")]);
    // It tries again and again.
    for limit in ["MAX_PER_CLIENTID", "MAX_PER_ADDRESS"] {
        keys.push((format!("LOGIN_ATTEMPTS__{limit}"), "infinity".to_owned()));
    }
    let stage = stage(&keys).await;
    let claims = json!({"sub": "c", "exp": seconds(3)});
    let (device, answer) = login(&stage, "c", "", &old.token(&claims)).await;
    answer.ok();
    let (_, answer) = login(&stage, "d", "", &old.token(&claims)).await;
    assert!(
        answer
            .refused(ResultCode::PermissionDeny)
            .contains("claim sub")
    );
    let (_, answer) = login(&stage, "c", "", &new.token(&claims)).await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("none of the keys"), "{why}");
    service.says(&json!({"keys": [new.jwk()]}));
    let fresh = json!({"sub": "e"});
    until("the new key", || async {
        let (_, answer) = login(&stage, "e", "", &new.token(&fresh)).await;
        (answer.code == ResultCode::Success).then_some(())
    })
    .await;
    login(&stage, "e", "", &old.token(&fresh))
        .await
        .1
        .refused(ResultCode::PermissionDeny);
    // An endpoint that is broken leaves the keys that there are.
    service.answers(500, "text/html", "<html>");
    let failed = r#"exproto_authentication_reloads_total{outcome="failed"}"#;
    stage.admin.metric_until(failed, |count| count >= 1.0).await;
    login(&stage, "e", "", &new.token(&fresh)).await.1.ok();
    assert_eq!(stage.closed(&device).await, "expired");
    stage.finish().await;
}

#[tokio::test]
async fn the_broker_decides() {
    let users = [("gateway", "gateway's"), ("ann", "right")];
    let broker = Broker::guarded(&users, "pattern readwrite #\n").await;
    let mut keys = item(
        1,
        &[
            ("MECHANISM", "password_based"),
            ("BACKEND", "mqtt"),
            ("REQUEST_TIMEOUT", "2s"),
        ],
    );
    keys.push(("BROKER__USERNAME".to_owned(), "gateway".to_owned()));
    keys.push(("BROKER__PASSWORD".to_owned(), "gateway's".to_owned()));
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let mut stage = Stage::around(broker, &keys).await;
    let (device, answer) = login(&stage, "meter-1", "ann", "right").await;
    answer.ok();
    stage.broker.logged("as meter-1 ").await;
    stage.publish(&device, "t", 1, "x").await.ok();
    for (username, password) in [("ann", "wrong"), ("eve", "right"), ("", "")] {
        let (_, answer) = login(&stage, "meter-2", username, password).await;
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains("mqtt: the broker says"), "{why}");
    }
    stage.broker.kill();
    let (_, answer) = login(&stage, "meter-3", "ann", "right").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("nobody vouches"), "{why}");
    stage.broker.up().await;
    stage.admin.ready_until(200, "").await;
    login(&stage, "meter-3", "ann", "right").await.1.ok();
    stage.finish().await;
}

fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = std::process::Command::new("openssl");
    let command = command.args(arguments).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{arguments:?}");
    output.stdout
}

/// Keys and signatures of other people's making.
#[tokio::test]
async fn tokens_that_openssl_has_signed_are_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (rsa, ed, message) = (path("rsa"), path("ed"), path("message"));
    openssl(
        &["genpkey", "-quiet", "-algorithm", "RSA", "-out", &rsa],
        b"",
    );
    openssl(&["genpkey", "-algorithm", "ED25519", "-out", &ed], b"");
    let sign = |algorithm: &str| {
        let text = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let (header, claims) = (json!({"alg": algorithm}), json!({"sub": "c"}));
        let signed = format!("{}.{}", text(&header), text(&claims));
        std::fs::write(&message, &signed).unwrap();
        let pss = [
            "-sigopt",
            "rsa_padding_mode:pss",
            "-sigopt",
            "rsa_pss_saltlen:digest",
        ];
        let signature = match algorithm {
            "RS256" => openssl(&["dgst", "-sha256", "-sign", &rsa, &message], b""),
            "PS384" => openssl(
                &[&["dgst", "-sha384"], &pss[..], &["-sign", &rsa, &message]].concat(),
                b"",
            ),
            _ => openssl(
                &["pkeyutl", "-sign", "-rawin", "-inkey", &ed, "-in", &message],
                b"",
            ),
        };
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    };
    for (key, good, bad) in [
        (&rsa, &["RS256", "PS384"][..], "EdDSA"),
        (&ed, &["EdDSA"][..], "RS256"),
    ] {
        let public = format!("{key}.pub");
        openssl(&["pkey", "-in", key, "-pubout", "-out", &public], b"");
        let stage = stage(&jwt(1, &[("PUBLIC_KEY", &public)])).await;
        for algorithm in good {
            login(&stage, "c", "", &sign(algorithm)).await.1.ok();
        }
        let (_, answer) = login(&stage, "c", "", &sign(bad)).await;
        answer.refused(ResultCode::PermissionDeny);
        stage.finish().await;
    }
}

/// Everything at trace level, every authenticator and a source of rules, whether they work or not.
#[tokio::test]
async fn no_secret_is_in_the_log_the_metrics_or_an_answer() {
    no_secret_is_told("").await;
}

/// The same where every device has the same password.
#[tokio::test]
async fn nor_is_the_password_that_all_devices_have() {
    no_secret_is_told("0verride-pw").await;
}

async fn no_secret_is_told(given: &'static str) {
    const SECRETS: [&str; 7] = [
        "pa55word-of-device",
        "s3cret-of-the-tokens-that-is-long-enough",
        "hdr-s3cret",
        "body-s3cret",
        "br0ker-pw",
        "rules-s3cret",
        "0verride-pw",
    ];
    let [password, jwt_secret, header, _, broker_password, rules, _] = SECRETS;
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users");
    let hash = "$2y$04$Lx6.LGoNu2yDeWtyDpLS8.RzlAVVDdwP65FTD7OOyvyQXFnI1tLjK";
    std::fs::write(&users, format!("ann:{hash}\n")).unwrap();
    let service = Service::start().await;
    // It denies, and vouches for nobody else.
    let broker = Broker::guarded(&[("gateway", broker_password)], "pattern readwrite #\n").await;
    let handler = common::Handler::start().await;
    let headers = format!("{{ x-key = \"{header}\", x-password = \"${{password}}\" }}");
    let away = format!("http://127.0.0.1:{}/", free_port());
    let mut keys = item(1, &[("MECHANISM", "jwt"), ("SECRET", jwt_secret)]);
    keys.extend(http_item(2, &away));
    keys.extend(http_item(3, &service.url("/x?password=${password}")));
    keys.extend(item(
        3,
        &[
            ("METHOD", "get"),
            ("HEADERS", &headers),
            ("BODY", "{ password = \"${password}\", k = 'body-s3cret' }"),
        ],
    ));
    // Keys that never come, and something else instead of keys.
    for (number, url) in [(4, &away), (5, &service.url("/jwks"))] {
        let jwks = [("MECHANISM", "jwt"), ("ENDPOINT", url)];
        keys.extend(item(number, &jwks));
        keys.extend(item(number, &[("REQUEST_TIMEOUT", "100ms")]));
    }
    keys.extend(item(
        6,
        &[
            ("MECHANISM", "password_based"),
            ("BACKEND", "file"),
            ("PATH", users.to_str().unwrap()),
        ],
    ));
    keys.extend(item(
        7,
        &[("MECHANISM", "password_based"), ("BACKEND", "mqtt")],
    ));
    let rules_headers = format!("{{ x-key = \"{rules}\" }}");
    let mut plan = Plan::new(&broker.url(), &handler.url())
        .set("LOG__LEVEL", "trace")
        .set("BROKER__USERNAME", "gateway")
        .set("BROKER__PASSWORD", broker_password)
        .set("AUTHORIZATION__SOURCES__1__TYPE", "http")
        .set("AUTHORIZATION__SOURCES__1__URL", &service.url("/rules"))
        .set("AUTHORIZATION__SOURCES__1__HEADERS", &rules_headers);
    if !given.is_empty() {
        plan = plan.set("CLIENTINFO_OVERRIDE__PASSWORD", given);
    }
    for (key, value) in &keys {
        plan = plan.set(key, value);
    }
    let mut process = Process::run(&plan);
    let adapter = Adapter::connect(process.address("adapter on").await).await;
    let address = process.address("devices on").await;
    let mut said = Vec::new();
    let json = "application/json";
    let answers = [
        (204, "text/plain", String::new()),
        // A service that says back what it was told.
        (200, json, format!("{{\"result\":\"{password}\"}}")),
        (
            200,
            json,
            format!("{{\"result\":\"allow\",\"acl\":[{{\"{password}\":1}}]}}"),
        ),
        (
            200,
            json,
            format!("{{\"result\":\"allow\",\"acl\":{{\"{password}\":1}}}}"),
        ),
        (200, "text/html", format!("<html>{password}</html>")),
        (500, "text/html", password.to_owned()),
        (302, "text/html", password.to_owned()),
    ];
    let forged = format!("a.{password}.b");
    let acl = json!({"acl": [{password: 1}]});
    let tokens = [hs256(jwt_secret, &json!({})), hs256(jwt_secret, &acl)];
    for (status, kind, body) in answers {
        service.answers(status, kind, &body);
        for (username, tried) in [
            ("ann", password),
            ("eve", password),
            ("eve", &forged),
            ("eve", &tokens[0]),
            ("eve", &tokens[1]),
        ] {
            let device_ = Device::dial(address).await;
            let conn = handler.created(device_.port()).await;
            let answer = adapter
                .authenticate_as(&conn, device("c", username), tried)
                .await;
            said.push(answer.message);
            said.push(adapter.publish(&conn, "t", 1, "x").await.message);
        }
    }
    let metrics = process.admin().await.get("/metrics").await.body;
    process.signal("TERM");
    assert_eq!(process.exit().await, Some(0));
    let log = process.log();
    let asked = |number: usize| {
        let name = format!("authentication.{number}");
        log.iter().any(|line| line.contains(&name))
    };
    assert!((1..=7).all(asked), "{log:#?}");
    assert!(
        said.iter()
            .any(|said| said.contains("mqtt: the broker says")),
        "{said:?}"
    );
    let signatures = tokens.iter().filter_map(|token| token.rsplit('.').next());
    let secrets: Vec<&str> = SECRETS
        .into_iter()
        .chain([&hash[10..]])
        .chain(signatures)
        .collect();
    for line in log.iter().chain(&said).chain([&metrics]) {
        for secret in &secrets {
            assert!(!line.contains(secret), "{secret} in: {line}");
        }
        // Passwords as numbers: a dump of bytes.
        let bytes = format!("{:?}", &password.as_bytes()[..6]);
        assert!(!line.contains(bytes.trim_matches(['[', ']'])), "{line}");
    }
}

#[tokio::test]
async fn a_service_over_tls_is_asked_if_its_authority_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority");
    let stranger = Authority::new(folder.path(), "stranger");
    let files = authority.server("localhost");
    let identity = exproto_sidecar::tls::Identity {
        certfile: files.cert.into(),
        keyfile: files.key.into(),
    };
    let tls = exproto_sidecar::tls::server(&identity, None, &[]).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // A stranger hangs up in the handshake.
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut asked = [0; 4096];
            if stream.read(&mut asked).await.is_ok_and(|count| count > 0) {
                let answer = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
                stream.write_all(answer).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        }
    });
    let url = format!("https://localhost:{port}/auth");
    let keys = |number, file: &str| {
        let mut keys = http_item(number, &url);
        keys.extend(item(number, &[("SSL_OPTIONS__CACERTFILE", file)]));
        keys
    };
    let known = stage(&keys(1, &authority.file())).await;
    login(&known, "c", "u", "p").await.1.ok();
    known.finish().await;
    let unknown = stage(&keys(1, &stranger.file())).await;
    let (_, answer) = login(&unknown, "c", "u", "p").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.to_lowercase().contains("certificate"), "{why}");
    unknown.finish().await;
}
