//! DTLS 1.2 as a device, by OpenSSL.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::Bytes;
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslFiletype, SslMethod, SslOptions, SslStream, SslVerifyMode,
    SslVersion,
};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::datagram::MAX_DATAGRAM;
use crate::options::Options;

/// Bytes of a handshake's datagrams: less than any network's.
const MTU: u32 = 1200;

/// Largest message in a record, in bytes (RFC 6347, 4.1).
const MAX_MESSAGE: usize = 16 * 1024;

/// Pause before an attempt that has no answer begins anew, from another port. OpenSSL
/// would send its last flight again; a new attempt needs no timer of it.
const PAUSE: Duration = Duration::from_secs(2);

/// How devices do their handshakes.
pub(super) struct Client {
    context: SslContext,
    name: String,
    verify: bool,
}

/// A session that is established.
pub(super) struct Session {
    stream: SslStream<Wire>,
    socket: UdpSocket,
}

/// What OpenSSL reads and writes: datagrams.
#[derive(Default)]
struct Wire {
    inbox: VecDeque<Vec<u8>>,
    out: VecDeque<Vec<u8>>,
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let datagram = self.inbox.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        // What does not fit is cut off, as a socket does.
        (&*datagram).read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.out.push_back(datagram.to_vec());
        Ok(datagram.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Client {
    pub(super) fn new(options: &Options) -> Result<Self, String> {
        let verify = options.ca.is_some();
        let context = context(options).map_err(|error| error.to_string())?;
        Ok(Self {
            context,
            name: options.server_name().to_owned(),
            verify,
        })
    }

    /// Does the handshake over a socket that is connected to the gateway.
    pub(super) async fn connect(&self, socket: UdpSocket) -> io::Result<Session> {
        let mut socket = socket;
        loop {
            let mut ssl = Ssl::new(&self.context)?;
            ssl.set_mtu(MTU)?;
            if self.verify {
                ssl.param_mut().set_host(&self.name)?;
            }
            let stream = SslStream::new(ssl, Wire::default())?;
            let mut session = Session { stream, socket };
            if let Ok(done) = timeout(PAUSE, session.handshake()).await {
                done?;
                return Ok(session);
            }
            let (from, to) = (session.socket.local_addr()?, session.socket.peer_addr()?);
            drop(session);
            socket = UdpSocket::bind((from.ip(), 0)).await?;
            socket.connect(to).await?;
        }
    }
}

fn context(options: &Options) -> Result<SslContext, openssl::error::ErrorStack> {
    let mut builder = SslContext::builder(SslMethod::dtls_client())?;
    builder.set_max_proto_version(Some(SslVersion::DTLS1_2))?;
    builder.set_options(SslOptions::NO_QUERY_MTU);
    match &options.ca {
        Some(file) => {
            builder.set_ca_file(file)?;
            builder.set_verify(SslVerifyMode::PEER);
        }
        None => builder.set_verify(SslVerifyMode::NONE),
    }
    if let Some((certificate, key)) = options.cert.as_ref().zip(options.key.as_ref()) {
        builder.set_certificate_chain_file(certificate)?;
        builder.set_private_key_file(key, SslFiletype::PEM)?;
    }
    if let Some(psk) = options.psk.clone() {
        builder.set_cipher_list("PSK")?;
        builder.set_psk_client_callback(move |_, _, identity, key| {
            // The identity ends with a zero. Where one does not fit there is no key, and
            // the handshake fails.
            let room = identity.get_mut(..=psk.identity.len());
            let (Some(room), Some(place)) = (room, key.get_mut(..psk.key.len())) else {
                return Ok(0);
            };
            let text = psk.identity.bytes().chain([0]);
            room.iter_mut().zip(text).for_each(|(to, from)| *to = from);
            place.copy_from_slice(&psk.key);
            Ok(psk.key.len())
        });
    }
    Ok(builder.build())
}

impl Session {
    async fn handshake(&mut self) -> io::Result<()> {
        loop {
            let done = self.stream.connect();
            self.write_out().await?;
            match done {
                Ok(()) => return Ok(()),
                Err(error) if error.code() == ErrorCode::WANT_READ => self.fetch().await?,
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    /// Waits for a message. Cancel safe.
    pub(super) async fn receive(&mut self) -> io::Result<Bytes> {
        loop {
            // Let go while nothing comes: an idle device holds no buffer.
            let mut buffer = vec![0; MAX_MESSAGE];
            match self.stream.ssl_read(&mut buffer) {
                Ok(count) => {
                    buffer.truncate(count);
                    return Ok(Bytes::from(buffer));
                }
                Err(error) if error.code() == ErrorCode::WANT_READ => {}
                Err(error) if error.code() == ErrorCode::ZERO_RETURN => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) => return Err(io::Error::other(error)),
            }
            drop(buffer);
            self.fetch().await?;
        }
    }

    pub(super) async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.stream.ssl_write(message).map_err(io::Error::other)?;
        self.write_out().await
    }

    /// Waits for a datagram and leaves it to OpenSSL. Cancel safe.
    async fn fetch(&mut self) -> io::Result<()> {
        let mut datagram = Vec::with_capacity(2048);
        loop {
            self.socket.readable().await?;
            datagram.reserve(MAX_DATAGRAM);
            match self.socket.try_recv_buf(&mut datagram) {
                Ok(_) => {
                    datagram.shrink_to_fit();
                    self.stream.get_mut().inbox.push_back(datagram);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn write_out(&mut self) -> io::Result<()> {
        while let Some(datagram) = self.stream.get_mut().out.pop_front() {
            self.socket.send(&datagram).await?;
        }
        Ok(())
    }
}

/// Says goodbye, so that the gateway need not wait for the silence to end.
impl Drop for Session {
    fn drop(&mut self) {
        if self.stream.ssl().is_init_finished() && self.stream.shutdown().is_ok() {
            while let Some(datagram) = self.stream.get_mut().out.pop_front() {
                // Whether it fits is all the same: the gateway times out then.
                let _ = self.socket.try_send(&datagram);
            }
        }
    }
}
