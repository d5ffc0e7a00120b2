//! The UDP transport alone: what a datagram of a known peer costs, what a stranger who
//! is refused costs, and the memory of a peer that is silent.
//!
//! `cargo bench --bench udp`. The goals: at most 300 bytes for a silent peer, and a
//! stranger no dearer than a peer. Sender and receiver share the machine, so that
//! the figures are of the receiving thread's own time.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

use std::future::poll_fn;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr, UdpSocket as RawSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use exproto_sidecar::transport::udp::{
    Counters, Demux, Door, Options, Stranger, UdpSocket, Verdict, bind,
};
use exproto_sidecar::transport::{Received, Socket};
use metrics::{Counter, CounterFn};
use quinn_udp::{Transmit, UdpSocketState};
use tokio_util::sync::CancellationToken;

mod counting;

use counting::ALLOCATED;

/// Peers of the measurements. Just below where the table doubles would flatter, just
/// above would blacken: this is between.
const PEERS: u32 = 100_000;
const DATAGRAMS: u64 = 2_000_000;

#[derive(Clone, Copy, PartialEq)]
enum Use {
    /// Peers are kept and say nothing.
    Keep,
    /// Each peer has a task that takes its datagrams.
    Take,
    /// The same, and sends them back.
    Echo,
}

struct Bench(Use, Vec<UdpSocket>);

impl Door for Bench {
    type Token = ();

    fn admit(&mut self, stranger: &Stranger<'_>, _: Instant) -> Verdict<()> {
        match stranger.datagram {
            b"stranger" => Verdict::Refuse,
            _ => Verdict::Admit(()),
        }
    }

    fn enter(&mut self, mut socket: UdpSocket, (): ()) {
        let echo = match self.0 {
            Use::Keep => return self.1.push(socket),
            Use::Take => false,
            Use::Echo => true,
        };
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            loop {
                let received = poll_fn(|cx| socket.poll_receive(cx, &mut buffer)).await;
                let Ok(Received::Bytes(count)) = received else {
                    return;
                };
                if echo {
                    let datagram = [IoSlice::new(&buffer[..count])];
                    poll_fn(|cx| socket.poll_send(cx, &datagram)).await.unwrap();
                }
            }
        });
    }
}

#[derive(Default)]
struct Count(AtomicU64);

impl CounterFn for Count {
    fn increment(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    fn absolute(&self, _: u64) {}
}

/// A shard with the transport and nothing else.
struct Shard {
    address: SocketAddr,
    received: Arc<Count>,
    thread: Option<std::thread::JoinHandle<Duration>>,
    stop: CancellationToken,
}

impl Shard {
    fn start(purpose: Use) -> Self {
        let options = Options {
            recbuf: Some(1 << 22),
            ..Options::default()
        };
        let socket = bind("127.0.0.1:0".parse().unwrap(), 1, &options).unwrap();
        let socket = socket.into_iter().next().unwrap();
        let address = socket.local_addr().unwrap();
        let received = Arc::new(Count::default());
        let mut counters = Counters::noop();
        counters.received = Counter::from_arc(received.clone());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let door = Bench(purpose, Vec::with_capacity(PEERS as usize));
                let demux = Demux::new(socket, door, &options, counters).unwrap();
                demux.run(CancellationToken::new(), stopped).await;
            });
            cpu_time()
        });
        Self {
            address,
            received,
            thread: Some(thread),
            stop,
        }
    }

    fn received(&self) -> u64 {
        self.received.0.load(Ordering::Relaxed)
    }

    /// Waits until no more comes in.
    fn settle(&self) {
        loop {
            let before = self.received();
            std::thread::sleep(Duration::from_millis(20));
            if self.received() == before {
                return;
            }
        }
    }

    /// CPU time of its thread.
    fn stop(mut self) -> Duration {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap()
    }
}

#[allow(unsafe_code)]
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec to where it is told.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Sends from many addresses; `gap` is a pause after each 32 datagrams.
struct Crowd(RawSocket, UdpSocketState);

impl Crowd {
    fn new() -> Self {
        let socket = RawSocket::bind("0.0.0.0:0").unwrap();
        let state = UdpSocketState::new((&socket).into()).unwrap();
        Self(socket, state)
    }

    fn send(&self, number: u32, to: SocketAddr, datagram: &[u8]) {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: datagram,
            segment_size: None,
            src_ip: Some(IpAddr::V4((0x7f01_0000 + number).into())),
        };
        self.1.try_send((&self.0).into(), &transmit).unwrap();
    }
}

fn rss() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = status.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn memory() {
    let shard = Shard::start(Use::Keep);
    let crowd = Crowd::new();
    crowd.send(0, shard.address, b"hello");
    shard.settle();
    let (allocated, resident) = (ALLOCATED.load(Ordering::Relaxed), rss());
    for number in 1..PEERS {
        crowd.send(number, shard.address, b"");
        while shard.received() + 100 < u64::from(number) {
            std::thread::yield_now();
        }
    }
    shard.settle();
    assert_eq!(shard.received(), u64::from(PEERS));
    let each = |bytes: usize| bytes / PEERS as usize;
    println!(
        "a peer: {} bytes allocated, {} resident, with one empty datagram in its queue (16 bytes)",
        each(ALLOCATED.load(Ordering::Relaxed) - allocated),
        each(rss() - resident)
    );
    shard.stop();
}

fn throughput(name: &str, purpose: Use, peers: u32, datagram: &[u8]) {
    let shard = Shard::start(purpose);
    let crowd = Crowd::new();
    if datagram != b"stranger" {
        for number in 0..peers {
            crowd.send(number, shard.address, b"hello");
            while shard.received() + 100 < u64::from(number) {
                std::thread::yield_now();
            }
        }
    }
    shard.settle();
    let before = shard.received();
    let begun = Instant::now();
    for number in 0..DATAGRAMS {
        // In an order that no cache likes.
        let peer = (number * 7919 % u64::from(peers)) as u32;
        crowd.send(peer, shard.address, datagram);
    }
    let elapsed = begun.elapsed();
    shard.settle();
    let received = shard.received() - before;
    let cpu = shard.stop();
    println!(
        "{name}: {received} of {DATAGRAMS} received, {:.0} a second; {:.0} ns of CPU each",
        received as f64 / elapsed.as_secs_f64(),
        cpu.as_nanos() as f64 / received as f64,
    );
}

fn main() {
    memory();
    throughput("1,000 peers take", Use::Take, 1_000, &[7; 100]);
    throughput("100,000 peers take", Use::Take, PEERS, &[7; 100]);
    throughput("1,000 peers echo", Use::Echo, 1_000, &[7; 100]);
    throughput("strangers refused", Use::Take, PEERS, b"stranger");
}
