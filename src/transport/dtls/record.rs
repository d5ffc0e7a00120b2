//! Records of an established session (RFC 6347, 4.1, with the ciphers of RFC 5288, 6655
//! and 7905), in and out.
//!
//! OpenSSL does the handshake and all cryptography. An `SSL` that has done its
//! handshake keeps some 60 KiB for every device and ends a session over records that
//! anybody could have sent (one shorter than the cipher's own bytes, 3.6.3). What is
//! left to do, one call of an AEAD cipher and a window of numbers seen, is done here
//! with some hundred bytes, and no record but a good one has any effect.

pub(crate) mod hot;

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use openssl::ssl::SslRef;

use super::MAX_MESSAGE;
use super::hello::RECORD_HEADER;

pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const APPLICATION_DATA: u8 = 23;

const VERSION_1_2: [u8; 2] = [0xfe, 0xfd];

/// Everything after the handshake is of epoch 1: there is no renegotiation.
const EPOCH: [u8; 2] = [0, 1];

const NONCE: usize = 12;

/// The highest number that fits into a record (48 bits).
const MAX_NUMBER: u64 = (1 << 48) - 1;

/// One side's key.
#[derive(Default)]
struct Key {
    key: Vec<u8>,
    /// The part of the nonce that is not sent: 4 bytes, 12 with ChaCha20.
    salt: Vec<u8>,
}

/// Keys and counters of an established session.
pub(super) struct Records {
    cipher: Cipher,
    ccm: bool,
    tag: usize,
    ours: Key,
    theirs: Key,
    /// Of the next record that is sent.
    next_number: u64,
    seen: Window,
}

impl Records {
    /// Takes over from a handshake that is done. `next_number` is what follows the
    /// Finished that was sent. `None` for a cipher suite that is not known here.
    pub fn take_over(ssl: &SslRef, next_number: u64) -> Result<Option<Self>, ErrorStack> {
        let (Some(suite), Some(session)) = (ssl.current_cipher(), ssl.session()) else {
            return Ok(None);
        };
        let name = suite.name();
        let Some((cipher, key_length, tag)) = algorithm(name) else {
            return Ok(None);
        };
        let salt_length = if cipher.contains("ChaCha") { NONCE } else { 4 };
        let hash = if name.ends_with("SHA384") {
            MessageDigest::sha384()
        } else {
            MessageDigest::sha256()
        };
        let mut master = [0; 48];
        session.master_key(&mut master);
        // RFC 5246, 6.3: the server's random comes first here.
        let mut seed = [0; 64];
        let (server, client) = seed.split_at_mut(32);
        ssl.server_random(server);
        ssl.client_random(client);
        let length = 2 * (key_length + salt_length);
        let block = expand(hash, &master, b"key expansion", &seed, length)?;
        let (keys, salts) = block.split_at(2 * key_length);
        let (their_key, our_key) = keys.split_at(key_length);
        let (their_salt, our_salt) = salts.split_at(salt_length);
        let key = |key: &[u8], salt: &[u8]| Key {
            key: key.to_vec(),
            salt: salt.to_vec(),
        };
        Ok(Some(Self {
            cipher: Cipher::fetch(None, cipher, None)?,
            ccm: cipher.ends_with("CCM"),
            tag,
            ours: key(our_key, our_salt),
            theirs: key(their_key, their_salt),
            next_number,
            seen: Window::default(),
        }))
    }

    /// The record that carries this, a datagram of its own.
    pub fn seal(&mut self, kind: u8, content: &[u8]) -> Result<Vec<u8>, ErrorStack> {
        if self.next_number > MAX_NUMBER || content.len() > MAX_MESSAGE {
            return Err(ErrorStack::get());
        }
        let number = number(self.next_number);
        self.next_number += 1;
        let explicit = self.explicit_nonce();
        let length = (explicit + content.len() + self.tag) as u16;
        let mut record = Vec::with_capacity(RECORD_HEADER + usize::from(length));
        record.push(kind);
        record.extend(VERSION_1_2);
        record.extend(number);
        record.extend(length.to_be_bytes());
        if explicit > 0 {
            record.extend(number);
        }
        let start = record.len();
        record.resize(start + content.len() + self.tag, 0);
        let (_, body) = record.split_at_mut(start);
        let (sealed, tag) = body.split_at_mut(content.len());

        let mut context = CipherCtx::new()?;
        context.encrypt_init(Some(&self.cipher), None, None)?;
        context.set_iv_length(NONCE)?;
        if self.ccm {
            context.set_tag_length(self.tag)?;
        }
        let nonce = nonce(&self.ours, number);
        context.encrypt_init(None, Some(&self.ours.key), Some(&nonce))?;
        if self.ccm {
            context.set_data_len(content.len())?;
        }
        context.cipher_update(&additional_data(kind, number, content.len()), None)?;
        context.cipher_update(content, Some(sealed))?;
        context.cipher_final(&mut [])?;
        context.tag(tag)?;
        Ok(record)
    }

    /// Opens a record into `buffer`, which has `MAX_MESSAGE` bytes; gives its kind and
    /// the length of what was in it. `None` for everything that is not new and the
    /// peer's.
    pub fn open(&mut self, record: &[u8], buffer: &mut [u8]) -> Option<(u8, usize)> {
        let (header, body) = record.split_first_chunk::<RECORD_HEADER>()?;
        let [kind, major, minor, rest @ ..] = *header;
        let (number, length) = rest.split_first_chunk::<8>()?;
        let number = *number;
        let whole = length == (u16::try_from(body.len()).ok()?).to_be_bytes();
        if !whole || [major, minor] != VERSION_1_2 || number.first_chunk() != Some(&EPOCH) {
            return None;
        }
        let counted = u64::from_be_bytes(number) & MAX_NUMBER;
        let (_, sealed) = body.split_at_checked(self.explicit_nonce())?;
        let length = sealed.len().checked_sub(self.tag)?;
        if length > MAX_MESSAGE || !self.seen.is_new(counted) {
            return None;
        }
        let (sealed, tag) = sealed.split_at(length);
        let buffer = buffer.get_mut(..length)?;
        // Everybody sends the number as the nonce, and nobody must (RFC 5288, 3).
        let nonce = match self.explicit_nonce() {
            0 => nonce(&self.theirs, number),
            explicit => nonce(&self.theirs, *body.split_at(explicit).0.first_chunk()?),
        };
        let opened = self.decrypt(kind, number, &nonce, sealed, tag, buffer);
        if opened.is_err() {
            return None;
        }
        self.seen.insert(counted);
        Some((kind, length))
    }

    fn decrypt(
        &self,
        kind: u8,
        number: [u8; 8],
        nonce: &[u8; NONCE],
        sealed: &[u8],
        tag: &[u8],
        buffer: &mut [u8],
    ) -> Result<(), ErrorStack> {
        let mut context = CipherCtx::new()?;
        context.decrypt_init(Some(&self.cipher), None, None)?;
        context.set_iv_length(NONCE)?;
        // CCM wants it before the key.
        context.set_tag(tag)?;
        context.decrypt_init(None, Some(&self.theirs.key), Some(nonce))?;
        if self.ccm {
            context.set_data_len(sealed.len())?;
        }
        context.cipher_update(&additional_data(kind, number, sealed.len()), None)?;
        context.cipher_update(sealed, Some(buffer))?;
        if !self.ccm {
            // CCM has checked the tag already, and knows no end.
            context.cipher_final(&mut [])?;
        }
        Ok(())
    }

    /// Bytes of the nonce that are sent.
    fn explicit_nonce(&self) -> usize {
        NONCE - self.ours.salt.len()
    }
}

/// OpenSSL's cipher, the length of its key and of the tag, of a suite by OpenSSL's name.
fn algorithm(suite: &str) -> Option<(&'static str, usize, usize)> {
    Some(match suite {
        _ if suite.ends_with("AES128-GCM-SHA256") => ("AES-128-GCM", 16, 16),
        _ if suite.ends_with("AES256-GCM-SHA384") => ("AES-256-GCM", 32, 16),
        _ if suite.ends_with("CHACHA20-POLY1305") => ("ChaCha20-Poly1305", 32, 16),
        _ if suite.ends_with("AES128-CCM") => ("AES-128-CCM", 16, 16),
        _ if suite.ends_with("AES256-CCM") => ("AES-256-CCM", 32, 16),
        _ if suite.ends_with("AES128-CCM8") => ("AES-128-CCM", 16, 8),
        _ if suite.ends_with("AES256-CCM8") => ("AES-256-CCM", 32, 8),
        _ => return None,
    })
}

/// Epoch and number, as they stand in a record.
fn number(counted: u64) -> [u8; 8] {
    (counted | 1 << 48).to_be_bytes()
}

/// RFC 5288, 3 and RFC 6655, 3: salt and number; RFC 7905, 2: one upon the other.
fn nonce(key: &Key, number: [u8; 8]) -> [u8; NONCE] {
    let mut nonce = [0; NONCE];
    let (start, end) = nonce.split_at_mut(NONCE - number.len());
    end.copy_from_slice(&number);
    if key.salt.len() == NONCE {
        for (byte, salt) in nonce.iter_mut().zip(&key.salt) {
            *byte ^= salt;
        }
    } else {
        start.copy_from_slice(&key.salt);
    }
    nonce
}

/// RFC 5246, 6.2.3.3.
fn additional_data(kind: u8, number: [u8; 8], length: usize) -> [u8; 13] {
    let [a, b, c, d, e, f, g, h] = number;
    let [major, minor] = VERSION_1_2;
    let [high, low] = (length as u16).to_be_bytes();
    [a, b, c, d, e, f, g, h, kind, major, minor, high, low]
}

/// The PRF of TLS 1.2 (RFC 5246, 5).
fn expand(
    hash: MessageDigest,
    secret: &[u8],
    label: &[u8],
    seed: &[u8],
    length: usize,
) -> Result<Vec<u8>, ErrorStack> {
    let secret = PKey::hmac(secret)?;
    let hmac = |parts: &[&[u8]]| {
        let mut signer = Signer::new(hash, &secret)?;
        for part in parts {
            signer.update(part)?;
        }
        signer.sign_to_vec()
    };
    let mut a = hmac(&[label, seed])?;
    let mut output = Vec::new();
    while output.len() < length {
        output.extend(hmac(&[&a, label, seed])?);
        a = hmac(&[&a])?;
    }
    output.truncate(length);
    Ok(output)
}

/// Which numbers have come: all below the window count as seen (RFC 6347, 4.1.2.6).
#[derive(Debug, Default, Clone, Copy)]
struct Window {
    /// One above the highest seen.
    end: u64,
    /// The lowest bit is the highest number seen.
    bits: u64,
}

impl Window {
    fn is_new(self, number: u64) -> bool {
        match self.end.checked_sub(number + 1) {
            None => true,
            Some(back) => back < 64 && self.bits >> back & 1 == 0,
        }
    }

    fn insert(&mut self, number: u64) {
        if let Some(back) = self.end.checked_sub(number + 1) {
            self.bits |= 1_u64.checked_shl(back.min(64) as u32).unwrap_or(0);
        } else {
            let ahead = number + 1 - self.end;
            self.bits = self.bits.checked_shl(ahead.min(64) as u32).unwrap_or(0) | 1;
            self.end = number + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::hot::pair;
    use super::*;

    /// The vector for P_SHA256 of the IETF's TLS list (2009), which everybody uses.
    #[test]
    fn the_prf_is_that_of_tls_1_2() {
        let secret = hex("9bbe436ba940f017b17652849a71db35");
        let seed = hex("a0ba9f936cda311827a6f796ffd5198c");
        let output = expand(MessageDigest::sha256(), &secret, b"test label", &seed, 100).unwrap();
        assert_eq!(output[..16], hex("e3f229ba727be17b8d122620557cd453"));
        assert_eq!(output.len(), 100);
    }

    #[test]
    fn what_is_sealed_is_opened_once_and_by_the_other_end() {
        for suite in [
            "AES128-GCM-SHA256",
            "CHACHA20-POLY1305",
            "AES128-CCM",
            "AES128-CCM8",
        ] {
            let (mut one, mut other) = pair(suite);
            let mut buffer = vec![0; MAX_MESSAGE];
            for content in [&b""[..], b"x", &[7; MAX_MESSAGE]] {
                let record = one.seal(APPLICATION_DATA, content).unwrap();
                assert_eq!(one.open(&record, &mut buffer), None, "{suite}: its own");
                for end in 0..record.len().min(60) {
                    assert_eq!(other.open(&record[..end], &mut buffer), None, "{suite}");
                }
                for at in 0..record.len().min(60) {
                    let mut changed = record.clone();
                    changed[at] ^= 1;
                    assert_eq!(
                        other.open(&changed, &mut buffer),
                        None,
                        "{suite}: byte {at}"
                    );
                }
                let opened = Some((APPLICATION_DATA, content.len()));
                assert_eq!(other.open(&record, &mut buffer), opened, "{suite}");
                assert_eq!(&buffer[..content.len()], content);
                assert_eq!(other.open(&record, &mut buffer), None, "{suite}: again");
            }
            one.seal(APPLICATION_DATA, &[7; MAX_MESSAGE + 1])
                .unwrap_err();
            one.next_number = MAX_NUMBER + 1;
            one.seal(APPLICATION_DATA, b"x").unwrap_err();
        }
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    proptest! {
        #[test]
        fn the_window_is_a_set_with_a_lower_end(
            numbers in prop::collection::vec(0_u64..400, 0..200),
            far in 0_u64..MAX_NUMBER,
        ) {
            let (mut window, mut seen) = (Window::default(), BTreeSet::new());
            for number in numbers.into_iter().chain([far, far.saturating_sub(63), far]) {
                let highest = seen.last().copied().unwrap_or(0);
                let new = !seen.contains(&number) && number + 64 > highest;
                prop_assert_eq!(window.is_new(number), new, "{} after {:?}", number, seen);
                if new {
                    window.insert(number);
                    seen.insert(number);
                }
            }
        }
    }
}
