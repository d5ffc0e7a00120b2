//! Messages that wait for one connection's handler.

use std::collections::VecDeque;

use crate::broker::Delivery;

/// Bounds of a queue and what happens at them.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most messages.
    pub max_messages: usize,
    /// Most bytes, everything counted that a callback carries. One message is taken
    /// whatever its size.
    pub max_bytes: usize,
    /// What happens when one of them is reached.
    pub policy: Policy,
}

/// What happens when a queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The oldest messages make room.
    DropOldest,
    /// The connection is closed.
    Close,
}

/// What became of a message.
#[derive(Debug)]
pub(super) enum Pushed {
    /// It waits.
    Queued,
    /// It waits, and these had to go for it.
    Dropped(Vec<Delivery>),
    /// There is no room for it, and the connection is to be closed.
    Full(Delivery),
}

#[derive(Debug, Default)]
pub(super) struct MessageQueue {
    messages: VecDeque<Delivery>,
    bytes: usize,
}

impl MessageQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) fn push(&mut self, delivery: Delivery, limits: &Limits) -> Pushed {
        let size = size(&delivery);
        let mut dropped = Vec::new();
        while !self.messages.is_empty()
            && (self.messages.len() >= limits.max_messages || self.bytes + size > limits.max_bytes)
        {
            if limits.policy == Policy::Close {
                return Pushed::Full(delivery);
            }
            dropped.extend(self.pop());
        }
        self.bytes += size;
        self.messages.push_back(delivery);
        if dropped.is_empty() {
            Pushed::Queued
        } else {
            Pushed::Dropped(dropped)
        }
    }

    /// The oldest messages: at most `count`, and at most `bytes` beyond the first.
    pub(super) fn take(&mut self, count: usize, bytes: usize) -> Vec<Delivery> {
        let mut batch = Vec::new();
        let mut taken = 0;
        while batch.len() < count
            && let Some(next) = self.messages.front()
        {
            taken += size(next);
            if !batch.is_empty() && taken > bytes {
                break;
            }
            batch.extend(self.pop());
        }
        if self.messages.is_empty() {
            // An idle connection holds no memory for messages it once had.
            self.messages = VecDeque::new();
        }
        batch
    }

    fn pop(&mut self) -> Option<Delivery> {
        let delivery = self.messages.pop_front()?;
        self.bytes = self.bytes.saturating_sub(size(&delivery));
        Some(delivery)
    }
}

/// What a message takes in a callback beside payload, topic and publisher: node
/// name (255 at most), id, timestamp and tags.
const OVERHEAD: usize = 320;

fn size(delivery: &Delivery) -> usize {
    let message = &delivery.message;
    message.payload.len() + message.topic.len() + message.from.len() + OVERHEAD
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::broker::{Message, QoS};
    use crate::id::MessageIds;

    fn delivery(payload: &'static str) -> Delivery {
        Delivery {
            message: Arc::new(Message {
                id: MessageIds::new().unwrap().next_id(),
                topic: "t".into(),
                payload: Bytes::from_static(payload.as_bytes()),
                from: String::new(),
                timestamp: 0,
                trace: None,
            }),
            qos: QoS::AtMostOnce,
            _ack: None,
        }
    }

    fn limits(policy: Policy) -> Limits {
        Limits {
            max_messages: 3,
            max_bytes: 1_000_000,
            policy,
        }
    }

    fn payloads(batch: &[Delivery]) -> Vec<&[u8]> {
        batch.iter().map(|d| &d.message.payload[..]).collect()
    }

    #[test]
    fn the_oldest_make_room_by_count_and_by_bytes() {
        let mut queue = MessageQueue::default();
        let limits = limits(Policy::DropOldest);
        for payload in ["1", "2", "3"] {
            assert!(matches!(
                queue.push(delivery(payload), &limits),
                Pushed::Queued
            ));
        }
        let Pushed::Dropped(dropped) = queue.push(delivery("4"), &limits) else {
            panic!("nothing dropped");
        };
        assert_eq!(payloads(&dropped), [b"1"]);
        let limits = Limits {
            max_bytes: 2 * OVERHEAD + 10,
            ..limits
        };
        let Pushed::Dropped(dropped) = queue.push(delivery("55555"), &limits) else {
            panic!("nothing dropped");
        };
        assert_eq!(payloads(&dropped), [b"2", b"3"]);
        let batch = queue.take(100, usize::MAX);
        assert_eq!(payloads(&batch), [&b"4"[..], b"55555"]);
        assert!(queue.is_empty() && queue.bytes == 0);
    }

    #[test]
    fn a_message_larger_than_the_bound_is_taken_alone() {
        let mut queue = MessageQueue::default();
        let limits = Limits {
            max_bytes: 10,
            ..limits(Policy::DropOldest)
        };
        queue.push(delivery("1"), &limits);
        queue.push(delivery("a message of some length"), &limits);
        assert_eq!(queue.take(100, 1).len(), 1);
        assert!(queue.is_empty());
    }

    #[test]
    fn the_policy_to_close_takes_nothing_more() {
        let mut queue = MessageQueue::default();
        let limits = limits(Policy::Close);
        for payload in ["1", "2", "3"] {
            queue.push(delivery(payload), &limits);
        }
        assert!(matches!(
            queue.push(delivery("4"), &limits),
            Pushed::Full(_)
        ));
    }

    #[test]
    fn batches_are_bounded_by_count_and_by_bytes() {
        let mut queue = MessageQueue::default();
        let limits = Limits {
            max_messages: 100,
            max_bytes: 1_000_000,
            policy: Policy::DropOldest,
        };
        for payload in ["1", "2", "3", "4444", "5"] {
            queue.push(delivery(payload), &limits);
        }
        assert_eq!(payloads(&queue.take(2, 1_000_000)), [b"1", b"2"]);
        // Topic and payload: 2 and 5 bytes, then 5 and 2.
        let two = 2 * OVERHEAD + 7;
        assert_eq!(payloads(&queue.take(10, two - 1)), [b"3"]);
        assert_eq!(payloads(&queue.take(10, two)), [&b"4444"[..], b"5"]);
    }
}
