//! The buffer that sockets are read into: one for each thread, so that an idle
//! connection holds none.

use std::cell::RefCell;

/// Its size: the most bytes read at once, and room for any datagram.
pub const READ_CHUNK: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_CHUNK].into_boxed_slice());
}

/// Runs `read` with the thread's buffer. Never call it from within `read`.
pub fn with_scratch<R>(read: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| read(scratch))
}
