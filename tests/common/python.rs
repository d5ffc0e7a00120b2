//! Handlers in Python, run by the interpreter that `scripts/test.sh` makes ready.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::within;

/// A running script. Killed when dropped.
pub struct Python {
    child: Child,
    out: watch::Receiver<Vec<String>>,
}

impl Python {
    /// Runs a script of the repository until it has printed its first line.
    pub async fn start(script: &str, arguments: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python: PathBuf = root.join("target/examples/venv/bin/python");
        assert!(
            python.exists(),
            "{} is missing: scripts/test.sh makes it ready",
            python.display()
        );
        let mut child = Command::new(python)
            .arg(root.join(script))
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
        python.printed("", 1).await;
        python
    }

    /// Waits until so many lines begin with this.
    pub async fn printed(&self, beginning: &str, count: usize) -> Vec<String> {
        let mut out = self.out.clone();
        let of_these = |lines: &Vec<String>| -> Vec<String> {
            let lines = lines.iter().filter(|line| line.starts_with(beginning));
            lines.cloned().collect()
        };
        let what = format!("{count} lines {beginning:?} of a script");
        let enough = |lines: &Vec<String>| of_these(lines).len() >= count;
        let lines = within(&what, out.wait_for(enough)).await.unwrap();
        of_these(&lines)
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
        within("the script's end", self.child.kill()).await.unwrap();
        // The sender goes when there is nothing more to read.
        let end = async { while self.out.changed().await.is_ok() {} };
        within("the rest of a script's output", end).await;
        self.output()
    }
}
