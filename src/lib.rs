//! ExProto Sidecar: any device protocol, handled in any language, on any MQTT
//! broker.
//!
//! ```text
//! device -> transport -> connection -> handler client -> the user's service
//! the user's service -> adapter -> connection registry -> device | broker
//! broker -> delivery queue -> connection -> handler client
//! ```
//!
//! Imports point one way: `gateway` builds `listener`, `adapter` and `admin`; those
//! use `connection`; that uses `auth`, `transport`, `handler` and `broker`, which know
//! nothing of it; `auth` may ask the broker, the others know nothing of each other; at the bottom are `config`, `id`, `metrics`,
//! `rate`, `proto`, `trace`. `fuzzing` and `hot` are on top of them all and in no part of the program.

pub mod adapter;
pub mod admin;
pub mod admission;
pub mod auth;
pub mod broker;
pub mod config;
pub mod connection;
#[doc(hidden)]
pub mod fuzzing;
pub mod gateway;
mod greeted;
pub mod handler;
#[doc(hidden)]
pub mod hot;
pub mod id;
pub mod listener;
mod memory;
pub mod metrics;
mod numbers;
pub mod options;
pub mod pace;
pub mod passwd;
pub mod proto;
#[cfg(feature = "quickstart")]
pub mod quickstart;
pub mod rate;
pub mod reload;
pub mod shard;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace;
pub mod transport;
