//! What peers may use, and what becomes of those who leave.

use super::*;

#[tokio::test]
async fn a_full_queue_is_its_peers_alone() {
    let options = Options {
        queue_datagrams: 10,
        queue_bytes: 1000,
        ..Options::default()
    };
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &options);
    let (many, mut full) = gateway.peer().await;
    let (large, mut heavy) = gateway.peer().await;
    let (other, mut socket) = gateway.peer().await;
    for n in 0..15u8 {
        many.send(&[n]).await;
    }
    for n in 0..5u8 {
        large.send(&[n; 300]).await;
    }
    other.send(b"mine").await;
    assert_eq!(receive(&mut socket).await.unwrap(), b"mine");
    assert_eq!(gateway.counters.get("queue_full"), 5 + 2);
    for n in 0..10u8 {
        assert_eq!(receive(&mut full).await.unwrap(), [n]);
    }
    for n in 0..3u8 {
        assert_eq!(receive(&mut heavy).await.unwrap(), [n; 300]);
    }
    // Larger than the whole queue: taken when nothing waits.
    large.send(&[7; 5000]).await;
    assert_eq!(receive(&mut heavy).await.unwrap(), [7; 5000]);
}

#[tokio::test]
async fn many_queues_together_have_a_bound_too() {
    let options = Options {
        queues_bytes: 10_000,
        ..Options::default()
    };
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &options);
    let mut peers = Vec::new();
    for _ in 0..4 {
        let (device, socket) = gateway.peer().await;
        device.send(&[0; 4000]).await;
        peers.push((device, socket));
    }
    let received = 4 + 4;
    gateway.counters.reach("received", received).await;
    assert_eq!(gateway.counters.get("queues_full"), 2);
    // Somebody who has nothing in there yet is heard all the same.
    let (device, mut socket) = gateway.peer().await;
    device.send(b"hear me").await;
    assert_eq!(receive(&mut socket).await.unwrap(), b"hear me");
    // What was taken out or thrown away is room again.
    assert_eq!(receive(&mut peers[0].1).await.unwrap(), [0; 4000]);
    drop(peers.remove(1));
    device.send(&[1; 9000]).await;
    assert_eq!(receive(&mut socket).await.unwrap(), [1; 9000]);
    assert_eq!(gateway.shards[0].queued(), 0);
}

#[tokio::test]
async fn who_is_dropped_and_comes_back_is_somebody_new() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let (device, mut old) = gateway.peer().await;
    for round in 0..100 {
        device.send(b"unread").await;
        let in_old_queue = round % 2 == 0;
        if in_old_queue {
            gateway.counters.reach("received", 2 + 2 * round).await;
        }
        drop(old);
        device.send(b"for the new one").await;
        let mut new = gateway.entered().await;
        if !in_old_queue {
            assert_eq!(receive(&mut new).await.unwrap(), b"unread");
        }
        assert_eq!(receive(&mut new).await.unwrap(), b"for the new one");
        assert_eq!(gateway.entries(), 1);
        old = new;
    }
    drop(old);
    assert_eq!(gateway.entries(), 0);
}

/// A peer's end that is dropped only after the next one has taken its place.
#[test]
fn a_late_drop_takes_nothing_from_the_next_of_its_flow() {
    let flow = super::super::table::Flow {
        peer: "192.0.2.1:5".parse().unwrap(),
        local: None,
    };
    let mut table = super::super::table::Table::default();
    let [old, new] = [flow, flow].map(super::super::table::Peer::new);
    table.enter(old.clone());
    table.enter(new.clone());
    table.remove(&old);
    assert!(Arc::ptr_eq(&table.get(&flow).unwrap(), &new));
    table.remove(&new);
    assert!(table.get(&flow).is_none());
}

#[tokio::test]
async fn ten_thousand_who_leave_at_once_leave_nothing() {
    const PEERS: u32 = 10_000;
    let mut gateway = Gateway::start("127.0.0.1:0", 2, &Options::default());
    let crowd = Crowd::new();
    let mut sockets = Vec::new();
    for number in 0..PEERS {
        crowd.send(number, gateway.address, b"hello");
        sockets.push(gateway.entered().await);
    }
    assert_eq!(gateway.entries(), PEERS as usize);
    // One socket for each shard, and each has its share.
    for shard in &gateway.shards {
        let share = shard.table().peers().count();
        assert!((4000..6000).contains(&share), "{share}");
    }
    drop(sockets);
    assert_eq!(gateway.entries(), 0);
    assert!(gateway.shards.iter().all(|shard| shard.queued() == 0));
    // They may all come back.
    crowd.send(0, gateway.address, b"hello");
    gateway.entered().await;
}

#[tokio::test]
async fn a_flood_of_strangers_leaves_the_table_capped_and_peers_served() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    gateway.room.store(100, Ordering::SeqCst);
    let (device, mut socket) = gateway.peer().await;
    let crowd = Crowd::new();
    for number in 0..20_000 {
        crowd.send(number, gateway.address, b"me too");
        if number % 100 == 0 {
            device.send(b"question").await;
            assert_eq!(receive(&mut socket).await.unwrap(), b"question");
        }
    }
    gateway.counters.reach("received", 20_000 + 201).await;
    assert_eq!(gateway.entries(), 100);
    assert_eq!(gateway.refused.load(Ordering::SeqCst), 20_000 - 99);
}

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_also_for_a_second_gateway() {
    for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
        for shards in [1, 2] {
            let options = Options::default();
            let first = bind(address.parse().unwrap(), shards, &options).unwrap();
            assert_eq!(first.len(), shards);
            let bound = first[0].local_addr().unwrap();
            assert_ne!(bound.port(), 0);
            for socket in &first {
                assert_eq!(socket.local_addr().unwrap(), bound);
            }
            let error = bind(bound, 2, &options).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            if shards > 1 {
                // The kernel alone would let it in.
                let domain = socket2::Domain::for_address(bound);
                let other = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
                other.set_reuse_port(true).unwrap();
                other.bind(&bound.into()).unwrap();
            }
            drop(first);
            bind(bound, 2, &options).unwrap();
        }
    }
}

#[test]
fn nobody_has_these_addresses() {
    let possible = |address: &str| super::super::demux::is_possible(address.parse().unwrap());
    for address in ["127.0.0.1:1", "[2001:db8::1]:65535", "[::ffff:192.0.2.1]:7"] {
        assert!(possible(address), "{address}");
    }
    for address in [
        "192.0.2.1:0",
        "0.0.0.0:7",
        "255.255.255.255:7",
        "224.0.0.1:7",
        "[::]:7",
        "[ff02::1]:7",
        "[::ffff:224.0.0.1]:7",
        "[::ffff:0.0.0.0]:7",
    ] {
        assert!(!possible(address), "{address}");
    }
}

/// Whoever writes our own address on a datagram must not make us talk to ourselves.
#[tokio::test]
async fn our_own_address_is_no_peers() {
    let gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let shard = &gateway.shards[0];
    let sent = async {
        while shard.io.send(gateway.address, None, b"me").is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(sent).await;
    gateway.counters.reach("bad_address", 1).await;
    assert_eq!(gateway.entries(), 0);
}

/// The kernel gives it to every socket of the port, which would be a connection each.
#[tokio::test]
async fn a_broadcast_makes_no_connections() {
    let gateway = Gateway::start("0.0.0.0:0", 2, &Options::default());
    let device = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    device.set_broadcast(true).unwrap();
    let everybody = ("127.255.255.255", gateway.address.port());
    device.send_to(b"anybody?", everybody).await.unwrap();
    gateway.counters.reach("bad_address", 2).await;
    assert_eq!(gateway.entries(), 0);
}

/// As many strangers as a thread can send, all the time: the kernel loses some of the
/// peer's datagrams, as any network may, but the peer is served.
#[tokio::test]
async fn a_flood_that_never_ends_does_not_starve_a_peer() {
    let mut gateway = Gateway::start("127.0.0.1:0", 1, &Options::default());
    let (device, mut socket) = gateway.peer().await;
    let (address, over) = (gateway.address, gateway.stop.clone());
    let flood = std::thread::spawn(move || {
        let socket = RawSocket::bind("127.0.0.1:0").unwrap();
        while !over.is_cancelled() {
            socket.send_to(b"no", address).unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok(datagram) = receive(&mut socket).await {
            send(&mut socket, &datagram).await.unwrap();
        }
    });
    let answered = async {
        for round in 0..100u8 {
            let mut buffer = [0; 1];
            loop {
                device.send(&[round]).await;
                let patience = Duration::from_millis(20);
                let answer = tokio::time::timeout(patience, device.0.recv(&mut buffer)).await;
                if answer.is_ok() && buffer == [round] {
                    break;
                }
            }
        }
    };
    soon(answered).await;
    gateway.stop.cancel();
    flood.join().unwrap();
}

/// Ends are dropped on other threads while datagrams for them come in.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn peers_that_leave_while_they_are_spoken_to_leave_nothing() {
    let options = Options {
        queue_datagrams: 3,
        ..Options::default()
    };
    let mut gateway = Gateway::start("127.0.0.1:0", 2, &options);
    for _ in 0..4 {
        let (device, over) = (Device::to(gateway.address), gateway.stop.clone());
        tokio::spawn(async move {
            while !over.is_cancelled() {
                device.send(b"something").await;
                tokio::task::yield_now().await;
            }
        });
    }
    let mut connections = JoinSet::new();
    while connections.len() < 2000 {
        let mut socket = gateway.entered().await;
        connections.spawn(async move {
            for _ in 0..3 {
                receive(&mut socket).await?;
            }
            io::Result::Ok(())
        });
    }
    // The last ones wait for more; their listener's end is theirs.
    gateway.stop.cancel();
    while let Some(ended) = soon(gateway.tasks.join_next()).await {
        ended.unwrap();
    }
    gateway.entered.close();
    while gateway.entered.recv().await.is_some() {}
    let ended = soon(connections.join_all()).await;
    assert_eq!(ended.len(), 2000);
    assert_eq!(gateway.entries(), 0);
    assert!(gateway.shards.iter().all(|shard| shard.queued() == 0));
}
