//! MQTT 5 on the wire; rumqttc's codec does most of the work.

mod acks;
mod inbound;

use bytes::{Buf, BytesMut};
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, ConnAckProperties, Connect, ConnectProperties, ConnectReturnCode, Disconnect,
    DisconnectProperties, DisconnectReasonCode, Filter, LastWill, Login, Packet, PingReq, PubAck,
    PubComp, PubRec, PubRel, RetainForwardRule, Subscribe, SubscribeProperties, Unsubscribe,
};
use rumqttc::v5::mqttbytes::{self, QoS as WireQoS};

use super::{DisconnectNotice, Hello, Inbound, Retained, Welcome, WireError};
use crate::broker::{QoS, Refusal};

/// Takes the next whole packet off `buffer`; `None` until one is there.
pub(super) fn decode(
    buffer: &mut BytesMut,
    max_packet_size: u32,
) -> Result<Option<Inbound>, WireError> {
    // The codec wants properties behind a DISCONNECT; MQTT 5 (3.14.2.1) lets them go.
    if buffer.starts_with(&[0xE0, 0x00]) {
        buffer.advance(2);
        let notice = DisconnectNotice {
            reason: "normal disconnection".to_owned(),
            taken_over: false,
            administrative: false,
        };
        return Ok(Some(Inbound::Disconnect(notice)));
    }
    // Likewise with a reason and without properties.
    if let [0xE0, 0x01, reason, ..] = buffer[..] {
        let whole = &mut BytesMut::from(&[0xE0, 0x02, reason, 0x00][..]);
        buffer.advance(3);
        return decode(whole, max_packet_size);
    }
    // Flags, reason code and no properties, which MQTT 5 (3.2.2) does not know.
    if buffer.starts_with(&[0x20, 0x02]) {
        return Err(WireError::Only311);
    }
    if buffer.first().is_some_and(|first| first >> 4 == 3) {
        return Ok(inbound::publish(buffer, max_packet_size)?.map(Inbound::Publish));
    }
    if buffer.first().is_some_and(|first| acks::is_one(*first)) {
        return acks::acknowledgement(buffer, max_packet_size);
    }
    let before = buffer.len();
    let packet = match Packet::read(buffer, Some(max_packet_size)) {
        Ok(packet) => packet,
        Err(mqttbytes::Error::InsufficientBytes(missing)) if buffer.len() == before => {
            buffer.reserve(missing);
            return Ok(None);
        }
        // A whole frame whose inside ended early.
        Err(mqttbytes::Error::InsufficientBytes(_)) => {
            return Err(invalid("a truncated packet"));
        }
        Err(error) => return Err(invalid(error)),
    };
    Ok(Some(match packet {
        Packet::ConnAck(ack) => Inbound::ConnAck(welcome(ack)),
        Packet::PingResp(_) => Inbound::PingResp,
        Packet::Disconnect(disconnect) => Inbound::Disconnect(DisconnectNotice {
            reason: super::words(&disconnect.reason_code),
            taken_over: disconnect.reason_code == DisconnectReasonCode::SessionTakenOver,
            administrative: disconnect.reason_code == DisconnectReasonCode::AdministrativeAction,
        }),
        // Taken off before the codec sees them, or with flags that they must not have.
        Packet::Publish(_)
        | Packet::PubAck(_)
        | Packet::PubRec(_)
        | Packet::PubRel(_)
        | Packet::PubComp(_)
        | Packet::SubAck(_)
        | Packet::UnsubAck(_) => return Err(invalid("a packet with flags out of place")),
        Packet::Auth(_)
        | Packet::Connect(..)
        | Packet::PingReq(_)
        | Packet::Subscribe(_)
        | Packet::Unsubscribe(_) => {
            return Err(invalid("a packet that only clients send"));
        }
    }))
}

fn welcome(ack: ConnAck) -> Result<Welcome, Refusal> {
    match ack.code {
        ConnectReturnCode::Success => {}
        ConnectReturnCode::NotAuthorized
        | ConnectReturnCode::BadUserNamePassword
        | ConnectReturnCode::Banned => return Err(Refusal::denied(&ack.code)),
        ConnectReturnCode::UnsupportedProtocolVersion => {
            return Err(Refusal {
                denied: false,
                reason: WireError::Only311.to_string(),
            });
        }
        _ => return Err(Refusal::other(&ack.code)),
    }
    let properties = ack.properties.as_ref();
    // What is not mentioned is there.
    let offers = |said: fn(&ConnAckProperties) -> Option<u8>| properties.and_then(said) != Some(0);
    Ok(Welcome {
        session_present: ack.session_present,
        receive_maximum: properties
            .and_then(|p| p.receive_max)
            .unwrap_or(u16::MAX)
            .max(1),
        max_qos: match properties.and_then(|p| p.max_qos) {
            Some(0) => QoS::AtMostOnce,
            Some(1) => QoS::AtLeastOnce,
            _ => QoS::ExactlyOnce,
        },
        max_packet_size: properties.and_then(|p| p.max_packet_size),
        subscription_ids: offers(|p| p.subscription_identifiers_available),
        shared_subscriptions: offers(|p| p.shared_subscription_available),
        wildcards: offers(|p| p.wildcard_subscription_available),
        keep_alive: properties.and_then(|p| p.server_keep_alive),
    })
}

/// Appends a packet to what is to be written.
///
/// The packets of this file always encode: their texts were checked to fit into
/// MQTT strings and their size against the broker's limit before they came here.
fn encode(packet: &Packet, out: &mut BytesMut) {
    let start = out.len();
    if let Err(error) = packet.write(out, None) {
        tracing::error!(%error, "an MQTT packet could not be encoded and is dropped");
        out.truncate(start);
    }
}

pub(super) fn connect(hello: &Hello<'_>, out: &mut BytesMut) {
    let connect = Connect {
        keep_alive: hello.keep_alive,
        client_id: hello.client_id.to_owned(),
        clean_start: hello.clean_start,
        properties: Some(ConnectProperties {
            session_expiry_interval: Some(hello.session_expiry),
            receive_maximum: Some(hello.receive_maximum),
            max_packet_size: Some(hello.max_packet_size),
            // An aliased publish would arrive with an empty topic: never allowed.
            topic_alias_max: None,
            ..ConnectProperties::new()
        }),
    };
    let login = hello
        .login
        .map(|(username, password)| Login::new(username, password));
    let will = hello.will.map(|will| LastWill {
        topic: will.topic.as_str().to_owned().into(),
        message: will.payload.clone(),
        qos: qos_to_wire(will.qos),
        retain: will.retain,
        properties: None,
    });
    encode(&Packet::Connect(connect, will, login), out);
}

pub(super) fn subscribe(
    pkid: u16,
    filter: &str,
    qos: QoS,
    subscription_id: Option<u32>,
    retained: Retained,
    out: &mut BytesMut,
) {
    let filter = Filter {
        path: filter.to_owned(),
        qos: qos_to_wire(qos),
        nolocal: false,
        preserve_retain: false,
        retain_forward_rule: match retained {
            Retained::Send => RetainForwardRule::OnEverySubscribe,
            Retained::Never => RetainForwardRule::Never,
        },
    };
    let properties = subscription_id.map(|id| SubscribeProperties {
        id: usize::try_from(id).ok(),
        user_properties: Vec::new(),
    });
    let mut packet = Subscribe::new(filter, properties);
    packet.pkid = pkid;
    encode(&Packet::Subscribe(packet), out);
}

pub(super) fn unsubscribe(pkid: u16, filter: &str, out: &mut BytesMut) {
    let mut packet = Unsubscribe::new(filter, None);
    packet.pkid = pkid;
    encode(&Packet::Unsubscribe(packet), out);
}

pub(super) fn puback(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubAck(PubAck::new(pkid, None)), out);
}

pub(super) fn pubrec(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubRec(PubRec::new(pkid, None)), out);
}

pub(super) fn pubrel(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubRel(PubRel::new(pkid, None)), out);
}

pub(super) fn pubcomp(pkid: u16, out: &mut BytesMut) {
    encode(&Packet::PubComp(PubComp::new(pkid, None)), out);
}

pub(super) fn pingreq(out: &mut BytesMut) {
    encode(&Packet::PingReq(PingReq), out);
}

/// Ends the connection and, with it, the session (expiry 0).
pub(super) fn disconnect(with_will: bool, out: &mut BytesMut) {
    let mut packet = Disconnect::new(match with_will {
        true => DisconnectReasonCode::DisconnectWithWillMessage,
        false => DisconnectReasonCode::NormalDisconnection,
    });
    packet.properties = Some(DisconnectProperties {
        session_expiry_interval: Some(0),
        reason_string: None,
        user_properties: Vec::new(),
        server_reference: None,
    });
    encode(&Packet::Disconnect(packet), out);
}

fn qos_to_wire(qos: QoS) -> WireQoS {
    match qos {
        QoS::AtMostOnce => WireQoS::AtMostOnce,
        QoS::AtLeastOnce => WireQoS::AtLeastOnce,
        QoS::ExactlyOnce => WireQoS::ExactlyOnce,
    }
}

fn invalid(problem: impl ToString) -> WireError {
    WireError::Invalid("5", problem.to_string())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::super::{OutboundPublish, Protocol};
    use super::*;

    fn decode_all(bytes: &[u8]) -> Result<Option<Inbound>, WireError> {
        decode(&mut BytesMut::from(bytes), 1 << 20)
    }

    #[test]
    fn a_publish_survives_the_wire() {
        let properties = [("k", "v")].into_iter();
        let payload = Bytes::from_static(b"\0\xff");
        let qos = QoS::AtLeastOnce;
        let sent = OutboundPublish::new(Protocol::V5, "a/b", qos, payload, properties);
        let mut out = BytesMut::new();
        sent.encode(7, true, &mut out);
        assert_eq!(out.len(), sent.size());
        let Ok(Some(Inbound::Publish(got))) = decode(&mut out, 1 << 20) else {
            panic!("no publish");
        };
        assert_eq!((got.pkid, got.dup, got.qos), (7, true, QoS::AtLeastOnce));
        assert_eq!(
            (&got.topic[..], &got.payload[..]),
            (&b"a/b"[..], &b"\0\xff"[..])
        );
        assert!(got.user_properties.iter().eq([("k", "v")]));
        assert!(out.is_empty());
    }

    #[test]
    fn a_3_1_1_connack_says_what_to_do() {
        for code in [0, 1] {
            let error = decode_all(&[0x20, 0x02, 0x00, code]).unwrap_err();
            assert!(error.to_string().contains("broker.protocol = 4"));
        }
    }

    #[test]
    fn what_the_broker_does_not_offer_is_refused() {
        let welcome = |bytes: &[u8]| match decode_all(bytes) {
            Ok(Some(Inbound::ConnAck(Ok(welcome)))) => welcome,
            other => panic!("{other:?}"),
        };
        let all = welcome(b"\x20\x03\x00\x00\x00");
        for filter in ["a", "a/#", "+", "$share/g/a"] {
            assert_eq!(all.refuses(filter), None);
        }
        let less = welcome(b"\x20\x07\x00\x00\x04\x28\x00\x2a\x00");
        for (filter, what) in [
            ("$share/g/a", "shared"),
            ("a/#", "wildcards"),
            ("+", "wild"),
        ] {
            assert!(less.refuses(filter).unwrap().reason.contains(what));
        }
        assert_eq!(less.refuses("a"), None);
        let explicit = welcome(b"\x20\x07\x00\x00\x04\x28\x01\x2a\x01");
        assert_eq!(explicit.refuses("$share/g/#"), None);
    }

    #[test]
    fn a_packet_id_in_use_is_no_refusal() {
        for bytes in [b"\x90\x04\x00\x07\x00\x91", b"\xb0\x04\x00\x07\x00\x91"] {
            let decoded = decode_all(bytes);
            assert!(
                matches!(decoded, Ok(Some(Inbound::PkidInUse(7)))),
                "{decoded:?}"
            );
        }
    }

    #[test]
    fn a_bare_disconnect_is_understood() {
        assert!(matches!(
            decode_all(&[0xE0, 0x00]),
            Ok(Some(Inbound::Disconnect(_)))
        ));
    }

    /// As mochi 2.7 answers: its own reason code, and the publish's user property.
    #[test]
    fn any_reason_below_0x80_is_success() {
        let long = [
            &b"\x40\x82\x01\x00\x01\x01\x7e\x26\x00\x04from\x00\x75"[..],
            &[b'x'; 0x75],
        ];
        let short = b"\x40\x10\x00\x01\x01\x0c\x26\x00\x04from\x00\x03abc";
        for bytes in [
            &short[..],
            &long.concat(),
            b"\x40\x03\x00\x01\x10",
            b"\x40\x02\x00\x01",
        ] {
            let decoded = decode_all(bytes);
            assert!(
                matches!(decoded, Ok(Some(Inbound::PubAck(1, Ok(()))))),
                "{decoded:?}"
            );
        }
        let refused = decode_all(b"\x50\x03\x00\x01\x97");
        assert!(
            matches!(refused, Ok(Some(Inbound::PubRec(1, Err(_))))),
            "{refused:?}"
        );
        // The next packet's bytes are its own.
        let mut two = BytesMut::from(&b"\x40\x02\x00\x01\x20"[..]);
        assert!(decode(&mut two, 1024).is_ok());
        assert_eq!(&two[..], b"\x20");
    }

    #[test]
    fn a_takeover_is_understood_in_its_short_form_too() {
        for bytes in [&[0xE0, 0x01, 0x8E][..], &[0xE0, 0x02, 0x8E, 0x00]] {
            let Ok(Some(Inbound::Disconnect(notice))) = decode_all(bytes) else {
                panic!("no DISCONNECT in {bytes:?}");
            };
            assert!(notice.taken_over);
        }
        for (code, administrative) in [(0x98, true), (0x8B, false)] {
            let Ok(Some(Inbound::Disconnect(notice))) = decode_all(&[0xE0, 0x01, code]) else {
                panic!("no DISCONNECT with {code}");
            };
            assert_eq!(notice.administrative, administrative);
            assert!(!notice.taken_over);
        }
        assert!(matches!(decode_all(&[0xE0, 0x01]), Ok(None)));
    }

    #[test]
    fn an_oversized_packet_is_refused_by_its_header() {
        assert!(decode(&mut BytesMut::from(&[0x30, 0xff, 0x7f][..]), 1024).is_err());
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer, 1024) {
                if buffer.starts_with(&[0xE0, 0x00]) { break; }
            }
        }
    }
}
