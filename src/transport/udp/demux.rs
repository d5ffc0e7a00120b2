//! The receiving task of a shard: which datagram is whose.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket as RawSocket};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::io::{Batch, Io, Packet};
use super::shared::Shared;
use super::socket::UdpSocket;
use super::table::{Flow, Peer};
use super::{Counters, Options};

/// Batches received before the tasks that they woke have their turn, each of up to 32
/// packets: some ten microseconds each, so that nobody else on the thread waits long
/// while somebody floods it.
const BATCHES: usize = 4;

/// Pause after a failure to receive: the condition, such as no memory, rarely passes
/// sooner.
const TROUBLE_PAUSE: Duration = Duration::from_millis(100);

/// Somebody who is not a peer yet, with a datagram.
#[derive(Debug)]
pub struct Stranger<'a> {
    /// Where it comes from, as far as it can be believed: with UDP anybody can write any
    /// address on a datagram.
    pub peer: SocketAddr,
    /// The address it was sent to.
    pub local: SocketAddr,
    /// What it says.
    pub datagram: &'a [u8],
}

/// What is to become of a stranger.
#[derive(Debug)]
pub enum Verdict<T> {
    /// Nothing. The door has counted it.
    Refuse,
    /// This is sent back, and nothing is kept. An answer that is longer than the question
    /// lends strength to whoever writes somebody else's address on his datagrams.
    Answer(Bytes),
    /// A peer from now on. The token goes to [`Door::enter`].
    Admit(T),
}

/// Who decides about strangers, one for each shard.
///
/// It is asked for every datagram of every stranger, and no peer is served meanwhile: it
/// must be quick.
pub trait Door: Send {
    /// What the admission gives and holds, such as permits.
    type Token: Send;

    /// Decides about a stranger. Not asked while the gateway drains.
    fn admit(&mut self, stranger: &Stranger<'_>, now: Instant) -> Verdict<Self::Token>;

    /// Takes the new peer over; its first datagram waits in it.
    fn enter(&mut self, socket: UdpSocket, token: Self::Token);
}

/// Receives for one shard.
pub struct Demux<D> {
    entrance: Entrance<D>,
    batch: Batch,
}

impl<D: Door> Demux<D> {
    /// Over one of the sockets of [`super::bind()`]. Must be called within the runtime of
    /// its shard.
    pub fn new(
        socket: RawSocket,
        door: D,
        options: &Options,
        counters: Counters,
    ) -> io::Result<Self> {
        let shared = Shared::new(Io::new(socket)?, options, counters)?;
        Ok(Self {
            entrance: Entrance {
                shared,
                door,
                asked: None,
            },
            batch: Batch::new(),
        })
    }

    #[cfg(test)]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.entrance.shared
    }

    /// Receives until `stop` is cancelled, or the future is dropped; sockets that are
    /// left then fail. From `draining` on strangers are refused.
    ///
    /// Stop all shards of a listener together, after the last connection of all of them:
    /// with one socket less the kernel spreads the peers anew.
    pub async fn run(mut self, draining: CancellationToken, stop: CancellationToken) {
        let shared = self.entrance.shared.clone();
        let _closing = Closing(shared.clone());
        let mut stopped = pin!(stop.cancelled());
        let mut in_trouble = false;
        loop {
            for _ in 0..BATCHES {
                let received = poll_fn(|cx| {
                    if stopped.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(None);
                    }
                    shared.demux.register(cx.waker());
                    shared.poll_blocked(cx);
                    shared.io.poll_receive(cx, &mut self.batch).map(Some)
                });
                let error = match received.await {
                    None => return,
                    Some(Ok(packets)) => {
                        self.sort(packets, draining.is_cancelled());
                        if std::mem::take(&mut in_trouble) {
                            tracing::info!(bound = %shared.bound, "receiving again");
                        }
                        continue;
                    }
                    Some(Err(error)) => error,
                };
                shared.counters.receive_errors.increment(1);
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    // An ICMP error: what a peer did not take.
                    continue;
                }
                if !std::mem::replace(&mut in_trouble, true) {
                    tracing::error!(bound = %shared.bound, %error, "cannot receive; trying on");
                }
                tokio::time::sleep(TROUBLE_PAUSE).await;
            }
            tokio::task::yield_now().await;
        }
    }

    /// Gives the packets of the batch to those they are for.
    fn sort(&mut self, packets: usize, draining: bool) {
        let now = Instant::now();
        let mut received = 0;
        for packet in self.batch.packets(packets) {
            received += self.entrance.take(&packet, draining, now);
        }
        self.entrance.shared.counters.received.increment(received);
    }
}

/// Tells the peers that nothing comes any more.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// All that a datagram passes.
struct Entrance<D> {
    shared: Arc<Shared>,
    door: D,
    /// The address of ours that was asked last, and whether it can answer. Most hosts
    /// have few, and devices know one.
    asked: Option<(IpAddr, bool)>,
}

impl<D: Door> Entrance<D> {
    /// Gives a packet's datagrams to its peer or to the door; says how many they were.
    fn take(&mut self, packet: &Packet<'_>, draining: bool, now: Instant) -> u64 {
        let flow = Flow {
            peer: packet.peer,
            local: packet.local,
        };
        let mut known = self.shared.table().get(&flow);
        let mut count = 0;
        for datagram in packet.datagrams() {
            count += 1;
            let pushed = known
                .as_ref()
                .is_some_and(|peer| self.shared.push(peer, datagram).is_ok());
            if pushed {
                continue;
            }
            known = if draining {
                self.shared.counters.draining.increment(1);
                None
            } else {
                self.stranger(flow, datagram, now)
            };
        }
        count
    }

    fn can_answer(&mut self, ip: IpAddr) -> bool {
        match self.asked {
            Some((asked, can)) if asked == ip => can,
            _ => {
                let can = is_unicast(ip);
                self.asked = Some((ip, can));
                can
            }
        }
    }

    /// Asks the door, and does what it says. The peer, if there is one now.
    fn stranger(&mut self, flow: Flow, datagram: &[u8], now: Instant) -> Option<Arc<Peer>> {
        let mut local = self.shared.bound;
        if let Some(ip) = flow.local {
            local.set_ip(ip);
        }
        let possible = is_possible(flow.peer) && flow.peer != local;
        let possible = possible && self.can_answer(local.ip());
        let counters = &self.shared.counters;
        if !possible {
            counters.bad_address.increment(1);
            return None;
        }
        let stranger = Stranger {
            peer: flow.peer,
            local,
            datagram,
        };
        let token = match self.door.admit(&stranger, now) {
            Verdict::Refuse => return None,
            Verdict::Answer(answer) => {
                // What cannot be sent at once is not kept for somebody unknown.
                if self.shared.send(flow.peer, flow.local, &answer).is_err() {
                    counters.send_failed.increment(1);
                }
                return None;
            }
            Verdict::Admit(token) => token,
        };
        let peer = Peer::new(flow);
        self.shared.table().enter(peer.clone());
        let socket = UdpSocket::new(self.shared.clone(), peer.clone());
        // A peer that was just made is not gone.
        let _ = self.shared.push(&peer, datagram);
        self.door.enter(socket, token);
        Some(peer)
    }
}

/// Whether datagrams to this address are for this host alone. The kernel's answer is in
/// its refusal to connect to a broadcast address (EACCES, ip(7)); what else may go wrong
/// says nothing about the address.
fn is_unicast(ip: IpAddr) -> bool {
    let IpAddr::V4(v4) = ip.to_canonical() else {
        return !ip.is_multicast();
    };
    let probe = RawSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let connected = probe.and_then(|probe| probe.connect((v4, DISCARD)));
    let refused = connected.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    !v4.is_multicast() && !refused
}

/// A port to connect to; nothing is sent.
const DISCARD: u16 = 9;

/// Whether somebody can have sent from there and can be answered: the kernel hands up
/// whatever was written on the packet.
pub(super) fn is_possible(peer: SocketAddr) -> bool {
    let ip = peer.ip().to_canonical();
    peer.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && ip != IpAddr::V4(Ipv4Addr::BROADCAST)
}
