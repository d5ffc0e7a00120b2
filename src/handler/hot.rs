//! See `crate::hot`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use super::CallFailure;
use super::ledger::{ConnKey, End, Ledger, Limits, Output, StreamId};

/// A handler that is told nothing; remembers which stream is to be answered.
#[derive(Default)]
struct Silent {
    ended: Option<StreamId>,
}

impl Output<usize> for Silent {
    fn open(&mut self, _: StreamId) {}

    fn hold(&mut self, _: &mut usize) {}

    fn write(&mut self, _: StreamId, _: &mut usize, _: bool) {}

    fn end(&mut self, stream: StreamId) {
        self.ended = Some(stream);
    }

    fn try_alone(&mut self, _: ConnKey, _: Vec<usize>) {}

    fn settle(&mut self, _: usize, _: Result<(), CallFailure>) {}
}

/// An entry of one of 200 connections in turn; so many make a stream, which then ends and
/// is answered.
fn ledger(most: usize) -> Box<dyn FnMut()> {
    let mut ledger = Ledger::new(Limits {
        max_messages: most,
        max_bytes: 256 * 1024,
        max_age: Duration::from_secs(1),
        hurry: 32,
        patience: Duration::from_secs(10),
        at_least_once: true,
    });
    let mut out = Silent::default();
    let (now, mut number) = (Instant::now(), 0);
    Box::new(move || {
        number += 1;
        // Addresses, as those of callers are.
        let conn = ConnKey(0x5500_0000_0000 + (number % 200) * 192);
        ledger.push(conn, 112, number, now, &mut out);
        if let Some(stream) = out.ended.take() {
            ledger.ended(stream, End::Taken, now, &mut out);
        }
    })
}

pub(crate) fn ledger_short() -> Box<dyn FnMut()> {
    ledger(16)
}

pub(crate) fn ledger_long() -> Box<dyn FnMut()> {
    ledger(1024)
}
