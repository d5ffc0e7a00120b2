//! What a person sees: lines on standard output, written by a thread of their own.
//!
//! A terminal can be paused, a pipe left unread. Nothing here waits for that: when
//! too much is waiting to be seen, lines are left out.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Texts that wait to be written.
const MAX_WAITING: usize = 1024;

/// Longest piece of somebody's text that is shown, in characters.
const MAX_SHOWN: usize = 200;

/// Longest wait at the end for what is still to be written.
const GRACE: Duration = Duration::from_secs(1);

/// Shows texts in the order in which they are said. Cheap to clone.
#[derive(Clone)]
pub(super) struct Terminal(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<String>,
    left_out: usize,
    writing: bool,
}

impl Terminal {
    /// Starts the thread. It ends with the process.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let writer = shared.clone();
        std::thread::Builder::new()
            .name("terminal".to_owned())
            .spawn(move || writer.write_for_ever())?;
        Ok(Self(shared))
    }

    /// Shows a text and ends its line.
    pub(super) fn say(&self, text: &str) {
        let mut state = self.0.lock();
        if state.waiting.len() < MAX_WAITING {
            state.waiting.push_back(format!("{text}\n"));
        } else {
            state.left_out += 1;
        }
        self.0.changed.notify_all();
    }

    /// Waits until all is written, for a second at most.
    pub(super) fn finish(&self) {
        let state = self.0.lock();
        let busy = |state: &mut State| state.writing || !state.waiting.is_empty();
        // Whoever does not read by then goes without.
        drop(self.0.changed.wait_timeout_while(state, GRACE, busy));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_for_ever(&self) {
        let mut state = self.lock();
        loop {
            state = self
                .changed
                .wait_while(state, |state| state.waiting.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            let mut text = String::new();
            for waiting in state.waiting.drain(..) {
                text.push_str(&waiting);
            }
            match std::mem::take(&mut state.left_out) {
                0 => {}
                count => text.push_str(&format!("  ({count} lines are left out)\n")),
            }
            state.writing = true;
            drop(state);
            // A reader that has gone, such as `head`, is no failure of ours.
            let mut out = io::stdout().lock();
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            drop(out);
            state = self.lock();
            state.writing = false;
            self.changed.notify_all();
        }
    }
}

/// Somebody's bytes as text that cannot steer a terminal, cut to a bearable length.
pub(super) fn shown(bytes: &[u8]) -> String {
    // A character has 4 bytes at most: no more than this is ever needed.
    let head = bytes.get(..MAX_SHOWN * 4).unwrap_or(bytes);
    let text = String::from_utf8_lossy(head);
    let mut shown = String::new();
    for character in text.chars().take(MAX_SHOWN) {
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    if text.chars().nth(MAX_SHOWN).is_some() || head.len() < bytes.len() {
        shown.push_str(&format!("... ({} bytes)", bytes.len()));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_cannot_steer_the_terminal() {
        assert_eq!(shown(b"it's \"5\" \\"), "it's \"5\" \\");
        assert_eq!(shown("t=21 \u{e9}".as_bytes()), "t=21 \u{e9}");
        assert_eq!(shown(b"\x1b[2J\r\0"), "\\u{1b}[2J\\r\\0");
        assert_eq!(shown("\u{202e}x".as_bytes()), "\\u{202e}x");
        assert_eq!(shown(b"\xff"), "\u{fffd}");
    }

    #[test]
    fn long_texts_are_cut() {
        let long = "x".repeat(MAX_SHOWN);
        assert_eq!(shown(long.as_bytes()), long);
        let longer = format!("{long}y");
        assert_eq!(shown(longer.as_bytes()), format!("{long}... (201 bytes)"));
        let large = "x".repeat(100_000);
        assert!(shown(large.as_bytes()).ends_with("... (100000 bytes)"));
    }
}
