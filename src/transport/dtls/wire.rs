//! What OpenSSL reads from and writes to in place of a socket: datagrams of one peer.
//!
//! Records are handed over one by one, and those that cannot do the session good are
//! dropped before OpenSSL sees them. It would drop most of them itself, but not all
//! (3.6.3, each found by a test of `tests/abuse.rs`):
//!
//! - an encrypted record that is shorter than the cipher's own bytes ends the session,
//! - application data in the clear ends a handshake,
//! - a record of the next epoch is kept in a buffer of 17 KiB however short it is, up
//!   to a hundred of them.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;

use super::hello::{RECORD_HEADER, VERSION_MAJOR};

/// Received bytes that wait to be read; the rest is lost, as on the network. Room for
/// the largest datagram there is.
const MAX_INCOMING: usize = 64 * 1024;

/// Datagrams that wait to be sent; the rest is lost. A handshake's longest flight with
/// a chain of 16 KiB at the smallest MTU fits in.
pub(super) const MAX_OUTGOING: usize = 64;

/// Encrypted records that are taken before the handshake is done. There is one in it,
/// the device's Finished, sent again and again on a bad link; each costs 17 KiB until
/// it can be read.
const MAX_EARLY_RECORDS: u8 = 16;

/// The shortest body of an encrypted Finished, that of CCM_8: 8 bytes of nonce, 12 of
/// header, 12 of content, 8 of tag.
const MIN_FINISHED: usize = 40;

/// The largest body of a record (RFC 5246, 6.2.3).
const MAX_RECORD: usize = super::MAX_MESSAGE + 2048;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// One peer's datagrams, in and out.
#[derive(Debug, Default)]
pub(super) struct Wire {
    incoming: Vec<u8>,
    /// Where in `incoming` the next record starts.
    next: usize,
    outgoing: VecDeque<Bytes>,
    phase: Phase,
}

/// What may come.
#[derive(Debug)]
enum Phase {
    Handshake {
        /// The device says that it encrypts from now on. A Finished that overtook this
        /// comes again.
        cipher_changed: bool,
        early_records: u8,
    },
    Established {
        /// Bytes of the shortest body: what the cipher adds to no data.
        shortest: usize,
    },
}

impl Default for Phase {
    fn default() -> Self {
        Self::Handshake {
            cipher_changed: false,
            early_records: 0,
        }
    }
}

impl Wire {
    /// A datagram came. Must not be called with half of one: what follows a record
    /// that is cut off is dropped.
    pub fn push(&mut self, datagram: &[u8]) {
        if self.incoming.len() + datagram.len() <= MAX_INCOMING {
            // Cut off here, so that the next datagram starts with a record.
            let whole = Records(datagram).map(<[u8]>::len).sum();
            self.incoming
                .extend_from_slice(datagram.get(..whole).unwrap_or(datagram));
        }
    }

    /// Whether records wait.
    pub fn has_incoming(&self) -> bool {
        self.next < self.incoming.len()
    }

    /// The next datagram to send.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.outgoing.pop_front()
    }

    /// Whether one more datagram may wait.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() < MAX_OUTGOING
    }

    /// From now on everything is encrypted, with this cipher suite by OpenSSL's name.
    pub fn set_established(&mut self, cipher: &str) {
        let shortest = if cipher.ends_with("CCM8") || cipher.contains("CHACHA20") {
            16
        } else {
            // GCM and CCM; with CBC it is more, and OpenSSL drops what is between.
            24
        };
        self.phase = Phase::Established { shortest };
    }

    /// Gives memory back. An idle session keeps no buffer here.
    pub fn shrink(&mut self) {
        if !self.has_incoming() {
            self.incoming = Vec::new();
            self.next = 0;
        }
        if self.outgoing.is_empty() {
            self.outgoing = VecDeque::new();
        }
    }
}

impl Phase {
    /// Whether a record is let through.
    fn admit(&mut self, record: &[u8]) -> bool {
        let [kind, VERSION_MAJOR, _, epoch_high, epoch_low, ..] = *record else {
            return false;
        };
        let length = record.len() - RECORD_HEADER;
        if length == 0 || length > MAX_RECORD {
            return false;
        }
        match (self, u16::from_be_bytes([epoch_high, epoch_low])) {
            (Self::Handshake { cipher_changed, .. }, 0) => {
                *cipher_changed |= kind == CHANGE_CIPHER_SPEC;
                matches!(kind, CHANGE_CIPHER_SPEC | ALERT | HANDSHAKE)
            }
            (
                Self::Handshake {
                    cipher_changed: true,
                    early_records,
                },
                1,
            ) => {
                let admitted = kind == HANDSHAKE
                    && length >= MIN_FINISHED
                    && *early_records < MAX_EARLY_RECORDS;
                *early_records += u8::from(admitted);
                admitted
            }
            (Self::Established { shortest }, 1) => {
                // A Finished comes again when the device has not got ours.
                matches!(kind, ALERT | HANDSHAKE | APPLICATION_DATA) && length >= *shortest
            }
            // In the clear once the handshake is done: whoever can send from the
            // peer's address may have written it. Or a renegotiation: there is none.
            _ => false,
        }
    }
}

/// The records of datagrams, each with its header; ends at one that is cut off.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let header: &[u8; RECORD_HEADER] = self.0.first_chunk()?;
        let [.., high, low] = *header;
        let length = RECORD_HEADER + usize::from(u16::from_be_bytes([high, low]));
        let (record, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(record)
    }
}

impl io::Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let waiting = self.incoming.get(self.next..).unwrap_or_default();
        for record in Records(waiting) {
            self.next += record.len();
            if !self.phase.admit(record) {
                continue;
            }
            // OpenSSL's buffers hold the longest record that `admit` lets through but
            // for some bytes; one that is cut off here fails its check and is dropped.
            let count = record.len().min(buffer.len());
            let (start, _) = buffer.split_at_mut(count);
            start.copy_from_slice(record.split_at(count).0);
            return Ok(count);
        }
        self.incoming.clear();
        self.next = 0;
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl io::Write for Wire {
    /// OpenSSL writes a datagram at once: a packed flight of the handshake, or a record.
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        if self.has_room() {
            self.outgoing.push_back(Bytes::copy_from_slice(datagram));
        }
        Ok(datagram.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
