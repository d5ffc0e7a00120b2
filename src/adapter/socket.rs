//! Where handlers connect: a TCP port or a Unix socket.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, UnixListener};

/// Connections that wait to be accepted, of a Unix socket; as many as tokio gives a port.
const BACKLOG: i32 = 1024;

/// A handler's machine that has gone silent is given up after so long without an
/// acknowledgement of what was sent to it (`TCP_USER_TIMEOUT`), and probed after so
/// long without a word.
const SILENCE: Duration = Duration::from_secs(20);

/// What handlers connect to. Dropping it removes a Unix socket's file.
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A path.
    Unix(UnixListener, Entry),
}

/// A connection that was accepted, not yet of any runtime.
pub enum Stream {
    /// Over TCP.
    Tcp(std::net::TcpStream),
    /// Over a Unix socket.
    Unix(std::os::unix::net::UnixStream),
}

/// Who connected.
#[derive(Debug, Clone, Copy)]
pub enum Peer {
    /// From an address.
    Tcp(SocketAddr),
    /// A process of this machine.
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

impl Listener {
    /// Listens on a port.
    pub async fn tcp(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self::Tcp)
    }

    /// Listens on a path; `mode` says who may connect. A socket there that nobody listens to, as a
    /// gateway leaves it that was killed, is replaced. Must be called on a runtime.
    ///
    /// # Errors
    /// `AddrInUse` where somebody listens, `AlreadyExists` where something else than a socket is.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        remove_stale(path)?;
        let socket = socket()?;
        socket.bind(&SockAddr::unix(path)?)?;
        let entry = Entry::of(path)?;
        // Nobody gets in before: what does not listen refuses.
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        socket.listen(BACKLOG)?;
        Ok(Self::Unix(UnixListener::from_std(socket.into())?, entry))
    }

    /// The port, with a real number where 0 was asked for; none of a path.
    pub fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Some),
            Self::Unix(..) => Ok(None),
        }
    }

    /// The next connection. Cancel safe.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Stream::Tcp(stream.into_std()?), Peer::Tcp(peer)))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Stream::Unix(stream.into_std()?), Peer::Unix))
            }
        }
    }
}

/// Moves a TCP connection to this runtime, and has it given up when the peer's machine is gone.
pub(super) fn settle(stream: std::net::TcpStream) -> io::Result<tokio::net::TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(SILENCE)
            .with_interval(SILENCE),
    )?;
    tokio::net::TcpStream::from_std(stream)
}

/// Moves a Unix connection to this runtime.
pub(super) fn settle_unix(
    stream: std::os::unix::net::UnixStream,
) -> io::Result<tokio::net::UnixStream> {
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

fn socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Removes a socket that nobody listens to.
fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        let text = "something is there that is no socket";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    match socket()?.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        // It may be too busy to answer, or not let this user in: somebody is there.
        _ => Err(io::Error::from(io::ErrorKind::AddrInUse)),
    }
}

/// The file of a Unix socket, removed at the end if it is still this one.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    id: (u64, u64),
}

impl Entry {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            id: identity(path)?,
        })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|id| id == self.id) {
            // What stays is replaced at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_in(folder: &tempfile::TempDir) -> PathBuf {
        folder.path().join("adapter.sock")
    }

    #[tokio::test]
    async fn the_file_has_its_mode_and_goes_with_the_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_in(&folder);
        let listener = Listener::unix(&path, 0o620).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o620);
        let _peer = tokio::net::UnixStream::connect(&path).await.unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        assert!(matches!(stream, Stream::Unix(_)));
        assert_eq!(peer.to_string(), "unix");
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_nobody_listens_to_is_replaced_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_in(&folder);
        // Dropping it leaves the file, as a kill does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let first = Listener::unix(&path, 0o600).unwrap();
        let error = Listener::unix(&path, 0o600).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // Another one's file is not removed.
        fs::remove_file(&path).unwrap();
        let second = Listener::unix(&path, 0o600).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        fs::write(&path, "text").unwrap();
        let error = Listener::unix(&path, 0o600).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(path.exists());
    }
}
