//! Cookies: what a device must repeat to show that it receives at the address it
//! sends from.
//!
//! A cookie is a keyed hash over the address and what the device says about itself,
//! so that nothing is remembered until it comes back.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::memcmp;
use openssl::pkey::{PKey, Private};
use openssl::sign::Signer;

use super::hello::ClientHello;

/// Bytes of a cookie: half of HMAC-SHA256. 128 bits cannot be guessed, small stacks
/// expect no more, and the answer stays shorter than the question.
pub(super) const LENGTH: usize = 16;

/// A secret is replaced after so long and good for as long again. A device answers
/// within seconds; a cookie that somebody collected is worth little an hour later.
pub(super) const ROTATION: Duration = Duration::from_secs(120);

/// The secret of now and the one before.
pub(super) struct Secrets {
    current: PKey<Private>,
    previous: Option<PKey<Private>>,
    made: Instant,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").finish_non_exhaustive()
    }
}

impl Secrets {
    pub fn new(now: Instant) -> Result<Self, ErrorStack> {
        Ok(Self {
            current: fresh()?,
            previous: None,
            made: now,
        })
    }

    /// The cookie for this device.
    pub fn cookie(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        hello: &ClientHello<'_>,
    ) -> Result<[u8; LENGTH], ErrorStack> {
        self.rotate(now)?;
        sign(&self.current, peer, hello)
    }

    /// Whether the device has the cookie that it was given.
    pub fn verify(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        hello: &ClientHello<'_>,
    ) -> Result<bool, ErrorStack> {
        self.rotate(now)?;
        if hello.cookie.len() != LENGTH {
            return Ok(false);
        }
        for secret in std::iter::once(&self.current).chain(&self.previous) {
            if memcmp::eq(&sign(secret, peer, hello)?, hello.cookie) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn rotate(&mut self, now: Instant) -> Result<(), ErrorStack> {
        let age = now.saturating_duration_since(self.made);
        if age < ROTATION {
            return Ok(());
        }
        let old = std::mem::replace(&mut self.current, fresh()?);
        // After a long silence the last secret is too old as well.
        self.previous = (age < 2 * ROTATION).then_some(old);
        self.made = now;
        Ok(())
    }
}

fn fresh() -> Result<PKey<Private>, ErrorStack> {
    let mut secret = [0; 32];
    openssl::rand::rand_priv_bytes(&mut secret)?;
    PKey::hmac(&secret)
}

fn sign(
    secret: &PKey<Private>,
    peer: SocketAddr,
    hello: &ClientHello<'_>,
) -> Result<[u8; LENGTH], ErrorStack> {
    let mut signer = Signer::new(MessageDigest::sha256(), secret)?;
    // Fixed lengths but for the last part: no two inputs make the same bytes.
    let address = match peer.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    signer.update(&address.octets())?;
    signer.update(&peer.port().to_be_bytes())?;
    signer.update(&hello.version)?;
    signer.update(&hello.random)?;
    signer.update(hello.session_id)?;
    let mut hash = [0; 32];
    signer.sign(&mut hash)?;
    let mut cookie = [0; LENGTH];
    cookie.copy_from_slice(hash.split_at(LENGTH).0);
    Ok(cookie)
}
