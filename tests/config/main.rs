//! The configuration through its public functions.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod checks;
mod dump;
mod handlers;
mod layers;
mod lists;
mod report;
mod support;
mod values;
