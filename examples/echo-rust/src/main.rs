//! An example handler: a device's bytes go up to MQTT, messages come down to the device.

use std::{collections::HashMap, error::Error, time::Duration};

use clap::Parser;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::Mutex,
};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};

mod exproto {
    tonic::include_proto!("emqx.exproto.v1");
}

use exproto::{
    connection_adapter_client::ConnectionAdapterClient,
    connection_unary_handler_server::{ConnectionUnaryHandler, ConnectionUnaryHandlerServer},
    *,
};

/// Below the gateway's `request_timeout`, so that no task works for a lost callback.
const ADAPTER_TIMEOUT: Duration = Duration::from_secs(4);

/// An MQTT message may be larger than gRPC's default of 4 MiB.
const MAX_CALLBACK_BYTES: usize = 64 * 1024 * 1024;

/// An example handler: a device's bytes go up to MQTT, messages come down to the device.
#[derive(Parser)]
struct Args {
    /// Where the gateway reaches this handler; port 0 takes a free one
    #[arg(long, env = "HANDLER_LISTEN", default_value = "127.0.0.1:9001")]
    listen: String,
    /// Where the gateway serves the ConnectionAdapter
    #[arg(long, env = "ADAPTER_ADDRESS", default_value = "127.0.0.1:9100")]
    adapter: String,
    /// Keepalive in seconds, 0 for no timer
    #[arg(long, env = "HANDLER_KEEPALIVE", default_value_t = 300)]
    keepalive: u32,
}

/// The gateway makes the calls about one connection one after another, those about many at once.
struct Handler {
    adapter: ConnectionAdapterClient<Channel>,
    keepalive: u32,
    /// conn -> clientid, until OnSocketClosed.
    clients: Mutex<HashMap<String, String>>,
}

impl Handler {
    /// The generated client wants `&mut self`; its clones share one HTTP/2 connection.
    fn adapter(&self) -> ConnectionAdapterClient<Channel> {
        self.adapter.clone()
    }

    async fn close(&self, conn: String) -> Result<(), Status> {
        let request = CloseSocketRequest { conn: conn.clone() };
        accepted("Close", &conn, self.adapter().close(request).await)?;
        Ok(())
    }
}

/// A refusal is an answer with a code and a message, not an error. An error (the gateway cannot be
/// reached) fails the callback, and then the gateway closes the connection. It is passed on as
/// `INTERNAL`: on `UNAVAILABLE` the gateway would call again, when half the work may be done.
fn accepted(
    call: &str,
    conn: &str,
    answer: Result<Response<CodeResponse>, Status>,
) -> Result<bool, Status> {
    let answer = answer.map_err(|status| {
        eprintln!("{call} failed: {status} (conn {conn})");
        Status::internal(format!("{call} failed: {status}"))
    })?;
    let CodeResponse { code, message } = answer.into_inner();
    let success = code == ResultCode::Success as i32;
    if !success {
        let name = ResultCode::try_from(code).map_or("?", |code| code.as_str_name());
        eprintln!("{call} refused: {code} {name} {message} (conn {conn})");
    }
    Ok(success)
}

/// A real protocol reads the device's id from its first bytes and authenticates then. This one has
/// none, so the address must do. Not the conn: whoever knows it can call the adapter with it, and
/// client ids show in topics.
fn clientid(info: &ConnInfo) -> String {
    let socktype = info.socktype().as_str_name().to_lowercase();
    let listener = info.sockname.clone().unwrap_or_default();
    let Address { host, port } = info.peername.clone().unwrap_or_default();
    format!("{socktype}{}-{host}-{port}", listener.port)
}

#[tonic::async_trait]
impl ConnectionUnaryHandler for Handler {
    async fn on_socket_created(
        &self,
        request: Request<SocketCreatedRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let SocketCreatedRequest { conn, conninfo } = request.into_inner();
        let clientid = clientid(&conninfo.unwrap_or_default());
        let request = AuthenticateRequest {
            conn: conn.clone(),
            clientinfo: Some(ClientInfo {
                proto_name: "echo".into(),
                proto_ver: "1".into(),
                clientid: clientid.clone(),
                username: "device".into(),
                ..Default::default()
            }),
            password: String::new(),
        };
        let answer = self.adapter().authenticate(request).await;
        if !accepted("Authenticate", &conn, answer)? {
            self.close(conn).await?;
            return Ok(Response::new(EmptySuccess {}));
        }
        let mut clients = self.clients.lock().await;
        clients.insert(conn.clone(), clientid.clone());
        drop(clients);

        if self.keepalive > 0 {
            let request = TimerRequest {
                conn: conn.clone(),
                r#type: TimerType::Keepalive.into(),
                interval: self.keepalive,
            };
            accepted(
                "StartTimer",
                &conn,
                self.adapter().start_timer(request).await,
            )?;
        }
        let (up, down) = (
            format!("devices/{clientid}/up"),
            format!("devices/{clientid}/down"),
        );
        let request = SubscribeRequest {
            conn: conn.clone(),
            topic: down.clone(),
            qos: 1,
        };
        accepted("Subscribe", &conn, self.adapter().subscribe(request).await)?;
        eprintln!("connected: {clientid} ({up}, {down})");
        Ok(Response::new(EmptySuccess {}))
    }

    async fn on_received_bytes(
        &self,
        request: Request<ReceivedBytesRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let ReceivedBytesRequest { conn, bytes } = request.into_inner();
        let clientid = self.clients.lock().await.get(&conn).cloned();
        if let Some(clientid) = clientid {
            let request = PublishRequest {
                conn: conn.clone(),
                topic: format!("devices/{clientid}/up"),
                qos: 1,
                payload: bytes,
            };
            accepted("Publish", &conn, self.adapter().publish(request).await)?;
        } else {
            // Older than this process: the device connects again and is then known.
            eprintln!("closing a connection from before the start (conn {conn})");
            self.close(conn).await?;
        }
        Ok(Response::new(EmptySuccess {}))
    }

    async fn on_received_messages(
        &self,
        request: Request<ReceivedMessagesRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let ReceivedMessagesRequest { conn, messages } = request.into_inner();
        // Those that arrived close together come in one call.
        for message in messages {
            let request = SendBytesRequest {
                conn: conn.clone(),
                bytes: message.payload,
            };
            if !accepted("Send", &conn, self.adapter().send(request).await)? {
                break;
            }
        }
        Ok(Response::new(EmptySuccess {}))
    }

    async fn on_timer_timeout(
        &self,
        request: Request<TimerTimeoutRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let conn = request.into_inner().conn;
        let clientid = self.clients.lock().await.get(&conn).cloned();
        eprintln!(
            "silent for too long: {}",
            clientid.as_ref().unwrap_or(&conn)
        );
        self.close(conn).await?;
        Ok(Response::new(EmptySuccess {}))
    }

    async fn on_socket_closed(
        &self,
        request: Request<SocketClosedRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let SocketClosedRequest { conn, reason } = request.into_inner();
        let clientid = self.clients.lock().await.remove(&conn);
        eprintln!("closed: {} ({reason})", clientid.unwrap_or(conn));
        Ok(Response::new(EmptySuccess {}))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let adapter = Endpoint::from_shared(format!("http://{}", args.adapter))?
        .connect_timeout(ADAPTER_TIMEOUT)
        .timeout(ADAPTER_TIMEOUT)
        .connect_lazy(); // the gateway may start later than this handler
    let handler = Handler {
        adapter: ConnectionAdapterClient::new(adapter),
        keepalive: args.keepalive,
        clients: Mutex::default(),
    };
    let service =
        ConnectionUnaryHandlerServer::new(handler).max_decoding_message_size(MAX_CALLBACK_BYTES);

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };

    let listener = TcpListener::bind(&args.listen).await?;
    println!("handler listening on {}", listener.local_addr()?);
    Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stop, // callbacks in flight may finish
        )
        .await?;
    Ok(())
}
