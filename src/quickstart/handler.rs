//! The built-in handler: a line of text is a message.
//!
//! A handler as any user would write one: it is called over gRPC and calls the
//! adapter over gRPC, and knows nothing else of the gateway.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::client::AdapterClient;
use super::lines::{LineBuffer, MAX_LINE, TooLong, as_line};
use super::terminal::{Terminal, shown};
use super::topics::{self, Mounts, Topics, USERNAME};
use crate::proto::connection_unary_handler_server::ConnectionUnaryHandler;
use crate::proto::{
    AuthenticateRequest, ClientInfo, CloseSocketRequest, CodeResponse, EmptySuccess,
    PublishRequest, ReceivedBytesRequest, ReceivedMessagesRequest, ResultCode, SendBytesRequest,
    SocketClosedRequest, SocketCreatedRequest, SubscribeRequest, TimerTimeoutRequest,
};

/// Devices at a time; each may hold an unfinished line of 64 KiB.
pub(super) const MAX_DEVICES: usize = 10_000;

/// At least once, and acknowledged: a line that is shown was taken by the broker.
const QOS: u32 = 1;

/// The handler. Cheap to clone.
#[derive(Clone)]
pub(super) struct Lines(Arc<Shared>);

struct Shared {
    adapter: AdapterClient,
    mounts: Mounts,
    terminal: Terminal,
    /// Client ids are never used twice.
    next: AtomicU64,
    /// By `conn`.
    devices: watch::Sender<HashMap<String, Device>>,
}

struct Device {
    clientid: String,
    lines: LineBuffer,
}

impl Lines {
    pub(super) fn new(adapter: AdapterClient, mounts: Mounts, terminal: Terminal) -> Self {
        Self(Arc::new(Shared {
            adapter,
            mounts,
            terminal,
            next: AtomicU64::new(1),
            devices: watch::Sender::new(HashMap::new()),
        }))
    }

    /// The client id that the next device will get.
    pub(super) fn next_clientid(&self) -> String {
        clientid(self.0.next.load(Ordering::Relaxed))
    }

    /// Whether a device of this name is connected.
    pub(super) fn is_connected(&self, clientid: &str) -> bool {
        is_in(&self.0.devices.borrow(), clientid)
    }

    /// Resolves when no device of this name is connected. Cancel safe.
    pub(super) async fn gone(&self, clientid: &str) {
        let mut devices = self.0.devices.subscribe();
        // The sender lives as long as the handler, so this cannot fail.
        let _ = devices.wait_for(|devices| !is_in(devices, clientid)).await;
    }
}

fn clientid(number: u64) -> String {
    format!("device-{number}")
}

fn is_in(devices: &HashMap<String, Device>, clientid: &str) -> bool {
    devices.values().any(|device| device.clientid == clientid)
}

/// The first line that a device is sent.
fn greeting(clientid: &str, topics: &Topics) -> String {
    let (up, down) = (topics.up(clientid), topics.down(clientid));
    format!("you are {clientid}; your lines go to {up}, messages on {down} come to you\n")
}

/// The client id in a greeting.
pub(super) fn greeted(line: &str) -> Option<&str> {
    Some(line.strip_prefix("you are ")?.split_once(';')?.0)
}

impl Shared {
    async fn authenticate(&self, conn: &str, clientid: &str) -> Result<(), Trouble> {
        let request = AuthenticateRequest {
            conn: conn.to_owned(),
            clientinfo: Some(ClientInfo {
                proto_name: "lines".to_owned(),
                proto_ver: "1".to_owned(),
                clientid: clientid.to_owned(),
                username: USERNAME.to_owned(),
                mountpoint: String::new(),
            }),
            password: String::new(),
        };
        accepted(self.adapter.clone().authenticate(request).await)
    }

    async fn subscribe(&self, conn: &str, clientid: &str) -> Result<(), Trouble> {
        let request = SubscribeRequest {
            conn: conn.to_owned(),
            topic: topics::down(clientid),
            qos: QOS,
        };
        accepted(self.adapter.clone().subscribe(request).await)
    }

    async fn publish(&self, conn: &str, clientid: &str, line: Bytes) -> Result<(), Trouble> {
        let request = PublishRequest {
            conn: conn.to_owned(),
            topic: topics::up(clientid),
            qos: QOS,
            payload: line,
        };
        accepted(self.adapter.clone().publish(request).await)
    }

    async fn send(&self, conn: &str, bytes: impl Into<Bytes>) -> Result<(), Trouble> {
        let request = SendBytesRequest {
            conn: conn.to_owned(),
            bytes: bytes.into(),
        };
        accepted(self.adapter.clone().send(request).await)
    }

    async fn close(&self, conn: &str) -> Result<(), Trouble> {
        let request = CloseSocketRequest {
            conn: conn.to_owned(),
        };
        accepted(self.adapter.clone().close(request).await)
    }

    /// Sends a last line and closes.
    async fn dismiss(&self, conn: &str, why: &str) -> Result<(), Trouble> {
        self.send(conn, format!("{why}\n")).await?;
        self.close(conn).await
    }

    fn clientid_of(&self, conn: &str) -> Option<String> {
        let devices = self.devices.borrow();
        devices.get(conn).map(|device| device.clientid.clone())
    }

    async fn created(&self, request: SocketCreatedRequest) -> Result<(), Trouble> {
        let SocketCreatedRequest { conn, conninfo } = request;
        if self.devices.borrow().len() >= MAX_DEVICES {
            let why = format!("there are {MAX_DEVICES} devices already");
            return self.dismiss(&conn, &why).await;
        }
        let conninfo = conninfo.unwrap_or_default();
        let peer = conninfo.peername.unwrap_or_default();
        let port = conninfo.sockname.unwrap_or_default().port;
        let topics = self.mounts.of(u16::try_from(port).unwrap_or_default());
        let clientid = clientid(self.next.fetch_add(1, Ordering::Relaxed));
        self.authenticate(&conn, &clientid).await?;
        self.devices.send_modify(|devices| {
            let device = Device {
                clientid: clientid.clone(),
                lines: LineBuffer::default(),
            };
            devices.insert(conn.clone(), device);
        });
        let from = shown(peer.host.as_bytes());
        self.terminal.say(&format!(
            "  {clientid} connected from {from}, port {}",
            peer.port
        ));
        self.subscribe(&conn, &clientid).await?;
        // Last: who reads it may publish at once and will see it.
        self.send(&conn, greeting(&clientid, &topics)).await
    }

    async fn received(&self, request: ReceivedBytesRequest) -> Result<(), Trouble> {
        let ReceivedBytesRequest { conn, bytes } = request;
        let mut taken = None;
        self.devices.send_if_modified(|devices| {
            if let Some(device) = devices.get_mut(&conn) {
                taken = Some((device.clientid.clone(), device.lines.push(bytes)));
            }
            // Who waits for devices to come and go need not look.
            false
        });
        // It was not let in, and is closed.
        let Some((clientid, (lines, rest))) = taken else {
            return Ok(());
        };
        for line in lines {
            self.publish(&conn, &clientid, line).await?;
        }
        match rest {
            Ok(()) => Ok(()),
            Err(TooLong) => {
                let why = format!("a line has at most {MAX_LINE} bytes");
                self.terminal.say(&format!("  {clientid} is closed: {why}"));
                self.dismiss(&conn, &why).await
            }
        }
    }

    async fn messages(&self, request: ReceivedMessagesRequest) -> Result<(), Trouble> {
        let ReceivedMessagesRequest { conn, messages } = request;
        for message in messages {
            self.send(&conn, as_line(&message.payload)).await?;
        }
        Ok(())
    }

    fn closed(&self, request: &SocketClosedRequest) {
        if let Some(clientid) = self.clientid_of(&request.conn) {
            let reason = shown(request.reason.as_bytes());
            self.terminal
                .say(&format!("  {clientid} disconnected ({reason})"));
        }
        // After it was said: the show waits for this.
        self.devices
            .send_if_modified(|devices| devices.remove(&request.conn).is_some());
    }
}

/// Why a call to the adapter did nothing.
enum Trouble {
    /// It was not answered.
    Failed(Status),
    /// It was answered with another code than SUCCESS.
    Refused(CodeResponse),
}

fn accepted(answer: Result<Response<CodeResponse>, Status>) -> Result<(), Trouble> {
    let answer = answer.map_err(Trouble::Failed)?.into_inner();
    if answer.code() == ResultCode::Success {
        Ok(())
    } else {
        Err(Trouble::Refused(answer))
    }
}

impl Shared {
    /// The answer to a callback. A device that has gone meanwhile is no trouble; any
    /// other ends the connection, and the person should know why.
    fn answer(
        &self,
        conn: &str,
        result: Result<(), Trouble>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let trouble = match result {
            Ok(()) => return Ok(Response::new(EmptySuccess {})),
            Err(Trouble::Refused(answer)) if answer.code() == ResultCode::ConnProcessNotAlive => {
                return Ok(Response::new(EmptySuccess {}));
            }
            Err(Trouble::Refused(answer)) => {
                format!("{}: {}", answer.code().as_str_name(), answer.message)
            }
            Err(Trouble::Failed(status)) => status.to_string(),
        };
        let device = self.clientid_of(conn);
        let device = device.as_deref().unwrap_or("a device");
        let text = shown(trouble.as_bytes());
        self.terminal
            .say(&format!("  {device} is closed, the gateway says: {text}"));
        // Not UNAVAILABLE: upon that the gateway would call again.
        Err(Status::internal(trouble))
    }
}

#[tonic::async_trait]
impl ConnectionUnaryHandler for Lines {
    async fn on_socket_created(
        &self,
        request: Request<SocketCreatedRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let request = request.into_inner();
        let conn = request.conn.clone();
        let result = self.0.created(request).await;
        self.0.answer(&conn, result)
    }

    async fn on_received_bytes(
        &self,
        request: Request<ReceivedBytesRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let request = request.into_inner();
        let conn = request.conn.clone();
        let result = self.0.received(request).await;
        self.0.answer(&conn, result)
    }

    async fn on_received_messages(
        &self,
        request: Request<ReceivedMessagesRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        let request = request.into_inner();
        let conn = request.conn.clone();
        let result = self.0.messages(request).await;
        self.0.answer(&conn, result)
    }

    /// No timer is started, so that a person may take time to type.
    async fn on_timer_timeout(
        &self,
        _: Request<TimerTimeoutRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        Ok(Response::new(EmptySuccess {}))
    }

    async fn on_socket_closed(
        &self,
        request: Request<SocketClosedRequest>,
    ) -> Result<Response<EmptySuccess>, Status> {
        self.0.closed(request.get_ref());
        Ok(Response::new(EmptySuccess {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_tells_name_and_topics() {
        let line = greeting("device-7", &Topics::new("m/".to_owned()));
        assert_eq!(greeted(&line), Some("device-7"));
        assert!(line.contains("m/devices/device-7/up"), "{line}");
        assert!(line.contains("m/devices/device-7/down"), "{line}");
        assert_eq!(greeted("a line has at most 65536 bytes"), None);
    }
}
