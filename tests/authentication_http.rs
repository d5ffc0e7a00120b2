//! What services that EMQX's HTTP authenticator asks may do: close connections that are kept, say
//! what a device is called, say when it has to go.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::Ipv4Addr;

use common::{Answer, Device, Peer, Service, Stage, client, http_item, item, seconds};
use exproto_sidecar::proto::ResultCode;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

async fn stage(keys: &[(String, String)]) -> Stage {
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (&**k, &**v)).collect();
    Stage::with(&keys).await
}

async fn login(stage: &Stage, clientid: &str) -> (Device, Answer) {
    let device = stage.device().await;
    let info = Some(client(clientid));
    let answer = stage.adapter.authenticate_as(&device.conn, info, "p").await;
    (device, answer)
}

/// Lets everybody in, and answers so many requests over each connection; hangs up upon the next one,
/// or in the midst of the answer to it. Tells of each request.
async fn impatient(
    answered: usize,
    last_words: &'static str,
) -> (u16, mpsc::UnboundedReceiver<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (asked, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let asked = asked.clone();
            tokio::spawn(async move {
                for number in 0..=answered {
                    let mut request = [0; 4096];
                    if !stream.read(&mut request).await.is_ok_and(|count| count > 0) {
                        return;
                    }
                    asked.send(()).unwrap();
                    let answer = match number == answered {
                        true => last_words,
                        false => "HTTP/1.1 204 No Content\r\n\r\n",
                    };
                    stream.write_all(answer.as_bytes()).await.unwrap();
                }
            });
        }
    });
    (port, requests)
}

fn count(requests: &mut mpsc::UnboundedReceiver<()>) -> usize {
    std::iter::from_fn(|| requests.try_recv().ok()).count()
}

#[tokio::test]
async fn a_kept_connection_that_is_closed_upon_a_request_costs_no_login() {
    let (port, mut requests) = impatient(1, "").await;
    let stage = stage(&http_item(1, &format!("http://127.0.0.1:{port}/"))).await;
    for clientid in ["a", "b", "c"] {
        login(&stage, clientid).await.1.ok();
    }
    // The second one is asked for twice; the connection of its own is not kept.
    assert_eq!(count(&mut requests), 4);
    stage.finish().await;
}

#[tokio::test]
async fn what_breaks_at_once_or_within_an_answer_is_not_asked_again() {
    let words = "HTTP/1.1 200";
    for (answered, last_words, asked) in [(0, "", 1), (1, words, 2), (0, words, 1)] {
        let (port, mut requests) = impatient(answered, last_words).await;
        let stage = stage(&http_item(1, &format!("http://127.0.0.1:{port}/"))).await;
        for _ in 0..answered {
            login(&stage, "a").await.1.ok();
        }
        let (_, answer) = login(&stage, "b").await;
        answer.refused(ResultCode::PermissionDeny);
        assert_eq!(count(&mut requests), asked);
        stage.finish().await;
    }
}

#[tokio::test]
async fn json_is_asked_for_unless_something_else_is() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/"));
    keys.extend(http_item(2, &service.url("/")));
    keys.extend(item(2, &[("HEADERS", "{ Accept = \"text/x\" }")]));
    let stage = stage(&keys).await;
    service.says(&json!({"result": "ignore"}));
    login(&stage, "a")
        .await
        .1
        .refused(ResultCode::PermissionDeny);
    let (first, second) = (service.asked(1).await, service.asked(2).await);
    assert_eq!(first.headers["accept"], "application/json");
    assert_eq!(second.headers["accept"], "text/x");
    stage.finish().await;
}

#[tokio::test]
async fn an_end_in_milliseconds_is_no_answer() {
    let service = Service::start().await;
    let stage = stage(&http_item(1, &service.url("/"))).await;
    service.says(&json!({"result": "allow", "expire_at": seconds(60) * 1000}));
    let (_, answer) = login(&stage, "a").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("in milliseconds"), "{why}");
    stage.finish().await;
}

#[tokio::test]
async fn a_service_can_say_what_a_device_is_called() {
    let service = Service::start().await;
    let mut keys = http_item(1, &service.url("/"));
    let mountpoint = "LISTENERS__TCP__DEFAULT__MOUNTPOINT".to_owned();
    keys.push((mountpoint, "${clientid}/".to_owned()));
    let stage = stage(&keys).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.subscribe("#").await;
    service.says(&json!({"result": "allow", "clientid_override": "meter"}));
    let (first, answer) = login(&stage, "a").await;
    answer.ok();
    stage.publish(&first, "up", 1, "x").await.ok();
    assert_eq!(peer.next_text().await.0, "meter/up");
    // It is the one with this name, whatever it says.
    let (_second, answer) = login(&stage, "b").await;
    answer.ok();
    assert_eq!(stage.closed(&first).await, "discarded");
    // A name that no device may have.
    service.says(&json!({"result": "allow", "clientid_override": "a\u{1}b"}));
    let (_, answer) = login(&stage, "c").await;
    answer.refused(ResultCode::ParamsTypeError);
    stage.finish().await;
}
