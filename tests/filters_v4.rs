//! Many filters, with MQTT 3.1.1 towards the broker: the same test.

#[path = "filters.rs"]
mod filters;
