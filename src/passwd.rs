//! `exproto-sidecar passwd`: users of a file, with the hashes of their passwords.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::auth::Secret;
use crate::auth::file::{User, parse_line};
use crate::auth::hash::{Hash, Scheme};

/// A password is longer than this by mistake only.
const MAX_PASSWORD_BYTES: u64 = 64 * 1024;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The user.
    pub name: String,
    /// The file in which the user's line is written; without one it is printed.
    pub file: Option<PathBuf>,
    /// How the password is hashed.
    pub scheme: Scheme,
    /// No rule of authorization counts for this user.
    pub is_superuser: bool,
    /// Takes the user out of the file.
    pub delete: bool,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was typed twice differs.
    #[error("the passwords differ")]
    Differ,
    /// There is no password.
    #[error("the password is empty")]
    Empty,
    /// The name would not be found again.
    #[error("a name has no line ends, does not begin with # and is not empty")]
    Name,
    /// There is no such user.
    #[error("{0}: the user is not there")]
    Missing(PathBuf),
    /// Without a file there is nobody to take out.
    #[error("--delete needs --file")]
    NoFile,
    /// A file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: io::Error,
    },
    /// The password cannot be read.
    #[error("the password cannot be read: {0}")]
    Read(io::Error),
    /// It cannot be hashed.
    #[error("{0}")]
    Hash(#[from] crate::auth::hash::Error),
}

/// Asks for the password and writes the line.
pub fn run(request: &Request) -> Result<(), Error> {
    if request.name.is_empty()
        || request.name.starts_with('#')
        || request.name.contains(['\n', '\r'])
    {
        return Err(Error::Name);
    }
    let line = match request.delete {
        true => None,
        false => {
            let user = User {
                hash: Hash::make(request.scheme, &password()?)?,
                is_superuser: request.is_superuser,
            };
            Some(user.line(&request.name))
        }
    };
    let Some(path) = &request.file else {
        let line = line.ok_or(Error::NoFile)?;
        return writeln!(io::stdout(), "{line}").map_err(Error::Read);
    };
    let failed = |error| Error::File {
        path: path.clone(),
        error,
    };
    let old = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && line.is_some() => String::new(),
        Err(error) => return Err(failed(error)),
    };
    let (text, found) = replaced(&old, &request.name, line.as_deref());
    if request.delete && !found {
        return Err(Error::Missing(path.clone()));
    }
    write(path, &text).map_err(failed)
}

/// `old` with the line of `name` replaced, or at the end where there was none; and whether there
/// was one.
fn replaced(old: &str, name: &str, line: Option<&str>) -> (String, bool) {
    let mut text = String::with_capacity(old.len() + 128);
    let mut found = false;
    let mut push = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    for old_line in old.lines() {
        if !matches!(parse_line(old_line), Ok(Some((found, _))) if found == name) {
            push(old_line);
        } else if !std::mem::replace(&mut found, true)
            && let Some(line) = line
        {
            push(line);
        }
    }
    if let Some(line) = line.filter(|_| !found) {
        push(line);
    }
    (text, found)
}

/// All at once, so that who reads meanwhile finds the old file or the new one. A new file is its
/// owner's alone; an old one's rights are kept.
fn write(path: &Path, text: &str) -> io::Result<()> {
    // What a link names is written, and the link stays.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mode = fs::metadata(&path).map_or(0o600, |metadata| metadata.permissions().mode());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let written = options.open(&new).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        if let Ok(old) = fs::metadata(&path) {
            // A gateway that is not who runs this must be able to read it all the same. Who may
            // not give files away is the owner already, or is told.
            let own = file.metadata()?;
            if (own.uid(), own.gid()) != (old.uid(), old.gid()) {
                std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
            }
        }
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    });
    let done = written.and_then(|()| fs::rename(&new, &path));
    if done.is_err() {
        let _ = fs::remove_file(&new);
    }
    done
}

/// From the terminal, twice and without being shown; else the first line of what comes in.
fn password() -> Result<Secret, Error> {
    let password = if io::stdin().is_terminal() {
        let password = typed("Password: ").map_err(Error::Read)?;
        let again = typed("Again: ").map_err(Error::Read)?;
        if password != again {
            return Err(Error::Differ);
        }
        password
    } else {
        line(io::stdin().lock()).map_err(Error::Read)?
    };
    match password.expose() {
        "" => Err(Error::Empty),
        _ => Ok(password),
    }
}

/// The first line.
fn line(input: impl Read) -> io::Result<Secret> {
    let mut line = String::new();
    io::BufReader::new(input.take(MAX_PASSWORD_BYTES)).read_line(&mut line)?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    Ok(Secret::new(line.strip_suffix('\r').unwrap_or(line)))
}

/// A terminal that shows nothing of what is typed, until it is dropped.
struct Unseen<'a> {
    terminal: &'a fs::File,
    before: Termios,
}

impl<'a> Unseen<'a> {
    fn new(terminal: &'a fs::File) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut unseen = before.clone();
        unseen.local_modes.remove(LocalModes::ECHO);
        // But the end of the line is.
        unseen.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(terminal, OptionalActions::Now, &unseen)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Unseen<'_> {
    fn drop(&mut self) {
        // A terminal that has gone shows nothing anyway.
        let _ = tcsetattr(self.terminal, OptionalActions::Now, &self.before);
    }
}

/// What is typed at the terminal. Nothing is shown from before the prompt on, so that who is quick
/// is not seen either.
fn typed(prompt: &str) -> io::Result<Secret> {
    let mut terminal = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/tty")?;
    let reader = terminal.try_clone()?;
    let _unseen = Unseen::new(&reader)?;
    terminal.write_all(prompt.as_bytes())?;
    line(&reader)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "$2y$04$Lx6.LGoNu2yDeWtyDpLS8.RzlAVVDdwP65FTD7OOyvyQXFnI1tLjK";

    #[test]
    fn a_line_is_replaced_where_it_is_and_the_others_stay() {
        let old = format!("# users\nann:{HASH}\na:b:{HASH}:superuser\n");
        let (text, found) = replaced(&old, "ann", Some("ann:new"));
        assert!(found);
        assert_eq!(text, format!("# users\nann:new\na:b:{HASH}:superuser\n"));
        let (text, found) = replaced(&old, "a", Some("a:new"));
        assert!(!found);
        assert_eq!(text, format!("{old}a:new\n"));
        let (text, found) = replaced(&old, "a:b", None);
        assert!(found);
        assert_eq!(text, format!("# users\nann:{HASH}\n"));
    }

    #[test]
    fn a_new_file_is_its_owners_and_an_old_ones_rights_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("users");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        write(&path, "a\n").unwrap();
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        write(&path, "b\n").unwrap();
        assert_eq!(mode(), 0o644);
        assert_eq!(fs::read_to_string(&path).unwrap(), "b\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
