//! Connections that say nothing, or next to nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::interval;

use crate::scene::{Echo, Scene, patiently};

/// As many as the limit of open files lets this process have.
fn ten_thousand() -> usize {
    let limit = rlimit::getrlimit(rlimit::Resource::NOFILE).unwrap().1;
    let most = usize::try_from(limit).unwrap().saturating_sub(500);
    most.min(10_000)
}

/// From one of a hundred addresses.
async fn dial(number: usize, to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    let from = SocketAddr::from(([127, 0, 1, (number % 100) as u8 + 1], 0));
    socket.bind(from).unwrap();
    socket.connect(to).await.unwrap()
}

/// Opens so many, some at a time.
async fn dial_many(count: usize, to: SocketAddr) -> Vec<TcpStream> {
    let turns = Arc::new(Semaphore::new(100));
    let mut dialling = JoinSet::new();
    for number in 0..count {
        let turns = turns.clone();
        dialling.spawn(async move {
            let _turn = turns.acquire().await.unwrap();
            dial(number, to).await
        });
    }
    dialling.join_all().await
}

/// 10,000 connections, at first silent, then every other with a byte a second: a
/// device is served all the time, and each takes little memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_that_say_next_to_nothing() {
    const SECONDS: usize = 4;
    let scene = Scene::with(&[("IDLE_TIMEOUT", "10m")]).await;
    let count = ten_thousand();
    let echo = Echo::over_tcp(&scene).await;
    scene.opens("tcp.default", 1).await;
    let (before, begun) = (scene.rss(), Instant::now());
    let to = scene.listener("tcp.default").await;
    let streams = dial_many(count, to).await;
    let created = &scene.told.created;
    patiently("the last to be told of", || async {
        (created.load(Ordering::SeqCst) > count).then_some(())
    })
    .await;
    let opened = begun.elapsed();
    let silent = scene.rss();
    scene.opens("tcp.default", count + 1).await;
    let cpu = scene.cpu();
    let told = scene.told.bytes.load(Ordering::SeqCst);
    let begun = Instant::now();
    // In a hundred steps a second.
    let talkative: Vec<_> = streams.iter().step_by(2).collect();
    let mut ticks = interval(Duration::from_millis(10));
    for step in 0..100 * SECONDS {
        ticks.tick().await;
        for stream in talkative.iter().skip(step % 100).step_by(100) {
            assert_eq!(stream.try_write(b"x").unwrap(), 1);
        }
    }
    let sent = talkative.len() * SECONDS;
    let bytes = &scene.told.bytes;
    patiently("every byte", || async {
        (bytes.load(Ordering::SeqCst) >= told + sent).then_some(())
    })
    .await;
    let talked = begun.elapsed();
    let cpu = scene.cpu() - cpu;
    let after = scene.rss();
    scene.opens("tcp.default", count + 1).await;
    let echoed = echo.end().await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    println!(
        "{count} silent connections within {opened:.1?}: {:.2} KiB each; {sent} single bytes \
         within {talked:.1?}, {:.0?} of processor time each byte: {each:.2} KiB each; \
         meanwhile {echoed:?}",
        silent.saturating_sub(before) as f64 / count as f64,
        cpu / sent as u32,
    );
    assert!(each < 16.0, "{each} KiB a connection");
    drop(streams);
    scene.opens("tcp.default", 0).await;
    scene.finish().await;
}

/// `idle_timeout` ends all that are silent and not the one that is not, and their
/// descriptors are free again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_are_ended_for_their_silence() {
    let scene = Scene::with(&[("IDLE_TIMEOUT", "2s")]).await;
    let count = ten_thousand();
    let echo = Echo::over_tcp(&scene).await;
    scene.opens("tcp.default", 1).await;
    let descriptors = scene.descriptors();
    let begun = Instant::now();
    let to = scene.listener("tcp.default").await;
    let streams = dial_many(count, to).await;
    let closed = "exproto_connections_closed_total";
    scene
        .reaches(closed, "tcp.default", "idle_timeout", count)
        .await;
    let ended = begun.elapsed();
    // The handler is told of every one, however long the line of those is.
    let told = || async { (scene.told.closed.load(Ordering::SeqCst) >= count).then_some(()) };
    patiently("the last to be told of", told).await;
    let lost = "exproto_closed_callbacks_lost_total{handler=\"default\"}";
    assert!(scene.admin.metric(lost).await < 0.5);
    // Their sockets stay until the devices hang up too, or for two seconds.
    let freed = || async { (scene.descriptors() <= descriptors + 5).then_some(()) };
    patiently("their descriptors", freed).await;
    drop(streams);
    let echoed = echo.end().await;
    println!("{count} came and were closed for their silence within {ended:.1?}; {echoed:?}");
    scene.finish().await;
}

/// Over TLS: sessions that say nothing take little too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_sessions() {
    const COUNT: usize = 1000;
    let scene = Scene::with(&[("IDLE_TIMEOUT", "10m")]).await;
    let echo = Echo::over(scene.tls_device().await);
    scene.opens("ssl.default", 1).await;
    let to = scene.listener("ssl.default").await;
    // What is there once and for all, such as a thread's allocator.
    let mut sessions = Vec::new();
    for number in 0..50 {
        sessions.push(scene.secure(dial(number, to).await).await.unwrap());
    }
    scene.opens("ssl.default", sessions.len() + 1).await;
    let (before, begun) = (scene.rss(), Instant::now());
    for number in 0..COUNT {
        sessions.push(scene.secure(dial(number, to).await).await.unwrap());
    }
    scene.opens("ssl.default", sessions.len() + 1).await;
    let took = begun.elapsed();
    let each = scene.rss().saturating_sub(before) as f64 / COUNT as f64;
    let echoed = echo.end().await;
    println!("{COUNT} silent TLS sessions within {took:.1?}: {each:.2} KiB each; {echoed:?}");
    assert!(each < 64.0, "{each} KiB a session");
    drop(sessions);
    scene.finish().await;
}
