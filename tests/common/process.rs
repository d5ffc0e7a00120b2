//! The gateway as a program.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::{Admin, Plan, within};

/// The binary under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_exproto-sidecar");

/// A run of the program. Killed when dropped.
pub struct Process {
    child: Child,
    out: watch::Sender<Vec<String>>,
    err: watch::Sender<Vec<String>>,
    readers: Vec<tokio::task::JoinHandle<()>>,
}

impl Process {
    /// `exproto-sidecar` with these arguments and nothing but these variables.
    pub fn start(arguments: &[&str], env: &[(String, String)]) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(arguments);
        Self::spawn(command, env)
    }

    /// The same with a limit of open files.
    pub fn limited(files: u32, env: &[(String, String)]) -> Self {
        let mut command = Command::new("/bin/sh");
        let line = format!("ulimit -n {files} && exec \"$0\"");
        command.args(["-c", &line, PROGRAM]);
        Self::spawn(command, env)
    }

    /// The gateway of a plan.
    pub fn run(plan: &Plan) -> Self {
        Self::start(&[], plan.env())
    }

    fn spawn(mut command: Command, env: &[(String, String)]) -> Self {
        let mut child = command
            .env_clear()
            .envs(env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (out, err) = (watch::Sender::default(), watch::Sender::default());
        let readers = vec![
            collect(child.stdout.take().unwrap(), out.clone()),
            collect(child.stderr.take().unwrap(), err.clone()),
        ];
        Self {
            child,
            out,
            err,
            readers,
        }
    }

    /// Waits for a line on standard output.
    pub async fn printed(&self, part: &str) -> String {
        line(&self.out, part).await
    }

    /// Waits for a line on standard error, which is the log.
    pub async fn logged(&self, part: &str) -> String {
        line(&self.err, part).await
    }

    pub fn output(&self) -> Vec<String> {
        self.out.borrow().clone()
    }

    pub fn log(&self) -> Vec<String> {
        self.err.borrow().clone()
    }

    /// The address behind a word of the ready line, such as `devices on`.
    pub async fn address(&self, word: &str) -> std::net::SocketAddr {
        let line = self.printed("is ready").await;
        address_in(&line, word)
    }

    pub async fn admin(&self) -> Admin {
        Admin(self.address("admin on").await)
    }

    pub fn id(&self) -> u32 {
        self.child.id().expect("the process has ended")
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = std::process::Command::new("kill")
            .args([format!("-{name}"), self.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end; what it printed is complete then.
    pub async fn exit(&mut self) -> Option<i32> {
        let status = within("the program's end", self.child.wait())
            .await
            .unwrap();
        for reader in self.readers.drain(..) {
            within("the end of its output", reader).await.unwrap();
        }
        status.code()
    }
}

/// The address behind a word.
pub fn address_in(line: &str, word: &str) -> std::net::SocketAddr {
    let rest = line.split(word).nth(1).expect(line).trim_start();
    let end = rest.find([' ', ',', '"']).unwrap_or(rest.len());
    let address = rest[..end].parse();
    address.unwrap_or_else(|_| panic!("no address behind {word:?} in {line:?}"))
}

async fn line(lines: &watch::Sender<Vec<String>>, part: &str) -> String {
    let mut lines = lines.subscribe();
    let found = |lines: &Vec<String>| lines.iter().any(|line| line.contains(part));
    let lines = within(part, lines.wait_for(found)).await.unwrap();
    let line = lines.iter().find(|line| line.contains(part));
    line.unwrap().clone()
}

fn collect(
    stream: impl AsyncRead + Unpin + Send + 'static,
    into: watch::Sender<Vec<String>>,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            into.send_modify(|all| all.push(line));
        }
    })
}
