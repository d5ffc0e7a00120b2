//! Over real sockets on loopback.

mod limits;
mod namespace;
mod peers;

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket as RawSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::{Counter, CounterFn};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::demux::Demux;
use super::shared::Shared;
use super::*;
use crate::transport::{Received, Socket};

/// A listener whose door lets everybody in, while there is room, but those who say `health` or `no`.
struct Gateway {
    address: SocketAddr,
    entered: mpsc::UnboundedReceiver<UdpSocket>,
    /// Peers that the door still lets in.
    room: Arc<AtomicI64>,
    /// Strangers that found no room.
    refused: Arc<AtomicU64>,
    counters: Counted,
    shards: Vec<Arc<Shared>>,
    draining: CancellationToken,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

struct OpenDoor {
    entered: mpsc::UnboundedSender<UdpSocket>,
    room: Arc<AtomicI64>,
    refused: Arc<AtomicU64>,
}

impl Door for OpenDoor {
    type Token = ();

    fn admit(&mut self, stranger: &Stranger<'_>, _: Instant) -> Verdict<()> {
        match stranger.datagram {
            b"health" => Verdict::Answer(Bytes::from_static(b"alive")),
            b"no" => Verdict::Refuse,
            _ if self.room.fetch_sub(1, Ordering::SeqCst) <= 0 => {
                self.refused.fetch_add(1, Ordering::SeqCst);
                Verdict::Refuse
            }
            _ => Verdict::Admit(()),
        }
    }

    fn enter(&mut self, socket: UdpSocket, (): ()) {
        // The test may have seen enough.
        let _ = self.entered.send(socket);
    }
}

/// Counters that can be read.
#[derive(Clone)]
struct Counted {
    all: Counters,
    values: Vec<(&'static str, Arc<Value>)>,
}

#[derive(Default)]
struct Value(AtomicU64);

impl CounterFn for Value {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Ordering::SeqCst);
    }

    fn absolute(&self, value: u64) {
        self.0.store(value, Ordering::SeqCst);
    }
}

impl Counted {
    fn new() -> Self {
        let mut values = Vec::new();
        let mut all = Counters::noop();
        for (name, counter) in [
            ("received", &mut all.received),
            ("sent", &mut all.sent),
            ("queue_full", &mut all.queue_full),
            ("queues_full", &mut all.queues_full),
            ("draining", &mut all.draining),
            ("bad_address", &mut all.bad_address),
            ("too_large", &mut all.too_large),
            ("send_failed", &mut all.send_failed),
            ("receive_errors", &mut all.receive_errors),
        ] {
            let value = Arc::new(Value::default());
            *counter = Counter::from_arc(value.clone());
            values.push((name, value));
        }
        Self { all, values }
    }

    fn get(&self, name: &str) -> u64 {
        let (_, value) = self.values.iter().find(|(n, _)| *n == name).unwrap();
        value.0.load(Ordering::SeqCst)
    }

    /// Waits until a counter is there; what is counted has been done.
    async fn reach(&self, name: &str, least: u64) {
        let reached = async {
            while self.get(name) < least {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(10), reached).await;
        let counted = self.get(name);
        assert!(reached.is_ok(), "{name} is {counted} and not {least}");
    }
}

impl Gateway {
    fn start(address: &str, shards: usize, options: &Options) -> Self {
        let sockets = bind(address.parse().unwrap(), shards, options).unwrap();
        let address = sockets[0].local_addr().unwrap();
        let (sender, entered) = mpsc::unbounded_channel();
        let mut gateway = Self {
            address,
            entered,
            room: Arc::new(AtomicI64::new(i64::MAX)),
            refused: Arc::default(),
            counters: Counted::new(),
            shards: Vec::new(),
            draining: CancellationToken::new(),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
        };
        for socket in sockets {
            let counters = gateway.counters.all.clone();
            let door = OpenDoor {
                entered: sender.clone(),
                room: gateway.room.clone(),
                refused: gateway.refused.clone(),
            };
            let demux = Demux::new(socket, door, options, counters).unwrap();
            gateway.shards.push(demux.shared().clone());
            let (draining, stop) = (gateway.draining.clone(), gateway.stop.clone());
            gateway.tasks.spawn(demux.run(draining, stop));
        }
        gateway
    }

    async fn entered(&mut self) -> UdpSocket {
        soon(self.entered.recv()).await.unwrap()
    }

    /// Entries of all tables.
    fn entries(&self) -> usize {
        let tables = self.shards.iter();
        tables.map(|shard| shard.table().peers().count()).sum()
    }

    /// A new peer that has said `hello`.
    async fn peer(&mut self) -> (Device, UdpSocket) {
        let device = Device::to(self.address);
        device.send(b"hello").await;
        let mut socket = self.entered().await;
        assert_eq!(receive(&mut socket).await.unwrap(), b"hello");
        (device, socket)
    }
}

/// A device with a socket of its own, which takes from the address it sends to alone.
struct Device(tokio::net::UdpSocket);

impl Device {
    /// Connected to the gateway, from an address that can reach it.
    fn to(gateway: SocketAddr) -> Self {
        let any: IpAddr = match gateway.ip() {
            IpAddr::V4(_) => [0, 0, 0, 0].into(),
            IpAddr::V6(_) => [0u16; 8].into(),
        };
        let socket = RawSocket::bind((any, 0)).unwrap();
        socket.connect(gateway).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(tokio::net::UdpSocket::from_std(socket).unwrap())
    }

    async fn send(&self, datagram: &[u8]) {
        self.0.send(datagram).await.unwrap();
    }

    async fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; MAX_DATAGRAM];
        let count = soon(self.0.recv(&mut buffer)).await.unwrap();
        buffer.truncate(count);
        buffer
    }
}

/// For what must come, in a time that is long enough for a machine that is busy with
/// other things.
async fn soon<T>(event: impl Future<Output = T>) -> T {
    const SOON: Duration = Duration::from_secs(10);
    let begun = Instant::now();
    let event = tokio::time::timeout(SOON, event).await;
    // At its end the timeout looks once more, which would hide that nobody was woken.
    assert!(begun.elapsed() < SOON, "it did not happen in time");
    event.unwrap()
}

async fn receive(socket: &mut UdpSocket) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_DATAGRAM];
    let received = poll_fn(|cx| socket.poll_receive(cx, &mut buffer));
    match soon(received).await? {
        Received::Bytes(count) => buffer.truncate(count),
        Received::End => panic!("UDP has no end"),
    }
    Ok(buffer)
}

async fn send(socket: &mut UdpSocket, datagram: &[u8]) -> io::Result<usize> {
    let chunks = [
        io::IoSlice::new(datagram),
        io::IoSlice::new(b"the next one"),
    ];
    soon(poll_fn(|cx| socket.poll_send(cx, &chunks))).await
}

/// One socket that sends from many addresses of 127.0.0.0/8.
struct Crowd {
    socket: tokio::net::UdpSocket,
    state: quinn_udp::UdpSocketState,
}

impl Crowd {
    fn new() -> Self {
        let socket = RawSocket::bind("0.0.0.0:0").unwrap();
        let state = quinn_udp::UdpSocketState::new((&socket).into()).unwrap();
        let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
        Self { socket, state }
    }

    /// Sends as the device of this number.
    fn send(&self, number: u32, gateway: SocketAddr, datagram: &[u8]) {
        let transmit = quinn_udp::Transmit {
            destination: gateway,
            ecn: None,
            contents: datagram,
            segment_size: None,
            src_ip: Some(Self::address(number)),
        };
        self.state
            .try_send((&self.socket).into(), &transmit)
            .unwrap();
    }

    /// Its address.
    fn address(number: u32) -> IpAddr {
        IpAddr::V4((0x7f01_0000 + number).into())
    }
}
