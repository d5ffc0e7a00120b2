//! The rules of publish and subscribe where each device has a session of its own at the
//! broker: the same tests. What is about such sessions alone is in `per_client/`.

#[path = "pubsub.rs"]
mod pubsub;
