//! What is no handshake, or only a part of one.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::DtlsDevice;
use crate::common::within;
use crate::crowd::Crowd;
use crate::scene::{Scene, patiently};

const REFUSED: &str = "exproto_connections_refused_total";
const RECEIVED: &str = "exproto_datagrams_received_total";

/// The same numbers in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    /// One to four bytes are others, some are missing or too many.
    fn mutate(&mut self, datagram: &[u8]) -> Vec<u8> {
        let mut datagram = datagram.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(datagram.len());
            datagram[at] = self.below(256) as u8;
        }
        match self.below(4) {
            0 => datagram.truncate(1 + self.below(datagram.len())),
            1 => datagram.extend(vec![7; self.below(300)]),
            _ => {}
        }
        datagram
    }
}

/// The datagrams of a device that does a handshake and says something.
async fn handshake(to: SocketAddr) -> (DtlsDevice, Vec<Vec<u8>>) {
    let device = DtlsDevice::connect([127, 0, 0, 1], to).await;
    let mut device = device.echo("echo").await;
    let sent = device.wire().sent.clone();
    (device, sent)
}

/// Every prefix of every datagram of a handshake, and thousands of mutations, each from
/// an address of its own: no connection, nobody is told, no memory. The one whose
/// handshake it was is served as ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_dtls_from_anywhere() {
    const MUTATIONS: usize = 5000;
    let scene = Scene::with(&[("IDLE_TIMEOUT", "10m")]).await;
    let to = scene.listener("dtls.default").await;
    let (device, sent) = handshake(to).await;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let prefixes = sent.iter().flat_map(|datagram| {
        let lengths = 0..=datagram.len();
        lengths.map(|length| datagram[..length].to_vec())
    });
    let mut garbage: Vec<Vec<u8>> = prefixes.collect();
    for number in 0..MUTATIONS {
        garbage.push(dice.mutate(&sent[number % sent.len()]));
    }
    for number in 0..1000 {
        garbage.push((0..number % 1400).map(|_| dice.below(256) as u8).collect());
    }
    let (crowd, before) = (Crowd::new(), scene.rss());
    let heard = scene.metric(RECEIVED, "dtls.default", "").await;
    let mut went = 0;
    for (number, datagram) in garbage.iter().enumerate() {
        went += usize::from(crowd.send(number as u32, to, datagram));
        // Nothing is to be lost for want of room.
        if number % 100 == 99 {
            let received = heard as usize + went;
            scene.reaches(RECEIVED, "dtls.default", "", received).await;
        }
    }
    let received = heard as usize + went;
    scene.reaches(RECEIVED, "dtls.default", "", received).await;
    let grown = scene.rss().saturating_sub(before);
    let device = device.echo("echo as ever").await;
    scene.opens("dtls.default", 1).await;
    assert_eq!(scene.told.created.load(Ordering::SeqCst), 1);
    println!("{went} pieces of DTLS from as many addresses: {grown} KiB more");
    assert!(grown < 16 * 1024, "{grown} KiB more");
    drop(device);
    scene.finish().await;
}

/// Peers that do show their address, and go on with what is broken: prefixes and
/// mutations of what they should say, at each step of the handshake.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_dtls_in_the_midst_of_a_handshake() {
    const PEERS: usize = 300;
    let timeout = "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__HANDSHAKE_TIMEOUT";
    let scene = Scene::with(&[(timeout, "2s"), ("IDLE_TIMEOUT", "10m")]).await;
    let to = scene.listener("dtls.default").await;
    let (known, sent) = handshake(to).await;
    // Behind the two hellos.
    let rest = &sent[2..];
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    let before = scene.rss();
    let mut peers = Vec::new();
    for number in 0..PEERS {
        let from = [127, 0, 3, (number % 250) as u8 + 1];
        let mut device = DtlsDevice::new(from, to);
        device.show_address();
        let hello = device.wire().sent.last().unwrap().clone();
        let socket = &device.wire().socket;
        for _ in 0..10 {
            let datagram = &rest[dice.below(rest.len())];
            let broken = match dice.below(3) {
                0 => datagram[..dice.below(datagram.len())].to_vec(),
                1 => dice.mutate(datagram),
                _ => dice.mutate(&hello),
            };
            socket.send(&broken).unwrap();
        }
        peers.push(device);
    }
    // By a deadline or at once: all of them are gone.
    let refused = || async {
        let count = scene.metric(REFUSED, "dtls.default", "handshake_failed");
        let all = count.await > PEERS as f64 - 0.5;
        all.then_some(())
    };
    patiently("all to be refused", refused).await;
    scene.opens("dtls.default", 1).await;
    let known = known.echo("echo as ever").await;
    assert_eq!(scene.told.created.load(Ordering::SeqCst), 1);
    let grown = scene.rss().saturating_sub(before);
    println!("{PEERS} broken DTLS handshakes: {grown} KiB more");
    assert!(grown < 64 * 1024, "{grown} KiB more");
    drop((known, peers));
    scene.finish().await;
}

/// What a peer sends before it hangs up; whether the gateway hung up too.
async fn say(to: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(to).await.unwrap();
    // It may have hung up already.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = within("the end", stream.read_to_end(&mut answer)).await;
}

/// Prefixes and mutations of a ClientHello, and every prefix of PROXY headers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_and_behind_a_balancer() {
    let scene = Scene::with(&[("LISTENERS__TCP__DEFAULT__PROXY_PROTOCOL", "true")]).await;
    let to = scene.listener("ssl.default").await;
    let (hello, before) = (scene.tls_hello().await, scene.rss());
    let mut dice = Dice(0x853c_49e6_748f_ea9b);
    // A prefix of a record that is not even begun is a peer that left.
    let mut count = 0;
    for length in (0..hello.len()).step_by(3) {
        say(to, &hello[..length]).await;
        count += 1;
    }
    for _ in 0..200 {
        say(to, &dice.mutate(&hello)).await;
        count += 1;
    }
    scene
        .reaches(REFUSED, "ssl.default", "handshake_failed", count)
        .await;
    let to = scene.listener("tcp.default").await;
    let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 7993\r\n";
    let v2 =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x09\xc0\x00\x02\x0a\x13\x88\x1f\x39";
    let mut headers = 0;
    for header in [&v1[..], v2] {
        for length in 0..header.len() {
            say(to, &header[..length]).await;
            headers += 1;
        }
    }
    scene
        .reaches(REFUSED, "tcp.default", "proxy_protocol", headers)
        .await;
    assert_eq!(scene.told.created.load(Ordering::SeqCst), 0);
    // Nobody fills the log with it either.
    let log = scene.program.log();
    let warned = log.iter().find(|line| line.contains("WARN"));
    assert_eq!(warned, None);
    let grown = scene.rss().saturating_sub(before);
    println!("{count} broken TLS handshakes, {headers} cut PROXY headers: {grown} KiB more");
    assert!(grown < 16 * 1024, "{grown} KiB more");
    scene.finish().await;
}
