//! A user's service, scripted by the test.
//!
//! It runs on a runtime of its own, so that it can be killed as a process can. It
//! serves both services of the interface, records every callback, and watches over
//! what holds for every connection in every test: OnSocketCreated first,
//! OnSocketClosed last, never two callbacks at a time.

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use exproto_sidecar::proto::connection_handler_server::{
    ConnectionHandler, ConnectionHandlerServer,
};
use exproto_sidecar::proto::connection_unary_handler_server::{
    ConnectionUnaryHandler, ConnectionUnaryHandlerServer,
};
use exproto_sidecar::proto::{
    ConnInfo, EmptySuccess, Message, ReceivedBytesRequest, ReceivedMessagesRequest,
    SocketClosedRequest, SocketCreatedRequest, TimerTimeoutRequest, TimerType,
};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use super::{free_port, within};

/// A callback.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    Created(ConnInfo),
    Bytes(Bytes),
    Messages(Vec<Message>),
    Timer(TimerType),
    Closed(String),
}

/// A callback about a connection.
#[derive(Debug, Clone)]
pub struct Event {
    pub conn: String,
    pub call: Call,
}

/// Everything that came, in order.
#[derive(Debug, Default)]
pub struct Log {
    pub events: Vec<Event>,
    states: HashMap<String, State>,
    /// Streams that ended well: the callback and how many messages each had.
    pub streams: Vec<(&'static str, usize)>,
    /// Answers a stream after its first message.
    pub hasty: bool,
    /// Reads no stream before this is open.
    pub deaf: Option<Gate>,
    /// Bytes and messages of one connection may come at the same time.
    pub shared_streams: bool,
    /// The callbacks that came, each with its headers.
    pub headers: Vec<(&'static str, MetadataMap)>,
    /// Rules of the interface that were broken.
    faults: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    in_flight: Vec<&'static str>,
    created: bool,
    closed: bool,
}

type Reply = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
type Behaviour = Arc<dyn Fn(Event) -> Reply + Send + Sync>;

/// Holds callbacks until the test lets them go.
#[derive(Clone, Debug)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    pub fn closed() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    pub async fn pass(&self) {
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// See the module.
pub struct Handler {
    pub host: IpAddr,
    pub port: u16,
    /// Encrypts, from the next start on.
    pub tls: Option<ServerTlsConfig>,
    /// Tells its health, from the next start on.
    pub health: Option<HealthReporter>,
    /// Calls that it allows at a time, from the next start on.
    pub max_calls: Option<u32>,
    service: Service,
    runtime: Option<Runtime>,
}

#[derive(Clone)]
struct Service {
    log: Arc<watch::Sender<Log>>,
    behaviour: Arc<Mutex<Behaviour>>,
}

impl Handler {
    /// A handler that takes everything.
    pub async fn start() -> Self {
        let mut handler = Self::absent();
        handler.up().await;
        handler
    }

    /// A handler that is not there yet.
    pub fn absent() -> Self {
        Self::absent_at(Ipv4Addr::LOCALHOST.into(), free_port())
    }

    /// One that will listen there.
    pub fn absent_at(host: IpAddr, port: u16) -> Self {
        let nothing: Behaviour = Arc::new(|_| Box::pin(async { Ok(()) }));
        Self {
            host,
            port,
            tls: None,
            health: None,
            max_calls: None,
            service: Service {
                log: Arc::new(watch::Sender::new(Log::default())),
                behaviour: Arc::new(Mutex::new(nothing)),
            },
            runtime: None,
        }
    }

    /// Starts it; returns when it listens.
    pub async fn up(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = SocketAddr::new(self.host, self.port);
        let bound = runtime.spawn(async move {
            let listener = TcpListener::bind(address).await.unwrap();
            TcpIncoming::from(listener).with_nodelay(Some(true))
        });
        let incoming = bound.await.unwrap();
        let unary = ConnectionUnaryHandlerServer::new(self.service.clone());
        let streaming = ConnectionHandlerServer::new(self.service.clone());
        let mut server = Server::builder().max_concurrent_streams(self.max_calls);
        if let Some(tls) = &self.tls {
            server = server.tls_config(tls.clone()).unwrap();
        }
        let health = self
            .health
            .clone()
            .map(|reporter| HealthServer::new(HealthService::from_health_reporter(reporter)));
        runtime.spawn(async move {
            server
                .add_service(unary)
                .add_service(streaming)
                .add_optional_service(health)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        self.runtime = Some(runtime);
    }

    /// Ends it in the middle of whatever it does.
    pub async fn kill(&mut self) {
        let runtime = self.runtime.take();
        // Waits for its thread, which a runtime's own thread may not.
        tokio::task::spawn_blocking(move || drop(runtime))
            .await
            .unwrap();
    }

    pub fn url(&self) -> String {
        format!("http://{}", SocketAddr::new(self.host, self.port))
    }

    /// What it does in each callback from now on.
    pub fn behave<F, R>(&self, behaviour: F)
    where
        F: Fn(Event) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let behaviour: Behaviour = Arc::new(move |event| Box::pin(behaviour(event)));
        *self.service.behaviour.lock().unwrap() = behaviour;
    }

    /// Holds every callback of this name, such as `bytes`, until the gate is opened.
    pub fn hold(&self, name: &'static str) -> Gate {
        let gate = Gate::closed();
        let held = gate.clone();
        self.behave(move |event| {
            let held = held.clone();
            async move {
                if event.call.name() == name {
                    held.pass().await;
                }
                Ok(())
            }
        });
        gate
    }

    /// How it treats the streams of `ConnectionHandler`, and what is known of them.
    pub fn streams<T>(&self, change: impl FnOnce(&mut Log) -> T) -> T {
        let mut result = None;
        self.service
            .log
            .send_modify(|log| result = Some(change(log)));
        result.unwrap()
    }

    /// Everything that came so far.
    pub fn events(&self) -> Vec<Event> {
        self.service.log.borrow().events.clone()
    }

    /// Waits until `look` finds what it wants in the log.
    pub async fn wait<T>(&self, what: &str, mut look: impl FnMut(&Log) -> Option<T>) -> T {
        let mut log = self.service.log.subscribe();
        let waited = within(what, async {
            loop {
                if let Some(found) = look(&log.borrow_and_update()) {
                    return found;
                }
                log.changed().await.unwrap();
            }
        });
        waited.await
    }

    /// Waits until the handler was told of the device with this local port.
    pub async fn created(&self, port: u16) -> String {
        let what = format!("OnSocketCreated of port {port}");
        self.wait(&what, |log| {
            log.events.iter().rev().find_map(|event| match &event.call {
                Call::Created(info) if info.peername.as_ref()?.port == u32::from(port) => {
                    Some(event.conn.clone())
                }
                _ => None,
            })
        })
        .await
    }

    /// Waits for the end of a connection and gives the reason.
    pub async fn closed(&self, conn: &str) -> String {
        let what = format!("OnSocketClosed of {conn}");
        self.wait(&what, |log| {
            log.of(conn).find_map(|call| match call {
                Call::Closed(reason) => Some(reason.clone()),
                _ => None,
            })
        })
        .await
    }

    /// Waits until at least so many bytes came from a device, and gives them all.
    pub async fn bytes(&self, conn: &str, count: usize) -> Vec<u8> {
        let what = format!("{count} bytes of {conn}");
        self.wait(&what, |log| {
            let length: usize = log
                .of(conn)
                .map(|call| match call {
                    Call::Bytes(bytes) => bytes.len(),
                    _ => 0,
                })
                .sum();
            (length >= count).then(|| log.bytes(conn))
        })
        .await
    }

    /// Waits until at least so many messages came to a connection, and gives them all.
    pub async fn messages(&self, conn: &str, count: usize) -> Vec<Message> {
        let what = format!("{count} messages to {conn}");
        self.wait(&what, |log| {
            let messages = log.messages(conn);
            (messages.len() >= count).then_some(messages)
        })
        .await
    }

    /// The payloads of [`Handler::messages`] as text.
    pub async fn payloads(&self, conn: &str, count: usize) -> Vec<String> {
        let messages = self.messages(conn, count).await;
        let text = |m: Message| String::from_utf8(m.payload.to_vec()).unwrap();
        messages.into_iter().map(text).collect()
    }

    /// The names of the callbacks about a connection, in order.
    pub fn names(&self, conn: &str) -> Vec<&'static str> {
        let log = self.service.log.borrow();
        log.of(conn).map(Call::name).collect()
    }

    /// Asserts the rules that hold for every connection.
    #[track_caller]
    pub fn check(&self) {
        let log = self.service.log.borrow();
        assert!(log.faults.is_empty(), "{:#?}", log.faults);
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Call {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created(_) => "created",
            Self::Bytes(_) => "bytes",
            Self::Messages(_) => "messages",
            Self::Timer(_) => "timer",
            Self::Closed(_) => "closed",
        }
    }
}

impl Log {
    /// The callbacks about one connection.
    pub fn of<'a>(&'a self, conn: &'a str) -> impl Iterator<Item = &'a Call> {
        let events = self.events.iter();
        events
            .filter(move |event| event.conn == conn)
            .map(|event| &event.call)
    }

    /// All bytes of one device.
    pub fn bytes(&self, conn: &str) -> Vec<u8> {
        let mut all = Vec::new();
        for call in self.of(conn) {
            if let Call::Bytes(bytes) = call {
                all.extend_from_slice(bytes);
            }
        }
        all
    }

    /// All messages to one connection.
    pub fn messages(&self, conn: &str) -> Vec<Message> {
        let mut all = Vec::new();
        for call in self.of(conn) {
            if let Call::Messages(messages) = call {
                all.extend_from_slice(messages);
            }
        }
        all
    }

    fn begin(&mut self, event: &Event) {
        let state = self.states.entry(event.conn.clone()).or_default();
        let mut wrong = Vec::new();
        let name = event.call.name();
        let together = self.shared_streams && matches!(name, "bytes" | "messages");
        let beside =
            |other: &str| together && other != name && matches!(other, "bytes" | "messages");
        if !state.in_flight.iter().all(|other| beside(other)) {
            wrong.push("a second callback at a time");
        }
        state.in_flight.push(name);
        if state.closed {
            wrong.push("a callback after OnSocketClosed");
        }
        if state.created == matches!(event.call, Call::Created(_)) {
            wrong.push("OnSocketCreated is not the first, or not the only one");
        }
        for wrong in wrong {
            self.faults.push(format!("{wrong}: {event:?}"));
        }
        self.events.push(event.clone());
    }

    /// `failed` is the status, if it was an error. One that the gateway tries again
    /// never happened.
    fn end(&mut self, event: &Event, failed: Option<Code>) {
        let state = self.states.entry(event.conn.clone()).or_default();
        let name = event.call.name();
        if let Some(at) = state.in_flight.iter().position(|other| *other == name) {
            state.in_flight.swap_remove(at);
        }
        if failed == Some(Code::Unavailable) {
            return;
        }
        match event.call {
            Call::Created(_) => state.created = true,
            Call::Closed(_) => state.closed = true,
            _ => {}
        }
    }
}

/// Ends a callback also when it is cut off.
struct InFlight<'a> {
    log: &'a watch::Sender<Log>,
    event: Event,
    failed: Option<Code>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let (event, failed) = (&self.event, self.failed);
        self.log.send_if_modified(|log| {
            log.end(event, failed);
            false
        });
    }
}

impl Service {
    /// What a call carries; its headers are noted.
    fn opened<T>(&self, name: &'static str, request: Request<T>) -> T {
        let (headers, _, message) = request.into_parts();
        self.log
            .send_modify(|log| log.headers.push((name, headers)));
        message
    }

    async fn take(&self, conn: String, call: Call) -> Result<Response<EmptySuccess>, Status> {
        let event = Event { conn, call };
        let behaviour = self.behaviour.lock().unwrap().clone();
        self.log.send_modify(|log| log.begin(&event));
        let mut in_flight = InFlight {
            log: &self.log,
            event: event.clone(),
            // What is cut off may be tried again.
            failed: Some(Code::Unavailable),
        };
        let result = behaviour(event).await;
        in_flight.failed = result.as_ref().err().map(Status::code);
        drop(in_flight);
        result.map(|()| Response::new(EmptySuccess {}))
    }
}

type Taken = Result<Response<EmptySuccess>, Status>;

#[tonic::async_trait]
impl ConnectionUnaryHandler for Service {
    async fn on_socket_created(&self, request: Request<SocketCreatedRequest>) -> Taken {
        let request = self.opened("created", request);
        let call = Call::Created(request.conninfo.unwrap_or_default());
        self.take(request.conn, call).await
    }

    async fn on_socket_closed(&self, request: Request<SocketClosedRequest>) -> Taken {
        let request = self.opened("closed", request);
        self.take(request.conn, Call::Closed(request.reason)).await
    }

    async fn on_received_bytes(&self, request: Request<ReceivedBytesRequest>) -> Taken {
        let request = self.opened("bytes", request);
        self.take(request.conn, Call::Bytes(request.bytes)).await
    }

    async fn on_timer_timeout(&self, request: Request<TimerTimeoutRequest>) -> Taken {
        let request = self.opened("timer", request);
        let call = Call::Timer(request.r#type());
        self.take(request.conn, call).await
    }

    async fn on_received_messages(&self, request: Request<ReceivedMessagesRequest>) -> Taken {
        let request = self.opened("messages", request);
        self.take(request.conn, Call::Messages(request.messages))
            .await
    }
}

impl Service {
    /// Takes the messages of a stream one after another, until its end.
    async fn take_all<M: Send + 'static>(
        &self,
        name: &'static str,
        stream: Request<Streaming<M>>,
        call: impl Fn(M) -> (String, Call),
    ) -> Taken {
        let mut stream = self.opened(name, stream);
        let mut count = 0;
        loop {
            let pause = self.log.borrow().deaf.clone();
            if let Some(gate) = pause {
                gate.pass().await;
            }
            let Some(message) = stream.message().await? else {
                self.log.send_modify(|log| log.streams.push((name, count)));
                return Ok(Response::new(EmptySuccess {}));
            };
            count += 1;
            let (conn, call) = call(message);
            self.take(conn, call).await?;
            if self.log.borrow().hasty {
                return Ok(Response::new(EmptySuccess {}));
            }
        }
    }
}

#[tonic::async_trait]
impl ConnectionHandler for Service {
    async fn on_socket_created(&self, stream: Request<Streaming<SocketCreatedRequest>>) -> Taken {
        let call =
            |m: SocketCreatedRequest| (m.conn, Call::Created(m.conninfo.unwrap_or_default()));
        self.take_all("created", stream, call).await
    }

    async fn on_socket_closed(&self, stream: Request<Streaming<SocketClosedRequest>>) -> Taken {
        let call = |m: SocketClosedRequest| (m.conn, Call::Closed(m.reason));
        self.take_all("closed", stream, call).await
    }

    async fn on_received_bytes(&self, stream: Request<Streaming<ReceivedBytesRequest>>) -> Taken {
        let call = |m: ReceivedBytesRequest| (m.conn, Call::Bytes(m.bytes));
        self.take_all("bytes", stream, call).await
    }

    async fn on_timer_timeout(&self, stream: Request<Streaming<TimerTimeoutRequest>>) -> Taken {
        let call = |m: TimerTimeoutRequest| {
            let timer = m.r#type();
            (m.conn, Call::Timer(timer))
        };
        self.take_all("timer", stream, call).await
    }

    async fn on_received_messages(
        &self,
        stream: Request<Streaming<ReceivedMessagesRequest>>,
    ) -> Taken {
        let call = |m: ReceivedMessagesRequest| (m.conn, Call::Messages(m.messages));
        self.take_all("messages", stream, call).await
    }
}
