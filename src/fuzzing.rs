//! What the fuzz targets in `fuzz/` and the replay of their corpora in
//! `tests/corpora.rs` call: one function for each parser of bytes that anybody may have
//! written. It checks what must hold whatever the bytes are, and panics otherwise.
//!
//! They are in the library because the parsers are private, and one text serves the
//! fuzzer and `cargo test`. Nothing in the program calls them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod text;
mod topics;

pub use crate::auth::fuzzing::{acl_rules, http_answer, token};
pub use crate::broker::fuzzing::{mqtt5, mqtt311};
pub use crate::tls::fuzzing::certificate;
pub use crate::transport::dtls::fuzzing::{
    dtls_gate, dtls_handshake, dtls_session, dtls_wire, psk_file,
};
pub use crate::transport::proxy_protocol::fuzzing::proxy_header;
pub use text::access_rules;
pub use topics::{topic_trie, topics};

/// What a target does with its bytes.
pub type Target = fn(&[u8]);

/// Every target by its name, which is that of its file and of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("access_rules", access_rules),
    ("acl_rules", acl_rules),
    ("certificate", certificate),
    ("dtls_gate", dtls_gate),
    ("dtls_handshake", dtls_handshake),
    ("dtls_session", dtls_session),
    ("dtls_wire", dtls_wire),
    ("http_answer", http_answer),
    ("mqtt311", mqtt311),
    ("mqtt5", mqtt5),
    ("proxy_header", proxy_header),
    ("psk_file", psk_file),
    ("token", token),
    ("topic_trie", topic_trie),
    ("topics", topics),
];
