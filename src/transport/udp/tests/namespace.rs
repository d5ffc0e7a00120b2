//! What loopback cannot show: small packets, broadcast, and a socket that is full.
//!
//! Needs root and a network namespace of its own, which it changes:
//! `unshare -n cargo test --lib transport::udp -- --ignored`.

use std::process::Command;

use super::*;

fn ip(arguments: &str) {
    let done = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(done.success(), "ip {arguments}");
}

#[tokio::test]
#[ignore = "needs a network namespace of its own"]
async fn in_a_network_of_its_own() {
    // A fresh namespace has nothing but a loopback interface that is down.
    let links = Command::new("ip").args(["-br", "link"]).output().unwrap();
    let links = String::from_utf8(links.stdout).unwrap();
    assert!(
        links.lines().count() == 1 && links.contains("DOWN"),
        "not a fresh namespace: {links}"
    );
    ip("link set lo up");
    ip("link set lo mtu 1500");
    ip("link add near type veth peer name far");
    ip("addr add 10.9.0.1/24 dev near");
    ip("link set near up");
    ip("link set far up");
    large_datagrams_go_in_fragments().await;
    a_broadcast_is_no_connection().await;
    an_address_that_is_gone_is_not_sent_from().await;
    a_full_socket_wakes_all_who_wait().await;
}

async fn large_datagrams_go_in_fragments() {
    for bound in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
        let mut gateway = Gateway::start(bound, 1, &Options::default());
        let mut address = gateway.address;
        if address.ip().is_unspecified() {
            address.set_ip("127.0.0.1".parse().unwrap());
        }
        let device = Device::to(address);
        let large = vec![7; 65_507];
        device.send(&large).await;
        let mut socket = gateway.entered().await;
        assert_eq!(receive(&mut socket).await.unwrap(), large);
        send(&mut socket, &large).await.unwrap();
        assert_eq!(gateway.counters.get("too_large"), 0);
        assert_eq!(device.receive().await, large);
    }
}

async fn a_broadcast_is_no_connection() {
    let gateway = Gateway::start("0.0.0.0:0", 4, &Options::default());
    let device = tokio::net::UdpSocket::bind("10.9.0.1:0").await.unwrap();
    device.set_broadcast(true).unwrap();
    let port = gateway.address.port();
    device
        .send_to(b"anybody?", ("10.9.0.255", port))
        .await
        .unwrap();
    gateway.counters.reach("bad_address", 4).await;
    assert_eq!(gateway.entries(), 0);
}

/// An address that this host had and has no more: another one answers.
async fn an_address_that_is_gone_is_not_sent_from() {
    ip("addr add 10.9.0.2/24 dev near");
    let mut gateway = Gateway::start("0.0.0.0:0", 1, &Options::default());
    let device = tokio::net::UdpSocket::bind("10.9.0.1:0").await.unwrap();
    let port = gateway.address.port();
    device.send_to(b"hello", ("10.9.0.2", port)).await.unwrap();
    let mut socket = gateway.entered().await;
    ip("addr del 10.9.0.2/24 dev near");
    send(&mut socket, b"moved").await.unwrap();
    let mut buffer = [0; 100];
    let (_, from) = soon(device.recv_from(&mut buffer)).await.unwrap();
    assert_eq!(from, SocketAddr::from(([10, 9, 0, 1], port)));
}

/// Datagrams for somebody whose link address is asked for in vain fill the socket,
/// until the kernel gives up.
async fn a_full_socket_wakes_all_who_wait() {
    ip("addr add 10.9.0.9/24 dev near");
    let options = Options {
        sndbuf: Some(16 * 1024),
        ..Options::default()
    };
    let mut gateway = Gateway::start("0.0.0.0:0", 1, &options);
    let address = SocketAddr::from(([10, 9, 0, 1], gateway.address.port()));
    let mut sending = JoinSet::new();
    let mut sockets = Vec::new();
    for _ in 0..20 {
        let device = tokio::net::UdpSocket::bind("10.9.0.9:0").await.unwrap();
        device.send_to(b"hello", address).await.unwrap();
        sockets.push(gateway.entered().await);
    }
    ip("addr del 10.9.0.9/24 dev near");
    for mut socket in sockets {
        sending.spawn(async move {
            for _ in 0..3 {
                let chunk = [io::IoSlice::new(&[0; 1000])];
                poll_fn(|cx| socket.poll_send(cx, &chunk)).await.unwrap();
            }
        });
    }
    let shard = gateway.shards[0].clone();
    let blocked = async {
        while shard.waiting_to_send() < 10 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(blocked).await;
    tokio::time::timeout(Duration::from_secs(60), sending.join_all())
        .await
        .expect("some were not woken");
}
