//! Listeners: how peers become connections.
//!
//! ```text
//! stream    accept loop --admission--> a task on the emptiest shard: PROXY header,
//!                                      TLS handshake, then the connection
//! ```

mod stream;

pub use stream::{StreamListener, Tls};
