//! Hashes of passwords: argon2id and bcrypt, checked off the threads that serve connections.

use std::str::FromStr;
use std::sync::Arc;

use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{Algorithm, Argon2, Params, Version};
use tokio::sync::Semaphore;

use crate::config::Secret;

/// The most memory that one check may take, in KiB: a hash in a file must not be able to take all
/// there is. RFC 9106's first choice is 2 GiB, its second 64 MiB.
const MAX_MEMORY_KIB: u32 = 2 * 1024 * 1024;

/// Passes of argon2id, at most.
const MAX_PASSES: u32 = 64;

/// bcrypt takes twice as long with each; at 16 it is four seconds and more.
const MAX_BCRYPT_COST: u32 = 16;

/// The default of the bcrypt crate.
const BCRYPT_COST: u32 = 12;

/// bcrypt looks at no more of a password.
pub const BCRYPT_BYTES: usize = 72;

/// Bytes of a salt (RFC 9106, 3.1).
const SALT_BYTES: usize = 16;

/// Why a text is not a hash that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Something else.
    #[error("it is no hash of argon2id or bcrypt")]
    Unknown,
    /// A hash that would take too long or too much memory.
    #[error(
        "the hash would take too much: allowed are {MAX_MEMORY_KIB} KiB and {MAX_PASSES} passes of argon2id, cost {MAX_BCRYPT_COST} of bcrypt"
    )]
    TooCostly,
    /// No randomness, or nothing that can be hashed.
    #[error("the password cannot be hashed: {0}")]
    Unhashable(String),
}

/// How a password is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Argon2id, 19 MiB and two passes.
    Argon2id,
    /// bcrypt, cost 12.
    Bcrypt,
}

/// A hash that was checked to be one. Not shown: who has it can guess at leisure.
#[derive(Clone, PartialEq, Eq)]
pub struct Hash {
    text: Secret,
    scheme: Scheme,
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hash")
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

impl FromStr for Hash {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let scheme = if text.starts_with("$argon2id$") {
            let hash = PasswordHash::new(text).map_err(|_| Error::Unknown)?;
            let params = Params::try_from(&hash).map_err(|_| Error::Unknown)?;
            if params.m_cost() > MAX_MEMORY_KIB || params.t_cost() > MAX_PASSES {
                return Err(Error::TooCostly);
            }
            if hash.hash.is_none() || hash.salt.is_none() {
                return Err(Error::Unknown);
            }
            Scheme::Argon2id
        } else if ["$2a$", "$2b$", "$2y$"]
            .iter()
            .any(|tag| text.starts_with(tag))
        {
            let parts = bcrypt::HashParts::from_str(text).map_err(|_| Error::Unknown)?;
            if parts.get_cost() > MAX_BCRYPT_COST {
                return Err(Error::TooCostly);
            }
            Scheme::Bcrypt
        } else {
            return Err(Error::Unknown);
        };
        Ok(Self {
            text: Secret::new(text),
            scheme,
        })
    }
}

impl Hash {
    /// Hashes a password, which takes its time.
    pub fn make(scheme: Scheme, password: &Secret) -> Result<Self, Error> {
        let unhashable = |problem: &dyn std::fmt::Display| Error::Unhashable(problem.to_string());
        let password = password.expose().as_bytes();
        let text = match scheme {
            Scheme::Argon2id => {
                let mut bytes = [0; SALT_BYTES];
                getrandom::fill(&mut bytes).map_err(|error| unhashable(&error))?;
                let salt = SaltString::encode_b64(&bytes).map_err(|error| unhashable(&error))?;
                let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::default());
                let hash = argon2.hash_password(password, &salt);
                hash.map_err(|error| unhashable(&error))?.to_string()
            }
            Scheme::Bcrypt => {
                if password.len() > BCRYPT_BYTES {
                    let problem = format!("bcrypt looks at {BCRYPT_BYTES} bytes only");
                    return Err(Error::Unhashable(problem));
                }
                bcrypt::hash(password, BCRYPT_COST).map_err(|error| unhashable(&error))?
            }
        };
        text.parse()
    }

    /// As it stands in a file.
    pub fn expose(&self) -> &str {
        self.text.expose()
    }

    /// Whether `password` is the one, in a time that does not depend on how much of it is right.
    /// Takes its time: see [`Hashing`].
    pub fn verify(&self, password: &Secret) -> bool {
        let (text, password) = (self.text.expose(), password.expose());
        match self.scheme {
            Scheme::Argon2id => PasswordHash::new(text).is_ok_and(|hash| {
                let argon2 = Argon2::default();
                argon2.verify_password(password.as_bytes(), &hash).is_ok()
            }),
            Scheme::Bcrypt => bcrypt::verify(password, text).unwrap_or(false),
        }
    }
}

/// Where passwords are checked: threads for what blocks, half as many at a time as there are cores,
/// so that the threads that serve connections have the rest. Cheap to clone.
#[derive(Clone)]
pub struct Hashing(Arc<Semaphore>);

impl Default for Hashing {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Semaphore::new((cores / 2).max(1))))
    }
}

impl Hashing {
    /// Whether `password` belongs to `hash`. Waits for its turn. Cancel safe; a check that has begun
    /// is done, and holds its place until then.
    pub async fn verify(&self, hash: Hash, password: Secret) -> bool {
        let Ok(turn) = self.0.clone().acquire_owned().await else {
            return false;
        };
        let check = tokio::task::spawn_blocking(move || {
            let fits = hash.verify(&password);
            drop(turn);
            fits
        });
        check.await.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_fits_its_password_and_no_other() {
        for scheme in [Scheme::Argon2id, Scheme::Bcrypt] {
            let hash = Hash::make(scheme, &Secret::new("right pässword")).unwrap();
            let again: Hash = hash.expose().parse().unwrap();
            assert_eq!(again, hash);
            assert!(again.verify(&Secret::new("right pässword")), "{scheme:?}");
            for wrong in ["", "right pässwor", "right pässword ", "Right pässword"] {
                assert!(!again.verify(&Secret::new(wrong)), "{scheme:?} {wrong}");
            }
            assert!(!format!("{hash:?}").contains("$2"), "{hash:?}");
            assert!(!format!("{hash:?}").contains("$argon"), "{hash:?}");
        }
    }

    #[test]
    fn hashes_that_others_made_fit() {
        // argon2 (the reference program): echo -n password | argon2 somesalt -id -t 2 -k 256 -e
        // htpasswd -nbB -C 4: bcrypt with the tag 2y
        let hashes = [
            "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
            "$2y$04$Lx6.LGoNu2yDeWtyDpLS8.RzlAVVDdwP65FTD7OOyvyQXFnI1tLjK",
        ];
        for text in hashes {
            let hash: Hash = text.parse().unwrap();
            assert_eq!(hash.expose(), text);
        }
        assert!(
            hashes[0]
                .parse::<Hash>()
                .unwrap()
                .verify(&Secret::new("password"))
        );
    }

    #[test]
    fn what_is_no_hash_or_takes_too_much_is_refused() {
        for bad in [
            "",
            "password",
            "$argon2id$",
            "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ",
            "$argon2i$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
            "$2b$12$short",
            "$6$salt$hash",
        ] {
            assert_eq!(bad.parse::<Hash>(), Err(Error::Unknown), "{bad}");
        }
        let costly = [
            "$argon2id$v=19$m=4194304,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
            "$2y$31$Lx6.LGoNu2yDeWtyDpLS8.RzlAVVDdwP65FTD7OOyvyQXFnI1tLjK",
        ];
        for text in costly {
            assert_eq!(text.parse::<Hash>(), Err(Error::TooCostly), "{text}");
        }
    }

    #[test]
    fn bcrypt_takes_no_password_that_it_would_cut() {
        let long = Secret::new("x".repeat(BCRYPT_BYTES + 1));
        let made = Hash::make(Scheme::Bcrypt, &long);
        assert!(matches!(made, Err(Error::Unhashable(_))), "{made:?}");
    }
}
