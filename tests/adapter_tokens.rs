//! `server.token_file`: who shows no token that is in it is not let in.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;

use common::{Stage, until, within};
use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{ResultCode, SendBytesRequest};
use tempfile::TempDir;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

const TOKEN: &str = "Zm9yLW1ldGVycw.0123456789";
const RENEWED: &str = "Zm9yLW1ldGVycw.9876543210";

/// A Send with this metadata: the result code, or the gRPC status.
async fn send(stage: &Stage, conn: &str, authorization: Option<&str>) -> Result<ResultCode, Code> {
    let address = stage.gateway.addresses().adapter;
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = within("the adapter", endpoint.connect()).await.unwrap();
    let mut client = ConnectionAdapterClient::new(channel);
    let mut request = Request::new(SendBytesRequest {
        conn: conn.to_owned(),
        bytes: "down".into(),
    });
    if let Some(value) = authorization {
        let value = value.parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    match within("an answer", client.send(request)).await {
        Ok(answer) => Ok(answer.into_inner().code()),
        Err(status) => {
            assert!(!status.message().contains(TOKEN));
            Err(status.code())
        }
    }
}

#[tokio::test]
async fn only_who_shows_a_token_may_call() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("tokens");
    fs::write(&file, format!("# meters\n{TOKEN}\n")).unwrap();
    let path = file.display().to_string();
    let stage = Stage::with(&[("SERVER__TOKEN_FILE", &path)]).await;
    let mut device = stage.device().await;
    let conn = device.conn.clone();
    let bearer = |token: &str| format!("Bearer {token}");
    let bad = [
        None,
        Some(TOKEN.to_owned()),
        Some(bearer("")),
        Some(bearer(&TOKEN[1..])),
        Some(bearer(&format!("{TOKEN}0"))),
        Some(format!("Basic {TOKEN}")),
    ];
    for shown in &bad {
        let result = send(&stage, &conn, shown.as_deref()).await;
        assert_eq!(result, Err(Code::Unauthenticated), "{shown:?}");
    }
    let refused = "exproto_adapter_unauthenticated_total";
    assert_eq!(stage.admin.metric(refused).await, bad.len() as f64);
    for shown in [bearer(TOKEN), format!("bearer {TOKEN}")] {
        let result = send(&stage, &conn, Some(&shown)).await;
        assert_eq!(result, Ok(ResultCode::Success));
        assert_eq!(device.read(4).await, b"down");
    }
    // A file that is of no use leaves the tokens as they are, a new one replaces them.
    fs::write(&file, "short\n").unwrap();
    assert_eq!(
        send(&stage, &conn, Some(&bearer(TOKEN))).await,
        Ok(ResultCode::Success)
    );
    fs::write(&file, format!("{RENEWED}\n")).unwrap();
    until("the new token is known", || async {
        let result = send(&stage, &conn, Some(&bearer(RENEWED))).await;
        result.ok()
    })
    .await;
    assert_eq!(
        send(&stage, &conn, Some(&bearer(TOKEN))).await,
        Err(Code::Unauthenticated)
    );
    stage.finish().await;
}
