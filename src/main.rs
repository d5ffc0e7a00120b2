//! Command line, configuration, logging, run, exit code.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use exproto_sidecar::auth::hash::Scheme;
use exproto_sidecar::config::{self, Config, LogFormat, Sources};
use exproto_sidecar::gateway::{self, Addresses, Gateway};
use exproto_sidecar::shutdown::Signals;
use exproto_sidecar::{options, passwd, telemetry, tls};

/// Thousands of calls that are under way at a time are what glibc's is bad at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code of a configuration that cannot be used.
const BAD_CONFIGURATION: u8 = 2;

/// Any device protocol over TCP, TLS, UDP or DTLS, handled in any language over gRPC, on any MQTT
/// broker.
#[derive(Parser)]
#[command(name = "exproto-sidecar", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    layers: LayerArguments,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the gateway. The default.
    Run,
    /// Checks the configuration and prints what is in effect, secrets masked.
    Check,
    /// Prints the default configuration file, with every key explained.
    DefaultConfig,
    /// Makes the line of a user for a file of users, with the hash of a password that it asks
    /// for, or reads from standard input where that is no terminal.
    Passwd(PasswdArguments),
    /// Shows the whole thing at work, with a broker, a handler and a device of its own.
    #[cfg(feature = "quickstart")]
    Quickstart,
}

#[derive(Args)]
struct PasswdArguments {
    /// The user name, or the client id.
    name: String,
    /// The file in which the user is put, or replaced, instead of being printed.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Hashes with bcrypt instead of argon2id.
    #[arg(long)]
    bcrypt: bool,
    /// No rule of authorization counts for this user.
    #[arg(long)]
    superuser: bool,
    /// Takes the user out of the file.
    #[arg(long, requires = "file", conflicts_with_all = ["bcrypt", "superuser"])]
    delete: bool,
}

impl From<PasswdArguments> for passwd::Request {
    fn from(arguments: PasswdArguments) -> Self {
        Self {
            name: arguments.name,
            file: arguments.file,
            scheme: match arguments.bcrypt {
                true => Scheme::Bcrypt,
                false => Scheme::Argon2id,
            },
            is_superuser: arguments.superuser,
            delete: arguments.delete,
        }
    }
}

#[derive(Args)]
struct LayerArguments {
    /// Configuration file: TOML, YAML or JSON. EXPROTO_CONFIG names it too.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets a key, above file and environment: --set broker.url=mqtt://10.0.0.1
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is needed, such as log.level=debug".to_owned()),
    }
}

fn main() -> ExitCode {
    tls::install_provider();
    let CommandLine { command, layers } = CommandLine::parse();
    let command = command.unwrap_or(Command::Run);
    let command = match command {
        Command::DefaultConfig => return print(&config::default_file()),
        Command::Passwd(arguments) => return make_user(&arguments.into()),
        command => command,
    };
    let sources = Sources {
        file: layers.config,
        env: config::process_environment(),
        set: layers.set,
    };
    let config = match load(&sources) {
        Ok(config) => config,
        Err(report) => {
            eprintln!("{report}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    let result = match command {
        Command::Check => return print(&config.to_toml()),
        Command::DefaultConfig | Command::Passwd(_) => return ExitCode::SUCCESS,
        Command::Run => run(&config),
        #[cfg(feature = "quickstart")]
        Command::Quickstart => exproto_sidecar::quickstart::run(&config),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exproto-sidecar: {error:#}");
            match error.downcast_ref() {
                Some(gateway::Error::Options(_)) => ExitCode::from(BAD_CONFIGURATION),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Reads the configuration and looks into the files that it names.
fn load(sources: &Sources) -> Result<Config, String> {
    let config = config::load(sources).map_err(|report| report.to_string())?;
    let errors = options::check(&config);
    if errors.is_empty() {
        return Ok(config);
    }
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Err(format!(
        "the configuration cannot be used:\n{}",
        lines.join("\n")
    ))
}

fn make_user(request: &passwd::Request) -> ExitCode {
    match passwd::run(request) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("exproto-sidecar: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> ExitCode {
    // A reader that has gone, such as `head`, is no failure of ours.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn run(config: &Config) -> anyhow::Result<()> {
    telemetry::init(config.log.level, config.log.format)?;
    // Each device takes a descriptor: the soft limit is for programs that use select(2).
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    runtime.block_on(async {
        let mut signals = Signals::new().context("signals cannot be handled")?;
        let format = config.log.format;
        let tell = move |addresses: &Addresses| {
            // Whether anybody reads it or not.
            let _ = writeln!(std::io::stdout(), "{}", ready_line(addresses, format));
        };
        let gateway = Gateway::start_and_tell(config, tell).await?;
        for (name, address) in &gateway.addresses().listeners {
            tracing::info!(listener = name, %address, "listening");
        }
        for missing in gateway.missing() {
            tracing::info!(missing, "waiting");
        }
        let signal = signals.next().await;
        let connections = gateway.connections();
        tracing::info!(
            signal,
            connections,
            "draining; a second signal exits at once"
        );
        let drained = tokio::select! {
            biased;
            signal = signals.next() => {
                tracing::warn!(signal, "exiting at once");
                std::process::exit(1);
            }
            drained = gateway.drain() => drained,
        };
        if drained.connections + drained.publishes > 0 {
            let (connections, publishes) = (drained.connections, drained.publishes);
            tracing::warn!(
                connections,
                publishes,
                "left when the time to drain was over"
            );
        }
        tracing::info!("stopped");
        Ok(())
    })
}

fn ready_line(addresses: &Addresses, format: LogFormat) -> String {
    let mut line = String::from("exproto-sidecar is ready:");
    for (name, address) in &addresses.listeners {
        line.push_str(&format!(" devices on {address} ({name}),"));
    }
    line.push_str(&format!(" adapter on {}", addresses.adapter));
    if let Some(admin) = addresses.admin {
        line.push_str(&format!(", admin on {admin}"));
    }
    match format {
        LogFormat::Text => line,
        // Where both outputs end in one place, every line of it is JSON.
        LogFormat::Json => serde_json::json!({"level": "INFO", "message": line}).to_string(),
    }
}
