//! No descriptor is left. `tests/admission.rs` has the case of TCP alone.

use std::net::SocketAddr;

use tokio::net::{TcpStream, UdpSocket};

use crate::common::DtlsDevice;
use crate::common::{Adapter, Peer, within};
use crate::scene::{Echo, Scene};

/// A device over UDP that hears itself again.
async fn udp_echo(to: SocketAddr) {
    let device = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    device.connect(to).await.unwrap();
    device.send(b"echo").await.unwrap();
    let mut heard = [0; 4];
    within("an echo", device.recv(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"echo");
}

/// `ulimit -n 256`, used up by connections to the TCP and TLS listeners: who is
/// connected is served, UDP and DTLS let even newcomers in, the adapter, the broker and
/// the admin server are there, also a broker that went and came back; and when descriptors are free again, TCP and TLS let newcomers in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn are_used_up() {
    const FILES: usize = 256;
    let mut scene = Scene::limited(
        FILES as u32,
        &[
            ("IDLE_TIMEOUT", "10m"),
            // Nobody is to leave before the test has looked.
            (
                "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__HANDSHAKE_TIMEOUT",
                "10m",
            ),
        ],
    )
    .await;
    let (tcp, ssl) = (
        scene.listener("tcp.default").await,
        scene.listener("ssl.default").await,
    );
    let udp = scene.listener("udp.default").await;
    let dtls = scene.listener("dtls.default").await;
    let tcp_echo = Echo::over_tcp(&scene).await;
    let tls_echo = Echo::over(scene.tls_device().await);
    let device = DtlsDevice::connect([127, 0, 0, 1], dtls).await;
    let mut peer = Peer::connect(scene.broker.port).await;
    peer.subscribe("up").await;
    let cpu = scene.cpu();
    let mut held = Vec::new();
    for number in 0..FILES * 2 {
        let to = if number % 2 == 0 { tcp } else { ssl };
        held.push(
            within("a connection", TcpStream::connect(to))
                .await
                .unwrap(),
        );
    }
    let line = "cannot accept; trying on listener=";
    scene
        .program
        .logged(&format!("{line}\"tcp.default\""))
        .await;
    scene
        .program
        .logged(&format!("{line}\"ssl.default\""))
        .await;
    let used = scene.descriptors();
    for number in 0..10 {
        udp_echo(udp).await;
        let text = format!("word {number}");
        scene.adapter.raw_publish("up", 1, text.clone()).await.ok();
        assert_eq!(peer.next_text().await.2, text);
    }
    // What broke has descriptors to come back with, and operators can look.
    scene.broker.kill();
    scene.admin.ready_until(503, "- broker").await;
    scene.broker.up().await;
    scene.admin.ready_until(200, "").await;
    let adapter = Adapter::connect(scene.program.address("adapter on").await).await;
    let mut peer = Peer::connect(scene.broker.port).await;
    peer.subscribe("up").await;
    adapter.raw_publish("up", 1, "again").await.ok();
    assert_eq!(peer.next_text().await.2, "again");
    let device = device.echo("echo").await;
    let late = DtlsDevice::connect([127, 0, 0, 1], dtls).await;
    let late = late.echo("echo").await;
    let cpu = scene.cpu() - cpu;
    held.clear();
    let again = Echo::over_tcp(&scene).await;
    let again_tls = Echo::over(scene.tls_device().await);
    scene.program.logged("accepting again listener=\"tcp").await;
    scene.program.logged("accepting again listener=\"ssl").await;
    let errors = "exproto_accept_errors_total";
    let tcp_errors = scene.metric(errors, "tcp.default", "").await;
    let ssl_errors = scene.metric(errors, "ssl.default", "").await;
    println!(
        "{used} of {FILES} descriptors used: {tcp_errors} and {ssl_errors} failures to accept, \
         {cpu:.2?} of processor time; {:?}; {:?}; then {:?}; {:?}",
        tcp_echo.end().await,
        tls_echo.end().await,
        again.end().await,
        again_tls.end().await,
    );
    assert!(tcp_errors > 0.5 && ssl_errors > 0.5);
    drop((device, late));
    scene.finish().await;
}
