//! Abuse that must cost little and hurt nobody else: the real program, what it takes
//! of memory and descriptors, and well-behaved devices beside whoever means no good.
//!
//! One test at a time, so that the figures are its own; each prints them
//! (`cargo test --test abuse -- --nocapture`). Times are figures too, and no assertion.
//! `tests/admission.rs`, `tests/ssl.rs` and `tests/dtls.rs` have the smaller cases.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod descriptors;
mod flood;
mod garbage;
mod handshakes;
mod scene;
mod silent;
mod unread;
