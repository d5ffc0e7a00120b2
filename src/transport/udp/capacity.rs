//! How many peers there may be, over all shards.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Options;

/// What there is no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// Any peer.
    Table,
    /// One more peer from this address.
    Address,
}

/// The peers of a listener, counted. One for all of its shards.
///
/// It is looked at when a peer comes or goes, never for a datagram of a known one.
#[derive(Debug)]
pub struct Capacity {
    max_peers: usize,
    max_per_address: Option<u32>,
    peers: AtomicUsize,
    /// Peers from each address that has any; empty without a limit.
    addresses: Mutex<HashMap<IpAddr, u32>>,
}

impl Capacity {
    /// With the limits of these options.
    pub fn new(options: &Options) -> Arc<Self> {
        Arc::new(Self {
            max_peers: options.max_peers,
            max_per_address: options.max_peers_per_address,
            peers: AtomicUsize::new(0),
            addresses: Mutex::default(),
        })
    }

    /// Peers there are.
    pub fn peers(&self) -> usize {
        self.peers.load(Ordering::Relaxed)
    }

    /// What a peer from this address would have no room for. Takes nothing.
    pub(super) fn look(&self, address: IpAddr) -> Option<Full> {
        if self.peers() >= self.max_peers {
            return Some(Full::Table);
        }
        let max = self.max_per_address?;
        let count = self.lock().get(&network(address)).copied();
        (count.unwrap_or(0) >= max).then_some(Full::Address)
    }

    /// Takes the room of one peer; it is given back when the permit is dropped.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Permit, Full> {
        if self.peers.fetch_add(1, Ordering::Relaxed) >= self.max_peers {
            self.peers.fetch_sub(1, Ordering::Relaxed);
            return Err(Full::Table);
        }
        if let Some(max) = self.max_per_address {
            let mut addresses = self.lock();
            let count = addresses.entry(network(address)).or_insert(0);
            if *count >= max {
                // With a limit of 0 the entry is new.
                if *count == 0 {
                    addresses.remove(&network(address));
                }
                self.peers.fetch_sub(1, Ordering::Relaxed);
                return Err(Full::Address);
            }
            *count += 1;
        }
        Ok(Permit {
            capacity: self.clone(),
            address,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is counted as one: whoever has an IPv6 address usually has all of its /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

/// The room of one peer.
#[derive(Debug)]
pub(super) struct Permit {
    capacity: Arc<Capacity>,
    address: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.capacity.max_per_address.is_some() {
            let mut addresses = self.capacity.lock();
            if let Entry::Occupied(mut count) = addresses.entry(network(self.address)) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            // What a flood made grow must not stay for ever.
            if addresses.len() < addresses.capacity() / 8 {
                let room = addresses.len() * 2;
                addresses.shrink_to(room);
            }
        }
        self.capacity.peers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_what_is_given_back_is_free() {
        let options = Options {
            max_peers: 3,
            max_peers_per_address: Some(2),
            ..Options::default()
        };
        let capacity = Capacity::new(&options);
        let [a, b, c]: [IpAddr; 3] =
            ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|a| a.parse().unwrap());
        let first = capacity.take(a).unwrap();
        let second = capacity.take(a).unwrap();
        assert_eq!(capacity.look(a), Some(Full::Address));
        assert_eq!(capacity.take(a).unwrap_err(), Full::Address);
        let third = capacity.take(b).unwrap();
        assert_eq!(capacity.look(c), Some(Full::Table));
        assert_eq!(capacity.take(c).unwrap_err(), Full::Table);
        drop(first);
        assert_eq!(capacity.look(a), None);
        drop((second, third));
        assert_eq!(capacity.peers(), 0);
        assert!(capacity.lock().is_empty());
    }

    #[test]
    fn addresses_of_one_network_count_as_one() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8::1", "2001:db8::ffff:0:0:1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(same("::ffff:192.0.2.1", "192.0.2.1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }
}
