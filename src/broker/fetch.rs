//! Fetches retained messages for new subscribers, where a SUBSCRIBE of the pool's own
//! cannot (MQTT 3.1.1).
//!
//! There a retained message does not say for whom it is, and a filter that is covered
//! by another is not subscribed at all. So one connection of its own, with a session
//! that is not kept, subscribes each new subscriber's filter for as long as it takes,
//! and hands what is retained to the new one alone. Its task owns the socket and the
//! [`queue`] of fetches.

mod queue;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::dial::{self, LinkError, Round, STALL, STEADY, Stream, stall_of};
use super::member::LinkState;
use super::wire::{Decoder, Inbound, InboundPublish, Retained};
use super::{Address, Delivery, Message, Options, QoS};
use crate::id::MessageIds;
use crate::metrics::BrokerMetrics;
use crate::numbers::jitter;
pub(super) use queue::Newcomer;
use queue::{QUIET, Queue, Step};

/// Subscribers that may wait for retained messages, and as many again on their way
/// here. More have to wait with their answer. Some 300 bytes each.
const MAX_NEWCOMERS: usize = 16_384;

/// Bytes encoded ahead of the socket.
const WRITE_AHEAD: usize = 64 * 1024;

/// How often the clock is looked at.
const TICK: Duration = Duration::from_millis(50);

/// Takes new subscribers. Cheap to clone.
#[derive(Clone)]
pub(super) struct Fetcher {
    newcomers: mpsc::Sender<Newcomer>,
    state: Arc<Mutex<LinkState>>,
    metrics: BrokerMetrics,
}

impl Fetcher {
    /// The handle and the task, which ends when `stop` is cancelled.
    pub(super) fn new(
        options: Arc<Options>,
        metrics: BrokerMetrics,
        stop: CancellationToken,
    ) -> std::io::Result<(Self, impl Future<Output = ()> + Send)> {
        let (sender, newcomers) = mpsc::channel(MAX_NEWCOMERS);
        let state = Arc::new(Mutex::new(LinkState::Connecting));
        let task = Task {
            client_id: format!("{}-retained", options.client_id),
            options,
            newcomers,
            queue: Queue::default(),
            ids: MessageIds::new()?,
            state: state.clone(),
            metrics: metrics.clone(),
            stop,
            answered: false,
        };
        let fetcher = Self {
            newcomers: sender,
            state,
            metrics,
        };
        Ok((fetcher, task.run()))
    }

    pub(super) fn state(&self) -> LinkState {
        let state = self.state.lock();
        state.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Hands over a new subscriber; false if there was no room for it within `limit`.
    pub(super) async fn fetch(&self, newcomer: Newcomer, limit: Duration) -> bool {
        let done = matches!(
            timeout(limit, self.newcomers.send(newcomer)).await,
            Ok(Ok(()))
        );
        if !done {
            self.metrics.retained_not_fetched.increment(1);
        }
        done
    }
}

struct Task {
    client_id: String,
    options: Arc<Options>,
    newcomers: mpsc::Receiver<Newcomer>,
    queue: Queue,
    ids: MessageIds,
    state: Arc<Mutex<LinkState>>,
    metrics: BrokerMetrics,
    stop: CancellationToken,
    /// Whether the broker has answered anything since the last CONNACK.
    answered: bool,
}

struct Connection {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    input: BytesMut,
    decoder: Decoder,
    output: BytesMut,
    /// Whether bytes may be held back by an encrypting stream.
    flush: bool,
    ticks: Interval,
    last_write: Instant,
    last_read: Instant,
    /// Since when the broker owes an answer to a ping.
    ping_sent: Option<Instant>,
    /// Since when the broker takes no bytes.
    write_blocked: Option<Instant>,
}

impl Task {
    async fn run(mut self) {
        let options = self.options.clone();
        let (shortest, longest) = options.reconnect;
        let mut pause = shortest;
        let mut round = Round::default();
        loop {
            let connected = Instant::now();
            let Some(address) = round.address(&options.addresses) else {
                return;
            };
            let Err(error) = self.serve(address).await else {
                return;
            };
            // One that has not even answered a ping fails by itself.
            if self.answered
                && error.is_the_brokers_will()
                && let Some(filter) = self.queue.hung_up()
            {
                self.metrics.retained_not_fetched.increment(1);
                tracing::warn!(%filter, "retained messages cannot be fetched: the broker hangs up upon it");
            }
            self.queue.reset();
            if error.is_a_rejection() {
                pause = longest;
            } else if connected.elapsed() > STEADY.min(longest) {
                pause = shortest;
            }
            let (was_up, reason) = (self.was_up(), format!("{}: {error}", address.url));
            let Some(reasons) = round.failed(reason, was_up, options.addresses.len()) else {
                continue;
            };
            if self.set_state(LinkState::Down(reasons.clone())) {
                let client_id = &*self.client_id;
                tracing::warn!(client_id, error = %reasons, "broker link for retained messages is down");
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(jitter(pause)) => {}
            }
            self.metrics.reconnects.increment(1);
            pause = (pause * 2).min(longest);
        }
    }

    fn was_up(&self) -> bool {
        let state = self.state.lock();
        state.unwrap_or_else(PoisonError::into_inner).is_up()
    }

    /// Sets the state and says whether it changed.
    fn set_state(&self, state: LinkState) -> bool {
        let mut shared = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = *shared != state;
        let up = if state.is_up() { 1.0 } else { 0.0 };
        self.metrics.link_up("retained".to_owned()).set(up);
        *shared = state;
        changed
    }

    async fn open(&self, address: &Address) -> Result<Connection, LinkError> {
        let (options, client_id) = (&*self.options, &*self.client_id);
        let mut stream = dial::connect(options, address).await?;
        let mut input = BytesMut::new();
        dial::handshake(options, address, client_id, true, &mut stream, &mut input).await?;
        let (reader, writer) = split(stream);
        let mut output = BytesMut::new();
        options.protocol.pingreq(&mut output);
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Connection {
            reader,
            writer,
            input,
            decoder: Decoder::new(options.protocol, options.max_packet_size),
            output,
            flush: false,
            ticks,
            last_write: Instant::now(),
            last_read: Instant::now(),
            ping_sent: None,
            write_blocked: None,
        })
    }

    /// One connection, from dialling to its end; `Ok` when the gateway stops.
    async fn serve(&mut self, address: &Address) -> Result<(), LinkError> {
        self.answered = false;
        let stop = self.stop.clone();
        let mut connection = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            opened = self.open(address) => opened?,
        };
        if self.set_state(LinkState::Up(address.url.clone())) {
            let (client_id, address) = (&*self.client_id, &*address.url);
            tracing::info!(
                client_id,
                address,
                "broker link for retained messages is up"
            );
        }
        loop {
            self.send(&mut connection);
            let Connection {
                reader,
                writer,
                input,
                output,
                flush,
                ticks,
                ..
            } = &mut connection;
            let has_room = self.queue.len() < MAX_NEWCOMERS;
            let has_output = *flush || !output.is_empty();
            // Each of these can be dropped half way. In no particular order: none is
            // ready for ever.
            tokio::select! {
                () = stop.cancelled() => break,
                Some(newcomer) = self.newcomers.recv(), if has_room => {
                    self.queue.push(newcomer, Instant::now());
                }
                read = reader.read_buf(input) => {
                    if read? == 0 {
                        return Err(LinkError::Closed);
                    }
                    self.receive(&mut connection)?;
                }
                written = write_some(writer, output, flush), if has_output => {
                    written?;
                    connection.wrote();
                }
                _ = ticks.tick() => self.look_at_the_clock(&mut connection)?,
            }
        }
        self.goodbye(connection).await
    }

    /// Encodes what is to be sent now.
    fn send(&mut self, connection: &mut Connection) {
        let (protocol, now) = (self.options.protocol, Instant::now());
        let output = &mut connection.output;
        while output.len() < WRITE_AHEAD
            && let Some(step) = self.queue.step(now)
        {
            match step {
                Step::Subscribe(pkid, filter, qos) => {
                    let filter = filter.as_str();
                    protocol.subscribe(pkid, filter, qos, None, Retained::Send, output);
                }
                Step::Unsubscribe(pkid, filter) => {
                    protocol.unsubscribe(pkid, filter.as_str(), output);
                }
            }
        }
        if !output.is_empty() {
            connection.write_blocked.get_or_insert(now);
        }
    }

    fn receive(&mut self, connection: &mut Connection) -> Result<(), LinkError> {
        self.answered = true;
        connection.ping_sent = None;
        connection.last_read = Instant::now();
        let protocol = self.options.protocol;
        let Connection {
            input,
            decoder,
            output,
            ..
        } = connection;
        // Nothing is lost by an early acknowledgement: the message stays retained.
        let acknowledge = |publish: &InboundPublish, output: &mut BytesMut| match publish.qos {
            QoS::AtMostOnce => {}
            QoS::AtLeastOnce => protocol.puback(publish.pkid, output),
            QoS::ExactlyOnce => protocol.pubrec(publish.pkid, output),
        };
        while let Some(packet) = decoder.next(input)? {
            let now = Instant::now();
            match packet {
                Inbound::TooLarge(publish) => {
                    acknowledge(&publish, output);
                    if publish.retain {
                        self.metrics.too_large.increment(1);
                        tracing::warn!(topic = ?publish.topic, "a retained message is too large");
                    }
                }
                Inbound::Publish(publish) => {
                    acknowledge(&publish, output);
                    // What is published now comes through the pool.
                    if publish.retain {
                        self.hand_out(publish, now);
                    }
                }
                Inbound::PubRel(pkid) => protocol.pubcomp(pkid, output),
                Inbound::SubAck(pkid, Ok(_)) if self.queue.subscribed(pkid, now) => {}
                Inbound::SubAck(pkid, Err(refusal)) => {
                    if let Some(filter) = self.queue.refused(pkid) {
                        self.metrics.retained_not_fetched.increment(1);
                        tracing::warn!(%filter, %refusal, "retained messages cannot be fetched");
                    }
                }
                Inbound::UnsubAck(pkid) if self.queue.unsubscribed(pkid, now) => {}
                Inbound::PkidInUse(pkid) if self.queue.in_use(pkid, now) => {}
                Inbound::PingResp => {}
                Inbound::Disconnect(notice) => return Err(LinkError::Ended(notice)),
                _ => return Err(LinkError::Unexpected("an answer to nothing")),
            }
        }
        Ok(())
    }

    fn hand_out(&mut self, publish: InboundPublish, now: Instant) {
        let Ok(topic) = String::from_utf8(publish.topic.to_vec()) else {
            self.metrics.dropped_bad_topic.increment(1);
            return;
        };
        let newcomers = self.queue.retained(&topic, now);
        if newcomers.is_empty() {
            return;
        }
        let qos = publish.qos;
        let message = Message::received(publish, topic, &self.ids, &self.options);
        for newcomer in newcomers {
            let subscriber = newcomer.member.subscriber(&newcomer.filter, newcomer.key);
            if let Some(recipient) = subscriber {
                let delivery = Delivery {
                    message: message.clone(),
                    qos: qos.min(recipient.qos),
                    _ack: None,
                };
                // Whoever has just ended needs it no more.
                let _ = recipient.subscriber.deliver(delivery);
            }
        }
    }

    /// Pings, and finds a broker that has gone silent.
    fn look_at_the_clock(&self, connection: &mut Connection) -> Result<(), LinkError> {
        let now = Instant::now();
        let stall = stall_of(&self.options);
        let stalled = |since: Option<Instant>| since.is_some_and(|at| now - at >= stall);
        if stalled(connection.write_blocked) {
            return Err(LinkError::WriteStalled(stall));
        }
        if stalled(connection.ping_sent) {
            return Err(LinkError::PingTimeout(stall));
        }
        if now
            .checked_sub(STALL)
            .is_some_and(|limit| self.queue.is_unanswered(limit))
        {
            return Err(LinkError::Unanswered);
        }
        let keep_alive = self.options.keep_alive;
        // A second early, so that the broker never sees it late.
        let is_due = |since: Instant| now - since + Duration::from_secs(1) >= keep_alive;
        // A broker that hangs may leave us writing for long, into buffers on the way: one
        // that says nothing is asked, whatever we wrote meanwhile.
        let silent = is_due(connection.last_read) && connection.ping_sent.is_none();
        if !keep_alive.is_zero() && (is_due(connection.last_write) || silent) {
            self.options.protocol.pingreq(&mut connection.output);
            connection.ping_sent.get_or_insert(now);
            connection.last_write = now;
        }
        Ok(())
    }

    async fn goodbye(&self, mut connection: Connection) -> Result<(), LinkError> {
        let mut output = BytesMut::new();
        self.options.protocol.disconnect(false, &mut output);
        // A link that breaks now takes nothing with it.
        let bye = async {
            connection.writer.write_all(&output).await?;
            connection.writer.shutdown().await
        };
        let _ = timeout(QUIET, bye).await;
        Ok(())
    }
}

/// Writes what the socket takes, then flushes. Cancel safe: `output` and `flush` say
/// what is left.
async fn write_some(
    writer: &mut WriteHalf<Box<dyn Stream>>,
    output: &mut BytesMut,
    flush: &mut bool,
) -> Result<(), LinkError> {
    if output.is_empty() {
        writer.flush().await?;
        *flush = false;
    } else {
        if writer.write_buf(output).await? == 0 {
            return Err(LinkError::Closed);
        }
        *flush = true;
    }
    Ok(())
}

impl Connection {
    fn wrote(&mut self) {
        self.last_write = Instant::now();
        self.write_blocked = (!self.output.is_empty()).then_some(self.last_write);
    }
}
