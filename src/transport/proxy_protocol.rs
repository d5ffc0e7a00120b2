//! The PROXY protocol, v1 and v2: a load balancer's word on who connected.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

use std::io;
use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use ppp::{HeaderResult, PartialResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest header taken, in bytes. A v1 header has at most 107, a v2 header with
/// the usual extensions some hundred; the protocol allows 65,551.
pub const MAX_HEADER: usize = 4096;

/// Longest v1 header with its line end (section 2.1).
const MAX_V1: usize = 107;

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
    let header = HeaderResult::parse(buffer);
    let is_v1 = matches!(header, HeaderResult::V1(_));
    if header.is_incomplete() {
        let limit = if is_v1 { MAX_V1 } else { MAX_HEADER };
        return if buffer.len() >= limit {
            Err(Error::TooLong)
        } else {
            Ok(None)
        };
    }
    let (length, addresses) = match header {
        HeaderResult::V1(Ok(header)) => (header.header.len(), v1_addresses(&header)),
        HeaderResult::V2(Ok(header)) => (header.len(), v2_addresses(&header)),
        HeaderResult::V1(Err(error)) => return Err(Error::Invalid(error.to_string())),
        HeaderResult::V2(Err(error)) => return Err(Error::Invalid(error.to_string())),
    };
    if length > MAX_HEADER {
        return Err(Error::TooLong);
    }
    // The parser's length is that of what it parsed, so it is within the buffer.
    let rest = buffer.split_off(length.min(buffer.len())).freeze();
    Ok(Some(Announced { addresses, rest }))
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

    async fn read_all(mut bytes: &[u8]) -> Result<Announced, Error> {
        read(&mut bytes).await
    }

    const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

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
        assert_eq!(peer, "[2001:db8::1]:1".parse().unwrap());
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
        assert_eq!(peer, "192.0.2.1:5000".parse().unwrap());
        assert_eq!(local, "192.0.2.2:7993".parse().unwrap());
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
        let (announced, _far) = tokio::join!(read(&mut near), write);
        assert!(announced.unwrap().addresses.is_some());
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
        let huge = v2(1, 0x11, &vec![0; 60_000]);
        assert!(matches!(read_all(&huge).await, Err(Error::TooLong)));
        assert!(matches!(read_all(b"PROXY").await, Err(Error::Io(_))));
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), v2 in any::<bool>()) {
            let start: &[u8] = if v2 { V2_SIGNATURE } else { b"PROXY " };
            let _ = parse(&mut BytesMut::from(&[start, &bytes].concat()[..]));
            let _ = parse(&mut BytesMut::from(&bytes[..]));
        }
    }
}
