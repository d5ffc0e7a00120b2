//! Listeners over TCP: the accept loop, and what a stream needs before it is a
//! connection.
//!
//! Nothing is awaited for a single peer in the loop: the PROXY header and the TLS
//! handshake happen in the connection's own task, under their deadlines.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::time::{timeout, timeout_at};
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::admission::turns::{Turn, Turns};
use crate::admission::{AddressPermit, Admission, Permit, Refused};
use crate::connection::{self, Connection, ListenerContext};
use crate::metrics::ListenerMetrics;
use crate::pace::{Pace, Stage};
use crate::reload::Current;
use crate::shard::Shard;
use crate::telemetry::Seldom;
use crate::tls::Subject;
use crate::transport::tcp::{self, Acceptor, Stream};
use crate::transport::tls::{Handshake, TlsSocket, first_message};
use crate::transport::{Kind, PeerInfo, proxy_protocol};

/// Pause after a failure to accept, such as no free file descriptor: the condition
/// rarely passes sooner, and trying at once would only burn the CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Descriptors that devices leave to everything else, at most a quarter of all: when a
/// link to the broker or to a handler breaks it must come back, and operators look at
/// the admin server just then. Whoever is next in accept(2) would have taken theirs.
const RESERVED: u64 = 64;

/// TLS of a listener.
pub struct Tls {
    /// Replaced when its files change.
    pub config: Arc<Current<ServerConfig>>,
    /// The longest that a handshake may take, from the moment that the stream is accepted
    /// or its PROXY header read. Waiting for its turn and for this thread is included.
    pub handshake_timeout: Duration,
    /// Turns for handshakes.
    pub handshakes: Arc<Turns>,
}

/// One listener, bound.
pub struct StreamListener {
    acceptor: Acceptor,
    /// One for each shard, in the order of the shards.
    contexts: Vec<Arc<ListenerContext>>,
    metrics: ListenerMetrics,
    entrance: Arc<Entrance>,
}

/// What every stream passes.
struct Entrance {
    name: String,
    tcp: tcp::Options,
    tls: Option<Tls>,
    admission: Admission,
}

impl StreamListener {
    /// A listener over a bound socket, with TLS or without.
    pub fn new(
        acceptor: Acceptor,
        tcp: tcp::Options,
        tls: Option<Tls>,
        admission: Admission,
        contexts: Vec<Arc<ListenerContext>>,
        metrics: ListenerMetrics,
    ) -> Self {
        let name = contexts.first().map(|context| context.name.clone());
        let entrance = Entrance {
            name: name.unwrap_or_default(),
            tcp,
            tls,
            admission,
        };
        Self {
            acceptor,
            contexts,
            metrics,
            entrance: Arc::new(entrance),
        }
    }

    /// Accepts until `stop` is cancelled; then the socket is closed.
    pub async fn run(self, shards: Vec<Shard>, stop: CancellationToken) {
        let (name, admission) = (&*self.entrance.name, &self.entrance.admission);
        let for_devices = descriptors_for_devices();
        let (mut scarce, mut in_trouble, complaints) = (false, false, Seldom::default());
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.accept(scarce, for_devices) => accepted,
            };
            if let Ok((stream, _)) = &accepted {
                scarce = stream.as_raw_fd() >= for_devices;
            }
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_the_peers_fault(&error) => continue,
                Err(error) => {
                    self.metrics.accept_errors.increment(1);
                    // Peers that come and go could bring trouble about, and end it, at will.
                    if !in_trouble && let Some(left_out) = complaints.tell(Instant::now()) {
                        in_trouble = true;
                        tracing::error!(listener = name, %error, left_out, "cannot accept; trying on");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if std::mem::take(&mut in_trouble) {
                tracing::info!(listener = name, "accepting again");
            }
            let accepted = Instant::now();
            match admission.admit(peer.ip(), accepted) {
                Ok((permit, address)) => {
                    let incoming = Accepted {
                        stream,
                        peer,
                        address,
                        at: accepted,
                    };
                    self.hand_over(incoming, permit, &shards);
                }
                Err(refused) => {
                    let reason = refused.word();
                    self.metrics.refused(reason);
                    tracing::debug!(listener = name, %peer, reason, "connection refused");
                }
            }
        }
    }

    /// Accepts the next stream. Fails when few descriptors are left, which is looked at
    /// where they were `scarce` the last time. Cancel safe.
    async fn accept(
        &self,
        scarce: bool,
        for_devices: RawFd,
    ) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        if scarce && self.acceptor.next_descriptor()? >= for_devices {
            return Err(io::Error::other("too few open files are left"));
        }
        self.acceptor.accept().await
    }

    /// Gives the connection to the shard that has the fewest.
    fn hand_over(&self, accepted: Accepted, permit: Permit, shards: &[Shard]) {
        let pairs = shards.iter().zip(&self.contexts);
        let Some((shard, context)) = pairs.min_by_key(|(shard, _)| shard.load()) else {
            return;
        };
        let task = Incoming {
            accepted,
            pace: shard.pace().clone(),
            entrance: self.entrance.clone(),
            context: context.clone(),
        };
        // What it takes to enter is given back before the connection begins.
        let entering = Box::pin(task.enter());
        shard.spawn_connection(|counted| {
            Box::pin(async move {
                // Moved into the task: its end is the only release.
                let _room = (permit, counted);
                let entered = entering.await;
                if let Some(connection) = entered {
                    connection.await;
                }
            })
        });
    }
}

/// The lowest descriptor that no device is to have.
fn descriptors_for_devices() -> RawFd {
    // A system that does not tell its limit is one without.
    let limit = rlimit::getrlimit(rlimit::Resource::NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let ours = limit - RESERVED.min(limit / 4);
    RawFd::try_from(ours).unwrap_or(RawFd::MAX)
}

/// Some errors of accept(2) are about the peer that was in the queue, not about us.
fn is_the_peers_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// A stream as the loop has it.
struct Accepted {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    /// `None` where a load balancer has to say first whose address it is.
    address: Option<AddressPermit>,
    at: Instant,
}

/// A stream on its way to becoming a connection.
struct Incoming {
    accepted: Accepted,
    pace: Arc<Pace>,
    entrance: Arc<Entrance>,
    context: Arc<ListenerContext>,
}

/// Why a stream did not become a connection: the word it is counted under, and more, such
/// as the device that a load balancer has named.
type Failure = (&'static str, String);

impl Incoming {
    /// The connection; `None` when the stream does not become one.
    async fn enter(self) -> Option<Connection> {
        let (context, peer) = (self.context.clone(), self.accepted.peer);
        let draining = context.draining.clone();
        // Somebody who has not become a connection is not waited for.
        let entered = tokio::select! {
            biased;
            () = draining.cancelled() => return None,
            entered = self.try_enter() => entered,
        };
        let refused = |(reason, error): Failure| {
            context.metrics.refused(reason);
            tracing::debug!(listener = context.name, %peer, reason, error, "connection refused");
        };
        entered.map_err(refused).ok()
    }

    async fn try_enter(self) -> Result<Connection, Failure> {
        let Self {
            accepted,
            pace,
            entrance,
            context,
        } = self;
        let (stream, mut info, room, since) = entrance.prepare(accepted).await?;
        Ok(match &entrance.tls {
            None => connection::serve(stream, &info, context, room),
            Some(tls) => {
                let socket = tls.secure(stream, since, &pace).await?;
                info.certificate = socket.certificate().and_then(Subject::of);
                connection::serve(socket, &info, context, room)
            }
        })
    }
}

impl Entrance {
    /// The stream, who is at its other end, room for that address, and since when the
    /// device itself is waited for.
    async fn prepare(
        &self,
        accepted: Accepted,
    ) -> Result<(Stream, PeerInfo, AddressPermit, Instant), Failure> {
        let setup = |error: io::Error| ("setup", error.to_string());
        let mut since = accepted.at;
        let mut stream = Stream::adopt(accepted.stream, &self.tcp).map_err(setup)?;
        let (mut peer, mut local) = stream.addresses().map_err(setup)?;
        let denied = |refused: Refused, device: SocketAddr| (refused.word(), device.to_string());
        if let Some(proxy) = self.admission.proxy() {
            let limit = proxy.timeout;
            let header = proxy_protocol::read(stream.tcp_mut());
            let failed = |error: String| ("proxy_protocol", error);
            let announced = timeout(limit, header)
                .await
                .map_err(|_| failed(format!("no PROXY header within {limit:?}")))?
                .map_err(|error| failed(error.to_string()))?;
            if let Some((client, reached)) = announced.addresses {
                (peer, local) = (client, reached);
            }
            stream.unread(announced.rest);
            let permitted = self.admission.permits(peer.ip());
            permitted.map_err(|refused| denied(refused, peer))?;
            since = Instant::now();
        }
        let permit = match accepted.address {
            Some(permit) => permit,
            None => {
                let entered = self.admission.enter_from(peer.ip());
                entered.map_err(|refused| denied(refused, peer))?
            }
        };
        let info = PeerInfo {
            kind: match self.tls {
                None => Kind::Tcp,
                Some(_) => Kind::Ssl,
            },
            peer,
            local,
            certificate: None,
        };
        Ok((stream, info, permit, since))
    }
}

impl Tls {
    /// Does the handshake. A peer whose first message is not whole takes no turn, and one
    /// that does not get on gives way to others.
    async fn secure(
        &self,
        stream: Stream,
        since: Instant,
        pace: &Arc<Pace>,
    ) -> Result<TlsSocket, Failure> {
        let failed = |error: String| ("handshake_failed", error);
        let handshake = async {
            let whole = stream.whole(first_message).await;
            whole.map_err(|error| failed(error.to_string()))?;
            let turn = self.handshakes.wait().await;
            let mut steps = pin!(paced(
                Handshake::new(stream, self.config.get()),
                &turn,
                pace
            ));
            poll_fn(|cx| match turn.poll_lost(cx) {
                Poll::Ready(()) => {
                    let stuck = "did not get on while others waited for a turn".to_owned();
                    Poll::Ready(Err(("handshake_silent", stuck)))
                }
                Poll::Pending => {
                    let done = steps.as_mut().poll(cx);
                    done.map_err(|error| failed(error.to_string()))
                }
            })
            .await
        };
        let limit = self.handshake_timeout;
        let late = |_| Err(failed(format!("not done within {limit:?}")));
        // One that is late already has had no step, and costs no signature.
        let done = timeout_at((since + limit).into(), handshake).await;
        done.unwrap_or_else(late)
    }
}

/// Does the handshake, each part of it when it is its turn on this thread.
async fn paced(mut handshake: Handshake, turn: &Turn, pace: &Arc<Pace>) -> io::Result<TlsSocket> {
    let mut answered = 0;
    loop {
        let stage = match answered {
            0 => Stage::Beginning,
            _ => Stage::GoingOn,
        };
        let step = pace.step(stage).await;
        if stage == Stage::Beginning {
            turn.moved(Instant::now());
        }
        let polled = poll_fn(|cx| Poll::Ready(Pin::new(&mut handshake).poll(cx))).await;
        drop(step);
        if let Poll::Ready(done) = polled {
            return done;
        }
        let sent = handshake.sent();
        if sent > answered {
            turn.moved(Instant::now());
            answered = sent;
        }
        woken().await;
    }
}

/// Ready once this task, whose wakers are out already, is woken by one of them.
async fn woken() {
    let mut again = false;
    poll_fn(|_| match std::mem::replace(&mut again, true) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    })
    .await;
}
