//! Memory of idle connections: `cargo bench --bench idle`.
//!
//! Method: the gateway runs as a program of its own, beside a real Mosquitto and a
//! handler that takes every callback. Its resident set (VmRSS of /proc/PID/status) is
//! read when FIRST devices are connected, and again when CONNECTIONS more are: each
//! has sent four bytes, the handler has taken them all, and twenty seconds have passed
//! without a byte. They come fifty at a time, the next when the handler has taken the
//! bytes of the last. Each has the timer of an idle_timeout that is far off. The difference, divided by the number, is what one costs: allocator,
//! runtime, tables and all. The kernel's buffers are not in it, nor is what is there
//! once whatever the number, such as buffers of the threads.
//!
//! `EXPROTO_BENCH_CONNECTIONS=5000`, `EXPROTO_BENCH_KINDS=tcp,ssl,udp,dtls`; further variables for
//! the gateway, such as those of an allocator: `EXPROTO_BENCH_ENV=NAME=VALUE,...`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{Authority, Broker, Files, Handler, Plan, Process};
use exproto_sidecar::tls;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream, SslVerifyMode};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

/// Connections that are opened at the same time.
const AT_ONCE: usize = 50;

/// How long nothing happens before the memory is read.
const IDLE: Duration = Duration::from_secs(20);

/// Devices that are there before it is measured.
const FIRST: usize = 500;

/// What keeps a connection open.
type Kept = Box<dyn std::any::Any + Send>;

struct Bench {
    connections: usize,
    authority: Authority,
    server: Files,
    _dir: TempDir,
}

fn variable(name: &str, default: &str) -> String {
    std::env::var(format!("EXPROTO_BENCH_{name}")).unwrap_or_else(|_| default.to_owned())
}

fn resident_kib(pid: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

/// The n-th device's own address: a port's worth of devices for each.
fn source(number: usize) -> SocketAddr {
    let host = u8::try_from(number / 10_000).unwrap() + 2;
    (Ipv4Addr::new(127, 0, 0, host), 0).into()
}

/// Datagrams as OpenSSL takes and gives them.
struct Datagrams(std::net::UdpSocket);

impl std::io::Read for Datagrams {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(buffer)
    }
}

impl std::io::Write for Datagrams {
    fn write(&mut self, datagram: &[u8]) -> std::io::Result<usize> {
        self.0.send(datagram)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn dtls_client(from: SocketAddr, to: SocketAddr) -> SslStream<Datagrams> {
    let mut builder = SslContext::builder(SslMethod::dtls_client()).unwrap();
    builder.set_verify(SslVerifyMode::NONE);
    let mut ssl = Ssl::new(&builder.build()).unwrap();
    ssl.set_mtu(1200).unwrap();
    let socket = std::net::UdpSocket::bind(from).unwrap();
    socket.connect(to).unwrap();
    let mut stream = SslStream::new(ssl, Datagrams(socket)).unwrap();
    stream.connect().unwrap();
    stream.ssl_write(b"idle").unwrap();
    stream
}

impl Bench {
    fn client(&self) -> Arc<ClientConfig> {
        let ca = self.authority.file();
        tls::client(Some(Path::new(&ca)), None, true, &[]).unwrap()
    }

    async fn open(&self, kind: &str, address: SocketAddr, number: usize) -> Kept {
        match kind {
            "udp" => {
                let socket = UdpSocket::bind(source(number)).await.unwrap();
                socket.connect(address).await.unwrap();
                socket.send(b"idle").await.unwrap();
                Box::new(socket)
            }
            "dtls" => {
                let handshake = move || dtls_client(source(number), address);
                Box::new(tokio::task::spawn_blocking(handshake).await.unwrap())
            }
            "ssl" => {
                let stream = TcpStream::connect(address).await.unwrap();
                let name = ServerName::try_from("meters.example").unwrap();
                let connector = TlsConnector::from(self.client());
                let mut stream = connector.connect(name, stream).await.unwrap();
                stream.write_all(b"idle").await.unwrap();
                stream.flush().await.unwrap();
                Box::new(stream)
            }
            _ => {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.write_all(b"idle").await.unwrap();
                Box::new(stream)
            }
        }
    }

    async fn run(&self, kind: &str) {
        let broker = Broker::start().await;
        let handler = Handler::start().await;
        let port = common::free_port();
        let key = |name: &str| format!("LISTENERS__{}__DEFAULT__{name}", kind.to_uppercase());
        let tls = match kind {
            "dtls" => "DTLS_OPTIONS",
            _ => "SSL_OPTIONS",
        };
        let mut plan = Plan::new(&broker.url(), &handler.url())
            .set("IDLE_TIMEOUT", "1h")
            .set(&key("BIND"), &format!("127.0.0.1:{port}"))
            .set(&key("MAX_CONN_RATE"), "infinity");
        if tls.starts_with(&kind.to_uppercase()) {
            plan = plan
                .set(&key(&format!("{tls}__CERTFILE")), &self.server.cert)
                .set(&key(&format!("{tls}__KEYFILE")), &self.server.key);
        }
        let mut env = plan.env().to_vec();
        let more = variable("ENV", "");
        let more = more.split(',').filter_map(|pair| pair.split_once('='));
        env.extend(more.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let process = Process::start(&[], &env);
        let admin = process.admin().await;
        admin.ready_until(200, "ready").await;
        let address = (Ipv4Addr::LOCALHOST, port).into();
        let received = format!("exproto_received_bytes_total{{listener=\"{kind}.default\"}}");
        let busy = "exproto_callbacks_in_flight{handler=\"default\"}";
        let mut kept = Vec::new();
        let mut resident = Vec::new();
        for total in [FIRST, FIRST + self.connections] {
            for first in (kept.len()..total).step_by(AT_ONCE) {
                let numbers = first..total.min(first + AT_ONCE);
                let opened = numbers.map(|number| self.open(kind, address, number));
                kept.extend(futures_util::future::join_all(opened).await);
                // What thousands of callbacks at once leave behind is not what is measured.
                let all = 4.0 * kept.len() as f64 - 0.5;
                admin.metric_until(&received, |bytes| bytes > all).await;
                admin.metric_until(busy, |calls| calls < 0.5).await;
            }
            tokio::time::sleep(IDLE).await;
            resident.push(resident_kib(process.id()));
        }
        let (before, after) = (resident[0], resident[1]);
        let each = (after - before) as f64 / self.connections as f64;
        println!(
            "{kind:>5}: {each:.2} KiB a connection ({} idle, {before} -> {after} KiB resident)",
            self.connections
        );
        drop(kept);
    }
}

fn main() {
    tls::install_provider();
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let dir = TempDir::new().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let bench = Bench {
        connections: variable("CONNECTIONS", "5000").parse().unwrap(),
        server: authority.server("meters.example"),
        authority,
        _dir: dir,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for kind in variable("KINDS", "tcp,ssl,udp,dtls").split(',') {
        runtime.block_on(bench.run(kind));
    }
}
