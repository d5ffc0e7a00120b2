//! The witness: an MQTT 3.1.1 subscriber that only reads.
//!
//! A thread and a blocking socket with a large buffer, so that the broker never has to
//! keep a message back for it, and QoS 0, so that it never sends anything: a broker
//! that is killed with unread bytes in a socket resets the connection, and what was on
//! its way would be lost by the network and not by the gateway.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::sync::watch;

/// More than the broker writes while this thread waits for its turn.
const BUFFER: usize = 8 << 20;

/// Everything that was delivered, by device, in the order of arrival.
pub type Seen = Vec<Vec<u32>>;

pub struct Watcher {
    pub seen: Arc<Mutex<Seen>>,
    /// How often it was connected.
    pub connected: watch::Receiver<usize>,
}

impl Watcher {
    /// Connects again whenever the broker is gone, for as long as the process lives.
    pub fn start(port: u16, devices: usize) -> Self {
        let seen = Arc::new(Mutex::new(vec![Vec::new(); devices]));
        let (sender, connected) = watch::channel(0);
        let all = seen.clone();
        thread::spawn(move || {
            loop {
                // Ends with the broker; there is nothing to learn from the error.
                let _ = watch_until_killed(port, &all, &sender);
                thread::sleep(Duration::from_millis(2));
            }
        });
        Self { seen, connected }
    }
}

fn watch_until_killed(
    port: u16,
    seen: &Mutex<Seen>,
    connected: &watch::Sender<usize>,
) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(BUFFER)?;
    socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    let mut stream = TcpStream::from(socket);
    // Protocol level 4, session kept, no keep-alive; then a SUBSCRIBE at QoS 0. Where
    // the broker knows the session this changes nothing.
    stream.write_all(b"\x10\x13\x00\x04MQTT\x04\x00\x00\x00\x00\x07watcher")?;
    let mut stream = BufReader::with_capacity(1 << 20, stream);
    expect(&mut stream, 0x20)?;
    stream
        .get_mut()
        .write_all(b"\x82\x0c\x00\x01\x00\x07chaos/#\x00")?;
    loop {
        let (kind, body) = packet(&mut stream)?;
        match kind >> 4 {
            3 => note(&body, &mut seen.lock().unwrap()),
            9 => connected.send_modify(|times| *times += 1),
            other => panic!("the broker sent the watcher a packet of type {other}"),
        }
    }
}

fn expect(stream: &mut impl Read, kind: u8) -> io::Result<()> {
    let (found, body) = packet(stream)?;
    assert_eq!((found, body.last()), (kind, Some(&0)), "refused");
    Ok(())
}

/// One packet: its first byte and what is behind the length (MQTT 3.1.1, 2.2).
fn packet(stream: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let kind = byte[0];
    let mut length = 0;
    for shift in [0, 7, 14, 21] {
        stream.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((kind, body))
}

/// Remembers a PUBLISH of QoS 0 whose payload is `DEVICE NUMBER`.
fn note(body: &[u8], seen: &mut Seen) {
    let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
    let payload = std::str::from_utf8(&body[2 + topic..]).unwrap();
    let (device, number) = payload.split_once(' ').unwrap();
    seen[device.parse::<usize>().unwrap()].push(number.parse().unwrap());
}
