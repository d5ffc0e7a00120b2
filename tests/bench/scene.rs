//! A gateway and a broker for the bench.

use std::net::SocketAddr;
use std::process::{Output, Stdio};

use exproto_sidecar::gateway::Gateway;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use crate::common::{Authority, Broker, Plan, free_port, within};

/// A gateway whose handler is the bench's.
pub struct Scene {
    pub gateway: Gateway,
    pub handler: String,
    pub dir: TempDir,
    pub broker: Broker,
}

impl Scene {
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// With these keys, and listeners of all kinds.
    pub async fn with(keys: &[(&str, &str)]) -> Self {
        let mut broker = Broker::absent("allow_anonymous true\n").quiet();
        broker.up().await;
        let handler = format!("127.0.0.1:{}", free_port());
        let dir = TempDir::new().unwrap();
        let server = Authority::new(dir.path(), "authority").server("127.0.0.1");
        let psk = dir.path().join("psk");
        std::fs::write(&psk, "bench:00ff10\n").unwrap();
        let any = "127.0.0.1:0";
        let plan = Plan::new(&broker.url(), &format!("http://{handler}"))
            .set("LISTENERS__SSL__DEFAULT__BIND", any)
            .set(
                "LISTENERS__SSL__DEFAULT__SSL_OPTIONS__CERTFILE",
                &server.cert,
            )
            .set("LISTENERS__SSL__DEFAULT__SSL_OPTIONS__KEYFILE", &server.key)
            .set("LISTENERS__UDP__DEFAULT__BIND", any)
            .set("LISTENERS__DTLS__DEFAULT__BIND", any)
            .set(
                "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__CERTFILE",
                &server.cert,
            )
            .set(
                "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__KEYFILE",
                &server.key,
            )
            .set(
                "LISTENERS__DTLS__DEFAULT__DTLS_OPTIONS__PSK_FILE",
                &psk.display().to_string(),
            )
            .set_all(keys);
        let gateway = Gateway::start(&plan.config()).await.unwrap();
        Self {
            gateway,
            handler,
            dir,
            broker,
        }
    }

    pub fn listener(&self, transport: &str) -> SocketAddr {
        self.gateway.addresses().listeners[&format!("{transport}.default")]
    }

    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// The bench with these arguments, and the addresses of this scene before them.
    pub fn command(&self, arguments: &str) -> Command {
        let words: Vec<&str> = arguments.split_ascii_whitespace().collect();
        let transport = words.iter().position(|word| *word == "--transport");
        let transport = transport.map_or("tcp", |at| words[at + 1]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
        command
            .args(words)
            .args(["--gateway", &self.listener(transport).to_string()])
            .args(["--adapter", &self.gateway.addresses().adapter.to_string()])
            .args(["--mqtt", &self.broker.url()])
            .args(["--json", &self.file("report.json")])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        if !arguments.contains("--handler") {
            command.args(["--handler", &self.handler]);
        }
        command
    }

    /// Runs it to its end, which is a good one, and reads the report.
    pub async fn run(&self, arguments: &str) -> Value {
        let output = finish(self.command(arguments)).await;
        assert_eq!(output.status.code(), Some(0), "{output:#?}");
        self.report()
    }

    pub fn report(&self) -> Value {
        let text = std::fs::read_to_string(self.file("report.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Runs it to a bad end, and gives the exit code and what it says.
    pub async fn fail(&self, arguments: &str) -> (i32, String) {
        let output = finish(self.command(arguments)).await;
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said)
    }
}

/// Runs it to its end.
pub async fn finish(mut command: Command) -> Output {
    within("the bench to end", command.output()).await.unwrap()
}
