//! Datagrams of one peer, in and out: what OpenSSL reads from and writes to in place of
//! a socket.
//!
//! Records are handed over one by one, and those that can do a handshake no good are
//! dropped before OpenSSL sees them. It would drop most of them itself, but not all
//! (3.6.3): application data in the clear ends a handshake, and a record of the next
//! epoch is kept in a buffer of 17 KiB however short it is, up to a hundred of them.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;

use super::hello::{RECORD_HEADER, VERSION_MAJOR};
use super::record::{ALERT, HANDSHAKE};

/// Received bytes that wait to be read; the rest is lost, as on the network. Room for
/// the largest datagram there is.
const MAX_INCOMING: usize = 64 * 1024;

/// Datagrams that wait to be sent; the rest is lost. A handshake's longest flight, a
/// chain of 8 KiB at the smallest MTU, fits in.
pub(super) const MAX_OUTGOING: usize = 64;

/// Encrypted records that are taken before the handshake is done. There is one in it,
/// the device's Finished, sent again and again on a bad link; each costs 17 KiB until
/// it can be read.
const MAX_EARLY_RECORDS: u8 = 16;

/// The shortest body of an encrypted Finished, that of CCM_8: 8 bytes of nonce, 12 of
/// header, 12 of content, 8 of tag. OpenSSL takes a shorter one amiss.
const MIN_FINISHED: usize = 40;

/// The largest body of a record (RFC 5246, 6.2.3).
const MAX_BODY: usize = super::MAX_MESSAGE + 2048;

const CHANGE_CIPHER_SPEC: u8 = 20;

/// One peer's datagrams, in and out.
#[derive(Debug, Default)]
pub(super) struct Wire {
    incoming: Vec<u8>,
    /// Where in `incoming` the next record starts.
    next: usize,
    outgoing: VecDeque<Bytes>,
    /// The device says that it encrypts from now on. A Finished that overtook this
    /// comes again.
    cipher_changed: bool,
    early_records: u8,
}

impl Wire {
    /// A datagram came. What follows a record that is cut off is dropped.
    pub fn push(&mut self, datagram: &[u8]) {
        // What was read goes here at the latest: a caller need not read to the end.
        self.incoming.drain(..self.next.min(self.incoming.len()));
        self.next = 0;
        if self.incoming.len() + datagram.len() <= MAX_INCOMING {
            // Cut off here, so that the next datagram starts with a record.
            let whole = Records(datagram).map(<[u8]>::len).sum();
            let whole = datagram.get(..whole).unwrap_or_default();
            self.incoming.extend_from_slice(whole);
        }
    }

    /// The next record that came, with its header.
    pub fn next_record(&mut self) -> Option<&[u8]> {
        let waiting = self.incoming.get(self.next..).unwrap_or_default();
        let record = Records(waiting).next()?;
        self.next += record.len();
        Some(record)
    }

    /// A datagram to send; lost when too many wait.
    pub fn send(&mut self, datagram: Bytes) {
        if self.has_room() {
            self.outgoing.push_back(datagram);
        }
    }

    /// What waits to be sent, the oldest first.
    pub fn outgoing(&self) -> &VecDeque<Bytes> {
        &self.outgoing
    }

    /// The next datagram to send.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.outgoing.pop_front()
    }

    /// Whether one more datagram may wait.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() < MAX_OUTGOING
    }

    /// Gives memory back: an idle session keeps no buffer.
    pub fn shrink(&mut self) {
        if self.next >= self.incoming.len() {
            self.incoming = Vec::new();
            self.next = 0;
        }
        if self.outgoing.is_empty() {
            self.outgoing = VecDeque::new();
        }
    }

    /// Whether OpenSSL gets to see a record.
    fn admit(&mut self, record: &[u8]) -> bool {
        let [kind, VERSION_MAJOR, _, epoch_high, epoch_low, ..] = *record else {
            return false;
        };
        let length = record.len() - RECORD_HEADER;
        if length == 0 || length > MAX_BODY {
            return false;
        }
        match u16::from_be_bytes([epoch_high, epoch_low]) {
            0 => {
                self.cipher_changed |= kind == CHANGE_CIPHER_SPEC;
                matches!(kind, CHANGE_CIPHER_SPEC | ALERT | HANDSHAKE)
            }
            1 => {
                let admitted = kind == HANDSHAKE
                    && length >= MIN_FINISHED
                    && self.cipher_changed
                    && self.early_records < MAX_EARLY_RECORDS;
                self.early_records += u8::from(admitted);
                admitted
            }
            _ => false,
        }
    }
}

/// The records of datagrams, each with its header; ends at one that is cut off.
pub(super) struct Records<'a>(pub &'a [u8]);

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

/// The number after the highest that the encrypted records of a flight have. `None`
/// without such a record.
pub(super) fn next_number(flight: &[Bytes]) -> Option<u64> {
    let records = flight.iter().flat_map(|datagram| Records(datagram));
    let numbers = records.filter_map(|record| match *record {
        [_, _, _, 0, 1, a, b, c, d, e, f, ..] => Some(u64::from_be_bytes([0, 0, a, b, c, d, e, f])),
        _ => None,
    });
    numbers.max().map(|highest| highest + 1)
}

impl io::Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let next = self.next;
            let Some(length) = self.next_record().map(<[u8]>::len) else {
                self.shrink();
                return Err(io::ErrorKind::WouldBlock.into());
            };
            // Taken out for as long as `admit` looks at it.
            let incoming = std::mem::take(&mut self.incoming);
            let record = incoming.get(next..next + length).unwrap_or_default();
            let admitted = self.admit(record);
            // OpenSSL's buffers hold the longest record but for some bytes; one that is
            // cut off here fails its check and is dropped.
            let count = record.len().min(buffer.len());
            if admitted {
                let (start, _) = buffer.split_at_mut(count);
                start.copy_from_slice(record.split_at(count).0);
            }
            self.incoming = incoming;
            if admitted {
                return Ok(count);
            }
        }
    }
}

impl io::Write for Wire {
    /// OpenSSL writes a datagram at once.
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.send(Bytes::copy_from_slice(datagram));
        Ok(datagram.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
