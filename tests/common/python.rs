//! Handlers in Python, run by the interpreter that `scripts/test.sh` makes ready.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::within;

/// `tests/python_handler/handler.py`, which says what a device's bytes do. Killed when
/// dropped.
pub struct Python {
    child: Child,
    out: watch::Receiver<Vec<String>>,
}

impl Python {
    /// Runs it until it listens to this port.
    pub async fn start(port: u16, arguments: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python: PathBuf = root.join("target/examples/venv/bin/python");
        assert!(
            python.exists(),
            "{} is missing: scripts/test.sh makes it ready",
            python.display()
        );
        let mut child = Command::new(python)
            .arg(root.join("tests/python_handler/handler.py"))
            .arg(port.to_string())
            .args(arguments)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, out) = watch::channel(Vec::new());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                sender.send_modify(|all| all.push(line));
            }
        });
        let python = Self { child, out };
        python.printed("listening", 1).await;
        python
    }

    /// Waits until so many lines begin with this.
    pub async fn printed(&self, beginning: &str, count: usize) -> Vec<String> {
        let what = format!("{count} lines {beginning:?} of a handler in Python");
        self.wait(&what, |lines| {
            let lines = lines.iter().filter(|line| line.starts_with(beginning));
            let lines: Vec<String> = lines.cloned().collect();
            (lines.len() >= count).then_some(lines)
        })
        .await
    }

    /// Waits until `look` finds what it wants in the lines so far.
    pub async fn wait<T>(&self, what: &str, mut look: impl FnMut(&[String]) -> Option<T>) -> T {
        let mut out = self.out.clone();
        within(what, async {
            loop {
                if let Some(found) = look(&out.borrow_and_update()) {
                    return found;
                }
                out.changed().await.unwrap();
            }
        })
        .await
    }

    /// Waits until it was told of the device with this local port.
    pub async fn created(&self, port: u16) -> String {
        let beginning = format!("created {port} ");
        let line = self.printed(&beginning, 1).await.remove(0);
        line[beginning.len()..].to_owned()
    }

    /// What it has printed so far.
    pub fn output(&self) -> Vec<String> {
        self.out.borrow().clone()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends it in the middle of whatever it does: all that it has printed.
    pub async fn kill(mut self) -> Vec<String> {
        within("the handler's end", self.child.kill())
            .await
            .unwrap();
        // The sender goes when there is nothing more to read.
        let end = async { while self.out.changed().await.is_ok() {} };
        within("the rest of a handler's output", end).await;
        self.output()
    }
}

/// What handlers noted, one run after another.
#[derive(Clone, Default)]
pub struct Notes {
    /// Connections that they were told of, in order.
    pub created: Vec<String>,
    /// The bytes of each connection, a piece for each callback.
    pub bytes: HashMap<String, Vec<String>>,
    /// Connections whose end they were told of, and the reasons.
    pub closed: Vec<(String, String)>,
}

impl Notes {
    /// Those of one run.
    pub fn of(lines: &[String]) -> Self {
        let mut notes = Self::default();
        notes.add(lines);
        notes
    }

    /// Takes the lines of one run.
    pub fn add(&mut self, lines: &[String]) {
        for line in lines {
            let words: Vec<_> = line.splitn(3, ' ').collect();
            match *words {
                ["created", _port, conn] => self.created.push(conn.to_owned()),
                ["bytes", conn, bytes] => {
                    let pieces = self.bytes.entry(conn.to_owned()).or_default();
                    pieces.push(bytes.to_owned());
                }
                ["closed", conn, reason] => self.closed.push((conn.to_owned(), reason.to_owned())),
                ["listening"] => {}
                _ => panic!("{line}"),
            }
        }
    }

    /// All bytes of a connection.
    pub fn bytes_of(&self, conn: &str) -> String {
        self.bytes
            .get(conn)
            .map(|pieces| pieces.concat())
            .unwrap_or_default()
    }
}
