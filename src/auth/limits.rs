//! Failed attempts, counted for each address and each client id.
//!
//! Both tables are bounded. When one is full, what is over goes; if nothing is, what began first: a
//! guesser with a million client ids counts for its address all the same.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Attempt;

/// Addresses and client ids that are remembered, each: some megabytes at most.
const MAX_ENTRIES: usize = 50_000;

/// How many failed attempts are borne.
#[derive(Debug, Clone)]
pub struct Options {
    /// From one IPv4 address or IPv6 /64; none: any number.
    pub per_address: Option<u32>,
    /// With one client id; none: any number.
    pub per_clientid: Option<u32>,
    /// How long they count.
    pub window: Duration,
}

/// What failed attempts have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// Where they come from.
    Address,
    /// The client id.
    ClientId,
}

/// There were too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// What they had in common.
    pub by: By,
    /// How long it takes until the next attempt is let through.
    pub wait: Duration,
}

impl std::fmt::Display for Limited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let by = match self.by {
            By::Address => "from this address",
            By::ClientId => "with this client id",
        };
        // Rounded up, so that it is over then.
        let seconds = self.wait.as_secs() + 1;
        write!(f, "too many failed attempts {by}, wait for {seconds} s")
    }
}

/// Failures since a moment.
#[derive(Debug, Clone, Copy)]
struct Failures {
    since: Instant,
    count: u32,
}

#[derive(Debug)]
struct Table<K> {
    max: Option<u32>,
    window: Duration,
    entries: HashMap<K, Failures>,
}

impl<K: Hash + Eq + Clone> Table<K> {
    fn new(max: Option<u32>, window: Duration) -> Self {
        Self {
            max,
            window,
            entries: HashMap::new(),
        }
    }

    /// How long it takes until `key` may try again; none: it may now.
    fn wait<Q>(&self, key: &Q, now: Instant) -> Option<Duration>
    where
        K: std::borrow::Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let failures = self.entries.get(key)?;
        let over = failures.since + self.window;
        (failures.count >= self.max? && over > now).then(|| over - now)
    }

    fn failed(&mut self, key: K, now: Instant) {
        if self.max.is_none() {
            return;
        }
        let window = self.window;
        if self.entries.len() >= MAX_ENTRIES && !self.entries.contains_key(&key) {
            self.entries
                .retain(|_, failures| failures.since + window > now);
            // A tenth at once, or a full table would be gone through with each failure.
            if self.entries.len() >= MAX_ENTRIES {
                let mut since: Vec<Instant> = self.entries.values().map(|f| f.since).collect();
                since.sort_unstable();
                if let Some(oldest) = since.get(MAX_ENTRIES / 10) {
                    self.entries.retain(|_, failures| failures.since > *oldest);
                }
            }
        }
        let fresh = Failures {
            since: now,
            count: 0,
        };
        let failures = self.entries.entry(key).or_insert(fresh);
        if failures.since + window <= now {
            *failures = fresh;
        }
        failures.count = failures.count.saturating_add(1);
    }
}

/// See the module.
#[derive(Debug)]
pub struct Limits {
    addresses: Mutex<Table<IpAddr>>,
    clientids: Mutex<Table<String>>,
}

/// What counts as one: of IPv6 a site has 2^64 addresses.
fn site(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let prefix = u128::from(v6) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(prefix))
        }
        v4 => v4,
    }
}

impl Limits {
    /// With nothing in them.
    pub fn new(options: &Options) -> Self {
        Self {
            addresses: Mutex::new(Table::new(options.per_address, options.window)),
            clientids: Mutex::new(Table::new(options.per_clientid, options.window)),
        }
    }

    /// Whether an attempt is to be looked at.
    pub fn admit(&self, attempt: &Attempt, now: Instant) -> Result<(), Limited> {
        let addresses = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let address = addresses.wait(&site(attempt.peer), now);
        drop(addresses);
        if let Some(wait) = address {
            let by = By::Address;
            return Err(Limited { by, wait });
        }
        let clientids = self
            .clientids
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match clientids.wait(attempt.clientid.as_str(), now) {
            Some(wait) => Err(Limited {
                by: By::ClientId,
                wait,
            }),
            None => Ok(()),
        }
    }

    /// Counts an attempt that was refused.
    pub fn failed(&self, attempt: &Attempt, now: Instant) {
        let mut addresses = self
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        addresses.failed(site(attempt.peer), now);
        drop(addresses);
        let mut clientids = self
            .clientids
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        clientids.failed(attempt.clientid.clone(), now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Secret;
    use super::*;

    const WINDOW: Duration = Duration::from_secs(60);

    fn attempt(peer: &str, clientid: &str) -> Attempt {
        Attempt {
            clientid: clientid.to_owned(),
            username: String::new(),
            password: Secret::new("x"),
            proto_name: String::new(),
            peer: peer.parse().unwrap(),
            certificate: None,
        }
    }

    fn limits(per_address: Option<u32>, per_clientid: Option<u32>) -> Limits {
        Limits::new(&Options {
            per_address,
            per_clientid,
            window: WINDOW,
        })
    }

    #[test]
    fn failures_count_until_the_window_is_over() {
        let (limits, start) = (limits(Some(2), None), Instant::now());
        let one = attempt("10.0.0.1", "a");
        for _ in 0..2 {
            assert_eq!(limits.admit(&one, start), Ok(()));
            limits.failed(&one, start);
        }
        let later = start + WINDOW / 4;
        let limited = limits.admit(&one, later).unwrap_err();
        assert_eq!((limited.by, limited.wait), (By::Address, WINDOW / 4 * 3));
        // The same address as a dual-stack socket sees it, and another one.
        assert!(
            limits
                .admit(&attempt("::ffff:10.0.0.1", "b"), later)
                .is_err()
        );
        assert!(limits.admit(&attempt("10.0.0.2", "a"), later).is_ok());
        assert_eq!(limits.admit(&one, start + WINDOW), Ok(()));
        limits.failed(&one, start + WINDOW);
        assert_eq!(limits.admit(&one, start + WINDOW), Ok(()));
    }

    #[test]
    fn client_ids_count_wherever_they_come_from_and_a_site_of_ipv6_is_one() {
        let (limits, now) = (limits(Some(3), Some(2)), Instant::now());
        limits.failed(&attempt("2001:db8::1", "a"), now);
        limits.failed(&attempt("10.0.0.1", "a"), now);
        let limited = limits.admit(&attempt("10.0.0.9", "a"), now).unwrap_err();
        assert_eq!(limited.by, By::ClientId);
        limits.failed(&attempt("2001:db8::2", "b"), now);
        limits.failed(&attempt("2001:db8::3", "c"), now);
        assert!(limits.admit(&attempt("2001:db8::4", "d"), now).is_err());
        assert!(limits.admit(&attempt("2001:db8:0:1::4", "d"), now).is_ok());
    }

    #[test]
    fn the_tables_are_bounded_and_forget_the_oldest() {
        let (limits, start) = (limits(None, Some(1)), Instant::now());
        for number in 0..MAX_ENTRIES + 10 {
            let now = start + Duration::from_micros(number as u64);
            limits.failed(&attempt("10.0.0.1", &number.to_string()), now);
        }
        let now = start + Duration::from_secs(1);
        let kept = limits.clientids.lock().unwrap().entries.len();
        assert!(kept <= MAX_ENTRIES, "{kept}");
        let last = (MAX_ENTRIES + 9).to_string();
        assert!(limits.admit(&attempt("10.0.0.1", &last), now).is_err());
        assert!(limits.admit(&attempt("10.0.0.1", "0"), now).is_ok());
        // A limit that is off remembers nothing.
        assert_eq!(limits.addresses.lock().unwrap().entries.len(), 0);
    }
}
