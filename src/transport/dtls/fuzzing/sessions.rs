//! Hostile datagrams for a session, in the midst of a handshake and after it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Instant;

use bytes::Bytes;

use super::device::{Device, SUITES, context, read};
use super::{PEER, Records, steps, unfinished};
use crate::transport::dtls::{Gate, MAX_MESSAGE, Offer, Read, Session};

/// A device and its session, the address shown and nothing else.
fn begun(suite: u8) -> (Device, Box<Session>) {
    let now = Instant::now();
    let mut gate = Gate::new(context(), now).unwrap();
    let mut device = Device::new(usize::from(suite) % SUITES.len());
    device.go_on();
    let first = device.next_datagram().unwrap();
    let Offer::Answer(answer) = gate.offer(now, PEER.into(), &first) else {
        panic!("no cookie");
    };
    device.receive(&answer);
    device.go_on();
    let hello = device.next_datagram().unwrap();
    match gate.offer(now, PEER.into(), &hello) {
        Offer::Accepted(session) => (device, session),
        other => panic!("{other:?}"),
    }
}

/// Datagrams go back and forth until nobody has one. Says whether both are done.
fn exchange(device: &mut Device, session: &mut Session) -> bool {
    for _ in 0..10 {
        while let Some(datagram) = session.next_datagram() {
            device.receive(&datagram);
        }
        let done = device.go_on();
        while let Some(datagram) = device.next_datagram() {
            session.receive(&datagram);
        }
        if done && session.is_established() {
            return true;
        }
    }
    false
}

/// Changes bytes: two of place and one of difference for each.
fn changed(datagram: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut changed = datagram.to_vec();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_be_bytes([change[0], change[1]]));
        let length = changed.len();
        if let Some(byte) = changed.get_mut(at % length) {
            *byte ^= change[2];
        }
    }
    changed
}

/// The first byte chooses the cipher suite; then steps in the midst of the handshake.
/// In the clear a stranger can end it, but in good order: nothing is read, what is sent
/// is bounded, and when it is done all the same the session carries messages.
pub fn dtls_handshake(bytes: &[u8]) {
    let Some((suite, bytes)) = bytes.split_first() else {
        return;
    };
    let (mut device, mut session) = begun(*suite);
    let mut waiting: Vec<Bytes> = Vec::new();
    // More would be a flood, which has a test of its own.
    for (what, data) in steps(bytes).take(40) {
        match what % 5 {
            0 => session.receive(data),
            // The device is up to date and has more to say.
            1 => {
                while let Some(datagram) = session.next_datagram() {
                    device.receive(&datagram);
                }
                device.go_on();
                waiting.extend(std::iter::from_fn(|| device.next_datagram()));
            }
            2 if !waiting.is_empty() => session.receive(&waiting.remove(0)),
            3 => {
                if let Some(datagram) = waiting.first().filter(|d| !d.is_empty()) {
                    session.receive(&changed(datagram, data));
                }
            }
            _ => session.elapsed(),
        }
        let _ = session.is_restart(data);
        if !session.is_established() {
            assert!(!matches!(session.read(&mut [0; 9]), Read::Data(_)));
        }
        if session.is_closed() {
            assert!(session.failure().is_some());
            break;
        }
    }
    for datagram in waiting {
        session.receive(&datagram);
    }
    if exchange(&mut device, &mut session) {
        alive(&mut device, &mut session);
    } else if !session.is_established() {
        unfinished(&mut session);
        session.close();
        assert_eq!(session.next_datagram(), None);
    }
    session.receive(bytes);
}

/// The first byte chooses the cipher suite; then steps between both of an established
/// session. Nothing but the device's own records has an effect.
pub fn dtls_session(bytes: &[u8]) {
    let Some((suite, bytes)) = bytes.split_first() else {
        return;
    };
    let (mut device, mut session) = begun(*suite);
    assert!(exchange(&mut device, &mut session), "{session:?}");
    let mut last = None;
    for (what, data) in steps(bytes).take(40) {
        let message = &data[..data.len().min(MAX_MESSAGE)];
        match what % 6 {
            0 => without_effect(&mut session, data),
            // OpenSSL, the device here, neither sends nor shows empty messages.
            1 | 3 if data.is_empty() => {}
            1 => {
                let datagram = device.message(message);
                let other = changed(&datagram, data);
                if other != datagram[..] {
                    without_effect(&mut session, &other);
                }
                session.receive(&datagram);
                assert_eq!(read(&mut session).unwrap(), message);
                last = Some(datagram);
            }
            2 => {
                if let Some(last) = &last {
                    without_effect(&mut session, last);
                }
            }
            3 => {
                session.write(message).unwrap();
                device.receive(&session.next_datagram().unwrap());
                assert_eq!(device.read().unwrap(), message);
            }
            // Behind records that are none of its own, in one datagram.
            4 if Records(data).map(<[u8]>::len).sum::<usize>() == data.len() => {
                let good = device.message(b"behind");
                session.receive(&[data, &good].concat());
                assert_eq!(read(&mut session).unwrap(), b"behind");
            }
            _ => assert!(!session.is_restart(data) || data.len() >= 61),
        }
    }
    alive(&mut device, &mut session);
    session.receive(&device.goodbye());
    assert_eq!(session.read(&mut [0; 9]), Read::Closed);
    assert!(session.is_closed() && session.failure().is_none());
    session.receive(bytes);
    session.close();
    assert_eq!(session.read(&mut [0; 9]), Read::Closed);
}

fn without_effect(session: &mut Session, datagram: &[u8]) {
    session.receive(datagram);
    assert_eq!(read(session), None);
    assert_eq!(session.next_datagram(), None);
    assert!(session.is_established());
}

/// The session carries messages, both ways.
fn alive(device: &mut Device, session: &mut Session) {
    while read(session).is_some() {}
    while session.next_datagram().is_some() {}
    session.receive(&device.message(b"ping"));
    assert_eq!(read(session).unwrap(), b"ping");
    session.write(b"pong").unwrap();
    device.receive(&session.next_datagram().unwrap());
    assert_eq!(device.read().unwrap(), b"pong");
}
