//! Floods of datagrams from addresses that are not the sender's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::interval;

use crate::common::Call;
use crate::common::DtlsDevice;
use crate::crowd::{Flood, Flooded, PEERS};
use crate::scene::{Scene, patiently};

/// Peers that were there before the flood.
const KNOWN: usize = 20;

/// Datagrams a second of each. Together they are 400 callbacks a second, which a debug
/// build and a handler in this process can do on two busy cores; what is more than they
/// can do is lost without any flood.
const RATE: usize = 20;

/// How long they send.
const SECONDS: usize = 5;

/// Datagrams of the flood a second: fifty times what they send together, and a pace at
/// which the sender leaves the program enough of two busy cores.
const PACE: u32 = 20_000;

/// What came from known peers: `known N ...` from number N, and `last N` at the end.
struct Heard {
    counts: Vec<AtomicUsize>,
    last: watch::Sender<usize>,
}

impl Heard {
    fn listen(scene: &Scene) -> Arc<Self> {
        let heard = Arc::new(Self {
            counts: (0..KNOWN).map(|_| AtomicUsize::new(0)).collect(),
            last: watch::Sender::new(0),
        });
        let hearing = heard.clone();
        let lasts = Arc::new(std::sync::Mutex::new(HashMap::new()));
        scene.handler.behave(move |event| {
            if let Call::Bytes(bytes) = &event.call {
                let text = String::from_utf8_lossy(bytes);
                let words: Vec<&str> = text.split(' ').collect();
                let number = words.get(1).and_then(|word| word.parse::<usize>().ok());
                match (words[0], number) {
                    ("known", Some(number)) => {
                        hearing.counts[number].fetch_add(1, Ordering::SeqCst);
                    }
                    ("last", Some(number)) => {
                        let mut lasts = lasts.lock().unwrap();
                        lasts.insert(number, ());
                        hearing.last.send_replace(lasts.len());
                    }
                    _ => {}
                }
            }
            async { Ok(()) }
        });
        heard
    }

    /// Has every peer send a last datagram, until it came: what it sent before has come
    /// then, or never will.
    async fn settle(&self, mut send: impl FnMut()) {
        patiently("the last of every peer", || {
            let settled = *self.last.borrow() == KNOWN;
            if !settled {
                send();
            }
            async move {
                if settled {
                    return Some(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                None
            }
        })
        .await;
    }

    fn verdict(&self, what: &str, sent: usize, flooded: Flooded, cpu: Duration) {
        let counts = self.counts.iter().map(|count| count.load(Ordering::SeqCst));
        let counts: Vec<usize> = counts.collect();
        let kept = counts.iter().sum::<usize>() as f64 / (sent * KNOWN) as f64 * 100.0;
        let worst = *counts.iter().min().unwrap() as f64 / sent as f64 * 100.0;
        println!(
            "{what}: {flooded:?} from {PEERS} peers; {KNOWN} known peers kept {kept:.2} % of \
             {} datagrams, the worst of them {worst:.2} %; {cpu:.1?} of processor time",
            sent * KNOWN,
        );
        assert!(worst >= 95.0, "{kept} %, the worst {worst} %");
    }
}

/// Sends in turn, one datagram of one peer in each slot, at `RATE` for each; how many
/// each sent.
async fn talk(mut send: impl FnMut(usize, usize)) -> usize {
    let mut ticks = interval(Duration::from_secs(1) / (KNOWN * RATE) as u32);
    let rounds = RATE * SECONDS;
    for round in 0..rounds {
        for number in 0..KNOWN {
            ticks.tick().await;
            send(number, round);
        }
    }
    rounds
}

/// Datagrams from 50,000 addresses and ports: no more than `max_connections` of them
/// become connections, and the peers that were there are served as ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_datagrams() {
    let scene = Scene::with(&[
        ("LISTENERS__UDP__DEFAULT__MAX_CONNECTIONS", "1000"),
        ("IDLE_TIMEOUT", "10m"),
    ])
    .await;
    let heard = Heard::listen(&scene);
    let to = scene.listener("udp.default").await;
    let mut devices = Vec::new();
    for _ in 0..KNOWN {
        let device = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        device.connect(to).await.unwrap();
        device.send(b"hello").await.unwrap();
        devices.push(device);
    }
    scene.opens("udp.default", KNOWN).await;
    let (before, cpu) = (scene.rss(), scene.cpu());
    let flood = Flood::start(to, PACE, b"spoofed".to_vec());
    let sent = talk(|number, round| {
        let datagram = format!("known {number} {round}");
        devices[number].try_send(datagram.as_bytes()).unwrap();
    })
    .await;
    let flooded = flood.end().await;
    let cpu = scene.cpu() - cpu;
    heard
        .settle(|| {
            for (number, device) in devices.iter().enumerate() {
                let last = format!("last {number}");
                device.try_send(last.as_bytes()).unwrap();
            }
        })
        .await;
    scene.opens("udp.default", 1000).await;
    let received = "exproto_datagrams_received_total";
    let received = scene.metric(received, "udp.default", "").await;
    let refused = "exproto_connections_refused_total";
    let refused = scene.metric(refused, "udp.default", "max_connections");
    let refused = refused.await;
    let grown = scene.rss().saturating_sub(before);
    let full = "exproto_datagrams_dropped_total";
    let full = scene.metric(full, "udp.default", "queue_full").await;
    println!(
        "received {received}, {full} found their peer's queue full, refused {refused}; {grown} KiB more for 980 connections"
    );
    assert!(refused > 10_000.0, "{refused} refused");
    assert!(grown < 32 * 1024, "{grown} KiB more");
    heard.verdict("a flood of datagrams", sent, flooded, cpu);
    scene.finish().await;
}

/// ClientHellos from 50,000 addresses and ports: nothing is kept of them, and devices
/// with a session are served as ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_hellos() {
    let keys = [
        ("LISTENERS__DTLS__DEFAULT__MAX_CONNECTIONS", "1000"),
        ("IDLE_TIMEOUT", "10m"),
    ];
    let scene = Scene::with(&keys).await;
    let heard = Heard::listen(&scene);
    let to = scene.listener("dtls.default").await;
    let mut devices = Vec::new();
    for _ in 0..KNOWN {
        devices.push(DtlsDevice::connect([127, 0, 0, 1], to).await);
    }
    scene.opens("dtls.default", KNOWN).await;
    let hello = devices[0].wire().sent[0].clone();
    let (before, cpu) = (scene.rss(), scene.cpu());
    let flood = Flood::start(to, PACE, hello);
    let sent = talk(|number, round| {
        devices[number].send(format!("known {number} {round}").as_bytes());
    })
    .await;
    // Strangers are let in meanwhile.
    let begun = Instant::now();
    let late = DtlsDevice::connect([127, 0, 0, 1], to).await;
    let served = begun.elapsed();
    let flooded = flood.end().await;
    let cpu = scene.cpu() - cpu;
    heard
        .settle(|| {
            for (number, device) in devices.iter_mut().enumerate() {
                device.send(format!("last {number}").as_bytes());
            }
        })
        .await;
    scene.opens("dtls.default", KNOWN + 1).await;
    let received = "exproto_datagrams_received_total";
    let received = scene.metric(received, "dtls.default", "").await;
    let grown = scene.rss().saturating_sub(before);
    println!("received {received}; a new device was let in after {served:.0?}; {grown} KiB more");
    assert!(received > 10_000.0, "{received} received");
    assert!(grown < 16 * 1024, "{grown} KiB more");
    heard.verdict("a flood of ClientHellos", sent, flooded, cpu);
    drop(late);
    scene.finish().await;
}
