//! See `crate::hot`.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;

use super::*;

/// Two ends that share keys, the one's for the other's.
pub(super) fn pair(suite: &str) -> (Records, Records) {
    let (cipher, key_length, tag) = algorithm(suite).unwrap();
    let salt = if cipher.contains("ChaCha") { NONCE } else { 4 };
    let key = |byte| Key {
        key: vec![byte; key_length],
        salt: vec![byte; salt],
    };
    let end = |ours, theirs| Records {
        cipher: Cipher::fetch(None, cipher, None).unwrap(),
        ccm: cipher.ends_with("CCM"),
        tag,
        ours: key(ours),
        theirs: key(theirs),
        next_number: 1,
        seen: Window::default(),
    };
    (end(1, 2), end(2, 1))
}

const SUITE: &str = "AES128-GCM-SHA256";

pub(crate) fn dtls_sealed() -> Box<dyn FnMut()> {
    let (mut one, _) = pair(SUITE);
    Box::new(move || drop(black_box(one.seal(APPLICATION_DATA, &[7; 64]).unwrap())))
}

pub(crate) fn dtls_opened() -> Box<dyn FnMut()> {
    let (mut one, mut other) = pair(SUITE);
    let record = one.seal(APPLICATION_DATA, &[7; 64]).unwrap();
    let mut buffer = vec![0; MAX_MESSAGE];
    Box::new(move || {
        // The same one would be a repeated one.
        other.seen = Window::default();
        let opened = other.open(&record, &mut buffer);
        assert_eq!(black_box(opened), Some((APPLICATION_DATA, 64)));
    })
}
