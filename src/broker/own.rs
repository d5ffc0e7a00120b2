//! Devices' own connections to the broker: one MQTT session for each.
//!
//! ```text
//! OwnSessions::open --> a pool of one member, its task --CONNECT--> broker
//!              <-- OwnSession (a Broker) | what the broker says against it
//! broker ends the session --> `ended` of whoever opened it
//! OwnSession::end --> DISCONNECT, with or without the will
//! ```
//!
//! Member, link and session are those of the pool. What differs is what becomes of a
//! broken link: a session that somebody else has, or that the broker will not have any
//! more, is not fought for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use metrics::Gauge;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::dial::{LinkError, Round, STEADY};
use super::link::{CONTESTED, Place, SOON, serve};
use super::member::Member;
use super::session::Session;
use super::{Broker, LinkState, Login, Options, Will};
use crate::metrics::{BrokerMetrics, Counted};
use crate::numbers::jitter;

/// A device's session whose CONNECT the broker denied so often in a row is over: once may
/// be a broker that has just started and does not know its users yet.
const MAX_REFUSED: u32 = 2;

/// How long sessions that are cut off have to say what they leave behind.
const COUNTING: Duration = Duration::from_millis(500);

/// Why a session cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The broker says no.
    #[error("the broker says {0}")]
    Denied(String),
    /// It is not there, or has no word on who it is.
    #[error("no session at the broker: {0}")]
    Failed(String),
    /// There are as many as may be.
    #[error("{0} devices have sessions at the broker already (broker.max_sessions)")]
    TooMany(usize),
}

/// Who ended a session that nobody here has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// A newer session of this gateway's, see [`OwnSession::claimed`].
    Superseded,
    /// The broker, or another client of its.
    Kicked,
}

/// Whose session it is to be.
#[derive(Debug)]
pub struct Identity {
    /// Client id.
    pub clientid: String,
    /// User name and password, where there are any.
    pub login: Option<Login>,
    /// What its abnormal end brings about.
    pub will: Option<Will>,
    /// Its task runs on this runtime of those there are, counted round.
    pub runtime: usize,
}

/// Opens sessions, up to a bound. Cheap to clone.
#[derive(Clone)]
pub struct OwnSessions(Arc<Shared>);

struct Shared {
    options: Options,
    metrics: BrokerMetrics,
    runtimes: Vec<Handle>,
    places: Arc<Semaphore>,
    max: usize,
    tasks: TaskTracker,
    end: Arc<End>,
}

/// The gateway's end, and what is left then.
#[derive(Default)]
struct End {
    is_now: CancellationToken,
    publishes: AtomicUsize,
}

/// What [`OwnSessions::drain`] cut off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CutOff {
    /// Sessions that had not said farewell.
    pub sessions: usize,
    /// Publishes of theirs that were accepted and not confirmed.
    pub publishes: usize,
}

/// What a session and its task share.
#[derive(Default)]
struct Control {
    closing: CancellationToken,
    claim: watch::Sender<Claim>,
}

/// Whether the client id is to be another session's of this gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Claim {
    /// It is not.
    #[default]
    None,
    /// The broker is being asked.
    Open,
    /// It is: this session has ended, and is not to be fought for.
    Granted,
}

/// A device's own session; dropping it ends it without its will.
pub struct OwnSession {
    broker: Broker,
    member: Arc<Member>,
    control: Arc<Control>,
}

impl std::fmt::Debug for OwnSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnSession").finish_non_exhaustive()
    }
}

impl OwnSession {
    /// To publish and to subscribe over it.
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Says farewell once everything that was accepted is confirmed, or could be for as long
    /// as a publish may take. `with_will` has the broker publish the will. Only the first
    /// call counts.
    pub fn end(&self, with_will: bool) {
        self.member.leave_broker(with_will);
        self.control.closing.cancel();
    }

    /// Tells it how another session of the same client id fares that is opened here.
    pub fn claimed(&self, claim: Claim) {
        self.control.claim.send_replace(claim);
    }
}

impl Drop for OwnSession {
    fn drop(&mut self) {
        self.end(false);
    }
}

impl OwnSessions {
    /// At most `max` sessions at a time, with `options` in common.
    pub fn new(options: Options, max: usize, runtimes: &[Handle], metrics: &BrokerMetrics) -> Self {
        let mut metrics = metrics.clone();
        // Those of the pool are counted apart.
        metrics.links_up = metrics.sessions_up.clone();
        let max = max.min(Semaphore::MAX_PERMITS);
        Self(Arc::new(Shared {
            options,
            metrics,
            runtimes: runtimes.to_vec(),
            places: Arc::new(Semaphore::new(max)),
            max,
            tasks: TaskTracker::new(),
            end: Arc::default(),
        }))
    }

    /// Opens a session and waits for the broker's answer: every address is tried once.
    /// `ended` is called if the session ends other than by [`OwnSession::end`].
    ///
    /// Cancel safe: nothing stays open.
    pub async fn open(
        &self,
        identity: Identity,
        ended: impl FnOnce(Ended) + Send + 'static,
    ) -> Result<OwnSession, OpenError> {
        let shared = &*self.0;
        let failed = |error: &dyn std::fmt::Display| OpenError::Failed(error.to_string());
        let place = shared.places.clone().try_acquire_owned().map_err(|_| {
            shared.metrics.sessions_refused.increment(1);
            OpenError::TooMany(shared.max)
        })?;
        let options = Arc::new(Options {
            login: identity.login,
            will: identity.will,
            pool_size: 1,
            own: true,
            ..shared.options.clone()
        });
        let metrics = &shared.metrics;
        let member = Member::new(0, identity.clientid, options.clone(), metrics.clone());
        let member = member.map_err(|error| failed(&error))?;
        let broker = Broker::of_one(member.clone(), options, metrics.clone());
        let control = Arc::new(Control::default());
        let session = OwnSession {
            broker: broker.map_err(|error| failed(&error))?,
            member: member.clone(),
            control: control.clone(),
        };
        let welcome = member.first_welcome();
        let (failure, failed) = oneshot::channel();
        let runtime = shared.runtimes.iter().cycle().nth(identity.runtime);
        let Some(runtime) = runtime else {
            return Err(OpenError::Failed("the gateway stops".to_owned()));
        };
        let end = shared.end.clone();
        let task = async move {
            let lived = run(&member, &control, failure, &end).await;
            // Who is told may open the next one.
            drop(place);
            if let Some(how) = lived {
                if how == Ended::Kicked {
                    member.metrics().sessions_kicked.increment(1);
                }
                ended(how);
            }
        };
        shared.tasks.spawn_on(task, runtime);
        tokio::select! {
            biased;
            Ok(()) = welcome => Ok(session),
            Ok(error) = failed => Err(error),
            else => Err(OpenError::Failed("the gateway stops".to_owned())),
        }
    }

    /// Waits for the farewells of those that were ended, and cuts off the rest at `deadline`.
    pub async fn drain(&self, deadline: Instant) -> CutOff {
        let Shared { tasks, end, .. } = &*self.0;
        tasks.close();
        if timeout_at(deadline, tasks.wait()).await.is_ok() {
            return CutOff::default();
        }
        let sessions = tasks.len();
        end.is_now.cancel();
        let _ = timeout(COUNTING, tasks.wait()).await;
        CutOff {
            sessions,
            publishes: end.publishes.load(Ordering::Acquire),
        }
    }
}

/// The life of a session; how it ended where nobody here has ended it.
async fn run(
    member: &Arc<Member>,
    control: &Control,
    failure: oneshot::Sender<OpenError>,
    end: &End,
) -> Option<Ended> {
    let _counted = Counted::one(&member.metrics().sessions);
    let patience = member.options().publish_timeout;
    let grace = async {
        control.closing.cancelled().await;
        sleep(patience).await;
    };
    let ended = tokio::select! {
        ended = live(member, control, failure) => ended,
        () = grace => None,
        () = end.is_now.cancelled() => {
            end.publishes.fetch_add(member.waiting(), Ordering::AcqRel);
            None
        }
    };
    if member.state().is_up() {
        member.metrics().links_up.decrement(1.0);
        member.set_state(LinkState::Down("the session is over".to_owned()));
    }
    member.abandon();
    ended
}

/// Keeps the session connected until it is ended: by the other side, if it says so.
async fn live(
    member: &Arc<Member>,
    control: &Control,
    failure: oneshot::Sender<OpenError>,
) -> Option<Ended> {
    let options = member.options();
    let addresses = &options.addresses;
    let mut session = Session::new(options.protocol, options.receive_maximum);
    let mut place = Place::default();
    let mut round = Round::default();
    let (shortest, longest) = options.reconnect;
    let mut pause = shortest;
    let (mut opened, mut refused, mut contested) = (false, 0, 0);
    // Metrics do not tell one device from the other.
    let up = Gauge::noop();
    loop {
        let began = Instant::now();
        let address = round.address(addresses)?;
        let served = serve(member, address, &mut session, &mut place, &up).await;
        let Err(error) = served else {
            return None;
        };
        let is_first = !opened;
        opened |= place.welcomed;
        let was_up = member.state().is_up();
        if place.welcomed
            && error.is_the_brokers_will()
            && let Some((filter, refusal)) = session.hung_up()
        {
            member.is_unwelcome(filter, &refusal);
        }
        session.disconnected();
        if was_up {
            member.metrics().links_up.decrement(1.0);
        }
        let reason = format!("{}: {error}", address.url);
        member.set_state(LinkState::Down(reason.clone()));
        let (client_id, closing) = (member.client_id(), control.closing.is_cancelled());
        tracing::debug!(client_id, reason, "a device's broker link is down");
        if !opened {
            if let LinkError::Refused(refusal) = &error
                && refusal.denied
            {
                let _ = failure.send(OpenError::Denied(refusal.reason.clone()));
                return None;
            }
            if let Some(reasons) = round.failed(reason, false, addresses.len()) {
                let _ = failure.send(OpenError::Failed(reasons));
                return None;
            }
            if closing {
                return None;
            }
            continue;
        }
        // A link that breaks meanwhile says nothing: the broker may hang, or refuse the other one.
        // And to connect again would take the session away from it.
        let mut claims = control.claim.subscribe();
        let claim = tokio::select! {
            biased;
            () = control.closing.cancelled() => None,
            claim = claims.wait_for(|claim| *claim != Claim::Open) => claim.ok().map(|claim| *claim),
        };
        if claim == Some(Claim::Granted) {
            return Some(Ended::Superseded);
        }
        let lived = began.elapsed();
        let denied = |error: &LinkError| matches!(error, LinkError::Refused(no) if no.denied);
        refused = match &error {
            error if denied(error) => refused + 1,
            // One that is busy, or starts, has no word on who it is.
            LinkError::Refused(_) => refused,
            _ if place.welcomed => 0,
            _ => refused,
        };
        // Not every broker says that another client has the session (Mosquitto 2.0 does not). Two
        // gateways that have a device of this name each end the other's link in turn, beginning
        // with the older one's: the newer one's first does not count, so the older one gives up.
        let soon = lived < SOON.max(2 * longest);
        let without_a_word = error.is_without_a_word() && soon && !is_first;
        contested = match place.welcomed {
            true if without_a_word => contested + 1,
            true => 0,
            false if denied(&error) => contested,
            // Another client does not make the broker go away.
            false => 0,
        };
        let is_over = match &error {
            LinkError::TakenOver(_) => true,
            LinkError::Ended(notice) => notice.administrative,
            _ => refused >= MAX_REFUSED || contested >= CONTESTED,
        };
        if is_over {
            return Some(Ended::Kicked);
        }
        if closing && session.is_idle() && member.waiting() == 0 {
            return None;
        }
        if lived > STEADY.min(longest) {
            pause = shortest;
        }
        if round.failed(reason, was_up, addresses.len()).is_none() {
            continue;
        }
        tokio::select! {
            () = sleep(jitter(pause)) => {}
            // Once: there may be something left to be sent.
            () = control.closing.cancelled(), if !closing => {
                if session.is_idle() && member.waiting() == 0 {
                    return None;
                }
            }
        }
        member.metrics().reconnects.increment(1);
        pause = (pause * 2).min(longest);
    }
}
