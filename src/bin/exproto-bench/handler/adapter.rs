//! The handler's client of the gateway's ConnectionAdapter.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{
    AuthenticateRequest, ClientInfo, CloseSocketRequest, CodeResponse, PublishRequest, ResultCode,
    SendBytesRequest, SubscribeRequest,
};
use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::{Code, Status};

use crate::failure::Failure;

/// Flow-control windows, in bytes. Half of the connection's bounds what small answers may
/// cost that have come and are not read yet, 250 each (h2 closes the connection beyond):
/// tens of thousands may come in one burst.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;

/// An open connection to the adapter. Cheap to clone.
#[derive(Clone)]
pub struct Adapter {
    client: ConnectionAdapterClient<Channel>,
}

#[derive(Clone)]
struct Channel {
    sender: SendRequest<Body>,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx).map_err(unavailable)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.sender.send_request(request);
        Box::pin(async move { answer.await.map_err(unavailable) })
    }
}

fn unavailable(error: hyper::Error) -> Status {
    Status::unavailable(error.to_string())
}

/// Why a call did not do what it was asked.
pub type Refusal = String;

impl Adapter {
    /// Connects on the runtime in which it is called.
    ///
    /// # Errors
    /// Nobody is there, or somebody who does not speak HTTP/2.
    pub async fn connect(address: &str, limit: Duration) -> Result<Self, Failure> {
        let connecting = tokio::time::timeout(limit, dial(address));
        let result = match connecting.await {
            Ok(result) => result,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        };
        result.map_err(|error| unanswered(address, &error.to_string()))
    }

    /// Waits until it answers a call: a gateway that hangs lets anybody connect.
    ///
    /// # Errors
    /// No answer within `limit`, or somebody who does not speak gRPC.
    pub async fn answers(&self, address: &str, limit: Duration) -> Result<(), Failure> {
        // Of no connection: whatever it answers, it is there.
        let request = CloseSocketRequest {
            conn: "exproto-bench".to_owned(),
        };
        let mut client = self.client.clone();
        let reason = match tokio::time::timeout(limit, client.close(request)).await {
            Ok(Err(status)) if status.code() == Code::Unavailable => status.message().to_owned(),
            Ok(_) => return Ok(()),
            Err(_) => format!("connected, but no answer to a call within {limit:?}"),
        };
        Err(unanswered(address, &reason))
    }

    pub async fn authenticate(&self, conn: &str, clientid: &str) -> Result<(), Refusal> {
        let request = AuthenticateRequest {
            conn: conn.to_owned(),
            clientinfo: Some(ClientInfo {
                proto_name: "exproto-bench".to_owned(),
                proto_ver: "1".to_owned(),
                clientid: clientid.to_owned(),
                username: clientid.to_owned(),
                mountpoint: String::new(),
            }),
            password: String::new(),
        };
        let answer = self.client.clone().authenticate(request).await;
        read("Authenticate", answer)
    }

    pub async fn subscribe(&self, conn: &str, topic: &str, qos: u32) -> Result<(), Refusal> {
        let request = SubscribeRequest {
            conn: conn.to_owned(),
            topic: topic.to_owned(),
            qos,
        };
        read("Subscribe", self.client.clone().subscribe(request).await)
    }

    pub async fn publish(
        &self,
        conn: &str,
        topic: &str,
        qos: u32,
        payload: bytes::Bytes,
    ) -> Result<(), Refusal> {
        let request = PublishRequest {
            conn: conn.to_owned(),
            topic: topic.to_owned(),
            qos,
            payload,
        };
        read("Publish", self.client.clone().publish(request).await)
    }

    pub async fn close(&self, conn: &str) -> Result<(), Refusal> {
        let request = CloseSocketRequest {
            conn: conn.to_owned(),
        };
        read("Close", self.client.clone().close(request).await)
    }

    pub async fn send(&self, conn: &str, bytes: bytes::Bytes) -> Result<(), Refusal> {
        let request = SendBytesRequest {
            conn: conn.to_owned(),
            bytes,
        };
        read("Send", self.client.clone().send(request).await)
    }
}

fn unanswered(address: &str, reason: &str) -> Failure {
    Failure::Gateway(format!(
        "the gateway's adapter at {address} does not answer: {reason} (--adapter)"
    ))
}

async fn dial(address: &str) -> io::Result<Adapter> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let handshake = builder.handshake(TokioIo::new(tcp)).await;
    let (sender, connection) = handshake.map_err(io::Error::other)?;
    tokio::spawn(async move {
        // Calls fail from then on, and are counted.
        let _ = connection.await;
    });
    let origin = Uri::builder()
        .scheme("http")
        .authority(address)
        .path_and_query("/")
        .build()
        .map_err(io::Error::other)?;
    let client = ConnectionAdapterClient::with_origin(Channel { sender }, origin);
    Ok(Adapter { client })
}

/// SUCCESS, or the reason in words.
fn read(what: &str, answer: Result<tonic::Response<CodeResponse>, Status>) -> Result<(), Refusal> {
    match answer {
        Ok(answer) if answer.get_ref().code() == ResultCode::Success => Ok(()),
        Ok(answer) => {
            let answer = answer.into_inner();
            let (code, message) = (answer.code().as_str_name(), answer.message);
            Err(format!("{what}: {code} {message}"))
        }
        Err(status) => Err(format!("{what}: {} {}", status.code(), status.message())),
    }
}
