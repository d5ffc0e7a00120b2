//! Who may call: bearer tokens (RFC 6750, 2.1) in the metadata `authorization`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use metrics::Counter;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::reload::Current;

/// Tokens in a file: as many as there are handlers, and the old ones of each while it is
/// given a new one. Every call is compared with all.
const MAX_TOKENS: usize = 64;

/// Length of a token in characters: too short a one can be guessed.
const LENGTH: std::ops::RangeInclusive<usize> = 16..=512;

/// Longest file, bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Why a file holds no tokens. It names lines and never what is in them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The file has nothing that could be a token.
    #[error("it has no token; allowed: one a line")]
    Empty,
    /// More than the file may have.
    #[error("it has more than {MAX_TOKENS} tokens")]
    TooMany,
    /// A line that is no token.
    #[error(
        "line {0} is no token; allowed: {first} to {last} characters of A-Z a-z 0-9 - . _ ~ + / =",
        first = LENGTH.start(),
        last = LENGTH.end()
    )]
    Line(usize),
}

/// What handlers may show. Digests, so that neither a dump nor the time of a comparison
/// tells anything of a token.
pub struct Tokens(Vec<[u8; 32]>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

impl Tokens {
    /// Reads a file with a token a line; empty lines and lines that begin with `#` are
    /// left out.
    ///
    /// # Errors
    /// A file that cannot be read, has no token or something that is none.
    pub fn read(path: &Path) -> Result<Arc<Self>, Error> {
        let mut text = String::new();
        // What is beyond cannot be read as tokens anyway.
        File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
        let mut tokens = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
            if !LENGTH.contains(&line.len()) || !line.bytes().all(fits) {
                return Err(Error::Line(number + 1));
            }
            if tokens.len() == MAX_TOKENS {
                return Err(Error::TooMany);
            }
            tokens.push(hash(line.as_bytes()));
        }
        if tokens.is_empty() {
            return Err(Error::Empty);
        }
        Ok(Arc::new(Self(tokens)))
    }

    /// Whether it is one of them. Takes as long for each.
    fn know(&self, token: &[u8]) -> bool {
        let shown = hash(token);
        let known = |one: &[u8; 32]| verify_slices_are_equal(one, &shown).is_ok();
        self.0.iter().fold(false, |any, one| any | known(one))
    }
}

fn hash(token: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, token).as_ref());
    hash
}

/// Lets calls in that show a token; all where there are no tokens.
#[derive(Clone)]
pub(super) struct Doorkeeper {
    pub tokens: Option<Arc<Current<Tokens>>>,
    pub refused: Counter,
}

impl Interceptor for Doorkeeper {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(tokens) = &self.tokens else {
            return Ok(request);
        };
        let shown = request.metadata().get("authorization");
        let bearer = shown.and_then(|value| value.as_bytes().split_at_checked(7));
        match bearer {
            // The scheme's name is of either case (RFC 9110, 11.1).
            Some((scheme, token))
                if scheme.eq_ignore_ascii_case(b"bearer ") && tokens.get().know(token) =>
            {
                Ok(request)
            }
            _ => {
                self.refused.increment(1);
                tracing::debug!("a call without a token that is known is refused");
                Err(Status::unauthenticated(
                    "the metadata \"authorization\" must be \"Bearer TOKEN\" with a token of server.token_file",
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Arc<Tokens>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Tokens::read(file.path())
    }

    #[test]
    fn tokens_are_lines() {
        let tokens = read("# for meters\n0123456789abcdef\n\n  fedcba9876543210==\r\n").unwrap();
        assert!(tokens.know(b"0123456789abcdef") && tokens.know(b"fedcba9876543210=="));
        for other in ["", "0123456789abcde", "0123456789abcdef ", "# for meters"] {
            assert!(!tokens.know(other.as_bytes()), "{other:?}");
        }
        assert_eq!(format!("{tokens:?}"), "Tokens(2)");
    }

    #[test]
    fn what_is_no_token_is_told_by_its_line() {
        for text in ["", "\n# nothing\n"] {
            assert!(matches!(read(text), Err(Error::Empty)), "{text:?}");
        }
        for bad in ["short", "0123456789 abcdef", "0123456789äbcdef"] {
            let error = read(&format!("0123456789abcdef\n{bad}\n")).unwrap_err();
            assert!(matches!(error, Error::Line(2)), "{error}");
            assert!(!error.to_string().contains(bad));
        }
        let many: String = (0..=MAX_TOKENS).map(|n| format!("{n:016}\n")).collect();
        assert!(matches!(read(&many), Err(Error::TooMany)));
    }
}
