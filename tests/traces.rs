//! W3C Trace Context from end to end: from a handler's call over the broker to another callback.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Peer, Stage};
use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{PublishRequest, RawPublishRequest, ResultCode};
use tonic::Request;
use tonic::transport::Channel;

const KEY: &str = "traceparent";
const ON: [(&str, &str); 1] = [("HANDLER__TRACE_CONTEXT", "true")];

/// A trace, and what a call of it says.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const HEADER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn adapter(stage: &Stage) -> ConnectionAdapterClient<Channel> {
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    ConnectionAdapterClient::new(channel.connect().await.unwrap())
}

fn part_of<T>(message: T, header: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(KEY, header.parse().unwrap());
    request
}

fn raw(topic: &str, payload: &'static str) -> RawPublishRequest {
    RawPublishRequest {
        topic: topic.to_owned(),
        qos: 1,
        payload: payload.into(),
    }
}

/// What the next message says of its trace.
async fn told(peer: &mut Peer) -> Option<String> {
    let properties = peer.next().await.properties.unwrap_or_default();
    let mut properties = properties.user_properties.into_iter();
    let (_, value) = properties.find(|(name, _)| name == KEY)?;
    Some(value)
}

/// What the last OnReceivedMessages is part of.
fn last(stage: &Stage) -> Option<String> {
    let headers = stage.handler.streams(|log| log.headers.clone());
    let (_, headers) = headers.iter().rev().find(|(name, _)| *name == "messages")?;
    Some(headers.get(KEY)?.to_str().unwrap().to_owned())
}

/// A publish in a trace says so to the broker as it was said, and so does the callback that it brings
/// about: who records it finds the publish before it.
#[tokio::test]
async fn a_trace_goes_on_with_its_message() {
    let stage = Stage::with(&ON).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("down/#").await;
    let device = stage.subscriber("meter", "down/1", 1).await;
    let mut adapter = adapter(&stage).await;
    let request = PublishRequest {
        conn: device.conn.clone(),
        topic: "down/1".to_owned(),
        qos: 1,
        payload: "one".into(),
    };
    let answer = adapter.publish(part_of(request, HEADER)).await.unwrap();
    assert_eq!(answer.into_inner().code(), ResultCode::Success);
    assert_eq!(told(&mut peer).await.as_deref(), Some(HEADER));
    stage.handler.messages(&device.conn, 1).await;
    assert_eq!(last(&stage).as_deref(), Some(HEADER));

    let answer = adapter.raw_publish(part_of(raw("down/1", "two"), HEADER));
    answer.await.unwrap();
    assert_eq!(told(&mut peer).await.as_deref(), Some(HEADER));
    stage.handler.messages(&device.conn, 2).await;
    assert_eq!(last(&stage).as_deref(), Some(HEADER));

    // Whoever else publishes in a trace: the same.
    peer.publish_with("down/1", &[(KEY, HEADER)]).await;
    stage.handler.messages(&device.conn, 3).await;
    assert_eq!(last(&stage).as_deref(), Some(HEADER));
    assert_eq!(told(&mut peer).await.as_deref(), Some(HEADER));

    // What is in no trace, or says nonsense, begins one.
    for nonsense in [None, Some("00-0-0-00"), Some("no trace")] {
        let request = raw("down/1", "three");
        let request = match nonsense {
            None => Request::new(request),
            Some(text) => part_of(request, text),
        };
        adapter.raw_publish(request).await.unwrap();
        assert_eq!(told(&mut peer).await, None);
    }
    stage.handler.messages(&device.conn, 6).await;
    assert!(!last(&stage).unwrap().contains(TRACE));
    stage.finish().await;
}

/// Where no handler is told of traces, none goes on.
#[tokio::test]
async fn no_trace_goes_on_where_none_is_wished() {
    let stage = Stage::start().await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("down").await;
    let device = stage.subscriber("meter", "down", 1).await;
    let mut adapter = adapter(&stage).await;
    let request = part_of(raw("down", "quiet"), HEADER);
    adapter.raw_publish(request).await.unwrap();
    assert_eq!(told(&mut peer).await, None);
    stage.handler.messages(&device.conn, 1).await;
    assert_eq!(last(&stage), None);
    stage.finish().await;
}
