//! Devices that never read. Over TCP there is `tests/lifecycle.rs` besides.

use exproto_sidecar::proto::ResultCode;
use tokio::net::{TcpSocket, UdpSocket};

use crate::common::DtlsDevice;
use crate::common::pattern;
use crate::scene::{Echo, Scene};

/// Over TLS: what waits for each is bounded, `send_timeout` ends it, and others are
/// served all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls() {
    const DEVICES: usize = 20;
    const WATERMARK: usize = 64;
    let options = "LISTENERS__SSL__DEFAULT__TCP_OPTIONS__";
    let scene = Scene::with(&[
        (&format!("{options}SEND_TIMEOUT"), "3s"),
        (&format!("{options}SNDBUF"), "16KiB"),
        (&format!("{options}HIGH_WATERMARK"), "64KiB"),
        ("IDLE_TIMEOUT", "10m"),
    ])
    .await;
    let echo = Echo::over(scene.tls_device().await);
    let to = scene.listener("ssl.default").await;
    let mut devices = Vec::new();
    for _ in 0..DEVICES {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let device = scene.secure(socket.connect(to).await.unwrap()).await;
        let device = device.unwrap();
        let port = device.get_ref().0.local_addr().unwrap().port();
        devices.push((device, scene.handler.created(port).await));
    }
    let before = scene.rss();
    // Until it is refused: by then as much waits as may.
    let sending = devices.iter().map(|(_, conn)| {
        let (adapter, conn) = (scene.adapter.clone(), conn.clone());
        tokio::spawn(async move {
            let mut sent = 0;
            loop {
                let answer = adapter.send(&conn, pattern(16 * 1024)).await;
                if answer.code != ResultCode::Success {
                    return sent;
                }
                sent += 16;
            }
        })
    });
    let mut taken = 0;
    let mut sending: Vec<_> = sending.collect();
    for sender in &mut sending {
        taken += sender.await.unwrap();
    }
    let most = scene.rss().saturating_sub(before);
    for (_, conn) in &devices {
        assert_eq!(scene.handler.closed(conn).await, "send_timeout");
    }
    let echoed = echo.end().await;
    println!(
        "{DEVICES} TLS devices that never read: {taken} KiB taken, {most} KiB more; {echoed:?}"
    );
    // Five times the watermark, and as much again for what is encrypted and the
    // allocator.
    let bound = DEVICES * WATERMARK * 5 * 2;
    assert!(most < bound, "{most} KiB more");
    assert!(taken < DEVICES * 1024, "{taken} KiB taken");
    drop(devices);
    scene.finish().await;
}

/// Over UDP and DTLS nothing waits for a device, which may be gone or not read: the
/// kernel drops what it does not take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_udp_and_dtls() {
    const MESSAGES: usize = 1500;
    const SIZE: usize = 15_000;
    let scene = Scene::with(&[("IDLE_TIMEOUT", "10m")]).await;
    let udp = scene.listener("udp.default").await;
    let dtls = scene.listener("dtls.default").await;
    let (mut plain, mut conns) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let device = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        device.connect(udp).await.unwrap();
        device.send(b"here").await.unwrap();
        let port = device.local_addr().unwrap().port();
        conns.push(scene.handler.created(port).await);
        plain.push(device);
    }
    let mut encrypted = Vec::new();
    for _ in 0..2 {
        let mut device = DtlsDevice::connect([127, 0, 0, 1], dtls).await;
        let port = device.wire().socket.local_addr().unwrap().port();
        conns.push(scene.handler.created(port).await);
        encrypted.push(device);
    }
    // One of each is gone: its host says so.
    plain.pop();
    encrypted.pop();
    let before = scene.rss();
    let sending = conns.iter().map(|conn| {
        let (adapter, conn) = (scene.adapter.clone(), conn.clone());
        tokio::spawn(async move {
            for _ in 0..MESSAGES {
                adapter.send(&conn, pattern(SIZE)).await.ok();
            }
        })
    });
    let sending: Vec<_> = sending.collect();
    for sender in sending {
        sender.await.unwrap();
    }
    let grown = scene.rss().saturating_sub(before);
    let sent = conns.len() * MESSAGES * SIZE / 1024;
    println!("{sent} KiB to devices that do not read or are gone: {grown} KiB more");
    assert!(grown < 24 * 1024, "{grown} KiB more");
    // Both that are still there are served.
    let known = encrypted.pop().unwrap();
    drop(plain);
    scene.opens("udp.default", 2).await;
    scene.opens("dtls.default", 2).await;
    drop(known);
    scene.finish().await;
}
