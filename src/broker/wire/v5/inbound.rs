//! Reading a PUBLISH of MQTT 5 (3.3).
//!
//! The codec (rumqttc 0.25) counts each subscription identifier a byte too long: of
//! three or more in one message the last ones end up in the payload. Brokers that send
//! one copy for several overlapping filters send just that.

use bytes::{Buf, Bytes, BytesMut};

use super::super::fit::variable;
use super::super::properties::{Properties, Property, UserProperties, truncated};
use super::super::{InboundPublish, WireError};
use super::invalid;
use crate::broker::QoS;

/// Takes a whole PUBLISH off `buffer`; `None` until it is there.
pub(super) fn publish(
    buffer: &mut BytesMut,
    max_packet_size: u32,
) -> Result<Option<InboundPublish>, WireError> {
    let Some((length, header)) = variable(buffer.get(1..).unwrap_or_default())? else {
        return Ok(None);
    };
    let size = 1 + header + length;
    // As the codec counts it for other packets: what is behind the fixed header.
    if length > max_packet_size as usize {
        return Err(invalid("a packet larger than allowed"));
    }
    if buffer.len() < size {
        buffer.reserve(size - buffer.len());
        return Ok(None);
    }
    let mut frame = buffer.split_to(size).freeze();
    let flags = frame.get_u8();
    frame.advance(header);
    let qos =
        QoS::from_number(u32::from(flags >> 1 & 3)).ok_or_else(|| invalid("a PUBLISH of QoS 3"))?;
    let topic = text(&mut frame)?;
    // Topic aliases were not allowed to it (MQTT 5, 3.1.2.11.5).
    if topic.is_empty() {
        return Err(invalid("a PUBLISH without a topic"));
    }
    let pkid = match qos {
        QoS::AtMostOnce => 0,
        _ => match frame.try_get_u16() {
            Ok(pkid @ 1..) => pkid,
            _ => return Err(invalid("a PUBLISH without a packet id")),
        },
    };
    let (length, header) = variable(&frame)?.ok_or_else(truncated)?;
    frame.advance(header);
    let properties = take(&mut frame, length)?;
    let mut subscription_ids = Vec::new();
    for property in Properties::of(&properties) {
        if let Property::SubscriptionId(id) = property? {
            subscription_ids.push(id);
        }
    }
    Ok(Some(InboundPublish {
        dup: flags & 8 != 0,
        retain: flags & 1 != 0,
        qos,
        pkid,
        topic,
        payload: frame,
        user_properties: UserProperties::of(properties),
        subscription_ids,
    }))
}

fn take(from: &mut Bytes, length: usize) -> Result<Bytes, WireError> {
    if from.len() < length {
        return Err(truncated());
    }
    Ok(from.split_to(length))
}

/// Two bytes of length and so many bytes (MQTT 5, 1.5.4 and 1.5.6).
fn text(from: &mut Bytes) -> Result<Bytes, WireError> {
    let length = from.try_get_u16().map_err(|_| truncated())?;
    take(from, length.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<InboundPublish>, WireError> {
        publish(&mut BytesMut::from(bytes), 1 << 20)
    }

    /// As mochi sends overlapping filters: one copy, every identifier.
    #[test]
    fn several_identifiers_are_read() {
        let bytes = b"2\x14\x00\x03a/b\x00\x01\x0b\x02\x00\x01Q\x80\x0b\x01\x0b\x02\x0b\x03x";
        let publish = read(bytes).unwrap().unwrap();
        assert_eq!(publish.subscription_ids, [1, 2, 3]);
        assert_eq!((&publish.topic[..], publish.pkid), (&b"a/b"[..], 1));
        assert_eq!(&publish.payload[..], b"x");
    }

    #[test]
    fn every_property_is_understood() {
        let bytes = b"\x3b\x28\x00\x01t\x00\x07\x21\x01\x01\x02\0\0\0\x01\x03\0\x01c\x08\0\x01r\
            \x09\0\x01d\x0b\x80\x01\x26\0\x01k\0\x02vv\x23\0\x01p";
        let publish = read(bytes).unwrap().unwrap();
        assert!(publish.dup && publish.retain && publish.qos == QoS::AtLeastOnce);
        assert_eq!(publish.subscription_ids, [128]);
        assert!(publish.user_properties.iter().eq([("k", "vv")]));
        assert_eq!(&publish.payload[..], b"p");
        // However it is cut, it is waited for.
        for end in 0..bytes.len() {
            assert_eq!(read(&bytes[..end]).unwrap(), None, "{end}");
        }
    }

    #[test]
    fn a_user_property_that_is_no_text_is_left_out() {
        let publish = read(b"\x30\x0b\x00\x01t\x06\x26\0\x01\xff\0\0x").unwrap();
        let publish = publish.unwrap();
        assert_eq!(publish.user_properties.iter().next(), None);
        assert_eq!(&publish.payload[..], b"x");
    }

    #[test]
    fn what_mqtt_forbids_is_an_error() {
        for bad in [
            &b"\x36\x06\x00\x01t\x00\x01\x00"[..],
            b"\x30\x04\x00\x00\x00x",
            b"\x32\x06\x00\x01t\x00\x00\x00",
            b"\x30\x05\x00\x01t\x05\x00",
            b"\x30\x05\x00\x09t\x00\x00",
            b"\x30\x06\x00\x01t\x02\x7f\x00",
            b"\x30\xff\xff\xff\xff\x01",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
        assert!(publish(&mut BytesMut::from(&b"\x30\xff\x7f"[..]), 1024).is_err());
    }
}
