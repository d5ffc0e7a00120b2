//! The show: a device of its own, and what becomes of one line and one message.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::PATIENCE;
use super::handler::{Lines, greeted};
use super::mqtt::Mqtt;
use super::terminal::{Terminal, shown};
use super::topics::Topics;

const LINE: &str = "temperature=21.5";
const MESSAGE: &str = "fan=on";

/// Longest line that the device reads, in bytes. Its greeting has three topics.
const MAX_READ: u64 = 256 * 1024;

/// Longest wait for the device to be forgotten: only the order of what is shown
/// depends on it.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the show needs.
pub(super) struct Demo<'a> {
    pub(super) device_address: SocketAddr,
    pub(super) topics: &'a Topics,
    pub(super) handler: &'a Lines,
    pub(super) terminal: &'a Terminal,
    pub(super) deadline: Instant,
}

impl Demo<'_> {
    /// A line goes up, a message comes down, and both are seen where they arrive.
    ///
    /// # Errors
    /// What has not happened in time.
    pub(super) async fn show(&self, mqtt: &mut Mqtt) -> anyhow::Result<()> {
        let address = self.device_address;
        self.step("an MQTT client subscribed at the broker", mqtt.subscribed())
            .await?;
        let connecting = async { Ok(TcpStream::connect(address).await?) };
        let what = format!("a device connected to {address}");
        let mut device = BufReader::new(self.step(&what, connecting).await?);

        let what = "the handler's greeting at the device";
        let greeting = self.step(what, read_line(&mut device)).await?;
        let clientid = greeted(&greeting)
            .with_context(|| format!("not a greeting: {}", shown(greeting.as_bytes())))?;

        self.terminal
            .say(&format!("  {clientid} sends the line: {LINE}"));
        let sending = async { Ok(device.write_all(format!("{LINE}\n").as_bytes()).await?) };
        self.step("the device's line sent", sending).await?;
        let up = self.topics.up(clientid);
        let what = format!("the device's line on MQTT, topic {up}");
        self.step(&what, mqtt.sees(&up, LINE)).await?;

        let down = self.topics.down(clientid);
        let what = format!("a message published on {down}");
        let publishing = mqtt.publish(down.clone(), MESSAGE);
        self.step(&what, publishing).await?;
        self.step(&what, mqtt.sees(&down, MESSAGE)).await?;
        let what = "the message at the device";
        let received = self.step(what, read_line(&mut device)).await?;
        ensure!(
            received == MESSAGE,
            "the device received {} in place of {MESSAGE}",
            shown(received.as_bytes())
        );
        self.terminal
            .say(&format!("  {clientid} received the line: {received}"));

        drop(device);
        let _ = tokio::time::timeout(FAREWELL, self.handler.gone(clientid)).await;
        Ok(())
    }

    /// Waits for one thing to happen, and says what when it does not.
    async fn step<T>(
        &self,
        what: &str,
        happens: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        match timeout_at(self.deadline, happens).await {
            Ok(result) => result.with_context(|| format!("missing: {what}")),
            Err(_) => bail!(
                "missing {PATIENCE:?} after the start: {what}; --set log.level=debug tells more"
            ),
        }
    }
}

/// One line without its end. Not cancel safe.
async fn read_line(device: &mut BufReader<TcpStream>) -> anyhow::Result<String> {
    let mut line = String::new();
    let read = device.take(MAX_READ).read_line(&mut line).await?;
    ensure!(read > 0, "the gateway closed the connection");
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
