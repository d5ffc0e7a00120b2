//! Writing a PUBLISH (MQTT 5, 3.3; 3.1.1, 3.3).
//!
//! It is made once, kept until it is acknowledged, and sent again where it has to be. So
//! all of it but the payload is written when it is made, into one piece of memory; what is
//! not known then, packet id and duplicate flag, is put in when it is sent.

use bytes::{Bytes, BytesMut};

use super::Protocol;
use crate::broker::QoS;

/// User property (MQTT 5, 3.3.2.3.7).
const USER_PROPERTY: u8 = 0x26;

/// The duplicate flag in the first byte (3.3.1.1).
const DUP: u8 = 0x08;

/// A publish to the broker.
#[derive(Debug)]
pub(in crate::broker) struct OutboundPublish {
    qos: QoS,
    /// Fixed header, topic, packet id and properties.
    head: Box<[u8]>,
    /// Where in the head the packet id is. Not at QoS 0.
    pkid_at: usize,
    payload: Bytes,
}

impl OutboundPublish {
    /// Each text has at most 65,535 bytes. User properties are left out with 3.1.1.
    pub(in crate::broker) fn new<'a>(
        protocol: Protocol,
        topic: &str,
        qos: QoS,
        payload: Bytes,
        user_properties: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Self {
        let user_properties = || match protocol {
            Protocol::V5 => Some(user_properties.clone()).into_iter().flatten(),
            Protocol::V4 => None.into_iter().flatten(),
        };
        let property = |(name, value): (&str, &str)| 1 + 2 + name.len() + 2 + value.len();
        let properties = user_properties().map(property).sum();
        let pkid = if qos == QoS::AtMostOnce { 0 } else { 2 };
        let mut length = 2 + topic.len() + pkid + payload.len();
        if protocol == Protocol::V5 {
            length += variable_size(properties) + properties;
        }
        let capacity = 1 + variable_size(length) + length - payload.len();
        let mut head = Vec::with_capacity(capacity);
        head.push(0x30 | (qos as u8) << 1);
        variable(length, &mut head);
        text(topic, &mut head);
        let pkid_at = head.len();
        head.resize(pkid_at + pkid, 0);
        if protocol == Protocol::V5 {
            variable(properties, &mut head);
            for (name, value) in user_properties() {
                head.push(USER_PROPERTY);
                text(name, &mut head);
                text(value, &mut head);
            }
        }
        Self {
            qos,
            head: head.into(),
            pkid_at,
            payload,
        }
    }

    pub(in crate::broker) fn qos(&self) -> QoS {
        self.qos
    }

    /// Bytes on the wire.
    pub(in crate::broker) fn size(&self) -> usize {
        self.head.len() + self.payload.len()
    }

    /// Appends it to what is to be written. `pkid` is of no account at QoS 0.
    pub(in crate::broker) fn encode(&self, pkid: u16, dup: bool, out: &mut BytesMut) {
        let start = out.len();
        out.reserve(self.size());
        out.extend_from_slice(&self.head);
        out.extend_from_slice(&self.payload);
        let written = out.get_mut(start..).unwrap_or_default();
        if let Some(first) = written.first_mut()
            && dup
        {
            *first |= DUP;
        }
        if self.qos != QoS::AtMostOnce
            && let Some((at, _)) = written
                .get_mut(self.pkid_at..)
                .and_then(<[u8]>::split_first_chunk_mut)
        {
            *at = pkid.to_be_bytes();
        }
    }
}

/// Bytes of a variable byte integer (MQTT 5, 1.5.5; 3.1.1, 2.2.3).
fn variable_size(number: usize) -> usize {
    match number {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

/// A number with more than four digits is never sent: the packet is too large for any
/// broker (see `Welcome::check`).
fn variable(number: usize, out: &mut Vec<u8>) {
    let mut rest = number;
    for left in (0..variable_size(number)).rev() {
        let more = if left > 0 { 0x80 } else { 0 };
        out.push((rest & 0x7f) as u8 | more);
        rest >>= 7;
    }
}

/// Two bytes of length and so many bytes (MQTT 5, 1.5.4; 3.1.1, 1.5.3).
fn text(text: &str, out: &mut Vec<u8>) {
    // Texts were checked to be no longer when they came.
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(publish: &OutboundPublish, pkid: u16, dup: bool) -> Vec<u8> {
        let mut out = BytesMut::from(&b"before"[..]);
        publish.encode(pkid, dup, &mut out);
        assert_eq!(out.len(), b"before".len() + publish.size());
        out[b"before".len()..].to_vec()
    }

    fn publish(protocol: Protocol, qos: QoS, payload: &'static [u8]) -> OutboundPublish {
        let properties = [("k", "v1"), ("é", "")].into_iter();
        OutboundPublish::new(
            protocol,
            "a/b",
            qos,
            Bytes::from_static(payload),
            properties,
        )
    }

    #[test]
    fn it_is_written_as_the_standards_say() {
        let v5 = publish(Protocol::V5, QoS::AtLeastOnce, b"xy");
        let expected =
            b"\x32\x19\x00\x03a/b\x01\x02\x0f\x26\x00\x01k\x00\x02v1\x26\x00\x02\xc3\xa9\x00\x00xy";
        assert_eq!(written(&v5, 0x0102, false), expected);
        // Sent again, with another packet id.
        let again = written(&v5, 0x0103, true);
        assert_eq!((again[0], again[8]), (0x3a, 0x03));
        let v4 = publish(Protocol::V4, QoS::ExactlyOnce, b"xy");
        assert_eq!(written(&v4, 7, false), b"\x34\x09\x00\x03a/b\x00\x07xy");
        let v4 = publish(Protocol::V4, QoS::AtMostOnce, b"");
        assert_eq!(written(&v4, 7, false), b"\x30\x05\x00\x03a/b");
        let none = std::iter::empty();
        let v5 = OutboundPublish::new(Protocol::V5, "t", QoS::AtMostOnce, Bytes::new(), none);
        assert_eq!(written(&v5, 0, false), b"\x30\x04\x00\x01t\x00");
    }

    #[test]
    fn lengths_grow_at_their_bounds() {
        for (number, bytes) in [
            (0, &b"\x00"[..]),
            (127, b"\x7f"),
            (128, b"\x80\x01"),
            (16_383, b"\xff\x7f"),
            (16_384, b"\x80\x80\x01"),
            (2_097_151, b"\xff\xff\x7f"),
            (2_097_152, b"\x80\x80\x80\x01"),
            (268_435_455, b"\xff\xff\xff\x7f"),
        ] {
            let mut out = Vec::new();
            variable(number, &mut out);
            assert_eq!(out, bytes, "{number}");
        }
    }
}
