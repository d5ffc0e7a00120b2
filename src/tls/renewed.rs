//! TLS where the gateway is the client, from files that are renewed while it runs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;

use super::{Error, Identity, client};
use crate::reload::Watch;

/// What a client's side is made of; see [`client`].
#[derive(Debug, Clone)]
pub struct ClientFiles {
    /// PEM, the authorities that the server is checked with; those of the system without.
    pub cacertfile: Option<PathBuf>,
    /// For mutual TLS.
    pub identity: Option<Identity>,
    /// Off trusts any server.
    pub verify: bool,
    /// Protocols that are offered.
    pub alpn: &'static [&'static [u8]],
}

impl ClientFiles {
    fn make(&self) -> Result<Arc<ClientConfig>, Error> {
        let identity = self.identity.as_ref();
        client(self.cacertfile.as_deref(), identity, self.verify, self.alpn)
    }

    fn paths(&self) -> Vec<PathBuf> {
        let identity = self.identity.iter();
        let own = identity.flat_map(|own| [own.certfile.clone(), own.keyfile.clone()]);
        self.cacertfile.iter().cloned().chain(own).collect()
    }
}

/// The client's side, made again when a connection is opened after its files have changed.
///
/// What cannot be made from changed files is logged once, and the last that could is used on:
/// who renews a certificate writes two files, one after the other.
#[derive(Debug)]
pub struct Renewed {
    /// The configuration's table.
    key: String,
    files: ClientFiles,
    made: Mutex<(Watch, Arc<ClientConfig>)>,
}

impl Renewed {
    /// `key` is the table of the configuration, for the log.
    ///
    /// # Errors
    /// A file of no use.
    pub fn new(key: &str, files: ClientFiles) -> Result<Arc<Self>, Error> {
        let watch = Watch::new(files.paths());
        let made = Mutex::new((watch, files.make()?));
        Ok(Arc::new(Self {
            key: key.to_owned(),
            files,
            made,
        }))
    }

    /// For the next connection. Looks at the files, and reads them if they have changed.
    pub fn connector(&self) -> TlsConnector {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.0.changed() {
            match self.files.make() {
                Ok(config) => {
                    made.1 = config;
                    tracing::info!(key = self.key, "the changed files are in use");
                }
                Err(error) => {
                    tracing::error!(key = self.key, %error, "the changed files are of no use; the old ones stay");
                }
            }
        }
        TlsConnector::from(made.1.clone())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn files_are_read_again_when_they_have_changed() {
        super::super::install_provider();
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str| {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
            let cert = params.self_signed(&key).unwrap();
            (cert.pem(), key.serialize_pem())
        };
        let (cert, key) = write("one");
        fs::write(path("cert"), &cert).unwrap();
        fs::write(path("key"), &key).unwrap();
        let files = ClientFiles {
            cacertfile: Some(path("cert")),
            identity: Some(Identity {
                certfile: path("cert"),
                keyfile: path("key"),
            }),
            verify: true,
            alpn: &[b"h2"],
        };
        let renewed = Renewed::new("handler.ssl_options", files).unwrap();
        let config = |renewed: &Renewed| Arc::as_ptr(renewed.connector().config());
        let first = config(&renewed);
        assert_eq!(config(&renewed), first, "nothing has changed");
        // Half of a renewal: the key is another's.
        let (cert, key) = write("a name that is longer");
        fs::write(path("cert"), &cert).unwrap();
        assert_eq!(config(&renewed), first);
        fs::remove_file(path("key")).unwrap();
        assert_eq!(config(&renewed), first);
        fs::write(path("key"), &key).unwrap();
        assert_ne!(config(&renewed), first);
    }
}
