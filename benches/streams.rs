//! What an OnReceivedBytes costs, as a call and on a stream: processor time of the
//! gateway's side, and of it and the handler's together, both real, over loopback.
//!
//! `cargo bench --bench streams`

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use exproto_sidecar::handler::client::{Client, OnUnavailable, Options};
use exproto_sidecar::handler::resolve::{Directory, Place, System, Target};
use exproto_sidecar::handler::{Caller, Event, EventSink, Handlers, link, pool, streaming};
use exproto_sidecar::id::{ConnId, NodeTag, ShardId};
use exproto_sidecar::metrics::{HandlerMetrics, Metrics};
use exproto_sidecar::proto::connection_handler_server::{
    ConnectionHandler, ConnectionHandlerServer,
};
use exproto_sidecar::proto::{
    ConnInfo, EmptySuccess, ReceivedBytesRequest, ReceivedMessagesRequest, SocketClosedRequest,
    SocketCreatedRequest, TimerTimeoutRequest,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// Of everything that may take time.
const LIMIT: Duration = Duration::from_secs(5);

/// Bytes of a device in one callback.
const PAYLOAD: [u8; 64] = [7; 64];

/// Devices that send at the same time.
const CONNECTIONS: usize = 200;

/// Reads every stream to its end.
struct Reader;

async fn read<M>(stream: Request<Streaming<M>>) -> Result<Response<EmptySuccess>, Status> {
    let mut stream = stream.into_inner();
    while stream.message().await?.is_some() {}
    Ok(Response::new(EmptySuccess {}))
}

type Taken = Result<Response<EmptySuccess>, Status>;

#[tonic::async_trait]
impl ConnectionHandler for Reader {
    async fn on_socket_created(&self, stream: Request<Streaming<SocketCreatedRequest>>) -> Taken {
        read(stream).await
    }

    async fn on_socket_closed(&self, stream: Request<Streaming<SocketClosedRequest>>) -> Taken {
        read(stream).await
    }

    async fn on_received_bytes(&self, stream: Request<Streaming<ReceivedBytesRequest>>) -> Taken {
        read(stream).await
    }

    async fn on_timer_timeout(&self, stream: Request<Streaming<TimerTimeoutRequest>>) -> Taken {
        read(stream).await
    }

    async fn on_received_messages(
        &self,
        stream: Request<Streaming<ReceivedMessagesRequest>>,
    ) -> Taken {
        read(stream).await
    }
}

/// Serves on a thread of its own; gives the port.
fn serve() -> u16 {
    let (tell, port) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        runtime().block_on(async move {
            let any = (Ipv4Addr::LOCALHOST, 0);
            let listener = tokio::net::TcpListener::bind(any).await.unwrap();
            tell.send(listener.local_addr().unwrap().port()).unwrap();
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let service = ConnectionHandlerServer::new(Reader);
            let server = Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
    });
    port.recv().unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Of this thread, or of all.
fn processor_time(whose: libc::c_int) -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the pointer is to room for what is written.
    #[allow(unsafe_code)]
    let usage = unsafe {
        assert_eq!(libc::getrusage(whose, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

async fn measure(port: u16, streaming: Option<streaming::Options>, each: usize) {
    let name = if streaming.is_some() {
        "stream"
    } else {
        "calls"
    };
    let metrics = HandlerMetrics::new(&Metrics::new().unwrap(), "bench");
    let place = Place::Port {
        host: "127.0.0.1".to_owned(),
        port,
    };
    let target = Target::new("bench".to_owned(), place, None, LIMIT, LIMIT).unwrap();
    let directory = Directory::new(vec![target], Arc::new(System), None);
    let options = Options {
        service: "ConnectionHandler",
        service_advice: String::new(),
        request_timeout: Duration::from_secs(5),
        close_timeout: Duration::from_secs(5),
        on_unavailable: OnUnavailable::Hold(None),
        at_least_once: true,
        grpc_timeout: false,
        trace_context: false,
        pool: pool::Options {
            max_in_flight: 900,
            failover_after: None,
            link: link::Options {
                health: None,
                pings: None,
            },
        },
        streaming,
    };
    let client = Client::new(options, directory, metrics, CancellationToken::new(), 0).unwrap();
    let client = Arc::new(client);
    let running = tokio::spawn(client.clone().run());
    let sink = client.assign();
    let times = || [libc::RUSAGE_THREAD, libc::RUSAGE_SELF].map(processor_time);
    let (begun, before) = (Instant::now(), times());
    let devices = (0..CONNECTIONS).map(|_| tokio::spawn(device(sink.clone(), each)));
    for device in devices.collect::<Vec<_>>() {
        device.await.unwrap();
    }
    let count = (CONNECTIONS * each) as f64;
    let after = times();
    let [own, both] = [0, 1].map(|i| (after[i] - before[i]).as_secs_f64() * 1e6 / count);
    let rate = count / begun.elapsed().as_secs_f64();
    println!(
        "{name}: {rate:.0} a second, {own:.2} µs of processor time each, {both:.2} with the handler"
    );
    running.abort();
}

/// Hands over so many events, as many at a time as it may.
async fn device(sink: Arc<dyn EventSink>, count: usize) {
    let conn = ConnId::generate(NodeTag::of("bench"), ShardId(0)).unwrap();
    let caller = Arc::new(Caller::new(conn));
    let created = Event::SocketCreated(ConnInfo::default());
    sink.deliver(caller.clone(), created).await.unwrap();
    let mut under_way = FuturesUnordered::new();
    let mut left = count;
    while left > 0 || !under_way.is_empty() {
        while left > 0 && (under_way.is_empty() || under_way.len() < sink.window(&caller, false)) {
            let event = Event::ReceivedBytes(Bytes::from_static(&PAYLOAD));
            under_way.push(sink.deliver(caller.clone(), event));
            left -= 1;
        }
        under_way.next().await.unwrap().unwrap();
    }
}

fn main() {
    let port = serve();
    let options = streaming::Options {
        max_messages: 1024,
        max_bytes: 256 * 1024,
        max_age: Duration::from_millis(5),
        at_least_once: true,
    };
    runtime().block_on(async {
        for _ in 0..3 {
            measure(port, None, 500).await;
            measure(port, Some(options.clone()), 10_000).await;
        }
    });
}
