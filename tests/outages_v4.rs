//! What happens while the broker or the handler is away, with MQTT 3.1.1 towards the
//! broker: the same tests.

#[path = "outages.rs"]
mod outages;
