//! Handlers' connections to the adapter: over a Unix socket, how many and how old they may be, and
//! how long a caller waits.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::task::{Context, Poll};

use bytes::Bytes;
use common::{Adapter, Plan, Proxy, Stage, until, within};
use exproto_sidecar::config::AdapterBind;
use exproto_sidecar::gateway::Gateway;
use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{RawPublishRequest, ResultCode};
use futures_util::future::{BoxFuture, select_all};
use futures_util::stream::{self, StreamExt};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// One connection to the adapter, which unlike a channel of tonic's keeps no deadlines itself.
#[derive(Clone)]
struct Raw(SendRequest<Body>);

impl Raw {
    /// One, and what drives it.
    async fn open(stage: &Stage) -> (SendRequest<Body>, JoinHandle<hyper::Result<()>>) {
        let address = stage.gateway.addresses().adapter.tcp().unwrap();
        let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream);
        let (sender, connection) = within("HTTP/2", handshake).await.unwrap();
        (sender, tokio::spawn(connection))
    }

    async fn connect(stage: &Stage) -> ConnectionAdapterClient<Self> {
        let (sender, _) = Self::open(stage).await;
        ConnectionAdapterClient::with_origin(Self(sender), "http://adapter".parse().unwrap())
    }
}

impl Service<http::Request<Body>> for Raw {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

fn publish(topic: &str, timeout: Option<&str>) -> Request<RawPublishRequest> {
    let mut request = Request::new(RawPublishRequest {
        topic: topic.to_owned(),
        qos: 1,
        payload: "x".into(),
    });
    if let Some(timeout) = timeout {
        let timeout = timeout.parse().unwrap();
        request.metadata_mut().insert("grpc-timeout", timeout);
    }
    request
}

fn calls(code: &str) -> String {
    format!("exproto_adapter_calls_total{{method=\"RawPublish\",code=\"{code}\"}}")
}

/// Connects to a path, whatever the address.
struct Connector(PathBuf);

impl Service<http::Uri> for Connector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    }
}

/// A channel to a path.
async fn over_path(path: PathBuf) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_static("http://localhost");
    let connecting = endpoint.connect_with_connector(Connector(path));
    within("the adapter", connecting).await
}

/// `server.bind = "unix:/PATH"`: calls come over it, its file has `server.socket_mode`, a second
/// gateway is told that it is taken, what a killed one left is replaced, and the end removes it.
#[tokio::test]
async fn the_adapter_listens_on_a_unix_socket() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("adapter.sock");
    // Dropping it leaves the file, as a kill does.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let broker = common::Broker::start().await;
    let handler = common::Handler::start().await;
    let bind = format!("unix:{}", path.display());
    let plan = Plan::new(&broker.url(), &handler.url())
        .set("SERVER__BIND", &bind)
        .set("SERVER__SOCKET_MODE", "0600");
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    within("the gateway to be ready", gateway.ready()).await;
    assert_eq!(gateway.addresses().adapter, AdapterBind::Unix(path.clone()));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let adapter = Adapter::over(over_path(path.clone()).await.unwrap());
    adapter.raw_publish("t", 1, "x").await.ok();
    let mut device = common::Device::dial(gateway.addresses().listeners["tcp.default"]).await;
    let conn = handler.created(device.port()).await;
    adapter.send(&conn, "down").await.ok();
    assert_eq!(device.read(4).await, b"down");

    let Err(error) = Gateway::start(&plan.config()).await else {
        panic!("two gateways listen on one path");
    };
    let error = error.to_string();
    assert!(
        error.contains(&bind) && error.contains("server.bind"),
        "{error}"
    );
    drop((adapter, device));
    within("the drain", gateway.drain()).await;
    until("the file to be gone", || async {
        (!path.exists()).then_some(())
    })
    .await;
    over_path(path).await.unwrap_err();
}

/// `server.max_connections`: one more is closed and counted; when one has gone another may come.
#[tokio::test]
async fn connections_are_bounded() {
    let stage = Stage::with(&[("SERVER__MAX_CONNECTIONS", "2")]).await;
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let second = Adapter::connect(address).await;
    second.raw_publish("t", 0, "x").await.ok();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    if let Ok(channel) = within("an end", endpoint.connect()).await {
        Adapter::over(channel).try_send("x").await.unwrap_err();
    }
    let refused = "exproto_adapter_refused_total{reason=\"max_connections\"}";
    assert!(stage.admin.metric(refused).await >= 1.0);
    drop(second);
    stage
        .admin
        .metric_until("exproto_adapter_connections", |open| open < 1.5)
        .await;
    let next = Adapter::connect(address).await;
    next.raw_publish("t", 0, "x").await.ok();
    stage.finish().await;
}

/// `server.max_concurrent_streams`: a call beyond waits until one has ended.
#[tokio::test]
async fn calls_of_a_connection_are_bounded() {
    let mut stage = Stage::with(&[("SERVER__MAX_CONCURRENT_STREAMS", "1")]).await;
    // The limit is known to the client from here on.
    stage.adapter.raw_publish("t", 1, "x").await.ok();
    stage.broker.kill();
    let in_flight = tokio::spawn({
        let adapter = stage.adapter.clone();
        async move { adapter.raw_publish("t", 1, "x").await }
    });
    let outbox = "exproto_broker_outbox_messages";
    stage
        .admin
        .metric_until(outbox, |waiting| waiting > 0.5)
        .await;
    let mut next = tokio::spawn({
        let adapter = stage.adapter.clone();
        async move { adapter.send("", "x").await }
    });
    // Another connection is not held up, and its whole exchange is time enough for the call.
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let other = Adapter::connect(address).await;
    other
        .send("", "x")
        .await
        .refused(ResultCode::ParamsTypeError);
    assert!(futures_util::poll!(&mut next).is_pending());
    stage.broker.up().await;
    within("the call", in_flight).await.unwrap().ok();
    let answer = within("the next call", next).await.unwrap();
    answer.refused(ResultCode::ParamsTypeError);
    stage.finish().await;
}

/// Whether the client gave the call up before it went out.
fn never_sent(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<hyper::Error>() {
            return error.is_canceled();
        }
        source = error.source();
    }
    false
}

/// `server.max_connection_age`: connections are asked to go, and calls under way end well.
#[tokio::test]
async fn connections_are_renewed() {
    let mut stage = Stage::with(&[("SERVER__MAX_CONNECTION_AGE", "1s")]).await;
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let proxy = Proxy::to(address.port()).await;
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", proxy.port)).unwrap();
    let adapter = Adapter::over(within("the adapter", endpoint.connect()).await.unwrap());
    stage.broker.kill();
    let in_flight = tokio::spawn({
        let adapter = adapter.clone();
        async move { adapter.raw_publish("t", 1, "x").await }
    });
    // Two more connections: the first one is past its age, and a call is still under way on it.
    while proxy.connections() < 3 {
        match adapter.try_send("").await {
            Ok(answer) => assert_eq!(answer.code(), ResultCode::ParamsTypeError),
            // A call that tonic had not sent yet when its connection was asked to go.
            Err(status) => assert!(never_sent(&status), "{status:?}"),
        }
    }
    assert!(!in_flight.is_finished());
    stage.broker.up().await;
    within("the call", in_flight).await.unwrap().ok();
    stage.finish().await;
}

/// `grpc-timeout`: who does not wait any longer is answered so, a call that comes too late is not
/// done at all, and one with time enough is done.
#[tokio::test]
async fn the_callers_deadline_is_kept() {
    let mut stage = Stage::start().await;
    let mut client = Raw::connect(&stage).await;
    let in_time = client.raw_publish(publish("t", Some("1M"))).await.unwrap();
    assert_eq!(in_time.into_inner().code(), ResultCode::Success);
    let status = |result: Result<Response<_>, Status>| result.map(|_| ()).unwrap_err().code();

    let mut peer = common::Peer::connect(stage.broker.port).await;
    peer.subscribe("late/#").await;
    let late = client
        .raw_publish(publish("late/not-done", Some("0m")))
        .await;
    assert_eq!(status(late), Code::DeadlineExceeded);
    let done = client.raw_publish(publish("late/done", Some("1M"))).await;
    done.unwrap();
    assert_eq!(peer.next_text().await.0, "late/done");

    for malformed in ["soon", "1", "123456789S"] {
        let answer = client.raw_publish(publish("t", Some(malformed))).await;
        assert_eq!(status(answer), Code::Internal, "{malformed}");
    }
    stage.broker.kill();
    let waited = within("an answer", client.raw_publish(publish("t", Some("200m")))).await;
    assert_eq!(status(waited), Code::DeadlineExceeded);
    let exceeded = stage.admin.metric(&calls("DEADLINE_EXCEEDED")).await;
    assert_eq!(
        (exceeded, stage.admin.metric(&calls("INTERNAL")).await),
        (2.0, 3.0)
    );
    stage.broker.up().await;
    stage.finish().await;
}

/// A call that its caller gives up is counted as such.
#[tokio::test]
async fn calls_that_are_given_up_are_counted() {
    let mut stage = Stage::start().await;
    stage.broker.kill();
    let given_up = tokio::spawn({
        let adapter = stage.adapter.clone();
        async move { adapter.raw_publish("t", 1, "x").await }
    });
    let outbox = "exproto_broker_outbox_messages";
    stage
        .admin
        .metric_until(outbox, |waiting| waiting > 0.5)
        .await;
    given_up.abort();
    let cancelled = calls("CANCELLED");
    stage
        .admin
        .metric_until(&cancelled, |count| count > 0.5)
        .await;
    stage.broker.up().await;
    stage.finish().await;
}

/// A call of a handler's that is refused below the result codes is counted by its status.
#[tokio::test]
async fn calls_that_fail_are_counted() {
    let stage = Stage::with(&[("SERVER__MAX_MESSAGE_SIZE", "1KiB")]).await;
    let mut client = Raw::connect(&stage).await;
    let mut large = publish("t", None);
    large.get_mut().payload = vec![0; 2048].into();
    let status = client.raw_publish(large).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert!(stage.admin.metric(&calls("OUT_OF_RANGE")).await > 0.5);
    client.raw_publish(publish("t", None)).await.unwrap();
    stage.finish().await;
}

/// Requests that do not come to their end have only so much memory; then they are refused, and
/// when they have gone there is room again.
#[tokio::test]
async fn requests_that_are_not_whole_are_bounded() {
    const SIZE: usize = 4 * 1024 * 1024 - 64;
    let stage = Stage::start().await;
    let mut requests = Vec::new();
    for _ in 0..20 {
        let (mut sender, connection) = Raw::open(&stage).await;
        // All but the last bytes of a message, in pieces, and no end.
        let mut head = vec![0];
        head.extend(u32::try_from(SIZE).unwrap().to_be_bytes());
        let pieces = std::iter::once(head).chain(vec![vec![0; SIZE / 64]; 63]);
        let frames = pieces.map(|piece| Ok::<_, io::Error>(Frame::data(Bytes::from(piece))));
        let endless = stream::iter(frames).chain(stream::pending());
        let path = "http://adapter/emqx.exproto.v1.ConnectionAdapter/Send";
        let request = http::Request::post(path)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(StreamBody::new(endless)));
        let answer = sender.send_request(request.unwrap());
        requests.push((Box::pin(answer), connection));
    }
    let answers = requests.iter_mut().map(|(answer, _)| answer);
    let (refused, _, _) = within("a refusal", select_all(answers)).await;
    let headers = refused.unwrap().headers().clone();
    let status = Status::from_header_map(&headers).unwrap();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let unread = "exproto_adapter_refused_total{reason=\"unread\"}";
    assert!(stage.admin.metric(unread).await > 0.5);
    for (answer, connection) in requests {
        drop(answer);
        connection.abort();
    }
    let open = "exproto_adapter_connections";
    stage.admin.metric_until(open, |open| open < 1.5).await;
    stage
        .adapter
        .raw_publish("t", 1, vec![0; 1 << 20])
        .await
        .ok();
    stage.finish().await;
}

/// Who connects and says nothing does not keep its place.
#[tokio::test]
async fn a_silent_connection_is_closed() {
    let stage = Stage::start().await;
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    for stream in [&mut silent, &mut half] {
        let mut said = Vec::new();
        // The gateway's own first words, and the end; a reset where something was not read.
        let _ = within("the end", stream.read_to_end(&mut said)).await;
    }
    let failed = "exproto_adapter_refused_total{reason=\"handshake_failed\"}";
    stage.admin.metric_until(failed, |count| count > 1.5).await;
    stage.adapter.raw_publish("t", 1, "x").await.ok();
    stage.finish().await;
}

/// Watches of health are open to everybody, and there may be so many.
#[tokio::test]
async fn watches_of_health_are_bounded() {
    let stage = Stage::start().await;
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = within("the adapter", endpoint.connect()).await.unwrap();
    let mut client = HealthClient::new(channel);
    let whole = HealthCheckRequest::default();
    let mut watches = Vec::new();
    for _ in 0..1024 {
        watches.push(client.watch(whole.clone()).await.unwrap());
    }
    let status = client.watch(whole.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    client.check(whole.clone()).await.unwrap();
    watches.pop();
    until("room for a watch", || async {
        client.clone().watch(whole.clone()).await.ok()
    })
    .await;
    // A question is a service's name.
    let long = HealthCheckRequest {
        service: "x".repeat(2048),
    };
    let status = client.check(long).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    stage.finish().await;
}
