//! Whoever writes somebody else's address on his datagrams.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quinn_udp::{Transmit, UdpSocketState};

/// Addresses and ports together.
pub const PEERS: u32 = 50_000;

/// Ports.
const PORTS: u32 = 16;

/// A few sockets that send from all of 127.16.0.0/12: the kernel lets anybody choose
/// among the host's own addresses.
pub struct Crowd(Vec<(UdpSocket, UdpSocketState)>);

impl Crowd {
    pub fn new() -> Self {
        let open = |_| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            let state = UdpSocketState::new((&socket).into()).unwrap();
            (socket, state)
        };
        Self((0..PORTS).map(open).collect())
    }

    /// Sends as the peer of this number; whether the kernel had room.
    pub fn send(&self, number: u32, to: SocketAddr, datagram: &[u8]) -> bool {
        let address = Ipv4Addr::from(0x7f10_0001 + number / PORTS);
        let (socket, state) = &self.0[(number % PORTS) as usize];
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents: datagram,
            segment_size: None,
            src_ip: Some(IpAddr::V4(address)),
        };
        state.try_send(socket.into(), &transmit).is_ok()
    }
}

/// A thread that sends as all of them, one after the other and from the start again.
pub struct Flood {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Flooded>,
}

/// What was sent; a figure to print.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code)]
pub struct Flooded {
    pub datagrams: u32,
    /// A second.
    pub pace: u32,
    pub took: Duration,
}

impl Flood {
    /// At most `pace` datagrams a second, a millisecond's worth at a time; what a busy
    /// machine does not let it send in time is left out. It goes on until it is ended,
    /// and at least until every peer has sent something.
    pub fn start(to: SocketAddr, pace: u32, datagram: Vec<u8>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            let (crowd, begun) = (Crowd::new(), Instant::now());
            let (mut sent, mut slots) = (0, begun);
            while sent < PEERS || !ended.load(Ordering::SeqCst) {
                for _ in 0..pace / 1000 {
                    if crowd.send(sent % PEERS, to, &datagram) {
                        sent += 1;
                    }
                }
                slots += Duration::from_millis(1);
                match slots.checked_duration_since(Instant::now()) {
                    Some(early) => std::thread::sleep(early),
                    // A few slots may be made up for.
                    None => slots = slots.max(Instant::now() - Duration::from_millis(5)),
                }
            }
            let took = begun.elapsed();
            Flooded {
                datagrams: sent,
                pace: (f64::from(sent) / took.as_secs_f64()) as u32,
                took,
            }
        });
        Self { over, thread }
    }

    /// Ends it, once every peer has sent something.
    pub async fn end(self) -> Flooded {
        self.over.store(true, Ordering::SeqCst);
        let thread = self.thread;
        let joined = tokio::task::spawn_blocking(move || thread.join());
        joined.await.unwrap().unwrap()
    }
}
