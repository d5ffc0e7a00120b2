//! The rules of pub/sub with MQTT 3.1.1 on whatever broker is named: the same tests, as
//! far as 3.1.1 can keep them.

#[path = "brokers.rs"]
mod brokers;
