//! Packet ids of a client's publishes.

use std::collections::VecDeque;

/// Publishes under way at a time: half of all packet ids.
const MOST: u16 = 32_768;

/// The ids that are free, the one that was free for longest first.
pub(super) struct Ids(VecDeque<u16>);

impl Default for Ids {
    fn default() -> Self {
        Self((1..=MOST).collect())
    }
}

impl Ids {
    pub(super) fn free(&self) -> usize {
        self.0.len()
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        self.0.pop_front()
    }

    /// One that the broker has acknowledged.
    pub(super) fn give_back(&mut self, id: u16) {
        // A broker that acknowledges twice must not make it grow.
        if self.0.len() < usize::from(MOST) {
            self.0.push_back(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_used_again_when_it_was_acknowledged() {
        let mut ids = Ids::default();
        let all: Vec<u16> = std::iter::from_fn(|| ids.take()).collect();
        assert_eq!(all.len(), usize::from(MOST));
        assert_eq!((all.first(), ids.free()), (Some(&1), 0));
        ids.give_back(7);
        assert_eq!((ids.take(), ids.take()), (Some(7), None));
    }
}
