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

/// Looks, a second apart or so, at which the same messages wait and nothing has come, after
/// which the broker may be waiting for us.
const STALLED: u32 = 3;

/// For so many looks everything is acknowledged at once then: at first, and at most.
const EAGER: (u32, u32) = (10, 640);

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
    /// For how many looks none may.
    eager: u32,
    /// For how many it will be the next time.
    next_eager: u32,
    /// Messages that were acknowledged untaken.
    early: u64,
    /// Messages that have come, and which one had waited for longest, when this was last
    /// looked at.
    looked: Option<(u64, Receipt)>,
    /// At how many looks in a row that was the same.
    same: u32,
}

impl Inbox {
    /// For a broker that may have so many messages unacknowledged.
    pub(super) fn new(window: u16) -> Self {
        Self {
            entries: HashMap::new(),
            next_token: 0,
            hasher: RandomState::new(),
            held: VecDeque::new(),
            waiting: 0,
            // With one message allowed there is no other to be let through.
            max_waiting: (usize::from(window) / 2).max(1),
            eager: 0,
            next_eager: EAGER.0,
            early: 0,
            looked: None,
            same: 0,
        }
    }

    /// A CONNACK came, perhaps of another broker.
    pub(super) fn connected(&mut self, session_present: bool) {
        (self.eager, self.next_eager) = (0, EAGER.0);
        (self.looked, self.same) = (None, 0);
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
        let most = if self.eager > 0 { 0 } else { self.max_waiting };
        while self.waiting > most
            && reply.is_none()
            && let Some(oldest) = self.held.pop_front()
        {
            reply = self.taken(oldest, true);
        }
        self.early += u64::from(reply.is_some());
        if self.held.len() > 2 * self.max_waiting {
            let mut held = std::mem::take(&mut self.held);
            held.retain(|receipt| self.waits(*receipt));
            self.held = held;
        }
        reply
    }

    /// Whether there is anything to look at.
    pub(super) fn is_watching(&self) -> bool {
        !self.held.is_empty() || self.eager > 0
    }

    /// To be called every second or so while [`Inbox::is_watching`]. Brokers do not say how many messages they leave
    /// unacknowledged, and some stop at fewer than a client allows (ejabberd at one, HiveMQ
    /// at fifty, of which it wants all before it goes on). Where the same ones wait for long
    /// and nothing comes, it may be that: they are acknowledged, and for a while whatever
    /// comes, so that a slow handler does not stop the traffic of all.
    pub(super) fn look_for_a_stall(&mut self) {
        while let Some(oldest) = self.held.front()
            && !self.waits(*oldest)
        {
            self.held.pop_front();
        }
        let now = self.held.front().map(|oldest| (self.next_token, *oldest));
        let same = now.is_some() && now == self.looked;
        self.same = if same { self.same + 1 } else { 0 };
        self.looked = now;
        self.eager = self.eager.saturating_sub(1);
        if self.same >= STALLED {
            self.same = 0;
            self.eager = self.next_eager;
            self.next_eager = (2 * self.next_eager).min(EAGER.1);
        }
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
