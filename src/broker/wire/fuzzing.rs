//! See `crate::fuzzing`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::*;

/// What a broker sends in MQTT 5.
pub fn mqtt5(bytes: &[u8]) {
    packets(Protocol::V5, bytes);
}

/// What a broker sends in MQTT 3.1.1.
pub fn mqtt311(bytes: &[u8]) {
    packets(Protocol::V4, bytes);
}

/// The first byte chooses the limit of packets and the size of pieces; the rest is the
/// stream. However it is cut into pieces the same packets come, every one takes its
/// bytes off, and what is written again is the same.
fn packets(protocol: Protocol, bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else {
        return;
    };
    let max_packet_size = [64, 1024, 1 << 20, 1 << 28][usize::from(choice >> 6)];
    let decoder = || Decoder::new(protocol, max_packet_size);
    let whole = decode(decoder(), bytes, bytes.len().max(1));
    let pieces = decode(decoder(), bytes, usize::from(choice & 0x3f) + 1);
    assert_eq!(format!("{whole:?}"), format!("{pieces:?}"));
    for packet in &whole.packets {
        written_again(protocol, packet);
    }
}

#[derive(Debug)]
struct Decoded {
    packets: Vec<Inbound>,
    /// Where it ended.
    error: Option<WireError>,
}

fn decode(mut decoder: Decoder, bytes: &[u8], piece: usize) -> Decoded {
    let mut decoded = Decoded {
        packets: Vec::new(),
        error: None,
    };
    let mut buffer = BytesMut::new();
    for piece in bytes.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            let waiting = buffer.len();
            match decoder.next(&mut buffer) {
                Ok(Some(packet)) => decoded.packets.push(packet),
                Ok(None) => break,
                Err(error) => {
                    decoded.error = Some(error);
                    return decoded;
                }
            }
            assert!(buffer.len() < waiting, "{:?}", decoded.packets.last());
        }
    }
    decoded
}

fn written_again(protocol: Protocol, packet: &Inbound) {
    let mut out = BytesMut::new();
    match packet {
        Inbound::Publish(publish) => {
            assert_eq!(publish.qos == QoS::AtMostOnce, publish.pkid == 0);
            publish_again(protocol, publish);
            return;
        }
        Inbound::TooLarge(publish) => {
            assert_eq!(publish.qos == QoS::AtMostOnce, publish.pkid == 0);
            assert!(publish.payload.is_empty());
            return;
        }
        Inbound::PubAck(pkid, Ok(())) => protocol.puback(*pkid, &mut out),
        Inbound::PubRec(pkid, Ok(())) => protocol.pubrec(*pkid, &mut out),
        Inbound::PubRel(pkid) => protocol.pubrel(*pkid, &mut out),
        Inbound::PubComp(pkid, Ok(())) => protocol.pubcomp(*pkid, &mut out),
        _ => return,
    }
    let again = Decoder::new(protocol, 1024).next(&mut out).unwrap();
    assert_eq!(format!("{:?}", again.unwrap()), format!("{packet:?}"));
    assert!(out.is_empty());
}

/// Only what a publish of ours can have: it is not retained and has no identifiers.
fn publish_again(protocol: Protocol, publish: &InboundPublish) {
    let Ok(topic) = std::str::from_utf8(&publish.topic) else {
        return;
    };
    let properties = publish.user_properties.iter();
    let payload = publish.payload.clone();
    let written = OutboundPublish::new(protocol, topic, publish.qos, payload, properties);
    let mut out = BytesMut::new();
    written.encode(publish.pkid, publish.dup, &mut out);
    assert_eq!(written.size(), out.len());
    let again = Decoder::new(protocol, 1 << 28).next(&mut out).unwrap();
    let Some(Inbound::Publish(again)) = again else {
        panic!("{again:?}");
    };
    let expected = InboundPublish {
        retain: false,
        subscription_ids: Vec::new(),
        ..publish.clone()
    };
    assert_eq!(again, expected);
    assert!(out.is_empty());
}
