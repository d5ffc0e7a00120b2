//! The datagrams that wait for a peer's connection.

use std::collections::VecDeque;
use std::io::Read;

/// Bytes of a length in front of each datagram.
const LENGTH: usize = 4;

/// Datagrams in order, each behind its length in one ring of bytes: that is one
/// allocation for many small ones, and none while there are none.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: VecDeque<u8>,
    datagrams: u32,
}

impl Queue {
    /// What a datagram of this length takes.
    pub fn cost(length: usize) -> usize {
        LENGTH + length
    }

    pub fn datagrams(&self) -> usize {
        self.datagrams as usize
    }

    /// Bytes in it, lengths included.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub fn push(&mut self, datagram: &[u8]) {
        // No datagram is longer than 64 KiB.
        let length = u32::try_from(datagram.len()).unwrap_or(u32::MAX);
        self.bytes.reserve(Self::cost(datagram.len()));
        self.bytes.extend(&length.to_ne_bytes());
        self.bytes.extend(datagram);
        self.datagrams += 1;
    }

    /// Copies the oldest datagram to the start of `buffer` and says its length; what
    /// does not fit is cut off.
    pub fn pop(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let mut length = [0; LENGTH];
        self.bytes.read_exact(&mut length).ok()?;
        let length = u32::from_ne_bytes(length) as usize;
        let count = length.min(buffer.len());
        self.bytes.read_exact(buffer.get_mut(..count)?).ok()?;
        self.bytes.drain(..length - count);
        self.datagrams -= 1;
        if self.datagrams == 0 {
            // An idle peer holds no memory for what it once sent.
            self.bytes = VecDeque::new();
        }
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Like a queue of vectors, whatever the sizes and wherever the ring wraps.
        #[test]
        fn is_first_in_first_out(steps in prop::collection::vec(prop::option::of(0usize..300), 0..200)) {
            let mut queue = Queue::default();
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            for (number, step) in steps.into_iter().enumerate() {
                if let Some(length) = step {
                    let datagram = vec![number as u8; length];
                    queue.push(&datagram);
                    model.push_back(datagram);
                } else {
                    let mut buffer = [0; 200];
                    let popped = queue.pop(&mut buffer).map(|count| buffer[..count].to_vec());
                    let expected = model.pop_front().map(|mut datagram| {
                        datagram.truncate(200);
                        datagram
                    });
                    prop_assert_eq!(popped, expected);
                }
                prop_assert_eq!(queue.datagrams(), model.len());
                prop_assert_eq!(queue.bytes(), model.iter().map(|d| Queue::cost(d.len())).sum::<usize>());
                prop_assert!(queue.datagrams > 0 || queue.bytes.capacity() == 0);
            }
        }
    }
}
