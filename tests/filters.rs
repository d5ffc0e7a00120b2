//! Many filters, subscribed and restored: rule 13.
//!
//! Prints how long it takes. A size of one's own:
//! `EXPROTO_TEST_FILTERS=100000 cargo test --release --test filters -- --nocapture`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Broker, Peer, Plan, Proxy};
use exproto_sidecar::broker::{self, topic::TopicFilter};
use exproto_sidecar::metrics::{BrokerMetrics, Metrics};

/// Counts what it gets.
struct Counting(AtomicUsize);

impl broker::Subscriber for Counting {
    fn deliver(&self, _: broker::Delivery) -> Result<(), broker::Delivery> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Rule 2, over an outage: subscriptions that end while the link is down are ended at a
/// broker that kept the session, however many: nothing comes for them any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_that_end_during_an_outage_are_ended() {
    const FILTERS: usize = 3000;
    let mosquitto = Broker::with("allow_anonymous true\nlog_type error\n").await;
    let proxy = Proxy::to(mosquitto.port).await;
    let plan = Plan::new(&proxy.url(), "http://127.0.0.1:1");
    let options = exproto_sidecar::options::broker(&plan.config()).unwrap();
    let metrics = Metrics::new().unwrap();
    let runtimes = [tokio::runtime::Handle::current()];
    let started = broker::Broker::start(options, &runtimes, &BrokerMetrics::new(&metrics));
    let (pool, tasks) = started.unwrap();
    let counting = Arc::new(Counting(0.into()));
    let subscribe = async |filter: String| {
        let filter = TopicFilter::parse(&filter).unwrap();
        let qos = broker::QoS::AtLeastOnce;
        let kept = pool.subscribe(&filter, qos, counting.clone(), None).await;
        kept.unwrap()
    };
    let all = (0..FILTERS).map(|number| subscribe(format!("gone/{number}")));
    let gone = futures_util::future::join_all(all).await;
    let _stays = subscribe("stays".to_owned()).await;
    let all_up = |wanted: bool| {
        let states = pool.states();
        let up = states.iter().filter(|state| state.is_up()).count();
        (up == if wanted { states.len() } else { 0 }).then_some(())
    };
    proxy.cut();
    common::until("the links to be down", || async { all_up(false) }).await;
    drop(gone);
    proxy.mend();
    common::until("the links to be up", || async { all_up(true) }).await;
    let mut peer = Peer::connect(mosquitto.port).await;
    // On every link the answers to these come behind all that it was asked before.
    let last = (0..20).map(|number| subscribe(format!("last/{number}")));
    let _last = futures_util::future::join_all(last).await;
    for number in 0..FILTERS {
        peer.publish(&format!("gone/{number}"), 1, "x").await;
    }
    for topic in ["stays", "last/0"] {
        peer.publish(topic, 1, "x").await;
    }
    common::until("what is subscribed", || async {
        (counting.0.load(Ordering::Relaxed) >= 2).then_some(())
    })
    .await;
    let page = metrics.handle().render();
    let unclaimed = page
        .lines()
        .find_map(|line| line.strip_prefix("exproto_broker_unclaimed_total "));
    assert_eq!(unclaimed, Some("0"));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    assert_eq!(tasks.drain(deadline).await, 0);
}

/// Rule 13: many filters, one of them over all others, are there again when the broker
/// that forgot them is back; none is missing, none is doubled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_filters_are_restored() {
    let filters = std::env::var("EXPROTO_TEST_FILTERS").map_or(20_000, |n| n.parse().unwrap());
    let mut mosquitto = Broker::with("allow_anonymous true\nlog_type error\n").await;
    let plan = Plan::new(&mosquitto.url(), "http://127.0.0.1:1");
    let options = exproto_sidecar::options::broker(&plan.config()).unwrap();
    let metrics = Metrics::new().unwrap();
    let runtimes = [tokio::runtime::Handle::current()];
    let started = broker::Broker::start(options, &runtimes, &BrokerMetrics::new(&metrics));
    let (pool, tasks) = started.unwrap();
    let counting = Arc::new(Counting(0.into()));
    let subscribe = async |filter: String| {
        let filter = TopicFilter::parse(&filter).unwrap();
        let qos = broker::QoS::AtLeastOnce;
        let kept = pool.subscribe(&filter, qos, counting.clone(), None).await;
        kept.unwrap()
    };
    let begun = Instant::now();
    let mut kept = Vec::new();
    for first in (0..filters).step_by(1000) {
        let numbers = first..filters.min(first + 1000);
        let some = numbers.map(|number| subscribe(format!("meters/{number}/cmd")));
        kept.extend(futures_util::future::join_all(some).await);
    }
    kept.push(subscribe("meters/+/cmd".to_owned()).await);
    println!("{filters} filters subscribed in {:?}", begun.elapsed());
    let up = || async {
        let states = pool.states();
        let up = states.iter().all(broker::LinkState::is_up);
        up.then_some(states.len())
    };
    mosquitto.kill();
    common::until("the links to be down", || async {
        up().await.is_none().then_some(())
    })
    .await;
    mosquitto.up().await;
    let back = Instant::now();
    let links = common::until("the links to be up", up).await;
    println!(
        "{filters} filters restored on {links} links in {:?}",
        back.elapsed()
    );
    let mut peer = Peer::connect(mosquitto.port).await;
    let sample: Vec<_> = (0..filters).step_by((filters / 1000).max(1)).collect();
    for number in &sample {
        peer.publish(&format!("meters/{number}/cmd"), 1, "x").await;
    }
    let copies = 2 * sample.len();
    common::until("two copies of each", || async {
        (counting.0.load(Ordering::Relaxed) >= copies).then_some(())
    })
    .await;
    kept.clear();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    assert_eq!(tasks.drain(deadline).await, 0);
    assert_eq!(counting.0.load(Ordering::Relaxed), copies);
}
