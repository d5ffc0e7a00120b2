//! Devices over DTLS: certificates and pre-shared keys, other people's clients,
//! reloading, and peers that mean no good.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use common::{Authority, Call, Files, Stage, until, within};
use exproto_sidecar::proto::SocketType;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::process::{Child, Command};

const IDENTITY: &str = "meter-7";
const KEY: &str = "000102030405060708090a0b0c0d0e0f";

/// What a listener and its devices need.
struct Made {
    authority: Authority,
    server: Files,
    psk: String,
    dir: TempDir,
}

impl Made {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        let server = authority.server("meters.example");
        let psk = dir.path().join("psk");
        fs::write(&psk, format!("{IDENTITY}:{KEY}\n")).unwrap();
        Self {
            authority,
            server,
            psk: psk.display().to_string(),
            dir,
        }
    }

    /// A stage with a DTLS listener, `dtls.default`, that has further keys of its own.
    async fn stage(&self, keys: &[(&str, &str)]) -> Stage {
        let ca = self.authority.file();
        let mut all = vec![
            ("BIND", "127.0.0.1:0"),
            ("DTLS_OPTIONS__CERTFILE", &self.server.cert),
            ("DTLS_OPTIONS__KEYFILE", &self.server.key),
            ("DTLS_OPTIONS__CACERTFILE", &ca),
            ("DTLS_OPTIONS__PSK_FILE", &self.psk),
        ];
        all.extend(keys);
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (format!("LISTENERS__DTLS__DEFAULT__{key}"), *value))
            .collect();
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (key.as_str(), *value))
            .collect();
        Stage::with(&all).await
    }
}

fn address(stage: &Stage) -> SocketAddr {
    stage.gateway.addresses().listeners["dtls.default"]
}

/// The n-th connection there has been, once there are so many.
async fn nth_conn(stage: &Stage, n: usize) -> String {
    let nth = |log: &common::Log| {
        let created = |event: &&common::Event| matches!(event.call, Call::Created(_));
        let mut created = log.events.iter().filter(created);
        created.nth(n).map(|event| event.conn.clone())
    };
    stage.handler.wait("a connection", nth).await
}

fn refused(reason: &str) -> String {
    format!("exproto_connections_refused_total{{listener=\"dtls.default\",reason=\"{reason}\"}}")
}

async fn refused_at_least(stage: &Stage, reason: &str, count: f64) {
    let what = refused(reason);
    stage.admin.metric_until(&what, |n| n > count - 0.5).await;
}

fn s_client(stage: &Stage, arguments: &[&str]) -> Child {
    Command::new("openssl")
        .args(["s_client", "-dtls1_2", "-quiet", "-connect"])
        .arg(address(stage).to_string())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Says something, hears something, and leaves as the gateway closes.
async fn converse(stage: &Stage, mut client: Child, n: usize) -> String {
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(b"up\n").await.unwrap();
    let conn = nth_conn(stage, n).await;
    assert_eq!(stage.handler.bytes(&conn, 3).await, b"up\n");
    stage.adapter.send(&conn, "down\n").await.ok();
    let mut stdout = client.stdout.take().unwrap();
    let mut down = vec![0; 5];
    within("what was sent", stdout.read_exact(&mut down))
        .await
        .unwrap();
    assert_eq!(down, b"down\n");
    // A close_notify ends it by itself.
    stage.adapter.close(&conn).await.ok();
    within("the client's end", client.wait()).await.unwrap();
    assert_eq!(stage.handler.closed(&conn).await, "closed_by_handler");
    conn
}

/// `openssl s_client`: with a certificate of its own and without, and with a
/// pre-shared key.
#[tokio::test]
async fn openssl_speaks_with_us() {
    let made = Made::new();
    let stage = made.stage(&[("DTLS_OPTIONS__VERIFY", "verify_peer")]).await;
    let own = made.authority.client("meter-7");
    let psk = ["-psk_identity", IDENTITY, "-psk", KEY];
    let cases: [(&[&str], Option<&str>); 4] = [
        (&[], None),
        (&["-cert", &own.cert, "-key", &own.key], Some("meter-7")),
        (&[&psk[..], &["-cipher", "PSK-AES128-CCM8"]].concat(), None),
        (
            &[&psk[..], &["-cipher", "PSK-AES128-GCM-SHA256"]].concat(),
            None,
        ),
    ];
    for (n, (arguments, cn)) in cases.into_iter().enumerate() {
        let conn = converse(&stage, s_client(&stage, arguments), n).await;
        let info = stage.conninfo(&conn);
        assert_eq!(info.socktype(), SocketType::Dtls);
        assert_eq!(info.peercert.as_ref().map(|cert| cert.cn.as_str()), cn);
    }
    stage.finish().await;
}

/// A device that closes has ended its connection.
#[tokio::test]
async fn a_device_says_goodbye() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let mut client = s_client(&stage, &[]);
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(b"bye\n").await.unwrap();
    let conn = nth_conn(&stage, 0).await;
    stage.handler.bytes(&conn, 4).await;
    // "Q" ends s_client, without -quiet; the end of its input does with it.
    drop(stdin);
    client.kill().await.ok();
    let mut polite = Command::new("openssl")
        .args(["s_client", "-dtls1_2", "-connect"])
        .arg(address(&stage).to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = polite.stdin.take().unwrap();
    let conn = nth_conn(&stage, 1).await;
    stdin.write_all(b"Q\n").await.unwrap();
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    stage.finish().await;
}

/// GnuTLS's client.
#[tokio::test]
async fn gnutls_speaks_with_us() {
    let made = Made::new();
    let stage = made.stage(&[("DTLS_OPTIONS__VERIFY", "verify_peer")]).await;
    let own = made.authority.client("meter-7");
    let port = address(&stage).port().to_string();
    let ca = made.authority.file();
    let host = ["--verify-hostname=meters.example", "127.0.0.1"];
    let psk = ["--pskusername", IDENTITY, "--pskkey", KEY, "--priority"];
    let psk = [&psk[..], &["NORMAL:-KX-ALL:+PSK:-VERS-ALL:+VERS-DTLS1.2"]].concat();
    let own = ["--x509certfile", &own.cert, "--x509keyfile", &own.key];
    let cases: [(&[&str], Option<&str>); 2] = [(&psk, None), (&own, Some("meter-7"))];
    for (n, (arguments, cn)) in cases.into_iter().enumerate() {
        let client = Command::new("gnutls-cli")
            .args([
                "--udp",
                "-p",
                &port,
                "--x509cafile",
                &ca,
                "--logfile=/dev/null",
            ])
            .args(arguments)
            .args(host)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let conn = converse(&stage, client, n).await;
        let info = stage.conninfo(&conn);
        assert_eq!(info.peercert.as_ref().map(|cert| cert.cn.as_str()), cn);
    }
    stage.finish().await;
}

/// `verify_peer` and `fail_if_no_peer_cert`; a wrong key, an unknown identity: refused
/// before any callback, and counted.
#[tokio::test]
async fn a_device_must_show_who_it_is() {
    let made = Made::new();
    let keys = [
        ("DTLS_OPTIONS__VERIFY", "verify_peer"),
        ("DTLS_OPTIONS__FAIL_IF_NO_PEER_CERT", "true"),
        // With a wrong key neither side can tell the other: it ends by time.
        ("DTLS_OPTIONS__HANDSHAKE_TIMEOUT", "5s"),
    ];
    let stage = made.stage(&keys).await;
    let others = Authority::new(made.dir.path(), "others");
    let (strange, expired) = (others.client("meter-7"), made.authority.expired("meter-7"));
    let wrong = "ff0102030405060708090a0b0c0d0e0f";
    let psk = ["-cipher", "PSK-AES128-GCM-SHA256", "-psk_identity"];
    let cases: [&[&str]; 5] = [
        &[],
        &["-cert", &strange.cert, "-key", &strange.key],
        &["-cert", &expired.cert, "-key", &expired.key],
        &[&psk[..], &[IDENTITY, "-psk", wrong]].concat(),
        &[&psk[..], &["nobody", "-psk", KEY]].concat(),
    ];
    let count = cases.len() as f64;
    let mut clients = Vec::new();
    for arguments in cases {
        let mut client = s_client(&stage, arguments);
        let _ = client.stdin.take().unwrap().write_all(b"up\n").await;
        clients.push(client);
    }
    refused_at_least(&stage, "handshake_failed", count).await;
    drop(clients);
    let good = made.authority.client("meter-8");
    let client = s_client(&stage, &["-cert", &good.cert, "-key", &good.key]);
    let conn = converse(&stage, client, 0).await;
    let told = stage.handler.events();
    assert!(told.iter().all(|event| event.conn == conn), "{told:?}");
    stage.finish().await;
}

/// New files are used without a restart and without dropping anybody; a file that is
/// of no use is reported, and the old one stays.
#[tokio::test]
async fn keys_are_reloaded() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let mut client = s_client(&stage, &[]);
    let mut stdin = client.stdin.take().unwrap();
    stdin.write_all(b"1").await.unwrap();
    let reloads = |outcome: &str| {
        format!("exproto_listener_reloads_total{{listener=\"dtls.default\",outcome=\"{outcome}\"}}")
    };
    let conn = nth_conn(&stage, 0).await;
    stage.handler.bytes(&conn, 1).await;
    fs::write(&made.psk, "no key").unwrap();
    stage
        .admin
        .metric_until(&reloads("failed"), |n| n > 0.5)
        .await;
    fs::write(&made.psk, format!("{IDENTITY}:{KEY}\nnew:{KEY}\n")).unwrap();
    stage.admin.metric_until(&reloads("ok"), |n| n > 0.5).await;
    let psk = ["-cipher", "PSK-AES128-GCM-SHA256", "-psk_identity", "new"];
    let added = s_client(&stage, &[&psk[..], &["-psk", KEY]].concat());
    converse(&stage, added, 1).await;
    stdin.write_all(b"2").await.unwrap();
    assert_eq!(stage.handler.bytes(&conn, 2).await, b"12");
    stage.finish().await;
}

/// What anybody can send to an established device's port, or in its name, does
/// nothing: garbage, plaintext alerts, records of the future.
#[tokio::test]
async fn strangers_end_no_session() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    // Both ends of the device's way, so that it can be spoken in its name.
    let relay = Arc::new(Relay::start(address(&stage)).await);
    let mut client = Command::new("openssl")
        .args(["s_client", "-dtls1_2", "-quiet", "-connect"])
        .arg(relay.front.local_addr().unwrap().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let carrying = tokio::spawn(Relay::carry(relay.clone()));
    let stdin = tokio::sync::Mutex::new(client.stdin.take().unwrap());
    stdin.lock().await.write_all(b"1").await.unwrap();
    let conn = nth_conn(&stage, 0).await;
    stage.handler.bytes(&conn, 1).await;
    let alert = |epoch: u8, number: u8, body: &[u8]| {
        let head = [
            21,
            0xfe,
            0xfd,
            0,
            epoch,
            0,
            0,
            0,
            0,
            0,
            number,
            0,
            body.len() as u8,
        ];
        [&head[..], body].concat()
    };
    let mut forged = vec![
        alert(0, 200, &[2, 40]),
        alert(0, 201, &[1, 0]),
        alert(1, 202, &[2, 40]),
        alert(1, 203, &[7; 40]),
        alert(2, 204, &[7; 40]),
        b"garbage".to_vec(),
        Vec::new(),
        vec![0; 2000],
    ];
    for kind in 20..26 {
        forged.push(
            [
                &[kind, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, kind, 0, 30][..],
                &[9; 30],
            ]
            .concat(),
        );
    }
    for _ in 0..100 {
        for datagram in &forged {
            relay.back.send(datagram).await.unwrap();
        }
    }
    // Among so many in its name, a datagram of the device's own may find no room.
    until("the device to be heard", || async {
        stdin.lock().await.write_all(b"2").await.unwrap();
        let heard = stage.handler.bytes(&conn, 2);
        let heard = tokio::time::timeout(Duration::from_millis(100), heard);
        heard.await.ok()
    })
    .await;
    stage.adapter.send(&conn, "3").await.ok();
    let mut three = [0];
    let mut stdout = client.stdout.take().unwrap();
    within("the answer", stdout.read_exact(&mut three))
        .await
        .unwrap();
    assert_eq!(&three, b"3");
    carrying.abort();
    stage.finish().await;
}

/// Carries datagrams between a device and the gateway.
struct Relay {
    front: UdpSocket,
    back: UdpSocket,
}

impl Relay {
    async fn start(gateway: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(gateway).await.unwrap();
        Self { front, back }
    }

    async fn carry(self: Arc<Self>) {
        let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
        let mut device = None;
        loop {
            tokio::select! {
                read = self.front.recv_from(&mut up) => {
                    let (count, from) = read.unwrap();
                    device = Some(from);
                    self.back.send(&up[..count]).await.unwrap();
                }
                read = self.back.recv(&mut down) => {
                    let count = read.unwrap();
                    self.front.send_to(&down[..count], device.unwrap()).await.unwrap();
                }
            }
        }
    }
}

/// A device that has lost its state begins anew from the same port.
#[tokio::test]
async fn a_device_may_begin_anew() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    // An address that no other test has, so that none takes its port meanwhile.
    let bind = format!("127.0.0.77:{}", common::free_port());
    let mut first = s_client(&stage, &["-bind", &bind]);
    first.stdin.as_mut().unwrap().write_all(b"1").await.unwrap();
    let conn = nth_conn(&stage, 0).await;
    stage.handler.bytes(&conn, 1).await;
    first.kill().await.unwrap();
    let second = s_client(&stage, &["-bind", &bind]);
    let next = converse(&stage, second, 1).await;
    assert_ne!(conn, next);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    stage.finish().await;
}

/// Handshakes that do not go on are ended after `handshake_timeout`, and no more than
/// `max_handshakes` are under way; a device is served as soon as there is room.
#[tokio::test]
async fn handshakes_that_do_not_end() {
    let made = Made::new();
    let keys = [
        ("DTLS_OPTIONS__HANDSHAKE_TIMEOUT", "2s"),
        ("DTLS_OPTIONS__MAX_HANDSHAKES", "1"),
    ];
    let stage = made.stage(&keys).await;
    // Passes the cookie exchange and nothing of what comes behind it.
    let relay = Relay::start(address(&stage)).await;
    let mut half = Command::new("openssl")
        .args(["s_client", "-dtls1_2", "-connect"])
        .arg(relay.front.local_addr().unwrap().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut datagram = vec![0; 65_536];
    for _ in 0..2 {
        let (count, device) = within("a hello", relay.front.recv_from(&mut datagram))
            .await
            .unwrap();
        relay.back.send(&datagram[..count]).await.unwrap();
        let count = within("an answer", relay.back.recv(&mut datagram))
            .await
            .unwrap();
        relay
            .front
            .send_to(&datagram[..count], device)
            .await
            .unwrap();
    }
    let good = s_client(&stage, &[]);
    refused_at_least(&stage, "max_handshakes", 1.0).await;
    converse(&stage, good, 0).await;
    refused_at_least(&stage, "handshake_failed", 1.0).await;
    half.kill().await.unwrap();
    stage.finish().await;
}

/// A flood of ClientHellos without cookies, from many ports, keeps nothing, and a
/// device is served meanwhile.
#[tokio::test]
async fn a_flood_of_hellos() {
    let made = Made::new();
    let stage = made.stage(&[]).await;
    let relay = Relay::start(address(&stage)).await;
    let mut source = Command::new("openssl")
        .args(["s_client", "-dtls1_2", "-connect"])
        .arg(relay.front.local_addr().unwrap().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut hello = vec![0; 65_536];
    let (count, _) = within("a hello", relay.front.recv_from(&mut hello))
        .await
        .unwrap();
    hello.truncate(count);
    source.kill().await.unwrap();
    let to = address(&stage);
    let flood = tokio::spawn(async move {
        for _ in 0..2000 {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            for _ in 0..5 {
                let _ = socket.send_to(&hello, to).await;
            }
        }
    });
    for n in 0..3 {
        converse(&stage, s_client(&stage, &[]), n).await;
    }
    within("the flood's end", flood).await.unwrap();
    let received = "exproto_datagrams_received_total{listener=\"dtls.default\"}";
    let all = until("most of the flood", || async {
        let n = stage.admin.metric(received).await;
        (n > 5_000.0).then_some(n)
    })
    .await;
    assert!(all > 5_000.0);
    assert_eq!(stage.gateway.connections(), 0);
    stage.finish().await;
}
