//! Gives back to the system what a burst has used.
//!
//! A storm of connections or callbacks leaves the allocator with free memory between
//! what lives on. glibc keeps it, for it might be used again, and would for ever. mimalloc,
//! which the gateway's program has, gives it back by itself; what is glibc's there are the
//! sessions and handshakes of C libraries.

/// Free memory in the allocator's hands that is worth giving back, in bytes.
#[cfg(target_env = "gnu")]
const WORTHWHILE: u32 = 8 * 1024 * 1024;

/// Gives back what is free, if it is much and more than a fourth of what is in use.
///
/// Takes some milliseconds then, during which other threads may wait for memory; else
/// some microseconds. Call it now and then.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn tidy() {
    // Not mallinfo2, which a glibc before 2.33 does not have: beyond 4 GiB the numbers
    // begin anew, and memory is given back once too often or later.
    // SAFETY: takes nothing and returns numbers (mallinfo(3)).
    let state = unsafe { libc::mallinfo() };
    let free = state.fordblks.cast_unsigned();
    if free > WORTHWHILE && free > state.uordblks.cast_unsigned() / 4 {
        // SAFETY: takes the number of bytes to keep at the top of the heap
        // (malloc_trim(3)); memory that is in use is not touched.
        unsafe { libc::malloc_trim(0) };
    }
}

/// Other allocators do so by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn tidy() {}
