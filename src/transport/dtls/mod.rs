//! DTLS 1.2, the server's side, without sockets, tasks or a clock.
//!
//! Three parts: a [`Context`] holds certificates and keys, one for a listener. A
//! [`Gate`] answers datagrams of unknown peers and remembers nothing about them. A
//! [`Session`] is one peer that has shown that its address is its own.
//!
//! ```text
//! device                              gate                         session
//!   | ClientHello                      |
//!   |--------------------------------->|  no cookie: answered, forgotten
//!   | HelloVerifyRequest, a cookie     |
//!   |<---------------------------------|
//!   | ClientHello with the cookie      |
//!   |--------------------------------->|  good: OpenSSL is asked for the first time
//!   | ServerHello ... ServerHelloDone                                  |
//!   |<-----------------------------------------------------------------|
//!   | ClientKeyExchange ... Finished                                   |
//!   |----------------------------------------------------------------->|
//! ```
//!
//! OpenSSL does the handshake, and is kept away from everybody else:
//!
//! - The cookie exchange (RFC 6347, 4.2.1) is our own code in `hello.rs` and `cookie.rs`:
//!   what anybody on the internet may send is read by some hundred lines of Rust and
//!   costs some microseconds. OpenSSL could do it (`DTLSv1_listen`), at the price of an
//!   `SSL_clear`, 32 KiB of buffers and C code for every stray datagram; it is called
//!   for a ClientHello whose cookie is good, to put the handshake where the exchange
//!   has left it.
//! - The records after the handshake are our own code in `record.rs`, which says why.
//!
//! A first ClientHello may come in fragments, as those with post-quantum keys do: the
//! first fragment holds all that the gate wants to know. The others are dropped while
//! their peer is unknown and belong to the session from then on; one that overtook the
//! first is sent again by the device.

mod context;
mod cookie;
mod ffi;
pub(crate) mod fuzzing;
mod gate;
mod hello;
mod psk;
mod record;
mod session;
mod socket;
mod wire;

#[cfg(test)]
mod tests;

pub(crate) use record::hot;

pub use context::{ClientCertificates, Context, Options};
pub use gate::{Gate, Look, Offer, Shown};
pub use session::{PeerIdentity, Read, Session, WriteError};
pub use socket::{DtlsSocket, HandshakeError, Handshakes, Restarts, Succession};

use std::path::PathBuf;

/// The most bytes of one message: a record holds no more (RFC 6347, 4.1).
pub const MAX_MESSAGE: usize = 16_384;

/// Why a context cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read, or does not hold what it should.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it. Never its content.
        problem: String,
    },
    /// The options do not fit together.
    #[error("{0}")]
    Options(&'static str),
    /// OpenSSL refused what should always work.
    #[error("OpenSSL: {0}")]
    OpenSsl(#[from] openssl::error::ErrorStack),
}
