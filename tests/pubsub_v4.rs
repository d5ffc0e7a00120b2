//! The rules of publish and subscribe with MQTT 3.1.1 towards the broker: the same
//! tests. What is about 3.1.1 alone is in `mqtt311_v4.rs`.

#[path = "pubsub.rs"]
mod pubsub;
