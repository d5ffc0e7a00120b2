//! The kernel's side: a socket, its batches, and the options that matter.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::task::{Context, Poll, ready};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes for each packet of a batch. The kernel joins datagrams of one peer (GRO) up to
/// the length that a packet can have.
const PACKET: usize = 64 * 1024;

/// One socket, of the runtime in which it was made.
pub(super) struct Io {
    socket: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// Makes every attempt to send find the socket full.
    #[cfg(test)]
    pub jammed: std::sync::atomic::AtomicBool,
}

impl Io {
    /// Must be called within a runtime.
    #[allow(unsafe_code)]
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let v6 = socket.local_addr()?.is_ipv6();
        allow_fragments(&socket, v6)?;
        Ok(Self {
            // SAFETY: the socket owns its descriptor, which is the same and open until it
            // is dropped, together with the registration and after it.
            socket: unsafe { AsyncFd::register(socket) }?,
            state,
            #[cfg(test)]
            jammed: false.into(),
        })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.get_ref().local_addr()
    }

    /// Receives what has come into `batch` and says how many packets that are.
    pub fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut Batch) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            match batch.fill(self.socket.get_ref(), &self.state) {
                Ok(packets) => {
                    if packets < BATCH_SIZE {
                        // That was all. What has come since is an event of its own,
                        // so asking once more would only cost a system call.
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(packets));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Sends one datagram, from `source` if that is an address of ours.
    ///
    /// # Errors
    /// `WouldBlock` when the socket is full; then [`Io::poll_writable`] tells when it
    /// no longer is.
    pub fn send(
        &self,
        peer: SocketAddr,
        source: Option<IpAddr>,
        datagram: &[u8],
    ) -> io::Result<()> {
        let transmit = Transmit {
            destination: peer,
            ecn: None,
            contents: datagram,
            segment_size: None,
            src_ip: source,
        };
        self.socket.try_io(Interest::WRITABLE, |socket| {
            #[cfg(test)]
            if self.jammed.load(std::sync::atomic::Ordering::SeqCst) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.state.try_send(socket.into(), &transmit)
        })
    }

    /// Ready when a datagram may be sent, as far as is known. Remembers one waker.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_write_ready(cx).map_ok(|_| ())
    }
}

/// Where datagrams are received: one for each shard, and not one for each peer. Pages
/// that no datagram ever touched take no memory.
pub(super) struct Batch {
    bytes: Box<[u8]>,
    metas: [RecvMeta; BATCH_SIZE],
}

impl Batch {
    pub fn new() -> Self {
        Self {
            bytes: vec![0; PACKET * BATCH_SIZE].into_boxed_slice(),
            metas: [RecvMeta::default(); BATCH_SIZE],
        }
    }

    fn fill(&mut self, socket: &UdpSocket, state: &UdpSocketState) -> io::Result<usize> {
        let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(&mut []));
        for (slice, packet) in slices.iter_mut().zip(self.bytes.chunks_exact_mut(PACKET)) {
            *slice = IoSliceMut::new(packet);
        }
        state.recv(socket.into(), &mut slices, &mut self.metas)
    }

    /// The first packets, as the last call filled them.
    pub fn packets(&self, count: usize) -> impl Iterator<Item = Packet<'_>> {
        let metas = self.metas.iter().take(count);
        metas
            .zip(self.bytes.chunks_exact(PACKET))
            .map(|(meta, bytes)| Packet {
                peer: meta.addr,
                local: meta.dst_ip,
                bytes: bytes.get(..meta.len).unwrap_or_default(),
                stride: meta.stride,
            })
    }
}

/// What one peer sent in one go: a datagram, or several that the kernel has joined.
pub(super) struct Packet<'a> {
    pub peer: SocketAddr,
    /// The address of ours that it was sent to.
    pub local: Option<IpAddr>,
    bytes: &'a [u8],
    stride: usize,
}

impl<'a> Packet<'a> {
    /// Its datagrams. An empty one is never joined.
    pub fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> {
        let empty = self.bytes.is_empty().then_some(self.bytes);
        empty
            .into_iter()
            .chain(self.bytes.chunks(self.stride.max(1)))
    }
}

/// Undoes what quinn-udp does for QUIC, which finds out by itself what fits on the way:
/// a device's message that is larger goes in fragments, as from any other UDP socket.
///
/// In IPv4 routers may cut, so that the first large datagram is not lost either; in
/// IPv6 the kernel learns the size of the path from them. What it notes of each packet
/// for QUIC, the time and the congestion bits, costs time and is not wanted here.
fn allow_fragments(socket: &UdpSocket, v6: bool) -> io::Result<()> {
    use libc::{IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET};
    set(
        socket,
        IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DONT,
    )?;
    set(socket, IPPROTO_IP, libc::IP_RECVTOS, 0)?;
    set(socket, SOL_SOCKET, libc::SO_TIMESTAMPNS, 0)?;
    if v6 {
        set(
            socket,
            IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_WANT,
        )?;
        set(socket, IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
        set(socket, IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 0)?;
    }
    Ok(())
}

#[allow(unsafe_code)]
fn set(
    socket: &UdpSocket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // A few bytes: the cast cannot fail.
    #[allow(clippy::cast_possible_truncation)]
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `socket` is, and the kernel reads one int
    // from where it is told (ip(7), ipv6(7), socket(7)).
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
