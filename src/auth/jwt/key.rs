//! Keys that tokens are checked with, and the algorithms that each is for.
//!
//! A key knows what it is: a token's header chooses among the algorithms of that kind and never turns
//! an RSA key into a shared secret, or a check off (RFC 8725, 2.1 and 3.1).

use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use aws_lc_rs::{hmac, signature as sig};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use tokio_rustls::rustls::pki_types::SubjectPublicKeyInfoDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use x509_cert::der::Decode;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::spki::SubjectPublicKeyInfoRef;

/// RFC 7518, 3.2: at least as long as the digest of HS256.
pub const MIN_SECRET_BYTES: usize = 32;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

enum Material {
    Secret(Vec<u8>),
    /// A SubjectPublicKeyInfo.
    Rsa(Vec<u8>),
    /// Modulus and exponent.
    RsaParts(Vec<u8>, Vec<u8>),
    /// A SubjectPublicKeyInfo or a point, as the two below.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// A key. Not shown.
pub struct Key {
    material: Material,
    /// The one algorithm that it is for, if it says so.
    algorithm: Option<String>,
    /// Its name.
    id: Option<String>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Key {
    fn new(material: Material) -> Self {
        Self {
            material,
            algorithm: None,
            id: None,
        }
    }

    /// A secret that is shared with who signs.
    pub fn secret(secret: &[u8]) -> Result<Self, String> {
        if secret.starts_with(b"-----BEGIN") {
            return Err("it is PEM: a public key is no secret, use public_key".to_owned());
        }
        if secret.len() < MIN_SECRET_BYTES {
            let least = MIN_SECRET_BYTES;
            return Err(format!(
                "it has {} bytes; allowed: at least {least}",
                secret.len()
            ));
        }
        Ok(Self::new(Material::Secret(secret.to_vec())))
    }

    /// A public key in PEM (`PUBLIC KEY`).
    pub fn pem(pem: &[u8]) -> Result<Self, String> {
        let wanted =
            "a public key in PEM (BEGIN PUBLIC KEY) of RSA, P-256, P-384 or Ed25519 is needed";
        let der = SubjectPublicKeyInfoDer::from_pem_slice(pem).map_err(|_| wanted)?;
        let info = SubjectPublicKeyInfoRef::from_der(&der).map_err(|_| wanted)?;
        let curve = || info.algorithm.parameters_oid().ok();
        let bytes = der.to_vec();
        let material = match info.algorithm.oid {
            RSA => Material::Rsa(bytes),
            EC if curve() == Some(P256) => Material::P256(bytes),
            EC if curve() == Some(P384) => Material::P384(bytes),
            ED25519 => Material::Ed25519(info.subject_public_key.raw_bytes().to_vec()),
            _ => return Err(wanted.to_owned()),
        };
        Ok(Self::new(material))
    }

    /// A JSON Web Key (RFC 7517); none where it is of a kind that is not known, or not for signatures.
    pub fn jwk(value: &Value) -> Option<Self> {
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        if text("use").is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        let point = |length: usize| {
            let (x, y) = (bytes("x")?, bytes("y")?);
            let fits = x.len() == length && y.len() == length;
            fits.then(|| [&[4], x.as_slice(), y.as_slice()].concat())
        };
        let material = match (text("kty")?, text("crv")) {
            ("RSA", _) => Material::RsaParts(bytes("n")?, bytes("e")?),
            ("EC", Some("P-256")) => Material::P256(point(32)?),
            ("EC", Some("P-384")) => Material::P384(point(48)?),
            ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x")?),
            _ => return None,
        };
        Some(Self {
            material,
            algorithm: text("alg").map(str::to_owned),
            id: text("kid").map(str::to_owned),
        })
    }

    /// Whether it is the one that a token names.
    pub fn is_named(&self, id: Option<&str>) -> bool {
        match (id, &self.id) {
            (Some(id), Some(own)) => id == own,
            _ => true,
        }
    }

    /// Whether `signature` of `message` was made with this key and with this algorithm.
    pub fn verify(&self, algorithm: &str, message: &[u8], signature: &[u8]) -> bool {
        if self.algorithm.as_ref().is_some_and(|own| own != algorithm) {
            return false;
        }
        match &self.material {
            Material::Secret(secret) => {
                let digest = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    "HS512" => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(digest, secret), message, signature).is_ok()
            }
            Material::Rsa(der) => rsa(algorithm).is_some_and(|parameters| {
                let key = UnparsedPublicKey::new(parameters, der);
                key.verify(message, signature).is_ok()
            }),
            Material::RsaParts(n, e) => rsa(algorithm).is_some_and(|parameters| {
                let key = PublicKeyComponents { n, e };
                key.verify(parameters, message, signature).is_ok()
            }),
            Material::P256(key) if algorithm == "ES256" => {
                checked(&sig::ECDSA_P256_SHA256_FIXED, key, message, signature)
            }
            Material::P384(key) if algorithm == "ES384" => {
                checked(&sig::ECDSA_P384_SHA384_FIXED, key, message, signature)
            }
            Material::Ed25519(key) if algorithm == "EdDSA" => {
                checked(&sig::ED25519, key, message, signature)
            }
            Material::P256(_) | Material::P384(_) | Material::Ed25519(_) => false,
        }
    }
}

fn checked(
    algorithm: &'static dyn VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    let key = UnparsedPublicKey::new(algorithm, key);
    key.verify(message, signature).is_ok()
}

fn rsa(algorithm: &str) -> Option<&'static signature::RsaParameters> {
    Some(match algorithm {
        "RS256" => &sig::RSA_PKCS1_2048_8192_SHA256,
        "RS384" => &sig::RSA_PKCS1_2048_8192_SHA384,
        "RS512" => &sig::RSA_PKCS1_2048_8192_SHA512,
        "PS256" => &sig::RSA_PSS_2048_8192_SHA256,
        "PS384" => &sig::RSA_PSS_2048_8192_SHA384,
        "PS512" => &sig::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

/// The keys of a set (RFC 7517, 5) that can be used.
pub fn jwks(text: &[u8]) -> Result<Vec<Key>, String> {
    let value: Value = serde_json::from_slice(text).map_err(|_| "it is no JSON")?;
    let keys = value.get("keys").and_then(Value::as_array);
    let keys: Vec<Key> = keys
        .ok_or("it has no keys")?
        .iter()
        .filter_map(Key::jwk)
        .collect();
    if keys.is_empty() {
        return Err(
            "none of its keys is an RSA, P-256, P-384 or Ed25519 key for signatures".to_owned(),
        );
    }
    Ok(keys)
}
