//! The program with a listener of each kind, a handler that echoes, and a look at what
//! it takes.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use exproto_sidecar::tls;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;

use crate::common::{Adapter, Admin, Authority, Broker, Call, Handler, Plan, Process, within};

/// The figures are one test's alone.
static TURN: Mutex<()> = Mutex::const_new(());

/// Guards waits for thousands of things, with several such tests on one machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Until `look` finds what it wants; for much at a time.
pub async fn patiently<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let found = timeout(PATIENCE, looking).await;
    found.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain for {what}"))
}

/// What the handler counts; it sends back whatever begins with `echo`.
#[derive(Default)]
pub struct Told {
    pub created: AtomicUsize,
    pub closed: AtomicUsize,
    pub bytes: AtomicUsize,
}

/// See the module.
pub struct Scene {
    pub handler: Handler,
    pub adapter: Adapter,
    pub admin: Admin,
    pub program: Process,
    pub told: Arc<Told>,
    pub broker: Broker,
    client: Arc<ClientConfig>,
    _dir: TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    /// With listeners `tcp`, `ssl`, `udp` and `dtls`, each `default`, whose rates are
    /// not limited, and these keys.
    pub async fn with(keys: &[(&str, &str)]) -> Self {
        Self::start(None, keys).await
    }

    /// The same with a limit of open files.
    pub async fn limited(files: u32, keys: &[(&str, &str)]) -> Self {
        Self::start(Some(files), keys).await
    }

    async fn start(files: Option<u32>, keys: &[(&str, &str)]) -> Self {
        let turn = TURN.lock().await;
        rlimit::increase_nofile_limit(u64::MAX).unwrap();
        tls::install_provider();
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        let server = authority.server("meters.example");
        let ca = authority.file();
        let client = tls::client(Some(Path::new(&ca)), None, true, &[]).unwrap();
        let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
        let mut plan = Plan::new(&broker.url(), &handler.url())
            .set("HANDLER__REQUEST_TIMEOUT", "60s")
            .set("BROKER__POOL_SIZE", "1");
        for (kind, options) in [("TCP", ""), ("SSL", "SSL"), ("UDP", ""), ("DTLS", "DTLS")] {
            let key = |key: &str| format!("LISTENERS__{kind}__DEFAULT__{key}");
            plan = plan
                .set(&key("BIND"), "127.0.0.1:0")
                .set(&key("MAX_CONN_RATE"), "infinity");
            if !options.is_empty() {
                plan = plan
                    .set(&key(&format!("{options}_OPTIONS__CERTFILE")), &server.cert)
                    .set(&key(&format!("{options}_OPTIONS__KEYFILE")), &server.key);
            }
        }
        let plan = plan.set_all(keys);
        let program = match files {
            Some(files) => Process::limited(files, plan.env()),
            None => Process::run(&plan),
        };
        let adapter = Adapter::connect(program.address("adapter on").await).await;
        let admin = program.admin().await;
        let scene = Self {
            handler,
            adapter,
            admin,
            program,
            told: Arc::default(),
            broker,
            client,
            _dir: dir,
            _turn: turn,
        };
        scene.echo();
        scene
    }

    fn echo(&self) {
        let (adapter, told) = (self.adapter.clone(), self.told.clone());
        self.handler.behave(move |event| {
            let (adapter, told) = (adapter.clone(), told.clone());
            async move {
                match event.call {
                    Call::Created(_) => told.created.fetch_add(1, Ordering::SeqCst),
                    Call::Closed(_) => told.closed.fetch_add(1, Ordering::SeqCst),
                    Call::Bytes(bytes) => {
                        if bytes.starts_with(b"echo") {
                            adapter.send(&event.conn, bytes.clone()).await.ok();
                        }
                        told.bytes.fetch_add(bytes.len(), Ordering::SeqCst)
                    }
                    _ => 0,
                };
                Ok(())
            }
        });
    }

    /// Where the listener of this name, such as `tcp.default`, listens.
    pub async fn listener(&self, name: &str) -> SocketAddr {
        let said = format!("listening listener=\"{name}\" address=");
        let line = self.program.logged(&said).await;
        let (_, address) = line.split_once(&said).unwrap();
        address.split(' ').next().unwrap().parse().unwrap()
    }

    /// The value of a metric of this listener; `reason` adds that label.
    pub async fn metric(&self, name: &str, listener: &str, reason: &str) -> f64 {
        self.admin.metric(&sample(name, listener, reason)).await
    }

    /// Connections that are open at a listener.
    pub async fn open(&self, listener: &str) -> f64 {
        self.metric("exproto_connections", listener, "").await
    }

    /// Waits until a metric is at least so much.
    pub async fn reaches(&self, name: &str, listener: &str, reason: &str, least: usize) {
        let sample = sample(name, listener, reason);
        patiently(&sample, || async {
            let enough = self.admin.metric(&sample).await > least as f64 - 0.5;
            enough.then_some(())
        })
        .await;
    }

    /// Waits until so many connections are open at a listener.
    pub async fn opens(&self, listener: &str, count: usize) {
        let what = format!("{count} open at {listener}");
        patiently(&what, || async {
            let off = self.open(listener).await - count as f64;
            (off.abs() < 0.5).then_some(())
        })
        .await;
    }

    /// Memory of the program that is in RAM, in KiB.
    pub fn rss(&self) -> usize {
        let path = format!("/proc/{}/status", self.program.id());
        let status = fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let number = line.unwrap().split_whitespace().nth(1);
        number.unwrap().parse().unwrap()
    }

    /// Open descriptors of the program.
    pub fn descriptors(&self) -> usize {
        let path = format!("/proc/{}/fd", self.program.id());
        fs::read_dir(path).unwrap().count()
    }

    /// Processor time that the program took so far.
    pub fn cpu(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.program.id());
        let stat = fs::read_to_string(path).unwrap();
        // Behind the name, which may hold anything: state is field 3 of proc(5), the
        // times, in hundredths of a second, are 14 and 15.
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let ticks = fields.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// A handshake of a well-behaved device.
    pub async fn secure(&self, tcp: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("meters.example").unwrap();
        TlsConnector::from(self.client.clone())
            .connect(name, tcp)
            .await
    }

    /// A well-behaved device over TLS.
    pub async fn tls_device(&self) -> TlsStream<TcpStream> {
        let address = self.listener("ssl.default").await;
        let tcp = TcpStream::connect(address).await.unwrap();
        within("a handshake", self.secure(tcp)).await.unwrap()
    }

    /// The bytes of a good ClientHello.
    pub async fn tls_hello(&self) -> Vec<u8> {
        let (near, mut far) = tokio::io::duplex(100_000);
        let name = ServerName::try_from("meters.example").unwrap();
        let connecting = TlsConnector::from(self.client.clone()).connect(name, near);
        let task = tokio::spawn(connecting);
        let mut hello = vec![0; 5];
        far.read_exact(&mut hello).await.unwrap();
        let length = usize::from(u16::from_be_bytes([hello[3], hello[4]]));
        hello.resize(5 + length, 0);
        far.read_exact(&mut hello[5..]).await.unwrap();
        task.abort();
        hello
    }

    /// Drains; nothing was left behind, no rule was broken, no task panicked.
    pub async fn finish(mut self) {
        let page = self.admin.get("/metrics").await.body;
        let panicked = page.lines().find(|line| {
            line.starts_with("exproto_connection_panics_total") && !line.ends_with(" 0")
        });
        assert_eq!(panicked, None);
        self.program.signal("TERM");
        let ended = timeout(PATIENCE, self.program.exit()).await;
        assert_eq!(ended.unwrap(), Some(0));
        // Whoever reads of a broken rule wants to know what else was wrong.
        let complaints = self.program.log().into_iter();
        for line in complaints.filter(|line| line.contains("WARN") || line.contains("ERROR")) {
            println!("{line}");
        }
        self.handler.check();
    }
}

fn sample(name: &str, listener: &str, reason: &str) -> String {
    match reason {
        "" => format!("{name}{{listener=\"{listener}\"}}"),
        _ => format!("{name}{{listener=\"{listener}\",reason=\"{reason}\"}}"),
    }
}

/// A well-behaved device that says something, hears it again, and so on.
pub struct Echo {
    stop: CancellationToken,
    task: JoinHandle<Echoed>,
}

/// How it was served; a figure to print.
#[derive(Debug)]
#[allow(dead_code)]
pub struct Echoed {
    pub count: usize,
    pub worst: Duration,
}

impl Echo {
    pub fn over(mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut count, mut worst) = (0, Duration::ZERO);
            while !stopped.is_cancelled() {
                let said = format!("echo {count:8}");
                let begun = Instant::now();
                stream.write_all(said.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                let mut heard = vec![0; said.len()];
                // Behind thousands of callbacks it takes its turn.
                within("an echo", stream.read_exact(&mut heard))
                    .await
                    .unwrap();
                assert_eq!(heard, said.as_bytes());
                worst = worst.max(begun.elapsed());
                count += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Echoed { count, worst }
        });
        Self { stop, task }
    }

    pub async fn over_tcp(scene: &Scene) -> Self {
        let address = scene.listener("tcp.default").await;
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    /// Hangs up. Every word came back, each within the limit that guards all waits.
    pub async fn end(self) -> Echoed {
        self.stop.cancel();
        let echoed = self.task.await.unwrap();
        assert!(echoed.count > 0);
        echoed
    }
}
