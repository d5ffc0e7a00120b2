//! The accept loop of a listener: who may come in, and to which shard.
//!
//! All limits on new connections live here. Nothing is awaited for a single peer:
//! whatever a connection needs before its first callback happens in its own task.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::config::AccessRules;
use crate::connection::{self, ListenerContext};
use crate::metrics::ListenerMetrics;
use crate::rate::TokenBucket;
use crate::shard::Shard;
use crate::transport::tcp::{self, Acceptor, TcpSocket};
use crate::transport::{Kind, PeerInfo, proxy_protocol};

/// Pause after a failure to accept, such as no free file descriptor: the condition
/// rarely passes sooner, and trying at once would only burn the CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who may come in, and how fast.
#[derive(Clone)]
pub struct Admission {
    /// First match wins.
    pub access_rules: AccessRules,
    /// Connections at a time; `None` for no limit.
    pub max_connections: Option<usize>,
    /// New connections a second; `None` for no limit.
    pub max_conn_rate: Option<f64>,
    /// The longest a PROXY header may take; `None` where there is none.
    pub proxy_protocol: Option<Duration>,
}

/// One listener, bound.
pub struct Listener {
    name: String,
    acceptor: Acceptor,
    tcp: tcp::Options,
    admission: Arc<Admission>,
    /// One for each shard, in the order of the shards.
    contexts: Vec<Arc<ListenerContext>>,
    metrics: ListenerMetrics,
}

impl Listener {
    /// A listener over a bound socket.
    pub fn new(
        name: String,
        acceptor: Acceptor,
        tcp: tcp::Options,
        admission: Admission,
        contexts: Vec<Arc<ListenerContext>>,
        metrics: ListenerMetrics,
    ) -> Self {
        Self {
            name,
            acceptor,
            tcp,
            admission: Arc::new(admission),
            contexts,
            metrics,
        }
    }

    /// Accepts until `stop` is cancelled; then the socket is closed.
    pub async fn run(self, shards: Vec<Shard>, stop: CancellationToken) {
        let limit = self.admission.max_connections;
        let room = limit.map_or(Semaphore::MAX_PERMITS, |n| n.min(Semaphore::MAX_PERMITS));
        let room = Arc::new(Semaphore::new(room));
        let rate = self.admission.max_conn_rate;
        let mut rate = rate.map(|rate| TokenBucket::new(rate, Instant::now()));
        let mut in_trouble = false;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.acceptor.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_the_peers_fault(&error) => continue,
                Err(error) => {
                    self.metrics.accept_errors.increment(1);
                    if !std::mem::replace(&mut in_trouble, true) {
                        tracing::error!(listener = self.name, %error, "cannot accept; trying on");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if std::mem::take(&mut in_trouble) {
                tracing::info!(listener = self.name, "accepting again");
            }
            match self.admit(peer, &room, rate.as_mut()) {
                Ok(permit) => self.hand_over(stream, peer, permit, &shards),
                Err(reason) => {
                    self.metrics.refused(reason);
                    tracing::debug!(listener = self.name, %peer, reason, "connection refused");
                }
            }
        }
    }

    fn admit(
        &self,
        peer: SocketAddr,
        room: &Arc<Semaphore>,
        rate: Option<&mut TokenBucket>,
    ) -> Result<OwnedSemaphorePermit, &'static str> {
        // Behind a load balancer the rules are for its clients, not for itself.
        if self.admission.proxy_protocol.is_none() && !self.admission.permits(peer.ip()) {
            return Err("access_rules");
        }
        if rate.is_some_and(|rate| !rate.try_take(Instant::now())) {
            return Err("max_conn_rate");
        }
        room.clone()
            .try_acquire_owned()
            .map_err(|_| "max_connections")
    }

    /// Gives the connection to the shard that has the fewest.
    fn hand_over(
        &self,
        stream: std::net::TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
        shards: &[Shard],
    ) {
        let pairs = shards.iter().zip(&self.contexts);
        let Some((shard, context)) = pairs.min_by_key(|(shard, _)| shard.load()) else {
            return;
        };
        let task = Incoming {
            stream,
            peer,
            tcp: self.tcp.clone(),
            admission: self.admission.clone(),
            context: context.clone(),
        };
        shard.spawn_connection(async move {
            // Moved into the task: its end is the only release.
            let _permit = permit;
            task.serve().await;
        });
    }
}

/// Some errors of accept(2) are about the peer that was in the queue, not about us.
fn is_the_peers_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

impl Admission {
    fn permits(&self, address: IpAddr) -> bool {
        self.access_rules.permits(address)
    }
}

/// A stream on its way to becoming a connection.
struct Incoming {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    tcp: tcp::Options,
    admission: Arc<Admission>,
    context: Arc<ListenerContext>,
}

impl Incoming {
    async fn serve(self) {
        let metrics = self.context.metrics.clone();
        let listener = self.context.name.clone();
        let (peer, context) = (self.peer, self.context.clone());
        match self.prepare().await {
            Ok((socket, peer)) => connection::serve(socket, peer, context).await,
            Err((reason, error)) => {
                metrics.refused(reason);
                tracing::debug!(listener, %peer, reason, %error, "connection refused");
            }
        }
    }

    async fn prepare(self) -> Result<(TcpSocket, PeerInfo), (&'static str, String)> {
        let setup = |error: io::Error| ("setup", error.to_string());
        let mut socket = TcpSocket::adopt(self.stream, &self.tcp).map_err(setup)?;
        let (mut peer, mut local) = socket.addresses().map_err(setup)?;
        if let Some(limit) = self.admission.proxy_protocol {
            let header = proxy_protocol::read(socket.stream_mut());
            let failed = |error: String| ("proxy_protocol", error);
            let announced = tokio::time::timeout(limit, header)
                .await
                .map_err(|_| failed(format!("no PROXY header within {limit:?}")))?
                .map_err(|error| failed(error.to_string()))?;
            if let Some((client, reached)) = announced.addresses {
                (peer, local) = (client, reached);
            }
            socket.unread(announced.rest);
            if !self.admission.permits(peer.ip()) {
                return Err(("access_rules", "denied".to_owned()));
            }
        }
        let info = PeerInfo {
            kind: Kind::Tcp,
            peer,
            local,
        };
        Ok((socket, info))
    }
}
