//! The task that keeps one pool member connected.
//!
//! Owns the socket, the session and nothing else. One poll does, in this order:
//! take work from the member, write, read and hand out, look at the clock. Work
//! comes first so that everything that waits goes into one write; the clock comes
//! last so that a packet that has arrived counts before a time-out.

mod clock;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use metrics::Gauge;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

use self::clock::{Clock, Intervals};
use super::dial::{self, LinkError, Round, STEADY, Stream, stall_of};
use super::member::{AckOnDrop, LinkState, Member, WriteWaiters};
use super::session::{Event, Receipt, Session};
use super::wire::{Decoder, InboundPublish, Protocol};
use super::{Address, Delivery, Message, Options, PublishError, now_ms};
use crate::id::{MessageId, MessageIds};
use crate::numbers::jitter;
use crate::telemetry::Seldom;
use crate::trace::{self, Traceparent};

/// Bytes read from the broker at once.
const READ_CHUNK: usize = 64 * 1024;

/// The same for a device's own connection, of which there are thousands.
const OWN_READ_CHUNK: usize = 1024;

/// Keeps the member connected until it is closed and drained.
pub(super) async fn run(member: Arc<Member>) {
    let options = member.options();
    let mut session = Session::new(options.protocol, options.receive_maximum);
    let mut place = Place::default();
    let (shortest, longest) = options.reconnect;
    let mut pause = shortest;
    let mut round = Round::default();
    let up = member.metrics().link_up(member.number().to_string());
    up.set(0.0);
    loop {
        let connected = Instant::now();
        let Some(address) = round.address(&options.addresses) else {
            return;
        };
        let served = serve(&member, address, &mut session, &mut place, &up).await;
        up.set(0.0);
        let mut error = match served {
            Ok(()) => return,
            Err(error) => error,
        };
        let was_up = member.state().is_up();
        // Also before everything was restored: what is unacknowledged is sent again first.
        if place.welcomed
            && error.is_the_brokers_will()
            && let Some((filter, refusal)) = session.hung_up()
        {
            member.is_unwelcome(filter, &refusal);
        }
        session.disconnected();
        // The session there is another's now: its subscriptions are not ours.
        if matches!(error, LinkError::TakenOver(_)) {
            place.url = None;
        }
        if was_up {
            let soon = connected.elapsed() < SOON.max(2 * longest);
            let again = soon && error.is_without_a_word();
            place.hang_ups = if again { place.hang_ups + 1 } else { 0 };
            if place.hang_ups >= CONTESTED {
                error = LinkError::Contested(member.client_id().to_owned());
            }
            member.metrics().links_up.decrement(1.0);
        }
        let lived = connected.elapsed();
        if lived > YIELD {
            place.yielded = 0;
        }
        if error.is_anothers() {
            pause = longest.saturating_mul(1 << place.yielded);
            let most = match error {
                LinkError::Contested(_) => YIELD_TO_NOBODY,
                _ => YIELD,
            };
            pause = pause.min(most.max(longest));
            place.yielded = (place.yielded + 1).min(16);
        } else if error.is_a_rejection() {
            pause = longest;
        } else if lived > STEADY.min(longest) {
            pause = shortest;
        }
        let reason = format!("{}: {error}", address.url);
        let Some(reasons) = round.failed(reason, was_up, options.addresses.len()) else {
            if !matches!(member.state(), LinkState::Down(_)) {
                let (client_id, address) = (member.client_id(), &*address.url);
                tracing::warn!(client_id, address, %error, "no broker here; trying the next address");
            }
            continue;
        };
        if member.set_state(LinkState::Down(reasons.clone())) {
            tracing::warn!(client_id = member.client_id(), error = %reasons, "broker link is down");
        }
        if member.is_closing() && session.is_idle() && member.waiting() == 0 {
            return;
        }
        tokio::time::sleep(jitter(pause)).await;
        member.metrics().reconnects.increment(1);
        // It may have been a longer one, after which it begins anew.
        pause = match pause {
            pause if pause > longest => shortest,
            pause => (pause * 2).min(longest),
        };
    }
}

/// Not every broker says that another client has taken the session (Mosquitto 2.0
/// does not): so many links in a row that it closed soon after they were up look
/// like it. More than it takes to find a single packet guilty.
pub(super) const CONTESTED: u32 = 4;

/// Longest pause before a session that another gateway has taken is taken back. It
/// doubles each time until then, from `reconnect_max` on: of two with one identity each
/// that comes back ends the other's work. Whose link lives for longer begins anew.
const YIELD: Duration = Duration::from_secs(60);

/// The same where no broker has said so: it may as well be the network that closes each
/// link soon after it is up, and then nobody is served by a long pause.
const YIELD_TO_NOBODY: Duration = Duration::from_secs(10);

/// A link that has lived for longer was not contested.
pub(super) const SOON: Duration = Duration::from_secs(2);

/// A broker that still has a session after it was ended so often in a row has some
/// other reason to say so.
const MAX_WIPES: u32 = 3;

/// Where the session is.
#[derive(Default)]
pub(super) struct Place {
    /// The address it was last continued at. `None` asks for a clean start: at the
    /// gateway's own, and when somebody else has taken it over. Else the broker keeps
    /// our session.
    url: Option<Arc<str>>,
    /// Whether the broker took the last connection.
    pub(super) welcomed: bool,
    /// How often in a row that happened soon after the link was up, the broker being
    /// there all the time and knowing the session.
    hang_ups: u32,
    /// How often another gateway has taken the session lately.
    yielded: u32,
    /// How often in a row the broker still had the session that had just been ended
    /// (Moquette, which closes the connection first). With the next broken link it would
    /// be gone, and what waited in it.
    wiped_in_vain: u32,
}

/// One connection, from dialling to its end. `Ok` when the member is drained.
pub(super) async fn serve(
    member: &Arc<Member>,
    address: &Address,
    session: &mut Session,
    place: &mut Place,
    up: &Gauge,
) -> Result<(), LinkError> {
    place.welcomed = false;
    let (options, client_id) = (member.options(), member.client_id());
    // With MQTT 3.1.1 only a CONNECT that is not clean begins a session that is kept, and
    // Mosquitto (2.0.11) saves no other to disk with MQTT 5 either.
    let kept = !options.session_expiry.is_zero();
    // A device's own session begins with the one CONNECT: thousands begin, and what is at
    // stake for each is little.
    let begins = place.url.is_none();
    let wiped = kept && begins && !options.own;
    if wiped {
        dial::wipe(options, address, client_id).await?;
    }
    let clean = !kept || (options.own && begins);
    let connected = dial::connect(options, address).await;
    let mut stream = connected.inspect_err(|_| place.hang_ups = 0)?;
    let mut input = BytesMut::new();
    let shake = dial::handshake(options, address, client_id, clean, &mut stream, &mut input);
    let welcome = shake.await?;
    if wiped && welcome.session_present && place.wiped_in_vain < MAX_WIPES {
        place.wiped_in_vain += 1;
        return Err(LinkError::NotWiped);
    }
    place.wiped_in_vain = 0;
    if options.protocol == Protocol::V5 && !welcome.subscription_ids && !options.own {
        // The topic decides then, which is exact where the broker sends one copy.
        tracing::warn!(
            address = &*address.url,
            "the broker offers no subscription identifiers (MQTT 5, 3.2.2.3.12): a message on \
             filters that overlap may come more than once; broker.protocol = 4 is exact"
        );
    }
    if !welcome.session_present {
        place.hang_ups = 0;
    }
    place.url = Some(address.url.clone());
    place.welcomed = true;
    let keep_alive = welcome.keep_alive.map_or(options.keep_alive, |seconds| {
        Duration::from_secs(seconds.into())
    });
    let mut output = BytesMut::new();
    // What was taken meanwhile is acknowledged when the broker sends it again.
    member.settle(session, &mut output);
    session.connected(&welcome, &mut output);
    member.welcomed(&welcome);
    let now = Instant::now();
    let intervals = Intervals {
        keep_alive,
        patience: options.keep_alive,
        stall: stall_of(options),
    };
    let mut clock = Clock::new(intervals, now);
    clock.retry_at = member.retry_at();
    let mut link = Link {
        member,
        address,
        session,
        stream,
        input,
        decoder: Decoder::new(options.protocol, options.max_packet_size),
        output,
        position: 0,
        flush: true,
        written: WriteWaiters::new(),
        ids: MessageIds::new()?,
        timer: Box::pin(sleep_until(clock.next())),
        clock,
        announced: false,
        up,
        complaints: Seldom::default(),
    };
    let ended = poll_fn(|cx| link.poll(cx)).await;
    for (_, waiter) in link.written.drain(..) {
        let _ = waiter.send(Err(PublishError::LinkLost));
    }
    ended?;
    // Everything is confirmed; a link that breaks now takes nothing with it.
    if let Err(error) = link.goodbye().await {
        tracing::debug!(%error, "the broker did not hear our goodbye");
    }
    Ok(())
}

struct Link<'a> {
    member: &'a Arc<Member>,
    address: &'a Address,
    session: &'a mut Session,
    stream: Box<dyn Stream>,
    input: BytesMut,
    decoder: Decoder,
    output: BytesMut,
    /// How many bytes of this connection were written before `output`.
    position: u64,
    /// Whether bytes may be held back by an encrypting stream.
    flush: bool,
    written: WriteWaiters,
    ids: MessageIds,
    clock: Clock,
    /// Never later than what the clock says is next.
    timer: Pin<Box<Sleep>>,
    announced: bool,
    up: &'a Gauge,
    /// For lines about messages, which anybody may publish.
    complaints: Seldom,
}

impl Link<'_> {
    /// Ready when the link ended, `Ok` when that was asked for and all is done.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        loop {
            let drained = self.member.pull(
                cx,
                self.session,
                &mut self.output,
                self.position,
                &mut self.written,
            );
            // What is written makes room for more, what is read may ask for an answer.
            let progress = self.poll_write(cx)? | self.poll_read(cx)?;
            if !self.announced && !self.session.restoring() && !self.member.restoring() {
                self.announce();
            }
            if drained && self.output.is_empty() && !self.flush && self.session.is_idle() {
                return Poll::Ready(Ok(()));
            }
            if !progress {
                return self.poll_clock(cx);
            }
        }
    }

    fn announce(&mut self) {
        self.announced = true;
        self.up.set(1.0);
        if self
            .member
            .set_state(LinkState::Up(self.address.url.clone()))
        {
            self.member.metrics().links_up.increment(1.0);
            let (client_id, address) = (self.member.client_id(), &*self.address.url);
            let filters = self.member.filters();
            if self.member.options().own {
                tracing::debug!(client_id, address, filters, "a device's broker link is up");
            } else {
                tracing::info!(client_id, address, filters, "broker link is up");
            }
        }
    }

    /// Writes what can be written; true if anything was.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool, LinkError> {
        let mut progress = false;
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.output) {
                Poll::Ready(Ok(0)) => return Err(LinkError::Closed),
                Poll::Ready(Ok(written)) => {
                    self.output.advance(written);
                    self.position += written as u64;
                    self.flush = true;
                    progress = true;
                }
                Poll::Ready(Err(error)) => return Err(error.into()),
                Poll::Pending => break,
            }
        }
        if self.output.is_empty() && self.flush {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => return Ok(progress),
            }
            self.flush = false;
        }
        if progress {
            self.clock.wrote(Instant::now());
        }
        self.clock.blocked(!self.output.is_empty(), Instant::now);
        // Bytes that an encrypting stream may still hold do not count as written.
        if !self.flush {
            while let Some((end, _)) = self.written.front()
                && *end <= self.position
            {
                if let Some((_, waiter)) = self.written.pop_front() {
                    let _ = waiter.send(Ok(()));
                }
            }
        }
        Ok(progress)
    }

    /// Reads once and digests the packets that are whole; true if bytes came.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Result<bool, LinkError> {
        let own = self.member.options().own;
        self.input.reserve(match own {
            true => OWN_READ_CHUNK,
            false => READ_CHUNK,
        });
        match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input) {
            Poll::Pending => {
                // One that is idle holds no memory for what once went through it.
                if own && self.input.is_empty() {
                    self.input = BytesMut::new();
                }
                if own && self.output.is_empty() {
                    self.output = BytesMut::new();
                }
                return Ok(false);
            }
            Poll::Ready(Ok(0)) => return Err(LinkError::Closed),
            Poll::Ready(result) => result?,
        };
        self.clock.read(Instant::now());
        while let Some(packet) = self.decoder.next(&mut self.input)? {
            match self.session.receive(packet, &mut self.output) {
                Event::None => {}
                Event::Deliver(publish, receipt) => {
                    let (member, complaints) = (self.member, &self.complaints);
                    hand_out(member, &self.ids, complaints, publish, receipt);
                }
                Event::Subscribed(filter, id) => self.member.subscribed(&filter, id),
                Event::SubscribeAgain(request) => self.member.subscribe_again(request),
                Event::UnsubscribeAgain(filter) => self.member.unsubscribe_again(filter),
                Event::TooLarge(topic) => {
                    self.member.metrics().too_large.increment(1);
                    if let Some(left_out) = self.complaints.tell(Instant::now().into_std()) {
                        tracing::warn!(
                            ?topic,
                            left_out,
                            "a message larger than broker.max_packet_size is dropped"
                        );
                    }
                }
                Event::NotRestored(filter, refusal) => {
                    self.member.not_restored(&filter, &refusal);
                    self.clock.retry_at = self.member.retry_at();
                }
                Event::Ended(notice) if notice.taken_over => {
                    return Err(LinkError::TakenOver(self.member.client_id().to_owned()));
                }
                Event::Ended(notice) => return Err(LinkError::Ended(notice)),
                Event::Unexpected(packet) => return Err(LinkError::Unexpected(packet)),
            }
        }
        let early = self.session.take_acknowledged_early();
        self.member.metrics().acknowledged_early.increment(early);
        Ok(true)
    }

    /// Pings, and finds a broker that has gone silent.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        loop {
            if self.session.is_watching() {
                self.clock.watch(Instant::now);
            }
            // Put off when it has rung, and not with each packet.
            let next = self.clock.next();
            if next < self.timer.deadline() {
                self.timer.as_mut().reset(next);
            }
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.clock.retries(now) {
                self.member.retry(now);
                self.clock.retry_at = self.member.retry_at();
            }
            if self.clock.looks(now) && self.session.tick(&mut self.output) {
                // What it allows is pulled, and written, in a poll of its own.
                cx.waker().wake_by_ref();
            }
            self.clock.check(now)?;
            if self.clock.pings(now) {
                self.member.options().protocol.pingreq(&mut self.output);
                // The write happens in a poll of its own.
                cx.waker().wake_by_ref();
            }
            self.timer.as_mut().reset(self.clock.next());
        }
    }

    /// Ends the session at the broker: nothing of it is needed any more.
    async fn goodbye(&mut self) -> Result<(), LinkError> {
        let options = self.member.options();
        let with_will = self.member.leaves_with_will();
        options.protocol.disconnect(with_will, &mut self.output);
        self.stream.write_all(&self.output).await?;
        self.stream.shutdown().await?;
        if options.protocol == Protocol::V4 && !options.session_expiry.is_zero() {
            dial::wipe(options, self.address, self.member.client_id()).await?;
        }
        Ok(())
    }
}

/// Gives a message to everyone it is for. It is acknowledged when the last of
/// them lets go of it: at once if it is for nobody.
pub(super) fn hand_out(
    member: &Arc<Member>,
    ids: &MessageIds,
    complaints: &Seldom,
    publish: InboundPublish,
    receipt: Option<Receipt>,
) {
    let metrics = member.metrics();
    metrics.received.increment(1);
    let ack = receipt.map(|receipt| AckOnDrop::new(member, receipt));
    let options = member.options();
    if options.protocol == Protocol::V4 && publish.retain {
        // Upon a SUBSCRIBE of the pool's own; who is to have it gets it fetched.
        return;
    }
    let Ok(topic) = String::from_utf8(publish.topic.to_vec()) else {
        metrics.dropped_bad_topic.increment(1);
        if let Some(left_out) = complaints.tell(Instant::now().into_std()) {
            tracing::warn!(left_out, "a message whose topic is not UTF-8 is dropped");
        }
        return;
    };
    let audience = member.audience(&publish, &topic);
    if audience.is_empty() {
        metrics.unclaimed.increment(1);
        return;
    }
    let published = publish.qos;
    let message = Message::received(publish, topic, ids, options);
    for recipient in audience {
        let delivery = |qos| Delivery {
            message: message.clone(),
            qos: published.min(qos),
            _ack: ack.clone(),
        };
        // Given back by one that has just ended: in a shared subscription it is the
        // next one's turn, else nobody's.
        let mut given_back = recipient
            .subscriber
            .deliver(delivery(recipient.qos))
            .is_err();
        for (subscriber, qos) in recipient.others {
            if !given_back {
                break;
            }
            given_back = subscriber.deliver(delivery(qos)).is_err();
        }
        metrics.dropped_closed.increment(u64::from(given_back));
    }
}

impl Message {
    /// What the handlers get to see of a publish.
    pub(super) fn received(
        publish: InboundPublish,
        topic: String,
        ids: &MessageIds,
        options: &Options,
    ) -> Arc<Self> {
        let properties = &publish.user_properties;
        let property = |name: &Option<String>| properties.get(name.as_ref()?);
        Arc::new(Self {
            id: property(&options.id_property)
                .and_then(MessageId::parse)
                .unwrap_or_else(|| ids.next_id()),
            from: property(&options.from_property)
                .unwrap_or_default()
                .to_owned(),
            timestamp: property(&options.timestamp_property)
                .and_then(|text| text.parse().ok())
                .unwrap_or_else(now_ms),
            trace: match options.trace {
                true => properties.get(trace::KEY).map(str::as_bytes),
                false => None,
            }
            .and_then(Traceparent::parse),
            topic,
            payload: unpin(publish.payload),
        })
    }
}

/// A small payload is copied out of the read buffer, so that a message that waits
/// for its handler does not keep 64 KiB alive.
fn unpin(payload: Bytes) -> Bytes {
    if payload.len() < READ_CHUNK / 8 {
        Bytes::copy_from_slice(&payload)
    } else {
        payload
    }
}
