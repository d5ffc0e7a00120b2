//! Listeners over UDP: who becomes a connection, of those whose datagrams come.
//!
//! Each shard has a socket of its own and a door beside it; the doors of a listener
//! share its admission.

use std::net::UdpSocket as RawSocket;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::admission::turns::{Turn, Turns};
use crate::admission::{AddressPermit, Admission, Permit, Refused};
use crate::connection::{self, ListenerContext};
use crate::metrics::ListenerMetrics;
use crate::reload::Current;
use crate::shard::Shard;
use crate::telemetry::Seldom;
use crate::tls::Subject;
use crate::transport::dtls::{
    self, DtlsSocket, Gate, HandshakeError, Handshakes, Look, Restarts, Succession,
};
use crate::transport::udp::{self, Demux, Door, Stranger, UdpSocket, Verdict};
use crate::transport::{Kind, PeerInfo};

/// What is spoken over the datagrams.
#[derive(Clone)]
pub enum Protocol {
    /// Nothing but the device's own.
    Plain {
        /// A datagram that is answered without a connection, and its answer.
        health_check: Option<(Bytes, Bytes)>,
    },
    /// DTLS.
    Dtls(Dtls),
}

/// DTLS of a listener.
#[derive(Clone)]
pub struct Dtls {
    /// Replaced when its files change.
    pub context: Arc<Current<dtls::Context>>,
    /// The longest that a handshake may take.
    pub handshake_timeout: Duration,
    /// Handshakes that may be under way.
    pub handshakes: Arc<Turns>,
}

/// One listener, bound: a socket for each shard.
pub struct DatagramListener {
    /// The sockets, as many as there are contexts.
    pub sockets: Vec<RawSocket>,
    /// Their options.
    pub options: udp::Options,
    /// Their counters.
    pub counters: udp::Counters,
    /// What is spoken.
    pub protocol: Protocol,
    /// Who may come in.
    pub admission: Arc<Admission>,
    /// One for each shard, in the order of the shards.
    pub contexts: Vec<Arc<ListenerContext>>,
}

impl DatagramListener {
    /// Receives until `stop` is cancelled, and lets nobody in any more from `closed` on.
    pub fn start(
        self,
        shards: &[Shard],
        closed: &CancellationToken,
        stop: &CancellationToken,
    ) -> Result<(), dtls::Error> {
        let parts = shards.iter().zip(self.sockets).zip(self.contexts);
        for ((shard, socket), context) in parts {
            let entrance = Entrance {
                admission: self.admission.clone(),
                context,
                shard: shard.clone(),
            };
            let (options, counters) = (self.options.clone(), self.counters.clone());
            let tokens = (closed.clone(), stop.clone());
            match self.protocol.clone() {
                Protocol::Plain { health_check } => {
                    let door = PlainDoor {
                        entrance,
                        health_check,
                    };
                    receive(shard, socket, door, options, counters, tokens);
                }
                Protocol::Dtls(dtls) => {
                    let context = dtls.context.get();
                    let gate = Gate::new((*context).clone(), Instant::now())?;
                    let again = Again {
                        admission: self.admission.clone(),
                        turns: dtls.handshakes.clone(),
                        metrics: entrance.context.metrics.clone(),
                    };
                    let handshakes = Handshakes {
                        gate: Mutex::new(gate),
                        context: dtls.context,
                        pace: shard.pace().clone(),
                        complaints: Seldom::default(),
                        restarts: Box::new(again),
                        limit: dtls.handshake_timeout,
                    };
                    let door = DtlsDoor {
                        entrance,
                        turns: dtls.handshakes,
                        handshakes: Arc::new(handshakes),
                    };
                    receive(shard, socket, door, options, counters, tokens);
                }
            }
        }
        Ok(())
    }
}

fn receive(
    shard: &Shard,
    socket: RawSocket,
    door: impl Door + 'static,
    options: udp::Options,
    counters: udp::Counters,
    (closed, stop): (CancellationToken, CancellationToken),
) {
    shard.runtime().spawn(async move {
        match Demux::new(socket, door, &options, counters) {
            Ok(demux) => demux.run(closed, stop).await,
            Err(error) => tracing::error!(%error, "a socket cannot be used"),
        }
    });
}

/// What every stranger passes.
struct Entrance {
    admission: Arc<Admission>,
    context: Arc<ListenerContext>,
    shard: Shard,
}

/// Room for a connection.
struct Room {
    _connection: Permit,
    _address: AddressPermit,
}

impl Entrance {
    fn permits(&self, stranger: &Stranger<'_>) -> bool {
        let permitted = self.admission.permits(stranger.peer.ip());
        permitted
            .map_err(|refused| self.refuse(stranger, refused))
            .is_ok()
    }

    fn enter(&self, stranger: &Stranger<'_>, now: Instant) -> Option<Room> {
        let enter = || {
            // The address first: one that is full must not use up the rate of others.
            let address = self.admission.enter_from(stranger.peer.ip())?;
            Ok(Room {
                _connection: self.admission.enter(now)?,
                _address: address,
            })
        };
        enter()
            .map_err(|refused| self.refuse(stranger, refused))
            .ok()
    }

    fn refuse(&self, stranger: &Stranger<'_>, refused: Refused) {
        let (listener, peer, reason) = (&*self.context.name, stranger.peer, refused.word());
        self.context.metrics.refused(reason);
        tracing::debug!(listener, %peer, reason, "connection refused");
    }
}

struct PlainDoor {
    entrance: Entrance,
    health_check: Option<(Bytes, Bytes)>,
}

impl Door for PlainDoor {
    type Token = Room;

    fn admit(&mut self, stranger: &Stranger<'_>, now: Instant) -> Verdict<Room> {
        if !self.entrance.permits(stranger) {
            return Verdict::Refuse;
        }
        if let Some((request, reply)) = &self.health_check
            && stranger.datagram == request
        {
            return Verdict::Answer(reply.clone());
        }
        match self.entrance.enter(stranger, now) {
            Some(room) => Verdict::Admit(room),
            None => Verdict::Refuse,
        }
    }

    fn enter(&mut self, socket: UdpSocket, room: Room) {
        let context = self.entrance.context.clone();
        let info = PeerInfo {
            kind: Kind::Udp,
            peer: socket.peer_addr(),
            local: socket.local_addr(),
            certificate: None,
        };
        self.entrance
            .shard
            .spawn_connection(|counted| connection::serve(socket, &info, context, (room, counted)));
    }
}

/// Why a handshake does not begin, as it is counted.
const NO_TURN: &str = "max_handshakes";

/// The rules for a device that begins anew: it keeps its room, and has to be let in.
struct Again {
    admission: Arc<Admission>,
    turns: Arc<Turns>,
    metrics: ListenerMetrics,
}

impl Restarts for Again {
    fn begin(&self, now: Instant) -> Option<Turn> {
        // Looked at first: who finds no turn must not use up the rate of others.
        let begun = match self.turns.has_room(now) {
            true => self.admission.begin(now).map_err(Refused::word),
            false => Err(NO_TURN),
        };
        let turn = begun.and_then(|()| self.turns.take(now).ok_or(NO_TURN));
        turn.map_err(|reason| self.metrics.refused(reason)).ok()
    }

    fn failed(&self, error: &HandshakeError) {
        self.metrics.refused(error.word());
    }
}

struct DtlsDoor {
    entrance: Entrance,
    turns: Arc<Turns>,
    handshakes: Arc<Handshakes>,
}

/// What a device has that has shown its address.
struct Shown {
    room: Room,
    turn: Turn,
    /// Since when it waits.
    since: Instant,
}

impl Door for DtlsDoor {
    type Token = Shown;

    /// Costs some microseconds: the signature is made by the peer's own task.
    fn admit(&mut self, stranger: &Stranger<'_>, now: Instant) -> Verdict<Shown> {
        if !self.entrance.permits(stranger) {
            return Verdict::Refuse;
        }
        let look = self
            .handshakes
            .gate()
            .look(now, stranger.peer, stranger.datagram);
        match look {
            Look::Answer(answer) => return Verdict::Answer(answer),
            Look::Ignored => return Verdict::Refuse,
            Look::Shown(_) => {}
        }
        let metrics = &self.entrance.context.metrics;
        // Looked at first: who finds no turn must not use up the rate of others.
        if !self.turns.has_room(now) {
            metrics.refused(NO_TURN);
            return Verdict::Refuse;
        }
        let Some(room) = self.entrance.enter(stranger, now) else {
            return Verdict::Refuse;
        };
        // Last: nobody is to give way for somebody who does not come in.
        let Some(turn) = self.turns.take(now) else {
            metrics.refused(NO_TURN);
            return Verdict::Refuse;
        };
        Verdict::Admit(Shown {
            room,
            turn,
            since: now,
        })
    }

    fn enter(&mut self, socket: UdpSocket, shown: Shown) {
        let context = self.entrance.context.clone();
        let Shown { room, turn, since } = shown;
        let handshakes = self.handshakes.clone();
        let succession = Succession::default();
        let begin = |socket: DtlsSocket, context: Arc<ListenerContext>| {
            let (peer, local) = socket.addresses()?;
            let certificate = socket.certificate().and_then(|der| Subject::of(der));
            let info = PeerInfo {
                kind: Kind::Dtls,
                peer,
                local,
                certificate,
            };
            Some(connection::serve(socket, &info, context, ()))
        };
        let (context_of_enter, successors) = (context.clone(), succession.clone());
        let enter = async move {
            let context = context_of_enter;
            let peer = socket.peer_addr();
            // Somebody who has not become a connection is not waited for.
            let done = tokio::select! {
                biased;
                () = context.draining.cancelled() => return None,
                done = handshakes.shake(socket, &turn, since, successors) => done,
            };
            let error = match done {
                Ok(socket) => return begin(socket, context),
                Err(error) => error,
            };
            let (listener, reason) = (&*context.name, error.word());
            context.metrics.refused(reason);
            let error = error.to_string();
            tracing::debug!(listener, %peer, reason, error, "connection refused");
            None
        };
        // What the handshake takes is given back before the connection begins.
        let entering = Box::pin(enter);
        self.entrance.shard.spawn_connection(|counted| {
            Box::pin(async move {
                let _room = (room, counted);
                let mut connection = entering.await;
                while let Some(running) = connection {
                    running.await;
                    // A device that has begun anew meanwhile is another connection.
                    let next = succession.take();
                    connection = next.and_then(|socket| begin(socket, context.clone()));
                }
            })
        });
    }
}
