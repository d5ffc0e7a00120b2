//! The two messages of the cookie exchange: ClientHello read as far as its cookie, and
//! HelloVerifyRequest written.

use bytes::Bytes;

/// Record header (RFC 6347, 4.1): type, version, epoch, sequence number, length.
pub(super) const RECORD_HEADER: usize = 13;

/// Handshake header (RFC 6347, 4.2.2): type, length, message number, fragment's place
/// and length.
const HANDSHAKE_HEADER: usize = 12;

const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const HELLO_VERIFY_REQUEST: u8 = 3;

/// DTLS 1.0. A HelloVerifyRequest names it whatever is spoken later (RFC 6347, 4.2.1).
const VERSION_1_0: [u8; 2] = [0xfe, 0xff];

/// The first byte of every version of DTLS.
pub(super) const VERSION_MAJOR: u8 = 0xfe;

/// What a device's first message says about itself, as far as its cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClientHello<'a> {
    /// Epoch and sequence number of its record; the answer repeats them.
    record_number: [u8; 8],
    /// 0 in the first, 1 in the one with a cookie.
    pub message_number: u16,
    /// The newest version the device offers.
    pub version: [u8; 2],
    /// The same with and without cookie (RFC 6347, 4.2.1), another for each handshake.
    pub random: [u8; 32],
    /// A session to be resumed.
    pub session_id: &'a [u8],
    /// Empty in the first.
    pub cookie: &'a [u8],
}

impl<'a> ClientHello<'a> {
    /// Reads the first record of a datagram; `None` if it is no beginning of a
    /// ClientHello. Refuses what OpenSSL would refuse.
    pub fn parse(datagram: &'a [u8]) -> Option<Self> {
        let mut record = Reader(datagram);
        if record.byte()? != HANDSHAKE_RECORD || record.array::<2>()?[0] != VERSION_MAJOR {
            return None;
        }
        let record_number: [u8; 8] = record.array()?;
        // Epoch 0: nothing is encrypted yet.
        if record_number.first_chunk() != Some(&[0, 0]) {
            return None;
        }
        let length = record.number::<2>()?;
        let mut message = Reader(record.take(length)?);
        if message.byte()? != CLIENT_HELLO {
            return None;
        }
        let length = message.number::<3>()?;
        let message_number = u16::from_be_bytes(message.array()?);
        let fragment_start = message.number::<3>()?;
        let fragment_length = message.number::<3>()?;
        let whole = fragment_length == message.0.len();
        if message_number > 1 || fragment_start != 0 || fragment_length > length || !whole {
            return None;
        }
        let version: [u8; 2] = message.array()?;
        let random = message.array()?;
        let session_id = message.number::<1>()?;
        let session_id = message.take(session_id)?;
        let cookie = message.number::<1>()?;
        let cookie = message.take(cookie)?;
        (version[0] == VERSION_MAJOR && session_id.len() <= 32).then_some(Self {
            record_number,
            message_number,
            version,
            random,
            session_id,
            cookie,
        })
    }

    /// The datagram that asks for the same again with this cookie. Never longer than
    /// what it answers, which has 61 bytes at least, if the cookie has no more than 33.
    pub fn verify_request(&self, cookie: &[u8; super::cookie::LENGTH]) -> Bytes {
        const BODY: usize = 2 + 1 + super::cookie::LENGTH;
        let [_, body_length] = (BODY as u16).to_be_bytes();
        let [_, message_length] = ((HANDSHAKE_HEADER + BODY) as u16).to_be_bytes();
        let mut answer = Vec::with_capacity(RECORD_HEADER + HANDSHAKE_HEADER + BODY);
        answer.push(HANDSHAKE_RECORD);
        answer.extend(VERSION_1_0);
        answer.extend(self.record_number);
        answer.extend([0, message_length]);
        answer.extend([HELLO_VERIFY_REQUEST, 0, 0, body_length]);
        // Message number 0 and one whole fragment.
        answer.extend([0, 0, 0, 0, 0, 0, 0, body_length]);
        answer.extend(VERSION_1_0);
        answer.push(super::cookie::LENGTH as u8);
        answer.extend(cookie);
        answer.into()
    }
}

/// Reads from the front of bytes that may end anywhere.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A number of N bytes, the highest first.
    fn number<const N: usize>(&mut self) -> Option<usize> {
        let bytes = self.array::<N>()?;
        Some(
            bytes
                .iter()
                .fold(0, |sum, byte| sum << 8 | usize::from(*byte)),
        )
    }
}
