//! The standard health service of gRPC, as its client: `grpc.health.v1.Health/Check`.
//!
//! Asked by calls now and then, not by its stream Watch: a threaded server would give
//! one of its threads to every gateway for as long as it lives.

use std::time::Duration;

use http::Uri;
use http::uri::PathAndQuery;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

use super::link::Channel;
use super::status::is_answer;

const PATH: PathAndQuery = PathAndQuery::from_static("/grpc.health.v1.Health/Check");

/// `SERVING` of `HealthCheckResponse.ServingStatus`.
const SERVING: i32 = 1;

/// `NOT_SERVING` of the same.
const NOT_SERVING: i32 = 2;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    /// Empty: the server as a whole.
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// What a handler says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// It takes connections.
    Serving,
    /// It takes no new ones.
    NotServing,
    /// It has no such service.
    NotOffered,
    /// Nothing that can be used: what it said before holds.
    NoWord,
}

/// Asks once, for at most `limit`.
pub(super) async fn check(channel: Channel, origin: Uri, limit: Duration) -> Health {
    let request = Request::new(HealthCheckRequest::default());
    let heard = channel.clone();
    let call = async {
        let mut grpc = Grpc::with_origin(channel, origin);
        grpc.ready().await?;
        let codec = ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
        grpc.unary(request, PATH, codec).await
    };
    let answer = timeout(limit, call).await;
    if answer.as_ref().is_ok_and(is_answer) {
        heard.answered();
    }
    match answer {
        Ok(Ok(answer)) => match answer.get_ref().status {
            SERVING => Health::Serving,
            NOT_SERVING => Health::NotServing,
            // UNKNOWN: it has not made up its mind.
            0 => Health::NoWord,
            // SERVICE_UNKNOWN, or what is not known here.
            _ => Health::NotOffered,
        },
        // The health service of a server that was never told of itself.
        Ok(Err(status)) if matches!(status.code(), Code::Unimplemented | Code::NotFound) => {
            Health::NotOffered
        }
        Ok(Err(_)) | Err(_) => Health::NoWord,
    }
}
