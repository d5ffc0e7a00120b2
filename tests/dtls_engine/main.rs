//! The DTLS engine on a real socket, against the clients of other houses: OpenSSL's
//! and GnuTLS's commands, Mbed TLS, and webrtc-rs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod peers;
mod server;

use std::path::{Path, PathBuf};
use std::process::Command;

use exproto_sidecar::tls::Identity;
use exproto_sidecar::transport::dtls::{ClientCertificates, Options};
use tempfile::TempDir;

use peers::{Mbed, command, openssl};
use server::{Event, Server};

const PSK: &str = "00112233445566778899aabbccddeeff";

/// Certificates of every kind, made by the `openssl` command, and a file of keys.
struct Files {
    dir: TempDir,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("psk"), format!("meter:{PSK}\n")).unwrap();
        let files = Self { dir };
        for authority in ["ca", "other-ca"] {
            files.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
                 -subj /CN={authority} -keyout {authority}-key.pem -out {authority}.pem"
            ));
        }
        files.issue("ca", "server-ec", "ec -pkeyopt ec_paramgen_curve:P-256");
        files.issue("ca", "server-rsa", "rsa:2048");
        files.issue("ca", "device", "ec -pkeyopt ec_paramgen_curve:P-256");
        files.issue(
            "other-ca",
            "stranger",
            "ec -pkeyopt ec_paramgen_curve:P-256",
        );
        files
    }

    fn issue(&self, authority: &str, name: &str, key: &str) {
        let subject = name.split('-').next().unwrap();
        self.openssl(&format!(
            "req -newkey {key} -nodes -subj /CN={subject} -keyout {name}-key.pem -out {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA {authority}.pem -CAkey {authority}-key.pem \
             -CAcreateserial -days 2 -out {name}.pem"
        ));
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(self.dir.path())
            .output()
            .expect("openssl: see scripts/test.sh");
        assert!(output.status.success(), "{arguments}: {output:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn identity(&self, name: &str) -> Identity {
        Identity {
            certfile: self.path(&format!("{name}.pem")),
            keyfile: self.path(&format!("{name}-key.pem")),
        }
    }

    /// Both certificates, and keys.
    fn options(&self) -> Options {
        Options {
            identities: vec![self.identity("server-ec"), self.identity("server-rsa")],
            client_authorities: vec![self.path("ca.pem")],
            psk_file: Some(self.path("psk")),
            ..Options::default()
        }
    }

    fn der(&self, name: &str) -> Vec<u8> {
        self.openssl(&format!("x509 -in {name}.pem -outform DER -out {name}.der"));
        std::fs::read(self.path(&format!("{name}.der"))).unwrap()
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn openssl_checks_either_certificate() {
    let files = Files::new();
    let server = Server::start(&files.options());
    let authority = text(&files.path("ca.pem"));
    for cipher in [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-CCM8:@SECLEVEL=0",
    ] {
        let mut device = openssl(server.address, "-verify_return_error -CAfile")
            .also(&authority)
            .also("-cipher")
            .also(cipher)
            .start();
        device.expect_echo("over-openssl");
        let (peer, suite) = server.established();
        assert_eq!(peer.certificate, None);
        assert!(cipher.starts_with(&suite), "{suite}");
        device.finish();
        assert_eq!(server.closed(), None, "it said goodbye");
    }
}

#[test]
fn openssl_shows_a_certificate() {
    let files = Files::new();
    let mut options = files.options();
    options.client_certificates = ClientCertificates::Required;
    let server = Server::start(&options);
    let with = |name: &str| {
        openssl(server.address, "-cert")
            .also(text(&files.path(&format!("{name}.pem"))))
            .also("-key")
            .also(text(&files.path(&format!("{name}-key.pem"))))
    };
    let mut device = with("device").start();
    device.expect_echo("hello");
    let (peer, _) = server.established();
    assert_eq!(peer.certificate.as_deref(), Some(&files.der("device")[..]));
    device.finish();
    assert_eq!(server.closed(), None);

    let stranger = with("stranger").start();
    let failure = server.closed().expect("a failure");
    assert!(failure.contains("certificate verify failed"), "{failure}");
    assert!(stranger.output().contains("unknown ca"));

    let nobody = openssl(server.address, "").start();
    let failure = server.closed().expect("a failure");
    assert!(
        failure.contains("did not return a certificate"),
        "{failure}"
    );
    drop(nobody);

    // Asked, and not required.
    options.client_certificates = ClientCertificates::Asked;
    let server = Server::start(&options);
    let mut nobody = openssl(server.address, "").start();
    nobody.expect_echo("hello");
    assert_eq!(server.established().0.certificate, None);
}

/// Both sides have a certificate of an authority that the other one trusts only
/// through a second one.
#[test]
fn openssl_with_chains() {
    let files = Files::new();
    std::fs::write(files.path("ca.ext"), "basicConstraints=critical,CA:TRUE\n").unwrap();
    files.issue("ca", "middle", "ec -pkeyopt ec_paramgen_curve:P-256");
    files.openssl(
        "x509 -req -in middle.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 2 \
         -extfile ca.ext -out middle.pem",
    );
    for name in ["server-far", "device-far"] {
        files.issue("middle", name, "rsa:2048");
        let chain = ["middle.pem", &format!("{name}.pem")]
            .map(|name| std::fs::read_to_string(files.path(name)).unwrap());
        std::fs::write(
            files.path(&format!("{name}.pem")),
            chain[1].clone() + &chain[0],
        )
        .unwrap();
    }
    let options = Options {
        identities: vec![files.identity("server-far")],
        client_certificates: ClientCertificates::Required,
        ..files.options()
    };
    let server = Server::start(&options);
    let mut device = openssl(server.address, "-verify_return_error -CAfile")
        .also(text(&files.path("ca.pem")))
        .also("-cert")
        .also(text(&files.path("device-far.pem")))
        .also("-key")
        .also(text(&files.path("device-far-key.pem")))
        .also("-cert_chain")
        .also(text(&files.path("middle.pem")))
        .start();
    device.expect_echo("far from home");
    let (peer, _) = server.established();
    assert_eq!(
        peer.certificate.as_deref(),
        Some(&files.der("device-far")[..])
    );
}

#[test]
fn openssl_with_a_key() {
    let files = Files::new();
    let mut options = files.options();
    // A device with a key is not asked for a certificate.
    options.client_certificates = ClientCertificates::Required;
    let server = Server::start(&options);
    for cipher in ["PSK-AES128-GCM-SHA256", "PSK-AES128-CCM8:@SECLEVEL=0"] {
        let mut device = openssl(server.address, "-psk_identity meter -cipher")
            .also(cipher)
            .also("-psk")
            .also(PSK)
            .start();
        device.expect_echo("with a key");
        let (peer, _) = server.established();
        assert_eq!(peer.psk_identity.as_deref(), Some(&b"meter"[..]));
        device.finish();
        assert_eq!(server.closed(), None);
    }
    let unknown = openssl(server.address, "-psk_identity nobody -cipher PSK -psk")
        .also(PSK)
        .start();
    let failure = server.closed().expect("a failure");
    assert!(failure.contains("identity not found"), "{failure}");
    assert!(unknown.output().contains("unknown psk identity"));
    // A wrong key: its Finished cannot be read, which looks like a bad datagram.
    let wrong = openssl(server.address, "-psk_identity meter -cipher PSK -psk ffff").start();
    assert_eq!(server.next_within(3), None);
    drop(wrong);
}

#[test]
fn openssl_with_small_records() {
    let files = Files::new();
    let server = Server::start(&files.options());
    let mut device = openssl(server.address, "-maxfraglen 512").start();
    device.expect_echo("hello");
    server.established();
    assert_eq!(server.limit(), 512);
}

#[test]
fn gnutls_with_certificates_and_with_a_key() {
    let files = Files::new();
    let mut options = files.options();
    options.client_certificates = ClientCertificates::Asked;
    let server = Server::start(&options);
    let start = |more: &[&str]| {
        let port = server.address.port().to_string();
        // Without it its output waits until it exits.
        let fixed = [
            "-oL",
            "gnutls-cli",
            "--udp",
            "--insecure",
            "127.0.0.1",
            "--port",
            &port,
        ];
        command("stdbuf", fixed.iter().chain(more)).start()
    };
    let certificate = text(&files.path("device.pem"));
    let key = text(&files.path("device-key.pem"));
    let mut device = start(&["--x509certfile", &certificate, "--x509keyfile", &key]);
    device.expect_echo("over gnutls");
    let (peer, _) = server.established();
    assert_eq!(peer.certificate.as_deref(), Some(&files.der("device")[..]));
    device.finish();
    assert_eq!(server.closed(), None);

    // Not ECDHE-PSK: gnutls-cli 3.7 crashes over it, with any server.
    for priority in [
        "NORMAL:-KX-ALL:+PSK",
        "NORMAL:-KX-ALL:+PSK:-CIPHER-ALL:+AES-128-CCM-8",
    ] {
        let mut device = start(&[
            "--pskusername",
            "meter",
            "--pskkey",
            PSK,
            "--priority",
            priority,
        ]);
        device.expect_echo("with a key");
        let (peer, _) = server.established();
        assert_eq!(peer.psk_identity.as_deref(), Some(&b"meter"[..]));
        device.finish();
        assert_eq!(server.closed(), None);
    }
}

#[test]
fn mbed_tls_with_a_certificate_and_with_a_key() {
    let files = Files::new();
    let mut options = files.options();
    options.client_certificates = ClientCertificates::Asked;
    let server = Server::start(&options);
    let mbed = Mbed::build(files.dir.path());
    let certificate = text(&files.path("device.pem"));
    let key = text(&files.path("device-key.pem"));
    let authority = text(&files.path("ca.pem"));
    let mut device = mbed.start(server.address, &["cert", &authority, &certificate, &key]);
    device.expect_echo("over mbed tls");
    let (peer, _) = server.established();
    assert_eq!(peer.certificate.as_deref(), Some(&files.der("device")[..]));
    device.finish();
    assert_eq!(server.closed(), None);

    let mut device = mbed.start(server.address, &["psk", "meter", PSK]);
    device.expect_echo("with a key");
    let (peer, suite) = server.established();
    assert_eq!(peer.psk_identity.as_deref(), Some(&b"meter"[..]));
    assert_eq!(suite, "PSK-AES128-CCM8");
    device.finish();
    assert_eq!(server.closed(), None);
}

#[tokio::test]
async fn webrtc_with_a_certificate_and_with_a_key() {
    let files = Files::new();
    let server = Server::start(&files.options());
    for psk in [None, Some(PSK)] {
        let device = peers::webrtc(server.address, psk).await;
        let mut buffer = [0; 100];
        for message in [&b"one"[..], b"two"] {
            device.write(message, None).await.unwrap();
            let count = device.read(&mut buffer, None).await.unwrap();
            assert_eq!(&buffer[..count], message);
        }
        let (peer, _) = server.established();
        let expected = psk.map(|_| &b"meter"[..]);
        assert_eq!(peer.psk_identity.as_deref(), expected);
        device.close().await.unwrap();
        assert_eq!(server.closed(), None);
    }
}

#[test]
fn a_flood_from_strangers_leaves_no_trace() {
    let files = Files::new();
    let server = Server::start(&files.options());
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for number in 0..20_000_u32 {
        let mut datagram = vec![22, 0xfe, 0xfd, 0, 0, 0, 0];
        datagram.extend(number.to_be_bytes());
        datagram.extend([0, 30, 1]);
        datagram.extend([0x5a; 29]);
        stranger.send_to(&datagram, server.address).unwrap();
    }
    let mut device = openssl(server.address, "").start();
    device.expect_echo("still there");
    let (_, suite) = server.established();
    assert!(suite.starts_with("ECDHE"), "{suite}");
    assert!(matches!(
        server.next_within(0),
        None | Some(Event::Closed(None))
    ));
}
