//! Encrypted ways: handlers to the adapter, the gateway to its handler and to its
//! broker; each also with both sides' certificates.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::sync::Arc;

use common::{
    Adapter, Admin, Authority, Broker, Device, Files, Handler, Names, Plan, Process, Proxy, Stage,
    within,
};
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::ResultCode;
use tempfile::TempDir;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig};

/// An authority, a certificate of the server at 127.0.0.1 and one of a client.
struct Certificates {
    ca: String,
    server: Files,
    /// The server's, but out of date.
    expired: Files,
    client: Files,
    /// Another client's, which another authority has made.
    stranger: Files,
    _dir: TempDir,
}

impl Certificates {
    fn make() -> Self {
        // The tests' own ends of TLS need one too.
        exproto_sidecar::tls::install_provider();
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        Self {
            ca: authority.file(),
            server: authority.server("127.0.0.1"),
            expired: authority.expired("127.0.0.1"),
            stranger: Authority::new(dir.path(), "other").client("stranger"),
            client: authority.client("client"),
            _dir: dir,
        }
    }
}

fn authority(made: &Certificates) -> Certificate {
    Certificate::from_pem(fs::read_to_string(&made.ca).unwrap())
}

fn identity(files: &Files) -> Identity {
    let read = |path: &String| fs::read_to_string(path).unwrap();
    Identity::from_pem(read(&files.cert), read(&files.key))
}

fn trusting(made: &Certificates) -> ClientTlsConfig {
    ClientTlsConfig::new()
        .ca_certificate(authority(made))
        .domain_name("127.0.0.1")
}

/// A gateway with its adapter over TLS.
async fn encrypted_adapter(made: &Certificates, verify: &str) -> (Gateway, Broker, Handler) {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("SERVER__SSL_OPTIONS__ENABLE", "true")
        .set("SERVER__SSL_OPTIONS__CERTFILE", &made.server.cert)
        .set("SERVER__SSL_OPTIONS__KEYFILE", &made.server.key)
        .set("SERVER__SSL_OPTIONS__CACERTFILE", &made.ca)
        .set("SERVER__SSL_OPTIONS__VERIFY", verify);
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    within("the gateway to be ready", gateway.ready()).await;
    (gateway, broker, handler)
}

/// `server.ssl_options.enable`: the adapter speaks TLS, and nothing else.
#[tokio::test]
async fn the_adapter_speaks_tls() {
    let made = Certificates::make();
    let (gateway, _broker, _handler) = encrypted_adapter(&made, "verify_none").await;
    let address = gateway.addresses().adapter.tcp().unwrap();
    let adapter = Adapter::connect_tls(address, trusting(&made))
        .await
        .unwrap();
    adapter.raw_publish("t", 1, "x").await.ok();
    adapter
        .send("", "x")
        .await
        .refused(ResultCode::ParamsTypeError);
    // A client that does not know the authority keeps away.
    let strange = Certificates::make();
    let strange = Adapter::connect_tls(address, trusting(&strange)).await;
    assert!(strange.is_err());
    // One that does not encrypt gets no answer.
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    if let Ok(channel) = within("a connection", endpoint.connect()).await {
        let plain = Adapter::over(channel);
        assert!(plain.try_send("x").await.is_err());
    }
    drop(adapter);
    within("the drain", gateway.drain()).await;
}

/// `verify_peer`: mutual TLS. A client shows a certificate of the authority, or is
/// turned away.
#[tokio::test]
async fn the_adapter_asks_for_certificates() {
    let made = Certificates::make();
    let (gateway, _broker, _handler) = encrypted_adapter(&made, "verify_peer").await;
    let address = gateway.addresses().adapter.tcp().unwrap();
    let known = trusting(&made).identity(identity(&made.client));
    let adapter = Adapter::connect_tls(address, known).await.unwrap();
    adapter.raw_publish("t", 1, "x").await.ok();
    let strange = Certificates::make();
    let strange = trusting(&made).identity(identity(&strange.client));
    for refused in [trusting(&made), strange] {
        // With TLS 1.3 the client learns of it with its first call.
        if let Ok(adapter) = Adapter::connect_tls(address, refused).await {
            assert!(adapter.try_send("x").await.is_err());
        }
    }
    drop(adapter);
    within("the drain", gateway.drain()).await;
}

/// A client's certificate that has expired is none.
#[tokio::test]
async fn the_adapter_refuses_expired_certificates() {
    let made = Certificates::make();
    let (gateway, _broker, _handler) = encrypted_adapter(&made, "verify_peer").await;
    let address = gateway.addresses().adapter.tcp().unwrap();
    let expired = trusting(&made).identity(identity(&made.expired));
    if let Ok(adapter) = Adapter::connect_tls(address, expired).await {
        assert!(adapter.try_send("x").await.is_err());
    }
    let admin = Admin(gateway.addresses().admin.unwrap());
    let refused = "exproto_adapter_refused_total{reason=\"handshake_failed\"}";
    admin.metric_until(refused, |count| count > 0.5).await;
    within("the drain", gateway.drain()).await;
}

/// Renewed files of the adapter are used for new connections, the old ones go on; files that are
/// of no use are reported and change nothing.
#[tokio::test]
async fn the_adapters_certificate_is_renewed() {
    let (made, next) = (Certificates::make(), Certificates::make());
    let (gateway, _broker, _handler) = encrypted_adapter(&made, "verify_peer").await;
    let address = gateway.addresses().adapter.tcp().unwrap();
    let admin = Admin(gateway.addresses().admin.unwrap());
    let known = |made: &Certificates| trusting(made).identity(identity(&made.client));
    let old = Adapter::connect_tls(address, known(&made)).await.unwrap();
    old.raw_publish("t", 1, "x").await.ok();

    let outcome =
        |outcome| format!("exproto_adapter_reloads_total{{what=\"tls\",outcome=\"{outcome}\"}}");
    fs::write(&made.server.key, "no key").unwrap();
    admin.metric_until(&outcome("failed"), |n| n > 0.5).await;
    let still = Adapter::connect_tls(address, known(&made)).await.unwrap();
    still.raw_publish("t", 1, "x").await.ok();

    for (from, to) in [
        // In this order nothing is fit before the last one.
        (&next.ca, &made.ca),
        (&next.server.key, &made.server.key),
        (&next.server.cert, &made.server.cert),
    ] {
        fs::copy(from, to).unwrap();
    }
    admin.metric_until(&outcome("ok"), |n| n > 0.5).await;
    let renewed = Adapter::connect_tls(address, known(&next)).await.unwrap();
    renewed.raw_publish("t", 1, "x").await.ok();
    old.raw_publish("t", 1, "x").await.ok();
    // Who is known to the old authority alone is not any longer.
    let former = trusting(&next).identity(identity(&made.client));
    if let Ok(adapter) = Adapter::connect_tls(address, former).await {
        assert!(adapter.try_send("x").await.is_err());
    }
    drop((old, still, renewed));
    within("the drain", gateway.drain()).await;
}

/// A handler at `https://` with this certificate. `mutual`: it asks for one.
async fn handler(made: &Certificates, files: &Files, mutual: bool) -> (Handler, String) {
    let mut tls = ServerTlsConfig::new().identity(identity(files));
    if mutual {
        tls = tls.client_ca_root(authority(made));
    }
    let mut handler = Handler::absent();
    handler.tls = Some(tls);
    handler.up().await;
    let url = format!("https://127.0.0.1:{}", handler.port);
    (handler, url)
}

/// The gateway of a handler at `https://`.
async fn with_handler(made: &Certificates, mutual: bool, keys: &[(&str, &str)]) -> Stage {
    let (handler, url) = handler(made, &made.server, mutual).await;
    let keys = [&[("HANDLER__ADDRESS", url.as_str())], keys].concat();
    Stage::assemble(Broker::start().await, handler, &keys).await
}

async fn serves(stage: Stage) {
    within("the gateway to be ready", stage.gateway.ready()).await;
    let mut device = stage.device().await;
    device.send("encrypted").await;
    stage.handler.bytes(&device.conn, 9).await;
    stage.finish().await;
}

/// `https://`: the handler is checked with `cacertfile`; `verify_none` trusts any.
#[tokio::test]
async fn handlers_are_called_over_tls() {
    let made = Certificates::make();
    let ca = &made.ca;
    let checked = [("HANDLER__SSL_OPTIONS__CACERTFILE", ca.as_str())];
    serves(with_handler(&made, false, &checked).await).await;
    let trusting = [("HANDLER__SSL_OPTIONS__VERIFY", "verify_none")];
    serves(with_handler(&made, false, &trusting).await).await;
}

/// A handler whose certificate nobody vouches for gets nothing, and `/readyz` says
/// why.
#[tokio::test]
async fn a_handler_with_a_strange_certificate_is_told() {
    let (made, strange) = (Certificates::make(), Certificates::make());
    let ca = &strange.ca;
    let checked = [("HANDLER__SSL_OPTIONS__CACERTFILE", ca.as_str())];
    let stage = with_handler(&made, false, &checked).await;
    let text = stage.admin.ready_until(503, "certificate").await;
    assert!(text.contains("- handler default: https://"), "{text}");
    assert!(stage.handler.events().is_empty());
    stage.finish().await;
}

/// A handler whose certificate has expired gets nothing and is named so, once, however
/// often it is tried; the other one serves everybody.
#[tokio::test]
async fn a_handler_with_an_expired_certificate_is_told() {
    let made = Certificates::make();
    let (expired, expired_url) = handler(&made, &made.expired, false).await;
    let (good, good_url) = handler(&made, &made.server, false).await;
    let broker = Broker::start().await;
    // To see each attempt.
    let proxy = Proxy::to(expired.port).await;
    let expired_url = expired_url.replace(&expired.port.to_string(), &proxy.port.to_string());
    let both = format!("{expired_url},{good_url}");
    let plan = Plan::new(&broker.url(), &both)
        .set("HANDLER__SSL_OPTIONS__CACERTFILE", &made.ca)
        .set("SHARDS", "1");
    let mut gateway = Process::run(&plan);
    let devices = gateway.address("devices on").await;
    let admin = gateway.admin().await;
    let wanted = "the certificate has expired: it was valid until 2002-01-01T00:00:00Z";
    let line = gateway.logged(wanted).await;
    assert!(line.contains("handler channel is down"), "{line}");
    assert!(line.contains(&expired_url), "{line}");
    let state = |url: &str, state: &str| {
        format!(
            "exproto_handler_channels{{handler=\"default\",address=\"{url}\",state=\"{state}\"}}"
        )
    };
    let one = |n: f64| (n - 1.0).abs() < 0.1;
    admin.metric_until(&state(&good_url, "up"), one).await;
    admin.metric_until(&state(&expired_url, "down"), one).await;
    admin.ready_until(200, "").await;
    for _ in 0..4 {
        let mut device = Device::dial(devices).await;
        let conn = good.created(device.port()).await;
        device.send("encrypted").await;
        good.bytes(&conn, 9).await;
    }
    // Long enough for a time in seconds to have become another.
    proxy.dialled(8).await;
    gateway.signal("TERM");
    assert_eq!(gateway.exit().await, Some(0));
    assert!(expired.events().is_empty());
    let told = gateway
        .log()
        .into_iter()
        .filter(|l| l.contains("channel is down"));
    let told: Vec<_> = told.filter(|line| line.contains("certificate")).collect();
    assert_eq!(told.len(), 1, "{told:#?}");
    good.check();
}

/// One whose only handler has expired is not ready, and says why.
#[tokio::test]
async fn an_expired_certificate_is_in_readyz() {
    let made = Certificates::make();
    let (expired, url) = handler(&made, &made.expired, false).await;
    let keys = [
        ("HANDLER__ADDRESS", url.as_str()),
        ("HANDLER__SSL_OPTIONS__CACERTFILE", &made.ca),
    ];
    let stage = Stage::assemble(Broker::start().await, expired, &keys).await;
    let expected = format!("- handler default: {url}: the certificate has expired");
    stage.admin.ready_until(503, &expected).await;
    assert!(stage.handler.events().is_empty());
    stage.finish().await;
}

/// A handler that asks for a certificate and gets none, or that of a stranger, takes
/// nothing; it says so only after the handshake, and the channel never counts as up.
#[tokio::test]
async fn a_handler_that_refuses_the_gateway_is_told() {
    let made = Certificates::make();
    let trust = ("HANDLER__SSL_OPTIONS__CACERTFILE", made.ca.as_str());
    let stranger = [
        trust,
        ("HANDLER__SSL_OPTIONS__CERTFILE", &made.stranger.cert),
        ("HANDLER__SSL_OPTIONS__KEYFILE", &made.stranger.key),
    ];
    for (keys, alert) in [
        (&[trust][..], "received fatal alert: CertificateRequired"),
        (&stranger[..], "received fatal alert: "),
    ] {
        let keys = [keys, &[("HANDLER__HEALTH_CHECK", "false")]].concat();
        let stage = with_handler(&made, true, &keys).await;
        let text = stage.admin.ready_until(503, alert).await;
        assert!(text.contains("- handler default: https://"), "{text}");
        let up = stage
            .admin
            .metric("exproto_handler_channels_up{handler=\"default\"}");
        assert!(up.await < 0.5);
        assert!(stage.handler.events().is_empty());
        stage.finish().await;
    }
}

/// The gateway's own certificate is renewed without a restart: the next connection shows it.
#[tokio::test]
async fn the_gateways_certificate_towards_handlers_is_renewed() {
    let made = Certificates::make();
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (cert, key) = (path("cert.pem"), path("key.pem"));
    fs::copy(&made.stranger.cert, &cert).unwrap();
    fs::copy(&made.stranger.key, &key).unwrap();
    let keys = [
        ("HANDLER__SSL_OPTIONS__CACERTFILE", made.ca.as_str()),
        ("HANDLER__SSL_OPTIONS__CERTFILE", &cert),
        ("HANDLER__SSL_OPTIONS__KEYFILE", &key),
        ("HANDLER__HEALTH_CHECK", "false"),
    ];
    let stage = with_handler(&made, true, &keys).await;
    stage.admin.ready_until(503, "received fatal alert: ").await;
    fs::copy(&made.client.key, &key).unwrap();
    fs::copy(&made.client.cert, &cert).unwrap();
    serves(stage).await;
}

/// The certificate is for the host name that is configured, whatever addresses that has.
#[tokio::test]
async fn a_handlers_certificate_is_for_its_name() {
    exproto_sidecar::tls::install_provider();
    let dir = TempDir::new().unwrap();
    let made = Authority::new(dir.path(), "authority");
    for (name, serves) in [("handlers.test", true), ("other.test", false)] {
        let mut handler = Handler::absent();
        let tls = ServerTlsConfig::new().identity(identity(&made.server(name)));
        handler.tls = Some(tls);
        handler.up().await;
        let url = format!("https://handlers.test:{}", handler.port);
        let ca = made.file();
        let keys = [
            ("HANDLER__ADDRESS", url.as_str()),
            ("HANDLER__SSL_OPTIONS__CACERTFILE", &ca),
        ];
        let names = Arc::new(Names::new(&[handler.host]));
        let broker = Broker::start().await;
        let stage = Stage::resolving(broker, handler, &keys, names).await;
        if serves {
            self::serves(stage).await;
        } else {
            let text = stage.admin.ready_until(503, "not valid for name").await;
            assert!(text.contains(&format!("{url}: ")), "{text}");
            stage.finish().await;
        }
    }
}

/// A handler that asks for a certificate gets the gateway's.
#[tokio::test]
async fn handlers_may_ask_for_a_certificate() {
    let made = Certificates::make();
    let paths = [&made.ca, &made.client.cert, &made.client.key];
    let keys = [
        ("HANDLER__SSL_OPTIONS__CACERTFILE", paths[0].as_str()),
        ("HANDLER__SSL_OPTIONS__CERTFILE", paths[1]),
        ("HANDLER__SSL_OPTIONS__KEYFILE", paths[2]),
    ];
    serves(with_handler(&made, true, &keys).await).await;
}

/// A gateway with a Mosquitto that speaks TLS.
async fn with_broker(made: &Certificates, mutual: bool, keys: &[(&str, &str)]) -> Stage {
    let broker = Broker::with(&format!(
        "allow_anonymous true\ncafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate {mutual}\n",
        made.ca, made.server.cert, made.server.key
    ))
    .await;
    let url = format!("mqtts://127.0.0.1:{}", broker.port);
    let keys = [&[("BROKER__URL", url.as_str())], keys].concat();
    Stage::assemble(broker, Handler::start().await, &keys).await
}

/// `mqtts://`, with the gateway's own certificate where the broker wants one: a large
/// message goes there and back.
#[tokio::test]
async fn the_broker_is_reached_over_tls() {
    for mutual in [false, true] {
        let made = Certificates::make();
        let paths = [&made.ca, &made.client.cert, &made.client.key];
        let mut keys = vec![("BROKER__SSL_OPTIONS__CACERTFILE", paths[0].as_str())];
        if mutual {
            keys.push(("BROKER__SSL_OPTIONS__CERTFILE", paths[1]));
            keys.push(("BROKER__SSL_OPTIONS__KEYFILE", paths[2]));
        }
        let stage = with_broker(&made, mutual, &keys).await;
        within("the gateway to be ready", stage.gateway.ready()).await;
        let device = stage.subscriber("c", "t", 2).await;
        for qos in 0..=2 {
            let large = "x".repeat(200_000);
            stage.publish(&device, "t", qos, &large).await.ok();
            let payloads = stage.handler.payloads(&device.conn, qos as usize + 1).await;
            assert!(payloads[qos as usize] == large, "not what was sent");
        }
        stage.finish().await;
    }
}

/// A broker whose certificate nobody vouches for gets no login, and `/readyz` says
/// why.
#[tokio::test]
async fn a_broker_with_a_strange_certificate_is_told() {
    let (made, strange) = (Certificates::make(), Certificates::make());
    let ca = &strange.ca;
    let stage = with_broker(&made, false, &[("BROKER__SSL_OPTIONS__CACERTFILE", ca)]).await;
    let text = stage
        .admin
        .ready_until(503, "invalid peer certificate")
        .await;
    assert!(text.contains(": no broker: "), "{text}");
    assert_eq!(stage.broker.counted("New client connected").await, 0);
    stage.finish().await;
}
