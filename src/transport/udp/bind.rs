//! The sockets of a listener, one for each shard.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::Options;

/// Binds `count` sockets to one address; port 0 becomes one free port for all of them.
///
/// The kernel gives a datagram to one of them by a hash of its addresses and ports, so
/// a peer stays with its socket for as long as all of them are open.
///
/// # Errors
/// Those of socket(2) and bind(2). An address that anybody has bound already, even with
/// SO_REUSEPORT, is one.
pub fn bind(address: SocketAddr, count: usize, options: &Options) -> io::Result<Vec<UdpSocket>> {
    // Without SO_REUSEPORT at first: the kernel would let two gateways of one user share
    // the port, each with half of the devices. The option is set once the address is
    // ours, which leaves no moment for somebody else.
    let first = open(address, options)?;
    first.bind(&address.into())?;
    let bound = first.local_addr()?;
    let mut sockets = Vec::with_capacity(count);
    if count > 1 {
        first.set_reuse_port(true)?;
    }
    sockets.push(first.into());
    for _ in 1..count {
        let socket = open(address, options)?;
        socket.set_reuse_port(true)?;
        socket.bind(&bound)?;
        sockets.push(socket.into());
    }
    Ok(sockets)
}

fn open(address: SocketAddr, options: &Options) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // [::] is both, whatever the system's default.
        socket.set_only_v6(false)?;
    }
    if let Some(bytes) = options.recbuf {
        socket.set_recv_buffer_size(bytes)?;
        // The kernel cuts silently, and counts double for what it adds itself (socket(7)).
        let granted = socket.recv_buffer_size()? / 2;
        if granted < bytes {
            tracing::warn!(%address, asked = bytes, granted, "recbuf is limited by net.core.rmem_max");
        }
    }
    if let Some(bytes) = options.sndbuf {
        socket.set_send_buffer_size(bytes)?;
    }
    Ok(socket)
}
