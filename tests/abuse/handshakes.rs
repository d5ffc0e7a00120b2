//! Handshakes that never finish.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::dtls_device::DtlsDevice;
use crate::scene::{Echo, Scene};

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

/// The same with far fewer turns than they ask for: connections that are there are
/// served as ever, and who comes later has a turn when the time of those is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_handshakes_that_take_all_turns() {
    const COUNT: usize = 500;
    let scene = Scene::with(&[
        (
            "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__HANDSHAKE_TIMEOUT",
            "4s",
        ),
        ("LISTENERS__SSL__DEFAULT__SSL_OPTIONS__MAX_HANDSHAKES", "50"),
    ])
    .await;
    let echo = Echo::over(scene.tls_device().await);
    scene.opens("ssl.default", 1).await;
    let (still, drops) = unfinished(&scene, COUNT).await;
    let to = scene.listener("ssl.default").await;
    let begun = Instant::now();
    // One whose turn does not come in time tries again.
    let mut attempts = 0;
    let device = loop {
        attempts += 1;
        let tcp = TcpStream::connect(to).await.unwrap();
        let Ok(mut device) = scene.secure(tcp).await else {
            continue;
        };
        // The gateway may have given up while the device was done.
        let (mut heard, said) = ([0; 6], b"echo 0");
        let _ = device.write_all(said).await;
        if device.read_exact(&mut heard).await.is_ok() && heard == *said {
            break device;
        }
    };
    let served = begun.elapsed();
    let device = Echo::over(device);
    scene
        .reaches(REFUSED, "ssl.default", "handshake_failed", COUNT)
        .await;
    println!(
        "{COUNT} TLS handshakes that never end and 50 turns: a device was let in after \
         {served:.1?}, attempt {attempts}; {:?}; {:?}",
        echo.end().await,
        device.end().await,
    );
    drops.abort();
    drop(still);
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
        let count = usize::from(COUNT);
        let most = turns.parse::<usize>().unwrap();
        if most < count {
            let full = count - most;
            scene
                .reaches(REFUSED, "dtls.default", "max_handshakes", full)
                .await;
        }
        let failed = count.min(most);
        scene
            .reaches(REFUSED, "dtls.default", "handshake_failed", failed)
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
