//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::failure::Failure;
use crate::frame::{HEADER, MAX_FRAME};
use crate::peer::url::Broker;

/// Largest payload over UDP and DTLS, in bytes: what one datagram of IPv4 carries, less
/// what DTLS adds.
const MAX_DATAGRAM: usize = 16 * 1024;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Bytes of a device, through the handler, to an MQTT client.
    Uplink,
    /// Bytes of a device, to the handler and back.
    Echo,
    /// A message of an MQTT client, through the handler, to a device.
    Downlink,
    /// One message of an MQTT client to every device.
    Fanout,
    /// Connections over which nothing goes: their memory.
    Idle,
    /// New connections: their rate.
    Storm,
}

impl Scenario {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Echo => "echo",
            Self::Downlink => "downlink",
            Self::Fanout => "fanout",
            Self::Idle => "idle",
            Self::Storm => "storm",
        }
    }

    /// Whether messages are sent at all.
    pub fn has_messages(self) -> bool {
        !matches!(self, Self::Idle | Self::Storm)
    }
}

/// What carries the devices' bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    Tcp,
    Ssl,
    Udp,
    Dtls,
}

impl Transport {
    /// Whether a read is a whole datagram.
    pub fn is_datagram(self) -> bool {
        matches!(self, Self::Udp | Self::Dtls)
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Ssl => "ssl",
            Self::Udp => "udp",
            Self::Dtls => "dtls",
        }
    }
}

/// Load for an ExProto gateway: this one, EMQX's, or another with the same interface.
///
/// Devices, a handler and an MQTT client in one program. It measures throughput and latency
/// from end to end, counts what is lost or comes twice, and reads the processor time and
/// memory of the processes that --pid names. The gateway's handler address must lead to
/// --handler.
///
/// A closed loop (--window) keeps so many messages of each device under way, and finds the
/// highest throughput. An open loop (--rate) sends at fixed times, whatever comes back;
/// latency counts from the time at which a message was due.
#[derive(Debug, Clone, Parser)]
#[command(name = "exproto-bench", version, after_long_help = PROTOCOL)]
pub struct Options {
    /// What is measured.
    pub scenario: Scenario,

    /// Where the gateway listens for devices.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7993")]
    pub gateway: String,
    /// What the devices speak.
    #[arg(long, value_name = "KIND", default_value = "tcp")]
    pub transport: Transport,
    /// Where the built-in handler listens. With `none` your own handler is measured: it
    /// must speak the protocol below.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9001")]
    pub handler: String,
    /// The gateway's ConnectionAdapter, for the built-in handler.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9100")]
    pub adapter: String,
    /// The broker, as `mqtt://[USER[:PASSWORD]@]HOST[:PORT]`.
    #[arg(
        long,
        value_name = "URL",
        default_value = "mqtt://127.0.0.1:1883",
        env = "EXPROTO_BENCH_MQTT",
        hide_env_values = true
    )]
    pub mqtt: Broker,
    /// MQTT clients that share the devices' topics.
    #[arg(long, value_name = "COUNT", default_value_t = 4,
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub peers: u32,

    /// Devices.
    #[arg(long, value_name = "COUNT", default_value_t = 200,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub devices: u32,
    /// Size of a message in bytes; at least 24.
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    pub payload: usize,
    /// QoS of publishes and subscriptions.
    #[arg(long, value_name = "0|1|2", default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(0..=2))]
    pub qos: u8,
    /// Closed loop: messages of each device that are under way at a time. Fan-out: messages
    /// in all. [default: 16; fan-out: 1]
    #[arg(long, value_name = "COUNT", conflicts_with = "rate",
        value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub window: Option<u32>,
    /// Open loop: messages a second, of all devices. Storm: connections a second.
    #[arg(long, value_name = "PER_SECOND",
        value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub rate: Option<u64>,
    /// Ends after so many messages instead of --duration.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub messages: Option<u64>,
    /// How long is measured.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub duration: Duration,
    /// How long messages are sent before it is measured.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    pub warmup: Duration,
    /// After so long a message counts as lost, and a connection as failed.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub timeout: Duration,
    /// How long the gateway may take to find the built-in handler: before anything is
    /// measured some devices are answered, and leave.
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = duration)]
    pub ready_timeout: Duration,
    /// Connections that are being opened at a time.
    #[arg(long, value_name = "COUNT", default_value_t = 64,
        value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub connecting: u32,
    /// New connections a second, except in a storm. Gateways refuse more than some: 1,000
    /// is a common limit.
    #[arg(long, value_name = "PER_SECOND", default_value_t = 900,
        value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub connect_rate: u64,
    /// Devices are no clients: the handler only answers their first frame. For idle and
    /// storm.
    #[arg(long)]
    pub bare: bool,
    /// Addresses from which devices connect, in turn: beyond some 28,000 connections one
    /// has no ports left.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub source: Vec<IpAddr>,

    /// Authorities for the gateway's certificate; without it any certificate will do.
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// The name in the gateway's certificate. [default: the host of --gateway]
    #[arg(long, value_name = "NAME")]
    pub server_name: Option<String>,
    /// The devices' certificate.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The key of --cert.
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Pre-shared key for DTLS, in hexadecimal.
    #[arg(long, value_name = "IDENTITY:KEY", value_parser = psk, conflicts_with_all = ["ca", "cert"])]
    pub psk: Option<Psk>,

    /// Measures this process: --pid gateway=1234. May be repeated.
    #[arg(long, value_name = "NAME=PID", value_parser = name_and_pid)]
    pub pid: Vec<(String, u32)>,
    /// Threads of this program. [default: half of the processors, at most 4]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
    /// Writes the result as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draws the result as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// Shows no progress.
    #[arg(long)]
    pub quiet: bool,
}

/// A pre-shared key. Never shown.
#[derive(Clone)]
pub struct Psk {
    pub identity: String,
    pub key: Vec<u8>,
}

impl std::fmt::Debug for Psk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Psk(***)")
    }
}

const PROTOCOL: &str = "\
The devices' protocol, for handlers of your own (--handler none). All numbers are big-endian:

   0       4     5         8        12        16             24
  +--------+-----+---------+---------+---------+--------------+---------+
  | length | kind|   run   | device  | sequence|     time     | rest    |
  +--------+-----+---------+---------+---------+--------------+---------+
    u32      u8     u24       u32       u32         u64

length counts what follows it. Over TCP and TLS frames may be joined or split; over UDP and
DTLS a datagram is one frame. What a handler does, by kind:

  H  The rest is text: `client ID`, `publish QOS TOPIC`, `subscribe QOS FILTER`, a line each.
     Authenticate as that client, subscribe to the filters, remember the topic; then send back
     the first 24 bytes with kind W and length 20. With F instead of W the rest is the reason
     why it failed. A device whose H was answered may ask again: answer again.
  U  Publish the whole frame to the topic.
  E  Send the whole frame back.
  Messages (OnReceivedMessages): send each payload, which is a frame of kind D, to the device.

Exit codes: 0 measured, also when Ctrl-C ended it or messages were lost; 1 trouble of this
program; 2 wrong options; 3 no gateway, or it refuses devices; 4 the handler's address is
taken; 5 no MQTT broker; 6 no answer: the gateway does not call the handler, or nothing comes
through; 130 ended by a signal before anything was measured.";

impl Options {
    /// What clap cannot check.
    ///
    /// # Errors
    /// A sentence on what does not go together.
    pub fn check(&self) -> Result<(), Failure> {
        let most = if self.transport.is_datagram() {
            MAX_DATAGRAM
        } else {
            MAX_FRAME
        };
        let wrong = |text: String| Err(Failure::Usage(text));
        if !(HEADER..=most).contains(&self.payload) {
            let transport = self.transport.name();
            return wrong(format!(
                "--payload: {HEADER} to {most} bytes over {transport}"
            ));
        }
        if self.psk.is_some() && self.transport != Transport::Dtls {
            return wrong("--psk is for --transport dtls".to_owned());
        }
        if self.bare && self.scenario.has_messages() {
            return wrong("--bare is for idle and storm".to_owned());
        }
        if self.rate.is_some() && self.scenario == Scenario::Idle {
            return wrong("--rate: over idle connections nothing is sent".to_owned());
        }
        if let Some(chart) = &self.chart {
            let ending = chart.extension().unwrap_or_default();
            if !ending.eq_ignore_ascii_case("svg") {
                let chart = chart.display();
                return wrong(format!(
                    "--chart {chart}: it is drawn as SVG, so its name must end in .svg"
                ));
            }
            if self.chart == self.json {
                return wrong("--json and --chart name the same file".to_owned());
            }
        }
        Ok(())
    }

    /// Whether the handler is part of this program.
    pub fn has_handler(&self) -> bool {
        self.handler != "none"
    }

    /// Messages under way in a closed loop.
    pub fn window(&self) -> u32 {
        let default = match self.scenario {
            Scenario::Fanout => 1,
            _ => 16,
        };
        self.window.unwrap_or(default)
    }

    /// Threads of this program.
    pub fn threads(&self) -> usize {
        let half = || std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4));
        self.threads
            .map_or_else(half, |threads| usize::try_from(threads).unwrap_or(1))
    }

    /// The name expected in the gateway's certificate.
    pub fn server_name(&self) -> &str {
        let host = || {
            let (host, _) = self.gateway.rsplit_once(':').unwrap_or_default();
            host.trim_start_matches('[').trim_end_matches(']')
        };
        self.server_name.as_deref().unwrap_or_else(host)
    }
}

/// A time such as `500ms`, `10s` or `2m`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text.get(digits.len()..).unwrap_or_default();
    let number: u64 = digits
        .parse()
        .map_err(|_| "a whole number with ms, s or m is needed, such as 10s".to_owned())?;
    let most = 1_000_000_000;
    match unit {
        _ if number > most => Err("too long".to_owned()),
        "ms" => Ok(Duration::from_millis(number)),
        "s" | "" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number * 60)),
        _ => Err("the units are ms, s and m".to_owned()),
    }
}

fn name_and_pid(text: &str) -> Result<(String, u32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(name, pid)| Some((name.to_owned(), pid.parse().ok()?)));
    parsed.ok_or_else(|| "NAME=PID is needed, such as gateway=1234".to_owned())
}

fn psk(text: &str) -> Result<Psk, String> {
    let help = || "IDENTITY:KEY is needed, the key in hexadecimal".to_owned();
    let (identity, hex) = text.rsplit_once(':').ok_or_else(help)?;
    let digits: Option<Vec<u8>> = hex
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits.ok_or_else(help)?;
    if digits.is_empty() || digits.len() % 2 != 0 {
        return Err(help());
    }
    let pairs = digits.chunks_exact(2);
    let key = pairs
        .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
        .collect();
    Ok(Psk {
        identity: identity.to_owned(),
        key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("3"), Ok(Duration::from_secs(3)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("1h").is_err() && duration("s").is_err());
    }

    #[test]
    fn keys_are_read_and_not_shown() {
        let psk = psk("urn:x:00Ff10").unwrap();
        assert_eq!((&*psk.identity, &*psk.key), ("urn:x", &[0, 255, 16][..]));
        assert_eq!(format!("{psk:?}"), "Psk(***)");
        assert!(super::psk("a:0").is_err() && super::psk("a:xy").is_err());
    }

    #[test]
    fn what_does_not_go_together_is_told() {
        let check = |arguments: &str| {
            let all = format!("exproto-bench {arguments}");
            Options::try_parse_from(all.split(' ')).map(|options| options.check().is_ok())
        };
        assert_eq!(check("echo").ok(), Some(true));
        assert_eq!(check("echo --payload 10").ok(), Some(false));
        assert_eq!(check("echo --payload 100000").ok(), Some(true));
        assert_eq!(
            check("echo --payload 100000 --transport udp").ok(),
            Some(false)
        );
        assert_eq!(check("echo --psk a:00").ok(), Some(false));
        assert_eq!(check("echo --bare").ok(), Some(false));
        assert!(check("echo --rate 5 --window 2").is_err());
        assert_eq!(check("echo --chart x.SVG --json x.json").ok(), Some(true));
        assert_eq!(check("echo --chart x.png").ok(), Some(false));
        assert_eq!(check("echo --chart svg").ok(), Some(false));
        assert_eq!(check("echo --chart x.svg --json x.svg").ok(), Some(false));
    }
}
