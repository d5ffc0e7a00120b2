//! What a handler may ask, as data, and the one path on which it is done.
//!
//! The adapter's gRPC calls end here. Anything else that carries commands from a
//! handler brings them to [`Commands::execute`] too.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use metrics::Counter;

use super::handle::{Authentication, Client, Handle, Refused};
use super::own::Own;
use super::reason::CloseReason;
use super::registry::{NotFound, Registry};
use crate::auth::acl::{Permission, Wish};
use crate::auth::{Attempt, Auth, Denial, Grant, Secret};
use crate::broker::topic::{Mountpoint, TopicError, TopicFilter, TopicName, is_mqtt_text};
use crate::broker::{Broker, OwnSession, Publication, PublishError, QoS, SubscribeError};
use crate::id::HandlerName;
use crate::proto::ResultCode;
use crate::trace::Traceparent;

/// A request about one connection.
#[derive(Debug)]
pub enum Command {
    /// Send bytes to the device.
    Send(Bytes),
    /// Close after what was accepted is sent.
    Close,
    /// Make the device a client.
    Authenticate(Credentials),
    /// Start or replace the keepalive timer; the interval in seconds.
    StartTimer(u32),
    /// Publish in the device's name.
    Publish {
        /// Without the mountpoint.
        topic: String,
        /// 0, 1 or 2.
        qos: u32,
        /// The message.
        payload: Bytes,
        /// What it is part of.
        trace: Option<Traceparent>,
    },
    /// Subscribe the connection.
    Subscribe {
        /// Without the mountpoint.
        filter: String,
        /// 0, 1 or 2.
        qos: u32,
    },
    /// End a subscription.
    Unsubscribe {
        /// As it was given to subscribe.
        filter: String,
    },
}

/// What a device says of itself.
pub struct Credentials {
    /// Name of the device's protocol.
    pub proto_name: String,
    /// Its version.
    pub proto_ver: String,
    /// Client id.
    pub clientid: String,
    /// User name.
    pub username: String,
    /// Template of the prefix of its topics; counts only when configured so.
    pub mountpoint: String,
    /// Password.
    pub password: Secret,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("clientid", &self.clientid)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// A "no", with what the handler is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The result code.
    pub code: ResultCode,
    /// For a person.
    pub message: String,
}

impl Refusal {
    /// A refusal with this code and text.
    pub fn new(code: ResultCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl From<NotFound> for Refusal {
    fn from(not_found: NotFound) -> Self {
        match not_found {
            NotFound::Malformed => Self::new(
                ResultCode::ParamsTypeError,
                "conn is not an id that this gateway gives: pass on the one from the callback",
            ),
            NotFound::Unknown => Refused::NotAlive.into(),
        }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let (code, message) = match refused {
            Refused::NotAlive => (
                ResultCode::ConnProcessNotAlive,
                "the connection is closed or closing",
            ),
            Refused::NotAuthenticated => (
                ResultCode::PermissionDeny,
                "the connection is not authenticated: call Authenticate first",
            ),
            Refused::Authenticating => (
                ResultCode::PermissionDeny,
                "the connection is being authenticated already: wait for the answer",
            ),
            Refused::AlreadyAuthenticated => (
                ResultCode::PermissionDeny,
                "the connection is authenticated already",
            ),
            Refused::TooManySubscriptions => (
                ResultCode::Unknown,
                "the connection has as many subscriptions as it may have",
            ),
            Refused::SendBufferFull => (
                ResultCode::Unknown,
                "too many bytes wait for the device already (tcp_options.high_watermark): \
                 wait for the answer to a Send before the next",
            ),
        };
        Self::new(code, message)
    }
}

impl From<Denial> for Refusal {
    fn from(denial: Denial) -> Self {
        let code = match denial {
            Denial::Refused(_) | Denial::Unheard(_) | Denial::Limited(_) => {
                ResultCode::PermissionDeny
            }
            // Nobody has said no: to try again makes sense.
            Denial::Late | Denial::Busy => ResultCode::Unknown,
        };
        Self::new(code, denial.to_string())
    }
}

impl From<TopicError> for Refusal {
    fn from(error: TopicError) -> Self {
        Self::new(ResultCode::ParamsTypeError, error.to_string())
    }
}

impl From<PublishError> for Refusal {
    fn from(error: PublishError) -> Self {
        let code = match &error {
            PublishError::Refused(refusal) if refusal.denied => ResultCode::PermissionDeny,
            _ => ResultCode::Unknown,
        };
        Self::new(code, error.to_string())
    }
}

impl From<SubscribeError> for Refusal {
    fn from(error: SubscribeError) -> Self {
        let code = match &error {
            SubscribeError::Refused(refusal) if refusal.denied => ResultCode::PermissionDeny,
            _ => ResultCode::Unknown,
        };
        Self::new(code, error.to_string())
    }
}

fn qos(number: u32) -> Result<QoS, Refusal> {
    QoS::from_number(number).ok_or_else(|| {
        Refusal::new(
            ResultCode::ParamsTypeError,
            format!("qos is {number}, allowed are 0, 1 and 2"),
        )
    })
}

/// All that there is to say about the device.
fn attempt(handle: &Handle, credentials: Credentials) -> Attempt {
    Attempt {
        clientid: credentials.clientid,
        username: credentials.username,
        password: credentials.password,
        proto_name: credentials.proto_name,
        peer: handle.peer().ip().to_canonical(),
        certificate: handle.certificate().cloned(),
    }
}

/// A clock that nobody sets counts the time that is left. A year is as good as for ever, and never
/// too far away for that clock.
fn deadline(time: SystemTime) -> Instant {
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
    let left = time.duration_since(SystemTime::now()).unwrap_or_default();
    Instant::now() + left.min(LONGEST)
}

/// Does what handlers ask. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    registry: Arc<Registry>,
    broker: Broker,
    auth: Arc<Auth>,
    own: Option<Own>,
    raw_publish: RawPublish,
    foreign: Counter,
}

/// The connections that a caller may act on. The others are for it as if they were not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// All.
    All,
    /// Those that were announced to this handler.
    Of(HandlerName),
    /// None.
    Nothing,
}

impl Reach {
    fn covers(&self, handler: &HandlerName) -> bool {
        match self {
            Self::All => true,
            Self::Of(name) => name == handler,
            Self::Nothing => false,
        }
    }
}

/// Whether handlers may publish without a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawPublish {
    /// Not at all.
    Off,
    /// Whatever they like.
    On,
    /// What the rules allow to nobody in particular.
    Checked,
}

/// What came of an authentication.
struct Known {
    /// See [`Client::said`].
    said: Option<Arc<str>>,
    grant: Grant,
    own: Option<OwnSession>,
}

/// No rule allows it.
fn denied(wish: Wish<'_>) -> Refusal {
    let text = format!("the rules of access do not allow to {} here", wish.action);
    Refusal::new(ResultCode::PermissionDeny, text)
}

impl Commands {
    /// Over these connections and this broker, with `auth` to say who is who; `own` gives
    /// each device a session of its own; `raw_publish` allows [`Commands::raw_publish`];
    /// `foreign` counts calls about connections out of the caller's reach.
    pub fn new(
        registry: Arc<Registry>,
        broker: Broker,
        auth: Arc<Auth>,
        own: Option<Own>,
        raw_publish: RawPublish,
        foreign: Counter,
    ) -> Self {
        Self {
            registry,
            broker,
            auth,
            own,
            raw_publish,
            foreign,
        }
    }

    /// Does one command of a caller with this `reach`.
    ///
    /// Cancel safe: what was not done yet is not done.
    pub async fn execute(
        &self,
        reach: &Reach,
        conn: &str,
        command: Command,
    ) -> Result<(), Refusal> {
        let handle = self.registry.find(conn)?;
        if !reach.covers(&handle.context().handler) {
            self.foreign.increment(1);
            return Err(Refused::NotAlive.into());
        }
        let _waiting = handle.caller().waiting();
        match command {
            Command::Send(bytes) => handle.send(bytes).await?,
            Command::Close => handle.close(CloseReason::ClosedByHandler)?,
            Command::Authenticate(credentials) => self.authenticate(&handle, credentials).await?,
            Command::StartTimer(0) => {
                return Err(Refusal::new(
                    ResultCode::ParamsTypeError,
                    "interval is 0, it must be at least one second",
                ));
            }
            Command::StartTimer(seconds) => {
                handle.start_timer(Duration::from_secs(seconds.into()))?;
            }
            Command::Publish {
                topic,
                qos: number,
                payload,
                trace,
            } => {
                let client = handle.client()?;
                let qos = qos(number)?;
                let topic = client.mountpoint.mount(TopicName::parse(topic)?)?;
                let wish = Wish {
                    action: "publish",
                    topic: topic.as_str(),
                    qos: number,
                };
                self.authorize(&handle, &client, wish).await?;
                let publication = Publication {
                    topic,
                    qos,
                    payload,
                    from: Some(client.clientid.clone()),
                    trace,
                };
                let route = handle.id().route();
                self.broker_of(&client).publish(route, publication).await?;
            }
            Command::Subscribe {
                filter,
                qos: number,
            } => self.subscribe(&handle, filter, number).await?,
            Command::Unsubscribe { filter } => {
                handle.client()?;
                TopicFilter::parse(&filter)?;
                handle.unsubscribe(&filter)?;
            }
        }
        Ok(())
    }

    /// Publishes a message that belongs to no connection: without a mountpoint.
    pub async fn raw_publish(
        &self,
        topic: String,
        qos_number: u32,
        payload: Bytes,
        trace: Option<Traceparent>,
    ) -> Result<(), Refusal> {
        if self.raw_publish == RawPublish::Off {
            return Err(Refusal::new(
                ResultCode::PermissionDeny,
                "RawPublish is turned off in the gateway's configuration (raw_publish)",
            ));
        }
        let publication = Publication {
            qos: qos(qos_number)?,
            topic: TopicName::parse(topic)?,
            payload,
            from: None,
            trace,
        };
        if self.raw_publish == RawPublish::Checked {
            let nobody = Attempt::nobody();
            let person = self.auth.acl().person(&nobody, Grant::default());
            let wish = Wish {
                action: "publish",
                topic: publication.topic.as_str(),
                qos: qos_number,
            };
            if let Some(person) = person
                && self.auth.acl().decide(&person, wish).await == Permission::Deny
            {
                return Err(denied(wish));
            }
        }
        // One route for all, so that they keep their order.
        Ok(self.broker.publish(0, publication).await?)
    }

    async fn authenticate(&self, handle: &Handle, credentials: Credentials) -> Result<(), Refusal> {
        let missing = [
            ("proto_name", &credentials.proto_name),
            ("proto_ver", &credentials.proto_ver),
            ("clientid", &credentials.clientid),
        ];
        if let Some((name, _)) = missing.iter().find(|(_, value)| value.is_empty()) {
            return Err(Refusal::new(
                ResultCode::RequiredParamsMissed,
                format!("clientinfo.{name} is empty"),
            ));
        }
        let template = credentials.mountpoint.clone();
        let mut attempt = attempt(handle, credentials);
        self.auth.set_right(&mut attempt);
        if attempt.clientid.is_empty() {
            return Err(Refusal::new(
                ResultCode::PermissionDeny,
                "clientinfo_override leaves no client id: is there a client certificate?",
            ));
        }
        self.check_names(&attempt)?;
        if handle.caller().has_moved()
            && let Ok(client) = handle.client()
            && **client.said.as_ref().unwrap_or(&client.clientid) == *attempt.clientid
            && client.username == attempt.username
        {
            // The handler at the new address does what every handler does. The device is the
            // one that was let in over this connection.
            return Ok(());
        }
        let mut authentication = handle.authenticating()?;
        let mut grant = if handle.context().settings.enable_authn {
            let asked = self.auth.authenticate(&attempt);
            authentication.run(asked).await??
        } else {
            Grant::default()
        };
        let said = grant
            .clientid
            .take()
            .map(|clientid| Arc::from(std::mem::replace(&mut attempt.clientid, clientid)));
        if said.is_some() {
            self.check_names(&attempt)?;
        }
        let own = match &self.own {
            None => None,
            Some(own) => {
                // The broker authenticates here, and is guarded like everybody who does.
                self.auth.admit(&attempt)?;
                let opened = own.open(&self.registry, handle, &attempt);
                let opened = Box::pin(authentication.run(opened)).await?;
                let opened = opened.inspect_err(|refusal| {
                    if refusal.code == ResultCode::PermissionDeny {
                        self.auth.failed(&attempt);
                    }
                })?;
                // There may have been many guesses at a time.
                self.auth.admit(&attempt)?;
                Some(opened)
            }
        };
        let known = Known { said, grant, own };
        self.make_client(handle, &attempt, &template, known, authentication)
    }

    /// Whether client id and user name are such as a device may have.
    fn check_names(&self, attempt: &Attempt) -> Result<(), Refusal> {
        // Nobody takes the gateway's own sessions over.
        if self.broker.owns(&attempt.clientid) {
            return Err(Refusal::new(
                ResultCode::PermissionDeny,
                "the client id is one of the gateway's own (broker.client_id_prefix)",
            ));
        }
        // They become part of topics and MQTT properties.
        for (name, value) in [
            ("clientid", &attempt.clientid),
            ("username", &attempt.username),
        ] {
            if !is_mqtt_text(value) {
                return Err(Refusal::new(
                    ResultCode::ParamsTypeError,
                    format!("clientinfo.{name} has control characters or more than 65535 bytes"),
                ));
            }
        }
        Ok(())
    }

    /// The device's own session, or the pool.
    fn broker_of<'a>(&'a self, client: &'a Client) -> &'a Broker {
        client.own.as_ref().map_or(&self.broker, OwnSession::broker)
    }

    fn make_client(
        &self,
        handle: &Handle,
        attempt: &Attempt,
        asked_mountpoint: &str,
        Known { said, grant, own }: Known,
        authentication: Authentication<'_>,
    ) -> Result<(), Refusal> {
        let settings = &handle.context().settings;
        let template = if settings.clientinfo_mountpoint && !asked_mountpoint.is_empty() {
            asked_mountpoint
        } else {
            if !asked_mountpoint.is_empty() {
                tracing::debug!(conn = %handle.id(), "clientinfo.mountpoint is ignored");
            }
            &settings.mountpoint
        };
        let mountpoint = Mountpoint::resolve(template, &attempt.clientid, &attempt.username)?;
        let expires = grant.expire_at.map(deadline);
        let client = Arc::new(Client {
            clientid: attempt.clientid.as_str().into(),
            said,
            username: attempt.username.clone(),
            mountpoint,
            person: self.auth.acl().person(attempt, grant),
            own,
        });
        if let Some(older) = self.registry.claim(&client.clientid, handle.clone()) {
            tracing::debug!(conn = %older.id(), clientid = %client.clientid, "client id taken over");
            // Whatever becomes of this one, the older has lost its name. It may have ended
            // by itself.
            let _ = older.close(CloseReason::Discarded);
        }
        tracing::debug!(conn = %handle.id(), clientid = %client.clientid, "authenticated");
        authentication
            .done(client.clone(), expires)
            .map_err(|refused| {
                // It ended meanwhile and nobody else will take the name back.
                self.registry.release(&client.clientid, handle.id());
                refused.into()
            })
    }

    /// Whether the device may.
    async fn authorize(
        &self,
        handle: &Handle,
        client: &Client,
        wish: Wish<'_>,
    ) -> Result<(), Refusal> {
        let Some(person) = &client.person else {
            return Ok(());
        };
        if self.auth.acl().decide(person, wish).await == Permission::Allow {
            return Ok(());
        }
        if handle.context().settings.disconnect_denied {
            // It may have ended by itself.
            let _ = handle.close(CloseReason::Kicked);
        }
        Err(denied(wish))
    }

    async fn subscribe(&self, handle: &Handle, filter: String, number: u32) -> Result<(), Refusal> {
        let client = handle.client()?;
        let qos = qos(number)?;
        let mounted = client
            .mountpoint
            .mount_filter(&TopicFilter::parse(&filter)?)?;
        let wish = Wish {
            action: "subscribe",
            // What a group shares is what its members may see.
            topic: mounted.filter(),
            qos: number,
        };
        self.authorize(handle, &client, wish).await?;
        let replaced = handle.may_subscribe(&filter)?;
        let subscription = self
            .broker_of(&client)
            .subscribe(&mounted, qos, handle.subscriber(), replaced)
            .await?;
        Ok(handle.subscribed(filter, subscription)?)
    }
}
