//! See [`crate::fuzzing`].

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use super::acl::{self, Rules, Wish};
use super::fill::Values;
use super::{Attempt, http, jwt};

/// A token, were it signed: what was taken apart is what came, and it lets nobody in
/// whose client id it does not say.
pub fn token(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        jwt::fuzzing::token(text);
    }
}

/// A file of rules: the first that fits decides, as it does alone.
pub fn acl_rules(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok((rules, alone)) = acl::fuzzing::parse(text) else {
        return;
    };
    let attempt = Attempt {
        clientid: "c1".to_owned(),
        username: "ann".to_owned(),
        ..Attempt::nobody()
    };
    let topics = ["a", "a/b", "c1/x", "$SYS/x", "a/+", "#", ""];
    for (action, topic) in ["publish", "subscribe"]
        .into_iter()
        .flat_map(|action| topics.map(|topic| (action, topic)))
    {
        let qos = 1;
        let wish = Wish { action, topic, qos };
        let values = Values {
            attempt: &attempt,
            wish: Some(wish),
        };
        let decide = |rules: &Rules| rules.decide(&values, wish);
        assert_eq!(decide(&rules), alone.iter().find_map(decide), "{wish:?}");
    }
}

/// An answer of a service: its first byte says how it is encoded, the rest is the body.
pub fn http_answer(bytes: &[u8]) {
    if let Some((kind, body)) = bytes.split_first() {
        http::fuzzing::answer(*kind, body);
    }
}
