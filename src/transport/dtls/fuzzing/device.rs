//! A device in the same process: OpenSSL's client, datagrams carried by hand.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::ssl::{
    ShutdownState, Ssl, SslContext, SslMethod, SslStream, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;

use crate::tls::Identity;
use crate::transport::dtls::{ClientCertificates, Context, MAX_MESSAGE, Options, Read, Session};

/// One of each kind of record there is.
pub(super) const SUITES: [&str; 5] = [
    "PSK-AES128-GCM-SHA256",
    "PSK-AES128-CCM8",
    "PSK-AES256-CCM",
    "PSK-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
];

const IDENTITY: &[u8] = b"meter-1";
const KEY: [u8; 16] = *b"0123456789abcdef";

thread_local! {
    static CONTEXT: OnceCell<Context> = const { OnceCell::new() };
    static CLIENTS: [OnceCell<SslContext>; SUITES.len()] = const { [const { OnceCell::new() }; 5] };
}

/// With a certificate and a pre-shared key; devices may show a certificate.
pub(super) fn context() -> Context {
    CONTEXT.with(|context| context.get_or_init(new_context).clone())
}

fn new_context() -> Context {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut certificate = X509::builder().unwrap();
    certificate.set_pubkey(&key).unwrap();
    let (start, end) = (Asn1Time::days_from_now(0), Asn1Time::days_from_now(365));
    certificate.set_not_before(&start.unwrap()).unwrap();
    certificate.set_not_after(&end.unwrap()).unwrap();
    certificate.sign(&key, MessageDigest::sha256()).unwrap();
    let certificate = certificate.build().to_pem().unwrap();
    // Files are what a context is made of.
    let folder = std::env::temp_dir().join(format!(
        "exproto-fuzzing-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let hex: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let identity = String::from_utf8_lossy(IDENTITY);
    let options = Options {
        identities: vec![Identity {
            certfile: write("certificate", &certificate),
            keyfile: write("key", &key.private_key_to_pem_pkcs8().unwrap()),
        }],
        client_authorities: vec![write("authority", &certificate)],
        client_certificates: ClientCertificates::Asked,
        psk_file: Some(write("psk", format!("{identity}:{hex}").as_bytes())),
        ..Options::default()
    };
    let context = Context::new(&options).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    context
}

fn client(suite: usize) -> SslContext {
    let mut builder = SslContext::builder(SslMethod::dtls_client()).unwrap();
    builder.set_security_level(0);
    let newest = Some(SslVersion::DTLS1_2);
    builder.set_max_proto_version(newest).unwrap();
    builder.set_cipher_list(SUITES[suite]).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    builder.set_psk_client_callback(|_, _, identity, key| {
        identity[..IDENTITY.len()].copy_from_slice(IDENTITY);
        key[..KEY.len()].copy_from_slice(&KEY);
        Ok(KEY.len())
    });
    builder.build()
}

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

pub(super) struct Device {
    stream: SslStream<Pipe>,
}

impl Device {
    /// One that trusts any certificate.
    pub fn new(suite: usize) -> Self {
        let context = CLIENTS.with(|all| all[suite].get_or_init(|| client(suite)).clone());
        let mut ssl = Ssl::new(&context).unwrap();
        ssl.set_mtu(1200).unwrap();
        ssl.set_connect_state();
        Self {
            stream: SslStream::new(ssl, Pipe::default()).unwrap(),
        }
    }

    /// Goes on with the handshake; true when it is done.
    pub fn go_on(&mut self) -> bool {
        let done = self.stream.do_handshake().is_ok();
        drop(openssl::error::ErrorStack::get());
        done
    }

    pub fn receive(&mut self, datagram: &[u8]) {
        let incoming = &mut self.stream.get_mut().incoming;
        incoming.push_back(Bytes::copy_from_slice(datagram));
    }

    pub fn next_datagram(&mut self) -> Option<Bytes> {
        self.stream.get_mut().outgoing.pop_front()
    }

    /// The datagram that carries this message.
    pub fn message(&mut self, message: &[u8]) -> Bytes {
        self.stream.ssl_write(message).unwrap();
        self.next_datagram().unwrap()
    }

    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let count = self.stream.ssl_read(&mut buffer);
        buffer.truncate(count.map_err(io::Error::other)?);
        Ok(buffer)
    }

    /// The datagram with its close_notify.
    pub fn goodbye(&mut self) -> Bytes {
        let _ = self.stream.shutdown();
        assert!(self.stream.get_shutdown().contains(ShutdownState::SENT));
        self.next_datagram().unwrap()
    }
}

/// The next message that came, of a session that has not ended.
pub(super) fn read(session: &mut Session) -> Option<Vec<u8>> {
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
