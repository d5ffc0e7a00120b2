//! A file of users and the hashes of their passwords, read again when it changes.
//!
//! A line for each: `NAME:HASH`, or `NAME:HASH:superuser`. A name may hold colons, as client ids
//! made of hardware addresses do; a hash begins with `$` and holds none. Empty lines and those that
//! begin with `#` are skipped.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::hash::{self, Hash, Hashing};
use super::{Attempt, Decision, Grant};
use crate::config::UserIdType;
use crate::metrics::AuthMetrics;
use crate::reload::{Current, Watch};

/// What stands behind the hash of a user for whom no rule counts.
const SUPERUSER: &str = ":superuser";

/// How the file is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// The file.
    pub path: PathBuf,
    /// What its names are.
    pub user_id_type: UserIdType,
}

/// Why a file cannot be used. Lines are named by their number: there are secrets in them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: std::io::Error,
    },
    /// A line is none of a user.
    #[error("{path}, line {line}: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1 on.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// A user of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The hash of its password.
    pub hash: Hash,
    /// No rule of authorization counts for it.
    pub is_superuser: bool,
}

impl User {
    /// The line of a file.
    pub fn line(&self, name: &str) -> String {
        let superuser = if self.is_superuser { SUPERUSER } else { "" };
        format!("{name}:{}{superuser}", self.hash.expose())
    }
}

/// Reads a line; `None` where nothing is in it.
pub fn parse_line(line: &str) -> Result<Option<(&str, User)>, String> {
    let line = line.trim_end_matches(['\r', '\n']);
    if line.trim().is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let wanted = "NAME:HASH is needed, as exproto-sidecar passwd makes it";
    let at = line.rfind(":$").ok_or(wanted)?;
    let (name, hash) = line.split_at(at);
    let hash = hash.get(1..).unwrap_or_default();
    if name.is_empty() {
        return Err(wanted.to_owned());
    }
    let (hash, is_superuser) = match hash.strip_suffix(SUPERUSER) {
        Some(hash) => (hash, true),
        None => (hash, false),
    };
    let hash = hash
        .parse()
        .map_err(|error: hash::Error| error.to_string())?;
    Ok(Some((name, User { hash, is_superuser })))
}

type Users = HashMap<String, User>;

fn read(path: &Path) -> Result<Arc<Users>, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::Io {
        path: path.to_owned(),
        error,
    })?;
    let mut users = Users::new();
    for (index, line) in text.lines().enumerate() {
        let fault = |problem| Error::Line {
            path: path.to_owned(),
            line: index + 1,
            problem,
        };
        if let Some((name, user)) = parse_line(line).map_err(fault)?
            && users.insert(name.to_owned(), user).is_some()
        {
            return Err(fault(format!("the user {name:?} is there twice")));
        }
    }
    Ok(Arc::new(users))
}

/// See the module.
pub struct UserFile {
    options: Options,
    users: Arc<Current<Users>>,
    /// The file as it was before it was read.
    watch: Watch,
    hashing: Hashing,
}

impl UserFile {
    /// Reads the file.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let watch = Watch::new(vec![options.path.clone()]);
        Ok(Self {
            users: Current::new(read(&options.path)?),
            watch,
            options: options.clone(),
            hashing: Hashing::default(),
        })
    }

    /// Reads the file again whenever it changes, until `stop` is cancelled.
    pub fn follow(&self, key: &str, metrics: &AuthMetrics, stop: &CancellationToken) {
        let path = self.options.path.clone();
        let told = super::told(key, metrics);
        let make = move || read(&path);
        let watch = self.watch.clone();
        tokio::spawn(watch.run(self.users.clone(), make, told, stop.clone()));
    }

    /// Whether the password is the user's. A user who is not there is for others to know, as in
    /// EMQX.
    pub async fn ask(&self, attempt: &Attempt) -> Decision {
        let name = match self.options.user_id_type {
            UserIdType::Username => &attempt.username,
            UserIdType::ClientId => &attempt.clientid,
        };
        let users = self.users.get();
        let user = users.get(name);
        // A stranger takes as long as a user, so that nobody learns who is one.
        let Some(checked) = user.or_else(|| users.values().next()) else {
            return Decision::Ignore("the file has no users".to_owned());
        };
        let fits = self
            .hashing
            .verify(checked.hash.clone(), attempt.password.clone());
        match (user, fits.await) {
            (None, _) => Decision::Ignore("the user is not in the file".to_owned()),
            (Some(_), false) => Decision::Deny("the password is wrong".to_owned()),
            (Some(user), true) => Decision::Allow(Grant {
                is_superuser: user.is_superuser,
                ..Grant::default()
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BCRYPT: &str = "$2y$04$Lx6.LGoNu2yDeWtyDpLS8.RzlAVVDdwP65FTD7OOyvyQXFnI1tLjK";

    #[test]
    fn names_may_hold_colons() {
        for name in ["ann", "00:1b:44:11:3a:b7", "a:$b", "$a", "a b", ":"] {
            for is_superuser in [false, true] {
                let hash = BCRYPT.parse().unwrap();
                let user = User { hash, is_superuser };
                let line = user.line(name);
                assert_eq!(parse_line(&line), Ok(Some((name, user))), "{line}");
            }
        }
        for nothing in ["", "  ", "# ann:x"] {
            assert_eq!(parse_line(nothing), Ok(None));
        }
        for bad in [
            "ann",
            "ann:",
            "ann:password",
            &format!(":{BCRYPT}"),
            &format!("ann:{BCRYPT}:root"),
        ] {
            assert!(parse_line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fault_names_the_line_and_nothing_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("users");
        std::fs::write(&path, format!("ann:{BCRYPT}\n\nbob:hunter2\n")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(
            error.contains("line 3") && !error.contains("hunter2"),
            "{error}"
        );
        std::fs::write(&path, format!("ann:{BCRYPT}\nann:{BCRYPT}\n")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("twice"));
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(line in "\\PC{0,80}") {
            let _ = parse_line(&line);
        }
    }
}
