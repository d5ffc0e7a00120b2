//! The session at the broker that a device has of its own.

use bytes::Bytes;

use super::command::Refusal;
use super::handle::Handle;
use super::reason::CloseReason;
use super::registry::Registry;
use crate::auth::Attempt;
use crate::auth::fill::Values;
use crate::broker::topic::TopicName;
use crate::broker::{Claim, Ended, Identity, Login, OpenError, OwnSession, OwnSessions, QoS, Will};
use crate::config::Template;
use crate::proto::ResultCode;

/// What the broker is to publish at the abnormal end of a device.
#[derive(Debug, Clone)]
pub struct WillTemplate {
    /// As the broker sees it; no mountpoint is put in front.
    pub topic: Template,
    /// The message.
    pub payload: Template,
    /// Quality of service.
    pub qos: QoS,
    /// Whether it is retained.
    pub retain: bool,
}

/// Opens the sessions of devices. Cheap to clone.
#[derive(Clone)]
pub struct Own {
    sessions: OwnSessions,
    will: Option<WillTemplate>,
}

impl Own {
    /// With this will, where there is to be one.
    pub fn new(sessions: OwnSessions, will: Option<WillTemplate>) -> Self {
        Self { sessions, will }
    }

    /// Connects as the device. Whoever has its client id here gives way, and keeps it where
    /// the broker refuses.
    pub(super) async fn open(
        &self,
        registry: &Registry,
        handle: &Handle,
        attempt: &Attempt,
    ) -> Result<OwnSession, Refusal> {
        let will = self.will.as_ref().map(|will| fill(will, attempt));
        let password = attempt.password.expose();
        let identity = Identity {
            clientid: attempt.clientid.clone(),
            // Neither is said where there is neither.
            login: (!attempt.username.is_empty() || !password.is_empty()).then(|| Login {
                username: attempt.username.clone(),
                password: password.to_owned(),
            }),
            will: will.transpose()?,
            runtime: usize::from(handle.context().shard.0),
        };
        let older = registry.holder(&attempt.clientid);
        let older = older.and_then(|older| older.client().ok());
        let older = older.as_ref().and_then(|client| client.own.as_ref());
        let giving_way = older.map(GivingWay::new);
        let closed = handle.clone();
        let ended = move |ended| {
            // It may have ended by itself.
            let _ = closed.close(match ended {
                Ended::Superseded => CloseReason::Discarded,
                Ended::Kicked => CloseReason::Kicked,
            });
        };
        let opened = self.sessions.open(identity, ended).await?;
        if let Some(giving_way) = giving_way {
            giving_way.for_good();
        }
        Ok(opened)
    }
}

/// The session whose client id is about to be taken. It keeps it where the broker refuses,
/// and where nobody waits for the broker's answer any more.
struct GivingWay<'a>(Option<&'a OwnSession>);

impl<'a> GivingWay<'a> {
    fn new(older: &'a OwnSession) -> Self {
        older.claimed(Claim::Open);
        Self(Some(older))
    }

    fn for_good(mut self) {
        if let Some(older) = self.0.take() {
            older.claimed(Claim::Granted);
        }
    }
}

impl Drop for GivingWay<'_> {
    fn drop(&mut self) {
        if let Some(older) = self.0 {
            older.claimed(Claim::None);
        }
    }
}

fn fill(will: &WillTemplate, attempt: &Attempt) -> Result<Will, Refusal> {
    let wish = None;
    let values = Values { attempt, wish };
    let topic = TopicName::parse(values.plain(&will.topic)).map_err(|error| {
        let text = format!("broker.will.topic is no topic for this device: {error}");
        Refusal::new(ResultCode::ParamsTypeError, text)
    })?;
    Ok(Will {
        topic,
        payload: Bytes::from(values.plain(&will.payload)),
        qos: will.qos,
        retain: will.retain,
    })
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Denied(_) => Self::new(
                ResultCode::PermissionDeny,
                format!("authentication refused: {error}"),
            ),
            // Nobody has said no: to try again makes sense.
            OpenError::Failed(_) | OpenError::TooMany(_) => {
                Self::new(ResultCode::Unknown, error.to_string())
            }
        }
    }
}
