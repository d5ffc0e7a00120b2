//! Handshakes of devices, over TLS and DTLS: those that never go on keep nobody out, and
//! those that are slow are not ended for it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Authority, Call, DtlsDevice, Files, Stage, until, within};
use exproto_sidecar::tls;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// What listeners of both kinds need.
struct Made {
    authority: Authority,
    server: Files,
    _dir: TempDir,
}

impl Made {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        Self {
            server: authority.server("meters.example"),
            authority,
            _dir: dir,
        }
    }

    /// A stage with a listener of this kind, `default`, with further keys of its own.
    async fn stage(&self, kind: &str, keys: &[(&str, &str)]) -> Stage {
        let options = match kind {
            "DTLS" => "DTLS_OPTIONS",
            _ => "SSL_OPTIONS",
        };
        let files = [
            ("CERTFILE", self.server.cert.as_str()),
            ("KEYFILE", self.server.key.as_str()),
        ];
        let files = files.map(|(key, value)| (format!("{options}__{key}"), value));
        let keys = keys.iter().map(|(key, value)| match *key {
            "HANDSHAKE_TIMEOUT" | "MAX_HANDSHAKES" => (format!("{options}__{key}"), *value),
            key => (key.to_owned(), *value),
        });
        let mut all = vec![("BIND".to_owned(), "127.0.0.1:0")];
        all.extend(files.into_iter().chain(keys));
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (format!("LISTENERS__{kind}__DEFAULT__{key}"), *value))
            .collect();
        let all: Vec<_> = all
            .iter()
            .map(|(key, value)| (key.as_str(), *value))
            .collect();
        Stage::with(&all).await
    }

    fn connector(&self) -> TlsConnector {
        let ca = self.authority.file();
        let config = tls::client(Some(Path::new(&ca)), None, true, &[]).unwrap();
        TlsConnector::from(config)
    }
}

fn address(stage: &Stage, listener: &str) -> SocketAddr {
    stage.gateway.addresses().listeners[listener]
}

fn refused(listener: &str, reason: &str) -> String {
    format!("exproto_connections_refused_total{{listener=\"{listener}\",reason=\"{reason}\"}}")
}

fn name() -> ServerName<'static> {
    ServerName::try_from("meters.example").unwrap()
}

/// Longer than any test waits: nothing is ended by its time.
const NEVER: (&str, &str) = ("HANDSHAKE_TIMEOUT", "10m");

/// The bytes of a good ClientHello.
async fn tls_hello(connector: TlsConnector) -> Vec<u8> {
    let (near, mut far) = tokio::io::duplex(100_000);
    let task = tokio::spawn(connector.connect(name(), near));
    let mut hello = vec![0; 5];
    far.read_exact(&mut hello).await.unwrap();
    let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
    hello.resize(5 + length, 0);
    far.read_exact(&mut hello[5..]).await.unwrap();
    task.abort();
    hello
}

/// A TLS handshake that has begun and does not go on.
async fn tls_silent(to: SocketAddr, hello: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(hello).await.unwrap();
    stream
}

/// Three times as many silent peers as there are turns: a device is let in long before
/// their time is over.
#[tokio::test]
async fn silent_peers_over_tls_make_room() {
    let made = Made::new();
    let stage = made.stage("SSL", &[NEVER, ("MAX_HANDSHAKES", "20")]).await;
    let to = address(&stage, "ssl.default");
    let hello = tls_hello(made.connector()).await;
    let mut silent = Vec::new();
    for _ in 0..60 {
        silent.push(tls_silent(to, &hello).await);
    }
    let tcp = TcpStream::connect(to).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let connecting = made.connector().connect(name(), tcp);
    let _device = within("the handshake", connecting).await.unwrap();
    stage.handler.created(port).await;
    let gave_way = refused("ssl.default", "handshake_silent");
    stage.admin.metric_until(&gave_way, |n| n > 0.5).await;
    let failed = refused("ssl.default", "handshake_failed");
    assert!(stage.admin.metric(&failed).await < 0.5);
    stage.finish().await;
}

/// Peers that have begun a handshake and go on sending a little of a message that never
/// becomes whole buy no time with it: a device is let in as if they were silent.
#[tokio::test]
async fn peers_that_trickle_over_tls_make_room() {
    let made = Made::new();
    let stage = made.stage("SSL", &[NEVER, ("MAX_HANDSHAKES", "5")]).await;
    let to = address(&stage, "ssl.default");
    let hello = tls_hello(made.connector()).await;
    let trickling = (0..8).map(|_| {
        let hello = hello.clone();
        tokio::spawn(async move {
            loop {
                let mut stream = tls_silent(to, &hello).await;
                // A record of 16 KiB begins.
                stream.write_all(&[0x16, 3, 3, 0x40, 0]).await.unwrap();
                while stream.write_all(&[0; 100]).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        })
    });
    let trickling: Vec<_> = trickling.collect();
    let gave_way = refused("ssl.default", "handshake_silent");
    stage.admin.metric_until(&gave_way, |n| n > 0.5).await;
    let tcp = TcpStream::connect(to).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let connecting = made.connector().connect(name(), tcp);
    let _device = within("a device to be let in", connecting).await.unwrap();
    stage.handler.created(port).await;
    for task in trickling {
        task.abort();
    }
    stage.finish().await;
}

/// Carries what a device says, a little and then nothing for a second, and what it is
/// answered at once. Tells when the first bytes are on their way.
async fn slowly(device: DuplexStream, to: SocketAddr, begun: oneshot::Sender<u16>) {
    const PIECE: usize = 100;
    let (mut down, mut up) = TcpStream::connect(to).await.unwrap().into_split();
    let port = up.local_addr().unwrap().port();
    let (mut said, mut heard) = tokio::io::split(device);
    let mut begun = Some(begun);
    let talking = async {
        let mut piece = [0; PIECE];
        while let Ok(count @ 1..) = said.read(&mut piece).await {
            up.write_all(&piece[..count]).await.unwrap();
            if let Some(begun) = begun.take() {
                begun.send(port).unwrap();
            }
            // This is what a bad line is like.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = talking => {}
        _ = tokio::io::copy(&mut down, &mut heard) => {}
    }
}

/// A device on a bad line, whose handshake takes longer than others may be stuck, gets
/// through while silent peers keep asking for its turn: it takes none until its first
/// message is whole.
#[tokio::test]
async fn a_slow_handshake_over_tls_is_not_ended() {
    let made = Made::new();
    let stage = made.stage("SSL", &[NEVER, ("MAX_HANDSHAKES", "2")]).await;
    let to = address(&stage, "ssl.default");
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (begin, begun) = oneshot::channel();
    let line = tokio::spawn(slowly(far, to, begin));
    let connecting = tokio::spawn(made.connector().connect(name(), near));
    let port = within("its first bytes", begun).await.unwrap();
    let hello = tls_hello(made.connector()).await;
    let pressure = tokio::spawn(async move {
        let mut silent = Vec::new();
        for _ in 0..500 {
            silent.push(tls_silent(to, &hello).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let _device = within("the handshake", connecting).await.unwrap().unwrap();
    stage.handler.created(port).await;
    let gave_way = refused("ssl.default", "handshake_silent");
    stage.admin.metric_until(&gave_way, |n| n > 0.5).await;
    pressure.abort();
    line.abort();
    stage.finish().await;
}

/// Devices that have shown their address and say nothing more, each from an address of
/// its own.
async fn dtls_silent(to: SocketAddr, hosts: std::ops::Range<u8>) -> Vec<DtlsDevice> {
    let showing = move || {
        let silent = hosts.map(|host| {
            let mut device = DtlsDevice::new([127, 0, 3, host], to);
            device.show_address();
            device
        });
        silent.collect()
    };
    tokio::task::spawn_blocking(showing).await.unwrap()
}

/// The same over DTLS, where nobody waits and a device tries again.
#[tokio::test]
async fn silent_peers_over_dtls_make_room() {
    let made = Made::new();
    let stage = made.stage("DTLS", &[NEVER, ("MAX_HANDSHAKES", "20")]).await;
    let to = address(&stage, "dtls.default");
    let silent = dtls_silent(to, 1..61).await;
    let mut device = DtlsDevice::connect([127, 0, 0, 1], to).await;
    let port = device.wire().socket.local_addr().unwrap().port();
    stage.handler.created(port).await;
    let gave_way = refused("dtls.default", "handshake_silent");
    stage.admin.metric_until(&gave_way, |n| n > 0.5).await;
    let failed = refused("dtls.default", "handshake_failed");
    assert!(stage.admin.metric(&failed).await < 0.5);
    drop(silent);
    stage.finish().await;
}

/// The same over DTLS, where what they send is no message at all.
#[tokio::test]
async fn peers_that_send_garbage_over_dtls_make_room() {
    let made = Made::new();
    let stage = made.stage("DTLS", &[NEVER, ("MAX_HANDSHAKES", "5")]).await;
    let to = address(&stage, "dtls.default");
    let mut noisy = dtls_silent(to, 1..6).await;
    let sockets: Vec<_> = noisy
        .iter_mut()
        .map(|device| device.wire().socket.try_clone().unwrap())
        .collect();
    let noise = tokio::spawn(async move {
        loop {
            for socket in &sockets {
                let _ = socket.send(&[0; 64]);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    // It asks again until it has a turn.
    let mut device = DtlsDevice::connect([127, 0, 0, 1], to).await;
    let port = device.wire().socket.local_addr().unwrap().port();
    stage.handler.created(port).await;
    let gave_way = refused("dtls.default", "handshake_silent");
    stage.admin.metric_until(&gave_way, |n| n > 0.5).await;
    noise.abort();
    stage.finish().await;
}

/// Carries datagrams of one device, late both ways. Tells when the answer that comes
/// after the cookie is on its way.
async fn late(front: UdpSocket, to: SocketAddr, begun: oneshot::Sender<u16>) {
    const LATE: Duration = Duration::from_millis(600);
    /// Longer than a HelloVerifyRequest.
    const FLIGHT: usize = 100;
    let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    back.connect(to).await.unwrap();
    let port = back.local_addr().unwrap().port();
    let (front, back) = (Arc::new(front), Arc::new(back));
    // Datagrams keep their order.
    let (up, mut to_gateway) = mpsc::unbounded_channel::<(tokio::time::Instant, Vec<u8>)>();
    let (down, mut to_device) = mpsc::unbounded_channel::<(tokio::time::Instant, _, SocketAddr)>();
    let (sending, answering) = (back.clone(), front.clone());
    let carrying = async move {
        while let Some((due, datagram)) = to_gateway.recv().await {
            tokio::time::sleep_until(due).await;
            let _ = sending.send(&datagram).await;
        }
    };
    let answering = async move {
        while let Some((due, datagram, device)) = to_device.recv().await {
            tokio::time::sleep_until(due).await;
            let datagram: Vec<u8> = datagram;
            let _ = answering.send_to(&datagram, device).await;
        }
    };
    let reading = async move {
        let (mut device, mut begun) = (None, Some(begun));
        let (mut said, mut answered) = (vec![0; 65_536], vec![0; 65_536]);
        loop {
            tokio::select! {
                read = front.recv_from(&mut said) => {
                    let (count, from) = read.unwrap();
                    device = Some(from);
                    let due = tokio::time::Instant::now() + LATE;
                    up.send((due, said[..count].to_vec())).unwrap();
                }
                read = back.recv(&mut answered) => {
                    let datagram = answered[..read.unwrap()].to_vec();
                    if datagram.len() > FLIGHT && let Some(begun) = begun.take() {
                        begun.send(port).unwrap();
                    }
                    let due = tokio::time::Instant::now() + LATE;
                    down.send((due, datagram, device.unwrap())).unwrap();
                }
            }
        }
    };
    tokio::join!(carrying, answering, reading);
}

/// A device far away gets through over DTLS while silent ones keep asking for its turn.
#[tokio::test]
async fn a_slow_handshake_over_dtls_is_not_ended() {
    let made = Made::new();
    let stage = made.stage("DTLS", &[NEVER, ("MAX_HANDSHAKES", "2")]).await;
    let to = address(&stage, "dtls.default");
    let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let near = front.local_addr().unwrap();
    let (begin, begun) = oneshot::channel();
    let line = tokio::spawn(late(front, to, begin));
    let connecting = tokio::spawn(DtlsDevice::connect([127, 0, 0, 1], near));
    let port = within("its turn", begun).await.unwrap();
    let pressure = tokio::spawn(async move {
        let mut silent = Vec::new();
        for host in 1..250 {
            silent.extend(dtls_silent(to, host..host + 1).await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let _device = within("the handshake", connecting).await.unwrap();
    stage.handler.created(port).await;
    let full = refused("dtls.default", "max_handshakes");
    stage.admin.metric_until(&full, |n| n > 0.5).await;
    pressure.abort();
    line.abort();
    stage.finish().await;
}

/// A handshake over DTLS that does not go on is ended after `handshake_timeout`, and
/// nobody is told of it.
#[tokio::test]
async fn handshake_timeout_over_dtls() {
    let made = Made::new();
    let stage = made.stage("DTLS", &[("HANDSHAKE_TIMEOUT", "1s")]).await;
    let silent = dtls_silent(address(&stage, "dtls.default"), 1..4).await;
    let failed = refused("dtls.default", "handshake_failed");
    stage.admin.metric_until(&failed, |n| n > 2.5).await;
    assert!(stage.handler.events().is_empty());
    assert_eq!(stage.gateway.connections(), 0);
    drop(silent);
    stage.finish().await;
}

/// A device that begins anew from the same port is a new connection for `max_conn_rate`
/// too: beyond it the old one stays.
#[tokio::test]
async fn beginning_anew_counts_to_the_rate() {
    let made = Made::new();
    // One at once, and the next after 100 seconds.
    let stage = made.stage("DTLS", &[("MAX_CONN_RATE", "0.01")]).await;
    let to = address(&stage, "dtls.default");
    let mut device = DtlsDevice::connect([127, 0, 0, 1], to).await;
    device.send(b"first");
    let port = device.wire().socket.local_addr().unwrap().port();
    let conn = stage.handler.created(port).await;
    stage.handler.bytes(&conn, 5).await;
    let socket = device.wire().socket.try_clone().unwrap();
    let mut anew = tokio::task::spawn_blocking(move || {
        let mut anew = DtlsDevice::over(socket);
        anew.show_address();
        anew
    })
    .await
    .unwrap();
    let full = refused("dtls.default", "max_conn_rate");
    until("its refusal", || async {
        (stage.admin.metric(&full).await > 0.5).then_some(())
    })
    .await;
    // The session that is there goes on.
    device.send(b"second");
    assert_eq!(stage.handler.bytes(&conn, 11).await, b"firstsecond");
    let created = stage.handler.events();
    let created = created
        .iter()
        .filter(|e| matches!(e.call, Call::Created(_)));
    assert_eq!(created.count(), 1);
    anew.wire();
    stage.finish().await;
}

/// `access_rules` hold over TLS and DTLS: who is denied is turned away before anything is
/// spent on a handshake.
#[tokio::test]
async fn access_rules_hold_over_tls_and_dtls() {
    let made = Made::new();
    let rules = "deny 127.0.0.0/28, allow 127.0.0.0/8, deny all";
    let stage = made.stage("SSL", &[("ACCESS_RULES", rules)]).await;
    let to = address(&stage, "ssl.default");
    let tcp = TcpStream::connect(to).await.unwrap();
    let denied = within("the refusal", made.connector().connect(name(), tcp)).await;
    assert!(denied.is_err());
    let denied = refused("ssl.default", "access_rules");
    stage.admin.metric_until(&denied, |n| n > 0.5).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.16:0".parse().unwrap()).unwrap();
    let tcp = socket.connect(to).await.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let _device = within("the handshake", made.connector().connect(name(), tcp)).await;
    stage.handler.created(port).await;
    assert_eq!(stage.gateway.connections(), 1);
    stage.finish().await;

    let stage = made.stage("DTLS", &[("ACCESS_RULES", rules)]).await;
    let to = address(&stage, "dtls.default");
    let hello = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    hello.send_to(b"whatever", to).await.unwrap();
    let denied = refused("dtls.default", "access_rules");
    stage.admin.metric_until(&denied, |n| n > 0.5).await;
    let mut device = DtlsDevice::connect([127, 0, 0, 16], to).await;
    let port = device.wire().socket.local_addr().unwrap().port();
    stage.handler.created(port).await;
    assert_eq!(stage.gateway.connections(), 1);
    stage.finish().await;
}

/// `max_bytes_rate` and `max_messages_rate` hold over TLS, where reading pauses and
/// nothing is lost, and over DTLS, where what is too much is dropped and counted.
#[tokio::test]
async fn rates_hold_over_tls_and_dtls() {
    let made = Made::new();
    let stage = made.stage("SSL", &[("MAX_BYTES_RATE", "1000")]).await;
    let tcp = TcpStream::connect(address(&stage, "ssl.default")).await;
    let tcp = tcp.unwrap();
    let port = tcp.local_addr().unwrap().port();
    let connecting = made.connector().connect(name(), tcp);
    let mut device = within("the handshake", connecting).await.unwrap();
    let conn = stage.handler.created(port).await;
    device.write_all(&common::pattern(2500)).await.unwrap();
    device.flush().await.unwrap();
    let heard = stage.handler.bytes(&conn, 2500).await;
    common::assert_same(&heard, &common::pattern(2500));
    let paused = "exproto_reads_paused_total{listener=\"ssl.default\"}";
    assert!(stage.admin.metric(paused).await > 0.5);
    stage.finish().await;

    let stage = made.stage("DTLS", &[("MAX_MESSAGES_RATE", "5")]).await;
    let to = address(&stage, "dtls.default");
    let mut device = DtlsDevice::connect([127, 0, 0, 1], to).await;
    for _ in 0..20 {
        device.send(b"x");
    }
    let dropped = "exproto_datagrams_dropped_total{listener=\"dtls.default\",reason=\"rate\"}";
    stage.admin.metric_until(dropped, |n| n > 0.5).await;
    stage.finish().await;
}

/// The limits on connections hold over TLS and DTLS as over TCP and UDP: who is one too
/// many is turned away before any callback, and counted.
#[tokio::test]
async fn limits_hold_over_tls_and_dtls() {
    let made = Made::new();
    for (key, most, reason) in [
        ("MAX_CONNECTIONS", "1", "max_connections"),
        (
            "MAX_CONNECTIONS_PER_ADDRESS",
            "1",
            "max_connections_per_address",
        ),
        // One at once, and the next after 100 seconds.
        ("MAX_CONN_RATE", "0.01", "max_conn_rate"),
    ] {
        let stage = made.stage("SSL", &[(key, most)]).await;
        let to = address(&stage, "ssl.default");
        let tcp = TcpStream::connect(to).await.unwrap();
        let port = tcp.local_addr().unwrap().port();
        let connecting = made.connector().connect(name(), tcp);
        let _first = within("the handshake", connecting).await.unwrap();
        stage.handler.created(port).await;
        let tcp = TcpStream::connect(to).await.unwrap();
        let second = within("the refusal", made.connector().connect(name(), tcp)).await;
        assert!(second.is_err(), "{key}");
        let refused_there = refused("ssl.default", reason);
        stage.admin.metric_until(&refused_there, |n| n > 0.5).await;
        assert_eq!(stage.gateway.connections(), 1);
        stage.finish().await;

        let stage = made.stage("DTLS", &[(key, most)]).await;
        let to = address(&stage, "dtls.default");
        let mut first = DtlsDevice::connect([127, 0, 0, 1], to).await;
        let port = first.wire().socket.local_addr().unwrap().port();
        stage.handler.created(port).await;
        let showing = move || DtlsDevice::new([127, 0, 0, 1], to).show_address();
        tokio::task::spawn_blocking(showing).await.unwrap();
        let refused_there = refused("dtls.default", reason);
        stage.admin.metric_until(&refused_there, |n| n > 0.5).await;
        assert_eq!(stage.gateway.connections(), 1);
        stage.finish().await;
    }
}
