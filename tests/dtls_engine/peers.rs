//! Devices of other houses.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dtls::cipher_suite::CipherSuiteId;
use dtls::config::Config;
use dtls::conn::DTLSConn;

/// How long a device may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A command that carries its input to the server and what comes back to its output.
pub struct Plan {
    program: String,
    arguments: Vec<OsString>,
}

pub fn command(
    program: &str,
    arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>,
) -> Plan {
    let arguments = arguments.into_iter();
    Plan {
        program: program.to_owned(),
        arguments: arguments.map(|a| a.as_ref().to_owned()).collect(),
    }
}

/// `openssl s_client` with some arguments more.
pub fn openssl(server: SocketAddr, arguments: &str) -> Plan {
    let fixed = format!("s_client -dtls1_2 -connect {server} {arguments}");
    command("openssl", fixed.split_whitespace())
}

impl Plan {
    pub fn also(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    pub fn start(self) -> Device {
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}: see scripts/test.sh", self.program));
        let output = Arc::new(Mutex::new(Vec::new()));
        collect(child.stdout.take().unwrap(), output.clone());
        collect(child.stderr.take().unwrap(), output.clone());
        Device { child, output }
    }
}

fn collect(mut from: impl Read + Send + 'static, into: Arc<Mutex<Vec<u8>>>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            into.lock().unwrap().extend(&buffer[..count]);
        }
    });
}

/// One that runs.
pub struct Device {
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Device {
    /// Sends a line, and waits for it to come back.
    pub fn expect_echo(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
        let start = Instant::now();
        while !self.text().contains(line) {
            assert!(start.elapsed() < LIMIT, "no echo: {}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends its input: it says goodbye and exits.
    pub fn finish(mut self) {
        drop(self.child.stdin.take());
        self.wait();
    }

    /// All it wrote until it exited by itself.
    pub fn output(mut self) -> String {
        self.wait();
        // Its output is read to the end by then, or soon after.
        std::thread::sleep(Duration::from_millis(50));
        self.text()
    }

    fn wait(&mut self) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < LIMIT, "it stays: {}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client made of Debian's Mbed TLS, which comes without programs.
pub struct Mbed {
    program: PathBuf,
}

impl Mbed {
    pub fn build(dir: &Path) -> Self {
        let program = dir.join("mbedtls_client");
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/dtls_engine/mbedtls_client.c"
        );
        let output = Command::new("cc")
            .args([source, "-o"])
            .arg(&program)
            .args(["-lmbedtls", "-lmbedx509", "-lmbedcrypto"])
            .output()
            .expect("cc: see scripts/test.sh");
        assert!(
            output.status.success(),
            "libmbedtls-dev: see scripts/test.sh: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { program }
    }

    pub fn start(&self, server: SocketAddr, arguments: &[&str]) -> Device {
        let port = server.port().to_string();
        let arguments = [&port[..]].into_iter().chain(arguments.iter().copied());
        command(&self.program.display().to_string(), arguments).start()
    }
}

/// The client of webrtc-rs, with the key or without.
pub async fn webrtc(server: SocketAddr, psk: Option<&str>) -> DTLSConn {
    // It brings `ring` along, and rustls does not choose between two.
    exproto_sidecar::tls::install_provider();
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    let mut config = Config {
        insecure_skip_verify: true,
        cipher_suites: vec![CipherSuiteId::Tls_Ecdhe_Ecdsa_With_Aes_128_Gcm_Sha256],
        ..Config::default()
    };
    if let Some(psk) = psk {
        let key: Vec<u8> = (0..psk.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&psk[at..at + 2], 16).unwrap())
            .collect();
        config.psk = Some(Arc::new(move |_| {
            Box::pin(std::future::ready(Ok(key.clone())))
        }));
        config.psk_identity_hint = Some(b"meter".to_vec());
        config.cipher_suites = vec![CipherSuiteId::Tls_Psk_With_Aes_128_Ccm_8];
    }
    DTLSConn::new(Arc::new(socket), config, true, None)
        .await
        .unwrap()
}
