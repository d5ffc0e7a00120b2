//! A thread with a socket that echoes every message, with the engine in between.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use exproto_sidecar::transport::dtls::{
    Context, Gate, MAX_MESSAGE, Offer, Options, PeerIdentity, Read, Session, WriteError,
};

/// What became of a session.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// With the name of its cipher suite, and the most bytes of a message.
    Established(PeerIdentity, String, usize),
    /// With the failure, if it was one.
    Closed(Option<String>),
}

pub struct Server {
    pub address: SocketAddr,
    events: Receiver<Event>,
    limit: std::cell::Cell<usize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(options: &Options) -> Self {
        let context = Context::new(options).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let wait = Some(Duration::from_millis(10));
        socket.set_read_timeout(wait).unwrap();
        let (sender, events) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let gate = Gate::new(context, Instant::now()).unwrap();
            let mut shard = Shard {
                socket,
                gate,
                sessions: HashMap::new(),
                events: sender,
            };
            while !stopped.load(Ordering::Relaxed) {
                shard.turn();
            }
        });
        Self {
            address,
            events,
            limit: MAX_MESSAGE.into(),
            stop,
            thread: Some(thread),
        }
    }

    pub fn next_within(&self, seconds: u64) -> Option<Event> {
        self.events.recv_timeout(Duration::from_secs(seconds)).ok()
    }

    /// The next session that is established: who it is, and the cipher suite.
    pub fn established(&self) -> (PeerIdentity, String) {
        match self.next_within(30) {
            Some(Event::Established(peer, suite, limit)) => {
                self.limit.set(limit);
                (peer, suite)
            }
            other => panic!("established: {other:?}"),
        }
    }

    /// The most bytes of a message of the last session.
    pub fn limit(&self) -> usize {
        self.limit.get()
    }

    /// The next session that ends: why it failed, if it did.
    pub fn closed(&self) -> Option<String> {
        match self.next_within(30) {
            Some(Event::Closed(failure)) => failure,
            other => panic!("closed: {other:?}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// What the demultiplexer will be.
struct Shard {
    socket: UdpSocket,
    gate: Gate,
    sessions: HashMap<SocketAddr, (Box<Session>, bool)>,
    events: Sender<Event>,
}

impl Shard {
    fn turn(&mut self) {
        let mut buffer = vec![0; 65_536];
        if let Ok((count, peer)) = self.socket.recv_from(&mut buffer) {
            let datagram = &buffer[..count];
            match self.sessions.get_mut(&peer) {
                Some((session, _)) if !session.is_restart(datagram) => session.receive(datagram),
                _ => match self.gate.offer(Instant::now(), peer, datagram) {
                    Offer::Answer(answer) => {
                        self.socket.send_to(&answer, peer).unwrap();
                    }
                    Offer::Accepted(session) => {
                        self.sessions.insert(peer, (session, false));
                    }
                    Offer::Ignored => {}
                },
            }
        }
        for (peer, (session, told)) in &mut self.sessions {
            if session.deadline().is_some_and(|left| left.is_zero()) {
                session.elapsed();
            }
            if session.is_established() && !std::mem::replace(told, true) {
                let identity = session.peer().unwrap().clone();
                let suite = session.cipher().unwrap().to_owned();
                let limit = match session.write(&[0; MAX_MESSAGE + 1]) {
                    Err(WriteError::TooLarge { limit }) => limit,
                    other => panic!("{other:?}"),
                };
                let event = Event::Established(identity, suite, limit);
                let _ = self.events.send(event);
            }
            while let Read::Data(count) = session.read(&mut buffer) {
                session.write(&buffer[..count]).unwrap();
            }
            if session.is_closed() {
                session.close();
            }
            while let Some(datagram) = session.next_datagram() {
                self.socket.send_to(&datagram, *peer).unwrap();
            }
            if session.is_closed() {
                let failure = session.failure().map(str::to_owned);
                let _ = self.events.send(Event::Closed(failure));
            }
        }
        self.sessions.retain(|_, (session, _)| !session.is_closed());
    }
}
