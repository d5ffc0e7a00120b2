//! See `crate::fuzzing`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod device;
mod sessions;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::SocketAddr;
use std::time::Instant;

use super::cookie;
use super::hello::{ClientHello, RECORD_HEADER};
use super::psk::Keys;
use super::wire::{MAX_OUTGOING, Records, Wire};
use super::{Gate, Look, Read, Session};
use device::context;
pub use sessions::{dtls_handshake, dtls_session};

const PEER: ([u8; 4], u16) = ([192, 0, 2, 1], 1);

/// A stranger's datagram. Its answer is never longer, with the cookie in it the gate
/// opens, at this address only, and OpenSSL gets to see it.
pub fn dtls_gate(bytes: &[u8]) {
    let now = Instant::now();
    let peer = SocketAddr::from(PEER);
    let mut gate = Gate::new(context(), now).unwrap();
    let answer = match gate.look(now, peer, bytes) {
        Look::Ignored => return,
        Look::Shown(_) => panic!("a cookie was guessed"),
        Look::Answer(answer) => answer,
    };
    assert!(answer.len() <= bytes.len(), "{}", answer.len());
    let (_, cookie) = answer.split_last_chunk::<{ cookie::LENGTH }>().unwrap();
    let Some(again) = with_cookie(bytes, cookie) else {
        return;
    };
    let elsewhere = SocketAddr::from((PEER.0, 2));
    assert!(matches!(gate.look(now, elsewhere, &again), Look::Answer(_)));
    let Look::Shown(shown) = gate.look(now, peer, &again) else {
        panic!("the gate does not take its own cookie");
    };
    let Some(mut session) = gate.accept(&shown) else {
        return;
    };
    assert!(!session.is_established() && !session.is_restart(&again));
    unfinished(&mut session);
    session.close();
    assert!(session.is_closed());
}

/// The same ClientHello as a device would repeat it; `None` where a length would not
/// fit any more.
fn with_cookie(hello: &[u8], cookie: &[u8; cookie::LENGTH]) -> Option<Vec<u8>> {
    let parsed = ClientHello::parse(hello)?;
    let record = Records(hello).next()?;
    let (old, start) = (parsed.cookie.len(), 25 + 2 + 32 + 1);
    let start = start + parsed.session_id.len();
    let mut again = record[..start].to_vec();
    again.push(cookie.len() as u8);
    again.extend(cookie);
    again.extend(&record[start + 1 + old..]);
    let total = u32::from_be_bytes([0, again[14], again[15], again[16]]);
    let total = (total as usize).checked_sub(old)? + cookie.len();
    let body = again.len() - RECORD_HEADER - 12;
    if total >= 1 << 24 {
        return None;
    }
    again[11..13].copy_from_slice(&u16::try_from(body + 12).ok()?.to_be_bytes());
    again[14..17].copy_from_slice(&(total as u32).to_be_bytes()[1..]);
    again[17..19].copy_from_slice(&[0, 1]);
    again[22..25].copy_from_slice(&(body as u32).to_be_bytes()[1..]);
    again.extend(&hello[record.len()..]);
    Some(again)
}

/// Nothing is read from a handshake, and what it has to send is bounded.
fn unfinished(session: &mut Session) {
    assert!(!matches!(session.read(&mut [0; 9]), Read::Data(_)));
    let mut sent = 0;
    while session.next_datagram().is_some() {
        sent += 1;
    }
    assert!(sent <= MAX_OUTGOING);
}

/// Datagrams before OpenSSL: only records that a handshake has get through, whole and
/// in order, and of those that wait for keys only some.
pub fn dtls_wire(bytes: &[u8]) {
    let mut wire = Wire::default();
    let mut early = 0;
    let mut buffer = vec![0; 20_000];
    for (_, datagram) in steps(bytes) {
        wire.push(datagram);
        let mut came = Records(datagram);
        loop {
            let count = match wire.read(&mut buffer) {
                Ok(count) => count,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            };
            let record = &buffer[..count];
            assert!(came.any(|other| other == record));
            let epoch = u16::from_be_bytes([record[3], record[4]]);
            early += u32::from(epoch == 1);
            assert!(record.len() > RECORD_HEADER && epoch <= 1);
            assert!(matches!(record[0], 20..=22));
        }
        assert!(wire.next_record().is_none());
    }
    assert!(early <= 16);
}

/// A file of pre-shared keys: what is read and written again is the same, and a problem
/// names the line and nothing of what is in it.
pub fn psk_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let keys = match Keys::parse(text) {
        Ok(keys) => keys,
        Err(problem) => {
            let (line, problem) = problem.split_once(": ").unwrap();
            let line: usize = line.strip_prefix("line ").unwrap().parse().unwrap();
            assert!((1..=text.lines().count()).contains(&line));
            assert!(problem.len() < 50, "{problem}");
            return;
        }
    };
    let read: BTreeMap<&[u8], &[u8]> = keys.all().collect();
    let mut written = Vec::new();
    for (identity, key) in &read {
        assert_eq!(keys.get(identity), Some(*key));
        written.extend(*identity);
        written.push(b':');
        written.extend(key.iter().flat_map(|b| format!("{b:02X}").into_bytes()));
        written.push(b'\n');
    }
    let again = Keys::parse(std::str::from_utf8(&written).unwrap()).unwrap();
    assert_eq!(again.all().collect::<BTreeMap<_, _>>(), read);
}

/// Steps of a byte that says what to do, two of length and so many bytes.
fn steps(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&[what, high, low], rest) = bytes.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (data, rest) = rest.split_at(length.min(rest.len()));
        bytes = rest;
        Some((what, data))
    })
}
