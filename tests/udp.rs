//! Devices over UDP: a datagram is a callback, a peer's address is a connection.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Call, Handler, Peer, Stage, pattern, until, within};
use exproto_sidecar::proto::{Address, SocketType};
use tokio::net::UdpSocket;

/// A stage with a UDP listener, `udp.default`, that has further keys of its own.
async fn stage(keys: &[(&str, &str)]) -> Stage {
    let mut all = vec![("LISTENERS__UDP__DEFAULT__BIND", "127.0.0.1:0")];
    all.extend(keys);
    Stage::with(&all).await
}

fn listener(stage: &Stage) -> SocketAddr {
    stage.gateway.addresses().listeners["udp.default"]
}

/// A device, and the name by which the handler knows it.
struct Device {
    socket: UdpSocket,
    conn: String,
}

impl Device {
    /// Bound to an address of its own, sending to `to`.
    async fn bound(from: &str, to: SocketAddr) -> Self {
        let socket = UdpSocket::bind(from).await.unwrap();
        socket.connect(to).await.unwrap();
        Self {
            socket,
            conn: String::new(),
        }
    }

    /// Known to the handler by its first datagram.
    async fn hello(stage: &Stage) -> Self {
        let mut device = Self::bound("127.0.0.1:0", listener(stage)).await;
        device.send("hello").await;
        device.conn = stage.handler.created(device.port()).await;
        stage.handler.bytes(&device.conn, 5).await;
        device
    }

    async fn send(&self, datagram: impl AsRef<[u8]>) {
        self.socket.send(datagram.as_ref()).await.unwrap();
    }

    async fn receive(&self) -> Vec<u8> {
        let mut datagram = vec![0; 65_536];
        let count = within("a datagram", self.socket.recv(&mut datagram)).await;
        datagram.truncate(count.unwrap());
        datagram
    }

    fn port(&self) -> u16 {
        self.socket.local_addr().unwrap().port()
    }
}

/// The datagrams of a connection, once there are so many.
async fn datagrams(handler: &Handler, conn: &str, count: usize) -> Vec<Vec<u8>> {
    let what = format!("{count} datagrams of {conn}");
    handler
        .wait(&what, |log| {
            let all: Vec<Vec<u8>> = log
                .of(conn)
                .filter_map(|call| match call {
                    Call::Bytes(bytes) => Some(bytes.to_vec()),
                    _ => None,
                })
                .collect();
            (all.len() >= count).then_some(all)
        })
        .await
}

fn address(host: &str, port: u16) -> Option<Address> {
    Some(Address {
        host: host.to_owned(),
        port: port.into(),
    })
}

fn refused(reason: &str) -> String {
    format!("exproto_connections_refused_total{{listener=\"udp.default\",reason=\"{reason}\"}}")
}

fn dropped(reason: &str) -> String {
    format!("exproto_datagrams_dropped_total{{listener=\"udp.default\",reason=\"{reason}\"}}")
}

async fn at_least(stage: &Stage, metric: &str, count: f64) -> f64 {
    stage.admin.metric_until(metric, |n| n > count - 0.5).await
}

/// One datagram is one callback, an empty one and the largest too, never joined or
/// split, also while the handler is slow; and each Send is one datagram.
#[tokio::test]
async fn a_datagram_is_a_callback() {
    let stage = stage(&[]).await;
    let gate = stage.handler.hold("created");
    let mut device = Device::bound("127.0.0.1:0", listener(&stage)).await;
    let largest = pattern(65_507);
    let sent: [&[u8]; 6] = [b"one", b"", b"two", b"", &largest, b"end"];
    for datagram in sent {
        device.send(datagram).await;
    }
    device.conn = stage.handler.created(device.port()).await;
    gate.open();
    let got = datagrams(&stage.handler, &device.conn, sent.len()).await;
    assert!(got == sent, "{} datagrams", got.len());
    let info = stage.conninfo(&device.conn);
    assert_eq!(info.socktype(), SocketType::Udp);
    assert_eq!(info.peername, address("127.0.0.1", device.port()));
    assert_eq!(info.sockname, address("127.0.0.1", listener(&stage).port()));
    for datagram in sent {
        stage
            .adapter
            .send(&device.conn, datagram.to_vec())
            .await
            .ok();
        assert!(device.receive().await == datagram);
    }
    stage.finish().await;
}

/// A device over UDP is a client as any other.
#[tokio::test]
async fn a_device_over_udp_is_a_client() {
    let stage = stage(&[("LISTENERS__UDP__DEFAULT__MOUNTPOINT", "udp/")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("udp/up").await;
    let device = Device::hello(&stage).await;
    stage.adapter.authenticate(&device.conn, "c").await.ok();
    stage.adapter.subscribe(&device.conn, "down", 1).await.ok();
    stage.adapter.publish(&device.conn, "up", 1, "x").await.ok();
    assert_eq!(peer.next().await.topic, "udp/up");
    peer.publish("udp/down", 1, "y").await;
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["y"]);
    stage.finish().await;
}

/// Replies leave from the address that was asked, whichever of the host's it is.
#[tokio::test]
async fn replies_come_from_where_the_question_went() {
    for (bind, from, to, host) in [
        ("0.0.0.0:0", "127.0.0.1:0", "127.0.0.2", "127.0.0.2"),
        ("0.0.0.0:0", "127.0.0.1:0", "127.0.0.1", "127.0.0.1"),
        ("[::]:0", "127.0.0.1:0", "127.0.0.3", "127.0.0.3"),
        ("[::]:0", "[::1]:0", "::1", "::1"),
    ] {
        let stage = stage(&[("LISTENERS__UDP__DEFAULT__BIND", bind)]).await;
        let to = SocketAddr::new(to.parse().unwrap(), listener(&stage).port());
        // Connected: what came from elsewhere would not be received.
        let device = Device::bound(from, to).await;
        device.send("x").await;
        let conn = stage.handler.created(device.port()).await;
        let info = stage.conninfo(&conn);
        assert_eq!(info.sockname, address(host, to.port()));
        let from = device.socket.local_addr().unwrap().ip().to_string();
        assert_eq!(info.peername.unwrap().host, from);
        stage.adapter.send(&conn, "y").await.ok();
        assert_eq!(device.receive().await, b"y");
        stage.finish().await;
    }
}

/// `Close` forgets the peer at once, however long the handler takes for OnSocketClosed:
/// every later datagram from there is a new connection's.
#[tokio::test]
async fn close_forgets_the_peer() {
    let stage = stage(&[]).await;
    let mut device = Device::hello(&stage).await;
    let port = u32::from(device.port());
    for known in 1..20 {
        let saying_goodbye = stage.handler.hold("closed");
        stage.adapter.close(&device.conn).await.ok();
        let reason = stage.handler.closed(&device.conn).await;
        assert_eq!(reason, "closed_by_handler");
        device.send("again").await;
        let next = stage.handler.wait("one more connection", |log| {
            let created = log.events.iter().filter(|event| match &event.call {
                Call::Created(info) => info.peername.as_ref().unwrap().port == port,
                _ => false,
            });
            let conns: Vec<_> = created.map(|event| event.conn.clone()).collect();
            conns.get(known).cloned()
        });
        let next = next.await;
        assert_eq!(datagrams(&stage.handler, &next, 1).await, [b"again"]);
        saying_goodbye.open();
        device.conn = next;
    }
    stage.finish().await;
}

/// Datagrams that wait for a connection when it is closed are counted.
#[tokio::test]
async fn what_waits_at_the_close_is_counted() {
    let stage = stage(&[]).await;
    let device = Device::hello(&stage).await;
    let busy = stage.handler.hold("bytes");
    let received = "exproto_datagrams_received_total{listener=\"udp.default\"}";
    let before = stage.admin.metric(received).await;
    for _ in 0..4 {
        device.send("x").await;
    }
    at_least(&stage, received, before + 4.0).await;
    stage.adapter.close(&device.conn).await.ok();
    // The first is in the handler's hands.
    at_least(&stage, &dropped("closed"), 3.0).await;
    busy.open();
    stage.handler.closed(&device.conn).await;
    assert!((stage.admin.metric(&dropped("closed")).await - 3.0).abs() < 0.5);
    stage.finish().await;
}

/// `idle_timeout` ends a peer that is silent, authenticated or not, unless it has a
/// keepalive timer, and not one that is busy.
#[tokio::test]
async fn silent_peers_are_reaped() {
    let stage = stage(&[("IDLE_TIMEOUT", "1s")]).await;
    let stranger = Device::hello(&stage).await;
    let client = Device::hello(&stage).await;
    stage.adapter.authenticate(&client.conn, "a").await.ok();
    let timed = Device::hello(&stage).await;
    stage.adapter.authenticate(&timed.conn, "b").await.ok();
    stage.adapter.start_timer(&timed.conn, 2).await.ok();
    let busy = Device::hello(&stage).await;
    stage.adapter.authenticate(&busy.conn, "c").await.ok();
    let talking = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            busy.send("x").await;
        }
    };
    let waiting = async {
        assert_eq!(stage.handler.closed(&stranger.conn).await, "idle_timeout");
        assert_eq!(stage.handler.closed(&client.conn).await, "idle_timeout");
        // Last, after three seconds: its timer counts, and nothing else.
        assert_eq!(stage.handler.closed(&timed.conn).await, "keepalive_timeout");
    };
    tokio::select! {
        () = talking => {}
        () = waiting => {}
    }
    let names = stage.handler.names(&busy.conn);
    assert!(!names.contains(&"closed"), "{names:?}");
    stage.finish().await;
}

/// `health_check` is answered without a callback, and nothing else is.
#[tokio::test]
async fn a_health_check_makes_no_connection() {
    let stage = stage(&[
        ("LISTENERS__UDP__DEFAULT__HEALTH_CHECK__REQUEST", "ping"),
        ("LISTENERS__UDP__DEFAULT__HEALTH_CHECK__REPLY", "pong"),
    ])
    .await;
    let checker = Device::bound("127.0.0.1:0", listener(&stage)).await;
    for _ in 0..3 {
        checker.send("ping").await;
        assert_eq!(checker.receive().await, b"pong");
    }
    let device = Device::hello(&stage).await;
    // From a device it is data.
    device.send("ping").await;
    assert_eq!(stage.handler.bytes(&device.conn, 9).await, b"helloping");
    let events = stage.handler.events();
    assert!(events.iter().all(|event| event.conn == device.conn));
    stage.finish().await;
}

/// Everything that keeps strangers out, each counted by its reason.
#[tokio::test]
async fn strangers_are_kept_out() {
    let keys = [("LISTENERS__UDP__DEFAULT__ACCESS_RULES", "deny 127.0.0.9")];
    let rules = stage(&keys).await;
    let denied = Device::bound("127.0.0.9:0", listener(&rules)).await;
    denied.send("x").await;
    at_least(&rules, &refused("access_rules"), 1.0).await;
    let known = Device::hello(&rules).await;
    let events = rules.handler.events();
    assert!(events.iter().all(|event| event.conn == known.conn));
    rules.finish().await;
    for (key, reason) in [
        ("MAX_CONNECTIONS", "max_connections"),
        ("MAX_CONNECTIONS_PER_ADDRESS", "max_connections_per_address"),
        ("MAX_CONN_RATE", "max_conn_rate"),
    ] {
        let key = format!("LISTENERS__UDP__DEFAULT__{key}");
        let stage = stage(&[(&key, "3")]).await;
        let mut devices = Vec::new();
        for _ in 0..3 {
            devices.push(Device::hello(&stage).await);
        }
        let late = Device::bound("127.0.0.1:0", listener(&stage)).await;
        until(reason, || async {
            late.send("x").await;
            (stage.admin.metric(&refused(reason)).await > 0.5).then_some(())
        })
        .await;
        if reason != "max_conn_rate" {
            // Room that was given back is free again.
            stage.adapter.close(&devices[0].conn).await.ok();
            stage.handler.closed(&devices[0].conn).await;
            until("room", || async {
                late.send("x").await;
                let told = stage.handler.created(late.port());
                tokio::time::timeout(Duration::from_millis(100), told)
                    .await
                    .ok()
            })
            .await;
        }
        stage.finish().await;
    }
}

/// What waits for a slow handler is bounded for each peer; what is dropped is counted,
/// the first come stay, and nobody else is concerned.
#[tokio::test]
async fn a_peers_queue_is_bounded() {
    let keys = [(
        "LISTENERS__UDP__DEFAULT__UDP_OPTIONS__QUEUE_MAX_DATAGRAMS",
        "10",
    )];
    let stage = stage(&keys).await;
    let (slow, quick) = (Device::hello(&stage).await, Device::hello(&stage).await);
    let gate = common::Gate::closed();
    let (held, conn) = (gate.clone(), slow.conn.clone());
    stage.handler.behave(move |event| {
        let (held, is_slow) = (held.clone(), event.conn == conn);
        async move {
            if is_slow {
                held.pass().await;
            }
            Ok(())
        }
    });
    slow.send("first").await;
    stage.handler.bytes(&slow.conn, 10).await;
    for number in 0..30 {
        slow.send(number.to_string()).await;
    }
    at_least(&stage, &dropped("queue_full"), 20.0).await;
    quick.send("still here").await;
    stage.handler.bytes(&quick.conn, 15).await;
    gate.open();
    let got = datagrams(&stage.handler, &slow.conn, 12).await;
    let expected: Vec<Vec<u8>> = (0..10).map(|n| n.to_string().into_bytes()).collect();
    assert_eq!(got[2..], expected);
    slow.send("after").await;
    datagrams(&stage.handler, &slow.conn, 13).await;
    stage.finish().await;
}

/// `max_messages_rate` and `max_bytes_rate`: what comes faster is dropped and counted,
/// the rest is whole.
#[tokio::test]
async fn fast_peers_are_cut() {
    for (key, rate) in [("MAX_MESSAGES_RATE", "10"), ("MAX_BYTES_RATE", "1000")] {
        let key = format!("LISTENERS__UDP__DEFAULT__{key}");
        let stage = stage(&[(&key, rate)]).await;
        let device = Device::bound("127.0.0.1:0", listener(&stage)).await;
        for number in 0..50 {
            device.send(format!("{number:0100}")).await;
        }
        let conn = stage.handler.created(device.port()).await;
        // A second's worth at once, and what became free meanwhile.
        let dropped = at_least(&stage, &dropped("rate"), 30.0).await;
        let got = datagrams(&stage.handler, &conn, 50 - dropped as usize).await;
        assert!(got.len() >= 10, "{}", got.len());
        assert!(got.iter().all(|datagram| datagram.len() == 100));
        assert_eq!(got[0], format!("{:0100}", 0).into_bytes());
        stage.finish().await;
    }
}

/// Two listeners with handlers and mountpoints of their own, on the same port of TCP
/// and UDP.
#[tokio::test]
async fn listeners_have_handlers_of_their_own() {
    let other = Handler::start().await;
    // An address that no other test has, so that none takes its port meanwhile.
    let bind = format!("127.0.0.78:{}", common::free_port());
    let stage = stage(&[
        ("HANDLERS__OTHER__ADDRESS", &other.url()),
        ("LISTENERS__UDP__OTHER__BIND", &bind),
        ("LISTENERS__UDP__OTHER__HANDLER", "other"),
        ("LISTENERS__UDP__OTHER__MOUNTPOINT", "other/"),
        ("LISTENERS__TCP__OTHER__BIND", &bind),
    ])
    .await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    let one = Device::hello(&stage).await;
    let to = stage.gateway.addresses().listeners["udp.other"];
    let two = Device::bound("127.0.0.1:0", to).await;
    two.send("x").await;
    let conn = other.created(two.port()).await;
    stage.adapter.authenticate(&conn, "two").await.ok();
    stage.adapter.publish(&conn, "t", 1, "x").await.ok();
    assert_eq!(peer.next().await.topic, "other/t");
    let first = stage.handler.events();
    assert!(first.iter().all(|event| event.conn == one.conn));
    stage.finish().await;
    other.check();
}

/// A drain tells every peer's handler; a later datagram finds nobody.
#[tokio::test]
async fn a_drain_ends_all_peers() {
    let stage = stage(&[]).await;
    let mut devices = Vec::new();
    for _ in 0..50 {
        devices.push(Device::hello(&stage).await);
    }
    let drained = within("the drain", stage.gateway.drain()).await;
    assert_eq!(drained.connections, 0);
    for device in &devices {
        assert_eq!(stage.handler.closed(&device.conn).await, "shutdown");
    }
}
