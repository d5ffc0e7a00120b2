//! The task that keeps one pool member connected.
//!
//! Owns the socket, the session and nothing else. One poll does, in this order:
//! take work from the member, write, read and hand out, look at the clock. Work
//! comes first so that everything that waits goes into one write; the clock comes
//! last so that a packet that has arrived counts before a time-out.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};
use tokio_util::io::poll_read_buf;

use super::member::{AckOnDrop, LinkState, Member, WriteWaiters};
use super::session::{Event, Receipt, Session};
use super::wire::{self, Hello, Inbound, InboundPublish, Welcome};
use super::{Address, Delivery, Message, Options, PublishError, now_ms};
use crate::id::MessageIds;

/// Bytes read from the broker at once.
const READ_CHUNK: usize = 64 * 1024;

/// A broker that takes none of our bytes, or answers no ping, for this long is
/// gone; with a shorter keep-alive, for as long as that. Also set as
/// `TCP_USER_TIMEOUT`, which finds a silent network.
const STALL: Duration = Duration::from_secs(10);

/// See [`STALL`]. Who asks for a short keep-alive wants to know soon.
fn stall_of(options: &Options) -> Duration {
    STALL.min(options.keep_alive)
}

/// Bytes the kernel takes ahead of the network (`TCP_NOTSENT_LOWAT`). On a slow link
/// it would take megabytes, behind which a ping waits until the broker seems dead.
/// What it does not take waits in the outbox, where it can be withdrawn.
const UNSENT: u32 = 256 * 1024;

/// How often the clock is looked at.
const TICK: Duration = Duration::from_secs(1);

/// Anything MQTT can run over.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no connection within {0:?}")]
    ConnectTimeout(Duration),
    #[error("no CONNACK within {0:?}")]
    HandshakeTimeout(Duration),
    #[error("{0}")]
    Wire(#[from] wire::WireError),
    #[error("the TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("the broker hung up before its CONNACK: does it want {0} here?")]
    NoWelcome(&'static str),
    #[error("the broker refused the connection: {0}")]
    Refused(super::Refusal),
    #[error("the broker closed the connection")]
    Closed,
    #[error("the broker ended the connection: {0}")]
    Ended(String),
    #[error(
        "another client connected as {0}: does a second gateway run with the same node_name and client_id_prefix?"
    )]
    TakenOver(String),
    #[error(
        "the broker took {0} and soon closed the connection, several times in a row: does a second gateway run with the same node_name and client_id_prefix?"
    )]
    Contested(String),
    #[error("the broker sent {0} out of place")]
    Unexpected(&'static str),
    #[error("the broker took no bytes for {0:?}")]
    WriteStalled(Duration),
    #[error("the broker answered no ping for {0:?}")]
    PingTimeout(Duration),
}

impl LinkError {
    /// The likely reason for a broker to hang up upon a CONNECT.
    fn no_welcome(address: &Address) -> Self {
        Self::NoWelcome(match address.tls {
            None => "TLS (mqtts://)",
            Some(_) => "a client certificate",
        })
    }

    /// Whether the broker hung up of its own accord, as it does upon a packet that
    /// it will not have.
    fn is_the_brokers_will(&self) -> bool {
        self.is_without_a_word() || matches!(self, Self::Ended(_))
    }

    /// Whether the connection was closed or reset, for whatever reason.
    fn is_without_a_word(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => error.kind() == io::ErrorKind::ConnectionReset,
            _ => false,
        }
    }
}

/// Keeps the member connected until it is closed and drained.
pub(super) async fn run(member: Arc<Member>) {
    let mut session = Session::new(member.options().receive_maximum);
    let mut place = Place::default();
    let (shortest, longest) = member.options().reconnect;
    let mut pause = shortest;
    let mut round = Round::default();
    loop {
        let connected = Instant::now();
        let Some(address) = round.address(&member.options().addresses) else {
            return;
        };
        let mut error = match serve(&member, address, &mut session, &mut place).await {
            Ok(()) => return,
            Err(error) => error,
        };
        let was_up = member.state().is_up();
        // Also before everything was restored: what is unacknowledged is sent again first.
        if place.welcomed && error.is_the_brokers_will() {
            session.hung_up();
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
        let rejected = matches!(
            error,
            LinkError::TakenOver(_) | LinkError::Contested(_) | LinkError::Refused(_)
        );
        if !rejected && connected.elapsed() > STEADY.min(longest) {
            pause = shortest;
        } else if rejected {
            pause = longest;
        }
        let reason = format!("{}: {error}", address.url);
        let Some(reasons) = round.failed(reason, was_up, member.options().addresses.len()) else {
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
        pause = (pause * 2).min(longest);
    }
}

/// Not every broker says that another client has taken the session (Mosquitto 2.0
/// does not): so many links in a row that it closed soon after they were up look
/// like it. More than it takes to find a single packet guilty.
const CONTESTED: u32 = 4;

/// A link that has lived for longer was not contested.
const SOON: Duration = Duration::from_secs(2);

/// After a link that lived for so long the pauses begin anew: a broker that takes us
/// and hangs up at once is not worth more than an attempt a second.
const STEADY: Duration = Duration::from_secs(1);

/// Where the session is.
#[derive(Default)]
struct Place {
    /// The address it was last continued at. `None` asks for a clean start: at the
    /// gateway's own, and when somebody else has taken it over. Else the broker keeps
    /// our session.
    url: Option<Arc<str>>,
    /// Whether the broker took the last connection.
    welcomed: bool,
    /// How often in a row that happened soon after the link was up, the broker being
    /// there all the time and knowing the session.
    hang_ups: u32,
}

/// Goes through the addresses: a pause comes after all of them have failed.
#[derive(Default)]
struct Round {
    next: usize,
    /// One for each address that failed in this round.
    reasons: Vec<String>,
}

impl Round {
    fn address<'a>(&self, addresses: &'a [Address]) -> Option<&'a Address> {
        addresses.get(self.next)
    }

    /// The address failed; what is wrong with all when that was the last. A link
    /// that was up ends the round too, and the next one begins with its address.
    fn failed(&mut self, reason: String, was_up: bool, addresses: usize) -> Option<String> {
        if was_up {
            self.reasons.clear();
            return Some(reason);
        }
        self.next = (self.next + 1) % addresses.max(1);
        self.reasons.push(reason);
        (self.reasons.len() >= addresses).then(|| std::mem::take(&mut self.reasons).join("; "))
    }
}

/// Between half of `pause` and all of it, so that the members, and the gateways
/// after a broker's restart, do not come back in step.
fn jitter(pause: Duration) -> Duration {
    let mut random = [0; 2];
    // Without randomness the pause is merely the same for all.
    let _ = getrandom::fill(&mut random);
    pause.mul_f64(0.5 + f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX) / 2.0)
}

async fn connect(address: &Address, options: &Options) -> Result<Box<dyn Stream>, LinkError> {
    let limit = options.connect_timeout;
    let stall = stall_of(options);
    let dial = async {
        let tcp = TcpStream::connect((address.host.as_str(), address.port)).await?;
        tcp.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&tcp);
        socket.set_tcp_user_timeout(Some(stall))?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
        let Some(tls) = &address.tls else {
            return Ok::<Box<dyn Stream>, LinkError>(Box::new(tcp));
        };
        let name = tokio_rustls::rustls::pki_types::ServerName::try_from(address.host.clone())
            .map_err(io::Error::other)?;
        let connector = tokio_rustls::TlsConnector::from(tls.clone());
        let encrypted = connector.connect(name, tcp).await;
        Ok(Box::new(encrypted.map_err(LinkError::Tls)?) as Box<dyn Stream>)
    };
    timeout(limit, dial)
        .await
        .map_err(|_| LinkError::ConnectTimeout(limit))?
}

async fn handshake(
    member: &Member,
    stream: &mut Box<dyn Stream>,
    clean_start: bool,
    input: &mut BytesMut,
) -> Result<Welcome, LinkError> {
    let options = member.options();
    let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
    let mut out = BytesMut::new();
    wire::connect(
        &Hello {
            client_id: member.client_id(),
            login: options
                .login
                .as_ref()
                .map(|login| (login.username.as_str(), login.password.as_str())),
            keep_alive: u16::try_from(options.keep_alive.as_secs()).unwrap_or(u16::MAX),
            clean_start,
            session_expiry: seconds(options.session_expiry),
            receive_maximum: options.receive_maximum,
            max_packet_size: options.max_packet_size,
        },
        &mut out,
    );
    stream.write_all(&out).await?;
    stream.flush().await?;
    loop {
        if let Some(packet) = wire::decode(input, options.max_packet_size)? {
            return match packet {
                Inbound::ConnAck(answer) => answer.map_err(LinkError::Refused),
                Inbound::Disconnect(notice) => Err(LinkError::Ended(notice.reason)),
                _ => Err(LinkError::Unexpected("a packet before its CONNACK")),
            };
        }
        if stream.read_buf(input).await? == 0 {
            return Err(LinkError::Closed);
        }
    }
}

/// One connection, from dialling to its end. `Ok` when the member is drained.
async fn serve(
    member: &Arc<Member>,
    address: &Address,
    session: &mut Session,
    place: &mut Place,
) -> Result<(), LinkError> {
    place.welcomed = false;
    let limit = member.options().connect_timeout;
    let connected = connect(address, member.options()).await;
    let mut stream = connected.inspect_err(|_| place.hang_ups = 0)?;
    let mut input = BytesMut::new();
    let shake = handshake(member, &mut stream, place.url.is_none(), &mut input);
    let welcome = timeout(limit, shake)
        .await
        .map_err(|_| LinkError::HandshakeTimeout(limit))?
        .map_err(|error| match error {
            error if error.is_without_a_word() => LinkError::no_welcome(address),
            error => error,
        })?;
    if !welcome.subscription_ids {
        // The topic decides then, which is exact where the broker sends one copy.
        tracing::warn!(
            address = &*address.url,
            "the broker offers no subscription identifiers (MQTT 5, 3.2.2.3.12): a message on \
             filters that overlap may come more than once"
        );
    }
    if !welcome.session_present {
        place.hang_ups = 0;
    }
    place.url = Some(address.url.clone());
    place.welcomed = true;
    let keep_alive = welcome
        .keep_alive
        .map_or(member.options().keep_alive, |seconds| {
            Duration::from_secs(seconds.into())
        });
    let mut output = BytesMut::new();
    session.connected(&welcome, &mut output);
    member.welcomed(&welcome);
    let now = Instant::now();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut link = Link {
        member,
        address: &address.url,
        session,
        stream,
        input,
        output,
        position: 0,
        flush: true,
        written: WriteWaiters::new(),
        ids: MessageIds::new()?,
        ticks,
        keep_alive,
        last_write: now,
        last_read: now,
        write_blocked: None,
        ping_sent: None,
        announced: false,
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
    address: &'a Arc<str>,
    session: &'a mut Session,
    stream: Box<dyn Stream>,
    input: BytesMut,
    output: BytesMut,
    /// How many bytes of this connection were written before `output`.
    position: u64,
    /// Whether bytes may be held back by an encrypting stream.
    flush: bool,
    written: WriteWaiters,
    ids: MessageIds,
    ticks: Interval,
    keep_alive: Duration,
    last_write: Instant,
    last_read: Instant,
    write_blocked: Option<Instant>,
    ping_sent: Option<Instant>,
    announced: bool,
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
        if self.member.set_state(LinkState::Up(self.address.clone())) {
            self.member.metrics().links_up.increment(1.0);
            tracing::info!(
                client_id = self.member.client_id(),
                address = %self.address,
                filters = self.member.filters(),
                "broker link is up"
            );
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
            self.last_write = Instant::now();
            self.write_blocked = None;
        }
        if self.output.is_empty() {
            self.write_blocked = None;
        } else if self.write_blocked.is_none() {
            self.write_blocked = Some(Instant::now());
        }
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
        self.input.reserve(READ_CHUNK);
        match poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.input) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(0)) => return Err(LinkError::Closed),
            Poll::Ready(result) => result?,
        };
        // Any packet shows that the broker lives.
        self.ping_sent = None;
        self.last_read = Instant::now();
        let limit = self.member.options().max_packet_size;
        while let Some(packet) = wire::decode(&mut self.input, limit)? {
            match self.session.receive(packet, &mut self.output) {
                Event::None => {}
                Event::Deliver(publish, receipt) => self.hand_out(publish, receipt),
                Event::Subscribed(filter, id) => self.member.subscribed(&filter, id),
                Event::NotRestored(filter, refusal) => {
                    self.member.metrics().not_restored.increment(1);
                    tracing::error!(%filter, %refusal, "a subscription could not be restored");
                }
                Event::Ended(notice) if notice.taken_over => {
                    return Err(LinkError::TakenOver(self.member.client_id().to_owned()));
                }
                Event::Ended(notice) => return Err(LinkError::Ended(notice.reason)),
                Event::Unexpected(packet) => return Err(LinkError::Unexpected(packet)),
            }
        }
        let early = self.session.take_acknowledged_early();
        self.member.metrics().acknowledged_early.increment(early);
        Ok(true)
    }

    /// Gives a message to everyone it is for. It is acknowledged when the last of
    /// them lets go of it: at once if it is for nobody.
    fn hand_out(&mut self, publish: InboundPublish, receipt: Option<Receipt>) {
        let metrics = self.member.metrics();
        metrics.received.increment(1);
        let ack = receipt.map(|receipt| AckOnDrop::new(self.member, receipt));
        let Ok(topic) = String::from_utf8(publish.topic.to_vec()) else {
            tracing::warn!("a message whose topic is not UTF-8 is dropped");
            return;
        };
        let audience = self.member.audience(&publish, &topic);
        if audience.is_empty() {
            metrics.unclaimed.increment(1);
            return;
        }
        let options = self.member.options();
        let property = |name: &Option<String>| {
            let name = name.as_ref()?;
            let mut properties = publish.user_properties.iter();
            properties
                .find(|(key, _)| key == name)
                .map(|(_, value)| value)
        };
        let message = Arc::new(Message {
            id: self.ids.next_id(),
            from: property(&options.from_property)
                .cloned()
                .unwrap_or_default(),
            timestamp: property(&options.timestamp_property)
                .and_then(|text| text.parse().ok())
                .unwrap_or_else(now_ms),
            topic,
            payload: unpin(publish.payload),
        });
        for recipient in audience {
            let delivery = |qos| Delivery {
                message: message.clone(),
                qos: publish.qos.min(qos),
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
        }
    }

    /// Pings, and finds a broker that has gone silent.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let stall = stall_of(self.member.options());
        loop {
            let now = ready!(self.ticks.poll_tick(cx));
            let stalled = |since: Option<Instant>| since.is_some_and(|at| now - at >= stall);
            if stalled(self.write_blocked) {
                return Poll::Ready(Err(LinkError::WriteStalled(stall)));
            }
            if stalled(self.ping_sent) {
                return Poll::Ready(Err(LinkError::PingTimeout(stall)));
            }
            // A tick early, so that the broker never sees it late.
            let quiet = now - self.last_write + TICK;
            let due = !self.keep_alive.is_zero() && quiet >= self.keep_alive;
            // A broker that hangs may leave us writing for long, into buffers on the
            // way: one that says nothing is asked, whatever we wrote meanwhile.
            let silent = now - self.last_read + TICK >= self.member.options().keep_alive;
            if due || (silent && self.ping_sent.is_none()) {
                wire::pingreq(&mut self.output);
                self.ping_sent.get_or_insert(now);
                self.last_write = now;
                // The write happens in a poll of its own.
                cx.waker().wake_by_ref();
            }
        }
    }

    /// Ends the session at the broker: nothing of it is needed any more.
    async fn goodbye(&mut self) -> Result<(), LinkError> {
        wire::disconnect(&mut self.output);
        self.stream.write_all(&self.output).await?;
        self.stream.shutdown().await?;
        Ok(())
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
