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

/// Whether each device has a session of its own at the broker: where the program's name
/// ends in `_own`.
pub const OWN: bool = matches!(
    env!("CARGO_CRATE_NAME").as_bytes(),
    [.., b'_', b'o', b'w', b'n']
);

mod adapter;
mod broker;
mod certs;
mod device;
mod dtls;
mod handler;
mod http;
mod mqtt;
mod names;
pub mod network;
mod process;
mod proxy;
mod python;
mod service;
mod stage;
mod tokens;

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

pub use adapter::{Adapter, Answer, client};
pub use broker::Broker;
pub use certs::{Authority, Files};
pub use device::Device;
pub use dtls::DtlsDevice;
pub use handler::{Call, Event, Gate, Handler, Log};
pub use http::{Admin, Page};
pub use mqtt::Peer;
pub use names::Names;
pub use process::{PROGRAM, Process};
pub use proxy::Proxy;
pub use python::{Notes, Python};
pub use service::{Asked, Service, http_item, item};
pub use stage::{Plan, Stage, node_name};
pub use tokens::{Signer, hs256, seconds};

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

/// A TCP port on which nobody listens and which stays ours, between a stop and a
/// restart too: a socket that is bound but does not listen holds it until this program
/// ends. The system then gives it to nobody who asks for any port, refuses who connects
/// to it, and lets in who binds it with SO_REUSEADDR, as servers do.
pub fn free_port() -> u16 {
    free_port_at(&[Ipv4Addr::LOCALHOST.into()])
}

/// One that is free, and stays ours, at each of these addresses.
pub fn free_port_at(hosts: &[IpAddr]) -> u16 {
    static HELD: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    let hold = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        std::io::Result::Ok(socket)
    };
    let [first, others @ ..] = hosts else {
        panic!("no address");
    };
    loop {
        let socket = hold(SocketAddr::new(*first, 0)).unwrap();
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        let others = others.iter().map(|host| hold(SocketAddr::new(*host, port)));
        let Ok(others) = others.collect::<Result<Vec<_>, _>>() else {
            continue;
        };
        HELD.lock()
            .unwrap()
            .extend(others.into_iter().chain([socket]));
        return port;
    }
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

/// The bytes of a device, callback by callback, without those that came again; no two of them
/// may be the same otherwise. Asserts that only the last one came again or, with streaming,
/// the last ones in order, before anything new.
#[track_caller]
pub fn without_repetitions(pieces: &[String], streaming: bool) -> Vec<&str> {
    let mut known: Vec<&str> = Vec::new();
    let mut next = 0;
    for piece in pieces {
        let at = known.iter().position(|known| known == piece);
        let at = at.unwrap_or_else(|| {
            known.push(piece);
            known.len() - 1
        });
        let again = at + 1 == next || (streaming && at < next);
        assert!(at == next || again, "{piece:?} in {pieces:?}");
        next = at + 1;
    }
    known
}
