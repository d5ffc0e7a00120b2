//! Tokens of handlers: who shows none is not let in, and with `server.isolate_handlers` whose token
//! it is says which connections there are.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;

use common::{Adapter, Answer, Device, Handler, Stage, until, within};
use exproto_sidecar::proto::connection_adapter_client::ConnectionAdapterClient;
use exproto_sidecar::proto::{ResultCode, SendBytesRequest};
use tempfile::TempDir;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

const TOKEN: &str = "Zm9yLW1ldGVycw.0123456789";
const RENEWED: &str = "Zm9yLW1ldGVycw.9876543210";

/// A Send with this metadata: the result code, or the gRPC status.
async fn send(stage: &Stage, conn: &str, authorization: Option<&str>) -> Result<ResultCode, Code> {
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
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
    let refused = "exproto_adapter_refused_total{reason=\"unauthenticated\"}";
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

/// Each handler with its token; `tcp.other` belongs to the second one.
async fn two_handlers(folder: &TempDir, keys: &[(&str, &str)]) -> (Stage, Handler) {
    let path = |name: &str, token: &str| {
        let path = folder.path().join(name);
        fs::write(&path, token).unwrap();
        path.display().to_string()
    };
    let [first, second] = [path("first", TOKEN), path("second", RENEWED)];
    let common = path("common", COMMON);
    let other = Handler::start().await;
    let mut all = vec![
        ("SERVER__TOKEN_FILE", common.as_str()),
        ("HANDLER__ADAPTER_TOKEN_FILE", &first),
        ("HANDLERS__OTHER__ADAPTER_TOKEN_FILE", &second),
    ];
    let url = other.url();
    all.push(("HANDLERS__OTHER__ADDRESS", &url));
    all.push(("LISTENERS__TCP__OTHER__BIND", "127.0.0.1:0"));
    all.push(("LISTENERS__TCP__OTHER__HANDLER", "other"));
    all.extend(keys);
    (Stage::with(&all).await, other)
}

const COMMON: &str = "Zm9yLWFsbA.0123456789";

/// The adapter as one with this token calls it.
async fn adapter_of(stage: &Stage, token: &'static str) -> Adapter {
    let address = stage.gateway.addresses().adapter.tcp().unwrap();
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = within("the adapter", endpoint.connect()).await.unwrap();
    Adapter::with_token(channel, token)
}

#[tokio::test]
async fn isolated_handlers_reach_their_own_connections_only() {
    let folder = TempDir::new().unwrap();
    let keys = [("SERVER__ISOLATE_HANDLERS", "true")];
    let (stage, other) = two_handlers(&folder, &keys).await;
    let mut mine = stage.device().await;
    let address = stage.gateway.addresses().listeners["tcp.other"];
    let mut theirs = Device::dial(address).await;
    theirs.conn = other.created(theirs.port()).await;

    let first = adapter_of(&stage, TOKEN).await;
    let second = adapter_of(&stage, RENEWED).await;
    let common = adapter_of(&stage, COMMON).await;
    let unknown = "00000000-0000-00000000000000000000000000000000";
    let unknown = format!("{}{}", &mine.conn[..14], &unknown[14..]);
    assert_eq!(unknown.len(), mine.conn.len());
    for (adapter, foreign) in [
        (&first, vec![&theirs.conn]),
        (&second, vec![&mine.conn]),
        (&common, vec![&mine.conn, &theirs.conn]),
    ] {
        for conn in foreign {
            let answers = every_call(adapter, conn).await;
            let same = every_call(adapter, &unknown).await;
            for ((name, answer), (_, to_unknown)) in answers.into_iter().zip(same) {
                let told = answer.refused(ResultCode::ConnProcessNotAlive);
                // No call tells whether there is such a connection.
                let nothing = to_unknown.refused(ResultCode::ConnProcessNotAlive);
                assert_eq!(told, nothing, "{name}");
            }
        }
        // It is about no connection.
        adapter.raw_publish("t", 0, "x").await.ok();
    }
    let refused = "exproto_adapter_refused_total{reason=\"foreign\"}";
    assert_eq!(stage.admin.metric(refused).await, 4.0 * 7.0);

    // Nothing of it had an effect, and each has its own.
    first.send(&mine.conn, "mine").await.ok();
    assert_eq!(mine.read(4).await, b"mine");
    first.authenticate(&mine.conn, "mine").await.ok();
    second.send(&theirs.conn, "theirs").await.ok();
    assert_eq!(theirs.read(6).await, b"theirs");
    second.authenticate(&theirs.conn, "theirs").await.ok();
    second.close(&theirs.conn).await.ok();
    theirs.closed().await;
    stage.finish().await;
}

#[tokio::test]
async fn without_isolation_every_known_token_reaches_every_connection() {
    let folder = TempDir::new().unwrap();
    let (stage, _other) = two_handlers(&folder, &[]).await;
    let mut device = stage.device().await;
    for token in [TOKEN, RENEWED, COMMON] {
        let adapter = adapter_of(&stage, token).await;
        adapter.send(&device.conn, "x").await.ok();
        assert_eq!(device.read(1).await, b"x");
    }
    assert_eq!(
        send(&stage, &device.conn, None).await,
        Err(Code::Unauthenticated)
    );
    stage.finish().await;
}

/// All calls that name a connection.
async fn every_call(adapter: &Adapter, conn: &str) -> Vec<(&'static str, Answer)> {
    vec![
        ("Send", adapter.send(conn, "x").await),
        ("Authenticate", adapter.authenticate(conn, "c").await),
        ("StartTimer", adapter.start_timer(conn, 10).await),
        ("Publish", adapter.publish(conn, "t", 1, "x").await),
        ("Subscribe", adapter.subscribe(conn, "t", 1).await),
        ("Unsubscribe", adapter.unsubscribe(conn, "t").await),
        ("Close", adapter.close(conn).await),
    ]
}
