//! The PROXY protocol, v1 and v2: a load balancer's word on who connected.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

pub(crate) mod fuzzing;

use std::io;
use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use ppp::{v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest header taken, in bytes. A v1 header has at most 107, a v2 header with
/// the usual extensions some hundred; the protocol allows 65,551.
pub const MAX_HEADER: usize = 4096;

/// Longest v1 header with its line end (section 2.1).
const MAX_V1: usize = 107;

/// How every v1 header begins (section 2.1).
const V1_PREFIX: &[u8] = b"PROXY ";

/// How every v2 header begins (section 2.2).
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer closed, or the socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came is no PROXY header.
    #[error("no valid PROXY header: {0}")]
    Invalid(String),
    /// More than [`MAX_HEADER`].
    #[error("a PROXY header of more than {MAX_HEADER} bytes")]
    TooLong,
}

/// What the header says.
#[derive(Debug, PartialEq, Eq)]
pub struct Announced {
    /// The client's address and the address it reached; `None` for LOCAL and
    /// UNKNOWN, where the connection's own addresses count.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    /// Bytes that came behind the header.
    pub rest: Bytes,
}

/// Reads a header from the start of a stream. The caller limits the time.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Announced, Error> {
    let mut buffer = BytesMut::new();
    loop {
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if let Some(announced) = parse(&mut buffer)? {
            return Ok(announced);
        }
    }
}

/// Takes the header off `buffer`; `None` until it is whole.
fn parse(buffer: &mut BytesMut) -> Result<Option<Announced>, Error> {
    let begins = |start: &[u8]| {
        let common = start.len().min(buffer.len());
        buffer.get(..common) == start.get(..common)
    };
    if begins(V2_SIGNATURE) {
        parse_v2(buffer)
    } else if begins(V1_PREFIX) {
        parse_v1(buffer)
    } else {
        Err(Error::Invalid("neither version's beginning".to_owned()))
    }
}

/// The parser takes some beginnings of a good line for bad ones, so it gets only
/// whole lines.
fn parse_v1(buffer: &mut BytesMut) -> Result<Option<Announced>, Error> {
    // The same whether a line that is too long comes at once or in pieces.
    let start = buffer.get(..MAX_V1).unwrap_or(buffer);
    let Some(end) = start.windows(2).position(|pair| pair == b"\r\n") else {
        return if buffer.len() >= MAX_V1 {
            Err(Error::TooLong)
        } else {
            Ok(None)
        };
    };
    let line = buffer.split_to(end + 2);
    let header = v1::Header::try_from(&line[..]);
    let header = header.map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(Some(Announced {
        addresses: v1_addresses(&header),
        rest: buffer.split().freeze(),
    }))
}

fn parse_v2(buffer: &mut BytesMut) -> Result<Option<Announced>, Error> {
    // The length stands in the last two of the 16 bytes that every header has.
    let length = match buffer.get(14..16) {
        Some(&[high, low]) => 16 + usize::from(u16::from_be_bytes([high, low])),
        _ => return Ok(None),
    };
    if length > MAX_HEADER {
        return Err(Error::TooLong);
    }
    if buffer.len() < length {
        return Ok(None);
    }
    let bytes = buffer.split_to(length);
    let header = v2::Header::try_from(&bytes[..]);
    let header = header.map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(Some(Announced {
        addresses: v2_addresses(&header),
        rest: buffer.split().freeze(),
    }))
}

fn v1_addresses(header: &v1::Header<'_>) -> Option<(SocketAddr, SocketAddr)> {
    match header.addresses {
        v1::Addresses::Tcp4(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        v1::Addresses::Tcp6(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        v1::Addresses::Unknown => None,
    }
}

fn v2_addresses(header: &v2::Header<'_>) -> Option<(SocketAddr, SocketAddr)> {
    if header.command == v2::Command::Local {
        return None;
    }
    match header.addresses {
        v2::Addresses::IPv4(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        v2::Addresses::IPv6(a) => Some((
            (a.source_address, a.source_port).into(),
            (a.destination_address, a.destination_port).into(),
        )),
        v2::Addresses::Unspecified | v2::Addresses::Unix(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    async fn read_all(mut bytes: &[u8]) -> Result<Announced, Error> {
        read(&mut bytes).await
    }

    fn v2(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        [V2_SIGNATURE, &[0x20 | command, family], &length, body].concat()
    }

    #[tokio::test]
    async fn v1_names_both_ends_and_leaves_the_rest() {
        let announced = read_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 7993\r\nhello").await;
        let expected = Announced {
            addresses: Some((
                "192.0.2.1:5000".parse().unwrap(),
                "192.0.2.2:7993".parse().unwrap(),
            )),
            rest: Bytes::from_static(b"hello"),
        };
        assert_eq!(announced.unwrap(), expected);
        let announced = read_all(b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n").await;
        let peer = announced.unwrap().addresses.unwrap().0;
        assert_eq!(peer, address("[2001:db8::1]:1"));
        let announced = read_all(b"PROXY UNKNOWN\r\nx").await.unwrap();
        assert_eq!(announced.addresses, None);
        assert_eq!(&announced.rest[..], b"x");
    }

    #[tokio::test]
    async fn v2_names_both_ends_skips_extensions_and_knows_local() {
        let mut body = vec![192, 0, 2, 1, 192, 0, 2, 2, 0x13, 0x88, 0x1f, 0x39];
        body.extend([0x04, 0, 3, 1, 2, 3]);
        let mut bytes = v2(1, 0x11, &body);
        bytes.extend(b"rest");
        let announced = read_all(&bytes).await.unwrap();
        let (peer, local) = announced.addresses.unwrap();
        assert_eq!(peer, address("192.0.2.1:5000"));
        assert_eq!(local, address("192.0.2.2:7993"));
        assert_eq!(&announced.rest[..], b"rest");
        let announced = read_all(&v2(0, 0x00, &[])).await.unwrap();
        assert_eq!(announced.addresses, None);
    }

    #[tokio::test]
    async fn a_header_in_single_bytes_is_put_together() {
        let (mut near, mut far) = tokio::io::duplex(1);
        let write = async {
            use tokio::io::AsyncWriteExt;
            far.write_all(b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n")
                .await
                .unwrap();
            far
        };
        let read = async { read(&mut near).await.unwrap() };
        let (announced, _far) = tokio::join!(read, write);
        assert!(announced.addresses.is_some());
    }

    #[tokio::test]
    async fn what_is_no_header_is_refused() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"PROXY TCP4 a b c d\r\n", b"\0"] {
            assert!(
                matches!(read_all(bytes).await, Err(Error::Invalid(_))),
                "{bytes:?}"
            );
        }
        let endless = [b"PROXY TCP4 ".to_vec(), vec![b'1'; 5000]].concat();
        assert!(read_all(&endless).await.is_err());
        let long = [&b"PROXY UNKNOWN "[..], &[b'1'; 200], b"\r\n"].concat();
        assert!(matches!(read_all(&long).await, Err(Error::TooLong)));
        let huge = v2(1, 0x11, &vec![0; 60_000]);
        assert!(matches!(read_all(&huge).await, Err(Error::TooLong)));
        assert!(matches!(read_all(b"PROXY").await, Err(Error::Io(_))));
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), v2 in any::<bool>()) {
            let start = if v2 { V2_SIGNATURE } else { V1_PREFIX };
            let _ = parse(&mut BytesMut::from(&[start, &bytes].concat()[..]));
            let _ = parse(&mut BytesMut::from(&bytes[..]));
        }
    }
}
