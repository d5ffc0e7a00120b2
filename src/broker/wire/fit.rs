//! Publishes from the broker that are larger than we take.
//!
//! With MQTT 3.1.1 a broker cannot be told what we take, and one of MQTT 5 may not obey
//! (3.1.2.11.4). A link that broke upon such a message would break upon it for ever: it is
//! sent again. So it is read as far as its packet id and skipped. Both versions have
//! that part in common.

use bytes::Bytes;

use super::{InboundPublish, UserProperties, WireError};
use crate::broker::QoS;

/// Whether the next packet is a publish larger than we take.
#[derive(Debug)]
pub(super) enum Fit {
    /// It is not, or nobody knows yet.
    Fits,
    /// It is, and more of its head has to come.
    Unread,
    /// The publish without its payload, and its size on the wire.
    TooLarge(InboundPublish, usize),
}

/// Looks at what comes next.
pub(super) fn fit(buffer: &[u8], max_packet_size: u32) -> Result<Fit, WireError> {
    let limit = usize::try_from(max_packet_size).unwrap_or(usize::MAX);
    let Some(first) = buffer.first().filter(|first| *first >> 4 == 3) else {
        return Ok(Fit::Fits);
    };
    let Some((length, header)) = variable(buffer.get(1..).unwrap_or_default())? else {
        return Ok(Fit::Fits);
    };
    let size = 1 + header + length;
    if size <= limit {
        return Ok(Fit::Fits);
    }
    Ok(match head(*first, buffer, size)? {
        Some(publish) => Fit::TooLarge(publish, size),
        None => Fit::Unread,
    })
}

/// A publish of so many bytes without its payload, when its head is there. A head that
/// is not valid is told at once: nothing behind it can be waited for or skipped.
fn head(first: u8, buffer: &[u8], size: usize) -> Result<Option<InboundPublish>, WireError> {
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |all, byte| all << 8 | u16::from(*byte))
    };
    let qos = QoS::from_number(u32::from(first >> 1 & 3));
    let qos = qos.ok_or_else(|| WireError::invalid("a PUBLISH of QoS 3"))?;
    let length_bytes = buffer.iter().skip(1).take_while(|byte| **byte >= 0x80);
    let start = length_bytes.count() + 4;
    let Some(length) = buffer.get(start - 2..start).map(number) else {
        return Ok(None);
    };
    let length = usize::from(length);
    let end = start + length + if qos == QoS::AtMostOnce { 0 } else { 2 };
    if end > size {
        return Err(WireError::invalid("a truncated packet"));
    }
    let Some(head) = buffer.get(start..end) else {
        return Ok(None);
    };
    let (topic, pkid) = head.split_at(length);
    let pkid = number(pkid);
    if pkid == 0 && qos != QoS::AtMostOnce {
        return Err(WireError::invalid("a PUBLISH without a packet id"));
    }
    Ok(Some(InboundPublish {
        dup: first & 8 != 0,
        retain: first & 1 != 0,
        qos,
        pkid,
        topic: Bytes::copy_from_slice(topic),
        payload: Bytes::new(),
        user_properties: UserProperties::default(),
        subscription_ids: Vec::new(),
    }))
}

/// A variable byte integer and how many bytes it has (MQTT 5, 1.5.5; 3.1.1, 2.2.3);
/// `None` where it is not complete.
pub(super) fn variable(bytes: &[u8]) -> Result<Option<(usize, usize)>, WireError> {
    let mut value = 0;
    for (index, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= 4 {
        return Err(WireError::invalid("a malformed length"));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::super::{Decoder, Inbound, OutboundPublish, Protocol};
    use super::*;

    #[test]
    fn a_publish_too_large_with_a_bad_head_is_an_error() {
        for head in [
            &b"\x36\xc8\x01\0\x01t\0\x01"[..],
            b"\x32\xc8\x01\0\x01t\0\0",
            b"\x30\xc8\x01\x01\0",
        ] {
            assert!(fit(head, 64).is_err(), "{head:?}");
        }
    }

    /// However the bytes come: the publish is named, its payload is skipped, and what
    /// comes behind it is read.
    #[test]
    fn a_publish_too_large_is_skipped() {
        let payload = Bytes::from(vec![7; 5000]);
        let chunks = [1, 3, 100, 10_000].into_iter();
        for (chunk, protocol) in chunks.flat_map(|c| [(c, Protocol::V4), (c, Protocol::V5)]) {
            let (topic, qos, none) = ("a/b", QoS::AtLeastOnce, std::iter::empty());
            let sent = OutboundPublish::new(protocol, topic, qos, payload.clone(), none);
            let mut bytes = BytesMut::new();
            sent.encode(9, true, &mut bytes);
            bytes.extend_from_slice(&[0xD0, 0x00]);
            let mut decoder = Decoder::new(protocol, 1024);
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for part in bytes.chunks(chunk) {
                buffer.extend_from_slice(part);
                while let Some(packet) = decoder.next(&mut buffer).unwrap() {
                    got.push(packet);
                }
                assert!(buffer.len() < 1024, "the payload is kept");
            }
            let [Inbound::TooLarge(publish), Inbound::PingResp] = &got[..] else {
                panic!("{got:?}");
            };
            assert_eq!((publish.pkid, publish.dup), (9, true));
            assert_eq!(
                (publish.qos, &publish.topic[..]),
                (QoS::AtLeastOnce, &b"a/b"[..])
            );
        }
    }
}
