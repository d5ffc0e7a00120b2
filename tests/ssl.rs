//! Devices over TLS: certificates of both sides, versions, resumption, reloading, and
//! peers that mean no good.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use common::{Authority, Files, Stage, assert_same, pattern, until, within};
use exproto_sidecar::proto::SocketType;
use exproto_sidecar::tls;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, HandshakeKind};

/// What a listener and its devices need.
struct Made {
    authority: Authority,
    server: Files,
    dir: TempDir,
}

impl Made {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        let server = authority.server("meters.example");
        Self {
            authority,
            server,
            dir,
        }
    }

    /// A stage with a TLS listener, `ssl.default`, that has further keys of its own.
    async fn stage(&self, keys: &[(&str, &str)]) -> Stage {
        let ca = self.authority.file();
        let mut all = vec![
            ("BIND".to_owned(), "127.0.0.1:0".to_owned()),
            ("SSL_OPTIONS__CERTFILE".to_owned(), self.server.cert.clone()),
            ("SSL_OPTIONS__KEYFILE".to_owned(), self.server.key.clone()),
            ("SSL_OPTIONS__CACERTFILE".to_owned(), ca),
        ];
        all.extend(keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (format!("LISTENERS__SSL__DEFAULT__{key}"), value.as_str()))
            .collect();
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (key.as_str(), *value))
            .collect();
        Stage::with(&all).await
    }

    fn client(&self, files: Option<&Files>) -> Arc<ClientConfig> {
        let identity = files.map(|files| tls::Identity {
            certfile: files.cert.clone().into(),
            keyfile: files.key.clone().into(),
        });
        let ca = self.authority.file();
        tls::client(Some(Path::new(&ca)), identity.as_ref(), true, &[]).unwrap()
    }
}

fn address(stage: &Stage) -> SocketAddr {
    stage.gateway.addresses().listeners["ssl.default"]
}

async fn try_dial(
    stage: &Stage,
    config: &Arc<ClientConfig>,
    name: &'static str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address(stage)).await.unwrap();
    let name = ServerName::try_from(name).unwrap();
    let connecting = TlsConnector::from(config.clone()).connect(name, tcp);
    within("the handshake", connecting).await
}

/// A device over TLS, and the name by which the handler knows it.
async fn dial(stage: &Stage, config: &Arc<ClientConfig>) -> (TlsStream<TcpStream>, String) {
    let stream = try_dial(stage, config, "meters.example").await.unwrap();
    let port = stream.get_ref().0.local_addr().unwrap().port();
    let conn = stage.handler.created(port).await;
    (stream, conn)
}

fn refused(reason: &str) -> String {
    format!("exproto_connections_refused_total{{listener=\"ssl.default\",reason=\"{reason}\"}}")
}

async fn handshakes_failed(stage: &Stage, count: usize) {
    let what = refused("handshake_failed");
    let enough = |n: f64| n > count as f64 - 0.5;
    let found = stage.admin.metric_until(&what, enough).await;
    assert!(found < count as f64 + 0.5);
}

fn s_client(stage: &Stage, arguments: &[&str]) -> Child {
    Command::new("openssl")
        .args(["s_client", "-quiet", "-connect"])
        .arg(address(stage).to_string())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// The only connection there has been, once there is one.
async fn first_conn(stage: &Stage) -> String {
    let first = |log: &common::Log| log.events.first().map(|event| event.conn.clone());
    stage.handler.wait("a connection", first).await
}

/// `openssl s_client` with TLS 1.2 and 1.3, with and without a certificate of its own.
#[tokio::test]
async fn openssl_speaks_with_us() {
    let made = Made::new();
    let meter = made.authority.client("meter-7");
    for version in ["-tls1_2", "-tls1_3"] {
        for own in [false, true] {
            let stage = made.stage(&[("SSL_OPTIONS__VERIFY", "verify_peer")]).await;
            let mut arguments = vec![version];
            if own {
                arguments.extend(["-cert", &meter.cert, "-key", &meter.key]);
            }
            let mut client = s_client(&stage, &arguments);
            let mut stdin = client.stdin.take().unwrap();
            stdin.write_all(b"up").await.unwrap();
            let conn = first_conn(&stage).await;
            assert_eq!(stage.handler.bytes(&conn, 2).await, b"up");
            let info = stage.conninfo(&conn);
            assert_eq!(info.socktype(), SocketType::Ssl);
            let names = info.peercert.map(|cert| (cert.cn, cert.dn));
            let expected = ("meter-7".to_owned(), "CN=meter-7".to_owned());
            assert_eq!(names, own.then_some(expected));
            stage.adapter.send(&conn, "down").await.ok();
            let mut down = [0; 4];
            let mut stdout = client.stdout.take().unwrap();
            within("what was sent", stdout.read_exact(&mut down))
                .await
                .unwrap();
            assert_eq!(&down, b"down");
            client.kill().await.unwrap();
            assert_eq!(stage.handler.closed(&conn).await, "normal");
            stage.finish().await;
        }
    }
}

/// Certificates with RSA keys, which many fleets know alone: beside one with an elliptic
/// curve each device gets the kind that it asks for.
#[tokio::test]
async fn keys_may_be_rsa() {
    let made = Made::new();
    let [cert, key] = ["rsa.pem", "rsa.key"].map(|name| made.dir.path().join(name));
    let status = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=meters.example"])
        .args(["-addext", "subjectAltName=DNS:meters.example"])
        .arg("-out")
        .arg(&cert)
        .arg("-keyout")
        .arg(&key)
        .stderr(Stdio::null())
        .status();
    assert!(within("openssl", status).await.unwrap().success());
    let certs = format!("{},{}", made.server.cert, cert.display());
    let keys = format!("{},{}", made.server.key, key.display());
    for version in ["-tls1_2", "-tls1_3"] {
        let keys = [
            ("SSL_OPTIONS__CERTFILE", certs.as_str()),
            ("SSL_OPTIONS__KEYFILE", &keys),
        ];
        let stage = made.stage(&keys).await;
        let (rsa, name) = (cert.display().to_string(), "meters.example");
        let mut client = s_client(
            &stage,
            &[
                version,
                "-sigalgs",
                "RSA-PSS+SHA256:RSA+SHA256",
                "-CAfile",
                &rsa,
                "-servername",
                name,
                "-verify_hostname",
                name,
                "-verify_return_error",
            ],
        );
        let mut stdin = client.stdin.take().unwrap();
        stdin.write_all(b"up").await.unwrap();
        let conn = first_conn(&stage).await;
        assert_eq!(stage.handler.bytes(&conn, 2).await, b"up");
        client.kill().await.unwrap();
        stage.finish().await;
    }
}

/// Python's ssl module, which most of the world's scripts speak with.
#[tokio::test]
async fn python_speaks_with_us() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let script = "import socket, ssl, sys\n\
        context = ssl.create_default_context(cafile=sys.argv[2])\n\
        tcp = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n\
        tls = context.wrap_socket(tcp, server_hostname='meters.example')\n\
        tls.sendall(b'up')\n\
        assert tls.recv(4) == b'down'\n\
        tls.unwrap()\n";
    let mut python = Command::new("python3")
        .args(["-c", script, &address(&stage).port().to_string()])
        .arg(made.authority.file())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let conn = first_conn(&stage).await;
    assert_eq!(stage.handler.bytes(&conn, 2).await, b"up");
    stage.adapter.send(&conn, "down").await.ok();
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    assert!(
        within("python's end", python.wait())
            .await
            .unwrap()
            .success()
    );
    stage.finish().await;
}

/// `verify_peer` and `fail_if_no_peer_cert`: no certificate, one of another authority,
/// one that has expired are refused before any callback, and counted.
#[tokio::test]
async fn a_device_needs_a_good_certificate() {
    let made = Made::new();
    let keys = [
        ("SSL_OPTIONS__VERIFY", "verify_peer"),
        ("SSL_OPTIONS__FAIL_IF_NO_PEER_CERT", "true"),
    ];
    let stage = made.stage(&keys).await;
    let others = Authority::new(made.dir.path(), "others");
    let strange = others.client("meter-7");
    let expired = made.authority.expired("meter-7");
    for bad in [None, Some(&strange), Some(&expired)] {
        let config = made.client(bad);
        // With TLS 1.3 the device learns of it when it reads.
        if let Ok(mut stream) = try_dial(&stage, &config, "meters.example").await {
            let mut byte = [0];
            let read = within("the refusal", stream.read(&mut byte)).await;
            assert!(read.is_err(), "{read:?}");
        }
    }
    handshakes_failed(&stage, 3).await;
    let good = made.authority.client("meter-7");
    let (_stream, conn) = dial(&stage, &made.client(Some(&good))).await;
    let told = stage.handler.events();
    assert!(told.iter().all(|event| event.conn == conn), "{told:?}");
    stage.finish().await;
}

/// A device may come without a certificate where none is demanded, and not with a bad
/// one; one that was made by an intermediate authority is good with that one's beside it.
#[tokio::test]
async fn a_certificate_that_is_shown_must_be_good() {
    let made = Made::new();
    let stage = made.stage(&[("SSL_OPTIONS__VERIFY", "verify_peer")]).await;
    let others = Authority::new(made.dir.path(), "others");
    let between = made.authority.intermediate("between");
    let bare = between.client("meter-8");
    for bad in [
        others.client("meter-7"),
        made.authority.expired("meter-7"),
        bare,
    ] {
        if let Ok(mut stream) = try_dial(&stage, &made.client(Some(&bad)), "meters.example").await {
            let read = within("the refusal", stream.read(&mut [0])).await;
            assert!(read.is_err(), "{read:?}");
        }
    }
    handshakes_failed(&stage, 3).await;
    assert!(stage.handler.events().is_empty());
    let chain = between.client_chain("meter-9");
    let (_stream, conn) = dial(&stage, &made.client(Some(&chain))).await;
    assert_eq!(stage.conninfo(&conn).peercert.unwrap().cn, "meter-9");
    let (_stream, conn) = dial(&stage, &made.client(None)).await;
    assert_eq!(stage.conninfo(&conn).peercert, None);
    stage.finish().await;
}

/// A device's names go to the handler only where they were checked.
#[tokio::test]
async fn a_certificate_that_nobody_checks_is_not_asked_for() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let own = made.authority.client("meter-7");
    let (_stream, conn) = dial(&stage, &made.client(Some(&own))).await;
    assert_eq!(stage.conninfo(&conn).peercert, None);
    stage.finish().await;
}

/// Bytes of both directions arrive whole, also when there are many and the device
/// takes them slowly; Close ends in a close_notify.
#[tokio::test]
async fn bytes_arrive_whole_and_the_end_is_told() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let (mut stream, conn) = dial(&stage, &made.client(None)).await;
    let sent = pattern(1_000_000);
    within("room", stream.write_all(&sent)).await.unwrap();
    stream.flush().await.unwrap();
    assert_same(&stage.handler.bytes(&conn, sent.len()).await, &sent);
    for chunk in sent.chunks(100_000) {
        stage.adapter.send(&conn, chunk.to_vec()).await.ok();
    }
    stage.adapter.close(&conn).await.ok();
    let mut got = Vec::new();
    // Without a close_notify this would be an error.
    within("all of it", stream.read_to_end(&mut got))
        .await
        .unwrap();
    assert_same(&got, &sent);
    assert_eq!(stage.handler.closed(&conn).await, "closed_by_handler");
    stage.finish().await;
}

/// A device that just closes the socket has left as one that says so.
#[tokio::test]
async fn a_device_may_leave_without_a_word() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    for polite in [false, true] {
        let (mut stream, conn) = dial(&stage, &made.client(None)).await;
        stream.write_all(b"bye").await.unwrap();
        stream.flush().await.unwrap();
        match polite {
            true => stream.shutdown().await.unwrap(),
            false => stream.get_mut().0.shutdown().await.unwrap(),
        }
        assert_eq!(stage.handler.closed(&conn).await, "normal");
        assert_eq!(stage.handler.bytes(&conn, 3).await, b"bye");
    }
    stage.finish().await;
}

/// Sessions are resumed, with TLS 1.2 and 1.3; the device's names are known then too.
#[tokio::test]
async fn sessions_are_resumed() {
    let made = Made::new();
    let stage = made.stage(&[("SSL_OPTIONS__VERIFY", "verify_peer")]).await;
    let own = made.authority.client("meter-7");
    let config = made.client(Some(&own));
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (mut stream, conn) = dial(&stage, &config).await;
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(expected));
        let peercert = stage.conninfo(&conn).peercert.unwrap();
        assert_eq!(peercert.cn, "meter-7");
        // The ticket comes with what is read.
        stage.adapter.send(&conn, "x").await.ok();
        let mut byte = [0];
        within("a byte", stream.read_exact(&mut byte))
            .await
            .unwrap();
    }
    let session = made.dir.path().join("session");
    let session = session.to_str().unwrap();
    for (option, reused) in [("-sess_out", false), ("-sess_in", true)] {
        let before = stage.handler.events().len();
        let mut client = Command::new("openssl")
            .args(["s_client", "-tls1_2", option, session, "-connect"])
            .arg(address(&stage).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let more = |log: &common::Log| (log.events.len() > before).then_some(());
        stage.handler.wait("the connection", more).await;
        drop(client.stdin.take());
        let output = within("the end", client.wait_with_output()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text.contains("Reused, TLSv1.2"), reused, "{text}");
    }
    stage.finish().await;
}

/// The subject of the certificate that the gateway shows for a server name.
async fn shown(stage: &Stage, made: &Made, name: &'static str) -> String {
    let ca = made.authority.file();
    let config = tls::client(Some(Path::new(&ca)), None, false, &[]).unwrap();
    let stream = try_dial(stage, &config, name).await.unwrap();
    let (_, connection) = stream.get_ref();
    let certificates = connection.peer_certificates().unwrap();
    tls::Subject::of(&certificates[0]).unwrap().cn
}

/// Of several certificates a device gets the one for the name it asks for, else the
/// first.
#[tokio::test]
async fn the_server_name_chooses_the_certificate() {
    let made = Made::new();
    let other = made.authority.client("trackers.example");
    let both = |one: &str, other: &str| format!("{one},{other}");
    let certs = both(&made.server.cert, &other.cert);
    let keys = both(&made.server.key, &other.key);
    let stage = made
        .stage(&[
            ("SSL_OPTIONS__CERTFILE", &certs),
            ("SSL_OPTIONS__KEYFILE", &keys),
        ])
        .await;
    for (asked, expected) in [
        ("trackers.example", "trackers.example"),
        ("meters.example", "meters.example"),
        ("nobody.example", "meters.example"),
    ] {
        assert_eq!(shown(&stage, &made, asked).await, expected);
    }
    stage.finish().await;
}

/// New files are used without a restart and without dropping anybody; files that are
/// of no use are reported, and the old ones stay.
#[tokio::test]
async fn certificates_are_reloaded() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let (mut stream, conn) = dial(&stage, &made.client(None)).await;
    assert_eq!(shown(&stage, &made, "x.example").await, "meters.example");
    let renewed = made.authority.client("renewed.example");
    let reloads = |outcome: &str| {
        format!("exproto_listener_reloads_total{{listener=\"ssl.default\",outcome=\"{outcome}\"}}")
    };
    fs::copy(&renewed.cert, &made.server.cert).unwrap();
    // The key does not belong to it yet.
    stage
        .admin
        .metric_until(&reloads("failed"), |n| n > 0.5)
        .await;
    assert_eq!(shown(&stage, &made, "x.example").await, "meters.example");
    fs::copy(&renewed.key, &made.server.key).unwrap();
    stage.admin.metric_until(&reloads("ok"), |n| n > 0.5).await;
    assert_eq!(shown(&stage, &made, "x.example").await, "renewed.example");
    fs::write(&made.server.cert, "no certificate").unwrap();
    stage
        .admin
        .metric_until(&reloads("failed"), |n| n > 1.5)
        .await;
    assert_eq!(shown(&stage, &made, "x.example").await, "renewed.example");
    stream.write_all(b"still here").await.unwrap();
    assert_eq!(stage.handler.bytes(&conn, 10).await, b"still here");
    stage.finish().await;
}

/// Peers that say nothing, or stop within the handshake, are ended after
/// `handshake_timeout`, and those that say nothing take nobody's turn.
#[tokio::test]
async fn handshakes_that_do_not_end() {
    let made = Made::new();
    let keys = [
        ("SSL_OPTIONS__HANDSHAKE_TIMEOUT", "2s"),
        ("SSL_OPTIONS__MAX_HANDSHAKES", "1"),
    ];
    let stage = made.stage(&keys).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(address(&stage)).await.unwrap());
    }
    let (_stream, _conn) = dial(&stage, &made.client(None)).await;
    // Takes the only turn.
    let mut half = TcpStream::connect(address(&stage)).await.unwrap();
    half.write_all(&[0x16, 3, 1, 2, 0, 1]).await.unwrap();
    handshakes_failed(&stage, 51).await;
    for stream in silent.iter_mut().chain([&mut half]) {
        let mut rest = Vec::new();
        let _ = within("the end", stream.read_to_end(&mut rest)).await;
    }
    let (_stream, _conn) = dial(&stage, &made.client(None)).await;
    stage.finish().await;
}

/// What is no TLS is refused and breaks nothing.
#[tokio::test]
async fn garbage_is_refused() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let hello = {
        let (near, mut far) = tokio::io::duplex(100_000);
        let name = ServerName::try_from("meters.example").unwrap();
        let connecting = TlsConnector::from(made.client(None)).connect(name, near);
        let task = tokio::spawn(connecting);
        let mut hello = vec![0; 5];
        far.read_exact(&mut hello).await.unwrap();
        let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
        hello.resize(5 + length, 0);
        far.read_exact(&mut hello[5..]).await.unwrap();
        task.abort();
        hello
    };
    let mut bad = hello.clone();
    bad[5] = 99;
    let mut long = vec![0x16, 3, 1, 0xff, 0xff];
    long.resize(70_000, 7);
    let cases = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 100],
        hello[..hello.len() / 2].to_vec(),
        bad,
        long,
    ];
    for bytes in &cases {
        let mut stream = TcpStream::connect(address(&stage)).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut rest = Vec::new();
        let _ = within("the end", stream.read_to_end(&mut rest)).await;
    }
    handshakes_failed(&stage, cases.len()).await;
    let (_stream, conn) = dial(&stage, &made.client(None)).await;
    let told = stage.handler.events();
    assert!(told.iter().all(|event| event.conn == conn));
    stage.finish().await;
}

/// Behind a load balancer the PROXY header comes before the handshake, even in one
/// packet with its beginning.
#[tokio::test]
async fn the_proxy_header_comes_first() {
    let made = Made::new();
    let stage = made.stage(&[("PROXY_PROTOCOL", "true")]).await;
    let mut tcp = TcpStream::connect(address(&stage)).await.unwrap();
    tcp.write_all(b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 7994\r\n")
        .await
        .unwrap();
    let name = ServerName::try_from("meters.example").unwrap();
    let connecting = TlsConnector::from(made.client(None)).connect(name, tcp);
    let _stream = within("the handshake", connecting).await.unwrap();
    let conn = stage.handler.created(4711).await;
    let peer = stage.conninfo(&conn).peername.unwrap();
    assert_eq!((peer.host.as_str(), peer.port), ("192.0.2.7", 4711));
    stage.finish().await;
}

/// A drain does not wait for handshakes.
#[tokio::test]
async fn a_drain_waits_for_no_handshake() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let mut silent = TcpStream::connect(address(&stage)).await.unwrap();
    let (admin, opened) = (&stage.admin, "exproto_connections_opened_total");
    until("the listener to have it", || async {
        let _ = admin.metric(opened).await;
        // Whoever came later has been served, so it has been accepted.
        let _ = dial(&stage, &made.client(None)).await;
        Some(())
    })
    .await;
    let begun = std::time::Instant::now();
    stage.finish().await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    let mut rest = Vec::new();
    let _ = within("the end", silent.read_to_end(&mut rest)).await;
}
