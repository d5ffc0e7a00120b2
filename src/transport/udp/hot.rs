//! See `crate::hot`.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};

use super::table::{Flow, Peer, Table};

pub(crate) fn udp_peer() -> Box<dyn FnMut()> {
    let flow = |number: u16| Flow {
        peer: SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), 1024 + number)),
        local: Some(Ipv4Addr::LOCALHOST.into()),
    };
    let mut table = Table::default();
    for number in 0..10_000 {
        table.enter(Peer::new(flow(number)));
    }
    let mut number = 0;
    Box::new(move || {
        number = (number + 7919) % 10_000;
        let found = table.get(&flow(number));
        assert!(black_box(found).is_some());
    })
}
