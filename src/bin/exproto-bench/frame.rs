//! The device protocol of the bench: small frames behind a length.
//!
//! ```text
//!  0       4     5         8        12        16             24
//! +--------+-----+---------+---------+---------+--------------+---------+
//! | length | kind|   run   | device  | sequence|     time     | rest    |
//! +--------+-----+---------+---------+---------+--------------+---------+
//!   u32      u8     u24       u32       u32         u64
//! ```
//!
//! Numbers are big-endian. `length` counts what follows it. `run` is a random number of
//! this run, so that what earlier runs left at a broker is not counted. `time` is when
//! the frame was meant to be sent, in nanoseconds since the bench began. Over UDP and
//! DTLS a datagram is a frame.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of a frame that has no rest.
pub const HEADER: usize = 24;

/// Longest frame that is read, in bytes. Larger ones are taken for another protocol.
pub const MAX_FRAME: usize = 1 << 20;

/// The device number of a message that is for every device.
pub const EVERY_DEVICE: u32 = u32::MAX;

/// What the receiver is to do with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The device's first frame: its rest says what the handler is to set up.
    Hello,
    /// The handler's answer to a hello.
    Welcome,
    /// The handler's answer to a hello that failed; the rest is the reason.
    Failed,
    /// The handler publishes the whole frame.
    Uplink,
    /// The handler sends the whole frame back.
    Echo,
    /// The payload of a message: the handler sends it to the device.
    Downlink,
}

impl Kind {
    fn letter(self) -> u8 {
        match self {
            Self::Hello => b'H',
            Self::Welcome => b'W',
            Self::Failed => b'F',
            Self::Uplink => b'U',
            Self::Echo => b'E',
            Self::Downlink => b'D',
        }
    }

    fn from_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'H' => Self::Hello,
            b'W' => Self::Welcome,
            b'F' => Self::Failed,
            b'U' => Self::Uplink,
            b'E' => Self::Echo,
            b'D' => Self::Downlink,
            _ => return None,
        })
    }
}

/// Tells the runs of the bench apart. 24 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunId(u32);

impl RunId {
    /// From random bytes.
    pub fn new(random: [u8; 3]) -> Self {
        let [a, b, c] = random;
        Self(u32::from_be_bytes([0, a, b, c]))
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

/// What stands before the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub kind: Kind,
    pub run: RunId,
    pub device: u32,
    pub sequence: u32,
    /// Nanoseconds since the bench began.
    pub time: u64,
}

/// A frame that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub head: Head,
    /// All of it, length included.
    pub bytes: Bytes,
}

impl Frame {
    /// What follows the head.
    pub fn rest(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("a frame of {0} bytes")]
    Length(usize),
    #[error("a frame of the unknown kind {0:#04x}")]
    Kind(u8),
}

/// Appends a frame with this rest.
pub fn write(head: Head, rest: &[u8], out: &mut BytesMut) {
    write_head(head, HEADER + rest.len(), out);
    out.put_slice(rest);
}

/// Appends a frame of `size` bytes, at least [`HEADER`], with zeros for a rest.
pub fn write_sized(head: Head, size: usize, out: &mut BytesMut) {
    let size = size.clamp(HEADER, MAX_FRAME);
    write_head(head, size, out);
    out.put_bytes(0, size - HEADER);
}

fn write_head(head: Head, size: usize, out: &mut BytesMut) {
    out.reserve(size);
    // Sizes are below MAX_FRAME: payloads by the options, texts by what they are.
    out.put_u32(u32::try_from(size - 4).unwrap_or(u32::MAX));
    out.put_u8(head.kind.letter());
    out.put_uint(u64::from(head.run.0), 3);
    out.put_u32(head.device);
    out.put_u32(head.sequence);
    out.put_u64(head.time);
}

/// Takes the next whole frame off `buffer`; `None` until one is there.
///
/// # Errors
/// Bytes that no bench has written. The buffer is of no use then.
pub fn read(buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
    let Some(length) = buffer.first_chunk::<4>() else {
        return Ok(None);
    };
    let size = 4 + usize::try_from(u32::from_be_bytes(*length)).unwrap_or(MAX_FRAME);
    if !(HEADER..=MAX_FRAME).contains(&size) {
        return Err(Error::Length(size));
    }
    if buffer.len() < size {
        return Ok(None);
    }
    let bytes = buffer.split_to(size).freeze();
    let head = read_head(&bytes)?;
    Ok(Some(Frame { head, bytes }))
}

/// Reads bytes that are exactly one frame, such as a message's payload.
///
/// # Errors
/// As [`read`], and where there is more or less than one.
pub fn read_one(bytes: Bytes) -> Result<Frame, Error> {
    let found = bytes.len();
    let length = bytes.first_chunk::<4>().copied().unwrap_or_default();
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(MAX_FRAME);
    if !(HEADER..=MAX_FRAME).contains(&found) || length + 4 != found {
        return Err(Error::Length(found));
    }
    let head = read_head(&bytes)?;
    Ok(Frame { head, bytes })
}

/// `bytes` holds a header at least.
fn read_head(bytes: &Bytes) -> Result<Head, Error> {
    let mut from = bytes.get(4..HEADER).ok_or(Error::Length(bytes.len()))?;
    let letter = from.get_u8();
    let kind = Kind::from_letter(letter).ok_or(Error::Kind(letter))?;
    Ok(Head {
        kind,
        run: RunId(u32::try_from(from.get_uint(3)).unwrap_or_default()),
        device: from.get_u32(),
        sequence: from.get_u32(),
        time: from.get_u64(),
    })
}

/// What a hello asks the handler for, one line each:
///
/// ```text
/// client <client id>
/// publish <qos> <topic of uplink frames>
/// subscribe <qos> <topic filter>
/// ```
///
/// Without a `client` line the handler only answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    pub client: Option<String>,
    pub publish: Option<(u32, String)>,
    pub subscribe: Vec<(u32, String)>,
}

impl Wishes {
    /// As it stands in a hello.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        if let Some(client) = &self.client {
            text += &format!("client {client}\n");
        }
        if let Some((qos, topic)) = &self.publish {
            text += &format!("publish {qos} {topic}\n");
        }
        for (qos, filter) in &self.subscribe {
            text += &format!("subscribe {qos} {filter}\n");
        }
        text
    }

    /// Reads the rest of a hello; lines that are none of these are passed over.
    pub fn parse(rest: &[u8]) -> Self {
        let mut wishes = Self::default();
        let numbered = |rest: &str| {
            let (qos, name) = rest.split_once(' ')?;
            Some((qos.parse().ok()?, name.to_owned()))
        };
        for line in String::from_utf8_lossy(rest).lines() {
            match line.split_once(' ') {
                Some(("client", name)) => wishes.client = Some(name.to_owned()),
                Some(("publish", rest)) => wishes.publish = numbered(rest),
                Some(("subscribe", rest)) => wishes.subscribe.extend(numbered(rest)),
                _ => {}
            }
        }
        wishes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(kind: Kind) -> Head {
        Head {
            kind,
            run: RunId::new([0xab, 0xcd, 0xef]),
            device: 7,
            sequence: 0x0102_0304,
            time: u64::MAX - 1,
        }
    }

    /// The layout that the documents promise to authors of handlers.
    #[test]
    fn a_frame_is_as_documented() {
        let mut out = BytesMut::new();
        write(head(Kind::Uplink), b"xy", &mut out);
        let expected = b"\0\0\0\x16U\xab\xcd\xef\0\0\0\x07\x01\x02\x03\x04\
            \xff\xff\xff\xff\xff\xff\xff\xfexy";
        assert_eq!(&out[..], expected);
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_split() {
        let kinds = [
            Kind::Hello,
            Kind::Welcome,
            Kind::Failed,
            Kind::Uplink,
            Kind::Echo,
            Kind::Downlink,
        ];
        let mut all = BytesMut::new();
        for (number, kind) in kinds.into_iter().enumerate() {
            write_sized(head(kind), HEADER + number, &mut all);
        }
        for step in 1..40 {
            let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
            for part in all.chunks(step) {
                buffer.extend_from_slice(part);
                while let Some(frame) = read(&mut buffer).unwrap() {
                    assert_eq!(frame.bytes.len(), HEADER + found.len());
                    assert_eq!(read_one(frame.bytes.clone()).unwrap(), frame);
                    assert_eq!(frame.rest().len(), found.len());
                    found.push(frame.head);
                }
            }
            assert_eq!(found, kinds.map(head));
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn a_size_below_the_header_is_the_header() {
        let mut out = BytesMut::new();
        write_sized(head(Kind::Echo), 1, &mut out);
        assert_eq!(out.len(), HEADER);
    }

    #[test]
    fn other_protocols_are_refused() {
        let read = |bytes: &[u8]| read(&mut BytesMut::from(bytes));
        assert_eq!(read(b"GET / HTTP/1.1"), Err(Error::Length(0x4745_5420 + 4)));
        assert_eq!(read(b"\0\0\0\x01U"), Err(Error::Length(5)));
        let mut other = [0; HEADER];
        other[3] = 20;
        other[4] = b'X';
        assert_eq!(read(&other), Err(Error::Kind(b'X')));
        assert_eq!(
            read_one(Bytes::from_static(b"hello")),
            Err(Error::Length(5))
        );
    }

    #[test]
    fn wishes_survive_their_text() {
        let wishes = Wishes {
            client: Some("bench-1".to_owned()),
            publish: Some((1, "a/b c".to_owned())),
            subscribe: vec![(0, "d/#".to_owned()), (2, "e".to_owned())],
        };
        assert_eq!(
            wishes.to_text(),
            "client bench-1\npublish 1 a/b c\nsubscribe 0 d/#\nsubscribe 2 e\n"
        );
        assert_eq!(Wishes::parse(wishes.to_text().as_bytes()), wishes);
        assert_eq!(Wishes::parse(b"\xffnonsense\npublish x"), Wishes::default());
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = read(&mut buffer) {}
            let _ = read_one(Bytes::from(bytes.clone()));
            let _ = Wishes::parse(&bytes);
        }
    }
}
