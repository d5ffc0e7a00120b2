//! Where a handler is: from the addresses of the configuration to those that can be
//! dialled.
//!
//! A host name counts as all addresses that it resolves to, now: it is asked again
//! now and then, and when connecting fails. One directory serves all shards.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use http::Uri;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::tls::Renewed;

/// Most addresses of one host name. Each is a channel from every shard; a service of
/// more replicas than that has a balancer of its own.
const MAX_ADDRESSES: usize = 64;

/// Shortest and longest pause between two lookups of a handler whose channels break.
/// It doubles while lookups bring nothing new, but is no longer than the interval in
/// which names are resolved anyway.
const GAPS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Longest time for one lookup; the system's resolver may take half a minute to find
/// its servers away.
const LOOKUP: Duration = Duration::from_secs(10);

/// Finds the addresses of host names.
pub trait Resolve: Send + Sync {
    /// All addresses of `host`, IPv4 and IPv6, in any order, with `port`.
    fn resolve(&self, host: &str, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;
}

/// The system's resolver: `/etc/hosts`, DNS, and whatever else it knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Resolve for System {
    fn resolve(&self, host: &str, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        let host = host.to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
    }
}

/// Where an address of the configuration points to.
#[derive(Debug, Clone)]
pub enum Place {
    /// A port of a host.
    Port {
        /// Host name or IP address.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A Unix socket.
    Socket(PathBuf),
}

/// An address of the configuration.
#[derive(Clone)]
pub struct Target {
    /// As it is configured: for people, and a metric's label.
    pub name: String,
    pub(super) place: Place,
    /// Encrypts the channel.
    pub(super) tls: Option<Arc<Renewed>>,
    pub(super) connect_timeout: Duration,
    pub(super) request_timeout: Duration,
    /// Of the requests' URIs.
    pub(super) origin: Uri,
}

impl Target {
    /// `connect_timeout` is the longest time for connecting, TLS included; `request_timeout` the
    /// longest for an answer.
    ///
    /// # Errors
    /// A host that cannot stand in a URI.
    pub fn new(
        name: String,
        place: Place,
        tls: Option<Arc<Renewed>>,
        connect_timeout: Duration,
        request_timeout: Duration,
    ) -> Result<Self, http::Error> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let authority = match &place {
            Place::Port { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Place::Port { host, port } => format!("{host}:{port}"),
            // As gRPC's own clients do: a path is no authority.
            Place::Socket(_) => "localhost".to_owned(),
        };
        let origin = Uri::builder()
            .scheme(scheme)
            .authority(authority)
            .path_and_query("/")
            .build()?;
        Ok(Self {
            name,
            place,
            tls,
            connect_timeout,
            request_timeout,
            origin,
        })
    }

    /// What needs no resolver.
    fn fixed(&self) -> Option<Endpoint> {
        match &self.place {
            Place::Port { host, port } => {
                let ip: IpAddr = host.parse().ok()?;
                Some(Endpoint::Tcp(SocketAddr::new(ip, *port)))
            }
            Place::Socket(path) => Some(Endpoint::Unix(path.clone())),
        }
    }
}

/// An address that can be dialled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Endpoint {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Over a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What is known of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Its addresses, in order and each once.
    pub endpoints: Vec<Endpoint>,
    /// Why the last lookup brought none; the addresses are those of the one before.
    pub trouble: Option<String>,
}

/// See the module.
pub struct Directory {
    targets: Vec<Arc<Target>>,
    resolver: Arc<dyn Resolve>,
    /// `None`: only when connecting fails.
    interval: Option<Duration>,
    found: watch::Sender<Vec<Found>>,
    stale: Notify,
}

impl Directory {
    /// Knows at once what needs no resolver; the rest once [`Directory::run`] runs.
    pub fn new(
        targets: Vec<Target>,
        resolver: Arc<dyn Resolve>,
        interval: Option<Duration>,
    ) -> Arc<Self> {
        let found = targets.iter().map(|target| Found {
            endpoints: target.fixed().into_iter().collect(),
            trouble: None,
        });
        Arc::new(Self {
            found: watch::Sender::new(found.collect()),
            targets: targets.into_iter().map(Arc::new).collect(),
            resolver,
            interval,
            stale: Notify::new(),
        })
    }

    /// The addresses of the configuration.
    pub fn targets(&self) -> &[Arc<Target>] {
        &self.targets
    }

    /// What is known of each target, in their order, now and from now on.
    pub fn found(&self) -> watch::Receiver<Vec<Found>> {
        self.found.subscribe()
    }

    /// Says that an address could not be reached or was lost.
    pub fn doubt(&self) {
        self.stale.notify_one();
    }

    /// Keeps what is known up to date, for ever; ends at once where there is no host
    /// name.
    pub async fn run(self: Arc<Self>) {
        if self.targets.iter().all(|target| target.fixed().is_some()) {
            return;
        }
        let mut gap = GAPS.0;
        loop {
            let all_found = self.look_up().await;
            gap = match all_found {
                Lookup::News => GAPS.0,
                Lookup::Same | Lookup::Failed => (gap * 2).min(GAPS.1),
            };
            let gap = self.interval.map_or(gap, |most| gap.min(most)).max(GAPS.0);
            sleep(gap).await;
            if all_found == Lookup::Failed {
                continue;
            }
            let due = async {
                match self.interval {
                    Some(interval) => sleep(interval.saturating_sub(gap)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.stale.notified() => {}
            }
        }
    }

    /// Asks for all names at once.
    async fn look_up(&self) -> Lookup {
        let names = self.targets.iter().enumerate();
        let lookups = names.filter_map(|(index, target)| match &target.place {
            Place::Port { host, port } if target.fixed().is_none() => Some(async move {
                let asked = timeout(LOOKUP, self.resolver.resolve(host, *port)).await;
                let answer = match asked {
                    Ok(Ok(addresses)) if addresses.is_empty() => Err("it has none".to_owned()),
                    Ok(Ok(addresses)) => Ok(self.endpoints(target, addresses)),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(_) => Err(format!("no answer within {LOOKUP:?}")),
                };
                (index, answer)
            }),
            _ => None,
        });
        let answers = join_all(lookups).await;
        let mut outcome = Lookup::Same;
        self.found.send_if_modified(|found| {
            let mut changed = false;
            for (index, answer) in answers {
                let Some(known) = found.get_mut(index) else {
                    continue;
                };
                let now = match answer {
                    Ok(endpoints) => Found {
                        endpoints,
                        trouble: None,
                    },
                    // A resolver that is away takes no address away.
                    Err(trouble) => {
                        outcome = Lookup::Failed;
                        Found {
                            endpoints: known.endpoints.clone(),
                            trouble: Some(trouble),
                        }
                    }
                };
                if *known != now {
                    self.tell(index, known, &now);
                    changed = true;
                    *known = now;
                }
            }
            if changed && outcome == Lookup::Same {
                outcome = Lookup::News;
            }
            changed
        });
        outcome
    }

    fn endpoints(&self, target: &Target, addresses: Vec<SocketAddr>) -> Vec<Endpoint> {
        let mut endpoints: Vec<_> = addresses.into_iter().map(Endpoint::Tcp).collect();
        endpoints.sort();
        endpoints.dedup();
        if endpoints.len() > MAX_ADDRESSES {
            let (url, count) = (&target.name, endpoints.len());
            tracing::warn!(%url, count, used = MAX_ADDRESSES, "the name has too many addresses");
            endpoints.truncate(MAX_ADDRESSES);
        }
        endpoints
    }

    fn tell(&self, index: usize, known: &Found, now: &Found) {
        let url = self.targets.get(index).map(|target| &*target.name);
        let url = url.unwrap_or_default();
        match &now.trouble {
            Some(trouble) => tracing::warn!(url, %trouble, "the name cannot be resolved"),
            None if known.endpoints != now.endpoints => {
                let addresses: Vec<_> = now.endpoints.iter().map(ToString::to_string).collect();
                tracing::info!(url, ?addresses, "the name is resolved");
            }
            None => tracing::info!(url, "the name is resolved again"),
        }
    }
}

/// What a lookup brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookup {
    /// Something that was not known.
    News,
    /// What was known.
    Same,
    /// Not all names.
    Failed,
}
