//! What no device can bring about over a transport of today: a fault of the gateway's
//! own, and datagrams one by one.

use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::machine::Timeouts;
use super::{Limits, ListenerContext, Policy, Registry, Settings, serve};
use crate::handler::{CallFailure, Caller, Event, EventSink, Handlers};
use crate::id::{HandlerName, NodeTag, ShardId};
use crate::metrics::{ListenerMetrics, Metrics};
use crate::transport::{Kind, PeerInfo, Received, Socket};

/// A socket with a fault in it.
struct Faulty;

impl Socket for Faulty {
    const STREAM: bool = true;

    fn poll_receive(&mut self, _: &mut Context<'_>, _: &mut [u8]) -> Poll<io::Result<Received>> {
        panic!("a fault of the test's");
    }

    fn poll_send(&mut self, _: &mut Context<'_>, _: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}

/// A handler that takes everything and remembers it.
#[derive(Clone, Default)]
struct Recorder {
    events: Arc<Mutex<Vec<String>>>,
    conn: Arc<Mutex<String>>,
}

impl EventSink for Recorder {
    fn deliver(
        &self,
        caller: Arc<Caller>,
        event: Event,
    ) -> BoxFuture<'static, Result<(), CallFailure>> {
        let text = match event {
            Event::SocketClosed(reason) => format!("closed: {reason}"),
            event => event.method().to_owned(),
        };
        self.events.lock().unwrap().push(text);
        *self.conn.lock().unwrap() = caller.conn.to_string();
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Handlers for Recorder {
    fn assign(&self) -> Arc<dyn EventSink> {
        Arc::new(self.clone())
    }
}

/// A context of its own for one connection.
fn context(metrics: &Metrics, recorder: &Recorder) -> Arc<ListenerContext> {
    Arc::new(ListenerContext {
        name: "tcp.test".to_owned(),
        shard: ShardId(0),
        settings: Settings {
            timeouts: Arc::new(Timeouts {
                reap: false,
                idle: None,
                authenticate: None,
                send: Duration::from_secs(1),
            }),
            high_watermark: 1024,
            max_bytes_rate: None,
            max_messages_rate: None,
            queue: Limits {
                max_messages: 1,
                max_bytes: 1,
                policy: Policy::DropOldest,
            },
            max_batch: 1,
            mountpoint: String::new(),
            clientinfo_mountpoint: false,
            enable_authn: true,
            disconnect_denied: false,
            node_name: "node".to_owned(),
        },
        handler: HandlerName::new("default"),
        handlers: Arc::new(recorder.clone()),
        registry: Arc::new(Registry::new(NodeTag::of("node"), 1)),
        metrics: ListenerMetrics::new(metrics, "tcp.test"),
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

#[tokio::test]
async fn a_panic_ends_its_connection_alone_and_the_handler_is_told() {
    let metrics = Metrics::new().unwrap();
    let recorder = Recorder::default();
    let context = context(&metrics, &recorder);
    serve(Faulty, &peer(), context.clone(), ()).await;
    let events = recorder.events.lock().unwrap().clone();
    assert_eq!(
        events,
        ["OnSocketCreated", "closed: socket_error: internal error"]
    );
    assert!(context.registry.is_empty());
    let page = metrics.handle().render();
    let panics = r#"exproto_connection_panics_total{listener="tcp.test"} 1"#;
    assert!(page.contains(panics), "{page}");
}

/// A socket for datagrams that sends one in two attempts.
struct Datagrams {
    sent: tokio::sync::mpsc::UnboundedSender<Vec<Vec<u8>>>,
    busy: bool,
}

impl Socket for Datagrams {
    const STREAM: bool = false;

    fn poll_receive(&mut self, _: &mut Context<'_>, _: &mut [u8]) -> Poll<io::Result<Received>> {
        Poll::Pending
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.busy = !self.busy;
        if self.busy {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let given = chunks.iter().map(|chunk| chunk.to_vec()).collect();
        self.sent.send(given).unwrap();
        Poll::Ready(Ok(chunks[0].len()))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn unacknowledged(&self) -> usize {
        0
    }

    fn abort(&mut self) {}
}

#[tokio::test]
async fn what_is_sent_goes_out_as_one_datagram_each_empty_ones_too() {
    let metrics = Metrics::new().unwrap();
    let recorder = Recorder::default();
    let context = context(&metrics, &recorder);
    let (sent, mut datagrams) = tokio::sync::mpsc::unbounded_channel();
    let socket = Datagrams { sent, busy: false };
    let served = tokio::spawn(serve(socket, &peer(), context.clone(), ()));
    let handle = loop {
        tokio::task::yield_now().await;
        let conn = recorder.conn.lock().unwrap().clone();
        if let Ok(handle) = context.registry.find(&conn) {
            break handle;
        }
    };
    let large = [b'x'; 1000];
    let pieces: [&'static [u8]; 6] = [b"", b"", b"one", b"", b"two", b""];
    for piece in pieces {
        handle.send(Bytes::from_static(piece)).await.unwrap();
    }
    // Two of them are more than may wait: the second answers when the first is sent.
    handle.send(Bytes::copy_from_slice(&large)).await.unwrap();
    handle.send(Bytes::copy_from_slice(&large)).await.unwrap();
    for piece in pieces.into_iter().chain([&large[..], &large]) {
        assert_eq!(datagrams.recv().await.unwrap(), [piece]);
    }
    // Nothing is left over in what is counted.
    handle
        .send(Bytes::copy_from_slice(&[0; 1024]))
        .await
        .unwrap();
    handle.close(super::CloseReason::ClosedByHandler).unwrap();
    served.await.unwrap();
}
