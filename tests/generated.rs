//! Files that are made from the code must say what the code says.
//! `UPDATE=1 cargo test --test generated` writes them again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use exproto_sidecar::config;
use exproto_sidecar::metrics::Metrics;

fn same(path: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, expected).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "{} is not what the code makes; UPDATE=1 cargo test --test generated writes it",
        path.display()
    );
}

#[test]
fn the_default_file_is_what_the_types_make() {
    same("config/default.toml", &config::default_file());
}

#[test]
fn the_table_of_metrics_is_what_is_registered() {
    let head = "# Metrics\n\nPrometheus text on `/metrics` of the admin server (`admin.bind`, by default \
        127.0.0.1:9180).\nLabels never hold a connection id, a client id or a topic. A listener is named \
        `<kind>.<name>`, such as\n`tcp.default`. `exproto_connections_closed_total` appears with \
        the first event of a reason.\n\n";
    same("docs/metrics.md", &format!("{head}{}", Metrics::markdown()));
}
