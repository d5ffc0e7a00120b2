//! The adapter as a handler calls it.

use std::net::SocketAddr;

use bytes::Bytes;
use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{
    AuthenticateRequest, ClientInfo, CloseSocketRequest, CodeResponse, PublishRequest,
    RawPublishRequest, ResultCode, SendBytesRequest, SubscribeRequest, TimerRequest,
    UnsubscribeRequest,
};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use super::within;

/// A client of ConnectionAdapter.
#[derive(Clone)]
pub struct Adapter(ConnectionAdapterClient<InterceptedService<Channel, Shown>>);

/// Shows a token with every call, where there is one.
#[derive(Clone)]
pub struct Shown(Option<&'static str>);

impl Interceptor for Shown {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = self.0 {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// What the adapter answered; gRPC status OK goes without saying.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: ResultCode,
    pub message: String,
}

impl Answer {
    /// Asserts success.
    #[track_caller]
    pub fn ok(self) {
        assert_eq!(self.code, ResultCode::Success, "{}", self.message);
        assert_eq!(self.message, "", "a success says nothing");
    }

    /// Asserts a refusal with this code and a message, and gives that.
    #[track_caller]
    pub fn refused(self, code: ResultCode) -> String {
        assert_eq!(self.code, code, "{}", self.message);
        assert!(!self.message.is_empty(), "a refusal must say why");
        self.message
    }
}

/// A client that introduces itself fully.
pub fn client(clientid: &str) -> ClientInfo {
    ClientInfo {
        proto_name: "test".to_owned(),
        proto_ver: "1".to_owned(),
        clientid: clientid.to_owned(),
        username: format!("user of {clientid}"),
        mountpoint: String::new(),
    }
}

macro_rules! call {
    ($adapter:expr, $method:ident, $request:expr) => {{
        let mut client = $adapter.0.clone();
        let response = within(stringify!($method), client.$method($request)).await;
        answer(response.expect(stringify!($method)).into_inner())
    }};
}

fn answer(response: CodeResponse) -> Answer {
    Answer {
        code: response.code(),
        message: response.message,
    }
}

impl Adapter {
    pub async fn connect(address: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let channel = within("the adapter", endpoint.connect()).await.unwrap();
        Self::over(channel)
    }

    pub fn over(channel: Channel) -> Self {
        Self(ConnectionAdapterClient::with_interceptor(
            channel,
            Shown(None),
        ))
    }

    pub fn with_token(channel: Channel, token: &'static str) -> Self {
        Self(ConnectionAdapterClient::with_interceptor(
            channel,
            Shown(Some(token)),
        ))
    }

    /// Over TLS. Fails where the adapter will not have this client.
    pub async fn connect_tls(
        address: SocketAddr,
        tls: ClientTlsConfig,
    ) -> Result<Self, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?;
        let channel = within("the adapter", endpoint.tls_config(tls)?.connect()).await?;
        Ok(Self::over(channel))
    }

    /// A call that fails below gRPC's answers is an error here.
    pub async fn try_send(&self, conn: &str) -> Result<CodeResponse, tonic::Status> {
        let mut client = self.0.clone();
        let request = SendBytesRequest {
            conn: conn.to_owned(),
            bytes: Bytes::new(),
        };
        within("send", client.send(request))
            .await
            .map(tonic::Response::into_inner)
    }

    pub async fn send(&self, conn: &str, bytes: impl Into<Bytes>) -> Answer {
        let (conn, bytes) = (conn.to_owned(), bytes.into());
        call!(self, send, SendBytesRequest { conn, bytes })
    }

    pub async fn close(&self, conn: &str) -> Answer {
        let conn = conn.to_owned();
        call!(self, close, CloseSocketRequest { conn })
    }

    pub async fn authenticate(&self, conn: &str, clientid: &str) -> Answer {
        self.authenticate_as(conn, Some(client(clientid)), "secret")
            .await
    }

    pub async fn authenticate_as(
        &self,
        conn: &str,
        clientinfo: Option<ClientInfo>,
        password: &str,
    ) -> Answer {
        let request = AuthenticateRequest {
            conn: conn.to_owned(),
            clientinfo,
            password: password.to_owned(),
        };
        call!(self, authenticate, request)
    }

    pub async fn start_timer(&self, conn: &str, interval: u32) -> Answer {
        self.start_timer_of(conn, 0, interval).await
    }

    pub async fn start_timer_of(&self, conn: &str, r#type: i32, interval: u32) -> Answer {
        let request = TimerRequest {
            conn: conn.to_owned(),
            r#type,
            interval,
        };
        call!(self, start_timer, request)
    }

    pub async fn publish(
        &self,
        conn: &str,
        topic: &str,
        qos: u32,
        payload: impl Into<Bytes>,
    ) -> Answer {
        let request = PublishRequest {
            conn: conn.to_owned(),
            topic: topic.to_owned(),
            qos,
            payload: payload.into(),
        };
        call!(self, publish, request)
    }

    pub async fn subscribe(&self, conn: &str, topic: &str, qos: u32) -> Answer {
        let request = SubscribeRequest {
            conn: conn.to_owned(),
            topic: topic.to_owned(),
            qos,
        };
        call!(self, subscribe, request)
    }

    pub async fn unsubscribe(&self, conn: &str, topic: &str) -> Answer {
        let request = UnsubscribeRequest {
            conn: conn.to_owned(),
            topic: topic.to_owned(),
        };
        call!(self, unsubscribe, request)
    }

    pub async fn raw_publish(&self, topic: &str, qos: u32, payload: impl Into<Bytes>) -> Answer {
        let request = RawPublishRequest {
            topic: topic.to_owned(),
            qos,
            payload: payload.into(),
        };
        call!(self, raw_publish, request)
    }
}
