//! What goes between a peer and its end.

use super::*;

#[tokio::test]
async fn datagrams_come_and_go_whole_also_empty_and_largest() {
    for bound in ["127.0.0.1:0", "[::1]:0"] {
        let mut gateway = Gateway::start(bound, 1, &Options::default());
        let device = Device::to(gateway.address);
        device.send(b"").await;
        let mut socket = gateway.entered().await;
        assert_eq!(socket.peer_addr(), device.0.local_addr().unwrap());
        assert_eq!(socket.local_addr(), gateway.address);
        assert_eq!(receive(&mut socket).await.unwrap(), b"");
        let largest: Vec<u8> = (0..65_507).map(|n| n as u8).collect();
        for datagram in [&b"one"[..], b"", &largest, b"two"] {
            device.send(datagram).await;
            assert_eq!(receive(&mut socket).await.unwrap(), datagram);
            assert_eq!(send(&mut socket, datagram).await.unwrap(), datagram.len());
            assert_eq!(device.receive().await, datagram);
        }
        // Several at once stay several.
        for n in 0..20u8 {
            device.send(&vec![n; usize::from(n)]).await;
        }
        for n in 0..20u8 {
            assert_eq!(receive(&mut socket).await.unwrap(), vec![n; usize::from(n)]);
        }
        assert_eq!(gateway.counters.get("received"), 25);
        assert_eq!(gateway.counters.get("sent"), 4);
    }
}

/// Of a burst that the kernel has joined each datagram is one, also the shorter last.
#[tokio::test]
async fn a_joined_burst_is_split_again() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let socket = RawSocket::bind("127.0.0.1:0").unwrap();
    let state = quinn_udp::UdpSocketState::new((&socket).into()).unwrap();
    let burst: Vec<u8> = (0..950).map(|n| (n / 100) as u8).collect();
    let transmit = quinn_udp::Transmit {
        destination: gateway.address,
        ecn: None,
        contents: &burst,
        segment_size: Some(100),
        src_ip: None,
    };
    state.try_send((&socket).into(), &transmit).unwrap();
    let mut peer = gateway.entered().await;
    for expected in burst.chunks(100) {
        assert_eq!(receive(&mut peer).await.unwrap(), expected);
    }
    gateway.counters.reach("received", 10).await;
    assert!(gateway.entered.try_recv().is_err());
}

#[tokio::test]
async fn the_answer_comes_from_the_address_that_was_asked() {
    let cases = [
        ("0.0.0.0:0", &["127.0.0.1", "127.0.0.2", "127.9.9.9"][..]),
        ("[::]:0", &["127.0.0.2", "127.3.0.1", "::1"]),
    ];
    for (bound, asked) in cases {
        let mut gateway = Gateway::start(bound, 2, &Options::default());
        for ip in asked {
            let ip: IpAddr = ip.parse().unwrap();
            // Connected: it takes nothing from any other address.
            let device = Device::to(SocketAddr::new(ip, gateway.address.port()));
            device.send(b"health").await;
            assert_eq!(device.receive().await, b"alive");
            device.send(b"hello").await;
            let mut socket = gateway.entered().await;
            assert_eq!(socket.local_addr().ip().to_canonical(), ip);
            send(&mut socket, b"welcome").await.unwrap();
            assert_eq!(device.receive().await, b"welcome");
        }
    }
}

/// A peer with two of our addresses in use is two connections, on one shard as on two.
#[tokio::test]
async fn what_was_sent_to_another_address_is_another_connection() {
    let mut gateway = Gateway::start("0.0.0.0:0", 1, &Options::default());
    let device = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
    let port = gateway.address.port();
    for ip in ["127.0.0.2", "127.0.0.3"] {
        device.send_to(b"hello", (ip, port)).await.unwrap();
        let mut socket = gateway.entered().await;
        send(&mut socket, ip.as_bytes()).await.unwrap();
        let mut buffer = [0; 100];
        let (count, from) = soon(device.recv_from(&mut buffer)).await.unwrap();
        assert_eq!(&buffer[..count], ip.as_bytes());
        assert_eq!(from, SocketAddr::new(ip.parse().unwrap(), port));
    }
}

#[tokio::test]
async fn a_datagram_that_fits_nowhere_is_dropped_and_counted() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let (device, mut socket) = gateway.peer().await;
    let huge = vec![0; 65_508];
    assert_eq!(send(&mut socket, &huge).await.unwrap(), huge.len());
    assert_eq!(gateway.counters.get("too_large"), 1);
    send(&mut socket, b"still here").await.unwrap();
    assert_eq!(device.receive().await, b"still here");
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_harms_nobody() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let (device, mut unreachable) = gateway.peer().await;
    let (other, mut socket) = gateway.peer().await;
    drop(device);
    for _ in 0..10 {
        // The kernel answers each with "port unreachable".
        send(&mut unreachable, b"anybody?").await.unwrap();
        other.send(b"question").await;
        assert_eq!(receive(&mut socket).await.unwrap(), b"question");
        send(&mut socket, b"answer").await.unwrap();
        assert_eq!(other.receive().await, b"answer");
    }
    assert_eq!(gateway.counters.get("receive_errors"), 0);
}

#[tokio::test]
async fn all_who_wait_to_send_are_woken() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let mut peers = Vec::new();
    for _ in 0..50 {
        peers.push(gateway.peer().await);
    }
    let shard = gateway.shards[0].clone();
    shard.io.jammed.store(true, Ordering::SeqCst);
    let mut sending = JoinSet::new();
    let mut devices = Vec::new();
    for (device, mut socket) in peers {
        devices.push(device);
        sending.spawn(async move {
            send(&mut socket, b"at last").await.unwrap();
            socket
        });
    }
    // One leaves while it waits, and takes its waker along.
    let (device, mut socket) = gateway.peer().await;
    let chunk = [io::IoSlice::new(b"never")];
    let waiting = poll_fn(|cx| socket.poll_send(cx, &chunk));
    let waiting = tokio::time::timeout(Duration::from_millis(1), waiting).await;
    assert!(waiting.is_err());
    let all = async {
        while shard.waiting_to_send() < 51 {
            tokio::task::yield_now().await;
        }
    };
    soon(all).await;
    drop(socket);
    assert_eq!(shard.waiting_to_send(), 50);
    // Any event of the socket tells whether it takes datagrams.
    shard.io.jammed.store(false, Ordering::SeqCst);
    device.send(b"no").await;
    soon(sending.join_all()).await;
    for device in devices {
        assert_eq!(device.receive().await, b"at last");
    }
}

#[tokio::test]
async fn strangers_are_answered_and_nothing_is_kept() {
    let gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let device = Device::to(gateway.address);
    device.send(b"no").await;
    device.send(b"health").await;
    assert_eq!(device.receive().await, b"alive");
    assert_eq!(gateway.entries(), 0);
}

#[tokio::test]
async fn while_draining_known_peers_go_on_and_strangers_are_refused() {
    let mut gateway = Gateway::start("127.0.0.1:0", 2, &Options::default());
    let (device, mut socket) = gateway.peer().await;
    gateway.draining.cancel();
    let stranger = Device::to(gateway.address);
    stranger.send(b"hello").await;
    gateway.counters.reach("draining", 1).await;
    device.send(b"goodbye").await;
    assert_eq!(receive(&mut socket).await.unwrap(), b"goodbye");
    device.send(b"the last").await;
    gateway.counters.reach("received", 4).await;
    gateway.stop.cancel();
    while let Some(ended) = soon(gateway.tasks.join_next()).await {
        ended.unwrap();
    }
    // What has come is still there; then the socket says that it is over.
    assert_eq!(receive(&mut socket).await.unwrap(), b"the last");
    let error = receive(&mut socket).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    drop(socket);
    assert_eq!(gateway.entries(), 0);
}
