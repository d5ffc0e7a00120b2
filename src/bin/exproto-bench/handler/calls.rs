//! The gRPC edge of the handler: both services of the interface.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use exproto_sidecar::proto::connection_handler_server::{
    ConnectionHandler, ConnectionHandlerServer,
};
use exproto_sidecar::proto::connection_unary_handler_server::{
    ConnectionUnaryHandler, ConnectionUnaryHandlerServer,
};
use exproto_sidecar::proto::{
    EmptySuccess, ReceivedBytesRequest, ReceivedMessagesRequest, SocketClosedRequest,
    SocketCreatedRequest, TimerTimeoutRequest,
};
use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use tokio::sync::{Semaphore, mpsc};
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::{Request, Response, Status, Streaming};

use super::connection::Event;
use super::{Adapter, Shared};

/// Events of a long stream that are read and not yet worked off. Beyond it the stream
/// is not read, which holds the gateway back.
const AHEAD: usize = 4096;

/// Largest callback that is read, in bytes.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// See the module. One for each connection of a gateway.
#[derive(Clone)]
pub(super) struct Handler {
    pub(super) shared: Arc<Shared>,
    pub(super) adapter: Adapter,
}

type Answer = Result<Response<EmptySuccess>, Status>;

fn done() -> Answer {
    Ok(Response::new(EmptySuccess {}))
}

impl Handler {
    /// The service of a gateway's connection.
    pub(super) fn into_service(self) -> Both {
        let streaming = Streams {
            handler: self.clone(),
            ahead: Arc::new(Semaphore::new(AHEAD)),
        };
        Both {
            unary: ConnectionUnaryHandlerServer::new(self).max_decoding_message_size(MAX_MESSAGE),
            streaming: ConnectionHandlerServer::new(streaming)
                .max_decoding_message_size(MAX_MESSAGE),
        }
    }

    fn created(&self, request: &SocketCreatedRequest) {
        self.shared.callbacks.add(1);
        self.shared.created.add(1);
        self.shared.connection(&request.conn);
    }

    fn closed(&self, request: &SocketClosedRequest) {
        self.shared.callbacks.add(1);
        self.shared.forget(&request.conn);
    }

    async fn event(&self, conn: &str, event: Event) {
        self.shared.callbacks.add(1);
        let connection = self.shared.connection(conn);
        connection.handle(event, &self.adapter, &self.shared).await;
    }
}

fn messages(request: ReceivedMessagesRequest) -> (String, Event) {
    let payloads = request.messages.into_iter().map(|message| message.payload);
    (request.conn, Event::Messages(payloads.collect()))
}

#[tonic::async_trait]
impl ConnectionUnaryHandler for Handler {
    async fn on_socket_created(&self, request: Request<SocketCreatedRequest>) -> Answer {
        self.created(request.get_ref());
        done()
    }

    async fn on_socket_closed(&self, request: Request<SocketClosedRequest>) -> Answer {
        self.closed(request.get_ref());
        done()
    }

    async fn on_received_bytes(&self, request: Request<ReceivedBytesRequest>) -> Answer {
        let request = request.into_inner();
        self.event(&request.conn, Event::Bytes(request.bytes)).await;
        done()
    }

    async fn on_timer_timeout(&self, _: Request<TimerTimeoutRequest>) -> Answer {
        done()
    }

    async fn on_received_messages(&self, request: Request<ReceivedMessagesRequest>) -> Answer {
        let (conn, event) = messages(request.into_inner());
        self.event(&conn, event).await;
        done()
    }
}

/// The streaming service. A stream may carry one event or all of all connections, so
/// each connection's events wait in a queue of their own.
struct Streams {
    handler: Handler,
    ahead: Arc<Semaphore>,
}

impl Streams {
    /// Puts an event into its connection's queue, and waits for room where there is none.
    /// `working` is let go of when it was worked off.
    async fn event(
        &self,
        conn: &str,
        event: Event,
        working: mpsc::Sender<()>,
    ) -> Result<(), Status> {
        let shared = &self.handler.shared;
        shared.callbacks.add(1);
        let permit = self.ahead.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Status::unavailable("the handler has ended"))?;
        let connection = shared.connection(conn);
        if connection.enqueue(event, (permit, working)) {
            let (adapter, shared) = (self.handler.adapter.clone(), shared.clone());
            tokio::spawn(async move { connection.work_off(&adapter, &shared).await });
        }
        Ok(())
    }
}

/// The answer to a stream: what it carried was taken, so it waits until it is.
async fn answer(working: mpsc::Sender<()>, mut worked_off: mpsc::Receiver<()>) -> Answer {
    drop(working);
    // Nothing is ever sent: it ends when the last event has let go.
    let _ = worked_off.recv().await;
    done()
}

#[tonic::async_trait]
impl ConnectionHandler for Streams {
    async fn on_socket_created(&self, stream: Request<Streaming<SocketCreatedRequest>>) -> Answer {
        let mut stream = stream.into_inner();
        while let Some(request) = stream.message().await? {
            self.handler.created(&request);
        }
        done()
    }

    async fn on_socket_closed(&self, stream: Request<Streaming<SocketClosedRequest>>) -> Answer {
        let mut stream = stream.into_inner();
        while let Some(request) = stream.message().await? {
            self.handler.closed(&request);
        }
        done()
    }

    async fn on_received_bytes(&self, stream: Request<Streaming<ReceivedBytesRequest>>) -> Answer {
        let mut stream = stream.into_inner();
        let (working, worked_off) = mpsc::channel(1);
        while let Some(request) = stream.message().await? {
            self.event(&request.conn, Event::Bytes(request.bytes), working.clone())
                .await?;
        }
        answer(working, worked_off).await
    }

    async fn on_timer_timeout(&self, stream: Request<Streaming<TimerTimeoutRequest>>) -> Answer {
        let mut stream = stream.into_inner();
        while stream.message().await?.is_some() {}
        done()
    }

    async fn on_received_messages(
        &self,
        stream: Request<Streaming<ReceivedMessagesRequest>>,
    ) -> Answer {
        let mut stream = stream.into_inner();
        let (working, worked_off) = mpsc::channel(1);
        while let Some(request) = stream.message().await? {
            let (conn, event) = messages(request);
            self.event(&conn, event, working.clone()).await?;
        }
        answer(working, worked_off).await
    }
}

/// Both services at one address.
#[derive(Clone)]
pub(super) struct Both {
    unary: ConnectionUnaryHandlerServer<Handler>,
    streaming: ConnectionHandlerServer<Streams>,
}

impl Service<http::Request<Incoming>> for Both {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        // `/package.Service/Method`; a service that is neither is refused by either.
        let streaming = request
            .uri()
            .path()
            .starts_with("/emqx.exproto.v1.ConnectionHandler/");
        if streaming {
            Box::pin(self.streaming.call(request))
        } else {
            Box::pin(self.unary.call(request))
        }
    }
}
