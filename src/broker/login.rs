//! Whether the broker lets somebody in: a CONNECT in a device's name, and nothing more.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::dial::{LinkError, Stream, connect, handshake};
use super::{Address, Login, Options};

/// Why it does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// It said no.
    #[error("{0}")]
    Denied(String),
    /// It could not be asked, or had no word on who it is.
    #[error("{0}")]
    Failed(String),
}

/// Connects as the client, with a clean session that ends with the connection, and leaves again.
/// Another connection of this client id is taken over.
///
/// The addresses are tried in turn, from the one that answered last on, which `first` remembers. They
/// share the time `until` the end, so that one that hangs leaves enough to the others.
pub async fn try_login(
    options: &Options,
    first: &AtomicUsize,
    until: Instant,
    client_id: &str,
    username: &str,
    password: &str,
) -> Result<(), LoginError> {
    let mut options = options.clone();
    options.session_expiry = Duration::ZERO;
    // Neither is said where there is neither: MQTT 3.1.1 knows no password without a name.
    options.login = (!username.is_empty() || !password.is_empty()).then(|| Login {
        username: username.to_owned(),
        password: password.to_owned(),
    });
    let mut failures = Vec::new();
    let (start, count) = (first.load(Ordering::Relaxed), options.addresses.len());
    let places = (start..count).chain(0..start.min(count));
    for (place, left) in places.zip((1..=count).rev()) {
        let Some(address) = options.addresses.get(place) else {
            continue;
        };
        let left = u32::try_from(left).unwrap_or(u32::MAX);
        let share = until.saturating_duration_since(Instant::now()) / left;
        let why = match timeout(share, ask(&options, address, client_id)).await {
            Ok(Ok(mut stream)) => {
                first.store(place, Ordering::Relaxed);
                let mut out = BytesMut::new();
                options.protocol.disconnect(false, &mut out);
                // It has said yes, whatever becomes of the farewell.
                let farewell = async {
                    stream.write_all(&out).await?;
                    stream.shutdown().await
                };
                let _ = timeout_at(until, farewell).await;
                return Ok(());
            }
            Ok(Err(LinkError::Refused(refusal))) if refusal.denied => {
                first.store(place, Ordering::Relaxed);
                return Err(LoginError::Denied(refusal.reason));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in its part of request_timeout".to_owned(),
        };
        failures.push(format!("{}: {why}", address.url));
    }
    Err(LoginError::Failed(failures.join("; ")))
}

/// A connection that the broker has taken.
async fn ask(
    options: &Options,
    address: &Address,
    client_id: &str,
) -> Result<Box<dyn Stream>, LinkError> {
    let mut stream = connect(options, address).await?;
    let mut input = BytesMut::new();
    handshake(options, address, client_id, true, &mut stream, &mut input).await?;
    Ok(stream)
}
