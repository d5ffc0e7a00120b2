//! Who may come in, and how fast: every limit on new connections of a listener.
//!
//! Shared by the shards that accept. Nothing here waits: whoever finds no room is
//! turned away and counted by the caller under [`Refused::word`].

pub mod turns;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::{AccessRules, PeerList};
use crate::rate::TokenBucket;

/// The limits.
#[derive(Debug, Clone)]
pub struct Options {
    /// First match wins.
    pub access_rules: AccessRules,
    /// Connections at a time; `None` for no limit.
    pub max_connections: Option<usize>,
    /// Connections of one IP address at a time; `None` for no limit.
    pub max_connections_per_address: Option<usize>,
    /// New connections a second; `None` for no limit.
    pub max_conn_rate: Option<f64>,
    /// Whether a load balancer names the peers.
    pub proxy_protocol: Option<Proxy>,
}

/// How a load balancer names the peers.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// The longest that the header may take.
    pub timeout: Duration,
    /// Who may send one.
    pub trusted: PeerList,
}

/// Why a peer is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// By its address.
    AccessRules,
    /// No balancer that is trusted.
    Untrusted,
    /// Too many came within a second.
    Rate,
    /// Too many are here.
    Connections,
    /// Too many of its address are here.
    ConnectionsPerAddress,
}

impl Refused {
    /// The `reason` under which it is counted.
    pub fn word(self) -> &'static str {
        match self {
            Self::AccessRules => "access_rules",
            Self::Untrusted => "proxy_protocol_trusted",
            Self::Rate => "max_conn_rate",
            Self::Connections => "max_connections",
            Self::ConnectionsPerAddress => "max_connections_per_address",
        }
    }
}

/// Connections by address. Never zero.
type Addresses = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// See the module.
#[derive(Debug)]
pub struct Admission {
    options: Options,
    room: Arc<Semaphore>,
    rate: Option<Mutex<TokenBucket>>,
    /// Connections by address; only kept where they are limited.
    addresses: Addresses,
}

/// Room for one connection; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    _room: OwnedSemaphorePermit,
}

/// Room for one connection of an address; given back when dropped.
#[derive(Debug)]
pub struct AddressPermit(Option<Box<(IpAddr, Addresses)>>);

/// Who is counted as one: whoever has an IPv6 address usually has all of its /64. An
/// IPv4-mapped IPv6 address counts as the IPv4 address.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// No code under one of the locks can leave its data half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Admission {
    /// With nobody in.
    pub fn new(options: Options) -> Self {
        let room = options.max_connections.unwrap_or(Semaphore::MAX_PERMITS);
        let rate = options.max_conn_rate;
        Self {
            room: Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS))),
            rate: rate.map(|rate| Mutex::new(TokenBucket::new(rate, Instant::now()))),
            addresses: Arc::default(),
            options,
        }
    }

    /// How a load balancer names the peers, if there is one.
    pub fn proxy(&self) -> Option<&Proxy> {
        self.options.proxy_protocol.as_ref()
    }

    /// Room for a connection that an address has opened: a peer's, or a load balancer's
    /// whose peers are looked at, each with its address, when it has named them.
    pub fn admit(
        &self,
        address: IpAddr,
        now: Instant,
    ) -> Result<(Permit, Option<AddressPermit>), Refused> {
        let of_address = match self.proxy() {
            Some(proxy) if proxy.trusted.contains(address) => None,
            Some(_) => return Err(Refused::Untrusted),
            None => {
                self.permits(address)?;
                // First: an address that is full must not use up the rate of others.
                Some(self.enter_from(address)?)
            }
        };
        Ok((self.enter(now)?, of_address))
    }

    /// Whether the rules let a peer in.
    pub fn permits(&self, peer: IpAddr) -> Result<(), Refused> {
        let permitted = self.options.access_rules.permits(peer);
        permitted.then_some(()).ok_or(Refused::AccessRules)
    }

    /// Room for one more connection, in time and in number.
    pub fn enter(&self, now: Instant) -> Result<Permit, Refused> {
        self.begin(now)?;
        let room = self.room.clone().try_acquire_owned();
        room.map(|room| Permit { _room: room })
            .map_err(|_| Refused::Connections)
    }

    /// Room in time alone: for a connection that takes the place of another.
    pub fn begin(&self, now: Instant) -> Result<(), Refused> {
        let rate = self.rate.as_ref().map(lock);
        match rate.is_none_or(|mut rate| rate.try_take(now)) {
            true => Ok(()),
            false => Err(Refused::Rate),
        }
    }

    /// Room for one more connection of a peer's address.
    pub fn enter_from(&self, peer: IpAddr) -> Result<AddressPermit, Refused> {
        let Some(most) = self.options.max_connections_per_address else {
            return Ok(AddressPermit(None));
        };
        let peer = network(peer);
        let mut addresses = lock(&self.addresses);
        let count = addresses.entry(peer).or_default();
        // Never zero in the map, so nothing is left behind here.
        if *count >= most {
            return Err(Refused::ConnectionsPerAddress);
        }
        *count += 1;
        let counted = (peer, self.addresses.clone());
        Ok(AddressPermit(Some(Box::new(counted))))
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let Some(counted) = self.0.take() else {
            return;
        };
        let (peer, addresses) = *counted;
        let mut addresses = lock(&addresses);
        if let Entry::Occupied(mut entry) = addresses.entry(peer) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        // What a flood made grow must not stay for ever.
        if addresses.len() < addresses.capacity() / 8 {
            let room = addresses.len() * 2;
            addresses.shrink_to(room);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            access_rules: AccessRules::default(),
            max_connections: None,
            max_connections_per_address: None,
            max_conn_rate: None,
            proxy_protocol: None,
        }
    }

    #[test]
    fn room_comes_back_with_the_permit() {
        let admission = Admission::new(Options {
            max_connections: Some(1),
            ..options()
        });
        let now = Instant::now();
        let permit = admission.enter(now).unwrap();
        assert_eq!(admission.enter(now).unwrap_err(), Refused::Connections);
        drop(permit);
        assert!(admission.enter(now).is_ok());
    }

    #[test]
    fn an_address_has_room_of_its_own_and_leaves_nothing_behind() {
        let admission = Admission::new(Options {
            max_connections_per_address: Some(2),
            ..options()
        });
        let [one, other]: [IpAddr; 2] = ["10.0.0.1", "10.0.0.2"].map(|a| a.parse().unwrap());
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        let permits = [admission.enter_from(one), admission.enter_from(mapped)];
        assert!(permits.iter().all(Result::is_ok));
        let refused = admission.enter_from(one).unwrap_err();
        assert_eq!(refused, Refused::ConnectionsPerAddress);
        assert!(admission.enter_from(other).is_ok());
        drop(permits);
        assert!(admission.enter_from(one).is_ok());
        assert!(lock(&admission.addresses).is_empty());
    }

    #[test]
    fn an_address_that_is_full_leaves_the_rate_to_others() {
        let admission = Admission::new(Options {
            max_connections_per_address: Some(1),
            max_conn_rate: Some(2.0),
            ..options()
        });
        let now = Instant::now();
        let [one, other]: [IpAddr; 2] = ["10.0.0.1", "10.0.0.2"].map(|a| a.parse().unwrap());
        let _first = admission.admit(one, now).unwrap();
        for _ in 0..10 {
            let refused = admission.admit(one, now).unwrap_err();
            assert_eq!(refused, Refused::ConnectionsPerAddress);
        }
        let _second = admission.admit(other, now).unwrap();
    }

    #[test]
    fn addresses_of_one_network_count_as_one() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:0:0:1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }

    #[test]
    fn the_rate_counts_also_who_finds_no_room() {
        let admission = Admission::new(Options {
            max_connections: Some(1),
            max_conn_rate: Some(2.0),
            ..options()
        });
        let now = Instant::now();
        let _permit = admission.enter(now).unwrap();
        assert_eq!(admission.enter(now).unwrap_err(), Refused::Connections);
        assert_eq!(admission.enter(now).unwrap_err(), Refused::Rate);
        let later = now + Duration::from_secs(1);
        assert_eq!(admission.enter(later).unwrap_err(), Refused::Connections);
    }
}
