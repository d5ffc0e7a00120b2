//! What `check` says about handlers that cannot be as they are wished.

use std::fs;

use tempfile::TempDir;

use crate::support::{one_fault, set, toml};

/// Connections that move need somewhere to move to, and the time for it.
#[test]
fn failover_that_never_could_be() {
    let handler = |keys: &str| toml(&format!("[handler]\nfailover = 'recreate'\n{keys}"));
    handler("").unwrap();
    one_fault(
        handler("service_name = 'ConnectionHandler'\nstreaming = true"),
        &[
            "handler.failover: found \"recreate\", but handler.streaming is true; allowed: with false only",
        ],
    );
    handler("service_name = 'ConnectionHandler'").unwrap();
    one_fault(
        handler("on_unavailable = 'close'"),
        &[
            "handler.failover: found \"recreate\", but handler.on_unavailable is \"close\"; allowed: with \"hold\" only",
        ],
    );
    // The key that was set is the one to change.
    one_fault(
        handler("max_outage = '5s'"),
        &["handler.max_outage: found 5s; allowed: more than handler.failover_after, which is 5s"],
    );
    one_fault(
        handler("failover_after = '1m'"),
        &["handler.failover_after: found 1m; allowed: less than handler.max_outage, which is 1m"],
    );
    one_fault(
        handler("failover_after = '30s'\nmax_outage = '20s'"),
        &["handler.failover_after: found 30s; allowed: less than handler.max_outage, which is 20s"],
    );
    handler("failover_after = '1h'\nmax_outage = 'infinity'").unwrap();
    // None of it matters where nobody moves.
    toml("[handler]\nfailover_after = '1h'\non_unavailable = 'close'").unwrap();
    one_fault(
        toml("[handlers.a]\naddress = 'http://a'\nfailover = 'recreate'\non_unavailable = 'close'"),
        &["handlers.a.failover: found \"recreate\", but handlers.a.on_unavailable is \"close\""],
    );
}

#[test]
fn addresses() {
    let address = |value: &str| set(&[("handler.address", value)]);
    address("http://a,unix:/a.sock,https://a").unwrap();
    one_fault(
        address("http://a:1,http://b:1,http://a:1"),
        &["handler.address: found http://a:1 twice; allowed: each address once"],
    );
    for bad in [
        "a:1",
        "http://",
        "http://a:0",
        "http://a:65536",
        "grpc://a:1",
        "http://a:1/path",
        "unix:a",
        "unix:",
        "",
    ] {
        one_fault(address(bad), &["handler.address"]);
    }
}

/// What is said about TLS must be of use at some address.
#[test]
fn tls_towards_handlers() {
    let dir = TempDir::new().unwrap();
    let pem = dir.path().join("x.pem");
    fs::write(&pem, "x").unwrap();
    let pem = pem.to_str().unwrap();
    let handler = |address: &str, key: &str, value: &str| {
        let key = format!("handler.ssl_options.{key}");
        set(&[("handler.address", address), (&key, value)])
    };
    for plain in ["http://a", "unix:/a.sock", "http://a,unix:/a.sock"] {
        one_fault(
            handler(plain, "cacertfile", pem),
            &[
                "handler.ssl_options.cacertfile: set, but handler.address does not use TLS; \
                 allowed: with https:// only",
            ],
        );
    }
    handler("https://a", "cacertfile", pem).unwrap();
    handler("http://a,https://b", "cacertfile", pem).unwrap();
    let missing = dir.path().join("missing.pem");
    let missing = missing.to_str().unwrap();
    one_fault(
        handler("https://a", "cacertfile", missing),
        &[
            "handler.ssl_options.cacertfile: found",
            "missing.pem",
            "which cannot be read: No such file",
        ],
    );
    for (one, other) in [("certfile", "keyfile"), ("keyfile", "certfile")] {
        one_fault(
            handler("https://a", one, pem),
            &[&format!(
                "handler.ssl_options.{one}: set without handler.ssl_options.{other}"
            )],
        );
    }
}
