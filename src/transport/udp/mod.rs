//! UDP: one datagram is one message, a connection is a peer.
//!
//! ```text
//! kernel     one socket a shard (SO_REUSEPORT); a peer stays with its socket
//! Demux      one task a shard: receives in batches and looks the peer up
//!   known      into the peer's bounded queue, and its task is woken
//!   stranger   the Door says: refuse, answer without keeping anything, or admit
//! UdpSocket  a peer's end: takes from its queue, sends through the shard's socket
//! ```
//!
//! A peer is its address and the address of ours that it asked: that is what the kernel
//! spreads by, and the answer must come from where the question went. A peer with two of
//! our addresses in use is two connections, whatever the number of shards.
//!
//! The only task is [`Demux::run`]. Nothing in here knows who may come in: that is the
//! [`Door`]'s, who must know the rules of admission or the cookies of DTLS.

mod bind;
mod demux;
pub(crate) mod hot;
mod io;
mod queue;
mod shared;
mod socket;
mod table;
#[cfg(test)]
mod tests;

pub use bind::bind;
pub use demux::{Demux, Door, Stranger, Verdict};
pub use socket::UdpSocket;

use metrics::Counter;

/// Largest payload of a datagram in bytes: IPv4's 65,535 without its smallest header and
/// UDP's. IPv6 takes 20 bytes more, without jumbograms.
pub const MAX_DATAGRAM: usize = 65_527;

/// How UDP sockets are set up and what peers may use.
#[derive(Debug, Clone)]
pub struct Options {
    /// SO_RCVBUF in bytes, each shard; `None` leaves it to the kernel. It is the only
    /// buffer between two turns of the shard's thread, for all of its peers together:
    /// the usual 208 KiB hold some 250 small datagrams.
    pub recbuf: Option<usize>,
    /// SO_SNDBUF in bytes, each shard; `None` leaves it to the kernel.
    pub sndbuf: Option<usize>,
    /// Datagrams that wait for a peer's connection, whose callback in flight may take
    /// a while.
    pub queue_datagrams: usize,
    /// Bytes of the same. A single datagram is always taken.
    pub queue_bytes: usize,
    /// Bytes that wait in all queues of a shard together, so that many peers cannot do
    /// what one may not. Beyond it a peer with nothing in its queue may still put in one
    /// datagram of usual size.
    pub queues_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            recbuf: None,
            sndbuf: None,
            queue_datagrams: 64,
            queue_bytes: 64 * 1024,
            queues_bytes: 64 * 1024 * 1024,
        }
    }
}

/// What is counted, one set a listener. What a [`Door`] refuses it counts itself.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Datagrams received, whoever they came from.
    pub received: Counter,
    /// Datagrams sent.
    pub sent: Counter,
    /// Dropped on arrival because the peer's queue was full.
    pub queue_full: Counter,
    /// Dropped on arrival because the queues of the shard were full.
    pub queues_full: Counter,
    /// Waiting when their peer was forgotten.
    pub closed: Counter,
    /// From strangers while the gateway drains.
    pub draining: Counter,
    /// From addresses that nobody can have, such as port 0, or to a broadcast address:
    /// the kernel gives that to every shard, and nobody can answer from it.
    pub bad_address: Counter,
    /// Not sent because no such datagram fits on the way to the peer.
    pub too_large: Counter,
    /// Not sent because the system refused, for want of a route or by its firewall.
    pub send_failed: Counter,
    /// Failures to receive. ICMP errors are none: the kernel keeps them to itself.
    pub receive_errors: Counter,
}

impl Counters {
    /// Counters that nobody reads.
    pub fn noop() -> Self {
        let none = Counter::noop;
        Self {
            received: none(),
            sent: none(),
            queue_full: none(),
            queues_full: none(),
            closed: none(),
            draining: none(),
            bad_address: none(),
            too_large: none(),
            send_failed: none(),
            receive_errors: none(),
        }
    }
}
