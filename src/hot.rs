//! The functions that every message goes through, each with something to work on:
//! `benches/instructions.rs` calls them and callgrind counts what they take.
//!
//! They are in the library because most of them are private. Nothing in the program
//! calls them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use prost::Message;

use crate::auth::hot as auth;
use crate::broker::hot as broker;
use crate::connection::hot as connection;
use crate::handler::hot as handler;
use crate::id::{ConnId, NodeTag, ShardId};
use crate::proto;
use crate::rate::TokenBucket;
use crate::transport::hot as transport;

/// Does it once, each time that it is called.
pub type Work = Box<dyn FnMut()>;

/// A function by name, and what makes it ready to be called.
pub type Hot = (&'static str, fn() -> Work);

/// All of them. Messages are 64 bytes long.
#[rustfmt::skip]
pub const FUNCTIONS: &[Hot] = &[
    ("id: conn written as text", conn_text),
    ("id: conn read from text", conn_parsed),
    ("proto: ReceivedBytesRequest encoded", received_bytes),
    ("proto: ReceivedMessagesRequest encoded", received_messages),
    ("proto: SendBytesRequest decoded", send_bytes),
    ("proto: PublishRequest decoded", publish_request),
    ("proto: CodeResponse encoded", code_response),
    ("rate: a read counted against a limit", rate_limit),
    ("transport: dtls record sealed", transport::dtls_sealed),
    ("transport: dtls record opened", transport::dtls_opened),
    ("transport: udp peer looked up among 10,000", transport::udp_peer),
    ("connection: looked up among 10,000", connection::looked_up),
    ("connection: bytes read, handed over, taken", connection::received),
    ("connection: bytes accepted by Send, written", connection::sent),
    ("connection: message queued, handed over, taken", connection::delivered),
    ("connection: queue, one in and out", connection::queued),
    ("handler: ledger, an entry on a stream of 16", handler::ledger_short),
    ("handler: ledger, an entry on a stream of 1,024", handler::ledger_long),
    ("auth: publish allowed by the first of 10 rules", auth::first_rule),
    ("auth: publish allowed by the last of 10 rules", auth::last_rule),
    ("topic: name checked and mounted", broker::topic_mounted),
    ("topic: filter checked", broker::filter_checked),
    ("trie: match among 1", broker::trie_1),
    ("trie: match among 1,000", broker::trie_1_000),
    ("trie: match among 100,000", broker::trie_100_000),
    ("broker: publish, from the call to PUBACK", broker::published),
    ("broker: message, from the packet to its end", broker::received),
    ("broker: audience of 1 by identifier", broker::audience_1),
    ("broker: audience of 1,000 by identifier", broker::audience_1_000),
    ("mqtt 5: PUBLISH written", broker::v5_written),
    ("mqtt 5: PUBLISH read", broker::v5_read),
    ("mqtt 5: PUBACK read", broker::v5_ack_read),
    ("mqtt 3.1.1: PUBLISH written", broker::v4_written),
    ("mqtt 3.1.1: PUBLISH read", broker::v4_read),
];

const PAYLOAD: &[u8] = &[7; 64];

/// The random part of an id has the same length however it is.
fn conn() -> ConnId {
    ConnId::generate(NodeTag::of("node"), ShardId(1)).unwrap()
}

fn conn_text() -> Work {
    let conn = conn();
    Box::new(move || drop(black_box(conn.text())))
}

fn conn_parsed() -> Work {
    let text = conn().text();
    Box::new(move || {
        black_box(ConnId::parse(black_box(&text)));
    })
}

/// Encodes into a buffer that has room, as tonic does.
fn encoded(message: impl Message + 'static) -> Work {
    let mut buffer = BytesMut::with_capacity(8 * 1024);
    Box::new(move || {
        buffer.clear();
        black_box(&message).encode(&mut buffer).unwrap();
        black_box(&buffer);
    })
}

fn decoded<M: Message + Default + 'static>(message: &M) -> Work {
    let encoded = Bytes::from(message.encode_to_vec());
    Box::new(move || drop(black_box(M::decode(encoded.clone()).unwrap())))
}

fn received_bytes() -> Work {
    encoded(proto::ReceivedBytesRequest {
        conn: conn().text(),
        bytes: Bytes::from_static(PAYLOAD),
    })
}

fn received_messages() -> Work {
    let message = proto::Message {
        node: "exproto-1".to_owned(),
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        qos: 1,
        from: "device-1".to_owned(),
        topic: "devices/device-1/down".to_owned(),
        payload: Bytes::from_static(PAYLOAD),
        timestamp: 1_700_000_000_000,
    };
    encoded(proto::ReceivedMessagesRequest {
        conn: conn().text(),
        messages: vec![message],
    })
}

fn send_bytes() -> Work {
    decoded(&proto::SendBytesRequest {
        conn: conn().text(),
        bytes: Bytes::from_static(PAYLOAD),
    })
}

fn publish_request() -> Work {
    decoded(&proto::PublishRequest {
        conn: conn().text(),
        topic: "devices/device-1/up".to_owned(),
        qos: 1,
        payload: Bytes::from_static(PAYLOAD),
    })
}

fn code_response() -> Work {
    encoded(proto::CodeResponse {
        code: proto::ResultCode::Success.into(),
        message: String::new(),
    })
}

fn rate_limit() -> Work {
    let mut now = Instant::now();
    let mut bucket = TokenBucket::new(1000.0, now);
    Box::new(move || {
        now += Duration::from_millis(1);
        black_box(bucket.debit(1.0, now));
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::FUNCTIONS;

    /// Each checks what it does by itself.
    #[test]
    fn all_can_be_called_again_and_again() {
        for (_, make) in FUNCTIONS {
            let mut work = make();
            (0..100).for_each(|_| work());
        }
        let names: HashSet<&str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), FUNCTIONS.len());
    }
}
