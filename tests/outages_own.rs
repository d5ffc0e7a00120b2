//! What happens while the broker or the handler is away, where each device has a session
//! of its own at the broker: the same tests.

#[path = "outages.rs"]
mod outages;
