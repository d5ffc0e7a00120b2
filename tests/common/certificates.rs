//! Certificates for a test, made by the openssl program.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// An authority, a server's certificate for 127.0.0.1 and localhost, and a client's.
pub struct Certificates {
    dir: TempDir,
}

impl Certificates {
    pub fn make() -> Self {
        // The tests' own ends of TLS need one too.
        exproto_sidecar::tls::install_provider();
        let made = Self {
            dir: TempDir::new().unwrap(),
        };
        let new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
        made.openssl(&format!(
            "{new} -subj /CN=authority -keyout ca.key -out ca.crt"
        ));
        let names = "subjectAltName=IP:127.0.0.1,DNS:localhost";
        for name in ["server", "client"] {
            let signed = "-CA ca.crt -CAkey ca.key -addext basicConstraints=critical,CA:FALSE";
            made.openssl(&format!(
                "{new} {signed} -subj /CN={name} -addext {names} -keyout {name}.key -out {name}.crt"
            ));
        }
        made
    }

    fn openssl(&self, line: &str) {
        let status = Command::new("openssl")
            .args(line.split(' '))
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(
            status.expect("openssl is needed").success(),
            "openssl {line}"
        );
    }

    /// The path of `ca.crt`, `server.crt`, `server.key`, `client.crt` or `client.key`.
    pub fn path(&self, name: &str) -> String {
        let path: PathBuf = self.dir.path().join(name);
        path.display().to_string()
    }

    pub fn pem(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}
