//! A fault of the gateway's own, which no device can bring about from outside.

use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::machine::Timeouts;
use super::{Limits, ListenerContext, Policy, Registry, Settings, serve};
use crate::handler::{CallFailure, Caller, Event, EventSink, Handlers};
use crate::id::{NodeTag, ShardId};
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
struct Recorder(Arc<Mutex<Vec<String>>>);

impl EventSink for Recorder {
    fn deliver(&self, _: Arc<Caller>, event: Event) -> BoxFuture<'static, Result<(), CallFailure>> {
        let text = match event {
            Event::SocketClosed(reason) => format!("closed: {reason}"),
            event => event.method().to_owned(),
        };
        self.0.lock().unwrap().push(text);
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Handlers for Recorder {
    fn assign(&self) -> Arc<dyn EventSink> {
        Arc::new(self.clone())
    }
}

#[tokio::test]
async fn a_panic_ends_its_connection_alone_and_the_handler_is_told() {
    let metrics = Metrics::new().unwrap();
    let recorder = Recorder::default();
    let registry = Arc::new(Registry::new(NodeTag::of("node"), 1));
    let context = Arc::new(ListenerContext {
        name: "tcp.test".to_owned(),
        shard: ShardId(0),
        settings: Settings {
            timeouts: Timeouts {
                reap: false,
                idle: None,
                authenticate: None,
                send: Duration::from_secs(1),
            },
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
            node_name: "node".to_owned(),
        },
        handlers: Arc::new(recorder.clone()),
        registry: registry.clone(),
        metrics: ListenerMetrics::new(&metrics, "tcp.test"),
        draining: CancellationToken::new(),
    });
    let address = "127.0.0.1:1".parse().unwrap();
    let peer = PeerInfo {
        certificate: None,
        kind: Kind::Tcp,
        peer: address,
        local: address,
    };
    serve(Faulty, peer, context).await;
    let events = recorder.0.lock().unwrap().clone();
    assert_eq!(
        events,
        ["OnSocketCreated", "closed: socket_error: internal error"]
    );
    assert!(registry.is_empty());
    let page = metrics.handle().render();
    let panics = r#"exproto_connection_panics_total{listener="tcp.test"} 1"#;
    assert!(page.contains(panics), "{page}");
}
