//! A connection's life: the order of its callbacks, its end and every reason for it,
//! its bytes, and what holds them back.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Broker, Call, Device, Gate, Handler, Log, Peer, Stage, assert_same, pattern, within};
use exproto_sidecar::proto::{Address, ResultCode, SocketType, TimerType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Status;

/// Created, then bytes as they came, then Closed; each once, one at a time.
#[tokio::test]
async fn callbacks_come_in_order_and_each_once() {
    let stage = Stage::start().await;
    let mut device = stage.device().await;
    for (sent, text) in ["one", "two", "three"].iter().enumerate() {
        device.send(text).await;
        let total: usize = ["one", "two", "three"][..=sent]
            .iter()
            .map(|t| t.len())
            .sum();
        stage.handler.bytes(&device.conn, total).await;
    }
    let conn = device.conn.clone();
    drop(device);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    let names = stage.handler.names(&conn);
    assert_eq!(names, ["created", "bytes", "bytes", "bytes", "closed"]);
    assert_eq!(stage.handler.bytes(&conn, 11).await, b"onetwothree");
    stage.finish().await;
}

/// ConnInfo: the kind of socket and both addresses.
#[tokio::test]
async fn the_handler_is_told_who_connected_and_where() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let created = &stage.handler.events()[0];
    let Call::Created(info) = &created.call else {
        panic!("{created:?}");
    };
    let address = |port: u16| {
        Some(Address {
            host: "127.0.0.1".to_owned(),
            port: port.into(),
        })
    };
    assert_eq!(info.socktype(), SocketType::Tcp);
    assert_eq!(info.peername, address(device.port()));
    assert_eq!(info.sockname, address(stage.devices().port()));
    assert_eq!(info.peercert, None);
    stage.finish().await;
}

/// `conn` is printable ASCII, at most 64 characters, never the same, and what two of
/// one gateway have in common is not what makes them valid.
#[tokio::test]
async fn conn_is_opaque_printable_and_unique() {
    let stage = Stage::start().await;
    let mut conns = HashSet::new();
    for _ in 0..50 {
        let device = stage.device().await;
        assert!(device.conn.len() <= 64, "{}", device.conn);
        assert!(device.conn.bytes().all(|b| b.is_ascii_graphic()));
        assert!(conns.insert(device.conn.clone()), "used again");
    }
    // A neighbour's is not found by counting.
    for conn in &conns {
        let (start, last) = conn.split_at(conn.len() - 1);
        let other = if last == "0" { "1" } else { "0" };
        let guess = format!("{start}{other}");
        let answer = stage.adapter.send(&guess, "x").await;
        answer.refused(ResultCode::ConnProcessNotAlive);
    }
    stage.finish().await;
}

/// The older service, whose callbacks are client streams, is served as well.
#[tokio::test]
async fn the_streaming_service_gets_the_same_callbacks() {
    let stage = Stage::with(&[("HANDLER__SERVICE_NAME", "ConnectionHandler")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut device = stage.subscriber("streamed", "down", 1).await;
    stage.adapter.start_timer(&device.conn, 1).await.ok();
    device.send("up").await;
    stage.handler.bytes(&device.conn, 2).await;
    peer.publish("down", 1, "message").await;
    stage.handler.messages(&device.conn, 1).await;
    assert_eq!(stage.closed(&device).await, "keepalive_timeout");
    let names = stage.handler.names(&device.conn);
    assert_eq!(names, ["created", "bytes", "messages", "timer", "closed"]);
    let handler = &stage.handler;
    let each_alone = |log: &Log| (log.streams.len() == 5).then(|| log.streams.clone());
    let streams = handler.wait("the ends of the streams", each_alone).await;
    assert!(streams.iter().all(|(_, count)| *count == 1), "{streams:?}");
    stage.finish().await;
}

/// Close by the handler: reason `closed_by_handler`, and the device sees the end.
#[tokio::test]
async fn a_close_by_the_handler_is_named_so() {
    let stage = Stage::start().await;
    let mut device = stage.device().await;
    stage.adapter.close(&device.conn).await.ok();
    assert_eq!(device.read_all().await, b"");
    assert_eq!(stage.closed(&device).await, "closed_by_handler");
    assert_eq!(stage.handler.names(&device.conn), ["created", "closed"]);
    stage.finish().await;
}

/// StartTimer: after 1.5 intervals of silence OnTimerTimeout, then the end with
/// `keepalive_timeout`; not before.
#[tokio::test]
async fn a_silent_device_gets_a_timer_and_then_its_end() {
    let stage = Stage::start().await;
    let mut device = stage.device().await;
    let set = Instant::now();
    stage.adapter.start_timer(&device.conn, 1).await.ok();
    assert_eq!(device.read_all().await, b"");
    let silence = set.elapsed();
    assert!(silence >= Duration::from_millis(1500), "{silence:?}");
    assert_eq!(stage.closed(&device).await, "keepalive_timeout");
    let calls: Vec<Call> = stage.handler.events().into_iter().map(|e| e.call).collect();
    assert_eq!(calls[1], Call::Timer(TimerType::Keepalive));
    assert_eq!(calls.len(), 3);
    stage.finish().await;
}

/// What comes from the device keeps it alive; a new StartTimer replaces the interval.
#[tokio::test]
async fn traffic_and_a_longer_timer_put_the_keepalive_off() {
    let stage = Stage::start().await;
    let mut talker = stage.device().await;
    let mut patient = stage.device().await;
    stage.adapter.start_timer(&talker.conn, 1).await.ok();
    stage.adapter.start_timer(&patient.conn, 1).await.ok();
    stage.adapter.start_timer(&patient.conn, 1000).await.ok();
    let set = Instant::now();
    // Twice the time after which a silent one would be gone.
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        talker.send("I am here").await;
    }
    assert!(set.elapsed() >= Duration::from_secs(3));
    assert_eq!(stage.closed(&talker).await, "keepalive_timeout");
    assert!(set.elapsed() >= Duration::from_millis(4500));
    patient.send("and so am I").await;
    stage.handler.bytes(&patient.conn, 11).await;
    stage.finish().await;
}

/// The handler may send a last word in OnTimerTimeout.
#[tokio::test]
async fn the_handler_can_still_send_when_the_timer_ran_out() {
    let stage = Stage::start().await;
    let adapter = stage.adapter.clone();
    stage.handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            match event.call {
                Call::Created(_) => adapter.start_timer(&event.conn, 1).await.ok(),
                Call::Timer(_) => adapter.send(&event.conn, "farewell").await.ok(),
                _ => {}
            }
            Ok(())
        }
    });
    let mut device = stage.device().await;
    assert_eq!(device.read_all().await, b"farewell");
    assert_eq!(stage.closed(&device).await, "keepalive_timeout");
    stage.finish().await;
}

/// Not authenticated and nothing either way for `idle_timeout`: `idle_timeout`. A
/// client may be as quiet as it likes.
#[tokio::test]
async fn an_idle_stranger_is_closed_and_an_idle_client_is_not() {
    let stage = Stage::with(&[("IDLE_TIMEOUT", "1s")]).await;
    let mut client = stage.client("quiet").await;
    let begun = Instant::now();
    let mut stranger = stage.device().await;
    assert_eq!(stranger.read_all().await, b"");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(stage.closed(&stranger).await, "idle_timeout");
    client.send("still here").await;
    stage.handler.bytes(&client.conn, 10).await;
    stage.finish().await;
}

/// A busy connection of a handler that never authenticates lives on, whichever way
/// the bytes go.
#[tokio::test]
async fn traffic_either_way_is_not_idle() {
    let stage = Stage::with(&[("IDLE_TIMEOUT", "1500ms")]).await;
    let mut talks = stage.device().await;
    let mut listens = stage.device().await;
    for round in 0..6 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        talks.send("x").await;
        stage.adapter.send(&listens.conn, "y").await.ok();
        listens.read(1).await;
        stage.handler.bytes(&talks.conn, round + 1).await;
    }
    assert_eq!(stage.closed(&talks).await, "idle_timeout");
    assert_eq!(stage.closed(&listens).await, "idle_timeout");
    stage.finish().await;
}

/// `authenticate_timeout` ends also a busy connection that is not authenticated.
#[tokio::test]
async fn the_authenticate_timeout_ends_also_a_busy_stranger() {
    let stage = Stage::with(&[("AUTHENTICATE_TIMEOUT", "1500ms")]).await;
    let client = stage.client("authenticated").await;
    let mut stranger = stage.device().await;
    let begun = Instant::now();
    let conn = stranger.conn.clone();
    let chatter = tokio::spawn(async move {
        while stranger.stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert_eq!(stage.handler.closed(&conn).await, "idle_timeout");
    assert!(begun.elapsed() >= Duration::from_millis(1300));
    chatter.abort();
    assert_eq!(stage.handler.names(&client.conn), ["created"]);
    stage.finish().await;
}

/// A client id that is live on another connection: the older one goes, `discarded`,
/// and the newer one is the client.
#[tokio::test]
async fn a_second_client_of_the_same_id_discards_the_first() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut older = stage.subscriber("twin", "t", 1).await;
    let newer = stage.subscriber("twin", "t", 1).await;
    assert_eq!(older.read_all().await, b"");
    assert_eq!(stage.closed(&older).await, "discarded");
    peer.publish("t", 1, "for the newer").await;
    stage.handler.messages(&newer.conn, 1).await;
    // The older one's end has not taken the id from the newer one.
    let third = stage.client("twin").await;
    assert_eq!(stage.closed(&newer).await, "discarded");
    drop(third);
    stage.finish().await;
}

/// Of many connections that take one client id at the same time one is left, and it
/// is the client.
#[tokio::test]
async fn of_many_rivals_for_a_client_id_one_is_left() {
    let stage = Stage::with(&[("SHARDS", "4")]).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut rivals = Vec::new();
    for _ in 0..20 {
        rivals.push(stage.device().await);
    }
    let calls = rivals.iter().map(|rival| async {
        // Who is discarded already learns it here.
        let answer = stage.adapter.authenticate(&rival.conn, "wanted").await;
        answer.code == ResultCode::Success
            && stage.subscribe(rival, "t", 1).await.code == ResultCode::Success
    });
    let subscribed = futures_util::future::join_all(calls).await;
    assert!(subscribed.contains(&true));
    let discarded = |log: &common::Log| {
        let closed = |call: &Call| matches!(call, Call::Closed(reason) if reason == "discarded");
        let closed = log.events.iter().filter(|event| closed(&event.call));
        (closed.count() == 19).then_some(())
    };
    stage.handler.wait("nineteen discarded", discarded).await;
    let is_left = |device: &&Device| stage.handler.names(&device.conn) == ["created"];
    let left: Vec<&Device> = rivals.iter().filter(is_left).collect();
    assert_eq!(left.len(), 1);
    peer.publish("t", 1, "x").await;
    stage.handler.messages(&left[0].conn, 1).await;
    stage.finish().await;
}

/// A message that the handler refuses closes its connection, like any callback.
#[tokio::test]
async fn refused_messages_close_the_connection() {
    let stage = Stage::start().await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Messages(_) => Err(Status::invalid_argument("not these")),
            _ => Ok(()),
        }
    });
    let mut peer = Peer::connect(stage.broker.port).await;
    let mut device = stage.subscriber("c", "t", 1).await;
    peer.publish("t", 1, "x").await;
    assert_eq!(device.read_all().await, b"");
    assert_eq!(stage.closed(&device).await, "handler_error");
    stage.broker.logged("Received PUBACK from exproto").await;
    stage.finish().await;
}

/// A refused OnSocketClosed changes nothing: it was the last word.
#[tokio::test]
async fn a_refused_goodbye_is_still_the_last_word() {
    let stage = Stage::start().await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Closed(_) => Err(Status::internal("no")),
            _ => Ok(()),
        }
    });
    let device = stage.device().await;
    let conn = device.conn.clone();
    drop(device);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    let open = "exproto_connections{listener=\"tcp.default\"}";
    stage.admin.metric_until(open, |n| n < 0.5).await;
    let lost = "exproto_closed_callbacks_lost_total{handler=\"default\"}";
    assert!((stage.admin.metric(lost).await - 1.0).abs() < 0.5);
    assert_eq!(stage.handler.names(&conn), ["created", "closed"]);
    stage.finish().await;
}

/// A device that takes nothing for `send_timeout` is closed, `send_timeout`; a Send
/// that waits for room is answered.
#[tokio::test]
async fn a_device_that_does_not_read_is_closed() {
    let stage = Stage::with(&[
        (
            "LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SEND_TIMEOUT",
            "500ms",
        ),
        ("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SNDBUF", "16KiB"),
    ])
    .await;
    let device = stage.small_device().await;
    let begun = Instant::now();
    stage
        .adapter
        .send(&device.conn, pattern(1 << 20))
        .await
        .ok();
    let waits = stage.adapter.send(&device.conn, pattern(1 << 20)).await;
    waits.refused(ResultCode::ConnProcessNotAlive);
    assert!(begun.elapsed() >= Duration::from_millis(500));
    assert_eq!(stage.closed(&device).await, "send_timeout");
    stage.finish().await;
}

/// A slow device is not a stalled one: as long as it takes something within
/// `send_timeout`, it stays.
#[tokio::test]
async fn a_device_that_reads_slowly_is_not_closed() {
    let stage = Stage::with(&[
        ("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SEND_TIMEOUT", "2s"),
        ("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SNDBUF", "16KiB"),
    ])
    .await;
    let mut device = stage.small_device().await;
    let sent = pattern(1 << 20);
    stage.adapter.send(&device.conn, sent.clone()).await.ok();
    let mut received = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        received.extend(device.read(16 * 1024).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let rest = sent.len() - received.len();
    received.extend(device.read(rest).await);
    assert_same(&received, &sent);
    assert_eq!(stage.handler.names(&device.conn), ["created"]);
    stage.finish().await;
}

/// A handler that waits in Send for a device that does not read is not blamed for
/// answering late.
#[tokio::test]
async fn a_handler_that_waits_for_the_device_is_not_late() {
    let stage = Stage::with(&[
        ("HANDLER__REQUEST_TIMEOUT", "700ms"),
        ("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SNDBUF", "16KiB"),
    ])
    .await;
    let adapter = stage.adapter.clone();
    stage.handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if matches!(&event.call, Call::Bytes(bytes) if bytes.starts_with(b"go")) {
                for _ in 0..4 {
                    adapter.send(&event.conn, pattern(1 << 20)).await.ok();
                }
            }
            Ok(())
        }
    });
    let mut device = stage.small_device().await;
    device.send("go").await;
    stage.handler.bytes(&device.conn, 2).await;
    // The device is busy with something else, for longer than a handler may be.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    device.read(4 << 20).await;
    device.send("and on").await;
    stage.handler.bytes(&device.conn, 8).await;
    stage.finish().await;
}

/// An error of the handler's closes that connection, `handler_error`, and no other.
#[tokio::test]
async fn a_callback_that_fails_closes_its_connection_alone() {
    let stage = Stage::start().await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Bytes(bytes) if &bytes[..] == b"bad" => Err(Status::internal("no")),
            _ => Ok(()),
        }
    });
    let (mut bad, mut good) = (stage.device().await, stage.device().await);
    bad.send("bad").await;
    assert_eq!(bad.read_all().await, b"");
    assert_eq!(stage.closed(&bad).await, "handler_error");
    assert_eq!(
        stage.handler.names(&bad.conn),
        ["created", "bytes", "closed"]
    );
    good.send("good").await;
    stage.handler.bytes(&good.conn, 4).await;
    stage.finish().await;
}

/// A handler that refuses OnSocketCreated knows of the connection: it is told of its
/// end.
#[tokio::test]
async fn a_refused_creation_is_closed_and_said_so() {
    let stage = Stage::start().await;
    stage.handler.behave(|event| async move {
        match event.call {
            Call::Created(_) => Err(Status::permission_denied("not you")),
            _ => Ok(()),
        }
    });
    let mut device = stage.device().await;
    assert_eq!(device.read_all().await, b"");
    assert_eq!(stage.closed(&device).await, "handler_error");
    assert_eq!(stage.handler.names(&device.conn), ["created", "closed"]);
    stage.finish().await;
}

/// No answer within `request_timeout` is an error of the handler's.
#[tokio::test]
async fn a_callback_that_takes_too_long_closes_the_connection() {
    let stage = Stage::with(&[("HANDLER__REQUEST_TIMEOUT", "700ms")]).await;
    let gate = stage.handler.hold("bytes");
    let mut device = stage.device().await;
    let begun = Instant::now();
    device.send("x").await;
    assert_eq!(device.read_all().await, b"");
    assert!(begun.elapsed() >= Duration::from_millis(700));
    assert_eq!(stage.closed(&device).await, "handler_error");
    gate.open();
}

/// A handler that is away for longer than `max_outage`: `handler_unavailable`. One
/// that never was told of a connection is not told of its end.
#[tokio::test]
async fn an_outage_that_is_too_long_closes() {
    let broker = Broker::start().await;
    let keys = [("HANDLER__MAX_OUTAGE", "300ms")];
    let mut stage = Stage::assemble(broker, Handler::absent(), &keys).await;
    let begun = Instant::now();
    let mut unheard = Device::dial(stage.devices()).await;
    assert_eq!(unheard.read_all().await, b"");
    assert!(begun.elapsed() >= Duration::from_millis(300));
    stage.handler.up().await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    let heard = stage.device().await;
    let conns: HashSet<String> = stage.handler.events().into_iter().map(|e| e.conn).collect();
    assert_eq!(conns, HashSet::from([heard.conn.clone()]));
    stage.finish().await;
}

/// A drain: OnSocketClosed with `shutdown` for every connection, after the callback
/// in flight is done, and the devices see the end.
#[tokio::test]
async fn a_drain_finishes_callbacks_and_says_goodbye_to_all() {
    let stage = Stage::start().await;
    let gate = stage.handler.hold("bytes");
    let mut quiet = stage.device().await;
    let mut busy = stage.device().await;
    busy.send("work").await;
    stage.handler.bytes(&busy.conn, 4).await;
    let (quiet_conn, busy_conn) = (quiet.conn.clone(), busy.conn.clone());
    let Stage {
        gateway, handler, ..
    } = stage;
    let drain = tokio::spawn(gateway.drain());
    assert_eq!(quiet.read_all().await, b"");
    assert_eq!(handler.closed(&quiet_conn).await, "shutdown");
    assert_eq!(handler.names(&busy_conn), ["created", "bytes"]);
    gate.open();
    assert_eq!(busy.read_all().await, b"");
    assert_eq!(handler.closed(&busy_conn).await, "shutdown");
    drop((quiet, busy));
    let drained = within("the drain", drain).await.unwrap();
    assert_eq!((drained.connections, drained.publishes), (0, 0));
    handler.check();
}

/// A reset by the device: `socket_error: <detail>`.
#[tokio::test]
async fn a_reset_is_a_socket_error() {
    let stage = Stage::start().await;
    let device = stage.device().await;
    let conn = device.conn.clone();
    device.reset();
    let reason = stage.handler.closed(&conn).await;
    assert!(reason.starts_with("socket_error: "), "{reason}");
    assert!(reason.len() > "socket_error: ".len());
    stage.finish().await;
}

/// Half a megabyte through a handler that takes its time: every byte, in order.
#[tokio::test]
async fn bytes_arrive_whole_and_in_order_at_a_slow_handler() {
    let stage = Stage::start().await;
    stage.handler.behave(|event| async move {
        if matches!(event.call, Call::Bytes(_)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    });
    let mut device = stage.device().await;
    let sent = pattern(512 * 1024);
    for piece in sent.chunks(1000) {
        device.send(piece).await;
    }
    let conn = device.conn.clone();
    drop(device);
    assert_eq!(stage.handler.closed(&conn).await, "normal");
    assert_same(&stage.handler.bytes(&conn, sent.len()).await, &sent);
    stage.finish().await;
}

/// While a callback is in flight nothing is read ahead: the device's writes stall.
/// Later all of it arrives.
#[tokio::test]
async fn a_busy_handler_holds_the_device_back() {
    let recbuf = [("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__RECBUF", "32KiB")];
    let stage = Stage::with(&recbuf).await;
    let gate = stage.handler.hold("bytes");
    let mut device = stage.small_device().await;
    device.send("first").await;
    stage.handler.bytes(&device.conn, 5).await;
    let piece = pattern(16 * 1024);
    let mut sent = b"first".to_vec();
    loop {
        // A write that does not get done within half a second is blocked.
        let write = device.stream.write(&piece);
        match tokio::time::timeout(Duration::from_millis(500), write).await {
            Ok(count) => sent.extend_from_slice(&piece[..count.unwrap()]),
            Err(_) => break,
        }
        assert!(sent.len() < 8 << 20, "the gateway reads ahead");
    }
    assert_eq!(stage.handler.names(&device.conn), ["created", "bytes"]);
    let received = "exproto_received_bytes_total{listener=\"tcp.default\"}";
    let received = stage.admin.metric(received).await;
    assert!((received - 5.0).abs() < 0.5, "read ahead: {received}");
    gate.open();
    let arrived = stage.handler.bytes(&device.conn, sent.len()).await;
    assert_same(&arrived, &sent);
    stage.finish().await;
}

/// What comes while a callback is in flight comes in the next one together.
#[tokio::test]
async fn the_next_callback_carries_all_that_came_meanwhile() {
    let stage = Stage::start().await;
    let gate = stage.handler.hold("bytes");
    let mut device = stage.device().await;
    device.send("0").await;
    stage.handler.bytes(&device.conn, 1).await;
    for piece in ["1", "2", "3", "4"] {
        device.send(piece).await;
    }
    gate.open();
    assert_eq!(stage.handler.bytes(&device.conn, 5).await, b"01234");
    let names = stage.handler.names(&device.conn);
    assert_eq!(names, ["created", "bytes", "bytes"]);
    stage.finish().await;
}

/// Sends megabytes and closes in one callback.
async fn send_and_close(stage: &Stage, megabytes: usize) {
    let adapter = stage.adapter.clone();
    stage.handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if let Call::Bytes(bytes) = &event.call
                && bytes.starts_with(b"go")
            {
                let all = bytes::Bytes::from(pattern(megabytes << 20));
                for at in (0..all.len()).step_by(1 << 20) {
                    let piece = all.slice(at..at + (1 << 20));
                    adapter.send(&event.conn, piece).await.ok();
                }
                adapter.close(&event.conn).await.ok();
            }
            Ok(())
        }
    });
}

/// Send then Close: a device that reads slowly gets every byte before the end.
#[tokio::test]
async fn a_close_waits_until_a_slow_device_has_everything() {
    let sndbuf = [("LISTENERS__TCP__DEFAULT__TCP_OPTIONS__SNDBUF", "64KiB")];
    let stage = Stage::with(&sndbuf).await;
    send_and_close(&stage, 4).await;
    let mut device = stage.small_device().await;
    device.send("go").await;
    let mut received = Vec::new();
    let mut piece = vec![0; 64 * 1024];
    loop {
        let count = within("bytes", device.stream.read(&mut piece))
            .await
            .unwrap();
        if count == 0 {
            break;
        }
        received.extend_from_slice(&piece[..count]);
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    assert_same(&received, &pattern(4 << 20));
    assert_eq!(stage.closed(&device).await, "closed_by_handler");
    stage.finish().await;
}

/// Send then Close: a device that goes on sending, unread, still gets every byte;
/// no reset takes them away.
#[tokio::test]
async fn a_close_delivers_also_to_a_device_that_keeps_sending() {
    let stage = Stage::start().await;
    send_and_close(&stage, 4).await;
    let mut device = stage.device().await;
    device.send("go").await;
    let (mut reader, mut writer) = device.stream.into_split();
    let chatter =
        tokio::spawn(async move { while writer.write_all(&[b'x'; 4096]).await.is_ok() {} });
    let mut received = Vec::new();
    let expected = pattern(4 << 20);
    within("everything and the end", reader.read_to_end(&mut received))
        .await
        .unwrap();
    assert_same(&received, &expected);
    assert_eq!(
        stage.handler.closed(&device.conn).await,
        "closed_by_handler"
    );
    within("the end of a device that never stops", chatter)
        .await
        .unwrap();
    stage.finish().await;
}

/// Sends keep the order of the calls.
#[tokio::test]
async fn sends_arrive_in_the_order_of_the_calls() {
    let stage = Stage::start().await;
    let mut device = stage.device().await;
    let mut expected = String::new();
    for number in 0..200 {
        let text = format!("{number};");
        stage.adapter.send(&device.conn, text.clone()).await.ok();
        expected.push_str(&text);
    }
    assert_eq!(device.read_text(expected.len()).await, expected);
    stage.finish().await;
}

/// A device that sends a question and no more, `nc -N` for one, gets its answer
/// before the end.
#[tokio::test]
async fn a_half_closed_device_gets_its_answer() {
    let stage = Stage::start().await;
    let adapter = stage.adapter.clone();
    stage.handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if matches!(event.call, Call::Bytes(_)) {
                adapter.send(&event.conn, "answer").await.ok();
            }
            Ok(())
        }
    });
    let mut device = stage.device().await;
    device.send("question").await;
    device.finish().await;
    assert_eq!(device.read_all().await, b"answer");
    assert_eq!(stage.closed(&device).await, "normal");
    stage.finish().await;
}

/// Every adapter call works inside the callback that the gateway waits for.
#[tokio::test]
async fn adapter_calls_work_inside_callbacks() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("up").await;
    let adapter = stage.adapter.clone();
    let done = Arc::new(AtomicUsize::new(0));
    let count = done.clone();
    stage.handler.behave(move |event| {
        let (adapter, count) = (adapter.clone(), count.clone());
        async move {
            let conn = &event.conn;
            match event.call {
                Call::Created(_) => {
                    adapter.authenticate(conn, "inside").await.ok();
                    adapter.subscribe(conn, "down", 1).await.ok();
                    adapter.subscribe(conn, "else", 1).await.ok();
                    adapter.start_timer(conn, 1000).await.ok();
                }
                Call::Bytes(bytes) => {
                    adapter.publish(conn, "up", 1, bytes).await.ok();
                    adapter.unsubscribe(conn, "else").await.ok();
                    adapter.raw_publish("up", 1, "raw").await.ok();
                }
                Call::Messages(messages) => {
                    let payload = messages[0].payload.clone();
                    adapter.send(conn, payload).await.ok();
                    adapter.close(conn).await.ok();
                }
                _ => return Ok(()),
            }
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    });
    let mut device = stage.device().await;
    device.send("hello").await;
    assert_eq!(peer.next_text().await, ("up".into(), 1, "hello".into()));
    assert_eq!(peer.next_text().await, ("up".into(), 1, "raw".into()));
    peer.publish("down", 1, "world").await;
    assert_eq!(device.read_all().await, b"world");
    assert_eq!(stage.closed(&device).await, "closed_by_handler");
    // A call that was refused would have ended its callback with a panic.
    assert_eq!(done.load(Ordering::Relaxed), 3);
    stage.finish().await;
}

/// A callback that goes on after it closed its connection learns that it is gone.
#[tokio::test]
async fn nothing_is_accepted_after_a_close() {
    let stage = Stage::start().await;
    let device = stage.client("closing").await;
    let gone = ResultCode::ConnProcessNotAlive;
    let gate = stage.handler.hold("closed");
    let (adapter, conn) = (&stage.adapter, &device.conn);
    adapter.close(conn).await.ok();
    stage.closed(&device).await;
    // It is being closed: OnSocketClosed is not answered yet.
    adapter.send(conn, "x").await.refused(gone);
    adapter.close(conn).await.refused(gone);
    adapter.start_timer(conn, 1).await.refused(gone);
    adapter.subscribe(conn, "t", 0).await.refused(gone);
    adapter.publish(conn, "t", 0, "x").await.refused(gone);
    adapter.unsubscribe(conn, "t").await.refused(gone);
    adapter.authenticate(conn, "c").await.refused(gone);
    gate.open();
    stage.finish().await;
}

/// Listeners choose their handler, and a handler of two addresses shares the
/// connections out.
#[tokio::test]
async fn listeners_choose_their_handler_and_addresses_take_turns() {
    let broker = Broker::start().await;
    let (one, two, meters) = tokio::join!(Handler::start(), Handler::start(), Handler::start());
    let both = format!("{},{}", one.url(), two.url());
    let keys = [
        ("HANDLER__ADDRESS", both.as_str()),
        ("HANDLERS__METERS__ADDRESS", &meters.url()),
        ("LISTENERS__TCP__METERS__BIND", "127.0.0.1:0"),
        ("LISTENERS__TCP__METERS__HANDLER", "meters"),
        ("LISTENERS__TCP__OFF__BIND", "127.0.0.1:0"),
        ("LISTENERS__TCP__OFF__ENABLE", "false"),
        ("SHARDS", "1"),
    ];
    let stage = Stage::assemble(broker, one, &keys).await;
    within("the gateway to be ready", stage.gateway.ready()).await;
    // One of the two would do to be ready.
    let up = "exproto_handler_channels_up{handler=\"default\"}";
    stage.admin.metric_until(up, |n| n > 1.5).await;
    let listeners = &stage.gateway.addresses().listeners;
    assert_eq!(listeners.len(), 2, "{listeners:?}");
    let meter = Device::dial(listeners["tcp.meters"]).await;
    meters.created(meter.port()).await;
    let mut devices = Vec::new();
    for _ in 0..4 {
        devices.push(Device::dial(stage.devices()).await);
    }
    let two_created = |log: &common::Log| (log.events.len() == 2).then_some(());
    stage.handler.wait("two of four", two_created).await;
    two.wait("the other two", two_created).await;
    assert_eq!(meters.events().len(), 1);
    stage.finish().await;
}

/// A panic or stall of one is nobody else's: while one handler call hangs, other
/// devices are served.
#[tokio::test]
async fn a_hanging_callback_holds_up_nobody_else() {
    let stage = Stage::with(&[("SHARDS", "1")]).await;
    let gate = Gate::closed();
    let held = gate.clone();
    let first = Arc::new(AtomicBool::new(true));
    stage.handler.behave(move |event| {
        let hang = matches!(event.call, Call::Bytes(_)) && first.swap(false, Ordering::Relaxed);
        let held = held.clone();
        async move {
            if hang {
                held.pass().await;
            }
            Ok(())
        }
    });
    let mut hangs = stage.device().await;
    hangs.send("x").await;
    stage.handler.bytes(&hangs.conn, 1).await;
    for _ in 0..10 {
        let mut other = stage.device().await;
        other.send("served").await;
        stage.handler.bytes(&other.conn, 6).await;
    }
    gate.open();
    stage.finish().await;
}
