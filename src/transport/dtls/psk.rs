//! Pre-shared keys: a file with one `identity:key` a line, the key in hex, as
//! Mosquitto's `psk_file`.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;

use super::Error;

/// OpenSSL's own limits (`PSK_MAX_IDENTITY_LEN`, `PSK_MAX_PSK_LEN`).
const MAX_IDENTITY: usize = 256;
const MAX_KEY: usize = 512;

/// The devices' keys by identity.
pub(super) struct Keys(HashMap<Box<[u8]>, Box<[u8]>>);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

impl Keys {
    pub fn load(path: &Path) -> Result<Self, Error> {
        let problem = |problem: String| Error::File {
            path: path.to_owned(),
            problem,
        };
        let text = fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let keys = Self::parse(&text).map_err(problem)?;
        if keys.0.is_empty() {
            return Err(problem("holds no pre-shared key".into()));
        }
        Ok(keys)
    }

    /// An identity may hold colons (`urn:dev:...`): the last one ends it. Problems
    /// name the line and never what is in it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut keys = HashMap::new();
        for (line, number) in text.lines().map(str::trim).zip(1..) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let problem = |problem: &str| format!("line {number}: {problem}");
            let (identity, key) = line
                .rsplit_once(':')
                .ok_or_else(|| problem("identity:key is needed"))?;
            if identity.is_empty() || identity.len() > MAX_IDENTITY {
                return Err(problem("an identity has 1 to 256 bytes"));
            }
            let key = from_hex(key).ok_or_else(|| problem("the key must be in hex"))?;
            if key.is_empty() || key.len() > MAX_KEY {
                return Err(problem("a key has 1 to 512 bytes"));
            }
            if keys.insert(identity.as_bytes().into(), key).is_some() {
                return Err(problem("this identity has a key already"));
            }
        }
        Ok(Self(keys))
    }

    /// Every identity with its key.
    pub fn all(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(identity, key)| (&**identity, &**key))
    }

    pub fn get(&self, identity: &[u8]) -> Option<&[u8]> {
        self.0.get(identity).map(AsRef::as_ref)
    }
}

fn from_hex(text: &str) -> Option<Box<[u8]>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
    text.len().is_multiple_of(2).then_some(())?;
    text.as_bytes()
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_may_hold_colons_and_comments_are_skipped() {
        let keys = Keys::parse("# a fleet\n\nmeter-1:00ff\r\n urn:dev:7:A0b1 \n").unwrap();
        assert_eq!(keys.get(b"meter-1"), Some(&[0x00, 0xff][..]));
        assert_eq!(keys.get(b"urn:dev:7"), Some(&[0xa0, 0xb1][..]));
        assert_eq!(keys.get(b"urn"), None);
        assert_eq!(format!("{keys:?}"), "2 keys");
    }

    #[test]
    fn problems_name_the_line_and_keep_the_key() {
        for (text, problem) in [
            ("a:00\nsecret", "line 2: identity:key is needed"),
            ("a:0", "line 1: the key must be in hex"),
            ("a:0g", "line 1: the key must be in hex"),
            ("a:", "line 1: a key has 1 to 512 bytes"),
            (":00", "line 1: an identity has 1 to 256 bytes"),
            ("a:00\na:01", "line 2: this identity has a key already"),
        ] {
            assert_eq!(Keys::parse(text).unwrap_err(), problem);
        }
    }
}
