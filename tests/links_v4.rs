//! The links that MQTT 3.1.1 has beside the pool's own: the one that wipes a session, and
//! the one that fetches retained messages.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Broker, Proxy, Stage};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

type Diary = Arc<Mutex<Vec<String>>>;

/// Welcomes a client and takes its time to close what the client has ended. It has
/// still a session for the first that wants to keep one.
async fn slow_to_close(mut stream: TcpStream, diary: Diary) {
    let mut buffer = vec![0; 1024];
    let read = stream.read(&mut buffer).await.unwrap();
    let clean = buffer[9] & 2 != 0;
    let client = String::from_utf8_lossy(&buffer[14..read]).into_owned();
    let line = |what: &str| {
        let mut lines = diary.lock().unwrap();
        lines.push(format!("{what} {client}"));
        lines
            .iter()
            .filter(|l| **l == lines[lines.len() - 1])
            .count()
    };
    let times = line(if clean { "clean" } else { "kept" });
    let present = u8::from(!clean && times == 1);
    let connack = [0x20, 0x02, present, 0x00];
    stream.write_all(&connack).await.unwrap();
    while let Ok(1..) = stream.read(&mut buffer).await {}
    if !clean {
        return;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    line("closed");
}

/// The session that is to be kept begins when the broker is done with the clean one: it
/// could be taken for the same. Where it was, it is ended once more (Moquette 0.17).
#[tokio::test]
async fn a_wiped_session_is_gone_before_the_next_begins() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("mqtt://{}", listener.local_addr().unwrap());
    let diary = Diary::default();
    let lines = diary.clone();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(slow_to_close(stream, lines.clone()));
        }
    });
    let keys = [("BROKER__URL", url.as_str()), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::around(Broker::absent(""), &keys).await;
    let client = format!("exproto-{}-0", stage.plan.config().node_name);
    let lines = diary.lock().unwrap().clone();
    let lines: Vec<_> = lines.iter().filter(|l| l.ends_with(&client)).collect();
    let expected = ["clean", "closed", "kept", "clean", "closed", "kept"];
    let expected = expected.map(|what| format!("{what} {client}"));
    assert_eq!(lines, expected.iter().collect::<Vec<_>>());
    stage.finish().await;
    server.abort();
}

/// Writing is no sign of life of the other side, on the link for retained messages
/// neither: a broker that has said nothing for `keep_alive` is asked.
#[tokio::test]
async fn a_silent_link_for_retained_messages_is_noticed() {
    let broker = Broker::start().await;
    let proxy = Proxy::to(broker.port).await;
    let url = proxy.url();
    let keys = [
        ("BROKER__URL", url.as_str()),
        ("BROKER__POOL_SIZE", "1"),
        ("BROKER__KEEP_ALIVE", "5s"),
    ];
    let stage = Stage::around(broker, &keys).await;
    let device = stage.subscriber("c", "a/#", 1).await;
    // Its fetch is over, so that the next one need not wait for it.
    let node = &stage.plan.config().node_name;
    let over = format!("Sending UNSUBACK to exproto-{node}-retained");
    stage.broker.logged(&over).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let silent = Instant::now();
    proxy.blackhole();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Covered: the pool's link need not be asked, the other one fetches.
    stage.subscribe(&device, "a/b", 1).await.ok();
    let told = format!("- broker link 1: no broker: {url}: the broker answered no ping");
    stage.admin.ready_until(503, &told).await;
    // 4 s and 5 s more; counted from what was written last it would be 12 s.
    let elapsed = silent.elapsed();
    assert!(elapsed < Duration::from_millis(11_500), "{elapsed:?}");
    proxy.mend();
    stage.admin.ready_until(200, "+ broker link 1").await;
    stage.finish().await;
}
