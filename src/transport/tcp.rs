//! TCP: listening sockets and accepted streams.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::net::RecvFlags;
use socket2::{Domain, Protocol, SockRef, Socket as RawSocket, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use super::{Received, Socket};

/// How TCP sockets are set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Connections that may wait to be accepted.
    pub backlog: i32,
    /// Sends small writes at once.
    pub nodelay: bool,
    /// SO_RCVBUF in bytes; `None` leaves it to the kernel.
    pub recbuf: Option<usize>,
    /// SO_SNDBUF in bytes; `None` leaves it to the kernel.
    pub sndbuf: Option<usize>,
}

/// A listening socket.
///
/// Accepted streams are not tied to the runtime that accepts: the shard that serves
/// one makes it its own with [`Stream::adopt`].
pub struct Acceptor {
    listener: TcpListener,
}

impl Acceptor {
    /// Binds and listens. Must be called within a runtime.
    pub fn bind(address: SocketAddr, options: &Options) -> io::Result<Self> {
        let domain = Domain::for_address(address);
        let socket = RawSocket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        // A restart must not wait for connections of the last run to time out.
        socket.set_reuse_address(true)?;
        if address.is_ipv6() && address.ip().is_unspecified() {
            // [::] is both, whatever the system's default.
            socket.set_only_v6(false)?;
        }
        // Buffer sizes of a listening socket are inherited; set later they come too
        // late for the window scale of the handshake (tcp(7)).
        if let Some(bytes) = options.recbuf {
            socket.set_recv_buffer_size(bytes)?;
        }
        if let Some(bytes) = options.sndbuf {
            socket.set_send_buffer_size(bytes)?;
        }
        socket.bind(&address.into())?;
        socket.listen(options.backlog)?;
        let listener = TcpListener::from_std(socket.into())?;
        Ok(Self { listener })
    }

    /// The address bound, with the real port where 0 was asked for.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The number that the next descriptor of this process would have: the lowest that
    /// is free (open(2)), so a high one says that few are left.
    ///
    /// # Errors
    /// `EMFILE` when none is left, and the others of fcntl(2).
    pub fn next_descriptor(&self) -> io::Result<RawFd> {
        let copy = self.listener.as_fd().try_clone_to_owned()?;
        Ok(copy.as_raw_fd())
    }

    /// Accepts the next stream. Cancel safe.
    pub async fn accept(&self) -> io::Result<(std::net::TcpStream, SocketAddr)> {
        let (stream, peer) = self.listener.accept().await?;
        Ok((stream.into_std()?, peer))
    }
}

/// Bytes that tell how long a message is, for [`Stream::whole`].
pub const HEAD: usize = 9;

/// An accepted stream, with what was read ahead of its owner.
#[derive(Debug)]
pub struct Stream {
    tcp: TcpStream,
    /// Bytes that came behind a PROXY header.
    early: Option<Box<Bytes>>,
    /// Bytes that were sent, for whoever wants to know whether there was an answer.
    sent: u64,
}

impl Stream {
    /// Makes an accepted stream one of the current runtime.
    pub fn adopt(stream: std::net::TcpStream, options: &Options) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(options.nodelay)?;
        Ok(Self {
            tcp: TcpStream::from_std(stream)?,
            early: None,
            sent: 0,
        })
    }

    /// The stream itself, for what must be read before the device's own bytes.
    pub fn tcp_mut(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }

    /// Puts back bytes that were read too far.
    pub fn unread(&mut self, bytes: Bytes) {
        self.early = (!bytes.is_empty()).then(|| Box::new(bytes));
    }

    /// Bytes that were sent to the device so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The addresses of the device and of this end.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.tcp.peer_addr()?, self.tcp.local_addr()?))
    }

    /// Waits until the device's first message is whole; the bytes stay in the kernel.
    /// `length` tells from the first [`HEAD`] bytes how many there must be. Cancel safe.
    ///
    /// # Errors
    /// `UnexpectedEof` when the device sends nothing more before.
    pub async fn whole(&self, length: impl Fn([u8; HEAD]) -> usize) -> io::Result<()> {
        loop {
            let ready = self.tcp.ready(Interest::READABLE).await?;
            if self.is_whole(&length)? {
                return Ok(());
            }
            if ready.is_read_closed() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Only new bytes make it ready again.
            let not_yet = || -> io::Result<()> { Err(io::ErrorKind::WouldBlock.into()) };
            let _ = self.tcp.try_io(Interest::READABLE, not_yet);
            // What came just before that.
            if self.is_whole(&length)? {
                return Ok(());
            }
        }
    }

    fn is_whole(&self, length: impl Fn([u8; HEAD]) -> usize) -> io::Result<bool> {
        let early = self.early.as_deref().map_or(&[][..], |early| early);
        let waiting = rustix::io::ioctl_fionread(&self.tcp)?;
        let come = early.len() + usize::try_from(waiting).unwrap_or(usize::MAX);
        if come < HEAD {
            return Ok(false);
        }
        let mut head = [0; HEAD];
        let (first, rest) = head.split_at_mut(early.len().min(HEAD));
        first.copy_from_slice(early.get(..first.len()).unwrap_or_default());
        if !rest.is_empty() {
            rustix::net::recv(&self.tcp, rest, RecvFlags::PEEK)?;
        }
        Ok(come >= length(head))
    }

    /// Bytes that were sent and that the peer has not acknowledged.
    #[allow(unsafe_code)]
    pub fn unacknowledged(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the descriptor is open as long as `self` is, and SIOCOUTQ, whose other
        // name is TIOCOUTQ, writes one int to where it is told (tcp(7)).
        let result = unsafe { libc::ioctl(self.tcp.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if result == 0 {
            usize::try_from(bytes).unwrap_or(0)
        } else {
            // A socket that cannot be asked has nothing more to give.
            0
        }
    }

    /// Makes the coming drop throw away what the peer has not taken yet.
    pub fn abort(&self) {
        // The kernel would go on offering unsent bytes to a device that takes none.
        // Failing to say so only costs that memory for some minutes.
        let _ = SockRef::from(&self.tcp).set_linger(Some(std::time::Duration::ZERO));
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(early) = &mut self.early {
            let count = early.len().min(buffer.remaining());
            buffer.put_slice(&early.split_to(count));
            if early.is_empty() {
                self.early = None;
            }
        } else {
            ready!(Pin::new(&mut self.tcp).poll_read(cx, buffer))?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let sent = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        self.sent += sent as u64;
        Poll::Ready(Ok(sent))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let sent = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, chunks))?;
        self.sent += sent as u64;
        Poll::Ready(Ok(sent))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl Socket for Stream {
    const STREAM: bool = true;

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<Received>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(self).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(match buffer.filled().len() {
            0 => Received::End,
            count => Received::Bytes(count),
        }))
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self).poll_write_vectored(cx, chunks)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self).poll_shutdown(cx)
    }

    fn unacknowledged(&self) -> usize {
        Stream::unacknowledged(self)
    }

    fn abort(&mut self) {
        Stream::abort(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the options say is what the sockets have, those that are accepted too.
    #[tokio::test]
    async fn options_reach_the_sockets() {
        for nodelay in [true, false] {
            let options = Options {
                backlog: 7,
                nodelay,
                recbuf: Some(32 * 1024),
                sndbuf: Some(48 * 1024),
            };
            let acceptor = Acceptor::bind("127.0.0.1:0".parse().unwrap(), &options).unwrap();
            let address = acceptor.local_addr().unwrap();
            let _device = TcpStream::connect(address).await.unwrap();
            let (stream, _) = acceptor.accept().await.unwrap();
            let mut stream = Stream::adopt(stream, &options).unwrap();
            assert_eq!(stream.tcp_mut().nodelay().unwrap(), nodelay);
            let socket = SockRef::from(&stream.tcp);
            // The kernel counts double for what it adds itself (socket(7)).
            assert_eq!(socket.recv_buffer_size().unwrap(), 64 * 1024);
            assert_eq!(socket.send_buffer_size().unwrap(), 96 * 1024);
        }
    }

    #[tokio::test]
    async fn all_addresses_are_those_of_both_families() {
        let options = Options {
            backlog: 7,
            nodelay: true,
            recbuf: None,
            sndbuf: None,
        };
        let acceptor = Acceptor::bind("[::]:0".parse().unwrap(), &options).unwrap();
        assert!(!SockRef::from(&acceptor.listener).only_v6().unwrap());
        let port = acceptor.local_addr().unwrap().port();
        TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        TcpStream::connect(("::1", port)).await.unwrap();
    }

    /// A message that comes byte by byte, the first of them read ahead, is waited for, and
    /// one of a device that has gone is not.
    #[tokio::test]
    async fn a_first_message_is_waited_for() {
        let options = Options {
            backlog: 7,
            nodelay: true,
            recbuf: None,
            sndbuf: None,
        };
        for (early, late, gone) in [
            (&b""[..], &b"5:::::::: hello"[..], false),
            (b"5:", b"::::::: hello", false),
            (b"5:::::::: he", b"llo", false),
            (b"5::", b"", true),
            (b"", b"5:::::::: h", true),
        ] {
            let acceptor = Acceptor::bind("127.0.0.1:0".parse().unwrap(), &options).unwrap();
            let address = acceptor.local_addr().unwrap();
            let (device, accepted) = tokio::join!(TcpStream::connect(address), acceptor.accept());
            let device = device.unwrap();
            let mut stream = Stream::adopt(accepted.unwrap().0, &options).unwrap();
            stream.unread(Bytes::copy_from_slice(early));
            let mut whole = Box::pin(stream.whole(|head| {
                assert_eq!(head, *b"5::::::::");
                15
            }));
            let (mut sent, mut done) = (0, false);
            for byte in late.chunks(1) {
                assert!(!done);
                device.try_write(byte).unwrap();
                sent += 1;
                // Until the byte has come: the kernel brings it at once, on loopback.
                done = tokio::select! {
                    biased;
                    heard = &mut whole => { heard.unwrap(); true }
                    () = tokio::task::yield_now() => false,
                };
            }
            assert_eq!(sent, late.len());
            if gone {
                assert!(!done);
                drop(device);
            }
            if !done {
                assert_eq!(whole.await.is_err(), gone);
            }
        }
    }

    #[tokio::test]
    async fn what_was_read_too_far_comes_first() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (device, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let options = Options {
            backlog: 7,
            nodelay: true,
            recbuf: None,
            sndbuf: None,
        };
        let accepted = accepted.unwrap().0.into_std().unwrap();
        let mut stream = Stream::adopt(accepted, &options).unwrap();
        stream.unread(Bytes::from_static(b"early"));
        let device = device.unwrap();
        device.try_write(b" late").unwrap();
        let mut heard = [0; 10];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut heard)
            .await
            .unwrap();
        assert_eq!(&heard, b"early late");
        assert!(stream.early.is_none());
    }
}
