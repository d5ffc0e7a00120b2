//! One MQTT session: packet ids, what awaits an acknowledgement, what is resent.
//!
//! No IO and no clock: packets go in, bytes to write are appended to a buffer. It
//! outlives the network connections that carry it (MQTT 5, 4.1 and 4.4).
//!
//! ```text
//! publish QoS 1:  Publish --PUBACK--> resolved
//! publish QoS 2:  Publish --PUBREC--> Release --PUBCOMP--> resolved
//! from the broker: Held --taken--> PUBACK | PUBREC, Received --PUBREL--> forgotten
//! ```

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::wire::{
    DisconnectNotice, Inbound, InboundPublish, OutboundPublish, Protocol, Retained, Welcome,
};
use super::{PublishError, QoS, Refusal};

/// Resolves a publish of QoS 1 or 2.
pub(super) type PublishWaiter = oneshot::Sender<Result<(), PublishError>>;

/// How many SUBSCRIBE and UNSUBSCRIBE may wait for their answer at once. A
/// hundred thousand filters go in a few round trips, and packet ids never run out.
const MAX_PENDING_FILTERS: usize = 8192;

/// Most publishes in flight, whatever the broker allows; leaves packet ids for
/// subscriptions.
const MAX_WINDOW: usize = 32_768;

/// A broker that has said so often in a row that a packet id is in use will say so for
/// ever. As many as may be on their way each get another chance.
const MAX_RENUMBERED: usize = 2 * MAX_PENDING_FILTERS;

/// What a broker may have hung up upon.
#[derive(Debug, PartialEq, Eq)]
enum Suspect {
    /// The packet that was sent as this one.
    Packet(u64),
    /// A filter that was being restored.
    Restore(Arc<str>),
}

/// A SUBSCRIBE on its way.
#[derive(Debug)]
pub(super) struct SubscribeRequest {
    pub filter: Arc<str>,
    pub qos: QoS,
    pub id: u32,
    pub retained: Retained,
    /// `None` when a lost subscription is restored.
    pub waiter: Option<oneshot::Sender<Result<QoS, Refusal>>>,
}

impl SubscribeRequest {
    /// Whether the caller has left, and its subscription with it.
    pub(super) fn is_abandoned(&self) -> bool {
        self.waiter.as_ref().is_some_and(oneshot::Sender::is_closed)
    }
}

/// Names one publish that the broker sent and that is not acknowledged yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Receipt {
    pkid: u16,
    /// Packet ids are used again, receipts never.
    token: u64,
}

#[derive(Debug)]
enum Pending {
    Publish {
        publish: OutboundPublish,
        waiter: PublishWaiter,
    },
    /// PUBREC came, PUBREL is out.
    Release {
        waiter: PublishWaiter,
    },
    Subscribe(SubscribeRequest),
    Unsubscribe(Arc<str>),
}

impl Pending {
    /// Bytes of a publish that is kept.
    fn publish_size(&self) -> usize {
        match self {
            Self::Publish { publish, .. } => publish.size(),
            _ => 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// The connections have not taken it yet.
    Waiting,
    /// Taken while the link was down: acknowledged when the broker sends it again.
    Taken,
    /// QoS 2: PUBREC is out.
    Received,
}

#[derive(Debug)]
struct Incoming {
    token: u64,
    qos: QoS,
    state: Held,
}

/// What a packet means to the owner of the session.
#[derive(Debug)]
pub(super) enum Event {
    /// Nothing to be done.
    None,
    /// A message; to be acknowledged by [`Session::taken`] where a receipt is given.
    Deliver(InboundPublish, Option<Receipt>),
    /// The broker accepted the SUBSCRIBE with this identifier.
    Subscribed(Arc<str>, u32),
    /// The broker would not have the packet id: to be sent with another one if it is still
    /// wanted, which only the owner knows.
    SubscribeAgain(SubscribeRequest),
    /// Likewise.
    UnsubscribeAgain(Arc<str>),
    /// A message on this topic was larger than we take; it is acknowledged.
    TooLarge(Bytes),
    /// A lost subscription could not be restored.
    NotRestored(Arc<str>, Refusal),
    /// The broker ended the connection.
    Ended(DisconnectNotice),
    /// A packet out of place.
    Unexpected(&'static str),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Session {
    protocol: Protocol,
    connected: bool,
    subscription_ids: bool,
    window: usize,
    last_pkid: u16,
    next_order: u64,
    /// By packet id; the number is the order in which they were first sent.
    pending: HashMap<u16, (u64, Pending)>,
    /// Bytes of the publishes among them.
    pending_bytes: usize,
    /// Publishes sent on this connection and unacknowledged.
    in_flight: usize,
    /// Publishes of an earlier connection that still must be sent again.
    resend: VecDeque<u16>,
    /// Whether the broker may have seen them already.
    resend_dup: bool,
    filters_pending: usize,
    restoring: usize,
    incoming: HashMap<u16, Incoming>,
    next_token: u64,
    /// Messages that wait to be taken, oldest first; some may have been taken.
    held: VecDeque<Receipt>,
    /// How many of them have not.
    waiting: usize,
    /// How many may wait before the oldest is acknowledged untaken.
    max_waiting: usize,
    acknowledged_early: u64,
    /// SUBSCRIBEs and UNSUBSCRIBEs whose packet ids the broker would not have, since it
    /// answered one otherwise.
    renumbered: usize,
    /// The oldest unanswered packet when the broker last hung up, and how often in
    /// a row it was that one.
    suspect: Option<(Suspect, u32)>,
}

/// A broker that hangs up so often upon one packet will not take it.
const MAX_HANG_UPS: u32 = 3;

impl Session {
    /// A session towards which the broker may have `receive_maximum` messages
    /// unacknowledged.
    pub(super) fn new(protocol: Protocol, receive_maximum: u16) -> Self {
        let broker_window = protocol.broker_window(receive_maximum);
        Self {
            protocol,
            connected: false,
            subscription_ids: true,
            window: 0,
            last_pkid: 0,
            next_order: 0,
            pending: HashMap::new(),
            pending_bytes: 0,
            in_flight: 0,
            resend: VecDeque::new(),
            resend_dup: false,
            filters_pending: 0,
            restoring: 0,
            incoming: HashMap::new(),
            next_token: 0,
            held: VecDeque::new(),
            waiting: 0,
            // With one message allowed there is no other to be let through.
            max_waiting: (usize::from(broker_window) / 2).max(1),
            acknowledged_early: 0,
            renumbered: 0,
            suspect: None,
        }
    }

    /// The broker ended a working connection. Brokers work packets off in order, so
    /// the oldest one without an answer is the likely cause: when it was so several
    /// times in a row it fails, or it would break the link for ever. The filter, where
    /// that was one that was being restored.
    pub(super) fn hung_up(&mut self) -> Option<(Arc<str>, Refusal)> {
        let oldest = self.pending.iter().min_by_key(|(_, (order, _))| *order);
        let Some((&pkid, (order, pending))) = oldest else {
            self.suspect = None;
            return None;
        };
        // What is restored is another packet each time.
        let suspect = match pending {
            Pending::Subscribe(request) if request.waiter.is_none() => {
                Suspect::Restore(request.filter.clone())
            }
            _ => Suspect::Packet(*order),
        };
        let times = match self.suspect.take() {
            Some((last, times)) if last == suspect => times + 1,
            _ => 1,
        };
        self.suspect = Some((suspect, times));
        if times < MAX_HANG_UPS {
            return None;
        }
        let refusal = Refusal {
            denied: false,
            reason: "the broker ends the connection when it gets this".to_owned(),
        };
        match self.take(pkid)?.1 {
            Pending::Publish { waiter, .. } | Pending::Release { waiter } => {
                let _ = waiter.send(Err(PublishError::Refused(refusal)));
            }
            Pending::Subscribe(request) => {
                self.filters_pending -= 1;
                let Some(waiter) = request.waiter else {
                    self.restoring -= 1;
                    return Some((request.filter, refusal));
                };
                let _ = waiter.send(Err(refusal));
            }
            Pending::Unsubscribe(_) => self.filters_pending -= 1,
        }
        None
    }

    /// The link broke. What is pending waits for [`Session::connected`].
    pub(super) fn disconnected(&mut self) {
        self.connected = false;
    }

    /// A CONNACK came: sends again what is unacknowledged, in its order
    /// (MQTT 5, 4.4 and 4.6).
    pub(super) fn connected(&mut self, welcome: &Welcome, out: &mut BytesMut) {
        self.connected = true;
        self.subscription_ids = welcome.subscription_ids;
        self.window = usize::from(welcome.receive_maximum).min(MAX_WINDOW);
        self.in_flight = 0;
        self.resend.clear();
        if !welcome.session_present {
            self.incoming.clear();
            self.held.clear();
            self.waiting = 0;
        }
        let mut order: BTreeMap<u64, u16> = BTreeMap::new();
        for (pkid, (number, _)) in &self.pending {
            order.insert(*number, *pkid);
        }
        for pkid in order.into_values() {
            match self.pending.get(&pkid) {
                Some((_, Pending::Publish { publish, .. })) => match welcome.check(publish) {
                    Ok(()) => self.resend.push_back(pkid),
                    // It may be another broker than the one that had it before.
                    Err(error) => {
                        if let Some((_, Pending::Publish { waiter, .. })) = self.take(pkid) {
                            let _ = waiter.send(Err(error));
                        }
                    }
                },
                Some((_, Pending::Release { .. })) if welcome.session_present => {
                    self.in_flight += 1;
                    self.protocol.pubrel(pkid, out);
                }
                Some((_, Pending::Release { .. })) => {
                    // The broker took it and lost it: nobody can say what became of it.
                    if let Some((_, Pending::Release { waiter })) = self.take(pkid) {
                        let _ = waiter.send(Err(PublishError::SessionLost));
                    }
                }
                // Whoever gave up has taken it back; what was being restored is restored
                // from the table, which knows what is still wanted.
                Some((_, Pending::Subscribe(request)))
                    if request.is_abandoned() || request.waiter.is_none() =>
                {
                    self.restoring -= usize::from(request.waiter.is_none());
                    self.take(pkid);
                    self.filters_pending -= 1;
                }
                Some((_, Pending::Subscribe(request))) => {
                    // It may be another broker than the one that was asked.
                    if let Some(refusal) = welcome.refuses(&request.filter) {
                        self.on_suback(pkid, Err(refusal));
                        continue;
                    }
                    let id = self.subscription_ids.then_some(request.id);
                    self.protocol.subscribe(
                        pkid,
                        &request.filter,
                        request.qos,
                        id,
                        request.retained,
                        out,
                    );
                }
                Some((_, Pending::Unsubscribe(filter))) if welcome.session_present => {
                    self.protocol.unsubscribe(pkid, filter, out);
                }
                Some((_, Pending::Unsubscribe(_))) => {
                    self.take(pkid);
                    self.filters_pending -= 1;
                }
                None => {}
            }
        }
        self.resend_dup = welcome.session_present;
        self.send_again(out);
    }

    /// Sends what waits in `resend` as far as the window allows. The duplicate flag
    /// marks them where the broker may have seen them (MQTT 5, 3.3.1.1).
    fn send_again(&mut self, out: &mut BytesMut) {
        while self.in_flight < self.window {
            let Some(pkid) = self.resend.pop_front() else {
                return;
            };
            if let Some((_, Pending::Publish { publish, .. })) = self.pending.get_mut(&pkid) {
                publish.encode(pkid, self.resend_dup, out);
                self.in_flight += 1;
            }
        }
    }

    /// Whether a publish of QoS 1 or 2 may be sent now.
    pub(super) fn can_publish(&self) -> bool {
        self.connected && self.resend.is_empty() && self.in_flight < self.window
    }

    /// Sends a publish of QoS 1 or 2. Only after [`Session::can_publish`].
    pub(super) fn publish(
        &mut self,
        mut publish: OutboundPublish,
        waiter: PublishWaiter,
        out: &mut BytesMut,
    ) {
        let pkid = self.next_pkid();
        publish.encode(pkid, false, out);
        self.in_flight += 1;
        self.remember(pkid, Pending::Publish { publish, waiter });
    }

    /// Whether a SUBSCRIBE or UNSUBSCRIBE may be sent now.
    pub(super) fn can_subscribe(&self) -> bool {
        self.connected && self.filters_pending < MAX_PENDING_FILTERS
    }

    /// Sends a SUBSCRIBE. Only after [`Session::can_subscribe`].
    pub(super) fn subscribe(&mut self, request: SubscribeRequest, out: &mut BytesMut) {
        let pkid = self.next_pkid();
        let id = self.subscription_ids.then_some(request.id);
        self.protocol.subscribe(
            pkid,
            &request.filter,
            request.qos,
            id,
            request.retained,
            out,
        );
        self.filters_pending += 1;
        self.restoring += usize::from(request.waiter.is_none());
        self.remember(pkid, Pending::Subscribe(request));
    }

    /// Sends an UNSUBSCRIBE. Only after [`Session::can_subscribe`].
    pub(super) fn unsubscribe(&mut self, filter: Arc<str>, out: &mut BytesMut) {
        let pkid = self.next_pkid();
        self.protocol.unsubscribe(pkid, &filter, out);
        self.filters_pending += 1;
        self.remember(pkid, Pending::Unsubscribe(filter));
    }

    /// Whether lost subscriptions are still being restored.
    pub(super) fn restoring(&self) -> bool {
        self.restoring > 0
    }

    /// Whether nothing awaits an acknowledgement from the broker.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// Publishes that await an acknowledgement.
    pub(super) fn unacknowledged(&self) -> usize {
        self.pending.len() - self.filters_pending
    }

    /// Their bytes.
    pub(super) fn unacknowledged_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// A message was taken by everyone it was for: acknowledges it.
    pub(super) fn taken(&mut self, receipt: Receipt, out: &mut BytesMut) {
        let Some(incoming) = self.incoming.get_mut(&receipt.pkid) else {
            return;
        };
        if incoming.token != receipt.token || incoming.state != Held::Waiting {
            return;
        }
        self.waiting -= 1;
        if !self.connected {
            incoming.state = Held::Taken;
        } else if incoming.qos == QoS::ExactlyOnce {
            incoming.state = Held::Received;
            self.protocol.pubrec(receipt.pkid, out);
        } else {
            self.incoming.remove(&receipt.pkid);
            self.protocol.puback(receipt.pkid, out);
        }
    }

    /// Digests a packet.
    pub(super) fn receive(&mut self, packet: Inbound, out: &mut BytesMut) -> Event {
        match packet {
            Inbound::Publish(publish) => self.on_publish(publish, out),
            Inbound::TooLarge(publish) => match self.on_publish(publish, out) {
                Event::Deliver(publish, receipt) => {
                    if let Some(receipt) = receipt {
                        self.taken(receipt, out);
                    }
                    Event::TooLarge(publish.topic)
                }
                event => event,
            },
            Inbound::PubAck(pkid, result) => self.on_acknowledged(pkid, result, out),
            Inbound::PubRec(pkid, result) => match self.take(pkid) {
                Some((order, Pending::Publish { waiter, .. })) => match result {
                    Ok(()) => {
                        self.protocol.pubrel(pkid, out);
                        self.put_back(pkid, Some((order, Pending::Release { waiter })));
                        Event::None
                    }
                    Err(refusal) => {
                        self.settle(waiter, Err(PublishError::Refused(refusal)), out);
                        Event::None
                    }
                },
                other => {
                    // Also the answer to a PUBREC that came twice.
                    self.protocol.pubrel(pkid, out);
                    self.put_back(pkid, other);
                    Event::None
                }
            },
            Inbound::PubRel(pkid) => {
                if let Some(released) = self.incoming.remove(&pkid) {
                    self.waiting -= usize::from(released.state == Held::Waiting);
                }
                self.protocol.pubcomp(pkid, out);
                Event::None
            }
            Inbound::PubComp(pkid, result) => self.on_acknowledged(pkid, result, out),
            Inbound::SubAck(pkid, result) => {
                self.renumbered = 0;
                self.on_suback(pkid, result)
            }
            Inbound::UnsubAck(pkid) => {
                self.renumbered = 0;
                self.on_unsuback(pkid)
            }
            Inbound::PkidInUse(pkid) => self.on_pkid_in_use(pkid),
            Inbound::PingResp => Event::None,
            Inbound::Disconnect(notice) => Event::Ended(notice),
            Inbound::ConnAck(_) => Event::Unexpected("CONNACK"),
        }
    }

    fn on_suback(&mut self, pkid: u16, result: Result<QoS, Refusal>) -> Event {
        let request = match self.take(pkid) {
            Some((_, Pending::Subscribe(request))) => request,
            other => return self.unexpected(pkid, other, "SUBACK"),
        };
        self.filters_pending -= 1;
        let accepted = result.is_ok();
        match (request.waiter, result) {
            (Some(waiter), result) => {
                // The caller may have left, and taken it back.
                let _ = waiter.send(result);
            }
            (None, Ok(_)) => self.restoring -= 1,
            (None, Err(refusal)) => {
                self.restoring -= 1;
                return Event::NotRestored(request.filter, refusal);
            }
        }
        if accepted {
            Event::Subscribed(request.filter, request.id)
        } else {
            Event::None
        }
    }

    fn on_unsuback(&mut self, pkid: u16) -> Event {
        match self.take(pkid) {
            Some((_, Pending::Unsubscribe(_))) => {
                self.filters_pending -= 1;
                Event::None
            }
            other => self.unexpected(pkid, other, "UNSUBACK"),
        }
    }

    /// Both sides number for themselves (MQTT 5, 2.2.1), but mochi refuses what has the
    /// number of a message that it has in flight itself. The next ones come from the
    /// other half of the numbers.
    fn on_pkid_in_use(&mut self, pkid: u16) -> Event {
        self.last_pkid = pkid ^ 0x8000;
        self.renumbered += 1;
        let gives_up = self.renumbered > MAX_RENUMBERED;
        match self.take(pkid) {
            Some((_, Pending::Subscribe(request))) if !gives_up => {
                self.filters_pending -= 1;
                self.restoring -= usize::from(request.waiter.is_none());
                Event::SubscribeAgain(request)
            }
            Some((_, Pending::Unsubscribe(filter))) if !gives_up => {
                self.filters_pending -= 1;
                Event::UnsubscribeAgain(filter)
            }
            Some(pending @ (_, Pending::Unsubscribe(_))) => {
                self.put_back(pkid, Some(pending));
                self.on_unsuback(pkid)
            }
            other => {
                self.put_back(pkid, other);
                let reason = "packet identifier in use".to_owned();
                let denied = false;
                self.on_suback(pkid, Err(Refusal { denied, reason }))
            }
        }
    }

    fn on_publish(&mut self, publish: InboundPublish, out: &mut BytesMut) -> Event {
        if publish.qos == QoS::AtMostOnce {
            return Event::Deliver(publish, None);
        }
        let pkid = publish.pkid;
        // Only a message marked as sent again is one we know: packet ids come round.
        let known = self.incoming.get_mut(&pkid).filter(|_| publish.dup);
        match known.map(|incoming| (incoming.state, incoming.qos)) {
            Some((Held::Waiting, _)) => Event::None,
            Some((Held::Received, _)) => {
                self.protocol.pubrec(pkid, out);
                Event::None
            }
            Some((Held::Taken, QoS::ExactlyOnce)) => {
                if let Some(incoming) = self.incoming.get_mut(&pkid) {
                    incoming.state = Held::Received;
                }
                self.protocol.pubrec(pkid, out);
                Event::None
            }
            Some((Held::Taken, _)) => {
                self.incoming.remove(&pkid);
                self.protocol.puback(pkid, out);
                Event::None
            }
            None => {
                // A packet id used again without a mark: the broker has forgotten the
                // message that it named.
                if let Some(forgotten) = self.incoming.remove(&pkid) {
                    self.waiting -= usize::from(forgotten.state == Held::Waiting);
                }
                self.next_token += 1;
                let receipt = Receipt {
                    pkid,
                    token: self.next_token,
                };
                self.incoming.insert(
                    pkid,
                    Incoming {
                        token: receipt.token,
                        qos: publish.qos,
                        state: Held::Waiting,
                    },
                );
                self.hold(receipt, out);
                Event::Deliver(publish, Some(receipt))
            }
        }
    }

    /// Counts a message that waits to be taken. When those that wait fill half of the
    /// broker's window, a slow handler is about to stop the traffic of all: the oldest
    /// is acknowledged. It still waits in its connection's queue and is lost only with
    /// the gateway, and so it would be unacknowledged too: a gateway that starts does
    /// so with a clean session.
    fn hold(&mut self, receipt: Receipt, out: &mut BytesMut) {
        self.waiting += 1;
        self.held.push_back(receipt);
        while self.waiting > self.max_waiting
            && let Some(oldest) = self.held.pop_front()
        {
            let before = self.waiting;
            self.taken(oldest, out);
            self.acknowledged_early += (before - self.waiting) as u64;
        }
        if self.held.len() > 2 * self.max_waiting {
            let incoming = &self.incoming;
            self.held.retain(|receipt| {
                let state = incoming.get(&receipt.pkid);
                state.is_some_and(|i| i.token == receipt.token && i.state == Held::Waiting)
            });
        }
    }

    /// How many messages were acknowledged before they were taken, since the last
    /// call.
    pub(super) fn take_acknowledged_early(&mut self) -> u64 {
        std::mem::take(&mut self.acknowledged_early)
    }

    fn on_acknowledged(
        &mut self,
        pkid: u16,
        result: Result<(), Refusal>,
        out: &mut BytesMut,
    ) -> Event {
        match self.take(pkid) {
            Some((_, Pending::Publish { waiter, .. } | Pending::Release { waiter })) => {
                self.settle(waiter, result.map_err(PublishError::Refused), out);
                Event::None
            }
            other => self.unexpected(pkid, other, "PUBACK or PUBCOMP"),
        }
    }

    fn settle(
        &mut self,
        waiter: PublishWaiter,
        result: Result<(), PublishError>,
        out: &mut BytesMut,
    ) {
        // The caller may have gone; its publish went its way all the same.
        let _ = waiter.send(result);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.send_again(out);
    }

    fn unexpected(
        &mut self,
        pkid: u16,
        found: Option<(u64, Pending)>,
        packet: &'static str,
    ) -> Event {
        self.put_back(pkid, found);
        Event::Unexpected(packet)
    }

    /// Takes off what is pending under a packet id.
    fn take(&mut self, pkid: u16) -> Option<(u64, Pending)> {
        let found = self.pending.remove(&pkid)?;
        self.pending_bytes -= found.1.publish_size();
        Some(found)
    }

    fn put_back(&mut self, pkid: u16, found: Option<(u64, Pending)>) {
        if let Some(pending) = found {
            self.pending_bytes += pending.1.publish_size();
            self.pending.insert(pkid, pending);
        }
    }

    fn remember(&mut self, pkid: u16, pending: Pending) {
        self.next_order += 1;
        self.put_back(pkid, Some((self.next_order, pending)));
    }

    /// The next free packet id. There always is one: [`MAX_WINDOW`] and
    /// [`MAX_PENDING_FILTERS`] together are less than 65,535.
    fn next_pkid(&mut self) -> u16 {
        loop {
            self.last_pkid = self.last_pkid.checked_add(1).unwrap_or(1);
            if !self.pending.contains_key(&self.last_pkid) {
                return self.last_pkid;
            }
        }
    }
}

#[cfg(test)]
mod tests;
