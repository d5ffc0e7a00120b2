//! TLS and login towards the broker: a Mosquitto with a private authority that wants
//! certificates of its clients too.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Admin, Authority, Broker, Files, Handler, Peer, Plan, Process, Stage, within};

/// A broker, its folder with certificates, and how a gateway reaches it.
struct Scene {
    broker: Broker,
    authority: Authority,
    client: Files,
}

/// What Mosquitto needs for TLS with this certificate; clients must have one too. The
/// tests' own peers come in over another port without TLS.
fn tls(authority: &Authority, server: &Files, plain: u16) -> String {
    format!(
        "cafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\nallow_anonymous true\n\
         listener {plain} 127.0.0.1\nallow_anonymous true\n",
        authority.file(),
        server.cert,
        server.key,
    )
}

impl Scene {
    /// `certificate` makes the broker's.
    async fn with(certificate: impl Fn(&Authority) -> Files) -> Self {
        let mut broker = Broker::absent("");
        let authority = Authority::new(broker.dir.path(), "ca");
        let client = authority.client("gateway");
        broker.configure(&tls(&authority, &certificate(&authority), broker.plain()));
        broker.up().await;
        Self {
            broker,
            authority,
            client,
        }
    }

    fn url(&self) -> String {
        format!("mqtts://127.0.0.1:{}", self.broker.port)
    }

    /// The keys of a gateway that does everything right.
    fn keys(&self) -> Vec<(&'static str, String)> {
        vec![
            ("BROKER__URL", self.url()),
            ("BROKER__SSL_OPTIONS__CACERTFILE", self.authority.file()),
            ("BROKER__SSL_OPTIONS__CERTFILE", self.client.cert.clone()),
            ("BROKER__SSL_OPTIONS__KEYFILE", self.client.key.clone()),
        ]
    }
}

fn borrowed<'a>(keys: &'a [(&'static str, String)]) -> Vec<(&'static str, &'a str)> {
    let pairs = keys.iter().map(|(key, value)| (*key, value.as_str()));
    pairs.collect()
}

/// Both sides show a certificate; everything works through TLS, large messages
/// included, and again after the broker was killed.
#[tokio::test]
async fn mutual_tls_works() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let keys = scene.keys();
    let plain = scene.broker.plain();
    let mut stage = Stage::around(scene.broker, &borrowed(&keys)).await;
    let device = stage.subscriber("c", "down", 1).await;
    let large = "x".repeat(1 << 20);
    for round in 1..=2 {
        let mut peer = Peer::connect(plain).await;
        peer.subscribe("up").await;
        for (qos, payload) in [(0, "zero"), (1, large.as_str()), (2, "two")] {
            stage.publish(&device, "up", qos, payload).await.ok();
            assert_eq!(peer.next_text().await.2, payload);
        }
        peer.publish("down", 1, large.clone()).await;
        let payloads = stage.handler.payloads(&device.conn, round).await;
        assert_eq!(payloads[round - 1], large);
        stage.broker.kill();
        stage.admin.ready_until(503, "- broker link").await;
        stage.broker.up().await;
        stage.admin.ready_until(200, "ready").await;
    }
    stage.finish().await;
}

/// Starts the program with these keys and waits for the fault in log and `/readyz`.
async fn told(keys: &[(&'static str, String)], fault: &str) -> (Process, Handler) {
    let handler = Handler::start().await;
    let plan = Plan::new("mqtt://unused", &handler.url())
        .set_all(&borrowed(keys))
        .set("ADMIN__BIND", &format!("127.0.0.1:{}", common::free_port()))
        .set("BROKER__POOL_SIZE", "1");
    let address = plan
        .env()
        .iter()
        .find(|(key, _)| key.ends_with("ADMIN__BIND"));
    let admin = Admin(address.unwrap().1.parse().unwrap());
    let program = Process::run(&plan);
    let line = program.logged("is down").await;
    eprintln!("{line}");
    let line = program.logged(fault).await;
    let url = &keys[0].1;
    assert!(line.contains(url.as_str()), "{line}");
    let text = admin.ready_until(503, fault).await;
    assert!(text.contains(url.as_str()), "{text}");
    (program, handler)
}

/// A broker whose certificate is of another authority.
#[tokio::test]
async fn an_unknown_authority_is_told() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let other = Authority::new(scene.broker.dir.path(), "other");
    let mut keys = scene.keys();
    keys[1].1 = other.file();
    told(&keys, "invalid peer certificate: UnknownIssuer").await;
}

/// A broker whose certificate is for another host.
#[tokio::test]
async fn a_wrong_host_name_is_told() {
    let scene = Scene::with(|authority| authority.server("broker.example")).await;
    let fault = "certificate not valid for name \"127.0.0.1\"";
    told(&scene.keys(), fault).await;
}

/// A broker whose certificate has expired; it gets a new one, and the gateway needs no
/// restart.
#[tokio::test]
async fn an_expired_certificate_is_told() {
    let mut scene = Scene::with(|authority| authority.expired("127.0.0.1")).await;
    let (program, _handler) = told(&scene.keys(), "the certificate has expired").await;
    scene.broker.kill();
    let renewed = scene.authority.server("127.0.0.1");
    let plain = scene.broker.plain();
    scene
        .broker
        .configure(&tls(&scene.authority, &renewed, plain));
    scene.broker.up().await;
    program.printed("is ready").await;
}

/// A gateway without a certificate, or with one of another authority.
#[tokio::test]
async fn a_missing_client_certificate_is_told() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    told(&scene.keys()[..2], "CertificateRequired").await;
    let other = Authority::new(scene.broker.dir.path(), "other").client("gateway");
    let mut keys = scene.keys();
    keys[2].1 = other.cert;
    keys[3].1 = other.key;
    told(&keys, "UnknownCA").await;
}

/// TLS where there is none, and none where there is.
#[tokio::test]
async fn the_wrong_scheme_is_told() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let plain = [("BROKER__URL", scene.broker.url())];
    told(&plain, "does it want TLS (mqtts://) here?").await;
    let mut keys = scene.keys();
    keys[0].1 = format!("mqtts://127.0.0.1:{}", scene.broker.plain());
    told(&keys, "the TLS handshake failed").await;
}

/// `verify_none` takes any certificate of the broker.
#[tokio::test]
async fn verify_none_takes_any_broker() {
    let scene = Scene::with(|authority| authority.expired("broker.example")).await;
    let mut keys = scene.keys();
    keys[1] = ("BROKER__SSL_OPTIONS__VERIFY", "verify_none".to_owned());
    let stage = Stage::around(scene.broker, &borrowed(&keys)).await;
    let device = stage.client("c").await;
    stage.publish(&device, "up", 1, "x").await.ok();
    stage.finish().await;
}

/// Encrypted and plain addresses in one list: each is dialled as it says.
#[tokio::test]
async fn a_list_may_mix_schemes() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let mut keys = scene.keys();
    let gone = common::free_port();
    keys[0].1 = format!("mqtt://127.0.0.1:{gone},{}", scene.url());
    let stage = Stage::around(scene.broker, &borrowed(&keys)).await;
    let connected = format!("connected to mqtts://127.0.0.1:{}", stage.broker.port);
    stage.admin.ready_until(200, &connected).await;
    stage.finish().await;
}

/// User name with `password`, or with `password_file`, over TLS; a wrong one is told
/// and not shown.
#[tokio::test]
async fn a_login_over_tls() {
    let mut scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let dir = scene.broker.dir.path().to_owned();
    let passwords = dir.join("passwords");
    let made = std::process::Command::new("mosquitto_passwd")
        .args(["-b", "-c"])
        .arg(&passwords)
        .args(["gateway", "pass word"])
        .status();
    assert!(made.unwrap().success());
    let server = scene.authority.server("127.0.0.1");
    let plain = scene.broker.plain();
    let config = format!(
        "{}per_listener_settings false\npassword_file {}\n",
        tls(&scene.authority, &server, plain).replace("allow_anonymous true", ""),
        passwords.display()
    );
    scene.broker.kill();
    scene.broker.configure(&config);
    scene.broker.up().await;
    let file = dir.join("secret");
    std::fs::write(&file, "pass word\n").unwrap();
    let user = ("BROKER__USERNAME", "gateway".to_owned());
    let right = [
        ("BROKER__PASSWORD", "pass word".to_owned()),
        ("BROKER__PASSWORD_FILE", file.display().to_string()),
    ];
    for password in right {
        let keys = [scene.keys(), vec![user.clone(), password]].concat();
        let handler = Handler::start().await;
        let plan = Plan::new("mqtt://unused", &handler.url()).set_all(&borrowed(&keys));
        let mut program = Process::run(&plan);
        program.printed("is ready").await;
        program.signal("TERM");
        assert_eq!(within("the end", program.exit()).await, Some(0));
    }
    let wrong = ("BROKER__PASSWORD", "hunter2".to_owned());
    let keys = [scene.keys(), vec![user, wrong]].concat();
    let (program, _handler) = told(&keys, "refused the connection: not authorized").await;
    assert!(!program.log().join("\n").contains("hunter2"));
}

/// The gateway's own certificate is renewed without a restart: the next connection shows it.
#[tokio::test]
async fn the_gateways_certificate_is_renewed() {
    let scene = Scene::with(|authority| authority.server("127.0.0.1")).await;
    let mut keys = scene.keys();
    let expired = scene.authority.expired("renewed");
    for (key, value) in &mut keys {
        match *key {
            "BROKER__SSL_OPTIONS__CERTFILE" => value.clone_from(&expired.cert),
            "BROKER__SSL_OPTIONS__KEYFILE" => value.clone_from(&expired.key),
            _ => {}
        }
    }
    let handler = Handler::start().await;
    let stage = Stage::assemble(scene.broker, handler, &borrowed(&keys)).await;
    stage.admin.ready_until(503, "- broker link 0: ").await;
    std::fs::copy(&scene.client.key, &expired.key).unwrap();
    std::fs::copy(&scene.client.cert, &expired.cert).unwrap();
    within("the gateway to be ready", stage.gateway.ready()).await;
    stage.finish().await;
}
