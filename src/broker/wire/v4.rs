//! MQTT 3.1.1 on the wire; rumqttc's codec does the work.

use bytes::{Buf, BytesMut};
use rumqttc::mqttbytes::v4::{
    ConnAck, Connect, ConnectReturnCode, Login, Packet, PubAck, PubComp, PubRec, PubRel, Subscribe,
    SubscribeReasonCode, Unsubscribe,
};
use rumqttc::mqttbytes::{self, Protocol, QoS as WireQoS};

use super::{DisconnectNotice, Hello, Inbound, InboundPublish, UserProperties, Welcome, WireError};
use crate::broker::{QoS, Refusal};

/// How many publishes may be unacknowledged at once, which no broker says here.
/// EMQX holds 100 of QoS 2 that are not released (`max_awaiting_rel`), Mosquitto
/// more; beyond that they drop messages or the link. At 1 ms to the broker it
/// still makes 100,000 messages a second.
const WINDOW: u16 = 100;

/// How many messages the broker is taken to have unacknowledged towards us at most:
/// the least that brokers allow themselves by default (RabbitMQ 10, Mosquitto and
/// VerneMQ 20, EMQX 32). Half of it may wait for slow handlers, which is below all
/// of them, so that no slow handler stops the rest.
pub(super) const BROKER_WINDOW: u16 = 16;

/// The next whole packet off `buffer`; `None` until one is there.
pub(super) fn decode(
    buffer: &mut BytesMut,
    max_packet_size: u32,
) -> Result<Option<Inbound>, WireError> {
    if let Some(answer) = refused_as_in_5(buffer) {
        return Ok(Some(answer));
    }
    let before = buffer.len();
    let limit = usize::try_from(max_packet_size).unwrap_or(usize::MAX);
    let packet = match Packet::read(buffer, limit) {
        Ok(packet) => packet,
        Err(mqttbytes::Error::InsufficientBytes(missing)) if buffer.len() == before => {
            buffer.reserve(missing);
            return Ok(None);
        }
        // A whole frame whose inside ended early.
        Err(mqttbytes::Error::InsufficientBytes(_)) => return Err(invalid("a truncated packet")),
        Err(error) => return Err(invalid(error)),
    };
    Ok(Some(match packet {
        Packet::ConnAck(ack) => Inbound::ConnAck(welcome(&ack)),
        Packet::Publish(publish) => Inbound::Publish(InboundPublish {
            dup: publish.dup,
            retain: publish.retain,
            qos: qos_from_wire(publish.qos),
            pkid: publish.pkid,
            topic: publish.topic.into(),
            payload: publish.payload,
            user_properties: UserProperties::default(),
            subscription_ids: Vec::new(),
        }),
        Packet::PubAck(ack) => Inbound::PubAck(ack.pkid, Ok(())),
        Packet::PubRec(rec) => Inbound::PubRec(rec.pkid, Ok(())),
        Packet::PubRel(rel) => Inbound::PubRel(rel.pkid),
        Packet::PubComp(comp) => Inbound::PubComp(comp.pkid, Ok(())),
        Packet::SubAck(ack) => Inbound::SubAck(
            ack.pkid,
            // Every SUBSCRIBE of ours holds one filter.
            match ack.return_codes.as_slice() {
                [SubscribeReasonCode::Success(granted)] => Ok(qos_from_wire(*granted)),
                [SubscribeReasonCode::Failure] => Err(Refusal {
                    denied: false,
                    reason: "failure (MQTT 3.1.1 names no reason)".to_owned(),
                }),
                _ => return Err(invalid("a SUBACK of another length")),
            },
        ),
        Packet::UnsubAck(ack) => Inbound::UnsubAck(ack.pkid),
        Packet::PingResp => Inbound::PingResp,
        // Only clients send it in 3.1.1; what it means is clear all the same.
        Packet::Disconnect => Inbound::Disconnect(DisconnectNotice {
            reason: "disconnection".to_owned(),
            taken_over: false,
            administrative: false,
        }),
        Packet::Connect(_) | Packet::PingReq | Packet::Subscribe(_) | Packet::Unsubscribe(_) => {
            return Err(invalid("a packet that only clients send"));
        }
    }))
}

/// A SUBACK with a failure of MQTT 5, which mochi sends to clients of 3.1.1 too. The codec
/// knows 0x80 alone, and the link would break each time.
fn refused_as_in_5(buffer: &mut BytesMut) -> Option<Inbound> {
    let [0x90, 0x03, high, low, code @ 0x81..=0xff, ..] = buffer[..] else {
        return None;
    };
    buffer.advance(5);
    let pkid = u16::from_be_bytes([high, low]);
    Some(match code {
        0x91 => Inbound::PkidInUse(pkid),
        _ => Inbound::SubAck(
            pkid,
            Err(Refusal {
                denied: code == 0x87,
                reason: format!("failure {code:#x}"),
            }),
        ),
    })
}

fn welcome(ack: &ConnAck) -> Result<Welcome, Refusal> {
    match ack.code {
        ConnectReturnCode::Success => Ok(Welcome {
            session_present: ack.session_present,
            receive_maximum: WINDOW,
            max_qos: QoS::ExactlyOnce,
            max_packet_size: None,
            subscription_ids: false,
            shared_subscriptions: true,
            wildcards: true,
            keep_alive: None,
        }),
        ConnectReturnCode::NotAuthorized | ConnectReturnCode::BadUserNamePassword => {
            Err(Refusal::denied(&ack.code))
        }
        ConnectReturnCode::RefusedProtocolVersion => Err(Refusal {
            denied: false,
            reason: "it does not speak MQTT 3.1.1: set broker.protocol = 5".to_owned(),
        }),
        ConnectReturnCode::BadClientId | ConnectReturnCode::ServiceUnavailable => {
            Err(Refusal::other(&ack.code))
        }
    }
}

fn encode(packet: &Packet, out: &mut BytesMut) {
    let start = out.len();
    if let Err(error) = packet.write(out, usize::MAX) {
        tracing::error!(%error, "an MQTT packet could not be encoded and is dropped");
        out.truncate(start);
    }
}

pub(super) fn connect(hello: &Hello<'_>, out: &mut BytesMut) {
    let login = hello
        .login
        .map(|(username, password)| Login::new(username, password));
    let packet = Packet::Connect(Connect {
        protocol: Protocol::V4,
        keep_alive: hello.keep_alive,
        client_id: hello.client_id.to_owned(),
        clean_session: hello.clean_start,
        last_will: None,
        login,
    });
    let mut bytes = BytesMut::new();
    // The codec writes the flags at an offset from the buffer's beginning.
    encode(&packet, &mut bytes);
    out.extend_from_slice(&bytes);
}

pub(super) fn subscribe(pkid: u16, filter: &str, qos: QoS, out: &mut BytesMut) {
    let mut packet = Subscribe::new(filter, qos_to_wire(qos));
    packet.pkid = pkid;
    encode(&Packet::Subscribe(packet), out);
}

pub(super) fn unsubscribe(pkid: u16, filter: &str, out: &mut BytesMut) {
    let mut packet = Unsubscribe::new(filter);
    packet.pkid = pkid;
    encode(&Packet::Unsubscribe(packet), out);
}

pub(super) fn puback(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubAck(PubAck::new(pkid)), out);
}

pub(super) fn pubrec(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubRec(PubRec::new(pkid)), out);
}

pub(super) fn pubrel(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubRel(PubRel::new(pkid)), out);
}

pub(super) fn pubcomp(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubComp(PubComp::new(pkid)), out);
}

pub(super) fn pingreq(out: &mut BytesMut) {
    encode(&Packet::PingReq, out);
}

pub(super) fn disconnect(out: &mut BytesMut) {
    encode(&Packet::Disconnect, out);
}

fn qos_to_wire(qos: QoS) -> WireQoS {
    match qos {
        QoS::AtMostOnce => WireQoS::AtMostOnce,
        QoS::AtLeastOnce => WireQoS::AtLeastOnce,
        QoS::ExactlyOnce => WireQoS::ExactlyOnce,
    }
}

fn qos_from_wire(qos: WireQoS) -> QoS {
    match qos {
        WireQoS::AtMostOnce => QoS::AtMostOnce,
        WireQoS::AtLeastOnce => QoS::AtLeastOnce,
        WireQoS::ExactlyOnce => QoS::ExactlyOnce,
    }
}

fn invalid(problem: impl ToString) -> WireError {
    WireError::Invalid("3.1.1", problem.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use bytes::Bytes;

    use super::super::{OutboundPublish, Protocol};
    use super::*;

    fn decode_all(bytes: &[u8]) -> Result<Option<Inbound>, WireError> {
        decode(&mut BytesMut::from(bytes), 1 << 20)
    }

    #[test]
    fn a_publish_survives_the_wire() {
        for qos in [QoS::AtMostOnce, QoS::ExactlyOnce] {
            let payload = Bytes::from_static(b"\0\xff");
            let none = std::iter::empty();
            let sent = OutboundPublish::new(Protocol::V4, "a/ä", qos, payload.clone(), none);
            let mut out = BytesMut::new();
            sent.encode(7, true, &mut out);
            assert_eq!(sent.size(), out.len());
            let Ok(Some(Inbound::Publish(got))) = decode(&mut out, 1 << 20) else {
                panic!("no publish");
            };
            assert_eq!((got.dup, got.qos), (true, qos));
            assert_eq!(got.topic, "a/ä".as_bytes());
            assert_eq!(got.payload, payload);
            assert!(out.is_empty());
        }
    }

    /// By the letter of MQTT 3.1.1, 3.1: the codec writes into a buffer that is not
    /// empty.
    #[test]
    fn a_connect_is_right_behind_other_bytes() {
        let hello = Hello {
            client_id: "c",
            login: Some(("u", "p")),
            keep_alive: 30,
            clean_start: false,
            session_expiry: 1,
            receive_maximum: 1,
            max_packet_size: 1,
            will: None,
        };
        let mut out = BytesMut::from(&b"before"[..]);
        connect(&hello, &mut out);
        assert_eq!(
            out[6..],
            *b"\x10\x13\0\x04MQTT\x04\xc0\0\x1e\0\x01c\0\x01u\0\x01p"
        );
    }

    #[test]
    fn return_codes_become_refusals() {
        let connack = |code| decode_all(&[0x20, 0x02, 0x01, code]);
        let Ok(Some(Inbound::ConnAck(Ok(welcome)))) = connack(0) else {
            panic!("not welcome");
        };
        assert!(welcome.session_present && !welcome.subscription_ids);
        for (code, denied, reason) in [
            (1, false, "broker.protocol = 5"),
            (2, false, "bad client id"),
            (4, true, "bad user name password"),
            (5, true, "not authorized"),
        ] {
            let Ok(Some(Inbound::ConnAck(Err(refusal)))) = connack(code) else {
                panic!("no refusal");
            };
            assert_eq!(refusal.denied, denied);
            assert!(refusal.reason.contains(reason), "{refusal}");
        }
        assert!(connack(6).is_err());
    }

    #[test]
    fn a_suback_of_0x80_is_a_refusal() {
        let answer = |code| decode_all(&[0x90, 0x03, 0x00, 0x07, code]);
        assert!(matches!(answer(0x80), Ok(Some(Inbound::SubAck(7, Err(_))))));
        let granted = Ok(QoS::AtLeastOnce);
        assert!(matches!(answer(1), Ok(Some(Inbound::SubAck(7, g))) if g == granted));
    }

    /// As mochi 2.7 sends them.
    #[test]
    fn a_suback_of_mqtt_5_is_understood() {
        let mut two = BytesMut::from(&b"\x90\x03\x00\x07\x91\x90\x03\x00\x08\x87\xd0"[..]);
        let first = decode(&mut two, 1024);
        assert!(
            matches!(first, Ok(Some(Inbound::PkidInUse(7)))),
            "{first:?}"
        );
        let second = decode(&mut two, 1024);
        let Ok(Some(Inbound::SubAck(8, Err(refusal)))) = second else {
            panic!("{second:?}");
        };
        assert!(refusal.denied);
        assert_eq!(&two[..], b"\xd0");
        assert!(matches!(decode_all(b"\x90\x03\x00\x07"), Ok(None)));
    }

    #[test]
    fn another_packet_too_large_is_refused_by_its_header() {
        assert!(decode(&mut BytesMut::from(&[0x90, 0xff, 0x7f][..]), 1024).is_err());
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let mut decoder = super::super::Decoder::new(super::super::Protocol::V4, 16);
            while let Ok(Some(_)) = decoder.next(&mut buffer) {}
        }
    }
}
