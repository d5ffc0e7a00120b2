//! The adapter's standard services: health, and reflection.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;

use common::{Broker, Handler, Stage, within};
use futures_util::StreamExt;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::{v1, v1alpha};

const SERVICE: &str = "emqx.exproto.v1.ConnectionAdapter";
const TOKEN: &str = "Zm9yLW1ldGVycw.0123456789";

async fn channel(stage: &Stage) -> Channel {
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    within("the adapter", endpoint.connect()).await.unwrap()
}

fn asked(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

/// The status is NOT_SERVING until the gateway is ready and from when it drains on; a watch
/// is told and let go, and holds up no drain. No token is needed.
#[tokio::test]
async fn health_is_told() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("tokens");
    fs::write(&file, TOKEN).unwrap();
    let path = file.display().to_string();
    let keys = [("SERVER__TOKEN_FILE", path.as_str())];
    let mut stage = Stage::assemble(Broker::start().await, Handler::absent(), &keys).await;
    let mut client = HealthClient::new(channel(&stage).await);
    for service in ["", SERVICE] {
        let answer = client.check(asked(service)).await.unwrap();
        assert_eq!(answer.into_inner().status(), NotServing);
    }
    let unknown = client.check(asked("other")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let mut watch = client.watch(asked(SERVICE)).await.unwrap().into_inner();
    let told = within("a status", watch.next()).await.unwrap().unwrap();
    assert_eq!(told.status(), NotServing);
    stage.handler.up().await;
    let told = within("a status", watch.next()).await.unwrap().unwrap();
    assert_eq!(told.status(), Serving);
    let answer = client.check(asked("")).await.unwrap();
    assert_eq!(answer.into_inner().status(), Serving);
    let draining = tokio::spawn(stage.gateway.drain());
    let told = within("a status", watch.next()).await.unwrap().unwrap();
    assert_eq!(told.status(), NotServing);
    assert!(within("the end", watch.next()).await.is_none());
    within("the drain", draining).await.unwrap();
}

/// Reflection lists the services and describes the adapter, in both of its versions; it
/// needs a token where calls do.
#[tokio::test]
async fn the_interface_can_be_asked_for() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("tokens");
    fs::write(&file, TOKEN).unwrap();
    let path = file.display().to_string();
    let stage = Stage::with(&[("SERVER__TOKEN_FILE", &path)]).await;
    let mut client = ServerReflectionClient::new(channel(&stage).await);
    let ask = |question: MessageRequest, token: Option<&str>| {
        let question = v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(question),
        };
        let mut request = Request::new(futures_util::stream::iter([question]));
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        request
    };
    let list = || MessageRequest::ListServices(String::new());
    let refused = client.server_reflection_info(ask(list(), None)).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
    let answer = client
        .server_reflection_info(ask(list(), Some(TOKEN)))
        .await;
    let answer = answer.unwrap().into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = listed.service.into_iter().map(|s| s.name).collect();
    for name in [SERVICE, "grpc.health.v1.Health"] {
        assert!(names.iter().any(|n| n == name), "{names:?}");
    }
    let symbol = MessageRequest::FileContainingSymbol(format!("{SERVICE}.Publish"));
    let answer = client
        .server_reflection_info(ask(symbol, Some(TOKEN)))
        .await;
    let answer = answer.unwrap().into_inner().next().await.unwrap().unwrap();
    let Some(MessageResponse::FileDescriptorResponse(files)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let file = &files.file_descriptor_proto[0];
    let part = b"PublishRequest";
    assert!(file.windows(part.len()).any(|bytes| bytes == part));

    let channel = channel(&stage).await;
    let mut alpha = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let question = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
    };
    let mut request = Request::new(futures_util::stream::iter([question]));
    let value = format!("Bearer {TOKEN}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    let answer = alpha.server_reflection_info(request).await.unwrap();
    answer.into_inner().next().await.unwrap().unwrap();
    stage.finish().await;
}
