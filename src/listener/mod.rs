//! Listeners: how peers become connections.
//!
//! ```text
//! stream    accept loop --admission--> a task on the emptiest shard: PROXY header,
//!                                      TLS handshake, then the connection
//! datagram  a door on each shard --admission--> a task there: DTLS handshake, then the
//!                                      connection; a datagram may be answered at the door
//! ```

mod datagram;
mod stream;

pub use datagram::{DatagramListener, Dtls, Protocol};
pub use stream::{StreamListener, Tls};
