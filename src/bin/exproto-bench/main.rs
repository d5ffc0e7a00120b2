//! A load generator for ExProto gateways: devices, a handler and an MQTT client in one
//! program. `exproto-bench --help` says how to use it, docs/performance.md how it measures.
//!
//! ```text
//! options -> run: handler, MQTT clients, probes, then the devices -> warm-up, measuring, draining -> report
//! lanes: a device's messages; an arrival (closed loop) or the pacer (open loop) begins the next
//! ```

mod connect;
mod device;
mod failure;
mod frame;
mod handler;
mod lanes;
mod options;
mod output;
mod pacer;
mod peer;
mod probe;
mod process;
mod report;
mod run;
mod sampler;
mod schedule;
mod setup;
mod stats;
mod threads;
mod tracker;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use exproto_sidecar::tls;

use failure::Failure;
use options::Options;
use output::Output;
use process::Process;
use report::Report;

fn main() -> ExitCode {
    tls::install_provider();
    let options = Options::parse();
    match bench(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("exproto-bench: {failure}");
            failure.code()
        }
    }
}

fn bench(options: Options) -> Result<(), Failure> {
    options.check()?;
    let processes = Process::chosen(&options.pid)?;
    let files = Files::open(&options)?;
    // Each device takes a descriptor: the soft limit is for programs that use select(2).
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        eprintln!("the limit of open files cannot be raised: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::own("no runtime", error))?;
    let outcome = runtime.block_on(run::run(options, processes))?;
    files.write(&outcome.report)?;
    outcome.failure.map_or(Ok(()), Err)
}

/// Where the report goes beside standard output.
struct Files {
    json: Option<Output>,
    chart: Option<Output>,
}

impl Files {
    fn open(options: &Options) -> Result<Self, Failure> {
        let open = |path: &Option<PathBuf>| path.as_deref().map(Output::open).transpose();
        Ok(Self {
            json: open(&options.json)?,
            chart: open(&options.chart)?,
        })
    }

    /// The report in all the forms that were asked for.
    fn write(self, report: &Report) -> Result<(), Failure> {
        // A reader that has gone, such as `head`, is no failure of ours.
        let _ = std::io::stdout().write_all(report::text::render(report).as_bytes());
        if let Some(file) = self.json {
            file.save(&format!("{:#}\n", report::json::render(report)))?;
        }
        if let Some(file) = self.chart {
            file.save(&report::chart::render(report))?;
        }
        Ok(())
    }
}
