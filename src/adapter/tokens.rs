//! Who may call: bearer tokens (RFC 6750, 2.1) in the metadata `authorization`.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use metrics::Counter;
use tonic::Status;

use crate::connection::command::Reach;
use crate::id::HandlerName;
use crate::reload::Current;
use crate::telemetry::Seldom;

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
    /// A line with somebody else's token.
    #[error("line {0} is a token of {1}, too; allowed: tokens of its own")]
    Shared(usize, String),
}

/// A file with tokens.
#[derive(Debug, Clone)]
pub struct TokenFile {
    /// The configuration's key.
    pub key: String,
    /// Where it is.
    pub path: PathBuf,
    /// The handler whose tokens they are, if they are one's own.
    pub owner: Option<HandlerName>,
}

/// What handlers may show. Digests, so that neither a dump nor the time of a comparison
/// tells anything of a token.
pub struct Tokens(Vec<Token>);

struct Token {
    digest: [u8; 32],
    owner: Option<HandlerName>,
    /// Of the file.
    key: String,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

impl Tokens {
    /// Reads files with a token a line; empty lines and lines that begin with `#` are
    /// left out.
    ///
    /// # Errors
    /// A file, by its key, that cannot be read, has no token or something that is none, or one
    /// that an earlier file has for somebody else.
    pub fn read(files: &[TokenFile]) -> Result<Arc<Self>, (String, Error)> {
        let mut tokens = Vec::new();
        for file in files {
            read(file, &mut tokens).map_err(|error| (file.key.clone(), error))?;
        }
        Ok(Arc::new(Self(tokens)))
    }

    /// Whose token it is, if it is one at all. Takes as long for each.
    fn find(&self, token: &[u8]) -> Option<&Option<HandlerName>> {
        let shown = hash(token);
        let mut found = None;
        for one in &self.0 {
            if verify_slices_are_equal(&one.digest, &shown).is_ok() {
                found = Some(&one.owner);
            }
        }
        found
    }
}

fn read(file: &TokenFile, tokens: &mut Vec<Token>) -> Result<(), Error> {
    let mut text = String::new();
    // What is beyond cannot be read as tokens anyway.
    File::open(&file.path)?
        .take(MAX_FILE)
        .read_to_string(&mut text)?;
    let before = tokens.len();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        if !LENGTH.contains(&line.len()) || !line.bytes().all(fits) {
            return Err(Error::Line(number + 1));
        }
        if tokens.len() - before == MAX_TOKENS {
            return Err(Error::TooMany);
        }
        let digest = hash(line.as_bytes());
        let same = |other: &&Token| other.digest == digest && other.owner != file.owner;
        if let Some(other) = tokens.iter().find(same) {
            return Err(Error::Shared(number + 1, other.key.clone()));
        }
        tokens.push(Token {
            digest,
            owner: file.owner.clone(),
            key: file.key.clone(),
        });
    }
    match tokens.len() == before {
        true => Err(Error::Empty),
        false => Ok(()),
    }
}

fn hash(token: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, token).as_ref());
    hash
}

/// Lets calls in that show a token; all where there are no tokens.
pub(super) struct Doorkeeper {
    pub tokens: Option<Arc<Current<Tokens>>>,
    /// Whether a handler reaches only its own connections.
    pub isolate: bool,
    pub refused: Counter,
    /// For lines about it, which anybody may bring about.
    pub complaints: Seldom,
}

impl Doorkeeper {
    /// What a call with these headers may act on.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Reach, Status> {
        let Some(tokens) = &self.tokens else {
            return Ok(Reach::All);
        };
        let shown = headers.get(AUTHORIZATION);
        let bearer = shown.and_then(|value| value.as_bytes().split_at_checked(7));
        // The scheme's name is of either case (RFC 9110, 11.1).
        let token = bearer.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        let tokens = tokens.get();
        match token.and_then(|(_, token)| tokens.find(token)) {
            Some(_) if !self.isolate => Ok(Reach::All),
            Some(Some(owner)) => Ok(Reach::Of(owner.clone())),
            Some(None) => Ok(Reach::Nothing),
            None => {
                self.refused.increment(1);
                if let Some(left_out) = self.complaints.tell(Instant::now()) {
                    tracing::warn!(
                        left_out,
                        "a call to the adapter without a token that is known is refused"
                    );
                }
                Err(Status::unauthenticated(
                    "the metadata \"authorization\" must be \"Bearer TOKEN\" with a token that the gateway knows",
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Arc<Tokens>, Error> {
        read_all(&[(text, None)]).map_err(|(_, error)| error)
    }

    fn read_all(texts: &[(&str, Option<&str>)]) -> Result<Arc<Tokens>, (String, Error)> {
        let folder = tempfile::tempdir().unwrap();
        let file = |(number, (text, owner)): (usize, &(&str, Option<&str>))| {
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, text).unwrap();
            TokenFile {
                key: format!("file {number}"),
                path,
                owner: owner.map(HandlerName::new),
            }
        };
        let files: Vec<TokenFile> = texts.iter().enumerate().map(file).collect();
        Tokens::read(&files)
    }

    #[test]
    fn tokens_are_lines() {
        let tokens = read("# for meters\n0123456789abcdef\n\n  fedcba9876543210==\r\n").unwrap();
        for token in ["0123456789abcdef", "fedcba9876543210=="] {
            assert_eq!(tokens.find(token.as_bytes()), Some(&None));
        }
        for other in ["", "0123456789abcde", "0123456789abcdef ", "# for meters"] {
            assert_eq!(tokens.find(other.as_bytes()), None, "{other:?}");
        }
        assert_eq!(format!("{tokens:?}"), "Tokens(2)");
    }

    #[test]
    fn a_token_is_one_handlers() {
        let [a, b] = ["0123456789abcdef\n", "fedcba9876543210\n"];
        let tokens = read_all(&[(a, Some("a")), (b, Some("b"))]).unwrap();
        let owner = HandlerName::new("b");
        assert_eq!(tokens.find(b.trim().as_bytes()), Some(&Some(owner)));
        for owner in [None, Some("b")] {
            let (key, error) = read_all(&[(a, Some("a")), (a, owner)]).unwrap_err();
            assert_eq!(key, "file 1");
            assert!(
                matches!(&error, Error::Shared(1, other) if other == "file 0"),
                "{error}"
            );
        }
        read_all(&[(&format!("{a}{a}"), Some("a"))]).unwrap();
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
