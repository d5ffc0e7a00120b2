//! Whether the broker lets somebody in: a CONNECT in a device's name, and nothing more.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;

use super::dial::{LinkError, connect, handshake};
use super::{Login, Options};

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

/// Connects as the client, with a clean session that ends with the connection, and leaves again. The
/// addresses are tried in turn. Another connection of this client id is taken over.
pub async fn try_login(
    options: &Options,
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
    for address in &options.addresses {
        let mut stream = match connect(&options, address).await {
            Ok(stream) => stream,
            Err(error) => {
                failures.push(format!("{}: {error}", address.url));
                continue;
            }
        };
        let mut input = BytesMut::new();
        let welcome = handshake(&options, address, client_id, true, &mut stream, &mut input).await;
        return match welcome {
            Ok(_) => {
                let mut out = BytesMut::new();
                options.protocol.disconnect(false, &mut out);
                // It has said yes, whatever becomes of the farewell.
                if stream.write_all(&out).await.is_ok() {
                    let _ = stream.shutdown().await;
                }
                Ok(())
            }
            Err(LinkError::Refused(refusal)) if refusal.denied => {
                Err(LoginError::Denied(refusal.reason))
            }
            Err(error) => Err(LoginError::Failed(error.to_string())),
        };
    }
    Err(LoginError::Failed(failures.join("; ")))
}
