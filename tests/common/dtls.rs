//! A device over DTLS that can stop wherever it likes.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use openssl::ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, SslVersion};

use super::LIMIT;

/// How long it waits for a datagram before it looks whether to send again.
const LOOK: Duration = Duration::from_millis(200);

/// OpenSSL's client over a socket of its own. It blocks.
pub struct DtlsDevice {
    stream: SslStream<Wire>,
}

/// Its socket, and a copy of what went out.
pub struct Wire {
    pub socket: UdpSocket,
    pub sent: Vec<Vec<u8>>,
    /// Hears nothing once it has shown its address.
    stops: bool,
}

impl Wire {
    /// Whether a ClientHello with a cookie went out: message 1 (RFC 6347, 4.2.2).
    fn has_shown_its_address(&self) -> bool {
        const HELLO: u8 = 1;
        let shows = |datagram: &Vec<u8>| datagram[13] == HELLO && datagram[17..19] == [0, 1];
        self.sent.iter().any(shows)
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stops && self.has_shown_its_address() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.socket.recv(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.sent.push(datagram.to_vec());
        self.socket.send(datagram)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DtlsDevice {
    /// From a port of this address; it has said nothing yet.
    pub fn new(from: impl Into<IpAddr>, to: SocketAddr) -> Self {
        let socket = UdpSocket::bind(SocketAddr::new(from.into(), 0)).unwrap();
        socket.connect(to).unwrap();
        Self::over(socket)
    }

    /// From where another was: the device has lost its state.
    pub fn over(socket: UdpSocket) -> Self {
        let mut builder = SslContext::builder(SslMethod::dtls_client()).unwrap();
        builder
            .set_max_proto_version(Some(SslVersion::DTLS1_2))
            .unwrap();
        builder.set_verify(SslVerifyMode::NONE);
        let mut ssl = Ssl::new(&builder.build()).unwrap();
        ssl.set_mtu(1200).unwrap();
        ssl.set_connect_state();
        socket.set_read_timeout(Some(LOOK)).unwrap();
        let wire = Wire {
            socket,
            sent: Vec::new(),
            stops: false,
        };
        Self {
            stream: SslStream::new(ssl, wire).unwrap(),
        }
    }

    /// One that has done its handshake.
    pub async fn connect(from: impl Into<IpAddr>, to: SocketAddr) -> Self {
        let from = from.into();
        let connecting = move || {
            let mut device = Self::new(from, to);
            device.handshake();
            device
        };
        tokio::task::spawn_blocking(connecting).await.unwrap()
    }

    fn handshake(&mut self) {
        let begun = Instant::now();
        while let Err(error) = self.stream.do_handshake() {
            assert_eq!(error.code(), ErrorCode::WANT_READ, "{error}");
            assert!(begun.elapsed() < LIMIT, "no handshake in time");
        }
    }

    /// Does the cookie exchange; the answer to the second ClientHello is not read.
    pub fn show_address(&mut self) {
        let begun = Instant::now();
        self.wire().stops = true;
        while !self.wire().has_shown_its_address() {
            let error = self.stream.do_handshake().unwrap_err();
            assert_eq!(error.code(), ErrorCode::WANT_READ, "{error}");
            assert!(begun.elapsed() < LIMIT, "no cookie in time");
        }
    }

    /// What is below the session.
    pub fn wire(&mut self) -> &mut Wire {
        self.stream.get_mut()
    }

    /// Sends a message.
    pub fn send(&mut self, message: &[u8]) {
        assert_eq!(self.stream.ssl_write(message).unwrap(), message.len());
    }

    /// Says something until it comes back: a datagram may be lost.
    pub async fn echo(mut self, message: &str) -> Self {
        let message = message.to_owned();
        let echoing = move || {
            let begun = Instant::now();
            loop {
                assert!(begun.elapsed() < LIMIT, "no echo in time");
                self.send(message.as_bytes());
                let mut heard = vec![0; 20_000];
                match self.stream.ssl_read(&mut heard) {
                    Ok(count) if heard[..count] == *message.as_bytes() => return self,
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.code(), ErrorCode::WANT_READ, "{error}"),
                }
            }
        };
        tokio::task::spawn_blocking(echoing).await.unwrap()
    }
}
