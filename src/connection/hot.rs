//! See `crate::hot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::machine::Timeouts;
use super::queue::MessageQueue;
use super::{Connection, Handle, Limits, ListenerContext, Policy, Registry, Settings, serve};
use crate::broker::{Delivery, Message, QoS, Subscriber};
use crate::handler::{CallFailure, Caller, Event, EventSink, Handlers};
use crate::id::{HandlerName, MessageIds, NodeTag, ShardId};
use crate::metrics::{ListenerMetrics, Metrics};
use crate::transport::{Kind, PeerInfo, Received, Socket};

/// A device that sends 64 bytes when it is told to, and takes whatever comes.
struct Device(Arc<AtomicBool>);

impl Socket for Device {
    const STREAM: bool = true;

    fn poll_receive(
        &mut self,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>> {
        if !self.0.swap(false, Ordering::Relaxed) {
            return Poll::Pending;
        }
        let payload = [7; 64];
        buffer.iter_mut().zip(payload).for_each(|(to, b)| *to = b);
        Poll::Ready(Ok(Received::Bytes(payload.len())))
    }

    fn poll_send(
        &mut self,
        _: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(chunks.iter().map(|chunk| chunk.len()).sum()))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}

/// A handler that takes everything at once.
struct Taker;

impl EventSink for Taker {
    fn deliver(&self, _: Arc<Caller>, event: Event) -> BoxFuture<'static, Result<(), CallFailure>> {
        drop(black_box(event));
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Handlers for Taker {
    fn assign(&self) -> Arc<dyn EventSink> {
        Arc::new(Self)
    }
}

fn limits() -> Limits {
    Limits {
        max_messages: 1000,
        max_bytes: 1024 * 1024,
        policy: Policy::DropOldest,
    }
}

fn context() -> Arc<ListenerContext> {
    Arc::new(ListenerContext {
        name: "tcp.default".to_owned(),
        shard: ShardId(0),
        settings: Settings {
            timeouts: Arc::new(Timeouts {
                reap: false,
                idle: None,
                authenticate: None,
                send: Duration::from_secs(15),
            }),
            high_watermark: 64 * 1024,
            max_bytes_rate: None,
            max_messages_rate: None,
            queue: limits(),
            max_batch: 100,
            mountpoint: String::new(),
            clientinfo_mountpoint: false,
            enable_authn: true,
            disconnect_denied: false,
            node_name: "exproto-1".to_owned(),
        },
        handler: HandlerName::new("default"),
        handlers: Arc::new(Taker),
        registry: Arc::new(Registry::new(NodeTag::of("exproto-1"), 1)),
        metrics: ListenerMetrics::new(&Metrics::new().unwrap(), "tcp.default"),
        draining: CancellationToken::new(),
        complaints: crate::telemetry::Seldom::default(),
    })
}

fn peer() -> PeerInfo {
    let address = "127.0.0.1:1".parse().unwrap();
    PeerInfo {
        certificate: None,
        kind: Kind::Tcp,
        peer: address,
        local: address,
    }
}

/// A connection whose device is there and idle.
struct Scene {
    connection: Connection,
    handle: Handle,
    sends: Arc<AtomicBool>,
}

impl Scene {
    fn new() -> Self {
        let (context, sends) = (context(), Arc::default());
        let device = Device(Arc::clone(&sends));
        let connection = serve(device, &peer(), context.clone(), ());
        let mut handles = context.registry.handles();
        let mut scene = Self {
            connection,
            handle: handles.pop().unwrap(),
            sends,
        };
        scene.turn();
        scene
    }

    /// The connection's turn on its thread.
    fn turn(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(self.connection.as_mut().poll(&mut cx).is_pending());
    }
}

pub(crate) fn received() -> Box<dyn FnMut()> {
    let mut scene = Scene::new();
    Box::new(move || {
        scene.sends.store(true, Ordering::Relaxed);
        scene.turn();
    })
}

pub(crate) fn sent() -> Box<dyn FnMut()> {
    let mut scene = Scene::new();
    Box::new(move || {
        let sent = scene.handle.send(Bytes::from_static(&[7; 64]));
        assert_eq!(sent.now_or_never(), Some(Ok(())));
        scene.turn();
    })
}

/// A message as it comes from the broker.
fn delivery() -> Delivery {
    Delivery {
        message: Arc::new(Message {
            id: MessageIds::new().unwrap().next_id(),
            topic: "devices/device-1/down".to_owned(),
            payload: Bytes::from_static(&[7; 64]),
            from: "device-2".to_owned(),
            timestamp: 1_700_000_000_000,
            trace: None,
        }),
        qos: QoS::AtLeastOnce,
        _ack: None,
    }
}

/// Another subscriber's copy.
fn copy(delivery: &Delivery) -> Delivery {
    Delivery {
        message: delivery.message.clone(),
        qos: delivery.qos,
        _ack: None,
    }
}

pub(crate) fn delivered() -> Box<dyn FnMut()> {
    let (mut scene, message) = (Scene::new(), delivery());
    Box::new(move || {
        scene.handle.deliver(copy(&message)).unwrap();
        scene.turn();
    })
}

pub(crate) fn queued() -> Box<dyn FnMut()> {
    let (mut queue, limits, message) = (MessageQueue::default(), limits(), delivery());
    Box::new(move || {
        queue.push(copy(&message), &limits);
        drop(black_box(queue.take(100, 1024 * 1024)));
    })
}

pub(crate) fn looked_up() -> Box<dyn FnMut()> {
    let context = context();
    let connections = (0..10_000).map(|_| {
        let device = Device(Arc::default());
        serve(device, &peer(), context.clone(), ())
    });
    let connections: Vec<Connection> = connections.collect();
    let handles = context.registry.handles();
    let texts: Vec<String> = handles.iter().map(|handle| handle.id().text()).collect();
    let mut number = 0;
    Box::new(move || {
        black_box(&connections);
        number = (number + 7919) % texts.len();
        let found = texts.get(number).map(|text| context.registry.find(text));
        assert!(black_box(found).is_some_and(|found| found.is_ok()));
    })
}
