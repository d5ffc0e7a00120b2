//! What the broker has sent at QoS 1 and 2 and awaits an answer for.
//!
//! ```text
//! Waiting --taken--> PUBACK: forgotten | PUBREC: Received --PUBREL--> forgotten
//!         --taken while the link is down--> Taken --sent again--> PUBACK | PUBREC
//! ```

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use super::super::QoS;
use super::super::wire::InboundPublish;

/// Fewer messages than this are not thought to fill a broker's window.
const SMALLEST_WINDOW: usize = 16;

/// Bytes at either end of a payload by which a message is told from another.
const MARK: usize = 64;

/// Names one publish that the broker sent and that is not acknowledged yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker) struct Receipt {
    pkid: u16,
    /// Packet ids are used again, receipts never.
    token: u64,
}

/// What is to be said to the broker about a packet id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    PubAck(u16),
    PubRec(u16),
}

/// What a publish is.
pub(super) enum Arrival {
    /// To be delivered.
    New(Receipt),
    /// One that came before.
    Known(Option<Reply>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The connections have not taken it yet.
    Waiting,
    /// Taken while the link was down: acknowledged when the broker sends it again.
    Taken,
    /// QoS 2: PUBREC is out.
    Received,
}

#[derive(Debug)]
struct Entry {
    token: u64,
    qos: QoS,
    state: State,
    /// Of topic and payload.
    mark: u64,
}

impl Entry {
    fn reply(&mut self, pkid: u16) -> Reply {
        match self.qos {
            QoS::ExactlyOnce => {
                self.state = State::Received;
                Reply::PubRec(pkid)
            }
            _ => Reply::PubAck(pkid),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbox {
    entries: HashMap<u16, Entry>,
    next_token: u64,
    hasher: RandomState,
    /// Messages that wait to be taken, oldest first; some may have been taken.
    held: VecDeque<Receipt>,
    /// How many of them have not.
    waiting: usize,
    /// How many may wait before the oldest is acknowledged untaken.
    max_waiting: usize,
    /// The same as long as nothing has shown that the broker's window is smaller.
    most_waiting: usize,
    /// Messages that were acknowledged untaken.
    early: u64,
    /// Messages that have come, and which one had waited for longest, when this was last
    /// looked at.
    looked: Option<(u64, Receipt)>,
}

impl Inbox {
    /// For a broker that may have so many messages unacknowledged.
    pub(super) fn new(window: u16) -> Self {
        // With one message allowed there is no other to be let through.
        let most_waiting = (usize::from(window) / 2).max(1);
        Self {
            entries: HashMap::new(),
            next_token: 0,
            hasher: RandomState::new(),
            held: VecDeque::new(),
            waiting: 0,
            max_waiting: most_waiting,
            most_waiting,
            early: 0,
            looked: None,
        }
    }

    /// A CONNACK came, perhaps of another broker.
    pub(super) fn connected(&mut self, session_present: bool) {
        self.max_waiting = self.most_waiting;
        self.looked = None;
        if !session_present {
            self.entries.clear();
            self.held.clear();
            self.waiting = 0;
        }
    }

    /// A publish of QoS 1 or 2 came.
    pub(super) fn receive(&mut self, publish: &InboundPublish) -> Arrival {
        let pkid = publish.pkid;
        let mark = self.mark(publish);
        // One that we know is marked as sent again, for packet ids come round. The mark
        // alone does not make it so: a broker that went back to a session that it saved long
        // ago may send another message under the number, and that one again.
        let known = self.entries.get_mut(&pkid);
        if let Some(entry) = known.filter(|entry| publish.dup && entry.mark == mark) {
            let reply = match entry.state {
                State::Waiting => None,
                State::Received | State::Taken => Some(entry.reply(pkid)),
            };
            if reply == Some(Reply::PubAck(pkid)) {
                self.entries.remove(&pkid);
            }
            return Arrival::Known(reply);
        }
        // The broker has forgotten what the number named.
        self.forget(pkid);
        self.next_token += 1;
        let receipt = Receipt {
            pkid,
            token: self.next_token,
        };
        let entry = Entry {
            token: receipt.token,
            qos: publish.qos,
            state: State::Waiting,
            mark,
        };
        self.entries.insert(pkid, entry);
        self.waiting += 1;
        self.held.push_back(receipt);
        Arrival::New(receipt)
    }

    /// A message was taken by everyone it was for. Nothing is said while there is no link.
    pub(super) fn taken(&mut self, receipt: Receipt, connected: bool) -> Option<Reply> {
        let entry = self.entries.get_mut(&receipt.pkid)?;
        if entry.token != receipt.token || entry.state != State::Waiting {
            return None;
        }
        self.waiting -= 1;
        if !connected {
            entry.state = State::Taken;
            return None;
        }
        let reply = entry.reply(receipt.pkid);
        if matches!(reply, Reply::PubAck(_)) {
            self.entries.remove(&receipt.pkid);
        }
        Some(reply)
    }

    /// A PUBREL came.
    pub(super) fn forget(&mut self, pkid: u16) {
        if let Some(entry) = self.entries.remove(&pkid) {
            self.waiting -= usize::from(entry.state == State::Waiting);
        }
    }

    /// What is to be acknowledged untaken. When messages that wait fill half of the
    /// broker's window, a slow handler is about to stop the traffic of all: the oldest
    /// is acknowledged. It still waits in its connection's queue and is lost only with
    /// the gateway, and so it would be unacknowledged too: a gateway that starts does
    /// so with a clean session.
    pub(super) fn overdue(&mut self) -> Option<Reply> {
        let mut reply = None;
        while self.waiting > self.max_waiting
            && reply.is_none()
            && let Some(oldest) = self.held.pop_front()
        {
            reply = self.taken(oldest, true);
        }
        self.early += u64::from(reply.is_some());
        if self.held.len() > 2 * self.most_waiting {
            let mut held = std::mem::take(&mut self.held);
            held.retain(|receipt| self.waits(*receipt));
            self.held = held;
        }
        reply
    }

    /// To be called now and then, a second apart or so. Brokers do not always tell how
    /// small their window is (HiveMQ's has 50 messages, whatever the client allows): where
    /// many wait, and the same for long, and nothing more has come, it may be full. Half of
    /// what waits is its half then.
    pub(super) fn look_for_a_stall(&mut self) {
        while let Some(oldest) = self.held.front()
            && !self.waits(*oldest)
        {
            self.held.pop_front();
        }
        let now = self.held.front().map(|oldest| (self.next_token, *oldest));
        if now.is_some() && now == self.looked && self.waiting >= SMALLEST_WINDOW {
            self.max_waiting = self.max_waiting.min(self.waiting / 2);
        }
        self.looked = now;
    }

    /// How many messages were acknowledged before they were taken, since the last call.
    pub(super) fn take_early(&mut self) -> u64 {
        std::mem::take(&mut self.early)
    }

    fn waits(&self, receipt: Receipt) -> bool {
        let entry = self.entries.get(&receipt.pkid);
        entry.is_some_and(|e| e.token == receipt.token && e.state == State::Waiting)
    }

    fn mark(&self, publish: &InboundPublish) -> u64 {
        let payload = &publish.payload;
        let head = payload.get(..MARK).unwrap_or(payload);
        let tail = payload.len().checked_sub(MARK);
        let tail = tail.and_then(|from| payload.get(from..)).unwrap_or(payload);
        let about = (&publish.topic[..], payload.len(), head, tail);
        self.hasher.hash_one(about)
    }
}
