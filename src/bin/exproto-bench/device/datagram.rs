//! A device over UDP or DTLS: a frame is a datagram.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::dtls;
use super::{Device, Dialer, Error, welcome};
use crate::frame;
use crate::lanes::Lanes;

/// Largest datagram, in bytes.
pub(super) const MAX_DATAGRAM: usize = 65_535;

/// Pause before a hello is said again: its datagram, or the answer's, may be lost.
const PAUSE: Duration = Duration::from_secs(1);

/// What a device writes before it looks whether something came.
const BATCH: usize = 16;

/// A connected socket, with DTLS above it or without.
pub(super) enum Link {
    Plain(UdpSocket),
    Dtls(dtls::Session),
}

impl Link {
    /// Waits for a datagram. Cancel safe.
    async fn receive(&mut self) -> io::Result<Bytes> {
        match self {
            Self::Dtls(session) => session.receive().await,
            Self::Plain(socket) => {
                let mut buffer = BytesMut::with_capacity(2048);
                loop {
                    socket.readable().await?;
                    buffer.reserve(MAX_DATAGRAM);
                    match socket.try_recv_buf(&mut buffer) {
                        Ok(_) => return Ok(buffer.freeze()),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    /// Sends a datagram. It waits for the kernel alone, never for the gateway.
    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.send(datagram).await.map(|_| ()),
            Self::Dtls(session) => session.send(datagram).await,
        }
    }
}

/// Runs a device over this link until it ends.
pub(super) async fn run(mut link: Link, device: Device, dialer: &Dialer) {
    let greeted = greet(&mut link, &device, dialer.timeout).await;
    let Device {
        number,
        lanes,
        ready,
        ..
    } = device;
    let failed = greeted.is_err();
    if failed {
        lanes.stats.refused.add(1);
    }
    let _ = ready.send(greeted);
    if failed {
        return;
    }
    // An error ends it: that of a gateway that has gone, as the system reports it.
    let _ = exchange(link, number, &lanes, dialer.payload).await;
    lanes.stats.closed.add(1);
}

async fn greet(link: &mut Link, device: &Device, limit: Duration) -> Result<(), Error> {
    let mut hello = BytesMut::new();
    device.hello(&mut hello);
    let end = Instant::now() + limit;
    loop {
        link.send(&hello).await?;
        let again = end.min(Instant::now() + PAUSE);
        while let Ok(datagram) = timeout_at(again, link.receive()).await {
            let frame = frame::read_one(datagram?)?;
            if welcome(&frame, device.lanes.run(), device.number)? {
                return Ok(());
            }
        }
        if Instant::now() >= end {
            return Err(match link {
                Link::Plain(_) => Error::Silent(limit),
                Link::Dtls(_) => Error::NoWelcome(limit),
            });
        }
    }
}

async fn exchange(mut link: Link, number: u32, lanes: &Lanes, payload: usize) -> io::Result<()> {
    let mut out = BytesMut::new();
    loop {
        tokio::select! {
            biased;
            datagram = link.receive() => match frame::read_one(datagram?) {
                // The answer to a greeting that was sent again.
                Ok(frame) if matches!(welcome(&frame, lanes.run(), number), Ok(true)) => {}
                Ok(frame) => lanes.arrived(frame.head, Some(number)),
                Err(_) => lanes.stats.unknown.add(1),
            },
            () = lanes.ready(number) => {}
        }
        for _ in 0..BATCH {
            let Some(due) = lanes.take_own(number) else {
                break;
            };
            out.clear();
            frame::write_sized(lanes.head(number, due), payload, &mut out);
            link.send(&out).await?;
        }
    }
}
