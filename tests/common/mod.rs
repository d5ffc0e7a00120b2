//! What the tests share: a real Mosquitto, a scripted handler, a gateway in this
//! process or as a program, devices and MQTT peers.
//!
//! Nothing is mocked below the public interface. Waiting is always for an event,
//! with a time-out that only guards against waiting for ever.

#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

/// Whether the gateways of this test program speak MQTT 3.1.1 with the broker: where
/// the program's name ends in `_v4`.
pub const V4: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), [.., b'_', b'v', b'4']);

mod adapter;
mod broker;
mod certs;
mod device;
mod handler;
mod http;
mod mqtt;
mod process;
mod proxy;
mod stage;

use std::future::Future;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use adapter::{Adapter, Answer, client};
pub use broker::Broker;
pub use certs::{Authority, Files};
pub use device::Device;
pub use handler::{Call, Event, Gate, Handler, Log};
pub use http::{Admin, Page};
pub use mqtt::Peer;
pub use process::Process;
pub use proxy::Proxy;
pub use stage::{Plan, Stage, node_name};

/// Guards every wait. Far more than anything takes, also on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Waits for `future`, but not for ever.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {LIMIT:?} in vain for {what}"),
    }
}

/// Looks until `look` finds what it wants: for what tells of no change by itself,
/// such as a page of the admin server.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    within(what, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

/// A port on which nobody listens, below those that the system hands out by itself:
/// nobody takes it between a stop and a restart. Programs that run at the same time
/// have two hundred each, so that they do not meet.
pub fn free_port() -> u16 {
    const EACH: u32 = 200;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = 10_000 + std::process::id() % 110 * EACH;
    for _ in 0..EACH {
        let port = (first + NEXT.fetch_add(1, Ordering::Relaxed) % EACH) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// `length` bytes in which every position can be told from its neighbours.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect()
}

/// Asserts that both are the same without printing megabytes.
#[track_caller]
pub fn assert_same(found: &[u8], expected: &[u8]) {
    let differ = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(differ, None, "the first difference");
    assert_eq!(found.len(), expected.len(), "the length");
}
