//! Certificates made for a test.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// An authority of a test's own.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
    name: String,
}

/// The files of a certificate.
#[derive(Clone)]
pub struct Files {
    pub cert: String,
    pub key: String,
}

impl Authority {
    /// Writes its certificate, and all that it makes, into `dir`.
    pub fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(Self::params(name), key).unwrap();
        fs::write(dir.join(format!("{name}.pem")), issuer.pem()).unwrap();
        Self {
            issuer,
            dir: dir.to_owned(),
            name: name.to_owned(),
        }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    /// An authority whose certificate this one has made: devices that are its own show
    /// both certificates.
    pub fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::signed_by(Self::params(name), key, &self.issuer).unwrap();
        Self {
            issuer,
            dir: self.dir.clone(),
            name: name.to_owned(),
        }
    }

    /// A client's certificate, and in the same file the one of this authority.
    pub fn client_chain(&self, name: &str) -> Files {
        let files = self.client(name);
        let own = fs::read_to_string(&files.cert).unwrap();
        fs::write(&files.cert, own + &self.issuer.pem()).unwrap();
        files
    }

    /// The file with its certificate.
    pub fn file(&self) -> String {
        let path = self.dir.join(format!("{}.pem", self.name));
        path.display().to_string()
    }

    /// A certificate for this host name or address.
    pub fn server(&self, host: &str) -> Files {
        self.issue("server", host, false)
    }

    /// One that was good until long ago.
    pub fn expired(&self, host: &str) -> Files {
        self.issue("expired", host, true)
    }

    /// A client's certificate.
    pub fn client(&self, name: &str) -> Files {
        self.issue(name, name, false)
    }

    fn issue(&self, name: &str, subject: &str, expired: bool) -> Files {
        let mut params = CertificateParams::new(vec![subject.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, subject);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        if expired {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.dir.join(format!("{}-{name}{end}.pem", self.name));
        fs::write(path(""), cert.pem()).unwrap();
        fs::write(path("-key"), key.serialize_pem()).unwrap();
        Files {
            cert: path("").display().to_string(),
            key: path("-key").display().to_string(),
        }
    }
}
