//! See `crate::fuzzing`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::mem::discriminant;

use super::*;

/// The beginning of a stream. However it is cut into pieces, the same is read; what is
/// read and written again in either version is the same.
pub fn proxy_header(bytes: &[u8]) {
    let whole = in_pieces(bytes, bytes.len().max(1));
    for piece in [1, 7] {
        let pieces = in_pieces(bytes, piece);
        match (&whole, &pieces) {
            (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
            (Err(whole), Err(pieces)) => assert_eq!(discriminant(whole), discriminant(pieces)),
            _ => panic!("at once {whole:?}, in pieces of {piece} {pieces:?}"),
        }
    }
    let Ok(Some(announced)) = whole else { return };
    assert!(bytes.ends_with(&announced.rest));
    assert!(bytes.len() - announced.rest.len() <= MAX_HEADER);
    let Some((peer, local)) = announced.addresses else {
        return;
    };
    for written in [write_v1(peer, local), write_v2(peer, local)] {
        let again = in_pieces(&written, 3).unwrap().unwrap();
        assert_eq!(again.addresses, announced.addresses);
        assert!(again.rest.is_empty());
    }
}

/// As [`read`] does it, with pieces of this size.
fn in_pieces(bytes: &[u8], piece: usize) -> Result<Option<Announced>, Error> {
    let mut buffer = BytesMut::new();
    let mut pieces = bytes.chunks(piece);
    while let Some(piece) = pieces.next() {
        buffer.extend_from_slice(piece);
        let waiting = buffer.len();
        if let Some(announced) = parse(&mut buffer)? {
            let rest = [&announced.rest[..], &pieces.collect::<Vec<_>>().concat()].concat();
            let rest = rest.into();
            return Ok(Some(Announced { rest, ..announced }));
        }
        assert_eq!(buffer.len(), waiting);
        assert!(waiting < MAX_HEADER);
    }
    Ok(None)
}

fn write_v1(peer: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let family = if peer.is_ipv4() { 4 } else { 6 };
    let (from, to) = (peer.ip(), local.ip());
    format!(
        "PROXY TCP{family} {from} {to} {} {}\r\n",
        peer.port(),
        local.port()
    )
    .into()
}

fn write_v2(peer: SocketAddr, local: SocketAddr) -> Vec<u8> {
    let mut body = Vec::new();
    for address in [peer, local] {
        match address {
            SocketAddr::V4(address) => body.extend(address.ip().octets()),
            SocketAddr::V6(address) => body.extend(address.ip().octets()),
        }
    }
    body.extend(peer.port().to_be_bytes());
    body.extend(local.port().to_be_bytes());
    let family = if peer.is_ipv4() { 0x11 } else { 0x21 };
    [V2_SIGNATURE, &[0x21, family, 0, body.len() as u8], &body].concat()
}
