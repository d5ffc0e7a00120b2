//! ConnectionAdapter: the gRPC edge. Each call becomes one command to the core.

pub mod tokens;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status};

use crate::auth::Secret;
use crate::connection::command::{Command, Commands, Credentials, Refusal};
use crate::metrics::{ADAPTER_METHODS, AdapterMetrics};
use crate::proto::connection_adapter_server::{ConnectionAdapter, ConnectionAdapterServer};
use crate::proto::{
    AuthenticateRequest, CloseSocketRequest, CodeResponse, PublishRequest, RawPublishRequest,
    ResultCode, SendBytesRequest, SubscribeRequest, TimerRequest, TimerType, UnsubscribeRequest,
};
use crate::reload::Current;

use tokens::{Doorkeeper, Tokens};

/// Calls that one handler connection may have open. A call waits for the broker or
/// for a slow device; calls beyond wait at the handler, so it must be far more than
/// the devices that can be slow at once.
const MAX_STREAMS: u32 = 65_536;

/// Flow-control windows: one large Send must not wait for a round trip.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// Longest TLS handshake of a handler.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A handler's machine that has gone silent is given up after so long without an
/// acknowledgement of what was sent to it (`TCP_USER_TIMEOUT`), and probed after so
/// long without a word.
const SILENCE: Duration = Duration::from_secs(20);

/// Serves handlers' connections. Cheap to clone.
#[derive(Clone)]
pub struct Adapter {
    service: InterceptedService<ConnectionAdapterServer<Calls>, Doorkeeper>,
    tls: Option<Arc<ServerConfig>>,
    metrics: AdapterMetrics,
}

impl Adapter {
    /// `max_message_size` in bytes bounds a request. Without `tokens` everybody may call.
    pub fn new(
        commands: Commands,
        max_message_size: usize,
        tls: Option<Arc<ServerConfig>>,
        tokens: Option<Arc<Current<Tokens>>>,
        metrics: AdapterMetrics,
    ) -> Self {
        let calls = Calls {
            commands,
            metrics: metrics.clone(),
        };
        let server =
            ConnectionAdapterServer::new(calls).max_decoding_message_size(max_message_size);
        let doorkeeper = Doorkeeper {
            tokens,
            refused: metrics.unauthenticated.clone(),
        };
        Self {
            service: InterceptedService::new(server, doorkeeper),
            tls,
            metrics,
        }
    }

    /// Serves one connection of a handler until it ends, or, once `stop` is
    /// cancelled, until the calls in flight are answered.
    pub async fn serve(
        self,
        stream: std::net::TcpStream,
        peer: SocketAddr,
        stop: CancellationToken,
    ) {
        self.metrics.connections.increment(1.0);
        let result = self.serve_stream(stream, stop).await;
        self.metrics.connections.decrement(1.0);
        if let Err(error) = result {
            tracing::debug!(%peer, %error, "a handler's connection to the adapter ended");
        }
    }

    async fn serve_stream(
        &self,
        stream: std::net::TcpStream,
        stop: CancellationToken,
    ) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&stream);
        socket.set_tcp_user_timeout(Some(SILENCE))?;
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(SILENCE)
                .with_interval(SILENCE),
        )?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        match &self.tls {
            None => self.serve_http(stream, stop).await,
            Some(tls) => {
                let handshake = TlsAcceptor::from(tls.clone()).accept(stream);
                let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await??;
                self.serve_http(stream, stop).await
            }
        }
    }

    async fn serve_http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let service = TowerToHyperService::new(self.service.clone());
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            biased;
            result = connection.as_mut() => return result.map_err(io::Error::other),
            () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
        }
        connection.await.map_err(io::Error::other)
    }
}

/// The eight calls.
#[derive(Clone)]
struct Calls {
    commands: Commands,
    metrics: AdapterMetrics,
}

impl Calls {
    async fn execute(
        &self,
        method: &'static str,
        conn: &str,
        command: Command,
    ) -> Result<Response<CodeResponse>, Status> {
        let result = self.commands.execute(conn, command).await;
        Ok(self.answer(method, conn, result))
    }

    fn answer(
        &self,
        method: &'static str,
        conn: &str,
        result: Result<(), Refusal>,
    ) -> Response<CodeResponse> {
        let (code, message) = match result {
            Ok(()) => {
                tracing::debug!(conn, method, "a handler's call is done");
                (ResultCode::Success, String::new())
            }
            Err(refusal) => {
                let code = refusal.code.as_str_name();
                let reason = &refusal.message;
                tracing::debug!(conn, method, code, reason, "a handler's call is refused");
                (refusal.code, refusal.message)
            }
        };
        let index = ADAPTER_METHODS.iter().position(|name| *name == method);
        self.metrics
            .answered(index.unwrap_or(usize::MAX), code.as_str_name());
        Response::new(CodeResponse {
            code: code.into(),
            message,
        })
    }
}

#[tonic::async_trait]
impl ConnectionAdapter for Calls {
    async fn send(
        &self,
        request: Request<SendBytesRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let SendBytesRequest { conn, bytes } = request.into_inner();
        self.execute("Send", &conn, Command::Send(bytes)).await
    }

    async fn close(
        &self,
        request: Request<CloseSocketRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let CloseSocketRequest { conn } = request.into_inner();
        self.execute("Close", &conn, Command::Close).await
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let AuthenticateRequest {
            conn,
            clientinfo,
            password,
        } = request.into_inner();
        let Some(info) = clientinfo else {
            let refusal = Refusal::new(ResultCode::RequiredParamsMissed, "clientinfo is missing");
            return Ok(self.answer("Authenticate", &conn, Err(refusal)));
        };
        let credentials = Credentials {
            proto_name: info.proto_name,
            proto_ver: info.proto_ver,
            clientid: info.clientid,
            username: info.username,
            mountpoint: info.mountpoint,
            password: Secret::new(password),
        };
        self.execute("Authenticate", &conn, Command::Authenticate(credentials))
            .await
    }

    async fn start_timer(
        &self,
        request: Request<TimerRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let TimerRequest {
            conn,
            r#type,
            interval,
        } = request.into_inner();
        if TimerType::try_from(r#type) != Ok(TimerType::Keepalive) {
            let refusal = Refusal::new(
                ResultCode::ParamsTypeError,
                format!("type is {type}, the only timer is KEEPALIVE (0)"),
            );
            return Ok(self.answer("StartTimer", &conn, Err(refusal)));
        }
        self.execute("StartTimer", &conn, Command::StartTimer(interval))
            .await
    }

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let PublishRequest {
            conn,
            topic,
            qos,
            payload,
        } = request.into_inner();
        let command = Command::Publish {
            topic,
            qos,
            payload,
        };
        self.execute("Publish", &conn, command).await
    }

    async fn subscribe(
        &self,
        request: Request<SubscribeRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let SubscribeRequest { conn, topic, qos } = request.into_inner();
        let command = Command::Subscribe { filter: topic, qos };
        self.execute("Subscribe", &conn, command).await
    }

    async fn unsubscribe(
        &self,
        request: Request<UnsubscribeRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let UnsubscribeRequest { conn, topic } = request.into_inner();
        let command = Command::Unsubscribe { filter: topic };
        self.execute("Unsubscribe", &conn, command).await
    }

    async fn raw_publish(
        &self,
        request: Request<RawPublishRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let RawPublishRequest {
            topic,
            qos,
            payload,
        } = request.into_inner();
        let result = self.commands.raw_publish(topic, qos, payload).await;
        Ok(self.answer("RawPublish", "", result))
    }
}
