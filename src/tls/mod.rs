//! TLS configurations from files, for every place that speaks TLS.
//!
//! One crypto provider for the whole program (aws-lc-rs), named here and nowhere
//! else.

mod choice;
pub(crate) mod fuzzing;
mod renewed;
mod subject;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, InvalidMessage, RootCertStore,
    ServerConfig, SignatureScheme,
};

use x509_cert::der::DateTime;

pub use renewed::{ClientFiles, Renewed};
pub use subject::Subject;

/// Why a TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read, or holds no PEM of the kind wanted.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The parts do not fit together.
    #[error("{0}")]
    Tls(#[from] tokio_rustls::rustls::Error),
    /// The authorities cannot vouch for anybody.
    #[error("no usable authorities: {0}")]
    Verifier(String),
}

/// Files of this side's certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    /// PEM, the certificate first, then its chain.
    pub certfile: PathBuf,
    /// PEM.
    pub keyfile: PathBuf,
}

/// Makes aws-lc-rs the provider of everything that asks for the default. Called
/// first thing by the program; a second call does nothing.
pub fn install_provider() {
    let _ = aws_lc_rs::default_provider().install_default();
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// The client's side. `verify` off trusts any server; without `cacertfile` the
/// system's authorities count.
pub fn client(
    cacertfile: Option<&Path>,
    identity: Option<&Identity>,
    verify: bool,
    alpn: &[&[u8]],
) -> Result<Arc<ClientConfig>, Error> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = if verify {
        let roots = match cacertfile {
            Some(path) => authorities(path)?,
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                roots
            }
        };
        builder.with_root_certificates(roots)
    } else {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustAny(provider())))
    };
    let mut config = match identity {
        Some(identity) => {
            let (chain, key) = identity.load()?;
            let made = builder.with_client_auth_cert(chain, key);
            made.map_err(|error| identity.unfit(&error))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The server's side. With `client_authorities` a client must show a certificate
/// that they vouch for.
pub fn server(
    identity: &Identity,
    client_authorities: Option<&Path>,
    alpn: &[&[u8]],
) -> Result<Arc<ServerConfig>, Error> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match client_authorities {
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                .build()
                .map_err(|error| Error::Verifier(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = identity.load()?;
    let made = builder.with_single_cert(chain, key);
    let mut config = made.map_err(|error| identity.unfit(&error))?;
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Ok(Arc::new(config))
}

/// What is asked of the certificates of devices.
#[derive(Debug, Clone)]
pub struct PeerCheck {
    /// PEM files of the authorities that must vouch for one.
    pub authorities: Vec<PathBuf>,
    /// Whether a device must show one.
    pub required: bool,
}

/// The server's side towards devices: TLS 1.2 and 1.3, the certificate chosen by the
/// server name and the kinds of keys that a device knows, sessions resumed by tickets
/// whose keys live as long as what is returned (RFC 5077, RFC 8446 4.6.1).
pub fn devices(
    identities: &[Identity],
    peers: Option<&PeerCheck>,
) -> Result<Arc<ServerConfig>, Error> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match peers {
        Some(check) => {
            let mut roots = RootCertStore::empty();
            for path in &check.authorities {
                roots.roots.extend(authorities(path)?.roots);
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider());
            let verifier = if check.required {
                verifier
            } else {
                verifier.allow_unauthenticated()
            };
            let verifier = verifier.build();
            builder.with_client_cert_verifier(
                verifier.map_err(|error| Error::Verifier(error.to_string()))?,
            )
        }
        None => builder.with_no_client_auth(),
    };
    let mut keys = Vec::new();
    for identity in identities {
        let (chain, key) = identity.load()?;
        let key = CertifiedKey::from_der(chain, key, &provider())
            .map_err(|error| identity.unfit(&error))?;
        keys.push(Arc::new(key));
    }
    let mut config = builder.with_cert_resolver(Arc::new(choice::Choice::new(keys)));
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    Ok(Arc::new(config))
}

impl Identity {
    /// Each file is good, but not both together.
    fn unfit(&self, error: &tokio_rustls::rustls::Error) -> Error {
        Error::File {
            path: self.keyfile.clone(),
            problem: format!(
                "the key of the certificate in {} is needed: {error}",
                self.certfile.display()
            ),
        }
    }

    fn load(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let key = PrivateKeyDer::from_pem_file(&self.keyfile)
            .map_err(|error| problem(&self.keyfile, "a private key", &error))?;
        Ok((certificates(&self.certfile)?, key))
    }
}

fn problem(path: &Path, wanted: &str, error: &dyn std::fmt::Display) -> Error {
    Error::File {
        path: path.to_owned(),
        problem: format!("{wanted} in PEM is needed: {error}"),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let wanted = "a certificate";
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| problem(path, wanted, &error))?;
    if certificates.is_empty() {
        return Err(problem(path, wanted, &"there is none"));
    }
    Ok(certificates)
}

fn authorities(path: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| problem(path, "an authority's certificate", &error))?;
    }
    Ok(roots)
}

/// What an error of a connection says, in words that stay the same for as long as the cause
/// does. Those of rustls about an expired certificate tell the time of the check, and a log
/// that leaves out repetitions would find none.
pub fn explain(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let fault = match cause {
        Some(tokio_rustls::rustls::Error::InvalidCertificate(fault)) => fault,
        Some(tokio_rustls::rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            return "the other side does not speak TLS".to_owned();
        }
        _ => return error.to_string(),
    };
    let date = |time: &UnixTime| {
        let since = Duration::from_secs(time.as_secs());
        DateTime::from_unix_duration(since).map_or_else(|_| "?".to_owned(), |date| date.to_string())
    };
    match fault {
        CertificateError::ExpiredContext { not_after, .. } => {
            format!(
                "the certificate has expired: it was valid until {}",
                date(not_after)
            )
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!(
                "the certificate is not valid yet: it will be from {}",
                date(not_before)
            )
        }
        _ => error.to_string(),
    }
}

/// `verify_none`: encryption without knowing with whom. For tests.
#[derive(Debug)]
struct TrustAny(Arc<CryptoProvider>);

impl ServerCertVerifier for TrustAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, tokio_rustls::rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log that leaves out repetitions must find them.
    #[test]
    fn the_time_of_the_check_is_in_no_explanation() {
        let time = |secs| UnixTime::since_unix_epoch(Duration::from_secs(secs));
        let explained =
            |fault| explain(&io::Error::other(tokio_rustls::rustls::Error::from(fault)));
        for now in [2_000_000_000, 2_000_000_001] {
            let expired = CertificateError::ExpiredContext {
                time: time(now),
                not_after: time(1_000_000_000),
            };
            assert_eq!(
                explained(expired),
                "the certificate has expired: it was valid until 2001-09-09T01:46:40Z"
            );
            let early = CertificateError::NotValidYetContext {
                time: time(now),
                not_before: time(3_000_000_000),
            };
            assert_eq!(
                explained(early),
                "the certificate is not valid yet: it will be from 2065-01-24T05:20:00Z"
            );
            let stranger = CertificateError::UnknownIssuer;
            assert_eq!(
                explained(stranger),
                "invalid peer certificate: UnknownIssuer"
            );
        }
        assert_eq!(explain(&io::Error::other("torn")), "torn");
    }
}
