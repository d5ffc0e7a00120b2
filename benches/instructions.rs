//! Instructions of the functions that every message goes through, counted by callgrind:
//! `scripts/instructions.py`, which runs this, compares with `benches/instructions.txt`.
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect=instructions::counted_region \
//!     --dump-after=instructions::counted_region instructions
//! ```
//!
//! Each function is called some times uncounted, for what is allocated once, and then
//! [`ROUNDS`] times within `counted_region`, upon whose end callgrind writes a file. Prints the
//! names in the order of the files.
//!
//! A word on the command line chooses those with it in their names.

#![allow(missing_docs)]

use exproto_sidecar::hot::{FUNCTIONS, Work};

/// Calls that are counted: as many as even out what happens now and then, such as a
/// table that grows.
const ROUNDS: u32 = 4096;

/// Its name is what callgrind is told to count.
#[inline(never)]
fn counted_region(work: &mut Work, rounds: u32) {
    for _ in 0..rounds {
        work();
    }
}

fn main() {
    // What begins with a dash is cargo's.
    let wanted = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    println!("rounds {ROUNDS}");
    for (name, make) in FUNCTIONS {
        if wanted.as_ref().is_some_and(|wanted| !name.contains(wanted)) {
            continue;
        }
        let mut work = make();
        (0..ROUNDS).for_each(|_| work());
        counted_region(&mut work, ROUNDS);
        println!("{name}");
    }
}
