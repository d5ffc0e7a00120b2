//! Numbers that the gateway itself has chosen: maps of them, and random ones.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

/// A map from numbers of our own: packet ids, identifiers of subscriptions, random ids.
///
/// The standard library's hash is proof against keys that somebody chose so that they collide,
/// and takes some hundred instructions. Who cannot choose keys needs no such proof.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// 2^64 divided by the golden ratio: spreads what is close together over all bits (Knuth, The
/// Art of Computer Programming, 6.4).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Hashes one number, or several.
#[derive(Default)]
pub struct NumberHasher(u64);

impl NumberHasher {
    fn add(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(GOLDEN);
        // The map takes the place from the low bits, which depend on the low bits alone.
        self.0 = mixed ^ mixed >> 32;
    }
}

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.add((*byte).into());
        }
    }

    fn write_u16(&mut self, number: u16) {
        self.add(number.into());
    }

    fn write_u32(&mut self, number: u32) {
        self.add(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        self.add(number);
    }

    fn write_usize(&mut self, number: usize) {
        self.add(number as u64);
    }
}

/// A random number from 0 to 1, so that many do not do a thing in step. Without randomness it is 0,
/// and merely the same for all.
pub fn fraction() -> f64 {
    let mut random = [0; 2];
    let _ = getrandom::fill(&mut random);
    f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX)
}

/// Between half of `pause` and all of it, so that many who met with the same do not come back in
/// step.
pub fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fraction() / 2.0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasher, BuildHasherDefault};

    use super::*;

    /// As a map of 1,024 places sees them: in how many places so many keys are.
    fn places(keys: impl Iterator<Item = u64>) -> usize {
        let hasher = BuildHasherDefault::<NumberHasher>::default();
        let places = keys.map(|key| hasher.hash_one(key) & 1023);
        places.collect::<HashSet<u64>>().len()
    }

    /// Random ones are in 647 of them on average.
    #[test]
    fn what_follows_one_another_is_spread() {
        for step in [1, 2, 8, 64, 192, 1024, 4096, 1 << 16, 1 << 32] {
            let places = places((0..1024).map(|number| 0x5500_0000_0000 + number * step));
            assert!(places > 550, "{places} places with a step of {step}");
        }
    }
}
