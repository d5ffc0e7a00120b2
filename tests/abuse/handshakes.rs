//! Handshakes that never finish.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::common::DtlsDevice;
use crate::scene::{Echo, Scene, patiently};

const REFUSED: &str = "exproto_connections_refused_total";

/// Connections whose handshakes never end, of four kinds in turn: silent, with half a
/// ClientHello, with one that comes byte by byte, and with a whole one and nothing more.
async fn unfinished(scene: &Scene, count: usize) -> (Vec<TcpStream>, JoinHandle<()>) {
    let (to, hello) = (scene.listener("ssl.default").await, scene.tls_hello().await);
    let (mut still, mut trickling) = (Vec::new(), Vec::new());
    for number in 0..count {
        let mut stream = TcpStream::connect(to).await.unwrap();
        match number % 4 {
            0 => {}
            1 => stream.write_all(&hello[..hello.len() / 2]).await.unwrap(),
            2 => {
                trickling.push(stream);
                continue;
            }
            _ => stream.write_all(&hello).await.unwrap(),
        }
        still.push(stream);
    }
    let drops = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        for byte in hello.chunks(1) {
            ticks.tick().await;
            for stream in &trickling {
                // It may have been closed already.
                let _ = stream.try_write(byte);
            }
        }
        std::future::pending().await
    });
    (still, drops)
}

/// 500 TLS handshakes that never end, with turns for all of them: others are served at
/// once. They take little memory, and `handshake_timeout` ends every one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_handshakes_that_never_end() {
    const COUNT: usize = 500;
    let scene = Scene::with(&[(
        "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__HANDSHAKE_TIMEOUT",
        "4s",
    )])
    .await;
    let echo = Echo::over(scene.tls_device().await);
    scene.opens("ssl.default", 1).await;
    let before = scene.rss();
    let (still, drops) = unfinished(&scene, COUNT).await;
    let begun = Instant::now();
    let device = Echo::over(scene.tls_device().await);
    let served = begun.elapsed();
    let each = scene.rss().saturating_sub(before) as f64 / COUNT as f64;
    scene
        .reaches(REFUSED, "ssl.default", "handshake_failed", COUNT)
        .await;
    let ended = begun.elapsed();
    println!(
        "{COUNT} TLS handshakes that never end: {each:.1} KiB each, all ended after \
         {ended:.1?}; a device was let in after {served:.0?}; {:?}; {:?}",
        echo.end().await,
        device.end().await,
    );
    assert!(each < 64.0, "{each} KiB each");
    drops.abort();
    drop(still);
    scene.finish().await;
}

/// The same with far fewer turns than they ask for, and a time that none of them lives
/// to see: connections that are there are served as ever, and whoever comes later has a
/// turn as soon as some of those have been silent for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_handshakes_that_take_all_turns() {
    const COUNT: usize = 500;
    let scene = Scene::with(&[
        (
            "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__HANDSHAKE_TIMEOUT",
            "10m",
        ),
        ("LISTENERS__SSL__DEFAULT__SSL_OPTIONS__MAX_HANDSHAKES", "50"),
    ])
    .await;
    let echo = Echo::over(scene.tls_device().await);
    scene.opens("ssl.default", 1).await;
    let (still, drops) = unfinished(&scene, COUNT).await;
    let begun = Instant::now();
    let device = Echo::over(scene.tls_device().await);
    let served = begun.elapsed();
    scene
        .reaches(REFUSED, "ssl.default", "handshake_silent", 1)
        .await;
    println!(
        "{COUNT} TLS handshakes that never end and 50 turns: a device was let in after \
         {served:.1?}; {:?}; {:?}",
        echo.end().await,
        device.end().await,
    );
    drops.abort();
    drop(still);
    scene.finish().await;
}

/// Whole ClientHellos over TLS, each of which costs a signature, as fast as they can be
/// sent and from nobody who goes on: connections that are there are served between any
/// two of them, and devices that come later are let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_whole_tls_hellos() {
    /// Connections of the flood that are open at a time.
    const OPEN: usize = 500;
    const DEVICES: usize = 10;
    let scene = Scene::with(&[]).await;
    let (tls, tcp) = (
        Echo::over(scene.tls_device().await),
        Echo::over_tcp(&scene).await,
    );
    scene.opens("ssl.default", 1).await;
    let (to, hello) = (scene.listener("ssl.default").await, scene.tls_hello().await);
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let flood = tokio::spawn(async move {
        let mut open = VecDeque::new();
        loop {
            let mut stream = TcpStream::connect(to).await.unwrap();
            stream.write_all(&hello).await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            open.push_back(stream);
            if open.len() > OPEN {
                open.pop_front();
            }
        }
    });
    let (begun, cpu) = (Instant::now(), scene.cpu());
    patiently("the flood", || async {
        (sent.load(Ordering::SeqCst) > 2 * OPEN).then_some(())
    })
    .await;
    let (tries, mut worst) = (AtomicUsize::new(0), Duration::ZERO);
    for _ in 0..DEVICES {
        let begun = Instant::now();
        let device = patiently("a device to be let in", || async {
            tries.fetch_add(1, Ordering::SeqCst);
            let tcp = TcpStream::connect(to).await.unwrap();
            // One that is turned away tries again.
            scene.secure(tcp).await.ok()
        });
        let mut device = device.await;
        device.write_all(b"echo").await.unwrap();
        device.read_exact(&mut [0; 4]).await.unwrap();
        worst = worst.max(begun.elapsed());
    }
    let (lasted, cpu) = (begun.elapsed(), scene.cpu() - cpu);
    flood.abort();
    println!(
        "{} whole ClientHellos in {lasted:.1?}, {cpu:.1?} of processor time: {DEVICES} devices \
         were let in at {tries:?} tries, the slowest after {worst:.0?}; {:?}; {:?}",
        sent.load(Ordering::SeqCst),
        tls.end().await,
        tcp.end().await,
    );
    scene.finish().await;
}

/// 200 DTLS devices that show their address and say nothing more; with turns for all
/// of them and with turns for a few.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dtls_handshakes_that_never_end() {
    const COUNT: u8 = 200;
    for turns in ["1000", "20"] {
        let scene = Scene::with(&[
            (
                "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__HANDSHAKE_TIMEOUT",
                "4s",
            ),
            (
                "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__MAX_HANDSHAKES",
                turns,
            ),
        ])
        .await;
        let to = scene.listener("dtls.default").await;
        let mut known = DtlsDevice::connect([127, 0, 0, 1], to).await;
        scene.opens("dtls.default", 1).await;
        let before = scene.rss();
        let mut silent = Vec::new();
        for number in 0..COUNT {
            let mut device = DtlsDevice::new([127, 0, 2, number + 1], to);
            device.show_address();
            silent.push(device);
        }
        known = known.echo("echo while they hang").await;
        let each = scene.rss().saturating_sub(before) as f64 / f64::from(COUNT);
        let begun = Instant::now();
        let late = DtlsDevice::connect([127, 0, 0, 1], to).await;
        let served = begun.elapsed();
        let late = late.echo("echo").await;
        // Each found no turn, gave way, or was ended by its time.
        patiently("the end of them all", || async {
            let mut ended = 0.0;
            for reason in ["max_handshakes", "handshake_silent", "handshake_failed"] {
                ended += scene.metric(REFUSED, "dtls.default", reason).await;
            }
            (ended > f64::from(COUNT) - 0.5).then_some(())
        })
        .await;
        known = known.echo("echo after them").await;
        scene.opens("dtls.default", 2).await;
        println!(
            "{COUNT} DTLS handshakes that never end, {turns} turns: {each:.1} KiB each; a \
             device was let in after {served:.1?}"
        );
        assert!(each < 128.0, "{each} KiB each");
        drop((known, late, silent));
        scene.finish().await;
    }
}
