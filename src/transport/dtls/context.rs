//! What all sessions of a listener share: certificates, keys and the rules.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{
    SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslSessionCacheMode,
    SslVerifyMode, SslVersion,
};
use openssl::x509::X509;

use super::psk::Keys;
use super::{Error, MAX_MESSAGE, ffi};
use crate::tls::Identity;

/// Authenticated encryption only, and forward secrecy where certificates are used.
/// Devices with pre-shared keys speak what their chip can: CCM_8 is what CoAP and LwM2M
/// ask for (RFC 7252, 9.1.3.1). `record.rs` knows every one. The device's order of
/// preference counts: it knows which are cheap for it.
const CIPHERS: &str = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:\
    ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:\
    ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:\
    ECDHE-ECDSA-AES128-CCM:ECDHE-ECDSA-AES256-CCM:\
    ECDHE-ECDSA-AES128-CCM8:ECDHE-ECDSA-AES256-CCM8:\
    ECDHE-PSK-CHACHA20-POLY1305:PSK-AES128-GCM-SHA256:PSK-AES256-GCM-SHA384:\
    PSK-CHACHA20-POLY1305:PSK-AES128-CCM:PSK-AES256-CCM:PSK-AES128-CCM8:PSK-AES256-CCM8";

/// Nothing with SHA-1.
const SIGNATURES: &str = "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:ed25519:\
    RSA-PSS+SHA256:RSA-PSS+SHA384:RSA-PSS+SHA512:RSA+SHA256:RSA+SHA384:RSA+SHA512";

const GROUPS: &str = "X25519:P-256:P-384:P-521";

/// The largest handshake message from a device, which is its certificate chain; ten
/// of them may wait for one that was lost.
const MAX_HANDSHAKE_MESSAGE: i64 = 16 * 1024;

/// Where a datagram of the handshake may end. Below, certificates would take too many
/// datagrams; above, OpenSSL would cut a flight where its buffer of 4 KiB ends.
const MTU: std::ops::RangeInclusive<u16> = 256..=4096;

/// How a listener's sessions are secured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Certificates of this side, one for each kind of key. May be empty with
    /// `psk_file`.
    pub identities: Vec<Identity>,
    /// PEM with the authorities that vouch for devices.
    pub client_authorities: Vec<PathBuf>,
    /// Whether devices show a certificate.
    pub client_certificates: ClientCertificates,
    /// The devices' pre-shared keys: `identity:hexkey` a line.
    pub psk_file: Option<PathBuf>,
    /// Bytes of the largest datagram of a handshake, 256 to 4096.
    pub mtu: u16,
    /// Bytes of the largest message that is sent, up to 16,384. One that does not fit
    /// into the path's MTU travels in fragments of IP, as it would over plain UDP.
    pub max_message: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            identities: Vec::new(),
            client_authorities: Vec::new(),
            client_certificates: ClientCertificates::NotAsked,
            psk_file: None,
            // Gets through IPv6's smallest link and most tunnels; QUIC's choice too.
            mtu: 1200,
            max_message: MAX_MESSAGE,
        }
    }
}

/// Whether devices show a certificate. One with a pre-shared key shows none, and is
/// not asked (RFC 4279, 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// `verify_none`: they are not asked for one.
    NotAsked,
    /// `verify_peer`: one that is shown must be good.
    Asked,
    /// `verify_peer` with `fail_if_no_peer_cert`.
    Required,
}

/// What all sessions of a listener share. A clone is another handle to the same.
#[derive(Clone)]
pub struct Context {
    pub(super) ssl: SslContext,
    pub(super) mtu: u16,
    pub(super) max_message: usize,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("mtu", &self.mtu)
            .field("max_message", &self.max_message)
            .finish_non_exhaustive()
    }
}

impl Context {
    /// Reads the files. To be made anew when they change; sessions keep the context
    /// that they started with.
    pub fn new(options: &Options) -> Result<Self, Error> {
        if options.identities.is_empty() && options.psk_file.is_none() {
            return Err(Error::Options(
                "a certificate or a file of pre-shared keys is needed",
            ));
        }
        if !MTU.contains(&options.mtu) {
            return Err(Error::Options("the MTU must be 256 to 4096 bytes"));
        }
        if !(1..=MAX_MESSAGE).contains(&options.max_message) {
            return Err(Error::Options("a message has 1 to 16384 bytes"));
        }
        let mut builder = rules()?;
        for (at, identity) in options.identities.iter().enumerate() {
            let earlier = options.identities.get(..at).unwrap_or_default();
            add_identity(&mut builder, identity, earlier)?;
        }
        match (
            options.client_certificates,
            options.client_authorities.as_slice(),
        ) {
            (ClientCertificates::NotAsked, _) => builder.set_verify(SslVerifyMode::NONE),
            (_, []) => {
                return Err(Error::Options(
                    "to verify devices their authorities are needed",
                ));
            }
            (asked, authorities) => {
                for path in authorities {
                    trust(&mut builder, path)?;
                }
                let mut mode = SslVerifyMode::PEER;
                if asked == ClientCertificates::Required {
                    mode |= SslVerifyMode::FAIL_IF_NO_PEER_CERT;
                }
                builder.set_verify(mode);
            }
        }
        if let Some(path) = &options.psk_file {
            let keys = Keys::load(path)?;
            // An identity without a key: 0, and the device is told so. Who guesses
            // identities learns which exist, and gains nothing by it without a key.
            builder.set_psk_server_callback(move |_, identity, key| {
                let known = identity.and_then(|identity| keys.get(identity));
                Ok(known.map_or(0, |known| match key.get_mut(..known.len()) {
                    Some(start) => {
                        start.copy_from_slice(known);
                        known.len()
                    }
                    None => 0,
                }))
            });
        }
        Ok(Self {
            ssl: builder.build(),
            mtu: options.mtu,
            max_message: options.max_message,
        })
    }
}

/// What holds whatever the options are.
fn rules() -> Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContext::builder(SslMethod::dtls_server())?;
    builder.set_min_proto_version(Some(SslVersion::DTLS1_2))?;
    builder.set_max_proto_version(Some(SslVersion::DTLS1_2))?;
    // Level 0 because CCM_8 counts as weak for its short tag and has no place in any
    // other. What the level would forbid is not in the lists below; the strength of
    // devices' certificates is a matter of who signed them.
    builder.set_security_level(0);
    builder.set_cipher_list(CIPHERS)?;
    builder.set_sigalgs_list(SIGNATURES)?;
    builder.set_groups_list(GROUPS)?;
    // No resumption: every handshake shows certificate or key anew, so that a reload
    // of either reaches every device; and no session outlives its connection.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_options(
        SslOptions::NO_TICKET
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_QUERY_MTU,
    );
    // NO_AUTO_CHAIN: what is sent is what is in the file, not what could be made of
    // the authorities.
    builder.set_mode(SslMode::RELEASE_BUFFERS | SslMode::NO_AUTO_CHAIN);
    ffi::set_max_cert_list(&mut builder, MAX_HANDSHAKE_MESSAGE);
    // The gate has checked it before OpenSSL sees the message, which insists on asking.
    builder.set_cookie_verify_cb(|_, _| true);
    Ok(builder)
}

fn problem(path: &Path, problem: impl fmt::Display) -> Error {
    Error::File {
        path: path.to_owned(),
        problem: problem.to_string(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| problem(path, error))
}

/// The certificates of a file, at least one.
fn certificates(path: &Path) -> Result<(X509, Vec<X509>), Error> {
    let wanted = "a certificate in PEM is needed";
    let found = X509::stack_from_pem(&read(path)?).map_err(|error| {
        let reason = reason(&error);
        problem(path, format!("{wanted}: {reason}"))
    })?;
    let mut found = found.into_iter();
    match found.next() {
        Some(first) => Ok((first, found.collect())),
        None => Err(problem(path, format!("{wanted}: there is none"))),
    }
}

fn private_key(path: &Path) -> Result<PKey<Private>, Error> {
    // With a passphrase at hand OpenSSL does not ask for one at the terminal.
    PKey::private_key_from_pem_passphrase(&read(path)?, b"").map_err(|error| {
        let reason = reason(&error);
        let wanted = "a private key in PEM, without passphrase, is needed";
        problem(path, format!("{wanted}: {reason}"))
    })
}

/// The last and most general of OpenSSL's reasons.
fn reason(errors: &ErrorStack) -> &'static str {
    let last = errors.errors().last();
    last.and_then(|error| error.reason())
        .unwrap_or("it is not valid")
}

fn add_identity(
    builder: &mut SslContextBuilder,
    identity: &Identity,
    earlier: &[Identity],
) -> Result<(), Error> {
    let Identity { certfile, keyfile } = identity;
    let key = private_key(keyfile)?;
    let (certificate, _) = certificates(certfile)?;
    let public = certificate
        .public_key()
        .map_err(|error| problem(certfile, reason(&error)))?;
    if !public.public_eq(&key) {
        let other = certfile.display();
        return Err(problem(keyfile, format!("is not the key of {other}")));
    }
    for other in earlier {
        // OpenSSL would take the later one and say nothing.
        if private_key(&other.keyfile)?.id() == key.id() {
            let other = other.certfile.display();
            let why = format!("{other} has a key of the same kind; devices would see one only");
            return Err(problem(certfile, why));
        }
    }
    builder
        .set_certificate_chain_file(certfile)
        .and_then(|()| builder.set_private_key(&key))
        .map_err(|error| problem(certfile, reason(&error)))
}

/// Makes these authorities count, and names them to devices that choose by it.
fn trust(builder: &mut SslContextBuilder, path: &Path) -> Result<(), Error> {
    let (first, rest) = certificates(path)?;
    for authority in std::iter::once(first).chain(rest) {
        builder.add_client_ca(&authority)?;
        builder.cert_store_mut().add_cert(authority)?;
    }
    Ok(())
}
