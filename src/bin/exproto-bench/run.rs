//! A run from its start to its report.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use exproto_sidecar::shutdown::Signals;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::connect::{FirstError, Opening, explain, explain_missing};
use crate::device;
use crate::failure::Failure;
use crate::handler::Shared;
use crate::lanes::{Lanes, Phase};
use crate::options::{Options, Scenario};
use crate::pacer::Pacer;
use crate::probe::Probes;
use crate::process::{Process, Usage};
use crate::report::{Counts, ProcessReport, Report, text};
use crate::sampler::Sampler;
use crate::setup::Parts;
use crate::threads::Threads;

/// How often a run looks whether it is over.
const LOOK: Duration = Duration::from_millis(20);

/// How often it looks for messages to give up.
const SWEEP: Duration = Duration::from_millis(500);

/// How long the handler stays to be told that its connections have ended.
const FAREWELL: Duration = Duration::from_secs(5);

/// A run that ended: what it found out, and why it failed if it did.
pub struct Outcome {
    pub report: Report,
    pub failure: Option<Failure>,
}

/// Why waiting ended.
enum End {
    /// A signal.
    Interrupted(&'static str),
    /// The MQTT client's connection broke.
    Broken(Failure),
}

/// Runs what the options say, and measures these processes and its own.
///
/// # Errors
/// What kept it from measuring anything.
pub async fn run(options: Options, processes: Vec<Process>) -> Result<Outcome, Failure> {
    let mut signals =
        Signals::new().map_err(|error| Failure::own("signals cannot be handled", error))?;
    let threads =
        Threads::start(options.threads()).map_err(|error| Failure::own("no thread", error))?;
    let parts = tokio::select! {
        biased;
        signal = signals.next() => return Err(Failure::Interrupted(signal)),
        parts = Parts::set_up(&options, &threads) => parts?,
    };
    let mut bench = Bench::new(options, processes, parts, signals);
    let outcome = bench.measure(&threads).await;
    bench.close().await;
    outcome
}

struct Bench {
    options: Options,
    parts: Parts,
    signals: Signals,
    sampler: Sampler,
    tick: Interval,
    swept: Instant,
    /// What ended it early.
    end: Option<End>,
    /// Ends the devices.
    closing: CancellationToken,
}

/// What is measured between two moments.
struct Span {
    time: Duration,
    completed: u64,
    /// Callbacks of the built-in handler.
    callbacks: u64,
    /// Of each process, at both.
    before: Vec<Option<Usage>>,
    after: Vec<Option<Usage>>,
}

impl Bench {
    fn new(options: Options, mut processes: Vec<Process>, parts: Parts, signals: Signals) -> Self {
        processes.push(Process::new("bench".to_owned(), std::process::id()));
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let sampler = Sampler::new(processes, !options.quiet);
        Self {
            options,
            parts,
            signals,
            sampler,
            tick,
            swept: Instant::now(),
            end: None,
            closing: CancellationToken::new(),
        }
    }

    /// Connects the devices, measures, and reports.
    async fn measure(&mut self, threads: &Threads) -> Result<Outcome, Failure> {
        self.await_gateway(threads).await?;
        self.sampler.restart();
        let alone = self.sampler.usages();
        let begun = Instant::now();
        let opened = self.connect(threads).await?;
        let connecting = begun.elapsed();
        let connected = self.sampler.usages();
        let span = match self.options.scenario {
            Scenario::Storm => Span {
                time: connecting,
                completed: 0,
                callbacks: 0,
                before: alone.clone(),
                after: connected.clone(),
            },
            _ if self.end.is_some() => Span {
                time: Duration::ZERO,
                completed: 0,
                callbacks: 0,
                before: connected.clone(),
                after: connected.clone(),
            },
            Scenario::Idle => self.idle(&connected).await,
            _ => self.drive().await?,
        };
        let report = self.report(&alone, &connected, &span, connecting);
        let failure = match self.end.take() {
            Some(End::Broken(failure)) => Some(failure),
            Some(_) => None,
            None => self.verdict(&report, opened),
        };
        Ok(Outcome { report, failure })
    }

    /// A run in which nothing came through has failed, and a storm that was turned away.
    fn verdict(&self, report: &Report, refused: Option<device::Error>) -> Option<Failure> {
        let counts = &report.counts;
        if self.options.scenario == Scenario::Storm {
            let (opened, handler) = (counts.connected, self.parts.handler());
            return explain_missing(opened, refused.as_ref(), &self.options, handler);
        }
        if self.options.scenario.has_messages() && counts.arrived == 0 {
            let trouble = report.trouble.as_deref().map_or_else(
                || "no call of the handler has failed".to_owned(),
                |trouble| format!("the handler's first failure: {trouble}"),
            );
            return Some(Failure::NoAnswer(format!("no message arrived; {trouble}")));
        }
        None
    }

    /// Waits until the gateway has found the built-in handler.
    async fn await_gateway(&mut self, threads: &Threads) -> Result<(), Failure> {
        let Some(handler) = self.parts.handler() else {
            return Ok(());
        };
        let options = &self.options;
        if !options.quiet {
            // Whether anybody reads it or not.
            let _ = writeln!(
                std::io::stderr(),
                "waiting until the gateway at {} calls the handler at {}, {} at most",
                options.gateway,
                options.handler,
                text::time(options.ready_timeout)
            );
        }
        let (topics, run) = (&self.parts.topics, self.parts.lanes.run());
        let probes = Probes::new(options, threads, topics, run).await?;
        tokio::select! {
            biased;
            signal = self.signals.next() => return Err(Failure::Interrupted(signal)),
            found = probes.run() => found.map_err(|error| explain(&error, options, Some(handler)))?,
        }
        if let Some(signal) = self.farewell().await {
            return Err(Failure::Interrupted(signal));
        }
        // Such as an answer to one that had left: it had asked twice.
        if let Some(handler) = self.parts.handler() {
            handler.forget_failures();
        }
        Ok(())
    }

    /// Opens the connections. A storm gives back the first failure.
    async fn connect(&mut self, threads: &Threads) -> Result<Option<device::Error>, Failure> {
        let options = self.options.clone();
        let dialer = Arc::new(device::dialer(&options, options.timeout).await?);
        let opening = Opening {
            options: &options,
            threads,
            dialer,
            lanes: self.parts.lanes.clone(),
            topics: self.parts.topics.clone(),
            closing: self.closing.clone(),
        };
        let failed = FirstError::default();
        let mut running = std::pin::pin!(opening.run(&failed));
        loop {
            tokio::select! {
                biased;
                () = running.as_mut() => break,
                () = self.look("connecting") => {}
            }
            if self.end.is_some() {
                return Ok(None);
            }
        }
        self.sampler.end("connecting", &self.parts.lanes.stats);
        match failed.take() {
            Some(error) if options.scenario != Scenario::Storm => {
                Err(explain(&error, &options, self.parts.handler()))
            }
            first => Ok(first),
        }
    }

    /// Closes the connections, and answers the callbacks about it: a gateway would hold
    /// them for the next handler.
    async fn close(&mut self) {
        self.parts.lanes.enter(Phase::Over);
        self.closing.cancel();
        self.farewell().await;
    }

    /// Waits until the handler was told of the end of all connections, for a while. A signal
    /// ends it at once, and is given back.
    async fn farewell(&mut self) -> Option<&'static str> {
        let handler = self.parts.handler.as_ref()?;
        let farewell = async {
            if self.options.transport.is_datagram() {
                handler.shared.close_all(&handler.adapter).await;
            }
            while handler.shared.open() > 0 {
                self.tick.tick().await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(FAREWELL, farewell) => None,
            signal = self.signals.next() => Some(signal),
        }
    }

    /// Lets the connections be.
    async fn idle(&mut self, before: &[Option<Usage>]) -> Span {
        let begun = Instant::now();
        let end = begun + self.options.duration;
        self.wait("idle", |_| Instant::now() >= end).await;
        Span {
            time: begun.elapsed(),
            completed: 0,
            callbacks: 0,
            before: before.to_vec(),
            after: self.sampler.usages(),
        }
    }

    /// Sends messages.
    async fn drive(&mut self) -> Result<Span, Failure> {
        let lanes = self.parts.lanes.clone();
        // Of the connections.
        lanes.stats.forget_latencies();
        let mut pacer = None;
        if !self.options.warmup.is_zero() {
            lanes.enter(Phase::WarmingUp);
            pacer = self.start_loop()?;
            let end = Instant::now() + self.options.warmup;
            self.wait("warming up", |_| Instant::now() >= end).await;
        }
        let before = self.sampler.usages();
        let (begun, from) = (Instant::now(), lanes.now());
        let already = (lanes.stats.all_arrived.get(), self.callbacks());
        lanes.enter(Phase::Measuring);
        if self.options.warmup.is_zero() {
            pacer = self.start_loop()?;
        }
        let limited = self.options.messages.is_some();
        let end = begun + self.options.duration;
        self.wait("measuring", |lanes| match limited {
            true => lanes.is_spent(),
            false => Instant::now() >= end,
        })
        .await;
        let (mut time, mut after) = (begun.elapsed(), self.sampler.usages());
        let (mut completed, mut callbacks) = (lanes.stats.all_arrived.get(), self.callbacks());
        completed = completed.saturating_sub(already.0);
        lanes.enter(Phase::Over);
        drop(pacer);
        self.wait("draining", |lanes| lanes.stats.outstanding() == 0)
            .await;
        if limited {
            // All of them count, so it lasts until the last.
            time = Duration::from_nanos(lanes.stats.last().saturating_sub(from));
            completed = lanes.stats.arrived.get();
            callbacks = self.callbacks();
            after = self.sampler.usages();
        }
        Ok(Span {
            time,
            completed,
            callbacks: callbacks.saturating_sub(already.1),
            before,
            after,
        })
    }

    /// Callbacks of the built-in handler so far.
    fn callbacks(&self) -> u64 {
        self.parts
            .handler()
            .map_or(0, |handler| handler.callbacks.get())
    }

    fn start_loop(&self) -> Result<Option<Pacer>, Failure> {
        match self.options.rate {
            Some(rate) => Pacer::start(self.parts.lanes.clone(), rate)
                .map(Some)
                .map_err(|error| Failure::own("no thread", error)),
            None => {
                self.parts.lanes.fill(self.options.window());
                Ok(None)
            }
        }
    }

    /// Waits until `reached`, unless the run ends before.
    async fn wait(&mut self, phase: &'static str, reached: impl Fn(&Lanes) -> bool) {
        while self.end.is_none() && !reached(&self.parts.lanes) {
            self.look(phase).await;
        }
        self.sampler.end(phase, &self.parts.lanes.stats);
    }

    /// A while in which it may end early; samples and gives up what is due. Cancel safe.
    async fn look(&mut self, phase: &'static str) {
        tokio::select! {
            biased;
            Some(failure) = self.parts.broken.recv() => self.end = Some(End::Broken(failure)),
            signal = self.signals.next() => self.end = Some(End::Interrupted(signal)),
            _ = self.tick.tick() => {}
        }
        self.sampler.look(phase, &self.parts.lanes.stats);
        if self.swept.elapsed() >= SWEEP {
            self.swept = Instant::now();
            let timeout = u64::try_from(self.options.timeout.as_nanos()).unwrap_or(u64::MAX);
            if let Some(before) = self.parts.lanes.now().checked_sub(timeout) {
                self.parts.lanes.give_up(before);
            }
        }
    }

    fn report(
        &self,
        alone: &[Option<Usage>],
        connected: &[Option<Usage>],
        span: &Span,
        connecting: Duration,
    ) -> Report {
        let stats = &self.parts.lanes.stats;
        let handler = self.parts.handler();
        let (latency, to_all) = stats.all();
        let usage = |usages: &[Option<Usage>], number: usize| usages.get(number).copied().flatten();
        let memory = |usages, number| usage(usages, number).map(|usage| usage.memory);
        let processes = self.sampler.names().enumerate().map(|(number, name)| {
            let spent = usage(&span.after, number)
                .zip(usage(&span.before, number))
                .map(|(after, before)| after.cpu.saturating_sub(before.cpu));
            ProcessReport {
                name: name.to_owned(),
                cpu: spent,
                before: memory(alone, number),
                connected: memory(connected, number),
                end: memory(&span.after, number),
            }
        });
        let ended_early = match &self.end {
            None => None,
            Some(End::Interrupted(signal)) => Some((*signal).to_owned()),
            Some(End::Broken(failure)) => Some(failure.to_string()),
        };
        Report {
            options: self.options.clone(),
            ended_early,
            connecting,
            measured: span.time,
            counts: Counts::read(stats, span.completed),
            latency,
            to_all,
            processes: processes.collect(),
            samples: self.sampler.samples.clone(),
            callbacks: span.callbacks,
            failures: handler.map_or(0, Shared::failed_calls),
            trouble: handler.and_then(Shared::trouble),
        }
    }
}
