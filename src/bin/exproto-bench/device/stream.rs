//! A device over TCP or TLS.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::{Device, Dialer, Error, welcome};
use crate::frame;
use crate::lanes::Lanes;

/// Room to read into, in bytes, and what is written at once at most.
const CHUNK: usize = 16 * 1024;

/// Runs a device over this connection until it ends.
pub(super) async fn run(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    device: Device,
    dialer: &Dialer,
) {
    let mut inbox = BytesMut::new();
    let limit = dialer.timeout;
    let greeting = greet(&mut reader, &mut writer, &mut inbox, &device);
    let greeted = match timeout(limit, greeting).await {
        Ok(greeted) => greeted,
        Err(_) => Err(Error::NoWelcome(limit)),
    };
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
    // Nobody listens any more where the run was ended.
    let _ = ready.send(greeted);
    if failed {
        return;
    }
    exchange(reader, writer, inbox, number, &lanes, dialer.payload).await;
    lanes.stats.closed.add(1);
}

/// Says hello and waits for the answer.
async fn greet(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    inbox: &mut BytesMut,
    device: &Device,
) -> Result<(), Error> {
    let mut hello = BytesMut::new();
    device.hello(&mut hello);
    writer.write_all(&hello).await?;
    writer.flush().await?;
    loop {
        while let Some(frame) = frame::read(inbox)? {
            if welcome(&frame, device.lanes.run(), device.number)? {
                return Ok(());
            }
        }
        if reader.read_buf(inbox).await? == 0 {
            return Err(Error::Closed);
        }
    }
}

/// Writes what is due and reports what comes, until the connection ends.
async fn exchange(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    mut inbox: BytesMut,
    number: u32,
    lanes: &Lanes,
    payload: usize,
) {
    let mut out = BytesMut::new();
    let mut unflushed = false;
    loop {
        tokio::select! {
            biased;
            read = reader.read_buf(&mut inbox) => match read {
                Ok(0) | Err(_) => return,
                Ok(_) => if !report(&mut inbox, number, lanes) {
                    return;
                },
            },
            wrote = write(&mut writer, &mut out), if unflushed => {
                if wrote.is_err() {
                    return;
                }
                unflushed = false;
            }
            () = lanes.ready(number), if !unflushed => {}
        }
        while out.len() < CHUNK
            && let Some(due) = lanes.take_own(number)
        {
            frame::write_sized(lanes.head(number, due), payload, &mut out);
            unflushed = true;
        }
    }
}

/// Writes all of `out`. Cancel safe: what is written is gone from it.
async fn write(writer: &mut (impl AsyncWrite + Unpin), out: &mut BytesMut) -> io::Result<()> {
    while !out.is_empty() {
        writer.write_buf(out).await?;
    }
    writer.flush().await
}

/// Reports the frames that are whole; `false` where they are none.
fn report(inbox: &mut BytesMut, number: u32, lanes: &Lanes) -> bool {
    loop {
        match frame::read(inbox) {
            Ok(Some(frame)) => lanes.arrived(frame.head, Some(number)),
            Ok(None) => break,
            Err(_) => {
                lanes.stats.unknown.add(1);
                return false;
            }
        }
    }
    if inbox.is_empty() {
        // An idle device holds no buffer.
        *inbox = BytesMut::new();
    }
    true
}
