//! Opens the connections of a run.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use crate::device::{Device, Dialer, Error};
use crate::failure::Failure;
use crate::frame::Wishes;
use crate::handler::Shared;
use crate::lanes::Lanes;
use crate::options::{Options, Scenario};
use crate::peer::Topics;
use crate::schedule::Schedule;
use crate::threads::Threads;

/// What opening needs.
pub struct Opening<'a> {
    pub options: &'a Options,
    pub threads: &'a Threads,
    pub dialer: Arc<Dialer>,
    pub lanes: Arc<Lanes>,
    pub topics: Topics,
    /// Ends the devices.
    pub closing: CancellationToken,
}

/// The first connection that failed.
#[derive(Clone, Default)]
pub struct FirstError(Arc<Mutex<Option<Error>>>);

impl FirstError {
    fn set(&self, error: Error) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
    }

    /// Takes it.
    pub fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_set(&self) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

impl Opening<'_> {
    /// Opens all connections; returns when each is ready or has failed. Except in a
    /// storm the first failure ends it. The devices run on.
    pub async fn run(&self, failed: &FirstError) {
        let storm = self.options.scenario == Scenario::Storm;
        let open_loop = storm && self.options.rate.is_some();
        let most = if open_loop {
            // It opens what is due, whatever hangs.
            Semaphore::MAX_PERMITS
        } else {
            usize::try_from(self.options.connecting).unwrap_or(1)
        };
        let permits = Arc::new(Semaphore::new(most));
        let rate = match storm {
            true => self.options.rate,
            false => Some(self.options.connect_rate),
        };
        let mut schedule = rate.map(|rate| Schedule::new(self.lanes.now(), rate));
        let mut waiting = tokio::task::JoinSet::new();
        for number in 0..self.options.devices {
            let begun = match &mut schedule {
                Some(schedule) => self.due(schedule).await,
                None => self.lanes.now(),
            };
            // The semaphore is never closed.
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            if failed.is_set() && !storm {
                return;
            }
            let begun = if open_loop { begun } else { self.lanes.now() };
            let (ready, answer) = oneshot::channel();
            let device = Device {
                number,
                wishes: self.wishes(number),
                lanes: self.lanes.clone(),
                ready,
            };
            let Some(runtime) = self.threads.of(number) else {
                return;
            };
            let (dialer, closing) = (self.dialer.clone(), self.closing.clone());
            runtime.spawn(async move {
                tokio::select! {
                    () = dialer.run(device) => {}
                    () = closing.cancelled() => {}
                }
            });
            let (lanes, failed) = (self.lanes.clone(), failed.clone());
            waiting.spawn(async move {
                match answer.await {
                    Ok(Ok(())) => lanes.stats.connected(lanes.now().saturating_sub(begun)),
                    Ok(Err(error)) => failed.set(error),
                    Err(_) => {}
                }
                drop(permit);
            });
            while waiting.try_join_next().is_some() {}
        }
        while waiting.join_next().await.is_some() {
            if failed.is_set() && !storm {
                return;
            }
        }
    }

    /// Waits until the next connection is due and gives its time.
    async fn due(&self, schedule: &mut Schedule) -> u64 {
        loop {
            if let Some((_, due)) = schedule.take(self.lanes.now()) {
                return due;
            }
            let wait = schedule.next_due().saturating_sub(self.lanes.now());
            tokio::time::sleep(Duration::from_nanos(wait)).await;
        }
    }

    /// What a device asks its handler for.
    fn wishes(&self, number: u32) -> Wishes {
        if self.options.bare {
            return Wishes::default();
        }
        let qos = u32::from(self.options.qos);
        let topics = &self.topics;
        let mut wishes = Wishes {
            client: Some(topics.client(number)),
            ..Wishes::default()
        };
        match self.options.scenario {
            Scenario::Uplink => wishes.publish = Some((qos, topics.up(number))),
            Scenario::Downlink => wishes.subscribe.push((qos, topics.down(number))),
            Scenario::Fanout => wishes
                .subscribe
                .push((qos, topics.down(crate::frame::EVERY_DEVICE))),
            Scenario::Echo | Scenario::Idle | Scenario::Storm => {}
        }
        wishes
    }
}

/// What a failed connection means for a person.
pub fn explain(error: &Error, options: &Options, handler: Option<&Shared>) -> Failure {
    let (gateway, transport) = (&options.gateway, options.transport.name());
    let uncalled = handler.is_some_and(|handler| handler.created.get() == 0);
    let turned_away = error.is_turned_away();
    let silent = matches!(error, Error::Silent(_) | Error::NoWelcome(_));
    let trouble = handler.and_then(Shared::trouble);
    let trouble = trouble.map(|trouble| format!("; the handler's first failure: {trouble}"));
    let trouble = trouble.unwrap_or_default();
    match error {
        _ if uncalled && (turned_away || silent) => {
            let or = match error {
                Error::Silent(_) => format!("nobody is at {gateway} (--gateway), or "),
                Error::NoWelcome(_) => String::new(),
                _ => "it takes no more connections, or ".to_owned(),
            };
            Failure::NoAnswer(format!(
                "{error}: {or}the gateway has not called the handler. \
                 Its handler address must lead to {} (--handler)",
                options.handler
            ))
        }
        Error::Silent(_) => Failure::NoAnswer(format!(
            "the gateway at {gateway}: {error}; it, or its handler, may hang{trouble}"
        )),
        _ if turned_away => Failure::Gateway(format!(
            "the gateway at {gateway} over {transport}: {error}{trouble} ({})",
            limits(options)
        )),
        Error::Io(_) | Error::Slow(_) => Failure::Gateway(format!(
            "no connection to the gateway at {gateway} over {transport}: {error} \
             (--gateway, --transport)"
        )),
        _ => Failure::NoAnswer(format!("{error}{trouble}")),
    }
}

/// What it means that a storm opened fewer connections than it should have.
pub fn explain_missing(
    opened: u64,
    first: Option<&Error>,
    options: &Options,
    handler: Option<&Shared>,
) -> Option<Failure> {
    let all = u64::from(options.devices);
    let missing = all.checked_sub(opened).filter(|missing| *missing > 0)?;
    let Some(first) = first else {
        return Some(Failure::Gateway(format!(
            "{missing} of {all} connections were not opened"
        )));
    };
    let first = explain(first, options, handler);
    if opened == 0 {
        return Some(first);
    }
    Some(Failure::Gateway(format!(
        "{missing} of {all} connections were not opened, the first: {first}"
    )))
}

/// Why a gateway turns devices away that it could answer.
fn limits(options: &Options) -> String {
    let slower = match options.scenario {
        Scenario::Storm => "--rate",
        _ => "--connect-rate",
    };
    format!(
        "most likely a limit of its listener: max_conn_rate, 1000 new connections a second \
         by default, or max_connections; {slower} opens them more slowly"
    )
}
