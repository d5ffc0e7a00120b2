//! MQTT on the wire, in either version.
//!
//! The rest of the broker leg speaks in the packets of this file and does not know
//! which version carries them; `v5` and `v4` are the two files that name rumqttc,
//! whose codecs do the work. Another codec is a change in one place.

mod fit;
pub(crate) mod fuzzing;
mod outbound;
mod properties;
mod v4;
mod v5;

use bytes::{Buf, Bytes, BytesMut};

use fit::Fit;

use super::{PublishError, QoS, Refusal, Will};
pub(super) use outbound::OutboundPublish;
pub(super) use properties::UserProperties;

/// The version of MQTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// 3.1.1, whose protocol level is 4.
    V4,
    /// 5.0
    V5,
}

/// Largest subscription identifier (MQTT 5, 3.8.2.1.2).
pub(super) const MAX_SUBSCRIPTION_ID: u32 = 268_435_455;

/// What a SUBSCRIBE has beside its filter, at most: header, packet id, identifier,
/// length of the filter and options.
const MAX_SUBSCRIBE_FRAME: usize = 5 + 2 + 6 + 2 + 1;

/// What the broker sent cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// Not what the version allows.
    #[error("the broker sent no valid MQTT {0}: {1}")]
    Invalid(&'static str, String),
    /// An answer in 3.1.1 to a CONNECT in 5.
    #[error("the broker does not speak MQTT 5: set broker.protocol = 4 for MQTT 3.1.1")]
    Only311,
}

impl WireError {
    /// What no version allows.
    fn invalid(problem: &str) -> Self {
        Self::Invalid("packet", problem.to_owned())
    }
}

/// What a CONNECT says.
pub(super) struct Hello<'a> {
    pub client_id: &'a str,
    pub login: Option<(&'a str, &'a str)>,
    /// Seconds.
    pub keep_alive: u16,
    /// With 3.1.1 this is `clean_session`: the session is not kept either.
    pub clean_start: bool,
    /// Seconds. Not said with 3.1.1, like the two below.
    pub session_expiry: u32,
    pub receive_maximum: u16,
    /// Bytes.
    pub max_packet_size: u32,
    /// Published by the broker when the connection ends without a farewell.
    pub will: Option<&'a Will>,
}

/// What a CONNACK granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Welcome {
    pub session_present: bool,
    /// How many QoS 1 and 2 publishes may be unacknowledged at once.
    pub receive_maximum: u16,
    pub max_qos: QoS,
    /// Bytes; `None`: no limit but the protocol's.
    pub max_packet_size: Option<u32>,
    pub subscription_ids: bool,
    pub shared_subscriptions: bool,
    /// Whether filters may have `+` and `#`.
    pub wildcards: bool,
    /// Seconds; the broker's wish overrides ours.
    pub keep_alive: Option<u16>,
}

/// The largest packet there can be, in bytes behind the fixed header (MQTT 5, 1.5.5;
/// 3.1.1, 2.2.3).
const MAX_PACKET: usize = 268_435_455;

impl Welcome {
    /// What the broker has said it does not take of publishes (MQTT 5, 3.2.2.3.4 and 6).
    pub(super) fn check(&self, publish: &OutboundPublish) -> Result<(), PublishError> {
        if publish.qos() > self.max_qos {
            return Err(PublishError::QosNotSupported(self.max_qos));
        }
        let size = publish.size();
        let limit = self.max_packet_size.unwrap_or(u32::MAX) as usize;
        let limit = limit.min(MAX_PACKET);
        if size > limit {
            return Err(PublishError::TooLarge { size, limit });
        }
        Ok(())
    }

    /// What the broker has said it has not: it may end the connection upon a SUBSCRIBE
    /// for it (MQTT 5, 3.2.2.3.6, 11 and 13).
    pub(super) fn refuses(&self, filter: &str) -> Option<Refusal> {
        if let Some(limit) = self.max_packet_size
            && filter.len() + MAX_SUBSCRIBE_FRAME > limit as usize
        {
            return Some(Refusal {
                denied: false,
                reason: format!("its packets have {limit} bytes at most"),
            });
        }
        let missing = if !self.shared_subscriptions && filter.starts_with("$share/") {
            "shared subscriptions"
        } else if !self.wildcards && filter.contains(['+', '#']) {
            "subscriptions with wildcards"
        } else {
            return None;
        };
        Some(Refusal {
            denied: false,
            reason: format!("it offers no {missing}"),
        })
    }
}

/// A publish from the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InboundPublish {
    pub dup: bool,
    pub retain: bool,
    pub qos: QoS,
    /// 0 at QoS 0.
    pub pkid: u16,
    pub topic: Bytes,
    pub payload: Bytes,
    /// Empty with 3.1.1.
    pub user_properties: UserProperties,
    /// Empty with 3.1.1.
    pub subscription_ids: Vec<u32>,
}

/// A packet from the broker.
#[derive(Debug)]
pub(super) enum Inbound {
    ConnAck(Result<Welcome, Refusal>),
    Publish(InboundPublish),
    /// A publish larger than we take, without its payload. Most brokers of MQTT 5 keep it
    /// to themselves.
    TooLarge(InboundPublish),
    PubAck(u16, Result<(), Refusal>),
    PubRec(u16, Result<(), Refusal>),
    PubRel(u16),
    PubComp(u16, Result<(), Refusal>),
    /// The broker knows no publish of this number that could be completed.
    PubCompUnknown(u16),
    SubAck(u16, Result<QoS, Refusal>),
    UnsubAck(u16),
    /// The broker did not take a SUBSCRIBE or UNSUBSCRIBE for its packet id.
    PkidInUse(u16),
    PingResp,
    Disconnect(DisconnectNotice),
}

/// Why the broker ended the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DisconnectNotice {
    pub reason: String,
    /// Another client connected with our client id (MQTT 5, 3.14.2.1: 0x8E).
    pub taken_over: bool,
    /// An operator ended it (0x98).
    pub administrative: bool,
}

/// When the broker sends retained messages upon a subscription (MQTT 5, 3.8.3.1).
/// With 3.1.1 it always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retained {
    Send,
    Never,
}

/// Takes packets off what was read from one connection.
pub(super) struct Decoder {
    protocol: Protocol,
    /// Bytes.
    max_packet_size: u32,
    /// Bytes of a packet too large that are still to come.
    skip: usize,
}

impl Decoder {
    pub(super) fn new(protocol: Protocol, max_packet_size: u32) -> Self {
        Self {
            protocol,
            max_packet_size,
            skip: 0,
        }
    }

    /// The next whole packet; `None` until one is there.
    pub(super) fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Inbound>, WireError> {
        let skipped = self.skip.min(buffer.len());
        buffer.advance(skipped);
        self.skip -= skipped;
        if self.skip > 0 {
            return Ok(None);
        }
        match fit::fit(buffer, self.max_packet_size)? {
            Fit::Fits => match self.protocol {
                Protocol::V5 => v5::decode(buffer, self.max_packet_size),
                Protocol::V4 => v4::decode(buffer, self.max_packet_size),
            },
            Fit::Unread => Ok(None),
            Fit::TooLarge(publish, size) => {
                self.skip = size.saturating_sub(buffer.len());
                buffer.advance(size.min(buffer.len()));
                Ok(Some(Inbound::TooLarge(publish)))
            }
        }
    }
}

/// Appends a packet to what is to be written.
///
/// The packets of this file always encode: their texts were checked to fit into
/// MQTT strings and their size against the broker's limit before they came here.
impl Protocol {
    /// As people write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "3.1.1",
            Self::V5 => "5",
        }
    }

    pub(super) fn connect(self, hello: &Hello<'_>, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::connect(hello, out),
            Self::V5 => v5::connect(hello, out),
        }
    }

    /// `subscription_id` and `retained` are not said with 3.1.1.
    pub(super) fn subscribe(
        self,
        pkid: u16,
        filter: &str,
        qos: QoS,
        subscription_id: Option<u32>,
        retained: Retained,
        out: &mut BytesMut,
    ) {
        match self {
            Self::V4 => v4::subscribe(pkid, filter, qos, out),
            Self::V5 => v5::subscribe(pkid, filter, qos, subscription_id, retained, out),
        }
    }

    pub(super) fn unsubscribe(self, pkid: u16, filter: &str, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::unsubscribe(pkid, filter, out),
            Self::V5 => v5::unsubscribe(pkid, filter, out),
        }
    }

    pub(super) fn puback(self, pkid: u16, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::puback(pkid, out),
            Self::V5 => v5::puback(pkid, out),
        }
    }

    pub(super) fn pubrec(self, pkid: u16, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::pubrec(pkid, out),
            Self::V5 => v5::pubrec(pkid, out),
        }
    }

    pub(super) fn pubrel(self, pkid: u16, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::pubrel(pkid, out),
            Self::V5 => v5::pubrel(pkid, out),
        }
    }

    pub(super) fn pubcomp(self, pkid: u16, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::pubcomp(pkid, out),
            Self::V5 => v5::pubcomp(pkid, out),
        }
    }

    pub(super) fn pingreq(self, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::pingreq(out),
            Self::V5 => v5::pingreq(out),
        }
    }

    /// Ends the connection and, with MQTT 5, the session too (expiry 0). With 3.1.1
    /// only another CONNECT ends a session. `with_will` has the broker publish the will,
    /// which 3.1.1 cannot say.
    pub(super) fn disconnect(self, with_will: bool, out: &mut BytesMut) {
        match self {
            Self::V4 => v4::disconnect(out),
            Self::V5 => v5::disconnect(with_will, out),
        }
    }

    /// How many messages the broker may have unacknowledged towards us when we allow
    /// `receive_maximum`.
    pub(super) fn broker_window(self, receive_maximum: u16) -> u16 {
        match self {
            Self::V4 => receive_maximum.min(v4::BROKER_WINDOW),
            Self::V5 => receive_maximum,
        }
    }
}

/// The name of a reason code as words: `NotAuthorized` reads `not authorized`.
fn words(reason: &impl std::fmt::Debug) -> String {
    let mut words = String::new();
    for c in format!("{reason:?}").chars() {
        if c.is_ascii_uppercase() && !words.is_empty() && !words.ends_with(' ') {
            words.push(' ');
        }
        words.push(c.to_ascii_lowercase());
    }
    words
}

impl Refusal {
    fn denied(reason: &impl std::fmt::Debug) -> Self {
        Self {
            denied: true,
            reason: words(reason),
        }
    }

    fn other(reason: &impl std::fmt::Debug) -> Self {
        Self {
            denied: false,
            reason: words(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_read_as_words() {
        #[derive(Debug)]
        enum Reason {
            NotAuthorized,
            QuotaExceeded,
        }
        assert_eq!(words(&Reason::NotAuthorized), "not authorized");
        assert_eq!(words(&Reason::QuotaExceeded), "quota exceeded");
    }
}
