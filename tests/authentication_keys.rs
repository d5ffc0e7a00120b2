//! Keys of a JWKS endpoint that change while devices come with tokens of the new ones: nobody is
//! refused for it, and made-up names of keys gain nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Answer, Service, Signer, Stage, client, item};
use exproto_sidecar::proto::ResultCode;
use serde_json::json;

async fn stage(service: &Service, limits: [&str; 2]) -> Stage {
    let mut keys = item(
        1,
        &[
            ("MECHANISM", "jwt"),
            ("ENDPOINT", &service.url("/jwks")),
            ("REFRESH_INTERVAL", "1s"),
        ],
    );
    for (name, limit) in ["MAX_PER_ADDRESS", "MAX_PER_CLIENTID"].iter().zip(limits) {
        keys.push((format!("LOGIN_ATTEMPTS__{name}"), limit.to_owned()));
    }
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (&**k, &**v)).collect();
    Stage::with(&keys).await
}

async fn login(stage: &Stage, clientid: &str, token: &str) -> Answer {
    let device = stage.device().await;
    let info = Some(client(clientid));
    stage
        .adapter
        .authenticate_as(&device.conn, info, token)
        .await
}

/// So many at a time, all with this token.
async fn logins(stage: &Stage, count: usize, token: &str) -> Vec<Answer> {
    let logins = (0..count).map(|number| {
        let clientid = format!("c{number}");
        async move { login(stage, &clientid, token).await }
    });
    futures_util::future::join_all(logins).await
}

#[tokio::test]
async fn whoever_brings_a_token_of_a_new_key_waits_for_it_and_has_not_failed() {
    let service = Service::start().await;
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    service.says(&json!({"keys": [old.jwk()]}));
    let stage = stage(&service, ["10", "1"]).await;
    login(&stage, "c", &old.token(&json!({}))).await.ok();
    service.says(&json!({"keys": [old.jwk(), new.jwk()]}));
    for answer in logins(&stage, 40, &new.token(&json!({}))).await {
        answer.ok();
    }
    stage.finish().await;
}

#[tokio::test]
async fn made_up_names_of_keys_bring_about_one_request_and_count_as_failed() {
    let service = Service::start().await;
    let (known, made_up) = (Signer::new("known"), Signer::new("made up"));
    service.says(&json!({"keys": [known.jwk()]}));
    let stage = stage(&service, ["30", "infinity"]).await;
    let token = known.token(&json!({}));
    login(&stage, "c", &token).await.ok();
    let before = service.asked.borrow().len();
    for answer in logins(&stage, 30, &made_up.token(&json!({}))).await {
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains("none of the keys"), "{why}");
    }
    // The one that they brought about, and those that come of themselves.
    let asked = service.asked.borrow().len() - before;
    assert!((1..=4).contains(&asked), "{asked}");
    let answer = login(&stage, "c", &token).await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("too many failed attempts"), "{why}");
    stage.finish().await;
}

#[tokio::test]
async fn while_the_endpoint_is_away_nobody_has_failed_and_known_keys_count() {
    let service = Service::start().await;
    let (old, new) = (Signer::new("old"), Signer::new("new"));
    service.says(&json!({"keys": [old.jwk()]}));
    let stage = stage(&service, ["1", "1"]).await;
    let token = old.token(&json!({}));
    login(&stage, "c", &token).await.ok();
    service.answers(500, "text/plain", "");
    for _ in 0..2 {
        let answer = login(&stage, "c", &new.token(&json!({}))).await;
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains("cannot be fetched"), "{why}");
    }
    login(&stage, "c", &token).await.ok();
    stage.finish().await;
}

/// Tokens of one issuer among several: whose key they name has them, whatever the others do.
#[tokio::test]
async fn keys_that_do_not_come_hold_up_nobody_else() {
    let (silent, other, own) = (
        Service::start().await,
        Service::start().await,
        Service::start().await,
    );
    let gate = silent.hold();
    let (stranger, signer) = (Signer::new("a"), Signer::new("b"));
    other.says(&json!({"keys": [stranger.jwk()]}));
    own.says(&json!({"keys": [signer.jwk()]}));
    let mut keys = Vec::new();
    for (number, service) in [(1, &silent), (2, &other), (3, &own)] {
        let jwks = [
            ("MECHANISM", "jwt"),
            ("ENDPOINT", &*service.url("/jwks")),
            // Longer than an authentication may take.
            ("REQUEST_TIMEOUT", "10m"),
        ];
        keys.extend(item(number, &jwks));
    }
    let keys: Vec<(&str, &str)> = keys.iter().map(|(k, v)| (&**k, &**v)).collect();
    let stage = Stage::with(&keys).await;
    let token = signer.token(&json!({}));
    // The first of them may have come before the keys.
    login(&stage, "c", &token).await.ok();
    let before = other.asked.borrow().len();
    for answer in logins(&stage, 40, &token).await {
        answer.ok();
    }
    assert_eq!(
        other.asked.borrow().len(),
        before,
        "it has been asked for another's key"
    );
    gate.open();
    stage.finish().await;
}
