//! Reading the acknowledgements of MQTT 5 (3.4 to 3.7, 3.9 and 3.11).
//!
//! The codec (rumqttc 0.25) gives up a connection upon a reason code that it does not
//! know. A code from a later version of a broker, or from a proxy, would then break the
//! link each time the packet that it is about is sent again.

use bytes::{Buf, BytesMut};

use super::super::fit::variable;
use super::super::{Inbound, WireError};
use super::invalid;
use crate::broker::{QoS, Refusal};

/// The packet id was taken already (MQTT 5, 2.4).
const PKID_IN_USE: u8 = 0x91;

/// The other side knows no such packet id: no error while a session is recovered
/// (MQTT 5, 4.3.3).
const PKID_NOT_FOUND: u8 = 0x92;

/// Whether a fixed header begins one of them.
pub(super) fn is_one(first: u8) -> bool {
    matches!(first, 0x40 | 0x50 | 0x62 | 0x70 | 0x90 | 0xB0)
}

/// Takes a whole acknowledgement off `buffer`; `None` until it is there. Only where
/// [`is_one`] says so.
pub(super) fn acknowledgement(
    buffer: &mut BytesMut,
    max_packet_size: u32,
) -> Result<Option<Inbound>, WireError> {
    let Some((length, header)) = variable(buffer.get(1..).unwrap_or_default())? else {
        return Ok(None);
    };
    if length > max_packet_size as usize {
        return Err(invalid("a packet larger than allowed"));
    }
    let size = 1 + header + length;
    if buffer.len() < size {
        buffer.reserve(size - buffer.len());
        return Ok(None);
    }
    let mut frame = buffer.split_to(size).freeze();
    let first = frame.get_u8();
    frame.advance(header);
    let truncated = || invalid("a truncated packet");
    let pkid = frame.try_get_u16().map_err(|_| truncated())?;
    if pkid == 0 {
        return Err(invalid("an acknowledgement without a packet id"));
    }
    // Those of publishes may end here, which is success, or behind the reason. What the
    // properties say is of no use to us.
    if !matches!(first, 0x90 | 0xB0) {
        let reason = frame.try_get_u8().unwrap_or(0);
        return Ok(Some(match first {
            0x40 => Inbound::PubAck(pkid, result(reason)),
            0x50 => Inbound::PubRec(pkid, result(reason)),
            0x62 => Inbound::PubRel(pkid),
            _ if reason == PKID_NOT_FOUND => Inbound::PubCompUnknown(pkid),
            _ => Inbound::PubComp(pkid, result(reason)),
        }));
    }
    let (properties, header) = variable(&frame)?.ok_or_else(truncated)?;
    let skipped = header + properties;
    if frame.len() < skipped {
        return Err(truncated());
    }
    frame.advance(skipped);
    // Every SUBSCRIBE and UNSUBSCRIBE of ours holds one filter.
    let [reason] = frame[..] else {
        return Err(invalid("a SUBACK or UNSUBACK of another length"));
    };
    Ok(Some(match (first, reason) {
        (_, PKID_IN_USE) => Inbound::PkidInUse(pkid),
        (0xB0, _) => Inbound::UnsubAck(pkid),
        (_, 0..=2) => {
            let granted = QoS::from_number(reason.into()).unwrap_or(QoS::ExactlyOnce);
            Inbound::SubAck(pkid, Ok(granted))
        }
        _ => Inbound::SubAck(pkid, Err(refusal(reason))),
    }))
}

/// Codes below 0x80 are success (MQTT 5, 2.4): "no matching subscribers" is one, and mochi
/// 2.7 answers a publish of QoS 1 with 0x01.
fn result(reason: u8) -> Result<(), Refusal> {
    if reason < 0x80 {
        Ok(())
    } else {
        Err(refusal(reason))
    }
}

fn refusal(reason: u8) -> Refusal {
    Refusal {
        denied: reason == 0x87,
        reason: name(reason),
    }
}

/// The name of a reason code of failure (MQTT 5, 2.4).
fn name(reason: u8) -> String {
    let known = match reason {
        0x80 => "unspecified error",
        0x83 => "implementation specific error",
        0x87 => "not authorized",
        0x8F => "topic filter invalid",
        0x90 => "topic name invalid",
        0x91 => "packet identifier in use",
        0x95 => "packet too large",
        0x97 => "quota exceeded",
        0x99 => "payload format invalid",
        0x9E => "shared subscriptions not supported",
        0xA1 => "subscription identifiers not supported",
        0xA2 => "wildcard subscriptions not supported",
        _ => return format!("reason code 0x{reason:02X}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Option<Inbound>, WireError> {
        acknowledgement(&mut BytesMut::from(bytes), 1024)
    }

    /// Whatever the code is, the packet is answered and the link lives.
    #[test]
    fn every_reason_code_is_an_answer() {
        for reason in 0..=u8::MAX {
            let Ok(Some(Inbound::PubAck(1, puback))) = read(&[0x40, 3, 0, 1, reason]) else {
                panic!("0x{reason:02X}");
            };
            assert_eq!(puback.is_ok(), reason < 0x80);
            for first in [0x50, 0x62, 0x70] {
                assert!(matches!(read(&[first, 3, 0, 1, reason]), Ok(Some(_))));
            }
            for first in [0x90, 0xB0] {
                assert!(matches!(read(&[first, 4, 0, 1, 0, reason]), Ok(Some(_))));
            }
        }
        let Ok(Some(Inbound::PubAck(_, Err(refusal)))) = read(b"\x40\x03\0\x01\xf0") else {
            panic!("no refusal");
        };
        assert_eq!(refusal.reason, "reason code 0xF0");
    }

    #[test]
    fn a_denial_is_told_from_other_failures() {
        for (reason, denied, text) in [
            (0x87, true, "not authorized"),
            (0x97, false, "quota exceeded"),
        ] {
            let Ok(Some(Inbound::SubAck(1, Err(refusal)))) = read(&[0x90, 4, 0, 1, 0, reason])
            else {
                panic!("no refusal");
            };
            assert_eq!((refusal.denied, &refusal.reason[..]), (denied, text));
        }
    }

    #[test]
    fn what_is_cut_short_is_waited_for_or_refused() {
        let whole = b"\x90\x09\0\x01\x05\x1f\0\x02no\x01";
        assert!(matches!(read(whole), Ok(Some(Inbound::SubAck(1, Ok(_))))));
        for end in 0..whole.len() {
            assert!(matches!(read(&whole[..end]), Ok(None)), "{end}");
        }
        for bytes in [
            &b"\x40\x01\0"[..],
            b"\x40\x02\0\0",
            b"\x90\x03\0\x01\0",
            b"\x90\x04\0\x01\x05\0",
            b"\x90\x05\0\x01\0\0\0",
        ] {
            assert!(read(bytes).is_err(), "{bytes:?}");
        }
    }
}
