//! See `crate::hot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

use super::link::hand_out;
use super::member::{Member, WriteWaiters};
use super::session::{Event, Session};
use super::table::Table;
use super::topic::{Mountpoint, TopicFilter, TopicName};
use super::trie::Trie;
use super::wire::{Decoder, Inbound, OutboundPublish, Welcome};
use super::{Address, Broker, Delivery, Options, Protocol, Publication, QoS, Subscriber};
use crate::id::MessageIds;
use crate::metrics::{BrokerMetrics, Metrics};
use crate::telemetry::Seldom;

const TOPIC: &str = "devices/device-1/up";
const PAYLOAD: &[u8] = &[7; 64];
const MAX_PACKET: u32 = 1024 * 1024;

/// What a publish tells of itself by default.
const PROPERTIES: [(&str, &str); 3] = [
    ("exproto-from", "device-1"),
    ("exproto-id", "0123456789abcdef0123456789abcdef"),
    ("exproto-timestamp", "1700000000000"),
];

pub(crate) fn topic_mounted() -> Box<dyn FnMut()> {
    let mountpoint = Mountpoint::resolve("tenants/${clientid}/", "device-1", "").unwrap();
    Box::new(move || {
        // The text comes out of a request.
        let topic = TopicName::parse(black_box(TOPIC).to_owned()).unwrap();
        drop(black_box(mountpoint.mount(topic).unwrap()));
    })
}

pub(crate) fn filter_checked() -> Box<dyn FnMut()> {
    Box::new(|| drop(black_box(TopicFilter::parse(black_box("devices/+/up/#")))))
}

/// A match of one filter among so many, each topic another's.
fn trie(filters: usize) -> Box<dyn FnMut()> {
    let mut trie = Trie::default();
    let text = |number: usize| format!("sites/{}/device-{number}/down", number % 100);
    for number in 0..filters {
        trie.insert(&TopicFilter::parse(&text(number)).unwrap(), number);
    }
    // Made beforehand, for only the match counts.
    let topics: Vec<String> = (0..4096).map(|n| text(n * 7919 % filters)).collect();
    let mut number = 0;
    Box::new(move || {
        number = (number + 1) % topics.len();
        let mut hits = 0;
        let topic = topics.get(number).map_or("", String::as_str);
        trie.matches(topic, |value| hits += usize::from(*value < filters));
        assert_eq!(black_box(hits), 1);
    })
}

pub(crate) fn trie_1() -> Box<dyn FnMut()> {
    trie(1)
}

pub(crate) fn trie_1_000() -> Box<dyn FnMut()> {
    trie(1_000)
}

pub(crate) fn trie_100_000() -> Box<dyn FnMut()> {
    trie(100_000)
}

/// A connection that throws away what it gets.
struct Nobody;

impl Subscriber for Nobody {
    fn deliver(&self, delivery: Delivery) -> Result<(), Delivery> {
        drop(black_box(delivery));
        Ok(())
    }
}

/// Whom a message is for that came for a filter with so many subscribers.
fn audience(subscribers: usize) -> Box<dyn FnMut()> {
    let mut table = Table::new(0);
    let filter = TopicFilter::parse("devices/#").unwrap();
    let subscribe = |_| {
        let (_, ask) = table.add(&filter, QoS::AtLeastOnce, Arc::new(Nobody), None);
        table.confirm("devices/#", ask.id, tokio::time::Instant::now());
        ask.id
    };
    let id = (0..subscribers).map(subscribe).last().unwrap();
    Box::new(move || {
        let audience = table.audience(TOPIC, false, &[id]);
        assert_eq!(black_box(audience).len(), subscribers);
    })
}

pub(crate) fn audience_1() -> Box<dyn FnMut()> {
    audience(1)
}

pub(crate) fn audience_1_000() -> Box<dyn FnMut()> {
    audience(1_000)
}

fn publish(protocol: Protocol) -> OutboundPublish {
    let (payload, properties) = (Bytes::from_static(PAYLOAD), PROPERTIES.into_iter());
    OutboundPublish::new(protocol, TOPIC, QoS::AtLeastOnce, payload, properties)
}

/// A publish as it is on the wire.
fn packet(protocol: Protocol) -> BytesMut {
    let mut out = BytesMut::new();
    publish(protocol).encode(7, false, &mut out);
    out
}

/// A publish made and written.
fn written(protocol: Protocol) -> Box<dyn FnMut()> {
    let mut out = BytesMut::with_capacity(64 * 1024);
    Box::new(move || {
        out.clear();
        let publish = publish(protocol);
        black_box(publish.size());
        publish.encode(7, false, &mut out);
        black_box(&out);
    })
}

pub(crate) fn v5_written() -> Box<dyn FnMut()> {
    written(Protocol::V5)
}

pub(crate) fn v4_written() -> Box<dyn FnMut()> {
    written(Protocol::V4)
}

/// The same packet, put into a buffer and taken off it.
fn read(protocol: Protocol, packet: BytesMut) -> Box<dyn FnMut()> {
    let mut decoder = Decoder::new(protocol, MAX_PACKET);
    let mut input = BytesMut::with_capacity(64 * 1024);
    Box::new(move || {
        input.extend_from_slice(&packet);
        let read = decoder.next(&mut input);
        assert!(matches!(black_box(read), Ok(Some(_))));
        // As before each read from the broker.
        input.reserve(64 * 1024);
    })
}

pub(crate) fn v5_read() -> Box<dyn FnMut()> {
    read(Protocol::V5, packet(Protocol::V5))
}

pub(crate) fn v4_read() -> Box<dyn FnMut()> {
    read(Protocol::V4, packet(Protocol::V4))
}

pub(crate) fn v5_ack_read() -> Box<dyn FnMut()> {
    let mut packet = BytesMut::new();
    Protocol::V5.puback(7, &mut packet);
    read(Protocol::V5, packet)
}

fn options() -> Arc<Options> {
    let second = Duration::from_secs(1);
    Arc::new(Options {
        addresses: vec![Address {
            url: "mqtt://broker".into(),
            host: "broker".to_owned(),
            port: 1883,
            tls: None,
        }],
        protocol: Protocol::V5,
        client_id: "exproto-1".to_owned(),
        pool_size: 1,
        login: None,
        keep_alive: 60 * second,
        connect_timeout: second,
        session_expiry: second,
        publish_timeout: 10 * second,
        outbox_max_messages: 10_000,
        outbox_max_bytes: 64 * 1024 * 1024,
        receive_maximum: 1024,
        max_packet_size: MAX_PACKET,
        reconnect: (second, second),
        from_property: Some("exproto-from".to_owned()),
        id_property: Some("exproto-id".to_owned()),
        timestamp_property: Some("exproto-timestamp".to_owned()),
        will: None,
        trace: false,
        own: false,
    })
}

/// A member whose link is up, and no socket.
struct Scene {
    options: Arc<Options>,
    metrics: BrokerMetrics,
    member: Arc<Member>,
    session: Session,
    out: BytesMut,
    runtime: Runtime,
}

impl Scene {
    fn new() -> Self {
        let (options, metrics) = (options(), BrokerMetrics::new(&Metrics::new().unwrap()));
        let client_id = "exproto-1-0".to_owned();
        let member = Member::new(0, client_id, options.clone(), metrics.clone()).unwrap();
        let welcome = Welcome {
            session_present: false,
            receive_maximum: 1024,
            max_qos: QoS::ExactlyOnce,
            max_packet_size: None,
            subscription_ids: true,
            shared_subscriptions: true,
            wildcards: true,
            keep_alive: None,
        };
        let mut session = Session::new(options.protocol, options.receive_maximum);
        let mut out = BytesMut::with_capacity(64 * 1024);
        session.connected(&welcome, &mut out);
        member.welcomed(&welcome);
        Self {
            options,
            metrics,
            member,
            session,
            out,
            runtime: Builder::new_current_thread().enable_time().build().unwrap(),
        }
    }

    /// The link's turn: what waits is written.
    fn pull(&mut self, written: &mut WriteWaiters) {
        self.out.clear();
        let cx = Context::from_waker(Waker::noop());
        let (session, out) = (&mut self.session, &mut self.out);
        assert!(!self.member.pull(&cx, session, out, 0, written));
    }
}

pub(crate) fn published() -> Box<dyn FnMut()> {
    let mut scene = Scene::new();
    let (options, metrics) = (scene.options.clone(), scene.metrics.clone());
    let broker = Broker::of_one(scene.member.clone(), options, metrics).unwrap();
    let from: Arc<str> = "device-1".into();
    let (mut waiters, mut pkid) = (WriteWaiters::new(), 0_u16);
    Box::new(move || {
        let timers = scene.runtime.handle().clone();
        let _timers = timers.enter();
        let publication = Publication {
            topic: TopicName::parse(TOPIC).unwrap(),
            qos: QoS::AtLeastOnce,
            payload: Bytes::from_static(PAYLOAD),
            from: Some(from.clone()),
            trace: None,
        };
        let mut confirmed = pin!(broker.publish(1, publication));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(confirmed.as_mut().poll(&mut cx).is_pending());
        scene.pull(&mut waiters);
        // As the session counts.
        pkid = pkid.checked_add(1).unwrap_or(1);
        scene
            .session
            .receive(Inbound::PubAck(pkid, Ok(())), &mut scene.out);
        assert_eq!(confirmed.as_mut().poll(&mut cx), Poll::Ready(Ok(())));
    })
}

pub(crate) fn received() -> Box<dyn FnMut()> {
    let mut scene = Scene::new();
    let filter = TopicFilter::parse(TOPIC).unwrap();
    let (waiter, answer) = oneshot::channel();
    let (qos, subscriber) = (QoS::AtLeastOnce, Arc::new(Nobody));
    let key = scene
        .member
        .subscribe(&filter, qos, subscriber, None, waiter);
    let mut waiters = WriteWaiters::new();
    scene.pull(&mut waiters);
    let ack = Inbound::SubAck(1, Ok(qos));
    let Event::Subscribed(filter, id) = scene.session.receive(ack, &mut scene.out) else {
        panic!("no subscription");
    };
    scene.member.subscribed(&filter, id);
    let ids = MessageIds::new().unwrap();
    let complaints = Seldom::default();
    let packet = packet(Protocol::V5);
    let mut decoder = Decoder::new(Protocol::V5, MAX_PACKET);
    let mut input = BytesMut::with_capacity(64 * 1024);
    Box::new(move || {
        black_box((&key, &answer));
        input.extend_from_slice(&packet);
        let Ok(Some(Inbound::Publish(mut read))) = decoder.next(&mut input) else {
            panic!("no packet");
        };
        // As if it had come with it.
        read.subscription_ids.push(id);
        let read = Inbound::Publish(read);
        let Event::Deliver(publish, receipt) = scene.session.receive(read, &mut scene.out) else {
            panic!("no message");
        };
        hand_out(&scene.member, &ids, &complaints, publish, receipt);
        // It was taken: the PUBACK is written.
        scene.pull(&mut waiters);
        assert_eq!(scene.out.len(), 4);
        input.reserve(64 * 1024);
    })
}
