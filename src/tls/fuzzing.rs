//! See `crate::fuzzing`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use super::Subject;

/// A certificate in DER. Its names are bounded by its size, and more or less than a
/// certificate is none.
pub fn certificate(bytes: &[u8]) {
    let Some(subject) = Subject::of(bytes) else {
        return;
    };
    assert!(subject.cn.len() <= 3 * bytes.len());
    // A byte is at most `\xx` in a text, and some more in an OID that is not known.
    assert!(subject.dn.len() <= 8 * bytes.len(), "{}", subject.dn);
    assert_eq!(Subject::of(&[bytes, &[0]].concat()), None);
    assert_eq!(Subject::of(&bytes[..bytes.len() - 1]), None);
}
