//! What a broker of MQTT 5 says in its CONNACK that it has not, on a scripted one: the
//! gateway does without it, or refuses what needs it and keeps the link.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Broker, Device, Stage, within};
use exproto_sidecar::proto::ResultCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// No subscription identifiers (MQTT 5, 3.2.2.3.12).
const NO_IDENTIFIERS: &[u8] = b"\x20\x05\x00\x00\x02\x29\x00";

/// No subscriptions with wildcards, no shared ones (3.2.2.3.11 and 13).
const PLAIN_FILTERS_ONLY: &[u8] = b"\x20\x07\x00\x00\x04\x28\x00\x2a\x00";

/// Packets of at most 64 bytes (3.2.2.3.6).
const SMALL_PACKETS: &[u8] = b"\x20\x08\x00\x00\x05\x27\x00\x00\x00\x40";

/// A SUBSCRIBE that came.
#[derive(Debug, PartialEq, Eq)]
struct Subscribe {
    filter: String,
    /// Whether with properties.
    has_properties: bool,
}

/// A broker that takes every SUBSCRIBE, for one connection at a time.
struct Scripted {
    port: u16,
    subscribes: mpsc::UnboundedReceiver<Subscribe>,
    /// Sent to the client.
    packets: mpsc::UnboundedSender<Vec<u8>>,
    task: tokio::task::JoinHandle<()>,
}

/// What the broker sends upon a SUBSCRIBE.
#[derive(Clone, Copy)]
enum Answer {
    SubAck,
    /// And one retained message, on the topic `state`.
    SubAckRetained,
    /// The other way round.
    RetainedSubAck,
    /// SUBACKs with these codes in turn, over all connections; then with success.
    Codes(&'static [u8]),
    /// It ends so many connections right behind the CONNACK.
    Falls(&'static AtomicUsize),
    /// It hangs up upon the filter `poison` while this is set.
    HangsUp(&'static AtomicBool),
}

/// A PUBLISH of QoS 0 without properties.
fn publish(topic: impl AsRef<[u8]>, retain: bool, payload: &str) -> Vec<u8> {
    let topic = topic.as_ref();
    let length = 2 + topic.len() + 1 + payload.len();
    let mut packet = vec![0x30 | u8::from(retain), length as u8, 0, topic.len() as u8];
    packet.extend(topic);
    packet.push(0);
    packet.extend(payload.as_bytes());
    packet
}

/// First byte and body of the next packet. Not cancel safe.
async fn packet(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<(u8, Vec<u8>)> {
    let first = stream.read_u8().await.ok()?;
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = stream.read_u8().await.ok()?;
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((first, body))
}

impl Scripted {
    async fn start(connack: &'static [u8], answer: Answer) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (subscribed, subscribes) = mpsc::unbounded_channel();
        let (packets, mut to_send) = mpsc::unbounded_channel::<Vec<u8>>();
        let task = tokio::spawn(async move {
            let mut answered = 0;
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serve(
                    stream,
                    connack,
                    answer,
                    &mut answered,
                    &subscribed,
                    &mut to_send,
                )
                .await;
            }
        });
        Self {
            port,
            subscribes,
            packets,
            task,
        }
    }

    async fn stage(&self) -> Stage {
        let url = format!("mqtt://127.0.0.1:{}", self.port);
        let keys = [("BROKER__URL", url.as_str()), ("BROKER__POOL_SIZE", "1")];
        Stage::around(Broker::absent(""), &keys).await
    }

    async fn subscribe(&mut self) -> Subscribe {
        let subscribe = within("a SUBSCRIBE", self.subscribes.recv());
        subscribe.await.unwrap()
    }

    fn send(&self, packet: Vec<u8>) {
        self.packets.send(packet).unwrap();
    }

    /// Ends the connection.
    fn hang_up(&self) {
        self.send(Vec::new());
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: TcpStream,
    connack: &[u8],
    answer: Answer,
    answered: &mut usize,
    subscribed: &mpsc::UnboundedSender<Subscribe>,
    to_send: &mut mpsc::UnboundedReceiver<Vec<u8>>,
) {
    let (mut reader, mut writer) = stream.into_split();
    let (read, mut incoming) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(packet) = packet(&mut reader).await {
            let _ = read.send(packet);
        }
    });
    loop {
        let bytes = tokio::select! {
            // One without bytes is the end.
            Some(packet) = to_send.recv() => match packet.is_empty() {
                true => return,
                false => packet,
            },
            packet = incoming.recv() => match packet {
                Some((0x10, _)) => {
                    if let Answer::Falls(times) = answer
                        && times.load(Ordering::Relaxed) > 0
                    {
                        times.fetch_sub(1, Ordering::Relaxed);
                        let _ = writer.write_all(connack).await;
                        return;
                    }
                    connack.to_vec()
                }
                Some((0x82, body)) => {
                    let properties = usize::from(body[2]);
                    let filter = &body[3 + properties + 2..body.len() - 1];
                    if let Answer::HangsUp(upon) = answer
                        && upon.load(Ordering::Relaxed)
                        && filter == b"poison"
                    {
                        return;
                    }
                    let _ = subscribed.send(Subscribe {
                        filter: String::from_utf8(filter.to_vec()).unwrap(),
                        has_properties: properties > 0,
                    });
                    let code = match answer {
                        Answer::Codes(codes) => codes.get(*answered).copied().unwrap_or(1),
                        _ => 1,
                    };
                    *answered += 1;
                    let suback = vec![0x90, 0x04, body[0], body[1], 0, code];
                    let retained = publish("state", true, "kept");
                    match answer {
                        Answer::SubAckRetained => [suback, retained].concat(),
                        Answer::RetainedSubAck => [retained, suback].concat(),
                        _ => suback,
                    }
                }
                Some((0xa2, body)) => vec![0xb0, 0x04, body[0], body[1], 0, 0],
                Some((0xc0, _)) => vec![0xd0, 0x00],
                // A DISCONNECT, or the end.
                Some((0xe0, _)) | None => return,
                Some(_) => continue,
            },
        };
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn got(stage: &Stage, device: &Device, expected: &[&str]) {
    let payloads = stage.handler.payloads(&device.conn, expected.len()).await;
    assert_eq!(payloads, expected);
}

/// Without subscription identifiers the topic says for whom a message is.
#[tokio::test]
async fn without_identifiers_the_topic_decides() {
    let mut broker = Scripted::start(NO_IDENTIFIERS, Answer::SubAck).await;
    let stage = broker.stage().await;
    let mut devices = Vec::new();
    for (name, filter) in [("wide", "a/#"), ("one", "a/b"), ("same", "a/b")] {
        devices.push(stage.subscriber(name, filter, 1).await);
        let expected = Subscribe {
            filter: filter.to_owned(),
            has_properties: false,
        };
        assert_eq!(broker.subscribe().await, expected);
    }
    broker.send(publish("a/b", false, "for all"));
    broker.send(publish("a/c", false, "for one"));
    broker.send(publish("a/b", false, "the end"));
    got(&stage, &devices[0], &["for all", "for one", "the end"]).await;
    got(&stage, &devices[1], &["for all", "the end"]).await;
    got(&stage, &devices[2], &["for all", "the end"]).await;
    stage.finish().await;
}

/// Rule 4 there: what is retained is for the newcomer, whether the broker sends it
/// before or after the SUBACK.
#[tokio::test]
async fn without_identifiers_retained_messages_are_the_newcomers() {
    for answer in [Answer::SubAckRetained, Answer::RetainedSubAck] {
        let mut broker = Scripted::start(NO_IDENTIFIERS, answer).await;
        let stage = broker.stage().await;
        let mut devices = Vec::new();
        for name in ["first", "second", "third"] {
            let device = stage.subscriber(name, "state", 1).await;
            broker.subscribe().await;
            got(&stage, &device, &["kept"]).await;
            devices.push(device);
        }
        broker.send(publish("state", false, "live"));
        for device in &devices {
            got(&stage, device, &["kept", "live"]).await;
        }
        stage.finish().await;
    }
}

/// What the broker has not is refused at once, and nothing is sent: it could end the
/// connection upon it, as ejabberd does.
#[tokio::test]
async fn a_subscription_of_a_kind_that_the_broker_has_not_is_refused() {
    let mut broker = Scripted::start(PLAIN_FILTERS_ONLY, Answer::SubAck).await;
    let stage = broker.stage().await;
    let device = stage.client("c").await;
    for (filter, missing) in [
        ("$share/g/a", "shared subscriptions"),
        ("a/#", "wildcards"),
        ("+/b", "wildcards"),
    ] {
        let answer = stage.subscribe(&device, filter, 1).await;
        let message = answer.refused(ResultCode::Unknown);
        assert!(message.contains(missing), "{message}");
    }
    stage.subscribe(&device, "a/b", 1).await.ok();
    assert_eq!(broker.subscribe().await.filter, "a/b");
    broker.send(publish("a/b", false, "x"));
    got(&stage, &device, &["x"]).await;
    let reconnects = stage.admin.metric("exproto_broker_reconnects_total").await;
    assert!(reconnects < 0.5);
    stage.finish().await;
}

/// What does not fit into the packets that the broker takes is refused at once (rule 10):
/// it would end the connection upon it.
#[tokio::test]
async fn what_is_larger_than_the_brokers_packets_is_refused() {
    let mut broker = Scripted::start(SMALL_PACKETS, Answer::SubAck).await;
    let stage = broker.stage().await;
    let device = stage.client("c").await;
    let long = "a/".repeat(40);
    let answer = stage.subscribe(&device, &long, 1).await;
    let message = answer.refused(ResultCode::Unknown);
    assert!(message.contains("64 bytes at most"), "{message}");
    let answer = stage.publish(&device, &long, 0, "x").await;
    let message = answer.refused(ResultCode::Unknown);
    assert!(message.contains("the broker's limit is 64"), "{message}");
    stage.subscribe(&device, "a/b", 1).await.ok();
    assert_eq!(broker.subscribe().await.filter, "a/b");
    broker.send(publish("a/b", false, "x"));
    got(&stage, &device, &["x"]).await;
    stage.finish().await;
}

/// A broker that comes back before what decides about permission refuses what it had
/// granted: it is asked again until it grants it, and the gauge tells of it.
#[tokio::test]
async fn a_subscription_that_is_not_restored_is_asked_for_again() {
    let answers = Answer::Codes(b"\x01\x01\x87\x01\x87\x01");
    let mut broker = Scripted::start(NO_IDENTIFIERS, answers).await;
    let stage = broker.stage().await;
    let first = stage.subscriber("first", "a", 1).await;
    let second = stage.subscriber("second", "b", 1).await;
    for _ in 0..2 {
        broker.subscribe().await;
    }
    broker.hang_up();
    let missing = "exproto_broker_subscriptions_missing";
    stage.admin.metric_until(missing, |n| n > 0.5).await;
    broker.subscribe().await;
    broker.subscribe().await;
    // Refused, and refused again.
    let filter = broker.subscribe().await.filter;
    assert_eq!(broker.subscribe().await.filter, filter);
    stage.admin.metric_until(missing, |n| n < 0.5).await;
    broker.send(publish("a", false, "for the first"));
    broker.send(publish("b", false, "for the second"));
    got(&stage, &first, &["for the first"]).await;
    got(&stage, &second, &["for the second"]).await;
    // What nobody wants any more is not missing.
    stage.finish().await;
}

/// A topic must be UTF-8 (MQTT 5, 1.5.4): a message of which it is not is for nobody, is
/// counted, and harms neither the link nor what follows.
#[tokio::test]
async fn a_topic_that_is_no_text_is_dropped_and_counted() {
    let mut broker = Scripted::start(NO_IDENTIFIERS, Answer::SubAck).await;
    let stage = broker.stage().await;
    let device = stage.subscriber("device", "#", 1).await;
    broker.subscribe().await;
    broker.send(publish(b"a/\xff\xfe", false, "for nobody"));
    broker.send(publish("a/b", false, "for the device"));
    got(&stage, &device, &["for the device"]).await;
    let dropped = "exproto_messages_dropped_total{reason=\"bad_topic\"}";
    assert_eq!(stage.admin.metric(dropped).await, 1.0);
    stage.finish().await;
}

const MISSING: &str = "exproto_broker_subscriptions_missing";

/// A broker that falls over again and again is no reason to forget what it was to be
/// asked: nothing proves that it was that.
#[tokio::test]
async fn no_subscription_is_blamed_for_a_broker_that_falls_by_itself() {
    let falls: &AtomicUsize = Box::leak(Box::default());
    let mut broker = Scripted::start(NO_IDENTIFIERS, Answer::Falls(falls)).await;
    let stage = broker.stage().await;
    let names = ["one", "two", "three", "four", "five"];
    let mut devices = Vec::new();
    for name in names {
        devices.push(stage.subscriber(name, name, 1).await);
        broker.subscribe().await;
    }
    falls.store(6, Ordering::Relaxed);
    broker.hang_up();
    let mut restored = Vec::new();
    for _ in names {
        restored.push(broker.subscribe().await.filter);
    }
    restored.sort();
    assert_eq!(restored, ["five", "four", "one", "three", "two"]);
    assert_eq!(falls.load(Ordering::Relaxed), 0);
    for (name, device) in names.iter().zip(&devices) {
        broker.send(publish(name, false, name));
        got(&stage, device, &[name]).await;
    }
    assert_eq!(stage.admin.metric(MISSING).await, 0.0);
    stage.finish().await;
}

/// One upon which the broker does hang up is found out and left out, and the gauge tells
/// of it until somebody asks for it anew and gets it.
#[tokio::test]
async fn a_subscription_upon_which_the_broker_hangs_up_is_left_out() {
    let upon: &AtomicBool = Box::leak(Box::default());
    let mut broker = Scripted::start(NO_IDENTIFIERS, Answer::HangsUp(upon)).await;
    let stage = broker.stage().await;
    let mut devices = Vec::new();
    for name in ["poison", "b", "c"] {
        devices.push(stage.subscriber(name, name, 1).await);
        broker.subscribe().await;
    }
    upon.store(true, Ordering::Relaxed);
    broker.hang_up();
    stage.admin.metric_until(MISSING, |n| n > 0.5).await;
    stage.admin.ready_until(200, "ready").await;
    for (name, device) in [("b", &devices[1]), ("c", &devices[2])] {
        broker.send(publish(name, false, name));
        got(&stage, device, &[name]).await;
    }
    // After another break, too: it is not asked for, and counted as missing.
    broker.hang_up();
    stage.admin.ready_until(200, "ready").await;
    assert_eq!(stage.admin.metric(MISSING).await, 1.0);
    upon.store(false, Ordering::Relaxed);
    let again = stage.subscriber("again", "poison", 1).await;
    stage.admin.metric_until(MISSING, |n| n < 0.5).await;
    broker.send(publish("poison", false, "for both"));
    got(&stage, &again, &["for both"]).await;
    got(&stage, &devices[0], &["for both"]).await;
    stage.finish().await;
}
