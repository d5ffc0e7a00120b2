//! The `quickstart` command: a broker, a handler and the gateway in one process.
//!
//! ```text
//! main thread      the gateway's control loops, the device of the show, signals
//! quickstart       what is outside of a real gateway: broker, handler, MQTT client
//! terminal         writes what is to be seen, so that nothing waits for the screen
//! ```
//!
//! Only the gateway is the real thing. The rest is as far away as it would be in
//! earnest: MQTT, gRPC and the device's bytes go through sockets.

mod broker;
mod client;
mod demo;
mod handler;
mod lines;
mod mqtt;
mod plan;
mod serve;
mod terminal;
mod topics;
mod worker;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context;
use tokio::time::{Duration, Instant, timeout_at};

use crate::config::{Config, LogLevel};
use crate::gateway::{Drained, Gateway};
use crate::shutdown::Signals;
use crate::{options, telemetry};
use broker::Broker;
use handler::Lines;
use mqtt::Mqtt;
use plan::Plan;
use terminal::Terminal;
use topics::{Mounts, Topics};
use worker::Worker;

/// Longest time from the start to the end of the show. All of it takes a fraction
/// of a second where nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs it: starts everything, shows a line on its way up and a message on its way
/// down, then serves whoever tries it by hand until SIGINT or SIGTERM.
///
/// # Errors
/// An address that is taken, a configuration that only a real broker or handler
/// could satisfy, or a show that does not come to its end. The text is for a person.
pub fn run(config: &Config) -> anyhow::Result<()> {
    // Both go to a terminal, usually the same: what the gateway says in good order
    // would be in the middle of what is to be read. `info` is the default.
    let level = match config.log.level {
        LogLevel::Info => LogLevel::Warn,
        level => level,
    };
    telemetry::init(level, config.log.format)?;
    // Each device takes a descriptor: the soft limit is for programs that use select(2).
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(show_and_serve(config))
}

async fn show_and_serve(config: &Config) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("signals cannot be handled")?;
    let plan = Plan::make(config)?;
    let terminal = Terminal::start().context("no thread")?;
    let mut show = Show::start(config, plan, &terminal).await?;
    let shown = tokio::select! {
        biased;
        _ = signals.next() => None,
        shown = show.perform() => Some(shown),
    };
    let result = match shown {
        None => Ok(()),
        Some(Err(error)) => Err(error),
        Some(Ok(())) => {
            show.tell_what_to_type();
            signals.next().await;
            Ok(())
        }
    };
    terminal.say("\nStopping. A second Ctrl-C stops at once.");
    let drained = tokio::select! {
        biased;
        _ = signals.next() => std::process::exit(1),
        drained = show.stop() => drained,
    };
    let (connections, publishes) = (drained.connections, drained.publishes);
    if connections + publishes > 0 {
        tracing::warn!(connections, publishes, "left when the time was over");
    }
    terminal.finish();
    result
}

/// All that runs.
struct Show {
    gateway: Gateway,
    broker: Broker,
    broker_address: SocketAddr,
    handler: Lines,
    handler_addresses: Vec<SocketAddr>,
    mqtt: Mqtt,
    /// Where the own device connects, and everyone's first.
    device_address: SocketAddr,
    topics: Topics,
    terminal: Terminal,
    deadline: Instant,
    /// Last, so that everything above is gone when its thread ends.
    worker: Worker,
}

impl Show {
    async fn start(config: &Config, plan: Plan, terminal: &Terminal) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let max_packet_size = config.broker.max_packet_size.bytes();
        let worker = Worker::start("quickstart").context("no thread")?;
        let broker = broker::start(worker.runtime(), plan.broker, max_packet_size);
        let broker = timeout_at(deadline, broker)
            .await
            .context("the embedded broker does not start")?
            .context("the embedded broker cannot start")?;
        let gateway = Gateway::start(config).await?;

        // The real addresses are known from here on.
        let mounts = mounts(config, &gateway);
        let device_address = gateway
            .addresses()
            .listeners
            .get(&plan.device_listener)
            .copied()
            .map(reachable)
            .with_context(|| format!("the gateway has no listener {}", plan.device_listener))?;
        let topics = mounts.of(device_address.port());
        let adapter = gateway.addresses().adapter.tcp();
        let adapter = reachable(adapter.context("the adapter has no port")?);
        let client = worker.runtime().spawn(client::connect(adapter));
        let client = client
            .await?
            .with_context(|| format!("the adapter on {adapter} cannot be reached"))?;
        let handler = Lines::new(client, mounts.clone(), terminal.clone());
        let mut handler_addresses = Vec::new();
        for listener in plan.handlers {
            handler_addresses.push(listener.local_addr()?);
            let serving = serve::serve(listener, handler.clone());
            worker.runtime().spawn(serving);
        }
        let mqtt = mqtt::start(
            worker.runtime(),
            plan.broker,
            max_packet_size,
            mounts.filters(),
            handler.clone(),
            terminal.clone(),
        );
        Ok(Self {
            gateway,
            broker,
            broker_address: plan.broker,
            handler,
            handler_addresses,
            mqtt,
            device_address,
            topics,
            terminal: terminal.clone(),
            deadline,
            worker,
        })
    }

    async fn perform(&mut self) -> anyhow::Result<()> {
        self.tell_what_runs();
        let ready = timeout_at(self.deadline, self.gateway.ready()).await;
        ready.with_context(|| {
            let handlers: Vec<_> = self.handler_addresses.iter().map(display).collect();
            format!(
                "not ready within {PATIENCE:?}: the gateway does not reach the broker on {} \
                 or the handler on {}; --set log.level=debug tells which",
                self.broker_address,
                handlers.join(", "),
            )
        })?;
        let demo = demo::Demo {
            device_address: self.device_address,
            topics: &self.topics,
            handler: &self.handler,
            terminal: &self.terminal,
            deadline: self.deadline,
        };
        demo.show(&mut self.mqtt).await
    }

    fn tell_what_runs(&self) {
        let addresses = self.gateway.addresses();
        let mut rows = vec![(
            "MQTT broker",
            self.broker_address,
            "embedded; forgets everything when this ends",
        )];
        for address in &self.handler_addresses {
            rows.push((
                "handler",
                *address,
                "built in; a line of text is an MQTT message",
            ));
        }
        if let Some(adapter) = addresses.adapter.tcp() {
            rows.push(("adapter", adapter, "what the handler calls"));
        }
        for (name, address) in &addresses.listeners {
            rows.push(("devices", *address, name));
        }
        if let Some(address) = addresses.admin {
            rows.push(("admin", address, "/metrics /healthz /readyz"));
        }
        let width = rows.iter().map(|row| row.1.to_string().len()).max();
        let width = width.unwrap_or_default();
        let mut text = String::from("ExProto Sidecar quickstart: everything in one process.\n\n");
        for (what, address, note) in rows {
            let address = address.to_string();
            text.push_str(&format!("  {what:<11}   {address:<width$}   {note}\n"));
        }
        text.push_str("\nA device sends a line up to MQTT, and a message comes down to it:\n");
        self.terminal.say(&text);
    }

    fn tell_what_to_type(&self) {
        let (device, broker) = (self.device_address, self.broker_address);
        let mqtt = format!("-h {} -p {}", broker.ip(), broker.port());
        let next = self.handler.next_clientid();
        let filter = shell_quoted(&self.topics.up_filter());
        let down = shell_quoted(&self.topics.down(&next));
        let (ip, port) = (device.ip(), device.port());
        self.terminal.say(&format!(
            "
It works. Now by hand, each in a terminal of its own:

  nc {ip} {port}
  mosquitto_sub {mqtt} -t {filter} -v
  mosquitto_pub {mqtt} -t {down} -m hello

nc is a device: its first line tells its name (the next is {next}) and its topics. What you
type there goes up, what you publish comes down, and both are shown here as they pass.
On Debian the three are in the packages netcat-openbsd and mosquitto-clients.

Ctrl-C ends it.
"
        ));
    }

    /// The gateway first, while broker and handler are there; then they.
    async fn stop(self) -> Drained {
        let drained = self.gateway.drain().await;
        self.mqtt.stop().await;
        self.broker.stop().await;
        drop(self.worker);
        drained
    }
}

/// Which topics the devices of each listener have.
fn mounts(config: &Config, gateway: &Gateway) -> Mounts {
    let ports = &gateway.addresses().listeners;
    let listeners = config.listeners.enabled().filter_map(|listener| {
        let address = ports.get(&listener.full_name())?;
        let mountpoint = options::mountpoint(config, &listener).to_owned();
        Some((address.port(), Topics::new(mountpoint)))
    });
    Mounts::new(listeners.collect())
}

/// Where a socket bound to `address` is reached from this machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn display(address: &SocketAddr) -> String {
    address.to_string()
}

/// One word for a POSIX shell.
fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
