//! The configuration through its public functions.

mod checks;
mod dump;
mod layers;
mod report;
mod support;
mod values;
