//! The rules of publish and subscribe with MQTT 3.1.1 towards the broker: the same
//! tests, and those that are about 3.1.1 alone in `mqtt_3_1_1.rs`.

#[path = "pubsub.rs"]
mod pubsub;
