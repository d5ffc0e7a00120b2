//! Which of several certificates a device gets.

use std::sync::Arc;

use tokio_rustls::rustls::client::verify_server_name;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

/// Certificates in order of preference.
#[derive(Debug)]
pub(super) struct Choice(Vec<Arc<CertifiedKey>>);

impl Choice {
    pub(super) fn new(keys: Vec<Arc<CertifiedKey>>) -> Self {
        Self(keys)
    }
}

/// Whether a certificate is for this server name.
fn is_for(key: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let certificate = key.end_entity_cert().ok();
    let parsed = certificate.and_then(|der| ParsedCertificate::try_from(der).ok());
    parsed.is_some_and(|parsed| verify_server_name(&parsed, name).is_ok())
}

impl ResolvesServerCert for Choice {
    /// The first that the device can use and that has the name it asked for (RFC 6066,
    /// 3), else the first that it can use, else the first of all: a device that checks
    /// no name takes any, and one that does says better than we what is wrong.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let is_usable = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        let usable = || self.0.iter().filter(is_usable);
        let name = hello.server_name();
        let name = name.and_then(|name| ServerName::try_from(name).ok());
        let named = name.and_then(|name| usable().find(|key| is_for(key, &name)));
        let key = named.or_else(|| usable().next()).or(self.0.first());
        key.cloned()
    }
}
