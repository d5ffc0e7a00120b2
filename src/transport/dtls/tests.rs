//! A device in the same process: OpenSSL's client, datagrams carried by hand.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openssl::ssl::{ErrorCode, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, SslVersion};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::*;
use crate::tls::Identity;

mod abuse;
mod contexts;
mod cookies;
mod links;
mod memory;
mod messages;

const IDENTITY: &str = "meter-1";
const KEY: &str = "000102030405060708090a0b0c0d0e0f";

/// Writes a self-signed certificate with its key.
fn identity(dir: &Path, name: &str) -> Identity {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap();
    let identity = Identity {
        certfile: dir.join(format!("{name}.pem")),
        keyfile: dir.join(format!("{name}-key.pem")),
    };
    std::fs::write(&identity.certfile, certificate.pem()).unwrap();
    std::fs::write(&identity.keyfile, key.serialize_pem()).unwrap();
    identity
}

/// Options with a certificate and a pre-shared key.
fn options(dir: &Path) -> Options {
    let psk_file = dir.join("psk");
    std::fs::write(&psk_file, format!("{IDENTITY}:{KEY}\n")).unwrap();
    Options {
        identities: vec![identity(dir, "gateway")],
        psk_file: Some(psk_file),
        ..Options::default()
    }
}

fn context() -> Context {
    let dir = tempfile::tempdir().unwrap();
    Context::new(&options(dir.path())).unwrap()
}

fn address(port: u16) -> SocketAddr {
    ([192, 0, 2, 1], port).into()
}

/// The device's datagrams.
#[derive(Default)]
struct Pipe {
    incoming: VecDeque<Bytes>,
    outgoing: VecDeque<Bytes>,
}

impl io::Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let datagram = self.incoming.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        buffer[..datagram.len()].copy_from_slice(&datagram);
        Ok(datagram.len())
    }
}

impl io::Write for Pipe {
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.outgoing.push_back(Bytes::copy_from_slice(datagram));
        Ok(datagram.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The device.
struct Device {
    stream: SslStream<Pipe>,
}

impl Device {
    /// One that trusts any certificate.
    fn new() -> Self {
        Self::with("ECDHE-ECDSA-AES128-GCM-SHA256")
    }

    fn with(ciphers: &str) -> Self {
        let mut builder = SslContext::builder(SslMethod::dtls_client()).unwrap();
        builder.set_security_level(0);
        builder
            .set_max_proto_version(Some(SslVersion::DTLS1_2))
            .unwrap();
        builder.set_cipher_list(ciphers).unwrap();
        builder.set_verify(SslVerifyMode::NONE);
        builder.set_psk_client_callback(|_, _, identity, key| {
            identity[..IDENTITY.len()].copy_from_slice(IDENTITY.as_bytes());
            let bytes: Vec<u8> = (0..16).collect();
            key[..16].copy_from_slice(&bytes);
            Ok(16)
        });
        let mut ssl = Ssl::new(&builder.build()).unwrap();
        ssl.set_mtu(1200).unwrap();
        ssl.set_connect_state();
        Self {
            stream: SslStream::new(ssl, Pipe::default()).unwrap(),
        }
    }

    /// Goes on with the handshake; true when it is done.
    fn go_on(&mut self) -> bool {
        match self.stream.do_handshake() {
            Ok(()) => true,
            Err(error) if error.code() == ErrorCode::WANT_READ => false,
            Err(error) => panic!("device: {error:?}"),
        }
    }

    fn receive(&mut self, datagram: &[u8]) {
        self.stream
            .get_mut()
            .incoming
            .push_back(Bytes::copy_from_slice(datagram));
    }

    fn next_datagram(&mut self) -> Option<Bytes> {
        self.stream.get_mut().outgoing.pop_front()
    }

    /// The datagram that carries this message.
    fn message(&mut self, message: &[u8]) -> Bytes {
        self.stream.ssl_write(message).unwrap();
        self.next_datagram().unwrap()
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let count = self
            .stream
            .ssl_read(&mut buffer)
            .map_err(io::Error::other)?;
        buffer.truncate(count);
        Ok(buffer)
    }

    /// The ClientHello with the cookie of this gate.
    fn hello(&mut self, gate: &mut Gate, now: Instant, peer: SocketAddr) -> Bytes {
        self.go_on();
        let first = self.next_datagram().unwrap();
        let Offer::Answer(answer) = gate.offer(now, peer, &first) else {
            panic!("no cookie");
        };
        self.receive(&answer);
        self.go_on();
        self.next_datagram().unwrap()
    }
}

/// Both ends of an established session.
fn established(context: &Context, mut device: Device) -> (Device, Box<Session>) {
    let now = Instant::now();
    let mut gate = Gate::new(context.clone(), now).unwrap();
    let hello = device.hello(&mut gate, now, address(1));
    let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
        panic!("not accepted");
    };
    for _ in 0..10 {
        while let Some(datagram) = session.next_datagram() {
            device.receive(&datagram);
        }
        let done = device.go_on();
        while let Some(datagram) = device.next_datagram() {
            session.receive(&datagram);
        }
        if done && session.is_established() {
            return (device, session);
        }
    }
    panic!("no handshake: {session:?}");
}

fn read(session: &mut Session) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_MESSAGE];
    match session.read(&mut buffer) {
        Read::Data(count) => {
            buffer.truncate(count);
            Some(buffer)
        }
        Read::Pending => None,
        Read::Closed => panic!("closed: {session:?}"),
    }
}

/// The session still carries messages, both ways.
fn assert_alive(device: &mut Device, session: &mut Session) {
    while read(session).is_some() {}
    let ping = device.message(b"ping");
    session.receive(&ping);
    assert_eq!(read(session).unwrap(), b"ping");
    session.write(b"pong").unwrap();
    let pong = session.next_datagram().unwrap();
    device.receive(&pong);
    assert_eq!(device.read().unwrap(), b"pong");
}
