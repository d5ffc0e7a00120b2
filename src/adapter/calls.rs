//! The eight calls: each becomes one command to the core.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Request, Response, Status};

use super::deadline;
use crate::auth::Secret;
use crate::connection::command::{Command, Commands, Credentials, Reach, Refusal};
use crate::metrics::{ADAPTER_METHODS, AdapterMetrics};
use crate::proto::connection_adapter_server::ConnectionAdapter;
use crate::proto::{
    AuthenticateRequest, CloseSocketRequest, CodeResponse, PublishRequest, RawPublishRequest,
    ResultCode, SendBytesRequest, SubscribeRequest, TimerRequest, TimerType, UnsubscribeRequest,
};
use crate::trace::{self, Traceparent};

/// The eight calls.
#[derive(Clone)]
pub(super) struct Calls {
    pub commands: Commands,
    /// Of callers of whom nothing else is said.
    pub reach: Reach,
    pub metrics: Arc<AdapterMetrics>,
    /// Whether traces are looked at.
    pub trace: bool,
}

/// A call that has begun. One that is dropped before its answer was given up by the caller.
struct Call<'a> {
    method: &'static str,
    reach: Reach,
    began: Instant,
    /// How long the caller waits.
    limit: Option<Duration>,
    /// What it is part of.
    trace: Option<Traceparent>,
    ended: bool,
    metrics: &'a AdapterMetrics,
}

impl Call<'_> {
    /// Says and counts how it ended.
    fn end(
        mut self,
        conn: &str,
        result: Result<Result<(), Refusal>, Status>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (method, traceparent) = (self.method, self.trace.map(tracing::field::display));
        let (code, message) = match result {
            Ok(Ok(())) => {
                tracing::debug!(conn, method, traceparent, "a handler's call is done");
                (ResultCode::Success, String::new())
            }
            Ok(Err(refusal)) => {
                let code = refusal.code.as_str_name();
                let reason = &refusal.message;
                tracing::debug!(
                    conn,
                    method,
                    code,
                    reason,
                    traceparent,
                    "a handler's call is refused"
                );
                (refusal.code, refusal.message)
            }
            // Counted with all that fail.
            Err(status) => {
                self.ended = true;
                return Err(status);
            }
        };
        self.count(code.as_str_name());
        Ok(Response::new(CodeResponse {
            code: code.into(),
            message,
        }))
    }

    fn count(&mut self, code: &'static str) {
        self.ended = true;
        let index = ADAPTER_METHODS.iter().position(|name| *name == self.method);
        let took = self.began.elapsed();
        self.metrics
            .answered(index.unwrap_or(usize::MAX), code, took);
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.count("CANCELLED");
        }
    }
}

impl Calls {
    fn begin<T>(&self, method: &'static str, request: Request<T>) -> Result<(Call<'_>, T), Status> {
        let limit = deadline::timeout(request.metadata());
        let trace = self.trace.then(|| request.metadata().get(trace::KEY));
        let trace = trace
            .flatten()
            .and_then(|value| Traceparent::parse(value.as_encoded_bytes()));
        let (_, mut extensions, message) = request.into_parts();
        let reach = extensions.remove::<Reach>();
        let call = Call {
            method,
            reach: reach.unwrap_or_else(|| self.reach.clone()),
            began: Instant::now(),
            limit: limit?,
            trace,
            ended: false,
            metrics: &self.metrics,
        };
        Ok((call, message))
    }

    async fn execute(
        &self,
        call: Call<'_>,
        conn: &str,
        command: Command,
    ) -> Result<Response<CodeResponse>, Status> {
        let work = self.commands.execute(&call.reach, conn, command);
        let result = deadline::within(call.limit, work).await;
        call.end(conn, result)
    }
}

#[tonic::async_trait]
impl ConnectionAdapter for Calls {
    async fn send(
        &self,
        request: Request<SendBytesRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Send", request)?;
        let SendBytesRequest { conn, bytes } = message;
        self.execute(call, &conn, Command::Send(bytes)).await
    }

    async fn close(
        &self,
        request: Request<CloseSocketRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Close", request)?;
        let CloseSocketRequest { conn } = message;
        self.execute(call, &conn, Command::Close).await
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Authenticate", request)?;
        let AuthenticateRequest {
            conn,
            clientinfo,
            password,
        } = message;
        let Some(info) = clientinfo else {
            let refusal = Refusal::new(ResultCode::RequiredParamsMissed, "clientinfo is missing");
            return call.end(&conn, Ok(Err(refusal)));
        };
        let credentials = Credentials {
            proto_name: info.proto_name,
            proto_ver: info.proto_ver,
            clientid: info.clientid,
            username: info.username,
            mountpoint: info.mountpoint,
            password: Secret::new(password),
        };
        self.execute(call, &conn, Command::Authenticate(credentials))
            .await
    }

    async fn start_timer(
        &self,
        request: Request<TimerRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("StartTimer", request)?;
        let TimerRequest {
            conn,
            r#type,
            interval,
        } = message;
        if TimerType::try_from(r#type) != Ok(TimerType::Keepalive) {
            let refusal = Refusal::new(
                ResultCode::ParamsTypeError,
                format!("type is {type}, the only timer is KEEPALIVE (0)"),
            );
            return call.end(&conn, Ok(Err(refusal)));
        }
        self.execute(call, &conn, Command::StartTimer(interval))
            .await
    }

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Publish", request)?;
        let PublishRequest {
            conn,
            topic,
            qos,
            payload,
        } = message;
        let command = Command::Publish {
            topic,
            qos,
            payload,
            trace: call.trace,
        };
        self.execute(call, &conn, command).await
    }

    async fn subscribe(
        &self,
        request: Request<SubscribeRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Subscribe", request)?;
        let SubscribeRequest { conn, topic, qos } = message;
        let command = Command::Subscribe { filter: topic, qos };
        self.execute(call, &conn, command).await
    }

    async fn unsubscribe(
        &self,
        request: Request<UnsubscribeRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("Unsubscribe", request)?;
        let UnsubscribeRequest { conn, topic } = message;
        let command = Command::Unsubscribe { filter: topic };
        self.execute(call, &conn, command).await
    }

    async fn raw_publish(
        &self,
        request: Request<RawPublishRequest>,
    ) -> Result<Response<CodeResponse>, Status> {
        let (call, message) = self.begin("RawPublish", request)?;
        let RawPublishRequest {
            topic,
            qos,
            payload,
        } = message;
        let work = self.commands.raw_publish(topic, qos, payload, call.trace);
        let result = deadline::within(call.limit, work).await;
        call.end("", result)
    }
}
