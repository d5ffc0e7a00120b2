//! W3C Trace Context: the header `traceparent`.

use std::fmt::Write;

use tonic::metadata::{Ascii, MetadataValue};

/// The header's name.
pub(super) const KEY: &str = "traceparent";

/// The header of a new trace, which asks to be recorded: version, trace id, the id of
/// this call, flags. `None` where the system gives no randomness.
pub(super) fn parent() -> Option<MetadataValue<Ascii>> {
    let mut random = [0; 24];
    getrandom::fill(&mut random).ok()?;
    let (trace, call) = random.split_at(16);
    MetadataValue::try_from(format!("00-{}-{}-01", hex(trace), hex(call))).ok()
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
