//! Whose certificate it is.

use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::Decode;
use x509_cert::der::oid::db::rfc4519::CN;
use x509_cert::ext::pkix::name::DirectoryString;

/// The subject of a device's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The most specific common name; empty without one.
    pub cn: String,
    /// The distinguished name as RFC 4514 writes it.
    pub dn: String,
}

impl Subject {
    /// Of a certificate in DER; `None` where it is no certificate at all.
    ///
    /// Says nothing of who vouches for it: that was checked when it was shown.
    pub fn of(der: &[u8]) -> Option<Self> {
        // What a certificate must not have beyond its names is not for us to judge.
        let certificate = CertificateInner::<Raw>::from_der(der).ok()?;
        let name = certificate.tbs_certificate().subject();
        // The most specific one comes last (RFC 4514, 2.1, turns the order).
        let common_names = name.iter().filter(|attribute| attribute.oid == CN);
        let cn = common_names.last().and_then(|attribute| {
            let text = attribute.value.decode_as::<DirectoryString>().ok()?;
            Some(text.value().into_owned())
        });
        Some(Self {
            cn: cn.unwrap_or_default(),
            dn: name.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn certificate(names: &[(DnType, &str)]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, text) in names {
            params.distinguished_name.push(kind.clone(), *text);
        }
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn names_are_written_as_rfc_4514_says() {
        let der = certificate(&[
            (DnType::CountryName, "DE"),
            (DnType::OrganizationName, "Meters, Inc. \"#1\""),
            (DnType::CommonName, " mölk+1"),
        ]);
        let subject = Subject::of(&der).unwrap();
        assert_eq!(subject.cn, " mölk+1");
        assert_eq!(subject.dn, r##"CN=\ mölk\+1,O=Meters\, Inc. \"#1\",C=DE"##);
    }

    #[test]
    fn a_certificate_may_have_no_names() {
        let subject = Subject::of(&certificate(&[])).unwrap();
        assert_eq!((subject.cn.as_str(), subject.dn.as_str()), ("", ""));
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..400_usize) {
            let _ = Subject::of(&bytes);
            let mut der = certificate(&[(DnType::CommonName, "meter")]);
            der.truncate(cut);
            for (place, byte) in bytes.iter().enumerate() {
                if let Some(at) = der.get_mut(place * 7) {
                    *at ^= byte;
                }
            }
            let _ = Subject::of(&der);
        }
    }
}
