//! One MQTT session: packet ids, what awaits an acknowledgement, what is resent.
//!
//! No IO and no clock: packets go in, bytes to write are appended to a buffer. It
//! outlives the network connections that carry it (MQTT 5, 4.1 and 4.4).
//!
//! ```text
//! publish QoS 1:  Publish --PUBACK--> resolved
//! publish QoS 2:  Publish --PUBREC--> Release --PUBCOMP--> resolved
//! ```
//!
//! The other way is in [`inbox`]. [`trial`] finds the packet that breaks the link.

mod inbox;
mod trial;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::wire::{
    DisconnectNotice, Inbound, InboundPublish, OutboundPublish, Protocol, Retained, Welcome,
};
use super::{PublishError, QoS, Refusal};
use crate::numbers::NumberMap;

pub(super) use inbox::Receipt;
use inbox::{Arrival, Inbox, Reply};
use trial::{Suspect, Trial};

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

#[derive(Debug)]
enum Pending {
    Publish {
        publish: OutboundPublish,
        waiter: PublishWaiter,
    },
    /// PUBREC came, PUBREL is out.
    Release {
        waiter: PublishWaiter,
        /// Whether PUBREL was sent on an earlier connection, too.
        resent: bool,
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
    pending: NumberMap<u16, (u64, Pending)>,
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
    inbox: Inbox,
    /// SUBSCRIBEs and UNSUBSCRIBEs whose packet ids the broker would not have, since it
    /// answered one otherwise.
    renumbered: usize,
    trial: Trial,
    /// Of a connection over which nothing is sent but what is on trial.
    gate: Option<Welcome>,
}

impl Session {
    /// A session towards which the broker may have `receive_maximum` messages
    /// unacknowledged.
    pub(super) fn new(protocol: Protocol, receive_maximum: u16) -> Self {
        Self {
            protocol,
            connected: false,
            subscription_ids: true,
            window: 0,
            last_pkid: 0,
            next_order: 0,
            pending: NumberMap::default(),
            pending_bytes: 0,
            in_flight: 0,
            resend: VecDeque::new(),
            resend_dup: false,
            filters_pending: 0,
            restoring: 0,
            inbox: Inbox::new(protocol.broker_window(receive_maximum)),
            renumbered: 0,
            trial: Trial::default(),
            gate: None,
        }
    }

    /// The broker ended a working connection, perhaps upon a packet: when that is proven
    /// the packet fails, or it would break the link for ever. The filter, where it was one
    /// that was being restored.
    pub(super) fn hung_up(&mut self) -> Option<(Arc<str>, Refusal)> {
        let mut owed: Vec<_> = self.pending.values().collect();
        owed.sort_unstable_by_key(|(order, _)| *order);
        let owed = owed.into_iter().map(|(order, pending)| match pending {
            Pending::Subscribe(request) if request.waiter.is_none() => {
                Suspect::Restore(request.filter.clone())
            }
            _ => Suspect::Packet(*order),
        });
        let guilty = self.trial.hung_up(owed)?;
        let refusal = Refusal {
            denied: false,
            reason: "the broker ends the connection when it gets this".to_owned(),
        };
        let pkid = self.find(&guilty);
        match pkid.and_then(|pkid| self.take(pkid)).map(|(_, p)| p) {
            Some(Pending::Publish { waiter, .. } | Pending::Release { waiter, .. }) => {
                let _ = waiter.send(Err(PublishError::Refused(refusal)));
            }
            Some(Pending::Subscribe(request)) => {
                self.filters_pending -= 1;
                let Some(waiter) = request.waiter else {
                    self.restoring -= 1;
                    return Some((request.filter, refusal));
                };
                let _ = waiter.send(Err(refusal));
            }
            Some(Pending::Unsubscribe(_)) => self.filters_pending -= 1,
            None => {}
        }
        None
    }

    /// The packet id of a suspect that is pending.
    fn find(&self, suspect: &Suspect) -> Option<u16> {
        let is_it = |(order, pending): &(u64, Pending)| match (suspect, pending) {
            (Suspect::Packet(number), _) => order == number,
            (Suspect::Restore(filter), Pending::Subscribe(request)) => {
                request.waiter.is_none() && request.filter == *filter
            }
            (Suspect::Restore(_), _) => false,
        };
        let mut pending = self.pending.iter();
        pending.find_map(|(pkid, pending)| is_it(pending).then_some(*pkid))
    }

    /// The link broke. What is pending waits for [`Session::connected`].
    pub(super) fn disconnected(&mut self) {
        self.connected = false;
        self.gate = None;
        self.trial.interrupt();
    }

    /// A CONNACK came: sends again what is unacknowledged, in its order
    /// (MQTT 5, 4.4 and 4.6). Where a packet is on trial that comes later.
    pub(super) fn connected(&mut self, welcome: &Welcome, out: &mut BytesMut) {
        self.connected = true;
        self.subscription_ids = welcome.subscription_ids;
        self.window = usize::from(welcome.receive_maximum).min(MAX_WINDOW);
        self.in_flight = 0;
        self.resend.clear();
        self.resend_dup = welcome.session_present;
        self.inbox.connected(welcome.session_present);
        // Whoever gave up has taken it back; what was being restored is restored from the
        // table, which knows what is still wanted.
        let void = |(pkid, (_, pending)): (&u16, &(u64, Pending))| match pending {
            Pending::Subscribe(request) => {
                (request.is_abandoned() || request.waiter.is_none()).then_some(*pkid)
            }
            Pending::Unsubscribe(_) => (!welcome.session_present).then_some(*pkid),
            _ => None,
        };
        let void: Vec<u16> = self.pending.iter().filter_map(void).collect();
        for pkid in void {
            if let Some((_, Pending::Subscribe(request))) = self.take(pkid) {
                self.restoring -= usize::from(request.waiter.is_none());
            }
            self.filters_pending -= 1;
        }
        if self.trial.begin() {
            self.gate = Some(welcome.clone());
            self.protocol.pingreq(out);
        } else {
            self.resume(welcome, None, out);
        }
    }

    /// Sends again what is unacknowledged, but for a packet that was sent already.
    fn resume(&mut self, welcome: &Welcome, sent: Option<u16>, out: &mut BytesMut) {
        let pending = self.pending.iter();
        let mut order: Vec<_> = pending.map(|(pkid, (order, _))| (*order, *pkid)).collect();
        order.sort_unstable();
        for (_, pkid) in order {
            if sent != Some(pkid) {
                self.repeat(pkid, welcome, out);
            }
        }
        self.send_again(out);
    }

    /// Sends one packet again, or as soon as the window has room.
    fn repeat(&mut self, pkid: u16, welcome: &Welcome, out: &mut BytesMut) {
        let session_present = welcome.session_present;
        match self.pending.get_mut(&pkid) {
            Some((_, Pending::Publish { publish, .. })) => match welcome.check(publish) {
                Ok(()) => self.resend.push_back(pkid),
                // It may be another broker than the one that had it before.
                Err(error) => {
                    if let Some((_, Pending::Publish { waiter, .. })) = self.take(pkid) {
                        let _ = waiter.send(Err(error));
                    }
                }
            },
            Some((_, Pending::Release { resent, .. })) if session_present => {
                *resent = true;
                self.in_flight += 1;
                self.protocol.pubrel(pkid, out);
            }
            Some((_, Pending::Release { .. })) => {
                // The broker took it and lost it: nobody can say what became of it.
                if let Some((_, Pending::Release { waiter, .. })) = self.take(pkid) {
                    let _ = waiter.send(Err(PublishError::SessionLost));
                }
            }
            Some((_, Pending::Subscribe(request))) => {
                // It may be another broker than the one that was asked.
                if let Some(refusal) = welcome.refuses(&request.filter) {
                    self.on_suback(pkid, Err(refusal));
                    return;
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
            Some((_, Pending::Unsubscribe(filter))) => {
                self.protocol.unsubscribe(pkid, filter, out);
            }
            None => {}
        }
    }

    /// The broker lives: what is on trial is sent alone. A filter that is restored comes
    /// from the table, see [`Session::restores_alone`].
    fn try_suspect(&mut self, out: &mut BytesMut) {
        let (Some(suspect), Some(welcome)) = (self.trial.ready(), self.gate.clone()) else {
            return;
        };
        if matches!(suspect, Suspect::Restore(_)) {
            return;
        }
        match self.find(suspect) {
            Some(pkid) => {
                self.trial.sent(pkid);
                self.repeat(pkid, &welcome, out);
                self.send_again(out);
                self.end_trial(out);
            }
            None => self.acquit(out),
        }
    }

    /// The filter that is to be restored before anything else is sent, while it is on
    /// trial. `Some(None)` where there is nothing to be sent at the time.
    pub(super) fn restores_alone(&self) -> Option<Option<&Arc<str>>> {
        self.gate.as_ref()?;
        let suspect = self.trial.ready();
        Some(suspect.and_then(|suspect| match suspect {
            Suspect::Restore(filter) => Some(filter),
            Suspect::Packet(_) => None,
        }))
    }

    /// Restores the filter on trial. Only upon [`Session::restores_alone`].
    pub(super) fn restore_alone(&mut self, request: SubscribeRequest, out: &mut BytesMut) {
        self.subscribe(request, out);
        self.trial.sent(self.last_pkid);
    }

    /// What is on trial was answered, or is not wanted any more: sends everything else.
    pub(super) fn acquit(&mut self, out: &mut BytesMut) {
        let sent = self.trial.on_trial();
        self.trial.acquit();
        if let Some(welcome) = self.gate.take() {
            self.resume(&welcome, sent, out);
        }
    }

    /// Ends the trial if what is on trial is answered.
    fn end_trial(&mut self, out: &mut BytesMut) {
        let on_trial = self.trial.on_trial();
        if on_trial.is_some_and(|pkid| !self.pending.contains_key(&pkid)) {
            self.acquit(out);
        }
    }

    /// Whether [`Session::tick`] is to be called: something awaits an answer that may not come.
    pub(super) fn is_watching(&self) -> bool {
        self.trial.on_trial().is_some() || self.inbox.is_watching()
    }

    /// To be called every second or so while there is a link and
    /// [`Session::is_watching`]; true if there is anything to
    /// be sent now.
    pub(super) fn tick(&mut self, out: &mut BytesMut) -> bool {
        let before = out.len();
        let over = self.trial.tick();
        if over {
            self.acquit(out);
        }
        self.inbox.look_for_a_stall();
        self.acknowledge_overdue(out);
        over || out.len() > before
    }

    /// Sends what waits in `resend` as far as the window allows. The duplicate flag
    /// marks them where the broker may have seen them (MQTT 5, 3.3.1.1).
    fn send_again(&mut self, out: &mut BytesMut) {
        while self.in_flight < self.window {
            let Some(pkid) = self.resend.pop_front() else {
                return;
            };
            if let Some((_, Pending::Publish { publish, .. })) = self.pending.get(&pkid) {
                publish.encode(pkid, self.resend_dup, out);
                self.in_flight += 1;
            }
        }
    }

    /// Whether a publish of QoS 1 or 2 may be sent now.
    pub(super) fn can_publish(&self) -> bool {
        let free = self.connected && self.gate.is_none();
        free && self.resend.is_empty() && self.in_flight < self.window
    }

    /// Sends a publish of QoS 1 or 2. Only after [`Session::can_publish`].
    pub(super) fn publish(
        &mut self,
        publish: OutboundPublish,
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
        self.connected && self.gate.is_none() && self.filters_pending < MAX_PENDING_FILTERS
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
        self.restoring > 0 || self.gate.is_some()
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
        let reply = self.inbox.taken(receipt, self.connected);
        self.reply(reply, out);
    }

    fn reply(&self, reply: Option<Reply>, out: &mut BytesMut) {
        match reply {
            Some(Reply::PubAck(pkid)) => self.protocol.puback(pkid, out),
            Some(Reply::PubRec(pkid)) => self.protocol.pubrec(pkid, out),
            None => {}
        }
    }

    fn acknowledge_overdue(&mut self, out: &mut BytesMut) {
        while let Some(reply) = self.inbox.overdue() {
            self.reply(Some(reply), out);
        }
    }

    /// Digests a packet.
    pub(super) fn receive(&mut self, packet: Inbound, out: &mut BytesMut) -> Event {
        let event = self.digest(packet, out);
        self.end_trial(out);
        event
    }

    fn digest(&mut self, packet: Inbound, out: &mut BytesMut) -> Event {
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
                        let resent = false;
                        self.put_back(pkid, Some((order, Pending::Release { waiter, resent })));
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
                self.inbox.forget(pkid);
                self.protocol.pubcomp(pkid, out);
                Event::None
            }
            // Also the answer to a PUBREL that was sent twice, for a PUBREC that came twice.
            Inbound::PubComp(pkid, _) | Inbound::PubCompUnknown(pkid)
                if !self.pending.contains_key(&pkid) =>
            {
                Event::None
            }
            Inbound::PubComp(pkid, result) => self.on_acknowledged(pkid, result, out),
            Inbound::PubCompUnknown(pkid) => {
                // Known to be complete already: no error when a session is recovered
                // (MQTT 5, 4.3.3 and 3.7.2.1).
                let completed = matches!(
                    self.pending.get(&pkid),
                    Some((_, Pending::Release { resent: true, .. }))
                );
                let denied = false;
                let reason = "packet identifier not found".to_owned();
                let refusal = Refusal { denied, reason };
                let result = if completed { Ok(()) } else { Err(refusal) };
                self.on_acknowledged(pkid, result, out)
            }
            Inbound::SubAck(pkid, result) => {
                self.renumbered = 0;
                self.on_suback(pkid, result)
            }
            Inbound::UnsubAck(pkid) => {
                self.renumbered = 0;
                self.on_unsuback(pkid)
            }
            Inbound::PkidInUse(pkid) => self.on_pkid_in_use(pkid),
            Inbound::PingResp => {
                self.trial.ping_answered();
                self.try_suspect(out);
                Event::None
            }
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
        match self.inbox.receive(&publish) {
            Arrival::Known(reply) => {
                self.reply(reply, out);
                Event::None
            }
            Arrival::New(receipt) => {
                self.acknowledge_overdue(out);
                Event::Deliver(publish, Some(receipt))
            }
        }
    }

    /// How many messages were acknowledged before they were taken, since the last
    /// call.
    pub(super) fn take_acknowledged_early(&mut self) -> u64 {
        self.inbox.take_early()
    }

    fn on_acknowledged(
        &mut self,
        pkid: u16,
        result: Result<(), Refusal>,
        out: &mut BytesMut,
    ) -> Event {
        match self.take(pkid) {
            Some((_, Pending::Publish { waiter, .. } | Pending::Release { waiter, .. })) => {
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
