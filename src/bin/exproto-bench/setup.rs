//! Everything but the devices: the handler, the MQTT clients, the lanes.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::failure::Failure;
use crate::frame::{Kind, RunId};
use crate::handler::{self, Adapter, Shared, Worker};
use crate::lanes::{Lanes, Plan, Senders};
use crate::options::{Options, Scenario};
use crate::peer::{Peer, Topics, Work};
use crate::stats::Stats;
use crate::threads::Threads;

/// See the module.
pub struct Parts {
    pub topics: Topics,
    pub lanes: Arc<Lanes>,
    /// `None` where the handler is the user's.
    pub handler: Option<BuiltIn>,
    /// MQTT clients whose connection broke.
    pub broken: mpsc::UnboundedReceiver<Failure>,
}

/// The built-in handler.
pub struct BuiltIn {
    pub shared: Arc<Shared>,
    pub adapter: Adapter,
}

impl Parts {
    /// Starts all of it on the threads.
    ///
    /// # Errors
    /// What is missing. Cancel safe: what was started ends with the threads.
    pub async fn set_up(options: &Options, threads: &Threads) -> Result<Self, Failure> {
        let clock = Instant::now();
        let mut random = [0; 3];
        getrandom::fill(&mut random).map_err(|error| Failure::own("no random numbers", error))?;
        let run = RunId::new(random);
        let handler = match options.has_handler() {
            true => Some(start_handler(options, run, threads).await?),
            false => None,
        };
        let topics = Topics::new(run, options.peers);
        let peers = connect_peers(options, &topics, threads).await?;
        let (senders, due): (Vec<_>, Vec<_>) =
            peers.iter().map(|_| mpsc::unbounded_channel()).unzip();
        let (kind, senders) = match (options.scenario, senders.first()) {
            (Scenario::Downlink, Some(_)) => (Kind::Downlink, Senders::Peers(senders)),
            (Scenario::Fanout, Some(first)) => (Kind::Downlink, Senders::Everyone(first.clone())),
            (Scenario::Uplink, _) => (Kind::Uplink, Senders::Devices),
            _ => (Kind::Echo, Senders::Devices),
        };
        let lanes = Arc::new(Lanes::new(Plan {
            devices: options.devices,
            senders,
            kind,
            run,
            closed_loop: options.rate.is_none(),
            messages: options.messages,
            clock,
            stats: Stats::new().map_err(|error| Failure::own("no histogram", error))?,
        }));
        let (tell, broken) = mpsc::unbounded_channel();
        for ((number, peer), due) in (0..).zip(peers).zip(due) {
            let work = Work {
                lanes: lanes.clone(),
                topics: topics.clone(),
                qos: options.qos,
                payload: options.payload,
                due,
            };
            let (tell, working) = (tell.clone(), peer.run(work));
            if let Some(runtime) = threads.of(number) {
                runtime.spawn(async move {
                    // Nobody listens any more once the run is over.
                    let _ = tell.send(working.await);
                });
            }
        }
        Ok(Self {
            topics,
            lanes,
            handler,
            broken,
        })
    }

    /// What the built-in handler knows.
    pub fn handler(&self) -> Option<&Shared> {
        self.handler.as_ref().map(|handler| &*handler.shared)
    }
}

/// On a thread of the bench: a socket belongs to the runtime in which it was made.
async fn on<T: Send + 'static>(
    threads: &Threads,
    number: u32,
    task: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    let runtime = threads.of(number);
    let runtime = runtime.ok_or_else(|| Failure::Own("no thread".to_owned()))?;
    match runtime.spawn(task).await {
        Ok(result) => result,
        Err(error) => Err(Failure::own("a task", error)),
    }
}

async fn start_handler(
    options: &Options,
    run: RunId,
    threads: &Threads,
) -> Result<BuiltIn, Failure> {
    let shared = Arc::new(Shared::new(run));
    let address = options.handler.clone();
    let listener = on(threads, 0, async move { handler::bind(&address).await }).await?;
    let connect = |number| {
        let (address, limit) = (options.adapter.clone(), options.timeout);
        on(threads, number, async move {
            Adapter::connect(&address, limit).await
        })
    };
    let adapter = connect(0).await?;
    adapter.answers(&options.adapter, options.timeout).await?;
    let mut workers = Vec::new();
    for (number, runtime) in (0..).zip(threads.runtimes()) {
        workers.push(Worker {
            runtime: runtime.clone(),
            adapter: match number {
                0 => adapter.clone(),
                _ => connect(number).await?,
            },
        });
    }
    let serving = handler::serve(listener, workers, shared.clone());
    if let Some(runtime) = threads.of(0) {
        runtime.spawn(serving);
    }
    Ok(BuiltIn { shared, adapter })
}

async fn connect_peers(
    options: &Options,
    topics: &Topics,
    threads: &Threads,
) -> Result<Vec<Peer>, Failure> {
    let count = match options.scenario {
        Scenario::Uplink | Scenario::Downlink => options.peers,
        Scenario::Fanout => 1,
        Scenario::Echo | Scenario::Idle | Scenario::Storm => 0,
    };
    let mut peers = Vec::new();
    for number in 0..count {
        let filter = match options.scenario {
            Scenario::Uplink => Some(topics.up_filter(number)),
            _ => None,
        };
        let (broker, qos, limit) = (options.mqtt.clone(), options.qos, options.timeout);
        let client_id = topics.peer(number);
        let connecting = async move {
            let filter = filter.as_deref().map(|filter| (filter, qos));
            Peer::connect(&broker, &client_id, filter, limit).await
        };
        peers.push(on(threads, number, connecting).await?);
    }
    Ok(peers)
}
