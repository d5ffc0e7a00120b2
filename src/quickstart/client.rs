//! The handler's side of the adapter: a gRPC client over one HTTP/2 connection.

use std::io;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;

use crate::proto::connection_adapter_client::ConnectionAdapterClient;

/// Calls the adapter. Cheap to clone; clones share the connection.
pub(super) type AdapterClient = ConnectionAdapterClient<Channel>;

/// An open connection. The adapter lives as long as the process: it is not opened
/// again.
#[derive(Clone)]
pub(super) struct Channel {
    sender: SendRequest<Body>,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx).map_err(broken)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.sender.send_request(request);
        Box::pin(async move { answer.await.map_err(broken) })
    }
}

fn broken(error: hyper::Error) -> Status {
    Status::internal(format!("the adapter cannot be called: {error}"))
}

/// Connects; the connection is driven by the current runtime.
pub(super) async fn connect(address: SocketAddr) -> io::Result<AdapterClient> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection to the adapter ended");
        }
    });
    let origin: Uri = format!("http://{address}/")
        .parse()
        .map_err(io::Error::other)?;
    Ok(ConnectionAdapterClient::with_origin(
        Channel { sender },
        origin,
    ))
}
